"""A cluster whose nodes differ, leave and join: who works where, and the bytes are those of one machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import pipelines
from pipelines.runner import run
from tests.faults.nodes import nodes
from tests.faults.outside import Seen, look
from tests.faults.processes import Process, family, kill
from tests.faults.soak import finish, start, write_job

ROWS, STEPS = 30, 20


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("undisturbed")
    output = write_job(folder, tiny_model, str(folder / "out"), {}, ROWS, STEPS, workers=1)
    assert run(pipelines.load_job(output.job)).exit_code == 0
    return look(output.path)


def until(seconds: float, ask: Any) -> Any:
    """What `ask` says, as soon as it is anything."""
    end = time.monotonic() + seconds
    while not (found := ask()) and time.monotonic() < end:
        time.sleep(0.05)
    assert found
    return found


def test_a_pool_follows_its_gpu_from_a_node_that_dies_to_one_that_joins(
    tiny_model: Path, tmp_path: Path, undisturbed: Seen
) -> None:
    folder = tmp_path / "out"
    pool: dict[str, Any] = {
        "num_gpus": 0.5,
        "device": "cpu",
        "accelerator_type": "H200",
        "workers": {"min": 1, "max": 3},
    }
    stage = {"op": "txt2img", "model": str(tiny_model), "num_inference_steps": STEPS, "batch_size": 2, **pool}
    output = write_job(tmp_path, tiny_model, f"file://{folder}", {}, ROWS, stages=[stage])
    # The head has neither CPU nor GPU, the second node a GPU, the third none.
    with nodes(3, accelerator="H200") as cluster:
        other = ("--set", "stages.0.accelerator_type=L4", "--set", f"sink.path=file://{tmp_path}/none")
        code, said = finish(start(output, "--address", cluster.address, *other, **cluster.environ), 100)
        problem = "stages.0.accelerator_type: the cluster has no L4; it has H200; change it, or leave it out"
        assert (code, said["error"]) == (2, problem)

        def homes() -> dict[int, list[Process]]:
            """Of each raylet its workers that hold a model."""
            there = family(cluster.pid)
            raylets = [process for process in there if process.kind == "raylet"]
            return {r.pid: [p for p in there if p.kind == "worker" and p.parent == r.pid] for r in raylets}

        running = start(output, "--address", cluster.address, **cluster.environ)
        # At its first shards: what is made may be in the driver's hands, and then nobody would have to make it again.
        until(150, lambda: any(".submit" in worker.title for some in homes().values() for worker in some))
        before = homes()
        [first] = [raylet for raylet, workers in before.items() if workers]
        # Another of its kind takes its place.
        assert kill(next(process for process in family(cluster.pid) if process.pid == first))
        joined = until(150, lambda: [raylet for raylet, workers in homes().items() if workers and raylet not in before])
        code, said = finish(running, 150)
    assert (len(joined), code, said.get("num_new_rows")) == (1, 0, ROWS), said
    assert look(output.path).differences(undisturbed) == []
