"""Job files of `jobs/` → the manifests made of them: `python infra/kubernetes/render.py`.

Each overlay has what `ldm-batch render` prints of its job file. The RayCluster of `examples/`, to which jobs are sent
with `--address`, and the RayCronJob are made of the RayJob of `jobs/nightly.yaml`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipelines.parcel import pack
from pipelines.rayjob import FOLDER, IDENTITY, Manifest, manifests

HERE = Path(__file__).resolve().parent
OVERLAYS = ("kind", "gke-spot", "eks", "kueue")
CLUSTER = "ldm-batch"
NAMED = {"app.kubernetes.io/name": "ldm-batch"}
NIGHTLY, SCHEDULE, ZONE = "ldm-batch-nightly", "30 1 * * *", "Etc/UTC"


def main() -> None:
    for path, text in rendered():
        path.write_text(text, encoding="utf-8")


def rendered() -> Iterator[tuple[Path, str]]:
    """Files and what belongs into them."""
    for name in OVERLAYS:
        yield HERE / "overlays" / name / "job.yaml", _text(f"jobs/{name}.yaml", *_manifests(name))
    files, job = _manifests("nightly", "--extend")
    yield HERE / "examples" / "raycronjob.yaml", _text("jobs/nightly.yaml", *_nightly(files, job))
    yield HERE / "examples" / "raycluster.yaml", _text("jobs/nightly.yaml", _cluster(job))


def _manifests(name: str, *arguments: str) -> list[Manifest]:
    with tempfile.TemporaryDirectory() as folder:
        job, parcel = pack(HERE / "jobs" / f"{name}.yaml", [], arguments, Path(folder))
        return manifests(job, parcel)


def _text(source: str, *documents: Manifest) -> str:
    head = f"# Made of infra/kubernetes/{source} by infra/kubernetes/render.py; change it there.\n"
    return head + str(yaml.safe_dump_all(json.loads(json.dumps(documents)), sort_keys=False, allow_unicode=True))


def _nightly(files: Manifest, job: Manifest) -> list[Manifest]:
    """The job every night. Its files keep their name, which each RayJob mounts."""
    meta = {"name": NIGHTLY, "namespace": job["metadata"]["namespace"], "labels": NAMED}
    spec = {"schedule": SCHEDULE, "timeZone": ZONE, "jobTemplate": job["spec"]}
    return [files, {"apiVersion": "ray.io/v1", "kind": "RayCronJob", "metadata": meta, "spec": spec}]


def _cluster(job: Manifest) -> Manifest:
    """The job's cluster without the job, to which several can be sent."""
    spec = job["spec"]["rayClusterSpec"]
    groups: list[dict[str, Any]] = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        container = pod["containers"][0]
        pod["volumes"] = [one for one in pod["volumes"] if one["name"] != "job"]
        container["volumeMounts"] = [one for one in container["volumeMounts"] if one["mountPath"] != FOLDER]
        container["env"] = [one for one in container["env"] if one["name"] not in IDENTITY]
    meta = {"name": CLUSTER, "namespace": job["metadata"]["namespace"], "labels": NAMED}
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": meta, "spec": spec}


if __name__ == "__main__":
    main()
