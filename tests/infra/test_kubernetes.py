"""Base, overlays and examples for Kubernetes, rendered by kubectl where there is one."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import kubernetes.client
import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.cluster_section import amount
from pipelines.job import load_job
from pipelines.rayjob_rules import violations
from tests.conftest import ROOT

Manifest = dict[str, Any]
FOLDER = ROOT / "infra/kubernetes"
OVERLAYS = sorted(path.parent.name for path in (FOLDER / "overlays").glob("*/kustomization.yaml"))
NOT_IN_A_NAMESPACE = {"Namespace", "ResourceFlavor", "ClusterQueue"}
CONSTRAINTS = (ROOT / "constraints.txt").read_text()

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed here")


def kustomized(folder: Path) -> list[Manifest]:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> tuple[str, list[Manifest]]:
    return request.param, kustomized(FOLDER / "overlays" / request.param)


def documents(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [one for one in manifests if one["kind"] == kind]


def inside(node: Any) -> Iterator[dict[str, Any]]:
    """Every mapping of a manifest."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from inside(child)


def pods(manifests: list[Manifest]) -> list[dict[str, Any]]:
    return [node for one in manifests for node in inside(one) if "containers" in node]


def missing(manifests: list[Manifest]) -> set[tuple[str, str]]:
    """(kind, name) of what something names and nothing defines."""
    there = {(one["kind"], one["metadata"]["name"]) for one in manifests}
    there |= {("Secret", one["metadata"]["name"]) for one in documents(FOLDER / "secret.example.yaml")}
    named: set[tuple[str, str]] = set()
    for node in itertools.chain.from_iterable(map(inside, manifests)):
        named |= {("ServiceAccount", node["serviceAccountName"])} if "serviceAccountName" in node else set()
        named |= {("PersistentVolumeClaim", node["claimName"])} if "claimName" in node else set()
        named |= {("Secret", node["secretName"])} if "secretName" in node else set()
        for key, kind in (("configMap", "ConfigMap"), ("secretRef", "Secret"), ("secretKeyRef", "Secret")):
            named |= {(kind, node[key]["name"])} if key in node else set()
        for key in ("roleRef", "clusterQueue"):
            if isinstance(said := node.get(key), dict):
                named.add((said["kind"], said["name"]))
            elif said is not None:
                named.add(("ClusterQueue", said))
        if node.get("kind") == "RoleBinding":
            named |= {(one["kind"], one["name"]) for one in node["subjects"] if one["kind"] == "ServiceAccount"}
        if "coveredResources" in node:
            named |= {("ResourceFlavor", flavor["name"]) for flavor in node["flavors"]}
        if queue := node.get("labels", {}).get("kueue.x-k8s.io/queue-name"):
            named.add(("LocalQueue", queue))
    return named - there


def unknown(node: Any, kind: str, at: str = "") -> Iterator[str]:
    """Fields that the API of Kubernetes does not have, or whose value is of another kind."""
    if inner := re.fullmatch(r"List\[(.*)\]|Dict\[str, (.*)\]", kind):
        assert isinstance(node, list if inner[1] else dict), at
        for i, child in enumerate(node) if inner[1] else node.items():
            yield from unknown(child, inner[1] or inner[2], f"{at}.{i}")
    elif kind in ("str", "int", "bool"):
        if type(node).__name__ != kind and not (kind == "str" and isinstance(node, str)):
            yield f"{at}: {node!r} is no {kind}"
    elif kind.startswith("V"):
        model = getattr(kubernetes.client, kind)
        names = {theirs: ours for ours, theirs in model.attribute_map.items()}
        for key, value in node.items():
            if key in names:
                yield from unknown(value, model.openapi_types[names[key]], f"{at}.{key}")
            else:
                yield f"{at}.{key}: {kind} has no such field"


def needed(pod: dict[str, Any], resource: str) -> float:
    return sum(amount(str(one["resources"]["requests"].get(resource, 0))) for one in pod["containers"])


