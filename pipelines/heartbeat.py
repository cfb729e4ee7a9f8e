"""Who works on an output now. Saves work, never correctness: two runs at once only make some shards twice.

A run touches `_ldm/runs/<run_id>/heartbeat.json` while it lives and writes `ended.json` when it is over. Ages are taken
from the store's own clock. `stop` beside them asks a run's workers to take no further shard.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from pipelines.errors import LdmError, RunAlive
from pipelines.storage import Store

RUNS = "_ldm/runs"
BEAT_S = 10.0
DEAD_AFTER_S = 60.0


def new_run_id() -> str:
    """Sortable by time: 20261121T101500-1a2b3c."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"


def stop_path(run_id: str) -> str:
    return f"{RUNS}/{run_id}/stop"


def ask_to_stop(store: Store, run_id: str) -> None:
    store.write(stop_path(run_id), b"")


class Heartbeat:
    """Keeps this run visible for as long as the `with` block lasts."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.store = store
        self.path = f"{RUNS}/{run_id}/heartbeat.json"
        self.body = json.dumps({"run_id": run_id, **_this_process()}).encode()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="ldm-heartbeat")

    def __enter__(self) -> Heartbeat:
        self.store.write(self.path, self.body)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(timeout=BEAT_S)

    def _beat(self) -> None:
        # A connection of its own, so that a beat never waits behind the run's uploads.
        store = Store(self.store.url, self.store.storage_options)
        while not self._over.wait(BEAT_S):
            try:
                store.write(self.path, self.body)
            except LdmError:
                continue  # A missed beat costs nothing; the commit will say what is wrong with the store.


def live_runs(store: Store, own: str) -> list[dict[str, Any]]:
    """Older runs that seem alive; `own` has beaten already, its time is the store's present.

    Only older ones: of two that start together one has to go on, and one that was refused must not refuse the next.
    """
    listing = store.list(RUNS)
    now = listing[f"{RUNS}/{own}/heartbeat.json"].modified_s
    alive = []
    for path, info in listing.items():
        if not path.endswith("/heartbeat.json"):
            continue
        folder = path.removesuffix("/heartbeat.json")
        if folder >= f"{RUNS}/{own}" or f"{folder}/ended.json" in listing or now - info.modified_s > DEAD_AFTER_S:
            continue
        body = store.read(path)
        run = json.loads(body) if body else {}
        if run and not _is_gone(run):
            alive.append(run | {"age_s": now - info.modified_s})
    return alive


def refuse_if_alive(store: Store, own: str, join: bool, takeover: bool) -> None:
    """Leave an output to the run that works on it, unless told otherwise.

    Raises:
        RunAlive: with who and where.
    """
    others = live_runs(store, own)
    if not others or join:
        return
    if takeover:
        for other in others:
            ask_to_stop(store, other["run_id"])
        return
    other = others[0]
    raise RunAlive(
        f"{store.url}: run {other['run_id']} on {other['host']} (pid {other['pid']}) is alive, last seen "
        f"{other['age_s']:.0f} s ago; wait for it, or pass --join to help it or --takeover to replace it"
    )


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "boot": _boot_id(), "pid": os.getpid(), "born": _born(os.getpid())}


def _is_gone(run: dict[str, Any]) -> bool:
    """Certain only for a process of this machine."""
    if run.get("host") != socket.gethostname():
        return False
    return run.get("boot") != _boot_id() or _born(int(run["pid"])) != run.get("born")


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _born(pid: int) -> str:
    """The start time of a process in the kernel's ticks; "" where there is none, "?" where nobody can say."""
    if not Path("/proc/self/stat").exists():
        return "?"
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
