"""What a Kubernetes cluster must have before a job is sent there; each finding is one line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.cluster_section import SPOT, Cluster, amount
from pipelines.doctor import Diagnosis, Finding
from pipelines.job import Job
from pipelines.kube_api import KubeApi, Refused, place, refuse_no_namespace
from pipelines.rayjob import gpus_of

RAY = "ray.io/v1"
NEEDED = "preRunningDeadlineSeconds"
"""A field of a RayJob that came with KubeRay 1.7."""

INSTALL = "KubeRay is not installed, or older than 1.0; install its operator, 1.7 or newer"

RIGHTS = (
    ("ray.io", "rayjobs", "", ("create", "get", "list", "patch", "delete")),
    ("", "configmaps", "", ("create", "get", "delete")),
    ("", "pods", "", ("list",)),
    ("", "pods", "log", ("get",)),
)


def diagnose(namespace: str | None, context: str | None, job: Job | None) -> Diagnosis:
    """What `doctor --kube` shows; of a job, whether this cluster can run it.

    Raises:
        LdmError: the cluster cannot be asked.
    """
    refuse_no_namespace(namespace)
    api = KubeApi(context)
    where = namespace or (job.cluster.namespace if job else None) or api.namespace
    found = findings(api, where, job)
    lacking = broken(found)
    count = "1 thing is" if len(lacking) == 1 else f"{len(lacking)} things are"
    mode = f"{count} missing; nothing can be submitted yet" if lacking else "a job can be submitted"
    return Diagnosis(api.settings.host, found, mode)


def findings(api: KubeApi, namespace: str, job: Job | None) -> list[Finding]:
    """What speaks for and against a job on this cluster; `broken` is what it cannot run with.

    Raises:
        Refused: the cluster cannot be asked at all.
    """
    version = api.get("/version")
    host = api.settings.host
    found = [Finding("cluster", "ok", f"Kubernetes {version.get('gitVersion', '?')} at {host}, namespace {namespace}")]
    found += _kuberay(api)
    found += _rights(api, namespace)
    if job is not None:
        found += _queue(api, namespace, job.cluster)
        found += _named(api, namespace, job.cluster)
        found += _gpus(api, job)
        found += _image(job.cluster)
    return found


def _kuberay(api: KubeApi) -> Iterator[Finding]:
    group = api.find("/apis/ray.io")
    versions = [one["version"] for one in (group or {}).get("versions", [])]
    if not versions:
        yield Finding("KubeRay", "broken", f"there is no API ray.io; {INSTALL}")
        return
    resources = (
        {one["name"] for one in (api.find(f"/apis/{RAY}") or {}).get("resources", [])} if "v1" in versions else ()
    )
    if "rayjobs" not in resources:
        said = f"it serves {', '.join(versions)}"
        yield Finding("KubeRay", "broken", f"no RayJob of {RAY}; {said}; install KubeRay 1.7 or newer")
        return
    try:
        crd = api.get("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/rayjobs.ray.io")
    except Refused as refused:
        if refused.status not in (403, 404):
            raise
        yield Finding("KubeRay", "ok", f"{RAY} is served; of which release may not be asked")
        return
    served: dict[str, Any] = next((one for one in crd["spec"]["versions"] if one["name"] == "v1"), {})
    fields = served.get("schema", {}).get("openAPIV3Schema", {}).get("properties", {}).get("spec", {})
    if NEEDED not in fields.get("properties", {NEEDED: None}):
        yield Finding("KubeRay", "broken", f"its RayJob has no {NEEDED}: older than 1.7; update KubeRay and its CRDs")
    else:
        yield Finding("KubeRay", "ok", f"{RAY} is served, with the fields of 1.7")


def _rights(api: KubeApi, namespace: str) -> Iterator[Finding]:
    lacking = []
    for group, resource, below, verbs in RIGHTS:
        for verb in verbs:
            asked = {"namespace": namespace, "verb": verb, "group": group, "resource": resource, "subresource": below}
            review = {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SelfSubjectAccessReview",
                "spec": {"resourceAttributes": asked},
            }
            answer = api.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
            if not answer.get("status", {}).get("allowed"):
                lacking.append(f"{verb} {resource}{'/' + below if below else ''}{'.' + group if group else ''}")
    if lacking:
        yield Finding(
            "rights", "broken", f"not in namespace {namespace}: {', '.join(lacking)}; ask for a role with them"
        )
    else:
        yield Finding("rights", "ok", f"all that a submission needs in namespace {namespace}")


def _queue(api: KubeApi, namespace: str, cluster: Cluster) -> Iterator[Finding]:
    if cluster.queue is None:
        return
    group = kueue(api)
    if group is None:
        yield Finding("queue", "broken", f"cluster.queue {cluster.queue}: Kueue is not installed; leave it out")
        return
    try:
        queue = api.find(place(namespace, "localqueues", cluster.queue, group))
        if queue is None:
            there = [one["metadata"]["name"] for one in api.items(place(namespace, "localqueues", group=group), "")]
            hint = f"there is {', '.join(there)}" if there else "there is none"
            text = f"cluster.queue {cluster.queue}: no such LocalQueue in namespace {namespace}; {hint}"
            yield Finding("queue", "broken", text)
            return
    except Refused as refused:
        if refused.status != 403:
            raise
        yield Finding("queue", "skipped", f"{cluster.queue}: may not be looked at")
        return
    stopped = queue.get("spec", {}).get("stopPolicy", "None")
    waiting = queue.get("status", {}).get("pendingWorkloads", 0)
    if stopped != "None":
        yield Finding("queue", "weak", f"{cluster.queue} is stopped ({stopped}); the job will wait")
    else:
        yield Finding("queue", "ok", f"{cluster.queue} takes jobs; {waiting} wait there")


def kueue(api: KubeApi) -> str | None:
    """Kueue's API in this cluster, such as `kueue.x-k8s.io/v1beta1`; None where it is not installed."""
    group = api.find("/apis/kueue.x-k8s.io")
    return None if group is None else str(group["preferredVersion"]["groupVersion"])


