"""Who works on an output now. Saves work, never correctness: two runs at once only make some shards twice.

A run touches `_ldm/runs/<run_id>/heartbeat.json` while it lives and writes `ended.json` when it is over. Ages are taken
from the store's own clock. `stop` beside them asks a run's workers to take no further shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from pipelines.errors import JobError, LdmError, RunAlive, StorageError
from pipelines.slices import Slice
from pipelines.storage import ObjectStore, Store

RUNS = "_ldm/runs"
SUBMISSION = "LDM_BATCH_SUBMISSION"
"""In the environment of a run that a cluster starts again by itself: what it was submitted as, and where."""

BEAT_S = 10.0
DEAD_AFTER_S = 60.0


def new_run_id() -> str:
    """Sortable by time: 20261121T101500-1a2b3c."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"


def stop_path(run_id: str) -> str:
    return f"{RUNS}/{run_id}/stop"


def ask_to_stop(store: Store, run_id: str) -> None:
    store.write(stop_path(run_id), b"")


@dataclass(frozen=True)
class Permit:
    """Whether a run's workers may begin another shard; made by its driver, asked by them."""

    store: Store
    run_id: str
    driver: dict[str, Any] = field(default_factory=lambda: _this_process())

    @property
    def is_over(self) -> bool:
        """A stop was asked, or the driver is gone, without whom nothing is committed.

        Ray ends the workers of a killed driver, but some tenths of a second later.
        """
        return self.store.read(stop_path(self.run_id)) is not None or _is_gone(self.driver)


def end(store: Store, run_id: str, body: dict[str, Any]) -> None:
    """The last word of a run: how it ended."""
    store.write(f"{RUNS}/{run_id}/ended.json", json.dumps(body, default=str).encode())


class Heartbeat:
    """Keeps this run visible for as long as the `with` block lasts."""

    def __init__(self, store: Store, run_id: str, part: Slice | None = None) -> None:
        self.store = store
        self.path = f"{RUNS}/{run_id}/heartbeat.json"
        says = {} if part is None else {"slice": str(part)}
        self.body = json.dumps({"run_id": run_id, **_this_process(), **says}).encode()
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
        store = Store(self.store.url, self.store.storage_options, reached=True)
        while not self._over.wait(BEAT_S):
            try:
                store.write(self.path, self.body)
            except LdmError:
                continue  # A missed beat costs nothing; the commit will say what is wrong with the store.


def present_s(store: ObjectStore) -> float:
    """The time by the store's own clock: that of an object written now."""
    path = f"_ldm/clock-{uuid.uuid4().hex}"
    store.write(path, b"")
    info = store.info(path)
    store.delete(path)
    if info is None:
        raise StorageError(f"{store.url}: what was written is not there; the store cannot be relied on")
    return info.modified_s


def live_runs(store: Store, now_s: float) -> list[dict[str, Any]]:
    """Runs that seem alive, the oldest first; `now_s` is the store's present."""
    listing = store.list(RUNS)
    alive = []
    for path, info in sorted(listing.items()):
        if not path.endswith("/heartbeat.json"):
            continue
        folder = path.removesuffix("/heartbeat.json")
        if f"{folder}/ended.json" in listing or now_s - info.modified_s > DEAD_AFTER_S:
            continue
        run = _read(store.read(path))
        if not _is_gone(run):
            alive.append({**run, "run_id": folder.rpartition("/")[2], "age_s": now_s - info.modified_s})
    return alive


def refuse_if_alive(
    store: Store, own: str, join: bool, takeover: bool, way_out: str, part: Slice | None = None
) -> None:
    """Leave an output to the run that works on it, unless told otherwise; `own` has beaten already.

    Runs of slices that have no shard in common live beside each other.

    Only an older run counts: of two that start together one has to go on, and one that was refused must not refuse
    the next.

    Raises:
        RunAlive: with who and where, and `way_out`.
    """
    beat = store.info(f"{RUNS}/{own}/heartbeat.json")
    assert beat is not None
    alive = (run for run in live_runs(store, beat.modified_s) if run["run_id"] < own)
    others = [run for run in alive if part is None or (its := _slice(run)) is None or part.meets(its)]
    submission = _submission()
    if submission and all(run.get("submission") == submission for run in others):
        # Earlier attempts of this very submission: whoever started us has ended them, however fresh their last beat is.
        takeover = True
    if not others or join:
        return
    if takeover:
        for other in others:
            ask_to_stop(store, other["run_id"])
        return
    raise RunAlive(f"{store.url}: {describe(others[0])}; {way_out}")


def describe(run: dict[str, Any]) -> str:
    """A run that is alive, for a message."""
    what = f" (slice {part})" if (part := _slice(run)) else ""
    return f"run {run['run_id']}{what} on {run['host']} (pid {run['pid']}) is alive, last seen {run['age_s']:.0f} s ago"


def _slice(run: dict[str, Any]) -> Slice | None:
    """The slice that a run works on; None where it is the whole, or cannot be read."""
    try:
        return Slice.parse(run["slice"])
    except (KeyError, TypeError, JobError):
        return None


def _read(body: bytes | None) -> dict[str, Any]:
    """What a heartbeat says; where it cannot be read, somebody is there all the same."""
    try:
        run = json.loads(body or b"")
        return {**run, "host": str(run["host"]), "pid": int(run["pid"]), "boot": run["boot"], "born": run["born"]}
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return {"host": "a host that it does not name", "pid": 0}


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "namespace": _namespace(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "submission": _submission(),
    }


def _submission() -> str | None:
    """A name for what SUBMISSION says, as that may be long."""
    said = os.environ.get(SUBMISSION)
    return hashlib.sha256(said.encode("utf-8", "surrogateescape")).hexdigest()[:32] if said else None


def _is_gone(run: dict[str, Any]) -> bool:
    """Certain only for a process of this machine."""
    if run.get("host") != socket.gethostname():
        return False
    if run.get("boot") != _boot_id():
        return True
    # Two containers may share a host's name, and one does not see the other's processes.
    return run.get("namespace") == _namespace() and _born(int(run["pid"])) != run.get("born")


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _namespace() -> str:
    path = Path("/proc/self/ns/pid")
    return str(path.readlink()) if path.is_symlink() else ""


def _born(pid: int) -> str:
    """The start time of a process in the kernel's ticks; "" where there is none, "?" where nobody can say."""
    if not Path("/proc/self/stat").exists():
        return "?"
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