def test_every_manifest_of_a_job_is_what_its_job_file_renders_to() -> None:
    spec = importlib.util.spec_from_file_location("render", FOLDER / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = dict(module.rendered())
    assert {path.parent.name for path in made} == {*OVERLAYS, "examples"}
    stale = [str(path) for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run infra/kubernetes/render.py"


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_job_of_an_overlay_is_what_the_command_prints(name: str) -> None:
    printed = CliRunner().invoke(app, ["render", str(FOLDER / "jobs" / f"{name}.yaml")])
    assert printed.exit_code == 0, printed.output
    head, _, written = (FOLDER / "overlays" / name / "job.yaml").read_text(encoding="utf-8").partition("\n")
    assert head.startswith("# Made of ")
    assert printed.output == written
    # No part is a reference to another.
    assert "&id" not in written


def test_every_job_says_the_ray_of_the_image() -> None:
    for path in sorted((FOLDER / "jobs").glob("*.yaml")):
        assert f"\nray=={load_job(path).cluster.ray_version}\n" in CONSTRAINTS


@needs_kubectl
def test_kuberay_would_take_every_rayjob_and_only_the_image_is_an_overlays_own(
    overlay: tuple[str, list[Manifest]],
) -> None:
    name, manifests = overlay
    [job] = of_kind(manifests, "RayJob")
    assert violations(job) == []
    [written] = of_kind(documents(FOLDER / "overlays" / name / "job.yaml"), "RayJob")
    images = {container["image"] for pod in pods([job]) for container in pod["containers"]}
    assert len(images) == 1
    for pod in pods([written]):
        pod["containers"][0]["image"] = next(iter(images))
    assert job == written


@needs_kubectl
def test_every_object_has_a_place_and_all_that_it_names(overlay: tuple[str, list[Manifest]]) -> None:
    _, manifests = overlay
    for one in manifests:
        assert re.fullmatch(r"([a-z0-9.-]+/)?v[0-9a-z]+", one["apiVersion"])
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", one["metadata"]["name"])
        expected = None if one["kind"] in NOT_IN_A_NAMESPACE else "ldm-batch"
        assert one["metadata"].get("namespace") == expected, one["kind"]
    keys = [(one["kind"], one["metadata"]["name"]) for one in manifests]
    assert len(set(keys)) == len(keys)
    assert {one["metadata"]["name"] for one in of_kind(manifests, "Namespace")} == {"ldm-batch"}
    assert missing(manifests) == set()
    # The form is for people alone.
    assert of_kind(manifests, "Secret") == []


@needs_kubectl
def test_kubernetes_own_objects_have_only_fields_that_it_knows(overlay: tuple[str, list[Manifest]]) -> None:
    own = {"v1": "V1", "batch/v1": "V1", "rbac.authorization.k8s.io/v1": "V1"}
    [form] = documents(FOLDER / "secret.example.yaml")
    checked = [one for one in (*overlay[1], form) if one["apiVersion"] in own]
    assert {"Namespace", "ServiceAccount", "Role", "RoleBinding", "PersistentVolumeClaim", "ConfigMap"} <= {
        one["kind"] for one in checked
    }
    for one in checked:
        assert list(unknown(one, own[one["apiVersion"]] + one["kind"])) == []
    container = {"nam": "x", "ports": [{"containerPort": "80"}], "env": [{"name": "A", "values": "b"}]}
    assert len(list(unknown({"spec": {"containers": [container], "nodeSelector": {"a": 1}}}, "V1Pod"))) == 4


@needs_kubectl
def test_a_name_that_nothing_has_would_be_found() -> None:
    manifests = kustomized(FOLDER / "overlays/kueue")
    for kind in ("ServiceAccount", "PersistentVolumeClaim", "ConfigMap", "Role", "LocalQueue", "ClusterQueue"):
        renamed = copy.deepcopy(manifests)
        for one in of_kind(renamed, kind):
            one["metadata"]["name"] += "-x"
        assert kind in {found for found, _ in missing(renamed)}


@needs_kubectl
def test_pods_have_no_rights_that_they_could_do_without(overlay: tuple[str, list[Manifest]]) -> None:
    for pod in pods(overlay[1]):
        security = pod["securityContext"]
        assert security["runAsNonRoot"]
        assert security["runAsUser"] == 1000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_what_submits_may_read_no_secret() -> None:
    role, _ = documents(FOLDER / "base/rights.yaml")
    granted = {resource for rule in role["rules"] for resource in rule["resources"]}
    assert granted.isdisjoint({"secrets", "*"})


@needs_kubectl
def test_the_queue_of_the_overlay_has_room_for_its_job() -> None:
    manifests = kustomized(FOLDER / "overlays/kueue")
    [job], [queue] = of_kind(manifests, "RayJob"), of_kind(manifests, "ClusterQueue")
    spec = job["spec"]["rayClusterSpec"]
    counted = [(1, spec["headGroupSpec"]), (1, {"template": job["spec"]["submitterPodTemplate"]})]
    counted += [(group["replicas"], group) for group in spec["workerGroupSpecs"]]
    [resources] = queue["spec"]["resourceGroups"]
    [flavor] = resources["flavors"]
    quota = {one["name"]: amount(str(one["nominalQuota"])) for one in flavor["resources"]}
    assert set(quota) == set(resources["coveredResources"])
    for name, most in quota.items():
        assert 0 < sum(times * needed(group["template"]["spec"], name) for times, group in counted) <= most


@needs_kubectl
@pytest.mark.parametrize("name", ["gke-spot", "eks", "kueue"])
def test_the_claim_of_models_is_filled_with_what_the_job_loads(name: str) -> None:
    [download] = of_kind(kustomized(FOLDER / "overlays" / name), "Job")
    [container] = download["spec"]["template"]["spec"]["containers"]
    job = load_job(FOLDER / "jobs" / f"{name}.yaml", environ={})
    [stage] = job.stages
    assert job.cluster.model_cache is not None
    assert container["env"][0] == {"name": "HF_HOME", "value": job.cluster.model_cache.path}
    assert container["args"][:2] == [stage.model, f"--revision={stage.revision}"]
    assert f"--include=*/*.{stage.variant}.safetensors" in container["args"]
    [mount] = container["volumeMounts"]
    assert mount["mountPath"] == job.cluster.model_cache.path


def test_the_cluster_of_the_examples_is_one_that_a_rayjob_could_have() -> None:
    [cluster] = documents(FOLDER / "examples/raycluster.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert violations(rayjob_with({"entrypoint": "x", "rayClusterSpec": cluster["spec"]})) == []
    mounted = {volume["name"] for pod in pods([cluster]) for volume in pod["volumes"]}
    assert mounted == {"models", "shared-mem"}
    assert "LDM_BATCH_" not in yaml.safe_dump(cluster)


def test_the_job_of_every_night_is_one_that_kuberay_would_take_and_ends_before_the_next() -> None:
    files, cron = documents(FOLDER / "examples/raycronjob.yaml")
    assert (files["kind"], cron["apiVersion"], cron["kind"]) == ("ConfigMap", "ray.io/v1", "RayCronJob")
    assert set(cron["spec"]) == {"schedule", "timeZone", "jobTemplate"}
    assert re.fullmatch(r"\d+ \d+ \* \* \*", cron["spec"]["schedule"])
    assert ZoneInfo(cron["spec"]["timeZone"])
    template = cron["spec"]["jobTemplate"]
    assert violations(rayjob_with(template)) == []
    # KubeRay counts anew with each attempt.
    assert (template["backoffLimit"] + 1) * template["activeDeadlineSeconds"] < 86400
    assert template["entrypoint"].endswith("--extend")
    names = {node["configMap"]["name"] for node in inside(template) if "configMap" in node}
    assert names == {files["metadata"]["name"]}
    # A new RayJob's name is this one, and a time after it.
    assert len(cron["metadata"]["name"]) <= 30


def rayjob_with(spec: Manifest) -> Manifest:
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "x"}, "spec": spec}


def test_the_form_of_a_secret_holds_none() -> None:
    [form] = documents(FOLDER / "secret.example.yaml")
    assert set(form) == {"apiVersion", "kind", "metadata", "type", "stringData"}
    assert set(form["stringData"].values()) == {""}
    used = {secret for path in (FOLDER / "jobs").glob("*.yaml") for secret in load_job(path).cluster.secrets}
    assert used == {form["metadata"]["name"]}
