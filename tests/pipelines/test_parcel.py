"""What of a job travels to a cluster, and what is refused because only this machine has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.backend import submission_id
from pipelines.errors import JobError
from pipelines.parcel import pack
from pipelines.ray_jobs import phase_of, request

OPTIONS = {"key": "${env:S3_KEY}", "secret": "${env:S3_SECRET:-none}", "client_kwargs": {"region_name": "eu"}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a table and a job that reads it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("S3_KEY", "of-this-machine")
    (tmp_path / "rows").mkdir()
    for name in "ab":
        (tmp_path / f"rows/{name}.csv").write_text(f"prompt\na {name}\n")
    job = {
        "name": "My_Job",
        "source": {"path": "rows/*.csv"},
        "stages": [{"op": "txt2img", "model": "builtin:shapes"}],
        "sink": {"path": "s3://bkt/out", "storage_options": OPTIONS},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    return tmp_path


def packed(here: Path, *overrides: str, arguments: tuple[str, ...] = ()) -> tuple[str, dict[str, Any], Path]:
    folder = here / f"parcel-{len(list(here.iterdir()))}"
    folder.mkdir()
    _, parcel = pack(here / "job.yaml", overrides, arguments, folder)
    assert (folder / "job.yaml").read_text() == parcel.job_yaml
    return parcel.id, yaml.safe_load(parcel.job_yaml), folder


def test_tables_travel_and_the_environment_of_this_machine_does_not(here: Path) -> None:
    _, job, folder = packed(here, "stages.0.num_inference_steps=9")
    assert job["sink"]["storage_options"] == OPTIONS
    assert "of-this-machine" not in (folder / "job.yaml").read_text()
    assert job["stages"][0]["num_inference_steps"] == 9
    texts = [(folder / path).read_text() for path in job["source"]["path"]]
    assert texts == ["prompt\na a\n", "prompt\na b\n"]
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"job.yaml", "0000-a.csv", "0001-b.csv"}


def test_a_job_file_with_any_name_gives_the_shell_of_the_cluster_nothing_to_run(here: Path) -> None:
    hostile = here / "a b;$(touch x)`touch x`.yaml"
    (here / "job.yaml").rename(hostile)
    (folder := here / "parcel").mkdir()
    _, parcel = pack(hostile, (), ("--slice", "1/2"), folder)
    entrypoint = request(parcel, 1)["entrypoint"]
    assert entrypoint == f"echo $$ > {parcel.id}.pid; exec python -m pipelines run job.yaml --slice 1/2"
    assert "touch" not in json.dumps(request(parcel, 1)) + parcel.job_yaml


def test_the_same_job_has_the_same_id_wherever_it_is_packed_and_another_one_has_another(here: Path) -> None:
    first = packed(here)[0]
    assert first == packed(here)[0]
    assert first.startswith("my-job-")
    others = {packed(here, "seed=1")[0], packed(here, arguments=("--slice", "1/2"))[0], packed(here, "name=x")[0]}
    (here / "rows/a.csv").write_text("prompt\nanother\n")
    assert len(others | {first, packed(here)[0]}) == 5


@pytest.mark.parametrize("name", ["a", "A" * 63, "9.lives_and-more", "x" + "." * 40 + "y"])
def test_an_id_is_a_name_for_ray_and_for_kubernetes(name: str) -> None:
    import re

    id = submission_id(name, "text")
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", id)
    assert len(id) <= 41


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("sink.storage_options.secret=abc", "sink.storage_options.secret: secrets do not travel; write \\${env:NAME}"),
        (
            "source.storage_options={client_kwargs: {aws_session_token: abc}}",
            "aws_session_token: secrets do not",
        ),
        ("sink.storage_options={connection_string: abc}", "connection_string: secrets do not"),
        ("sink.storage_options={client_kwargs: {endpoint_url: 'http://me:abc@s3'}}", "endpoint_url: secrets do not"),
        ("sink.path=out", "sink.path out is relative to a folder of this machine"),
        ("stages.0.model=rows", "stages.0.model rows lies on this machine and does not travel"),
        ("stages.0.model=./nothing", "stages.0.model ./nothing lies on this machine and does not travel"),
        ("source.path=nothing/*.csv", "source.path nothing/\\*.csv is not there; tables of this machine travel"),
        ("source={path: rows, format: images}", "source.path rows holds more than a table"),
        ("sink.c2pa={certificate: a.pem, private_key: /k.pem}", "sink.c2pa.certificate a.pem does not travel"),
        ("source.path=big.csv", "big.csv and those before it are more than 32 MiB"),
        ("stages.0.stepps=1", "stages.0.stepps: unknown field"),
    ],
)
def test_what_only_this_machine_has_is_refused_in_a_line(here: Path, override: str, problem: str) -> None:
    with (here / "big.csv").open("wb") as big:
        big.truncate((32 << 20) + 1)
    with pytest.raises(JobError, match=problem) as refusal:
        packed(here, override)
    assert "\n" not in str(refusal.value)
    assert "abc" not in str(refusal.value)


def test_public_data_needs_no_secret(here: Path) -> None:
    assert packed(here, "sink.storage_options={token: anon}")[1]["sink"]["storage_options"] == {"token": "anon"}


def test_places_that_every_node_may_have_stay_as_they_are(here: Path) -> None:
    paths = ["s3://bkt/rows.csv", "file:///shared/rows.csv", "/data/not/here.csv"]
    for path in paths:
        assert packed(here, f"source.path={path}")[1]["source"]["path"] == path


@pytest.mark.parametrize(
    ("status", "exit_code", "phase"),
    [
        ("PENDING", None, "queued"),
        ("RUNNING", None, "running"),
        ("STOPPED", None, "cancelled"),
        ("SUCCEEDED", 0, "succeeded"),
        ("FAILED", 3, "succeeded"),
        ("FAILED", 143, "suspended"),
        # Told to stop while Python, then Ray, was starting.
        ("FAILED", -15, "suspended"),
        ("FAILED", 15, "suspended"),
        ("FAILED", 75, "failed"),
        ("FAILED", None, "failed"),
    ],
)
def test_an_exit_code_is_a_phase(status: str, exit_code: int | None, phase: str) -> None:
    assert phase_of(status, exit_code, "one\nlast words\n")[0] == phase
