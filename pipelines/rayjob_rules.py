"""What KubeRay's operator, Kueue and the API server refuse of a RayJob beyond its schema.

KubeRay 1.7: `ray-operator/controllers/ray/utils/validation.go`, and the CEL rules of its CRD. A RayJob that the
operator refuses is created all the same and stays at ValidationFailed; so it is found here, before anything is sent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from pipelines.rayjob_schema import misfits, without_nulls

MAX_NAME = 47
"""KubeRay adds to it to name clusters and services of at most 63 characters."""

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
ELASTIC = "kueue.x-k8s.io/elastic-job"
MAX_QUEUED_GROUPS = 7
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
TOKEN_SINCE, PRIORITY_SINCE = (2, 52), (2, 56)
AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
TLS = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
TLS_VOLUME = "ray-tls"
ROCKSDB_VOLUME, ROCKSDB_PATH = "gcs-storage", "/data/gcs-state"
COLLECTOR = "collector"

Manifest = dict[str, Any]
Rule = Callable[[Manifest, Manifest], Iterator[str]]
"""Manifest and its spec → what is wrong with them."""


def violations(manifest: Any) -> list[str]:
    """Why a RayJob would be refused, or accepted and never run: one line each; empty where KubeRay 1.7 takes it.

    Args:
        manifest: as `kubectl create -f` reads it, of `ray.io/v1` or `ray.io/v1alpha1`.

    Raises:
        JobError: jsonschema is not installed.
    """
    if found := misfits(manifest):
        return found
    whole = without_nulls(manifest)
    return [line for rule in RULES for line in rule(whole, whole["spec"])]


def _name(manifest: Manifest, spec: Manifest) -> Iterator[str]:
    meta = manifest["metadata"]
    name = meta.get("name") or (f"{meta['generateName']}xxxxx" if meta.get("generateName") else "")
    if not name:
        yield "metadata.name: missing; it is needed"
    elif len(name) > MAX_NAME:
        yield f"metadata.name: {name} has {len(name)} characters; at most {MAX_NAME}"
    elif not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield (
            f"metadata.name: {name[:60]!r}; lower-case letters, digits and -, beginning with a letter and not ending "
            "in -"
        )
    for kind, pattern in (("labels", r"(([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9])?"), ("annotations", r"(?s).*")):
        yield from _labels(f"metadata.{kind}", meta.get(kind, {}), pattern)


def _labels(at: str, labels: dict[str, str], values: str) -> Iterator[str]:
    for key, value in labels.items():
        prefix, _, last = key.rpartition("/")
        subdomain = r"([a-z0-9]([-a-z0-9]*[a-z0-9])?\.)*[a-z0-9]([-a-z0-9]*[a-z0-9])?"
        fits = len(last) <= 63 and re.fullmatch(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]", last)
        if not fits or ("/" in key and (len(prefix) > 253 or not re.fullmatch(subdomain, prefix))):
            yield f"{at}.{key}: no valid key; a name of at most 63 characters, after a domain and / if any"
        if not re.fullmatch(values, value):
            yield f"{at}.{key}: got {value[:80]!r}; at most 63 letters, digits, -, _ and ., no others at the ends"


def _ending(manifest: Manifest, spec: Manifest) -> Iterator[str]:
    shutdown, ttl = spec.get("shutdownAfterJobFinishes", False), spec.get("ttlSecondsAfterFinished", 0)
    if ttl < 0:
        yield f"spec.ttlSecondsAfterFinished: got {ttl}; 0 or more"
    if ttl > 0 and not shutdown:
        yield "spec.ttlSecondsAfterFinished: needs shutdownAfterJobFinishes: true"
    if spec.get("suspend") and not shutdown:
        yield "spec.suspend: needs shutdownAfterJobFinishes: true"
    for field, least in (("activeDeadlineSeconds", 1), ("preRunningDeadlineSeconds", 1), ("backoffLimit", 0)):
        if spec.get(field, least) < least:
            yield f"spec.{field}: got {spec[field]}; {least} or more"


def _deletion(manifest: Manifest, spec: Manifest) -> Iterator[str]:
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    at = "spec.deletionStrategy"
    rules = strategy.get("deletionRules", [])
    legacy = [strategy.get("onSuccess"), strategy.get("onFailure")]
    shutdown, selects = spec.get("shutdownAfterJobFinishes", False), bool(spec.get("clusterSelector"))
    autoscales = spec.get("rayClusterSpec", {}).get("enableInTreeAutoscaling", False)
    if rules and shutdown:
        yield f"{at}.deletionRules: not with shutdownAfterJobFinishes; leave one of them out"
    if rules and any(part is not None for part in legacy):
        yield f"{at}: onSuccess and onFailure do not go with deletionRules; leave one kind out"
    elif not rules and any(part is None for part in legacy):
        yield f"{at}: give both onSuccess and onFailure, or deletionRules"
    for name, part in zip(("onSuccess", "onFailure"), legacy, strict=True):
        if part is None:
            continue
        policy = part.get("policy")
        if policy is None:
            yield f"{at}.{name}.policy: missing; it is needed"
        elif shutdown and policy == "DeleteNone":
            yield f"{at}.{name}.policy: DeleteNone does not go with shutdownAfterJobFinishes"
        yield from _policy(f"{at}.{name}.policy", policy, selects, autoscales)
    times: dict[tuple[str, str], dict[str, int]] = {}
    for i, rule in enumerate(rules):
        where, condition = f"{at}.deletionRules.{i}", rule["condition"]
        said = [(field, condition[field]) for field in ("jobStatus", "jobDeploymentStatus") if field in condition]
        if len(said) != 1:
            yield f"{where}.condition: give either jobStatus or jobDeploymentStatus"
            continue
        yield from _policy(f"{where}.policy", rule["policy"], selects, autoscales)
        of_status = times.setdefault(said[0], {})
        if rule["policy"] in of_status:
            yield f"{where}: a second rule for {rule['policy']} at {said[0][1]}; keep one"
        of_status[rule["policy"]] = condition.get("ttlSeconds", 0)
    for (_, status), of_status in times.items():
        order = [policy for policy in ("DeleteWorkers", "DeleteCluster", "DeleteSelf") if policy in of_status]
        for first, then in pairwise(order):
            if of_status[then] < of_status[first]:
                yield (
                    f"{at}.deletionRules: at {status}, {then} comes after {of_status[then]} s and {first} after "
                    f"{of_status[first]} s; workers go first, then the cluster, then the job"
                )


def _policy(at: str, policy: str | None, selects: bool, autoscales: bool) -> Iterator[str]:
    if selects and policy in ("DeleteCluster", "DeleteWorkers"):
        yield f"{at}: {policy} does not go with clusterSelector, whose cluster is somebody else's"
    elif autoscales and policy == "DeleteWorkers":
        yield f"{at}: DeleteWorkers does not go with enableInTreeAutoscaling"


def _mode(manifest: Manifest, spec: Manifest) -> Iterator[str]:
    mode, retries = spec.get("submissionMode", "K8sJobMode"), spec.get("backoffLimit", 0)
    selector = spec.get("clusterSelector")
    if mode not in SUBMISSION_MODES:
        yield f"spec.submissionMode: got {mode!r}; one of {', '.join(SUBMISSION_MODES)}"
    if spec.get("managedBy", MANAGERS[0]) not in MANAGERS:
        yield f"spec.managedBy: got {spec['managedBy']!r}; one of {', '.join(MANAGERS)}"
    if not selector and "rayClusterSpec" not in spec:
        yield "spec: give rayClusterSpec, or clusterSelector for a cluster that is there"
    if selector:
        if not selector.get("ray.io/cluster"):
            yield "spec.clusterSelector: names no cluster; give ray.io/cluster: NAME"
        for field, is_set in (("suspend", spec.get("suspend")), ("backoffLimit", retries > 0)):
            if is_set:
                yield f"spec.{field}: does not go with clusterSelector, whose cluster is somebody else's"
        if mode == "SidecarMode":
            yield "spec.submissionMode: SidecarMode does not go with clusterSelector"
    if mode == "InteractiveMode" and retries > 0:
        yield "spec.backoffLimit: does not go with InteractiveMode"
    if mode == "SidecarMode":
        for field in ("submitterPodTemplate", "submitterConfig"):
            if field in spec:
                yield f"spec.{field}: SidecarMode has no submitter pod; leave it out"
        head = spec.get("rayClusterSpec", {}).get("headGroupSpec", {}).get("template", {}).get("spec", {})
        if head.get("restartPolicy", "Never") not in ("", "Never"):
            yield "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy: Never in SidecarMode, or leave it out"


def _runtime_env(manifest: Manifest, spec: Manifest) -> Iterator[str]:
    import yaml

    try:
        parsed = yaml.safe_load(spec.get("runtimeEnvYAML", ""))
    except yaml.YAMLError as error:
        yield f"spec.runtimeEnvYAML: not valid YAML: {getattr(error, 'problem', None) or 'unreadable'}"
        return
    if parsed is not None and not isinstance(parsed, dict):
        yield f"spec.runtimeEnvYAML: expected a mapping; got {type(parsed).__name__}"


def _cluster(manifest: Manifest, spec: Manifest) -> Iterator[str]:
    cluster = spec.get("rayClusterSpec")
    if cluster is None:
        return
    at = "spec.rayClusterSpec"
    head, workers = cluster["headGroupSpec"], cluster.get("workerGroupSpecs", [])
    groups = [(f"{at}.headGroupSpec", head)] + [(f"{at}.workerGroupSpecs.{i}", g) for i, g in enumerate(workers)]
    for where, group in groups:
        if not group["template"].get("spec", {}).get("containers"):
            yield f"{where}.template.spec.containers: at least one container is needed"
            return
        started = group.get("rayStartParams", {})
        if group.get("resources") and any(
            started.get(name) for name in ("num-cpus", "num-gpus", "memory", "resources")
        ):
            yield f"{where}: resources are given in rayStartParams too; keep one of them"
        if "labels" in started:
            yield f"{where}.rayStartParams.labels: not supported; use {where}.labels"
        values = r"(([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9])?"
        yield from _labels(f"{where}.labels", group.get("labels", {}), values)
    version = _version(cluster.get("rayVersion", ""))
    autoscales = cluster.get("enableInTreeAutoscaling", False)
    options = cluster.get("autoscalerOptions", {})
    head_env = _env(head)
    is_v2 = autoscales and options.get("version") == "v2"
    may_be_v2 = is_v2 or head_env.get(AUTOSCALER_V2) in ("1", "true")
    for i, group in enumerate(workers):
        yield from _worker_group(f"{at}.workerGroupSpecs.{i}", group, autoscales, may_be_v2, version)
    if not autoscales and head_env.get(AUTOSCALER_V2) in ("1", "true"):
        yield f"{at}.headGroupSpec: env {AUTOSCALER_V2} needs enableInTreeAutoscaling: true"
    if autoscales and "version" in options and AUTOSCALER_V2 in head_env:
        yield f"{at}.autoscalerOptions.version: env {AUTOSCALER_V2} of the head says it too; leave that out"
    if is_v2:
        for where, group in groups:
            if group["template"]["spec"].get("restartPolicy", "Never") not in ("", "Never"):
                yield f"{where}.template.spec.restartPolicy: Never with autoscaler v2, or leave it out"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield f"{at}.autoscalerOptions.idleTimeoutSeconds: got {options['idleTimeoutSeconds']}; 0 or more"
    if any(one.get("name") == "KUBERAY_GEN_AUTOSCALER_START_CMD" for one in options.get("env", ())):
        yield f"{at}.autoscalerOptions.env: KUBERAY_GEN_AUTOSCALER_START_CMD is KubeRay's own; leave it out"
    yield from _auth(f"{at}.authOptions", cluster, version)
    yield from _fault_tolerance(at, cluster, manifest["metadata"].get("annotations", {}), head_env)
    if cluster.get("upgradeStrategy", {}).get("type"):
        yield f"{at}.upgradeStrategy.type: not of a cluster that a RayJob makes; leave it out"
    yield from _history(f"{at}.historyServerOptions", cluster, [group for _, group in groups])
    yield from _network(f"{at}.networkPolicy", cluster)
    if cluster.get("tlsOptions", {}).get("enabled"):
        mounts = [(where, group["template"]["spec"]["containers"][0]) for where, group in groups]
        for where, container in [*mounts, (f"{at}.autoscalerOptions", options)]:
            if any(one["name"] == TLS_VOLUME for one in container.get("volumeMounts", ())):
                yield f"{where}: the volume mount {TLS_VOLUME} is KubeRay's own with tlsOptions; leave it out"
        places = [(where, _env(group)) for where, group in groups]
        places += [(f"{at}.autoscalerOptions", {one["name"]: "" for one in options.get("env", ())})]
        for where, env in places:
            for name in TLS:
                if name in env:
                    yield f"{where}: env {name} is KubeRay's own with tlsOptions; leave it out"


def _worker_group(
    at: str, group: Manifest, autoscales: bool, may_be_v2: bool, version: tuple[int, ...] | None
) -> Iterator[str]:
    least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
    for field in ("minReplicas", "maxReplicas"):
        if group.get(field, 0) < 0:
            yield f"{at}.{field}: got {group[field]}; 0 or more"
    if least > most:
        yield f"{at}.minReplicas: {least} is more than maxReplicas, {most}"
    if group.get("suspend") and autoscales:
        yield f"{at}.suspend: does not go with enableInTreeAutoscaling"
    if "idleTimeoutSeconds" in group:
        if group["idleTimeoutSeconds"] < 0:
            yield f"{at}.idleTimeoutSeconds: got {group['idleTimeoutSeconds']}; 0 or more"
        elif not may_be_v2:
            yield f"{at}.idleTimeoutSeconds: needs autoscalerOptions.version: v2"
    if group.get("priority"):
        if version is None or version < PRIORITY_SINCE:
            yield f"{at}.priority: needs rayVersion 2.56 or newer"
        if not may_be_v2:
            yield f"{at}.priority: needs autoscalerOptions.version: v2"


def _auth(at: str, cluster: Manifest, version: tuple[int, ...] | None) -> Iterator[str]:
    options = cluster.get("authOptions", {})
    if options.get("enableK8sTokenAuth"):
        yield f"{at}.enableK8sTokenAuth: not supported for a RayJob; leave it out"
    if options.get("mode") == "token" and (version is None or version < TOKEN_SINCE):
        yield f"{at}.mode: token needs rayVersion 2.52 or newer; got {cluster.get('rayVersion', 'none')!r}"


def _fault_tolerance(
    at: str, cluster: Manifest, annotations: dict[str, str], head_env: dict[str, str]
) -> Iterator[str]:
    options = cluster.get("gcsFaultToleranceOptions")
    started = cluster["headGroupSpec"].get("rayStartParams", {})
    said = annotations.get("ray.io/ft-enabled", "")
    if said and options is not None:
        yield f"{at}.gcsFaultToleranceOptions: the annotation ray.io/ft-enabled says it too; leave that out"
    if options is None and said.lower() != "true" and "RAY_REDIS_ADDRESS" in head_env:
        yield f"{at}.headGroupSpec: env RAY_REDIS_ADDRESS needs gcsFaultToleranceOptions"
    if started.get("redis-username") or "REDIS_USERNAME" in head_env:
        yield f"{at}.headGroupSpec: the user of Redis goes into gcsFaultToleranceOptions.redisUsername"
    if options is None:
        return
    where = f"{at}.gcsFaultToleranceOptions"
    if started.get("redis-password") or "REDIS_PASSWORD" in head_env:
        yield f"{at}.headGroupSpec: the password of Redis goes into gcsFaultToleranceOptions.redisPassword"
    if "RAY_REDIS_ADDRESS" in head_env:
        yield f"{at}.headGroupSpec: the address of Redis goes into gcsFaultToleranceOptions.redisAddress"
    if annotations.get("ray.io/external-storage-namespace"):
        yield f"{where}.externalStorageNamespace: the annotation says it too; leave that out"
    if options.get("backend", "redis") == "rocksdb":
        for field in ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"):
            if options.get(field):
                yield f"{where}.{field}: of the backend redis; leave it out"
        for name in ("RAY_gcs_storage", "RAY_gcs_storage_path"):
            if name in head_env:
                yield f"{at}.headGroupSpec: env {name} is KubeRay's own with the backend rocksdb; leave it out"
        pod = cluster["headGroupSpec"]["template"]["spec"]
        used = {one["name"] for one in pod.get("volumes", ())}
        for one in pod["containers"][0].get("volumeMounts", ()):
            used |= {one["name"], one["mountPath"]}
        for name in sorted(used & {ROCKSDB_VOLUME, ROCKSDB_PATH}):
            yield f"{at}.headGroupSpec: the volume {name} is KubeRay's own with the backend rocksdb; leave it out"
        storage = options.get("storage", {})
        if storage.get("claimName") and any(storage.get(name) for name in ("size", "storageClassName", "accessModes")):
            yield f"{where}.storage: claimName does not go with size, storageClassName or accessModes"
    elif "storage" in options:
        yield f"{where}.storage: of the backend rocksdb; leave it out"


def _history(at: str, cluster: Manifest, groups: list[Manifest]) -> Iterator[str]:
    options = cluster.get("historyServerOptions")
    if options is None:
        return
    collector = options.get("collectorOptions")
    if collector is None:
        yield f"{at}.collectorOptions: missing; it is needed"
    elif not collector.get("image"):
        yield f"{at}.collectorOptions.image: missing; it is needed"
    elif not any(one.get("name") == "STORAGE_BACKEND" and one.get("value") for one in collector.get("env", ())):
        yield f"{at}.collectorOptions.env: STORAGE_BACKEND is missing; it is needed, as a plain value"
    for group in groups:
        if any(one["name"] == COLLECTOR for one in group["template"]["spec"]["containers"]):
            where = f"the group {group['groupName']}" if "groupName" in group else "the head group"
            yield f"{at}: {where} has a container named {COLLECTOR}, which KubeRay adds by itself; leave it out"


def _network(at: str, cluster: Manifest) -> Iterator[str]:
    policy = cluster.get("networkPolicy")
    if policy is None:
        return
    open_side = {"DenyAllEgress": "ingressRules", "DenyAllIngress": "egressRules"}.get(policy.get("mode", "DenyAll"))
    groups = policy.get("workerGroups", [])
    parts = [("head", policy.get("head", {})), ("worker", policy.get("worker", {}))]
    for where, part in parts + [(f"workerGroups.{i}", part) for i, part in enumerate(groups)]:
        if open_side and part.get(open_side):
            yield f"{at}.{where}.{open_side}: nothing is denied there under mode {policy['mode']}; leave it out"
    names = {group["groupName"] for group in cluster.get("workerGroupSpecs", [])}
    for name in names:
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name):
            yield f"{at}: needs group names of lower-case letters, digits and -; got {name[:60]!r}"
    for i, part in enumerate(groups):
        if part.get("groupName") not in names:
            yield f"{at}.workerGroups.{i}.groupName: no group is called {part.get('groupName')!r}"


def _queue(manifest: Manifest, spec: Manifest) -> Iterator[str]:
    """Kueue's webhook: `pkg/controller/jobs/rayjob/rayjob_webhook.go`."""
    meta = manifest["metadata"]
    if not meta.get("labels", {}).get(QUEUE_LABEL):
        return
    cluster = spec.get("rayClusterSpec", {})
    if spec.get("clusterSelector"):
        yield "spec.clusterSelector: Kueue cannot queue a job on a cluster that is there; leave out one of them"
    if not spec.get("shutdownAfterJobFinishes"):
        yield "spec.shutdownAfterJobFinishes: must be true under Kueue"
    if cluster.get("enableInTreeAutoscaling") and meta.get("annotations", {}).get(ELASTIC) != "true":
        yield f"spec.rayClusterSpec.enableInTreeAutoscaling: not under Kueue, unless the annotation {ELASTIC} is true"
    groups = cluster.get("workerGroupSpecs", [])
    if len(groups) > MAX_QUEUED_GROUPS:
        yield f"spec.rayClusterSpec.workerGroupSpecs: {len(groups)} groups; at most {MAX_QUEUED_GROUPS} under Kueue"
    for i, group in enumerate(groups):
        if group["groupName"] == "head":
            yield f"spec.rayClusterSpec.workerGroupSpecs.{i}.groupName: head is taken under Kueue; use another"


def _env(group: Manifest) -> dict[str, str]:
    """The environment of the Ray container, which is the first; "" for what comes from elsewhere."""
    container = group["template"]["spec"]["containers"][0]
    return {one["name"]: one.get("value", "") for one in container.get("env", ())}


def _version(text: str) -> tuple[int, ...] | None:
    found = re.match(r"v?(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


RULES: tuple[Rule, ...] = (_name, _ending, _deletion, _mode, _runtime_env, _cluster, _queue)
