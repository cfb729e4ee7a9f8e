"""What workers were at, as `tests/faults/probe` notes it; how a test counts work that was done twice."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

PROBE = Path(__file__).parent / "probe"


@dataclass
class Notes:
    """The notes of all runs of one output."""

    path: Path

    @property
    def environ(self) -> dict[str, str]:
        """For the processes that are to take notes."""
        paths = [str(PROBE), str(PROBE.parents[2]), os.environ.get("PYTHONPATH", "")]
        return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "LDM_BATCH_NOTES": str(self.path)}

    def _lines(self, what: str) -> list[list[str]]:
        text = self.path.read_text() if self.path.exists() else ""
        return [fields for line in text.splitlines() if (fields := line.split())[2] == what and fields[4] != "0"]

    @property
    def num_begun(self) -> int:
        """Shards that a worker began to compute, one as often as it was begun."""
        return len(self._lines("begin"))

    @property
    def num_rows_begun(self) -> int:
        return sum(int(fields[4]) for fields in self._lines("begin"))

    @property
    def seconds_between(self) -> float:
        """The middle one of the times from one shard that a worker begins to its next."""
        times: dict[str, list[float]] = {}
        for when, pid, *_ in self._lines("begin"):
            times.setdefault(pid, []).append(float(when))
        return median([b - a for one in times.values() for a, b in pairwise(one)] or [0.0])

    @property
    def workers(self) -> set[str]:
        return {fields[1] for fields in self._lines("begin")}
