"""What a process was at when it died: a few lines on its node's disk that outlive it, so that only one row pays.

Whoever works writes down what it begins and what is done. A process that dies (a segmentation fault, the kernel's
out-of-memory killer, a hang that its deadline ends) leaves a beginning without an end; the next one finds it and knows
which rows to suspect. A node that dies takes its journal along, which is right: that is no row's fault.

One file per piece of work, one JSON line per event, appended:

    {"open": …, "said": FILE}   a process takes the work up; what it may say while it dies goes to FILE
    {"begin": [KEYS], …}        it begins with these rows
    {"end": true}               and is through with them
    {"died": [KEYS], …}         the next process says this of the one before; no keys where no row was begun
    {"closed": true}            the work is done
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.errors import RunFailed

CRASH, TIMEOUT = "worker.crash", "worker.timeout"
SILENT, PLAIN = 1, 2
"""What a death weighs. One without a word may come from outside: an operator, a spot notice, a neighbour's memory."""

ROW_BEARS, WORK_BEARS = 4, 6
"""The weight of deaths at which a row, alone on its worker, is given up; and a piece of work without a row to blame."""

MOST_DEATHS_PER_ROW = 1 + ROW_BEARS // SILENT
"""Once among others, then alone."""

KEEP_DAYS = 7
VMSTAT = Path("/proc/vmstat")
MAX_SAID_BYTES = 1 << 18


@dataclass(frozen=True)
class Death:
    """How one process ended, at which rows. `words` say it in a message; `weight` is SILENT or PLAIN; `starved` where
    the kernel did it for want of memory."""

    died: list[str]
    kind: str
    words: str
    weight: int
    starved: bool = False


class Journal:
    """The journals of one run on one node, in the hands of one process.

    From here on a fatal signal makes Python write where it stands into a file beside them (faulthandler).
    """

    def __init__(self, name: str) -> None:
        self.folder = private_folder() / name
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.said = self.folder / f"{os.getpid()}-{time.time_ns()}.said"
        self.file: BinaryIO = self.said.open("ab", buffering=0)
        faulthandler.enable(file=self.file, all_threads=True)

    def open(self, name: str, what: str) -> Record:
        """Take up a piece of work, which messages call `what`; at most one process at a time does.

        Raises:
            RunFailed: it killed one process after the other, and no row is to blame.
        """
        return Record(self, name, what)


@cache
def journal_of(name: str) -> Journal:
    """This process's journal of a run; a process may do several pieces of work, one after the other."""
    return Journal(name)


class Record:
    """One piece of work: who died at it before, and what is being done now."""

    def __init__(self, journal: Journal, name: str, what: str) -> None:
        self.journal = journal
        self.path = journal.folder / f"{name}.jsonl"
        self.deaths, last = _read(self.path)
        # Unbuffered, and open for as long as the work takes: it is written twice a device batch.
        self.file: BinaryIO = self.path.open("ab", buffering=0)
        if last is not None:
            self.deaths.append(last)
            self._write(asdict(last))
        blameless = [death for death in self.deaths if not death.died]
        if sum(death.weight for death in blameless) >= WORK_BEARS:
            raise RunFailed(
                f"{what}: {len(blameless)} workers died in a row, and not at any row; the last: {blameless[-1].words}; "
                "what is committed stays, run the same command again once that is mended"
            )
        self._write({"open": os.getpid(), "said": journal.said.name})

    @property
    def suspects(self) -> set[str]:
        """Keys of rows at which a process died; each is to be done alone."""
        return {key for death in self.deaths for key in death.died}

    def starved(self, key: str) -> bool:
        """Whether there was too little memory for this row alone, in a batch of the frozen size."""
        return any(death.starved for death in self.deaths if death.died == [key])

    def verdict(self, key: str) -> Death | None:
        """The last of the deaths at this row alone, with how many there were, once they are too many."""
        alone = [death for death in self.deaths if death.died == [key]]
        if sum(death.weight for death in alone) < ROW_BEARS:
            return None
        last = alone[-1]
        words = f"{last.words}; {len(alone)} times with this row alone"
        return Death([key], last.kind, words, last.weight)

    @contextmanager
    def doing(self, keys: list[str], timeout_s: float | None = None) -> Iterator[Callable[[str], None]]:
        """These rows are in hand inside the `with` block; past the deadline this process ends.

        Yields what takes last words, of a process that is about to end itself.
        """
        begun = {"begin": keys, "timeout_s": timeout_s, "thread": threading.get_ident(), "oom_kills": oom_kills()}
        self._write(begun)
        if timeout_s is not None:
            # In C, by a thread that needs no GIL: it ends a process that hangs inside a library too.
            faulthandler.dump_traceback_later(timeout_s, exit=True, file=self.journal.file)
        try:
            yield self._say
        finally:
            if timeout_s is not None:
                faulthandler.cancel_dump_traceback_later()
            self._write({"end": True})

    def close(self) -> None:
        """The work is done. What was found stays, for the case that its result is lost and it is done again."""
        if any(death.died for death in self.deaths):
            self._write({"closed": True})
        else:
            self.path.unlink()
        self.file.close()

    def _say(self, words: str) -> None:
        self.journal.file.write(f"Said: {words}\n".encode(errors="replace"))

    def _write(self, event: dict[str, Any]) -> None:
        self.file.write(json.dumps(event).encode() + b"\n")


