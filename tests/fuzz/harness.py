"""Inputs that hypothesis makes out of valid ones, against a door of ours: what comes in, what is refused, what crashes.

A door lets an input in, or refuses it by an error of ours in plain lines. Anything else is a crash: another exception,
a warning, silence for longer than DEADLINE_S, control characters in what a user is told.
"""

from __future__ import annotations

import resource
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from pipelines.errors import LdmError

DEADLINE_S = 20.0
MAX_MESSAGE_CHARS = 6000
INSIDE = "inside"


@dataclass(frozen=True)
class Door:
    """`enter` takes an input and an empty folder, and returns INSIDE or why a row, a picture or a file was refused."""

    name: str
    inputs: SearchStrategy[Any]
    enter: Callable[[Any, Path], str]


@dataclass
class Found:
    """`outcomes` counts every input; `crashes` holds the first input of each kind, with its traceback."""

    outcomes: Counter[str] = field(default_factory=Counter)
    crashes: dict[str, str] = field(default_factory=dict)
    peak_mib: int = 0

    @property
    def num_inputs(self) -> int:
        return self.outcomes.total()

    @property
    def share_inside(self) -> float:
        return self.outcomes[INSIDE] / max(1, self.num_inputs)


class Hang(BaseException):
    """Nothing of ours may catch it."""


def fuzz(door: Door, num_inputs: int, folder: Path, at: int = 0) -> Found:
    """Put `num_inputs` inputs to a door; the same ones for the same seed `at`."""
    found = Found()

    @seed(at)
    @settings(
        max_examples=num_inputs,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(door.inputs)
    def one(value: Any) -> None:
        try:
            with warnings.catch_warnings(), at_most(DEADLINE_S):
                warnings.simplefilter("error")
                found.outcomes[door.enter(value, folder)] += 1
        except LdmError as error:
            problem = unfit(str(error))
            found.outcomes[type(error).__name__ if problem is None else "crash"] += 1
            if problem is not None:
                found.crashes.setdefault(f"{problem}: {str(error)[:60]!r}", f"{value!r:.2000}\n{error!s:.2000}")
        except (Exception, Hang) as error:  # noqa: BLE001 - whatever it is, it is a crash
            found.outcomes["crash"] += 1
            ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/pipelines/" in frame.filename]
            where = f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}" if ours else "?"
            text = "".join(traceback.format_exception(error))
            found.crashes.setdefault(f"{type(error).__name__} at {where}", f"{value!r:.2000}\n{text[-3000:]}")

    one()
    found.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return found


def unfit(message: str) -> str | None:
    """What is wrong with a message, as one for a terminal."""
    if not message.strip() or len(message) > MAX_MESSAGE_CHARS or "Traceback" in message:
        return "no message for a person"
    if not all(c.isprintable() or c == "\n" for c in message):
        return "control characters"
    return None


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Hang(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
