"""A real process dies at every so many-th step of plan, load, commit, retry and repair; the next one does the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


def rehearsed(out: str, model: Path, *scenarios: str, **environ: str) -> list[dict[str, Any]]:
    """In a process of its own, as it forks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.failpoints", out, str(model), *scenarios],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def recovered(found: list[dict[str, Any]], at_least: int) -> None:
    for one in found:
        assert one["faults"] == []
        assert one["num_recovered"] == one["num_fired"] > 0
    assert sum(one["num_fired"] for one in found) >= at_least


def test_a_run_recovers_from_its_death_at_any_step_on_a_disk(tiny_model: Path, tmp_path: Path) -> None:
    # All of them: `python -m benchmarks.faults failpoints`.
    found = rehearsed(str(tmp_path / "outs"), tiny_model, EVERY="17", FIRST="5")
    assert len(found) == 6
    recovered(found, 45)
    names = {name.split()[1] for one in found for name in one["names"]}
    assert len(names) > 6


@pytest.mark.parametrize("scenario", ["run, reply of the commit lost", "retry"])
def test_a_run_recovers_from_its_death_at_any_step_on_s3(
    tiny_model: Path, s3_endpoint: str, tmp_path: Path, scenario: str
) -> None:
    out = f"s3://bkt/{tmp_path.name}"
    recovered(rehearsed(out, tiny_model, scenario, EVERY="7", FIRST="3", AWS_ENDPOINT_URL=s3_endpoint), 4)
