"""A thousand inputs at each run, always the same; `python -m benchmarks.fuzz` puts as many more as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.doors import DOORS
from tests.fuzz.harness import fuzz


@pytest.mark.parametrize(
    ("name", "num_inputs", "share"),
    [
        ("job files", 300, 0.2),
        ("tables", 60, 0.3),
        ("pictures", 400, 0.15),
        ("containers", 60, 0.3),
        ("outputs", 40, 0.5),
    ],
)
def test_what_is_hostile_is_refused_in_plain_lines_or_costs_its_row(
    name: str, num_inputs: int, share: float, tmp_path: Path
) -> None:
    found = fuzz(DOORS[name], num_inputs, tmp_path)
    assert not found.crashes, "\n\n".join(f"{kind}\n{text}" for kind, text in found.crashes.items())
    assert found.num_inputs >= num_inputs
    # Else nothing but the first line of our checks would have been tried.
    assert found.share_inside >= share, found.outcomes
