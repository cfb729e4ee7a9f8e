"""Several drivers on one plan: slices live beside each other, and the last one counts the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.errors import JobError, RunAlive
from pipelines.heartbeat import Heartbeat, end, refuse_if_alive
from pipelines.slices import Slice
from pipelines.storage import Store
from tests.conftest import ROOT
from tests.faults.nodes import nodes
from tests.faults.outside import look
from tests.faults.soak import finish, start, write_job

SBATCH = ROOT / "infra/slurm/ldm-batch.sbatch"


def test_slices_part_the_shards_of_any_plan_for_good() -> None:
    for of in (1, 2, 3, 8):
        parts = [Slice(number, of) for number in range(1, of + 1)]
        assert [sum(part.has(index) for part in parts) for index in range(50)] == [1] * 50
    for one, other in [(Slice(1, 2), Slice(2, 2)), (Slice(1, 4), Slice(2, 2)), (Slice(3, 8), Slice(4, 8))]:
        assert not one.meets(other)
        assert not [index for index in range(100) if one.has(index) and other.has(index)]
    for one, other in [(Slice(1, 2), Slice(1, 2)), (Slice(1, 4), Slice(1, 2)), (Slice(1, 2), Slice(3, 5))]:
        assert one.meets(other)
        assert [index for index in range(100) if one.has(index) and other.has(index)]


@pytest.mark.parametrize("said", ["0/8", "9/8", "1/0", "3", "1/20000", "-1/8", "²/8", "1/8/8", ""])
def test_what_is_no_slice_is_refused(said: str) -> None:
    with pytest.raises(JobError, match="give a number from 1 on and how many there are"):
        Slice.parse(said)


def test_only_slices_without_a_common_shard_live_beside_each_other(tmp_path: Path) -> None:
    store = Store(str(tmp_path))

    def refusal(run_id: str, part: Slice | None) -> str:
        with Heartbeat(store, run_id, part):
            try:
                refuse_if_alive(store, run_id, False, False, "wait", part)
            except RunAlive as refused:
                return str(refused)
            finally:
                end(store, run_id, {})
        return ""

    with Heartbeat(store, "20260101T000000-aaaaaa", Slice(2, 4)):
        assert refusal("20260102T000000-aaaaaa", Slice(3, 4)) == ""
        assert refusal("20260102T000000-bbbbbb", Slice(1, 2)) == ""
        for part in (Slice(2, 4), Slice(2, 2), None):
            assert "run 20260101T000000-aaaaaa (slice 2/4) on" in refusal("20260102T000000-cccccc", part)


def test_a_slurm_array_does_a_plan_slice_by_slice(tiny_model: Path, tmp_path: Path) -> None:
    output = write_job(tmp_path, tiny_model, str(tmp_path / "out"), {}, 10, steps=2)
    for task in ("2", "1"):
        environ = {"JOB": str(output.job), "SLICES": "2", "SLURM_ARRAY_TASK_ID": task, "PYTHONPATH": str(ROOT)}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", str(SBATCH)],
            env={**os.environ, **environ, "PATH": path},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert ("these are the shards of slice 2/2" in done.stdout) == (task == "2"), done.stdout
        seen = look(output.path)
        assert (seen.faults, seen.finished) == ([], task == "1")
        # Of five shards of two rows the second slice has the second and the fourth.
        assert len(seen.rows) == {"2": 4, "1": 10}[task]
        assert {int(uri.split("/")[1]) % 2 for uri in seen.pictures if uri.startswith("images/")} == {
            "2": {1},
            "1": {0, 1},
        }[task]


def test_two_slices_that_start_at_the_same_moment_on_nothing_do_each_row_once(tiny_model: Path, tmp_path: Path) -> None:
    output = write_job(tmp_path, tiny_model, f"file://{tmp_path}/out", {}, 12, steps=2, workers=1)
    with nodes(1, cpus=4) as cluster:
        both = [
            start(output, "--address", cluster.address, "--slice", f"{number}/2", **cluster.environ)
            for number in (1, 2)
        ]
        ended = [finish(one) for one in both]
    assert [code for code, _ in ended] == [0, 0], (ended, output.job.with_suffix(".log").read_text())
    # Neither did a row of the other's, and whoever found all of them done has counted the whole.
    assert [said["num_new_rows"] for _, said in ended] == [6, 6]
    assert None in [said["slice"] for _, said in ended]
    seen = look(f"{tmp_path}/out")
    assert (len(seen.rows), seen.faults, seen.finished, seen.num_orphans) == (12, [], True, 0)
    assert len(list((tmp_path / "out/_ldm/plans").glob("*.json"))) == 1


def test_the_slurm_script_is_what_shellcheck_would_write() -> None:
    found = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([str(found), str(SBATCH)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
