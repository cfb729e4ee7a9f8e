"""A fake Kubernetes API server, an operator that runs what is submitted to it, and jobs to submit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.backend import Parcel
from pipelines.kube_jobs import KubeJobs
from pipelines.parcel import pack
from tests.kube.api_server import FakeKube
from tests.kube.operator import Operator

IMAGE = "registry.example/ldm-batch@sha256:" + "a" * 64

# What stands in for `ldm-batch` where Ray is not the point: it says how it was called, and ends as it is told to.
STUB = """#!/bin/bash
printf 'called with'; printf ' [%s]' "$@"; echo; cat job.yaml; echo "region $REGION key $AWS_SECRET_ACCESS_KEY"
until [ -e {done} ]; do sleep 0.02; done
code=$(head -n 1 {done}); sed -i 1d {done}; [ -s {done} ] || rm {done}
echo "ends with $code"; exit $code
"""


@pytest.fixture
def kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKube]:
    with FakeKube().serve(tmp_path) as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        yield server


@pytest.fixture
def jobs(kube: FakeKube) -> KubeJobs:
    return KubeJobs()


@pytest.fixture
def endings(tmp_path: Path) -> Callable[..., None]:
    """With which codes the next attempts end; the first of them now."""

    def end(*codes: int) -> None:
        (tmp_path / "new").write_text("".join(f"{code}\n" for code in codes))
        (tmp_path / "new").rename(tmp_path / "done")

    return end


@pytest.fixture
def operator(kube: FakeKube, tmp_path: Path) -> Iterator[Operator]:
    stub = tmp_path / "bin" / "ldm-batch"
    stub.parent.mkdir()
    stub.write_text(STUB.format(done=tmp_path / "done"))
    stub.chmod(0o755)
    environ = {"PATH": f"{stub.parent}:{os.environ['PATH']}"}
    with Operator(kube, tmp_path / "pods", environ).running() as walking:
        (tmp_path / "pods").mkdir()
        yield walking


@pytest.fixture
def make_parcel(tmp_path: Path) -> Callable[..., Parcel]:
    """What travels of a job with a table; keywords go into its cluster section."""

    def make(
        name: str = "shapes", arguments: tuple[str, ...] = (), job: dict[str, Any] | None = None, **cluster: Any
    ) -> Parcel:
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        (home / "prompts.csv").write_text("prompt\na red circle\n")
        data = {
            "name": name,
            "source": {"path": str(home / "prompts.csv")},
            "stages": [{"op": "txt2img", "model": "builtin:shapes"}],
            "sink": {"path": "s3://bucket/out"},
            "cluster": {"image": IMAGE, **cluster},
            **(job or {}),
        }
        (home / "job.yaml").write_text(yaml.safe_dump(data))
        folder = tmp_path / "parcel"
        folder.mkdir(exist_ok=True)
        return pack(home / "job.yaml", [], arguments, folder)[1]

    return make
