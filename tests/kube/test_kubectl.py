"""What `kubectl` makes of the manifests: with kustomize, and against the fake API server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipelines.backend import Parcel
from pipelines.kube_jobs import KubeJobs
from pipelines.rayjob import job_of, manifests
from tests.kube.api_server import FakeKube

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed here")


def kubectl(*arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["kubectl", *map(str, arguments)], env={**os.environ, **environ}, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def rendered(make_parcel: Callable[..., Parcel], tmp_path: Path) -> tuple[str, Path]:
    parcel = make_parcel()
    (tmp_path / "rendered").mkdir()
    file = tmp_path / "rendered" / "job.yaml"
    file.write_text(yaml.safe_dump_all(manifests(job_of(parcel), parcel), sort_keys=False))
    return parcel.id, file


def test_kustomize_takes_what_is_rendered_and_lays_a_patch_over_it(rendered: tuple[str, Path]) -> None:
    id, file = rendered
    patch = {"patch": "- {op: replace, path: /spec/backoffLimit, value: 9}", "target": {"kind": "RayJob"}}
    overlay = {"resources": [file.name], "namespace": "prod", "patches": [patch]}
    (file.parent / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    said = kubectl("kustomize", file.parent)
    assert said.returncode == 0, said.stderr
    files, job = sorted(yaml.safe_load_all(said.stdout), key=lambda one: str(one["kind"]))
    assert (files["kind"], job["kind"], job["spec"]["backoffLimit"]) == ("ConfigMap", "RayJob", 9)
    assert {one["metadata"]["namespace"] for one in (files, job)} == {"prod"}
    assert job["metadata"]["name"] == id


def test_what_is_applied_by_kubectl_is_found_and_cancelled_by_us(
    kube: FakeKube, jobs: KubeJobs, rendered: tuple[str, Path]
) -> None:
    id, file = rendered
    said = kubectl("apply", "--validate=false", "-f", file)
    assert said.returncode == 0, said.stderr
    assert said.stdout.split() == [f"configmap/{id}", "created", f"rayjob.ray.io/{id}", "created"]
    again = kubectl("apply", "--validate=false", "-f", file)
    assert again.stdout.split() == [f"configmap/{id}", "unchanged", f"rayjob.ray.io/{id}", "unchanged"], again.stderr
    assert jobs.get(id).phase == "queued"
    shown = json.loads(kubectl("get", "rayjob", id, "-o", "json").stdout)
    assert shown["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "ldm-batch"
    jobs.cancel(id)
    gone = kubectl("get", "rayjob", id)
    assert f'rayjobs.ray.io "{id}" not found' in gone.stderr


def test_the_server_refuses_kubectl_too_what_we_would_not_have_sent(kube: FakeKube, rendered: tuple[str, Path]) -> None:
    _, file = rendered
    files, job = yaml.safe_load_all(file.read_text())
    job["spec"]["backoffLimit"] = "three"
    file.write_text(yaml.safe_dump(job))
    said = kubectl("create", "--validate=false", "-f", file)
    assert said.returncode == 1
    assert "spec.backoffLimit: expected integer; got 'three'" in said.stderr
    kube.denied.add(("create", "configmaps"))
    file.write_text(yaml.safe_dump(files))
    assert 'User "ann" cannot create resource "configmaps"' in kubectl("create", "--validate=false", "-f", file).stderr
