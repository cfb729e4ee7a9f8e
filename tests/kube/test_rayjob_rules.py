"""Which RayJobs are taken and which refused, before anything is sent."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.rayjob_rules import TLS, violations

ACCEPTED = sorted((Path(__file__).parent / "rayjobs").glob("*.yaml"))
GONE = object()
LABEL = {"kueue.x-k8s.io/queue-name": "q"}
HEAD = "spec.rayClusterSpec.headGroupSpec"
CONTAINER = f"{HEAD}.template.spec.containers.0"
WORKERS = "spec.rayClusterSpec.workerGroupSpecs.0"
ROCKSDB: dict[str, Any] = {"spec.rayClusterSpec.gcsFaultToleranceOptions": {"backend": "rocksdb"}}
COLLECTOR = {"image": "registry/collector", "env": [{"name": "STORAGE_BACKEND", "value": "S3"}]}
HISTORY: dict[str, Any] = {"spec.rayClusterSpec.historyServerOptions": {"collectorOptions": COLLECTOR}}
GROUP = {"groupName": "g", "minReplicas": 1, "maxReplicas": 1, "template": {"spec": {"containers": [{"name": "w"}]}}}


def base(name: str) -> dict[str, Any]:
    text = (Path(__file__).parent / "rayjobs" / f"{name}.yaml").read_text()
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def mutated(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A RayJob that is taken, with the values at some paths changed or taken away."""
    out = copy.deepcopy(base(name))
    for path, value in changes.items():
        *way, last = path.split(".") if isinstance(path, str) else path
        here: Any = out
        for step in way:
            here = here[int(step)] if isinstance(here, list) else here.setdefault(step, {})
        if value is GONE:
            del here[int(last) if isinstance(here, list) else last]
        elif isinstance(here, list):
            here[int(last)] = value
        else:
            here[last] = value
    return out


@pytest.mark.parametrize("file", ACCEPTED, ids=lambda file: file.stem)
def test_what_kuberay_takes_is_taken(file: Path) -> None:
    assert violations(yaml.safe_load(file.read_text())) == []


