"""The manifests of a job on Kubernetes: a ConfigMap with what travels, and KubeRay's RayJob."""

from __future__ import annotations

import base64
import math
import os
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from pipelines.backend import JOB_FILE, Parcel
from pipelines.cluster_section import SPOT, Cluster, Pods, Toleration, Workers, amount
from pipelines.errors import JobError
from pipelines.fitting import Node, arrange
from pipelines.heartbeat import SUBMISSION
from pipelines.job import Job, parse_job
from pipelines.rayjob_rules import QUEUE_LABEL, violations

FOLDER = "/etc/ldm-batch"
"""Where every pod sees what travelled."""

DRIVER = f"env --chdir={FOLDER} ldm-batch run {JOB_FILE} "
"""How the entrypoint of each of our RayJobs begins."""

MAX_FILES_BYTES = 900_000
"""A ConfigMap may have 1 MiB, and binary content grows by a third on its way."""

MANAGED = {"app.kubernetes.io/name": "ldm-batch", "app.kubernetes.io/managed-by": "ldm-batch"}
ID_LABEL = "ldm-batch/id"
"""Which submission a RayJob belongs to: the second attempt of one has another name."""

JOB_ANNOTATION = "ldm-batch/job"
OUTPUT_ANNOTATION = "ldm-batch/output"
SHM_SHARE = 0.35
"""Of a pod's memory: Ray's object store takes 30 %, and wants it in shared memory."""

IDLE_S = 1800
"""Until a pod without work is given back. One that waits for the slowest of the others to come up, or for the plan, has
none either, and nobody would ask for it again."""

MAX_LINES = 5

LAST_S = 10
"""Of a pod's grace, for Ray to end after its workers have."""

IDENTITY = ("LDM_BATCH_NAMESPACE", "LDM_BATCH_CLUSTER", SUBMISSION)
"""Variables that tell the attempts of this RayJob from those of the same job elsewhere."""

Manifest = dict[str, Any]


def job_of(parcel: Parcel) -> Job:
    """The job in a parcel; a variable that is set on the cluster alone stands for itself."""
    return parse_job(parcel.job_yaml, JOB_FILE, environ=_Here(os.environ))


class _Here(dict[str, str]):
    def __init__(self, known: Mapping[str, str]) -> None:
        super().__init__(known)

    def get(self, name: str, default: Any = None) -> Any:
        tail = "" if default is None else f":-{default}"
        return super().get(name, f"${{env:{name}{tail}}}")


def manifests(job: Job, parcel: Parcel, name: str | None = None, namespace: str | None = None) -> list[Manifest]:
    """All that `kubectl apply -f` needs: the ConfigMap, then the RayJob; `name` is the parcel's id if left out.

    Raises:
        JobError: the cluster section does not say enough, something cannot travel or be reached from a pod, or KubeRay
            would not take it.
    """
    both = [config_map(job, parcel, name), rayjob(job, parcel, name)]
    _refuse_pools_without_room(job)
    for one in both:
        if namespace is not None:
            one["metadata"]["namespace"] = namespace
    if lines := violations(both[1]):
        raise JobError("\n".join(f"RayJob {name or parcel.id}: {line}" for line in lines[:MAX_LINES]))
    return both


def config_map(job: Job, parcel: Parcel, name: str | None = None) -> Manifest:
    """What travels: job file and small tables. It is no place for secrets, and immutable: another job has another id.

    Raises:
        JobError: it is too large for a ConfigMap.
    """
    contents = _contents(parcel)
    num_bytes = sum(map(len, contents.values()))
    if num_bytes > MAX_FILES_BYTES:
        largest = max(contents, key=lambda path: len(contents[path]))
        raise JobError(
            f"{largest}: job file and tables have {num_bytes} bytes; at most {MAX_FILES_BYTES} travel to Kubernetes; "
            "put the table on s3://… or the like, or on a claim of cluster.volumes as file:///…"
        )
    out: Manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(job, parcel, name)}
    for key, body in zip(_keys(contents), contents.values(), strict=True):
        try:
            out.setdefault("data", {})[key] = body.decode("utf-8")
        except UnicodeDecodeError:
            out.setdefault("binaryData", {})[key] = base64.b64encode(body).decode()
    return {**out, "immutable": True}


