"""The command line on Kubernetes, as a user types it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from pipelines.backend import Parcel
from pipelines.cli import app
from pipelines.kube_checks import RIGHTS
from pipelines.rayjob_rules import violations
from tests.conftest import ROOT
from tests.kube.api_server import FakeKube
from tests.kube.operator import Operator, wait_until

RAY = "ray.io/v1"


def ldm_batch(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture
def job(make_parcel: Callable[..., Parcel], tmp_path: Path) -> Path:
    make_parcel()
    return tmp_path / "home" / "job.yaml"


def test_a_job_from_submit_to_cancel(
    kube: FakeKube, operator: Operator, job: Path, endings: Callable[..., None]
) -> None:
    submitted = ldm_batch("submit", job, "--kube", "--namespace", "default")
    assert submitted.exit_code == 0, submitted.output
    id = kube.all(RAY, "rayjobs")[0]["metadata"]["name"]
    assert f"submitted {id}" in submitted.output
    assert f"ldm-batch logs -f {id} --kube --namespace default" in submitted.output
    assert "nothing was sent" in ldm_batch("submit", job, "--kube").output

    def told() -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(ldm_batch("status", id, "--kube", "--json").output)
        return loaded

    wait_until(lambda: told()["phase"] == "running")
    assert "called with [run] [job.yaml]" in wait_until(lambda: ldm_batch("logs", id, "--kube").output)
    assert f"{id} · running · attempt 1" in ldm_batch("list", "--kube").output
    assert ldm_batch("suspend", job, "--kube").exit_code == 0
    assert told()["phase"] == "suspended"
    assert ldm_batch("resume", job, "--kube").exit_code == 0
    wait_until(lambda: told()["phase"] == "running")
    cancelled = ldm_batch("cancel", id, "--kube")
    assert cancelled.exit_code == 0, cancelled.output
    wait_until(lambda: ldm_batch("status", id, "--kube").exit_code == 2)
    endings(0)
    followed = ldm_batch("submit", job, "--kube", "--follow")
    assert (followed.exit_code, "ends with 0" in followed.output) == (0, True), followed.output


def test_a_job_that_found_its_output_busy_is_submitted_again_to_help_or_replace_the_other(
    kube: FakeKube, job: Path
) -> None:
    assert ldm_batch("submit", job, "--kube").exit_code == 0
    (first,) = kube.all(RAY, "rayjobs")
    kube.put(RAY, "rayjobs", {**first, "status": {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"}})
    again = ldm_batch("submit", job, "--kube", "--takeover", "--limit", "1", "--json")
    assert json.loads(again.output)["id"] != first["metadata"]["name"]
    again = ldm_batch("submit", job, "--kube", "--takeover", "--json")
    # It is the same job, so that `status` and the others know it by its file.
    assert json.loads(again.output)["id"] == first["metadata"]["name"]
    entrypoints = {one["metadata"]["name"]: one["spec"]["entrypoint"] for one in kube.all(RAY, "rayjobs")}
    assert entrypoints[f"{first['metadata']['name']}-2"].endswith("--takeover")
    _, rendered = yaml.safe_load_all(ldm_batch("render", job, "--join").output)
    assert rendered["spec"]["entrypoint"].endswith("--dead-letters-ok --join")


def test_what_is_rendered_is_what_is_sent(kube: FakeKube, job: Path) -> None:
    rendered = ldm_batch("render", job)
    assert rendered.exit_code == 0, rendered.output
    files, rayjob = yaml.safe_load_all(rendered.output)
    assert violations(rayjob) == []
    # A patch of one place must not change another.
    assert "&id" not in rendered.output
    assert json.loads(ldm_batch("submit", job, "--kube", "--dry-run", "-o", "json").output)["items"] == [files, rayjob]
    assert kube.requests == []
    assert ldm_batch("submit", job, "--kube").exit_code == 0
    sent = kube.all(RAY, "rayjobs")[0]
    assert sent["spec"] == rayjob["spec"]
    assert kube.all("v1", "configmaps")[0]["data"] == files["data"]


def test_doctor_says_all_that_is_missing_at_once(
    kube: FakeKube, make_parcel: Callable[..., Parcel], tmp_path: Path
) -> None:
    make_parcel(queue="gpus", secrets=["s3", "there"], workers=[{"gpus": 2, "replicas": 3}])
    kube.put("v1", "secrets", {"metadata": {"name": "there"}})
    node = {"metadata": {"name": "n"}, "status": {"allocatable": {"cpu": "8", "nvidia.com/gpu": "4"}}}
    kube.put("v1", "nodes", node)
    kube.denied.add(("delete", "rayjobs"))
    said = ldm_batch("doctor", "--kube", tmp_path / "home" / "job.yaml")
    assert said.exit_code == 1
    lines = said.output.splitlines()
    assert "broken  rights: not in namespace default: delete rayjobs.ray.io; ask for a role with them" in lines
    assert any(line.startswith("broken  queue: cluster.queue gpus: no such LocalQueue") for line in lines)
    assert any(line.startswith("broken  secret: s3: there is none") for line in lines)
    assert "ok      secret: there is there" in lines
    text = "group workers: 3 × 2 nvidia.com/gpu; the nodes of today have room for 2; the job waits, unless the cluster"
    assert any(line.startswith(f"weak    GPUs: {text}") for line in lines)
    assert "ok      KubeRay: ray.io/v1 is served, with the fields of 1.7" in lines
    assert "3 things are missing" in lines[-1]
    said = ldm_batch("doctor", "--kube", "--namespace", "../x")
    assert (said.exit_code, "no name of a namespace" in said.output) == (2, True)


def test_doctor_without_a_job_looks_at_the_cluster_alone(kube: FakeKube) -> None:
    said = ldm_batch("doctor", "--kube", "--json")
    assert said.exit_code == 0, said.output
    assert {one["verdict"] for one in json.loads(said.output)["findings"]} == {"ok"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "cluster.image="], "cluster.image"),
        (["--set", "sink.path=/data/out"], "sink.path /data/out would lie in one pod"),
        (["--set", "sink.storage_options={key: AKIA, secret: hush}"], "secrets do not travel"),
        (["--set", "cluster.env={API_TOKEN: hush}"], "looks like a secret"),
        (["--context", "prod"], "no such context"),
        (["--set", "stages.0.num_gpus=2", "--set", "cluster.workers=[{gpus: 1, replicas: 4}]"], "no node has 2 GPUs"),
        (["--set", "stages.0.workers=900"], "no room for the stages: stages.0: 900 workers × 0.01 CPUs do not fit"),
        (["--set", "stages.0.labels={disk: nvme}"], "no node of the cluster has disk: nvme"),
        (["--address", "http://head:8265"], "are two clusters"),
        (["--namespace", "A b"], "--namespace 'A b': no name of a namespace"),
        (["--namespace", "A b", "--dry-run"], "--namespace 'A b': no name of a namespace"),
    ],
)
def test_a_wrong_submission_is_one_line_and_asks_nobody(
    kube: FakeKube, job: Path, options: list[str], said: str
) -> None:
    result = ldm_batch("submit", job, "--kube", *options)
    assert (result.exit_code, said in result.output) == (2, True), result.output
    assert len(result.output.splitlines()) == 1
    assert "hush" not in result.output
    assert kube.requests == []


def test_the_extra_is_named_where_it_is_missing(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    said = ldm_batch("list", "--kube")
    assert (said.exit_code, "pip install 'ldm-batch[k8s]'" in said.output) == (2, True)


def test_the_role_that_is_shipped_has_the_rights_that_doctor_asks_for() -> None:
    role, _ = yaml.safe_load_all((ROOT / "infra/kubernetes/base/rights.yaml").read_text())
    given = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    asked = {(group, f"{r}/{sub}" if sub else r, verb) for group, r, sub, verbs in RIGHTS for verb in verbs}
    assert asked <= given
    # What else doctor and status look at, where they may.
    assert {resource for _, resource, _ in given - asked} <= {
        "localqueues", "workloads", "secrets", "persistentvolumeclaims", "serviceaccounts"
    }  # fmt: skip
