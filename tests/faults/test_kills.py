"""Real deaths of a run's processes, by SIGKILL; the run goes on, or the same command finishes the rest."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

import pipelines
from pipelines.runner import run
from tests.faults.nodes import nodes
from tests.faults.outside import Seen, look
from tests.faults.processes import Process, family, gone, kill, wait_for
from tests.faults.soak import Output, finish, start, write_job

SEED = 7
ROWS = 40


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("undisturbed")
    output = write_job(folder, tiny_model, str(folder / "out"), {}, ROWS, workers=1)
    assert run(pipelines.load_job(output.job)).exit_code == 0
    return look(output.path)


def hit(root: int, kind: str, rng: random.Random) -> Process:
    """Kill one of that kind below `root`, whatever it takes to catch one."""
    until = time.monotonic() + 100
    while time.monotonic() < until:
        found = wait_for(root, kind, 1)
        # Of several nodes the first is the driver's.
        victim = rng.choice(found[1:] if kind == "raylet" else found) if found else None
        if victim is not None and kill(victim):
            return victim
    raise AssertionError(f"seed {SEED}: nobody of kind {kind} could be killed")


def committed(output: Output, at_least: int) -> int:
    """How many parts there are, once they are so many."""
    folder = Path(output.path.removeprefix("file://"))
    until = time.monotonic() + 100
    while (num := len(list(folder.glob("manifest/*/*.parquet")))) < at_least and time.monotonic() < until:
        time.sleep(0.05)
    assert num >= at_least, f"seed {SEED}: the run does not go on"
    return num


def test_a_run_outlives_its_workers_and_uploads_and_the_same_command_outlives_the_driver(
    tiny_model: Path, tmp_path: Path, undisturbed: Seen
) -> None:
    rng = random.Random(SEED)
    output = write_job(tmp_path, tiny_model, str(tmp_path / "out"), {}, ROWS)
    running = start(output)
    for kind in ("worker", "upload", "upload"):
        before = committed(output, 1)
        hit(running.pid, kind, rng)
        committed(output, before + 1)
        assert running.poll() is None
    members = family(running.pid)
    assert kill(members[0])
    assert running.wait() == -9
    # Whoever of them still lives may write still.
    seen = look(output.path)
    assert seen.faults == [], f"seed {SEED}"
    assert 0 < len(seen.rows) < ROWS
    code, said = finish(start(output))
    assert (code, said["num_new_rows"] <= ROWS - len(seen.rows)) == (0, True), said
    assert gone(members, 60) == []
    assert look(output.path).differences(undisturbed) == [], f"seed {SEED}"


def test_a_run_outlives_a_node_of_its_cluster(tiny_model: Path, tmp_path: Path, undisturbed: Seen) -> None:
    rng = random.Random(SEED)
    output = write_job(tmp_path, tiny_model, f"file://{tmp_path / 'out'}", {}, ROWS)
    with nodes(3) as cluster:
        running = start(output, "--address", cluster.address, **cluster.environ)
        before = committed(output, 1)
        raylet = hit(cluster.pid, "raylet", rng)
        committed(output, before + 1)
        worker = hit(cluster.pid, "worker", rng)
        code, said = finish(running, 150)
    assert (code, said.get("num_new_rows")) == (0, ROWS), said
    assert not raylet.is_there
    assert not worker.is_there
    assert look(output.path).differences(undisturbed) == [], f"seed {SEED}"