def rayjob(job: Job, parcel: Parcel, name: str | None = None) -> Manifest:
    """The RayJob of a job, as its `cluster:` section says.

    Raises:
        JobError: no image is named, or the output would lie on the disk of one pod.
    """
    cluster = job.cluster
    if cluster.image is None:
        raise JobError(
            "cluster.image: missing; Kubernetes needs an image with ldm-batch in it, best by digest: "
            "registry/ldm-batch@sha256:… (infra/Dockerfile makes one)"
        )
    _refuse_local(job)
    # Not under Kueue, which admits a job of fixed size.
    grows = cluster.queue is None and any(g.min_replicas not in (None, g.replicas) for g in cluster.workers)
    volumes, mounts = _volumes(cluster, parcel, name or parcel.id)
    ray: Manifest = {
        "rayVersion": cluster.ray_version or version("ray"),
        # A token that KubeRay draws: whoever reaches Ray's ports can run code on it.
        "authOptions": {"mode": "token"},
        "headGroupSpec": _head(cluster, volumes, mounts, parcel.id, grows),
        "workerGroupSpecs": [_workers(job, group, volumes, mounts) for group in cluster.workers],
    }
    if grows:
        ray |= {"enableInTreeAutoscaling": True, "autoscalerOptions": _autoscaler()}
    spec: Manifest = {
        "entrypoint": entrypoint(parcel.arguments),
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": cluster.ttl_s,
        "backoffLimit": cluster.retries,
        "suspend": cluster.queue is not None,
        "submitterConfig": {"backoffLimit": 2},
        "submitterPodTemplate": _submitter(cluster),
        "rayClusterSpec": ray,
    }
    if cluster.deadline_s is not None:
        spec["activeDeadlineSeconds"] = cluster.deadline_s
    if cluster.start_deadline_s is not None:
        spec["preRunningDeadlineSeconds"] = cluster.start_deadline_s
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": _metadata(job, parcel, name), "spec": spec}


def entrypoint(arguments: tuple[str, ...]) -> str:
    """The driver's command line. KubeRay pastes it into a line for bash, and Ray gives it to a shell once more.

    No shell syntax is used for the working directory, therefore, and what failed in single rows (exit code 3) counts as
    done: KubeRay would make a new cluster for it again and again.
    """
    return DRIVER + shlex.join(["--dead-letters-ok", *arguments])


def _contents(parcel: Parcel) -> dict[str, bytes]:
    """Path below `FOLDER` → content, the job file first; without the cluster section, whose variables are ours."""
    data = yaml.safe_load(parcel.job_yaml)
    data.pop("cluster", None)
    contents = {JOB_FILE: yaml.safe_dump(data, sort_keys=False, allow_unicode=True).encode()}
    files = sorted(p for p in parcel.folder.rglob("*") if p.is_file()) if parcel.folder else []
    num_bytes = len(contents[JOB_FILE])
    for file in files:
        path = file.relative_to(parcel.folder or Path()).as_posix()
        if path == JOB_FILE:
            continue
        num_bytes += file.stat().st_size
        # One that is far too large is not read.
        contents[path] = file.read_bytes() if num_bytes <= 10 * MAX_FILES_BYTES else b" " * MAX_FILES_BYTES
    return contents


def _keys(contents: Mapping[str, bytes]) -> list[str]:
    """A key of a ConfigMap takes few characters; the paths are told where it is mounted."""
    return [JOB_FILE if path == JOB_FILE else f"file-{i:04d}" for i, path in enumerate(contents)]


def _metadata(job: Job, parcel: Parcel, name: str | None) -> Manifest:
    cluster = job.cluster
    labels = {**MANAGED, "app.kubernetes.io/instance": name or parcel.id, ID_LABEL: parcel.id}
    out: Manifest = {"name": name or parcel.id, "labels": labels}
    if cluster.namespace is not None:
        out["namespace"] = cluster.namespace
    if cluster.queue is not None:
        labels[QUEUE_LABEL] = cluster.queue
    # As it travels: its variables are the cluster's own.
    said = yaml.safe_load(parcel.job_yaml)["sink"]["path"]
    return {**out, "annotations": {JOB_ANNOTATION: job.name, OUTPUT_ANNOTATION: said}}


def _refuse_local(job: Job) -> None:
    """An output on the disk of one pod, which goes with it."""
    claims = [v.path.rstrip("/") for v in job.cluster.volumes if v.claim is not None and not v.read_only]
    said = job.sink.path
    if said.startswith("${env:") or ("://" in said and not said.startswith("file://")):
        return
    path = said.removeprefix("file://")
    if not any(path == claim or path.startswith(f"{claim}/") for claim in claims):
        where = f" below {' or '.join(claims)}" if claims else ""
        raise JobError(
            f"sink.path {said} would lie in one pod and go with it; use s3://… or the like, or file:///… on a claim of "
            f"cluster.volumes{where}"
        )
    if not said.startswith("file://"):
        raise JobError(f"sink.path {said} lies on a claim that all pods share; say so: file://{said}")


