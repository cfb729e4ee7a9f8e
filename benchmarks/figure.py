"""One line of a table of what was promised and what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Figure:
    """`reached` is None where the bar is no number; `numbers` holds all that was counted."""

    name: str
    bar: str
    measured: str
    reached: bool | None
    numbers: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        verdict = {True: "reached", False: "NOT REACHED", None: "told"}[self.reached]
        return f"| {self.name} | {self.bar} | {self.measured} | {verdict} |"