# (what is changed, in which RayJob, what the line must say)
STRUCTURE: list[tuple[dict[str, Any], str, str]] = [
    ({"kind": "RayJobs"}, "gpus", "expected ray.io/v1 or ray.io/v1alpha1, RayJob"),
    ({"apiVersion": "ray.io/v2"}, "gpus", "'ray.io/v2'"),
    ({"apiVersion": GONE}, "gpus", "apiVersion"),
    ({"metadata": GONE}, "gpus", "metadata: missing"),
    ({"spec": GONE}, "gpus", "spec: missing"),
    ({"spec": []}, "gpus", "spec: expected object; got a list"),
    ({"extra": 1}, "gpus", "extra: unknown field; one of"),
    ({"spec.entryPoint": "x"}, "gpus", "spec.entryPoint: unknown field; did you mean entrypoint?"),
    ({"spec.entrypoint": 7}, "gpus", "spec.entrypoint: expected string; got 7"),
    ({"spec.suspend": "true"}, "gpus", "spec.suspend: expected boolean; got 'true'"),
    ({"spec.backoffLimit": "3"}, "gpus", "spec.backoffLimit: expected integer; got '3'"),
    ({"spec.backoffLimit": 1 << 40}, "gpus", "the maximum is 2147483647"),
    ({"spec.ttlSecondsAfterFinished": 1.5}, "gpus", "expected integer; got 1.5"),
    ({"spec.metadata": {"a": 1}}, "gpus", "spec.metadata.a: expected string"),
    ({"spec.runtimeEnvYAML": {"pip": []}}, "gpus", "spec.runtimeEnvYAML: expected string; got a mapping"),
    ({"spec.rayClusterSpec.headGroupSpec": GONE}, "gpus", "spec.rayClusterSpec.headGroupSpec: missing"),
    ({f"{HEAD}.template": GONE}, "gpus", f"{HEAD}.template: missing"),
    ({f"{HEAD}.replicas": 1}, "gpus", f"{HEAD}.replicas: unknown field"),
    ({f"{HEAD}.rayStartParams": {"num-cpus": 0}}, "gpus", "rayStartParams.num-cpus: expected string; got 0"),
    ({f"{HEAD}.template.spec.containers": {}}, "gpus", "expected array"),
    ({f"{HEAD}.template.spec.restartPolicy": ["Never"]}, "gpus", "expected string; got a list"),
    ({f"{CONTAINER}.name": GONE}, "gpus", f"{CONTAINER}.name: missing"),
    ({f"{CONTAINER}.imagePullpolicy": "Always"}, "gpus", "did you mean imagePullPolicy?"),
    ({f"{CONTAINER}.env": [{"value": "x"}]}, "gpus", "env.0.name: missing"),
    ({f"{CONTAINER}.env": [{"name": "A", "value": 1}]}, "gpus", "env.0.value: expected string; got 1"),
    ({f"{CONTAINER}.env": [{"name": "A"}, {"name": "A"}]}, "gpus", "name 'A' is given twice"),
    ({f"{CONTAINER}.envFrom": [{"secretRef": "s"}]}, "gpus", "secretRef: expected object"),
    ({f"{CONTAINER}.ports": [{"containerPort": 1}, {"containerPort": 1}]}, "gpus", "is given twice"),
    ({f"{CONTAINER}.ports": [{"containerPort": "8265"}]}, "gpus", "containerPort: expected integer"),
    ({f"{CONTAINER}.resources": {"limits": {"memory": "8GB"}}}, "gpus", "got '8GB'; expected a quantity"),
    ({f"{CONTAINER}.resources": {"limits": {"cpu": 0.5}}}, "gpus", "cpu: expected integer or string; got 0.5"),
    ({f"{CONTAINER}.resources": {"limit": {"cpu": 1}}}, "gpus", "did you mean limits?"),
    ({f"{CONTAINER}.volumeMounts": [{"name": "x"}]}, "gpus", "volumeMounts.0.mountPath: missing"),
    ({f"{HEAD}.template.spec.volumes": [{"emptyDir": {}}]}, "gpus", "volumes.0.name: missing"),
    ({f"{WORKERS}.groupName": GONE}, "gpus", f"{WORKERS}.groupName: missing"),
    ({f"{WORKERS}.minReplicas": "1"}, "gpus", f"{WORKERS}.minReplicas: expected integer"),
    ({"spec.rayClusterSpec.workerGroupSpecs.0": None}, "gpus", "expected object; got None"),
    ({"spec.rayClusterSpec.autoscalerOptions.version": "v3"}, "gpus", "got 'v3'; one of v1, v2"),
    ({"spec.rayClusterSpec.autoscalerOptions.upscalingMode": "Fast"}, "gpus", "one of Default, Aggressive"),
    ({"spec.rayClusterSpec.authOptions.mode": "Token"}, "gpus", "got 'Token'; one of disabled, token"),
    ({"spec.rayClusterSpec.rayVersion": 2.56}, "gpus", "rayVersion: expected string"),
    ({"spec.rayClusterSpec.networkPolicy": {"mode": "Deny"}}, "gpus", "one of DenyAll"),
    ({"spec.preRunningDeadlineSeconds": 0}, "gpus", "preRunningDeadlineSeconds: got 0; the minimum is 1"),
    ({"spec.clusterSelector": "shared"}, "on_a_cluster_that_is_there", "expected object"),
    ({"spec.deletionStrategy.deletionRules": []}, "deletion_rules", "at least 1"),
    ({"spec.deletionStrategy.deletionRules.0.policy": "DeleteAll"}, "deletion_rules", "one of DeleteCluster"),
    ({"spec.deletionStrategy.deletionRules.0.condition.jobStatus": "RUNNING"}, "deletion_rules", "SUCCEEDED, FAILED"),
    ({"spec.submissionMode": "HTTPMode"}, "first_version", "spec.submissionMode: unknown field"),
    ({"metadata.labels": {"a": 1}}, "gpus", "metadata.labels.a: expected string"),
    ({"metadata.ownerReferences": [{"name": "x"}]}, "gpus", "ownerReferences.0.uid: missing"),
    ({"metadata.label": {}}, "gpus", "metadata.label: unknown field; did you mean labels?"),
]
OPERATOR: list[tuple[dict[str, Any], str, str]] = [
    ({"metadata.name": "a" * 48}, "gpus", "has 48 characters; at most 47"),
    ({"metadata.name": "Upper"}, "gpus", "metadata.name: 'Upper'"),
    ({"metadata.name": "1st"}, "gpus", "beginning with a letter"),
    ({"metadata.name": "a.b"}, "gpus", "metadata.name"),
    ({"metadata.name": "ends-"}, "gpus", "not ending in -"),
    ({"metadata.name": "$(reboot)"}, "gpus", "metadata.name"),
    ({"metadata.name": GONE}, "gpus", "metadata.name: missing"),
    ({"metadata.generateName": "a" * 43}, "http", "at most 47"),
    ({"metadata.labels": {"team": "a b"}}, "gpus", "metadata.labels.team: got 'a b'"),
    ({"metadata.labels": {"bad key": "a"}}, "gpus", "no valid key"),
    ({"spec.shutdownAfterJobFinishes": GONE}, "gpus", "needs shutdownAfterJobFinishes: true"),
    ({"spec.ttlSecondsAfterFinished": -1}, "gpus", "got -1; 0 or more"),
    ({"spec.suspend": True}, "interactive", "spec.suspend: needs shutdownAfterJobFinishes"),
    ({"spec.activeDeadlineSeconds": 0}, "gpus", "activeDeadlineSeconds: got 0; 1 or more"),
    ({"spec.backoffLimit": -1}, "gpus", "backoffLimit: got -1"),
    ({"spec.submissionMode": "k8sJobMode"}, "gpus", "got 'k8sJobMode'; one of K8sJobMode"),
    ({"spec.managedBy": "me"}, "gpus", "spec.managedBy: got 'me'"),
    ({"spec.rayClusterSpec": GONE}, "interactive", "give rayClusterSpec, or clusterSelector"),
    ({"spec.clusterSelector": {"cluster": "x"}}, "on_a_cluster_that_is_there", "names no cluster"),
    ({"spec.backoffLimit": 1}, "on_a_cluster_that_is_there", "spec.backoffLimit: does not go with clusterSelector"),
    (
        {"spec.suspend": True, "spec.shutdownAfterJobFinishes": True},
        "on_a_cluster_that_is_there",
        "spec.suspend: does not go with clusterSelector",
    ),
    ({"spec.submissionMode": "SidecarMode"}, "on_a_cluster_that_is_there", "SidecarMode does not go with"),
    ({"spec.backoffLimit": 1}, "interactive", "does not go with InteractiveMode"),
    ({"spec.submitterConfig": {"backoffLimit": 1}}, "sidecar", "submitterConfig: SidecarMode has no submitter"),
    ({"spec.submitterPodTemplate": {"spec": {"containers": [{"name": "x"}]}}}, "sidecar", "submitterPodTemplate"),
    ({f"{HEAD}.template.spec.restartPolicy": "Always"}, "sidecar", "Never in SidecarMode"),
    ({"spec.runtimeEnvYAML": "pip: [a"}, "sidecar", "runtimeEnvYAML: not valid YAML"),
    ({"spec.runtimeEnvYAML": "- a"}, "sidecar", "runtimeEnvYAML: expected a mapping; got list"),
    ({"spec.shutdownAfterJobFinishes": True}, "deletion_rules", "not with shutdownAfterJobFinishes"),
    ({"spec.deletionStrategy.onSuccess": {"policy": "DeleteSelf"}}, "deletion_rules", "leave one kind out"),
    ({"spec.deletionStrategy.deletionRules.1.condition.ttlSeconds": 50}, "deletion_rules", "workers go first"),
    ({"spec.deletionStrategy.deletionRules.1.policy": "DeleteWorkers"}, "deletion_rules", "a second rule"),
    (
        {"spec.deletionStrategy.deletionRules.0.condition.jobDeploymentStatus": "Failed"},
        "deletion_rules",
        "either jobStatus or jobDeploymentStatus",
    ),
    ({"spec.rayClusterSpec.enableInTreeAutoscaling": True}, "deletion_rules", "DeleteWorkers does not go with"),
    ({"spec.deletionStrategy": {}}, "deletion_policies", "give both onSuccess and onFailure"),
    ({"spec.deletionStrategy.onFailure": {}}, "deletion_policies", "onFailure.policy: missing"),
    ({"spec.shutdownAfterJobFinishes": True}, "deletion_policies", "DeleteNone does not go with"),
    ({f"{HEAD}.template.spec.containers": []}, "gpus", "at least one container"),
    ({f"{WORKERS}.template.spec.containers": []}, "gpus", "at least one container"),
    ({f"{HEAD}.rayStartParams": {"num-cpus": "0"}}, "gpus", "resources are given in rayStartParams too"),
    ({f"{HEAD}.rayStartParams": {"labels": "a=b"}}, "gpus", "rayStartParams.labels: not supported"),
    ({f"{HEAD}.labels": {"a": "b c"}}, "gpus", "labels.a: got 'b c'"),
    ({f"{WORKERS}.minReplicas": 9}, "gpus", "9 is more than maxReplicas, 8"),
    ({f"{WORKERS}.minReplicas": -1}, "gpus", "minReplicas: got -1"),
    ({f"{WORKERS}.suspend": True}, "gpus", "suspend: does not go with enableInTreeAutoscaling"),
    ({f"{WORKERS}.idleTimeoutSeconds": 5}, "http", "needs autoscalerOptions.version: v2"),
    ({"spec.rayClusterSpec.rayVersion": "2.55.0"}, "gpus", "priority: needs rayVersion 2.56"),
    ({"spec.rayClusterSpec.rayVersion": GONE}, "gpus", "token needs rayVersion 2.52"),
    ({"spec.rayClusterSpec.authOptions.enableK8sTokenAuth": True}, "gpus", "not supported for a RayJob"),
    ({f"{CONTAINER}.env": [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]}, "gpus", "says it too"),
    ({f"{CONTAINER}.env": [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]}, "http", "needs enableInTree"),
    ({f"{WORKERS}.template.spec.restartPolicy": "Always"}, "gpus", "Never with autoscaler v2"),
    ({"spec.rayClusterSpec.autoscalerOptions.idleTimeoutSeconds": -1}, "gpus", "idleTimeoutSeconds: got -1"),
    ({f"{CONTAINER}.env": [{"name": "RAY_REDIS_ADDRESS", "value": "x"}]}, "gpus", "needs gcsFaultToleranceOptions"),
    ({f"{CONTAINER}.env": [{"name": "REDIS_PASSWORD", "value": "x"}]}, "fault_tolerant", "redisPassword"),
    ({"metadata.annotations": {"ray.io/ft-enabled": "true"}}, "fault_tolerant", "says it too"),
    ({"spec.rayClusterSpec.gcsFaultToleranceOptions.backend": "rocksdb"}, "fault_tolerant", "of the backend redis"),
    (
        {
            "spec.rayClusterSpec.tlsOptions": {"enabled": True},
            f"{CONTAINER}.env": [{"name": "RAY_USE_TLS", "value": "1"}],
        },
        "gpus",
        "headGroupSpec: env RAY_USE_TLS is KubeRay's own",
    ),
    (
        {
            "spec.rayClusterSpec.tlsOptions": {"enabled": True},
            "spec.rayClusterSpec.autoscalerOptions.env": [{"name": TLS[3]}],
        },
        "gpus",
        "autoscalerOptions: env RAY_TLS_CA_CERT is KubeRay's own",
    ),
    (
        {
            "spec.rayClusterSpec.tlsOptions": {"enabled": True},
            f"{WORKERS}.template.spec.containers.0.volumeMounts": [{"name": "ray-tls", "mountPath": "/mine"}],
        },
        "gpus",
        "workerGroupSpecs.0: the volume mount ray-tls is KubeRay's own",
    ),
    (
        {
            "spec.rayClusterSpec.tlsOptions": {"enabled": True},
            "spec.rayClusterSpec.autoscalerOptions.volumeMounts": [{"name": "ray-tls", "mountPath": "/mine"}],
        },
        "gpus",
        "autoscalerOptions: the volume mount ray-tls is KubeRay's own",
    ),
    (
        ROCKSDB | {f"{CONTAINER}.volumeMounts": [{"name": "mine", "mountPath": "/data/gcs-state"}]},
        "gpus",
        "headGroupSpec: the volume /data/gcs-state is KubeRay's own",
    ),
    (
        ROCKSDB | {f"{HEAD}.template.spec.volumes": [{"name": "gcs-storage", "emptyDir": {}}]},
        "gpus",
        "headGroupSpec: the volume gcs-storage is KubeRay's own",
    ),
    (
        HISTORY | {f"{HEAD}.template.spec.containers": [{"name": "ray-head"}, {"name": "collector"}]},
        "gpus",
        "the head group has a container named collector",
    ),
    (
        HISTORY | {f"{WORKERS}.template.spec.containers": [{"name": "ray-worker"}, {"name": "collector"}]},
        "gpus",
        "has a container named collector",
    ),
    ({"spec.rayClusterSpec.upgradeStrategy": {"type": "Recreate"}}, "gpus", "upgradeStrategy.type"),
    ({"spec.rayClusterSpec.networkPolicy.mode": "DenyAllEgress"}, "fault_tolerant", "nothing is denied there"),
    ({"spec.shutdownAfterJobFinishes": GONE, "spec.suspend": False}, "kueue", "must be true under Kueue"),
    ({"spec.rayClusterSpec.enableInTreeAutoscaling": True}, "kueue", "not under Kueue"),
    (
        {"spec.rayClusterSpec.workerGroupSpecs": [GROUP | {"groupName": f"g{i}"} for i in range(8)]},
        "kueue",
        "at most 7",
    ),
    ({"metadata.labels": LABEL, "spec.shutdownAfterJobFinishes": True}, "on_a_cluster_that_is_there", "cannot queue"),
]


@pytest.mark.parametrize(("changes", "name", "said"), STRUCTURE + OPERATOR)
def test_what_kuberay_refuses_is_refused_in_one_line_that_says_where(
    changes: dict[str, Any], name: str, said: str
) -> None:
    lines = violations(mutated(name, changes))
    assert any(said in line for line in lines), lines
    assert all("\n" not in line and len(line) < 500 for line in lines)


def test_what_kuberay_keeps_to_itself_is_free_where_it_does_not_use_it() -> None:
    mounts = [{"name": "gcs-storage", "mountPath": "/data/gcs-state"}, {"name": "ray-tls", "mountPath": "/tls"}]
    own: dict[str, Any] = {
        f"{HEAD}.template.spec.containers": [{"name": "ray-head", "volumeMounts": mounts}, {"name": "collector"}],
        f"{HEAD}.template.spec.volumes": [{"name": one["name"], "emptyDir": {}} for one in mounts],
    }
    assert violations(mutated("gpus", own)) == []
    assert violations(mutated("gpus", ROCKSDB | HISTORY)) == []


def test_what_is_no_manifest_at_all_is_refused_too() -> None:
    for value in (None, [], "RayJob", {}):
        assert len(violations(value)) == 1