def _volumes(cluster: Cluster, parcel: Parcel, name: str) -> tuple[list[Manifest], list[Manifest]]:
    paths = list(_contents(parcel))
    items = [{"key": key, "path": path} for key, path in zip(_keys(dict.fromkeys(paths, b"")), paths, strict=True)]
    volumes: list[Manifest] = [{"name": "job", "configMap": {"name": name, "items": items}}]
    mounts: list[Manifest] = [{"name": "job", "mountPath": FOLDER, "readOnly": True}]
    for i, one in enumerate(cluster.volumes):
        volume = f"volume-{i}"
        if one.claim is not None:
            volumes.append({"name": volume, "persistentVolumeClaim": {"claimName": one.claim}})
        else:
            volumes.append({"name": volume, "secret": {"secretName": one.secret, "defaultMode": 0o440}})
        mounts.append({"name": volume, "mountPath": one.path, "readOnly": one.read_only or one.claim is None})
    if (cache := cluster.model_cache) is not None:
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": cache.claim}})
        mounts.append({"name": "models", "mountPath": cache.path, "readOnly": cache.offline})
    return volumes, mounts


def _pod(
    cluster: Cluster, pods: Pods, container: Manifest, volumes: list[Manifest], spot: set[str], talks: bool
) -> Manifest:
    """A pod template; `spot` are the kinds of nodes to keep off, `talks` whether it needs the Kubernetes API."""
    spec: Manifest = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": cluster.grace_s,
        "automountServiceAccountToken": talks,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": cluster.run_as_user,
            "runAsGroup": cluster.run_as_user,
            "fsGroup": cluster.run_as_user,
            # Of a claim with a million files, changing each one's group takes hours.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
    }
    if volumes:
        spec["volumes"] = volumes
    if cluster.service_account is not None:
        spec["serviceAccountName"] = cluster.service_account
    if cluster.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in cluster.image_pull_secrets]
    if cluster.priority_class is not None:
        spec["priorityClassName"] = cluster.priority_class
    if pods.node_selector:
        spec["nodeSelector"] = dict(pods.node_selector)
    if pods.tolerations:
        spec["tolerations"] = [one.model_dump(exclude_none=True) for one in pods.tolerations]
    if spot:
        away = [{"key": SPOT[kind][0], "operator": "NotIn", "values": [SPOT[kind][1]]} for kind in sorted(spot)]
        terms = {"nodeSelectorTerms": [{"matchExpressions": away}]}
        spec["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    return {"spec": spec}


def _container(cluster: Cluster, name: str, resources: Manifest) -> Manifest:
    return {
        "name": name,
        "image": cluster.image,
        "imagePullPolicy": "IfNotPresent",
        "resources": {"requests": resources, "limits": dict(resources)},
        "securityContext": _confined(),
    }


def _confined() -> Manifest:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _ray_container(cluster: Cluster, name: str, pods: Pods, mounts: list[Manifest], env: dict[str, str]) -> Manifest:
    resources = {"cpu": pods.cpus, "memory": pods.memory}
    if isinstance(pods, Workers) and pods.gpus:
        resources[pods.gpu_resource] = str(pods.gpus)
    if (cache := cluster.model_cache) is not None:
        env = {"HF_HOME": cache.path, **({"HF_HUB_OFFLINE": "1"} if cache.offline else {}), **env}
    container = _container(cluster, name, resources)
    container["ports"] = [{"containerPort": 8080, "name": "metrics"}]
    said = {**env, **cluster.env}
    if said:
        container["env"] = [{"name": key, "value": value} for key, value in said.items()]
    if cluster.secrets:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in cluster.secrets]
    container["volumeMounts"] = [*mounts, {"name": "shared-mem", "mountPath": "/dev/shm"}]
    return container


def _shm(pods: Pods) -> Manifest:
    size = math.ceil(amount(pods.memory) * SHM_SHARE / (1 << 20))
    return {"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": f"{size}Mi"}}


def _scraped(template: Manifest) -> Manifest:
    said = {"prometheus.io/scrape": "true", "prometheus.io/port": "8080", "prometheus.io/path": "/metrics"}
    template["metadata"] = {"annotations": said}
    return template


def _head(cluster: Cluster, volumes: list[Manifest], mounts: list[Manifest], id: str, grows: bool) -> Manifest:
    # Its workers would compute where the driver and Ray's own state live.
    start = {"num-cpus": "0", "dashboard-host": "0.0.0.0"}
    container = _ray_container(cluster, "ray-head", cluster.head, mounts, {})
    container["env"] = [*_identity(id), *container.get("env", ())]
    ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
    container["ports"] += [{"containerPort": port, "name": of} for of, port in ports.items()]
    kinds = spot_kinds(cluster)
    template = _pod(cluster, cluster.head, container, [*volumes, _shm(cluster.head)], kinds, talks=grows)
    return {"rayStartParams": start, "template": _scraped(template)}