def _named(api: KubeApi, namespace: str, cluster: Cluster) -> Iterator[Finding]:
    """Objects that the pods name; a pod waits for ever for one that is missing."""
    claims = [v.claim for v in cluster.volumes if v.claim] + (
        [cluster.model_cache.claim] if cluster.model_cache else []
    )
    secrets = [*cluster.secrets, *cluster.image_pull_secrets, *(v.secret for v in cluster.volumes if v.secret)]
    accounts = [cluster.service_account] if cluster.service_account else []
    kinds = (("secret", "secrets", secrets), ("claim", "persistentvolumeclaims", claims))
    for what, plural, names in (*kinds, ("service account", "serviceaccounts", accounts)):
        for name in dict.fromkeys(names):
            try:
                there = api.find(place(namespace, plural, str(name)))
            except Refused as refused:
                if refused.status != 403:
                    raise
                yield Finding(what, "skipped", f"{name}: may not be looked at")
                continue
            if there is None:
                yield Finding(
                    what, "broken", f"{name}: there is none of that name in namespace {namespace}; make it first"
                )
            else:
                yield Finding(what, "ok", f"{name} is there")


def _gpus(api: KubeApi, job: Job) -> Iterator[Finding]:
    groups = [(group, gpus_of(job, group)) for group in job.cluster.workers]
    if not any(gpus for _, gpus in groups):
        return
    try:
        nodes = api.items("/api/v1/nodes", "")
    except Refused as refused:
        if refused.status != 403:
            raise
        yield Finding("GPUs", "skipped", "nodes may not be looked at")
        return
    for group, gpus in groups:
        if not gpus:
            continue
        wanted = dict(group.node_selector)
        if group.spot:
            label, value, _ = SPOT[group.spot]
            wanted = {label: value, **wanted}
        fitting = [n for n in nodes if wanted.items() <= n["metadata"].get("labels", {}).items()]
        offered = [int(amount(str(n["status"].get("allocatable", {}).get(group.gpu_resource, "0")))) for n in fitting]
        room = sum(count // gpus for count in offered)
        wants = f"{group.replicas} × {gpus} {group.gpu_resource}"
        text = f"group {group.name}: {wants}; the nodes of today have room for {room}"
        if room >= group.replicas:
            yield Finding("GPUs", "ok", text)
        else:
            # A pool that scales from nothing has no node to show.
            yield Finding("GPUs", "weak", f"{text}; the job waits, unless the cluster adds nodes by itself")


def _image(cluster: Cluster) -> Iterator[Finding]:
    if cluster.image is None:
        yield Finding("image", "broken", "cluster.image: missing; Kubernetes needs an image with ldm-batch in it")
    elif "@sha256:" in cluster.image:
        yield Finding("image", "ok", f"{cluster.image} is pinned by digest")
    else:
        yield Finding("image", "weak", f"{cluster.image} is no digest: two attempts may run other code")


def broken(found: list[Finding]) -> list[Finding]:
    """What a job cannot run with."""
    return [f for f in found if f.verdict == "broken"]