def _read(path: Path) -> tuple[list[Death], Death | None]:
    """The deaths that a journal tells of, and the last process's, which nobody has written down yet."""
    deaths: list[Death] = []
    opened: dict[str, Any] | None = None
    begun: dict[str, Any] | None = None
    for line in path.read_bytes().splitlines() if path.exists() else ():
        event = json.loads(line)
        if "died" in event:
            deaths.append(Death(**event))
        if "closed" in event:
            deaths = [death for death in deaths if death.died]
        opened = event if "open" in event else None if "closed" in event or "died" in event else opened
        begun = event if "begin" in event else None
    return deaths, None if opened is None else _death(path.parent / opened["said"], begun)


def _death(said: Path, begun: dict[str, Any] | None) -> Death:
    """Read out of what a process left how it ended."""
    data = b""
    if said.exists():
        with said.open("rb") as file:
            data = file.read(MAX_SAID_BYTES)
        said.unlink()
    text = data.decode(errors="replace")
    # All of it into the log of the process that finds it; a message has room for one line.
    sys.stderr.write(text)
    keys = begun["begin"] if begun else []
    where = innermost(text, begun["thread"] if begun else 0)
    if own := re.search(r"^Said: (.*)", text, re.MULTILINE):
        return Death(keys, CRASH, f"the worker ended itself: {own[1]}", PLAIN)
    if text.startswith("Timeout (") and begun:
        return Death(keys, TIMEOUT, f"no result within batch_timeout_s {begun['timeout_s']:g}{where}", PLAIN)
    if fatal := re.search(r"^Fatal Python error: (.*)", text, re.MULTILINE):
        return Death(keys, CRASH, f"the worker died: {fatal[1]}{where}", PLAIN)
    if begun and begun["oom_kills"] is not None and (oom_kills() or 0) > begun["oom_kills"]:
        words = "the worker was killed, and the kernel's out-of-memory killer was at work"
        return Death(keys, CRASH, words, PLAIN, starved=True)
    silent = "the worker was killed without a word, as Ray's memory monitor and the kernel's out-of-memory killer do"
    return Death(keys, CRASH, silent, SILENT)


def innermost(dump: str, thread: int) -> str:
    """Where a thread of faulthandler's dump stands, ` in FUNCTION (FILE:LINE)`; of the one that failed, if it is not
    there."""
    threads = re.split(r"^(?=(?:Current thread|Thread) 0x)", dump, flags=re.MULTILINE)
    mine = [block for block in threads if re.match(rf"(?:Current thread|Thread) 0x0*{thread:x}\b", block)]
    failed = [block for block in threads if block.startswith("Current thread")]
    for block in (*mine, *failed):
        if frame := re.search(r'^  File "(.*)", line (\d+) in (.*)$', block, re.MULTILINE):
            file = frame[1].rpartition("site-packages/")[2]
            return f" in {frame[3]} ({file}:{frame[2]})"
    return ""


def oom_kills() -> int | None:
    """How many processes this machine's kernel has killed for memory so far; None where it does not say (not Linux)."""
    try:
        found = re.search(r"^oom_kill (\d+)$", VMSTAT.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def forget(run_id: str) -> None:
    """A run is over; on other nodes than this one its journals are swept out later."""
    for folder in _folder().glob(f"{run_id}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def private_folder() -> Path:
    """This user's folder for journals on this node; those of runs of long ago are swept out of it.

    Raises:
        RunFailed: somebody else made it first.
    """
    folder = _folder()
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RunFailed(f"{folder} is not a folder of this user alone; take it away, or set TMPDIR to another place")
    for run in folder.iterdir():
        # Of several workers that sweep, the others find it gone.
        try:
            old = run.stat().st_mtime < time.time() - KEEP_DAYS * 86400
        except FileNotFoundError:
            continue
        if old:
            shutil.rmtree(run, ignore_errors=True)
    return folder


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / f"ldm-batch-{os.getuid()}"
