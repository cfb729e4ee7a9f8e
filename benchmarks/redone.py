"""Work done twice because of a kill: ours, and two peers over the same rows, killed at the same point.

That point is inside a shard, once half of the rows have been begun and no worker has begun one for a while: right at a
shard's end those before it may be on their way into the output still.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.figure import Figure
from tests.faults.notes import Notes
from tests.faults.outside import Seen, look
from tests.faults.processes import family, gone, kill, wait_for
from tests.faults.soak import ROOT, finish, start, undisturbed, write_job

ROWS, BATCH, STEPS, WORKERS = 24, 2, 200, 2
QUIET_S = 0.8
PEER_LIMIT_S = 300.0


def measure(folder: Path, model: Path) -> list[Figure]:
    """Each is killed, and started again until it ends by itself."""
    calm = folder / "undisturbed"
    wanted = undisturbed(write_job(calm, model, str(calm / "out"), {}, ROWS, STEPS, WORKERS))
    numbers: dict[str, dict[str, Any]] = {
        "driver killed": _ours(folder / "driver", model, wanted, "driver"),
        "worker killed": _ours(folder / "worker", model, wanted, "worker"),
        "Ray Data write_parquet, run again": _peer(folder / "rerun", model, False),
        "Ray Data CheckpointConfig": _peer(folder / "checkpoint", model, True),
        "the same, its reader told to keep files apart": _peer(folder / "apart", model, True, "v1"),
    }
    ours = [numbers["driver killed"], numbers["worker killed"]]
    # A shard is one batch here.
    reached = all(one["fired"] and one["whole"] and one["num_redone"] <= WORKERS * BATCH for one in ours)
    measured = "; ".join(f"{name}: {_told(one)}" for name, one in numbers.items())
    return [
        Figure(
            f"rows redone after a kill ({ROWS} rows, {WORKERS} workers, shards of {BATCH})",
            "≤ 1 shard per worker; peers in the same run",
            measured,
            reached,
            numbers,
        )
    ]


def _told(one: dict[str, Any]) -> str:
    if not one["ended"]:
        return f"no end in {PEER_LIMIT_S:.0f} s"
    return (
        f"{one['num_redone']} rows redone"
        + (f", {one['num_twice']} rows twice in the output" if one["num_twice"] else "")
        + (f", {one['num_lost']} lost" if one["num_lost"] else "")
    )


def _ours(folder: Path, model: Path, wanted: Seen, kind: str) -> dict[str, Any]:
    output = write_job(folder, model, str(folder / "out"), {}, ROWS, STEPS, WORKERS)
    notes = Notes(folder / "notes")
    running = start(output, **notes.environ)
    hit = _kill_at_half(running, notes, kind)
    code, _ = finish(running)
    if kind == "driver":
        code, _ = finish(start(output, **notes.environ))
    seen = look(output.path)
    return {
        "fired": hit,
        "ended": code == 0,
        "whole": not seen.differences(wanted),
        "num_redone": notes.num_rows_begun - ROWS,
        "num_twice": sum("twice" in fault for fault in seen.faults),
        "num_lost": len(seen.lost),
        "differences": seen.differences(wanted)[:3],
    }


def _peer(folder: Path, model: Path, checkpoint: bool, reader: str = "default") -> dict[str, Any]:
    source = folder / "in"
    source.mkdir(parents=True)
    for first in range(0, ROWS, BATCH):
        rows = range(first, first + BATCH)
        table = pa.table({"id": [f"row {i}" for i in rows], "prompt": [f"a red circle {i}" for i in rows]})
        pq.write_table(table, source / f"{first:06d}.parquet")
    notes = Notes(folder / "notes")
    ids_at = str(folder / "ids") if checkpoint else "-"
    arguments = [str(source), str(folder / "out"), ids_at, reader, str(model), str(STEPS)]

    def again() -> subprocess.Popen[bytes]:
        with (folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.ray_peer", *arguments, str(BATCH), str(WORKERS), str(notes.path)],
                cwd=ROOT,
                env=dict(os.environ),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    running = again()
    hit = _kill_at_half(running, notes, "driver")
    running.wait()
    second = again()
    code = _wait(second)
    ids = [
        i for path in (folder / "out").glob("*.parquet") for i in pq.read_table(path, columns=["id"])["id"].to_pylist()
    ]
    return {
        "fired": hit,
        "ended": code == 0,
        "num_redone": notes.num_rows_begun - ROWS,
        "num_twice": len(ids) - len(set(ids)),
        "num_lost": ROWS - len(set(ids)),
        "num_files": len(list((folder / "out").glob("*.parquet"))),
        "exit_code": code,
    }


def _wait(running: subprocess.Popen[bytes]) -> int | None:
    try:
        return running.wait(timeout=PEER_LIMIT_S)
    except subprocess.TimeoutExpired:
        members = family(running.pid)
        running.kill()
        for one in gone(members, 20):
            kill(one)
        return None


def _kill_at_half(running: subprocess.Popen[bytes], notes: Notes, kind: str) -> bool:
    """SIGKILL a run, or one of its workers, once half of the rows were begun."""
    _until(lambda: notes.num_rows_begun >= ROWS // 2 or running.poll() is not None)
    _until(lambda: time.time() - notes.last > QUIET_S or running.poll() is not None)
    members = family(running.pid)
    victim = members[0] if kind == "driver" else wait_for(running.pid, "worker", 10)[0]
    hit = running.poll() is None and kill(victim)
    if kind == "driver":
        # Before the next one begins, so that what it counts is its own.
        for one in gone(members[1:], 30):
            kill(one)
    return hit


def _until(there: Callable[[], bool]) -> None:
    while not there():
        time.sleep(0.02)
