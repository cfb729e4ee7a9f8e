"""What workers were at, as `tests/faults/probe` notes it; how a test counts work that was done twice."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

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
    def last(self) -> float:
        """When a worker began one last, in seconds since 1970; 0 before the first."""
        return max((float(fields[0]) for fields in self._lines("begin")), default=0.0)

    @property
    def workers(self) -> set[str]:
        return {fields[1] for fields in self._lines("begin")}
