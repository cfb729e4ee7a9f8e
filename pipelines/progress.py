"""What a person sees while a run goes on: a live bar on a terminal, a plain line now and then otherwise."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from pipelines.planner import Planned
from pipelines.plans import Plan
from pipelines.shards import Shards

LINE_EVERY_S = 10.0


class Progress:
    """A `runner.Listener` that writes to a stream. The ETA goes by work (steps × pixels), not by rows."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.num_rows = self.num_failed = self.total_rows = 0
        self.cost = self.total_cost = 0.0
        self.begun: float | None = None
        self.first: tuple[float, float] | None = None
        self.last_line = 0.0
        self.stopped = False

    def measured(self, text: str) -> None:
        self._line(text)

    def planned(self, planned: Planned, plans: list[tuple[Plan, Shards]]) -> None:
        num_shards = self._expect(plans)
        self.total_rows = sum(int(todo.num_rows.sum()) for _, todo in plans)
        twice = f", {planned.num_duplicates} duplicates made once" if planned.num_duplicates else ""
        self._line(f"planned {planned.num_rows} pictures of {planned.num_source_rows} rows{twice}")
        if not num_shards:
            self._line("nothing is left to do")
        elif num_shards < planned.num_shards:
            # The others are done, or another slice's.
            self._line(f"{num_shards} of {planned.num_shards} shards are to be done here: {self.total_rows} pictures")
        if num_shards:
            self._line("starting Ray and loading the model …")

    def redoing(self, plans: list[tuple[Plan, Shards]], num_rows: int) -> None:
        num_shards = self._expect(plans)
        self.total_rows = num_rows
        if not num_shards:
            self._line("nothing is left to do")
            return
        self._line(f"{num_rows} pictures of {num_shards} shards are made again")
        self._line("starting Ray and loading the model …")

    def _expect(self, plans: list[tuple[Plan, Shards]]) -> int:
        """How many shards are to come, and what they cost."""
        self.total_cost = sum(float(todo.cost.sum()) for _, todo in plans) or 1.0
        return sum(len(todo) for _, todo in plans)

    def started(self) -> None:
        self.begun = self.begun or time.monotonic()
        self._show()

    def progress(self, num_rows: int, num_failed: int, cost: float) -> None:
        self.num_rows += num_rows
        self.num_failed += num_failed
        self.cost += cost
        self.first = self.first or (time.monotonic(), self.cost)
        self._show()

    def stopping(self) -> None:
        self.stopped = True
        self._clear()
        self._line("stopping: shards in flight are finished first; Ctrl-C again stops at once")

    def done(self) -> None:
        """Leave the terminal clean."""
        self._clear()

    def describe(self) -> str:
        """32/64 pictures · 4.2 rows/s · 1 failed · ETA 8 s"""
        seconds = max(1e-9, time.monotonic() - (self.begun or time.monotonic()))
        words = [f"{self.num_rows}/{self.total_rows} pictures"]
        if self.num_rows:
            words.append(f"{self.num_rows / seconds:.1f} rows/s")
        if self.num_failed:
            words.append(f"{self.num_failed} failed")
        if (left := self.seconds_left(time.monotonic())) is not None:
            words.append(f"ETA {_span(left)}")
        return " · ".join(words)

    def seconds_left(self, now: float) -> float | None:
        """From the work done since the first receipt, so that loading the model does not blur it; None when unknown."""
        if self.first is None or not self.first[1] < self.cost < self.total_cost:
            return None
        return (now - self.first[0]) * (self.total_cost - self.cost) / (self.cost - self.first[1])

    def _show(self) -> None:
        if self.live and not self.stopped:
            width = 24
            filled = round(width * self.cost / self.total_cost)
            bar = "━" * filled + "─" * (width - filled)
            self.stream.write(f"\r\x1b[K{bar} {self.describe()}")
            self.stream.flush()
        elif self.num_rows and (time.monotonic() - self.last_line > LINE_EVERY_S or self.num_rows == self.total_rows):
            self.last_line = time.monotonic()
            self._line(self.describe())

    def _clear(self) -> None:
        if self.live:
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def _line(self, text: str) -> None:
        self.stream.write(text + "\n")
        self.stream.flush()


def _span(seconds: float) -> str:
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
