"""The processes of a run, and real deaths: who is there, what they are at, and SIGKILL."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A living process. `title` is its command line; Ray's processes say there which task they are at."""

    pid: int
    parent: int
    born: str
    title: str

    @property
    def is_there(self) -> bool:
        """Whether it still runs; a zombie that nobody has waited for does not."""
        found = _read(self.pid)
        return found is not None and found.born == self.born

    @property
    def kind(self) -> str | None:
        """What of a run it is: a worker, who is at an upload, or a raylet."""
        if self.title.startswith("ray::MapWorker("):
            return "worker"
        if self.title.startswith("ray::MapBatches(ShardWriter)"):
            return "upload"
        return "raylet" if self.title.partition(" ")[0].endswith("/raylet") else None


def _read(pid: int) -> Process | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return None
    return None if stat[0] in "ZX" else Process(pid, int(stat[1]), stat[19], title)


def family(root: int) -> list[Process]:
    """A process and all that descend from it, the oldest first."""
    found = [process for path in Path("/proc").iterdir() if path.name.isdigit() and (process := _read(int(path.name)))]
    members = {root}
    # A child has not always the larger number.
    while more := {process.pid for process in found if process.parent in members} - members:
        members |= more
    return sorted((process for process in found if process.pid in members), key=lambda one: int(one.born))


def wait_for(root: int, kind: str, seconds: float) -> list[Process]:
    """The processes of that kind below `root`, as soon as there are any; none after so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := [process for process in family(root) if process.kind == kind]:
            return found
        time.sleep(0.005)
    return []


def kill(process: Process, seconds: float = 10.0) -> bool:
    """SIGKILL, and whether it hit: the process was there, and is gone for good."""
    if not process.is_there:
        return False
    try:
        os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    until = time.monotonic() + seconds
    while process.is_there and time.monotonic() < until:
        time.sleep(0.002)
    return not process.is_there


def gone(processes: list[Process], seconds: float) -> list[Process]:
    """Wait until all of them have ended by themselves; those that have not."""
    until = time.monotonic() + seconds
    while (left := [process for process in processes if process.is_there]) and time.monotonic() < until:
        time.sleep(0.1)
    return left
