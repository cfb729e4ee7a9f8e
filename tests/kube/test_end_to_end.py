"""A job from `submit` to its last picture on a fake Kubernetes, while one of its clusters is killed; Ray is real."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from pipelines import load_job
from pipelines.kube_jobs import KubeJobs
from pipelines.parcel import pack
from pipelines.runner import run
from tests.conftest import ROOT
from tests.kube.api_server import FakeKube
from tests.kube.conftest import IMAGE
from tests.kube.operator import Operator, wait_until
from tests.pipelines.reader import contents, rows

NUM_ROWS = 20


@pytest.fixture
def operator(kube: FakeKube, tmp_path: Path) -> Iterator[Operator]:
    """Its image has this very ldm-batch in it."""
    program = tmp_path / "bin" / "ldm-batch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m pipelines "$@"\n')
    program.chmod(0o755)
    environ = {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    (tmp_path / "pods").mkdir()
    with Operator(kube, tmp_path / "pods", environ).running() as walking:
        yield walking


def write_job(folder: Path, model: Path, out: Path) -> Path:
    # One row makes NaN of it: a dead letter is no reason to try again.
    prompts = [f"a red circle {i}" for i in range(NUM_ROWS - 1)] + ["a blue ring"]
    folder.mkdir()
    (folder / "prompts.csv").write_text("prompt\n" + "\n".join(prompts) + "\n")
    stage = {"op": "txt2img", "model": str(model), "num_inference_steps": 2, "batch_size": 2, "workers": 1}
    job = {
        "name": "end-to-end",
        "source": {"path": str(folder / "prompts.csv")},
        "stages": [stage],
        "sink": {"path": f"file://{out}"},
        "batches_per_shard": 1,
        "cluster": {"image": IMAGE, "volumes": [{"claim": "shared", "path": str(out.parent)}]},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return folder / "job.yaml"


@pytest.mark.timeout(400)
def test_a_job_whose_cluster_dies_goes_on_in_the_next_and_nothing_is_lost(
    kube: FakeKube,
    jobs: KubeJobs,
    operator: Operator,
    ray_session: None,
    poisoned_model: Path,
    tmp_path: Path,
    make_folder: Callable[[str], Path],
) -> None:
    kube.put("v1", "persistentvolumeclaims", {"metadata": {"name": "shared"}})
    out = make_folder("shared") / "out"
    _, parcel = pack(write_job(tmp_path / "home", poisoned_model, out), [], [], make_folder("parcel"))
    jobs.submit(parcel)
    wait_until(lambda: jobs.get(parcel.id).phase == "running")
    lines: list[str] = []
    follower = threading.Thread(target=lambda: lines.extend(jobs.logs(parcel.id, follow=True)))
    follower.start()
    wait_until(lambda: parts(out), 150)
    (attempt,) = operator.attempts.values()
    os.killpg(attempt.process.pid, signal.SIGKILL)
    before = len(parts(out))
    assert 0 < before < NUM_ROWS // 2
    wait_until(lambda: jobs.get(parcel.id).attempt == 2)
    wait_until(lambda: jobs.get(parcel.id).phase in ("succeeded", "failed"), 150)
    follower.join(20)
    found = jobs.get(parcel.id)
    assert (found.phase, found.attempt) == ("succeeded", 2), lines
    # The second attempt made what the first had left, and said so where it was followed.
    assert any("1 failed" in line or "failed 1" in line for line in lines), lines

    plain = load_job(write_job(tmp_path / "plain", poisoned_model, tmp_path / "plain-out"))
    assert run(plain).exit_code == 3
    assert contents(out) == contents(tmp_path / "plain-out")
    assert sum(row["status"] == "ok" for row in rows(out)) == NUM_ROWS - 1


def parts(out: Path) -> list[Path]:
    return list(out.glob("manifest/*/*.parquet"))


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    return make