def _identity(id: str) -> list[Manifest]:
    """IDENTITY, filled in by Kubernetes where the pod is.

    A cluster has no name that a pod could ask for. But Kubernetes puts the root certificate of its API server into each
    namespace, and as a rule no two have the same.
    """
    namespace, cluster, submission = IDENTITY
    certificate = {"name": "kube-root-ca.crt", "key": "ca.crt", "optional": True}
    return [
        {"name": namespace, "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
        {"name": cluster, "valueFrom": {"configMapKeyRef": certificate}},
        {"name": submission, "value": f"{id} in $({namespace}) of $({cluster})"},
    ]


def spot_kinds(cluster: Cluster) -> set[str]:
    """Of the nodes that head and submitter keep off: they hold what an attempt cannot go on without."""
    return {group.spot for group in cluster.workers if group.spot}


def gpus_of(job: Job, group: Workers) -> int:
    """GPUs of one pod of a group: those named, else what the stages' workers need."""
    return group.gpus if group.gpus is not None else math.ceil(max(stage.num_gpus for stage in job.stages))


def _refuse_pools_without_room(job: Job) -> None:
    """Try the stages' pools in the pods that there are at most; what a node says of itself is known only there.

    Raises:
        JobError: they do not fit. Each retry would start a whole cluster to find that out.
    """
    nodes = [
        Node(math.ceil(amount(group.cpus)), gpus_of(job, group), labels=group.labels)
        for group in job.cluster.workers
        for _ in range(group.replicas)
    ]
    pools = [
        stage.model_copy(
            update={
                "accelerator_type": None,
                "labels": {name: value for name, value in stage.labels.items() if not name.startswith("ray.io/")},
            }
        )
        for stage in job.stages
    ]
    try:
        arrange([(pool, 0) for pool in pools], nodes)
    except JobError as error:
        raise JobError(f"cluster.workers have no room for the stages: {error}") from None


def _workers(job: Job, group: Workers, volumes: list[Manifest], mounts: list[Manifest]) -> Manifest:
    gpus = gpus_of(job, group)
    selector, tolerations = dict(group.node_selector), list(group.tolerations)
    taints: list[tuple[str, str | None]] = [(group.gpu_resource, None)] if gpus else []
    if group.spot:
        label, value, tainted = SPOT[group.spot]
        selector = {label: value, **selector}
        taints += [(label, value)] if tainted else []
    tolerations += [
        Toleration(key=key, operator="Exists" if value is None else "Equal", value=value, effect="NoSchedule")
        for key, value in taints
    ]
    pods = group.model_copy(update={"gpus": gpus, "node_selector": selector, "tolerations": tolerations})
    container = _ray_container(job.cluster, "ray-worker", pods, mounts, {})
    if (seconds := job.cluster.grace_s - LAST_S) > 0:
        container["lifecycle"] = {"preStop": {"exec": {"command": ["/bin/sh", "-c", while_busy(seconds)]}}}
    template = _pod(job.cluster, pods, container, [*volumes, _shm(pods)], set(), talks=False)
    out = {
        "groupName": group.name,
        # All at once: the pools of a run are fitted to the cluster that it finds.
        "replicas": group.replicas,
        "minReplicas": group.replicas if group.min_replicas is None else group.min_replicas,
        "maxReplicas": group.replicas,
        # KubeRay knows few names of a GPU.
        "rayStartParams": {"num-gpus": str(gpus)} if gpus else {},
        "template": _scraped(template),
    }
    return {**out, "labels": dict(group.labels)} if group.labels else out


def while_busy(seconds: int) -> str:
    """A line for the shell that waits for as long as some process of Ray's is at work, which says so in its title.

    Ray itself ends everything the moment that its pod is told to go. So a spot node goes on with its shards for most of
    its notice, and a pod whose job is over goes at once.
    """
    busy = "grep -qsaE '^ray::([^I]|I[^D])' /proc/[0-9]*/cmdline"
    return f"i=0; while [ $i -lt {seconds} ] && {busy}; do sleep 1; i=$((i+1)); done"


def _autoscaler() -> Manifest:
    resources = {"cpu": "500m", "memory": "512Mi"}
    return {
        "version": "v2",
        "idleTimeoutSeconds": IDLE_S,
        "imagePullPolicy": "IfNotPresent",
        "resources": {"requests": resources, "limits": dict(resources)},
        "securityContext": _confined(),
    }


def _submitter(cluster: Cluster) -> Manifest:
    """The pod that asks the head to run the job and follows its log; it holds no secret."""
    container = _container(cluster, "ray-job-submitter", {"cpu": "500m", "memory": "1Gi"})
    kinds = spot_kinds(cluster)
    template = _pod(cluster, cluster.head, container, [], kinds, talks=False)
    template["spec"]["terminationGracePeriodSeconds"] = 30
    return template
