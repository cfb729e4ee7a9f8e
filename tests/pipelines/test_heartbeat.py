"""Whether a run's workers go on when the run does not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import heartbeat
from pipelines.errors import RunAlive
from pipelines.heartbeat import Permit, ask_to_stop
from pipelines.storage import Store
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def dead() -> dict[str, Any]:
    """What a process of this machine said of itself before it ended."""
    script = "import json; from pipelines.heartbeat import _this_process as said; print(json.dumps(said()))"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(json.loads(ended.stdout))


def test_workers_begin_nothing_more_once_a_stop_is_asked_or_their_driver_is_dead(
    tmp_path: Path, dead: dict[str, Any]
) -> None:
    store = Store(str(tmp_path))
    ours = Permit(store, "a-run")
    assert not ours.is_over
    assert replace(ours, driver=dead).is_over
    ask_to_stop(store, "a-run")
    assert ours.is_over
    assert not Permit(store, "another-run").is_over


@pytest.mark.parametrize("beside", [{"host": "another"}, {"namespace": "pid:[1]"}])
def test_a_driver_that_cannot_be_seen_from_here_is_not_taken_for_dead(
    tmp_path: Path, dead: dict[str, Any], beside: dict[str, str]
) -> None:
    assert not Permit(Store(str(tmp_path)), "a-run", dead | beside).is_over


def test_a_driver_of_before_the_last_boot_is_dead(
    tmp_path: Path, dead: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_boot_id", lambda: "a later one")
    assert Permit(Store(str(tmp_path)), "a-run", dead | {"namespace": "pid:[1]"}).is_over


def test_an_attempt_that_a_cluster_starts_again_does_not_wait_for_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))

    def beat(run_id: str, submitted_as: str) -> None:
        monkeypatch.setenv(heartbeat.SUBMISSION, submitted_as)
        submission = heartbeat._this_process()["submission"]
        monkeypatch.delenv(heartbeat.SUBMISSION)
        # On a node that is gone, whose last beat is fresh.
        said = {"run_id": run_id, "host": "another", "boot": "b", "pid": 1, "born": "1", "submission": submission}
        store.write(f"{heartbeat.RUNS}/{run_id}/heartbeat.json", json.dumps(said).encode())

    mine = "shapes-1 in batch of -----BEGIN CERTIFICATE-----\nMIID"
    beat("1", mine)
    beat("2", mine)
    with pytest.raises(RunAlive):
        heartbeat.refuse_if_alive(store, "2", False, False, "wait")
    monkeypatch.setenv(heartbeat.SUBMISSION, mine)
    heartbeat.refuse_if_alive(store, "2", False, False, "wait")
    assert store.read(heartbeat.stop_path("1")) is not None
    beat("0", mine.replace("batch", "another"))
    monkeypatch.setenv(heartbeat.SUBMISSION, mine)
    with pytest.raises(RunAlive):
        heartbeat.refuse_if_alive(store, "2", False, False, "wait")
