"""Jobs on Kubernetes: each one a RayJob, whose cluster KubeRay makes, follows, and makes anew when it fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from pipelines.backend import ENDED, Parcel, Phase, Submission, Submissions, numbered
from pipelines.errors import JobError, LdmError
from pipelines.job import Job
from pipelines.kube_api import KubeApi, Refused, place, refuse_no_namespace
from pipelines.kube_checks import INSTALL, RAY, broken, findings, kueue
from pipelines.rayjob import DRIVER, ID_LABEL, MANAGED, MAX_LINES, job_of, manifests
from pipelines.rayjob_rules import QUEUE_LABEL

OURS = f"app.kubernetes.io/managed-by={MANAGED['app.kubernetes.io/managed-by']}"
SUSPENDED = "ldm-batch/suspended"
"""An annotation: the user suspended it, not the queue."""

POLL_S = 1.0

# Of what waits in KubeRay's own words.
WAITING = {"": "KubeRay has not seen it yet", "Initializing": "its cluster starts", "Retrying": "a new cluster starts"}

Manifest = dict[str, Any]
Manifests = list[Manifest]


class KubeJobs:
    """A `backend.Backend`: `namespace` and `context` as for kubectl."""

    def __init__(self, namespace: str | None = None, context: str | None = None) -> None:
        refuse_no_namespace(namespace)
        self.api = KubeApi(context)
        self.said = namespace
        self.namespace = namespace or self.api.namespace

    def submit(self, parcel: Parcel) -> tuple[Submission, bool]:
        """
        Raises:
            LdmError: the job or the cluster is not fit for it; nothing is left of it.
        """
        job = job_of(parcel)
        self.namespace = self.said or job.cluster.namespace or self.api.namespace
        # Before anybody is asked: what is wrong with the job itself.
        manifests(job, parcel)
        before = self._all(parcel.id)
        if before and (last := self._submission(before[-1])).phase not in ENDED:
            self._mend_files(job, parcel, before[-1])
            return last, False
        taken = {one["metadata"]["name"] for one in before}
        name = next(n for i in range(1, 100_000) if (n := numbered(parcel.id, i)) not in taken)
        files, manifest = manifests(job, parcel, name, self.namespace)
        if lacking := broken(findings(self.api, self.namespace, job)):
            raise JobError("\n".join(f"{self.api.said}: {one.name}: {one.text}" for one in lacking[:MAX_LINES]))
        try:
            # Quotas and other people's webhooks have a say, too.
            self._create(manifest, dryRun="All")
            made = self._create(manifest)
        except Refused as refused:
            there = self.api.find(self._place(name))
            if there is None:
                raise
            if refused.status == 409:
                return self._submission(there), False
            # The answer was lost, not the request; or another made it meanwhile, who gives it the same files.
            self._send_files(files, there)
            return self._submission(there), True
        try:
            self._send_files(files, made)
        except LdmError:
            with suppress(Refused):
                self.api.delete(self._place(name), preconditions={"uid": made["metadata"]["uid"]})
            raise
        return self._submission(made), True

    def get(self, id: str) -> Submission:
        found = self._find(id)
        one = self._submission(found)
        if one.phase == "queued":
            try:
                why = self._why(found) or one.message
            except Refused as refused:
                if refused.status != 403:
                    raise
                # Who may not look at pods or Workloads hears what the RayJob itself says.
                why = one.message
            return Submission(one.id, one.phase, why, one.attempt, one.created_at, one.dashboard)
        return one

    def list(self) -> Submissions:
        return sorted(map(self._submission, self._rayjobs(OURS)), key=lambda one: one.created_at)

    def logs(self, id: str, follow: bool) -> Iterator[str]:
        """What the driver says, one attempt after the other: the log of the pod that submits it."""
        name = self._find(id)["metadata"]["name"]
        shown: dict[str, int] = {}
        while True:
            # Asked first: a pod that is found afterwards has said all that it has to say.
            try:
                over = self._submission(self.api.get(self._place(name))).phase in (*ENDED, "suspended")
            except Refused as refused:
                if refused.status != 404 or not shown:
                    raise
                return
            was_quiet = True
            for pod in self._submitters(name):
                uid, phase = pod["metadata"]["uid"], pod.get("status", {}).get("phase")
                if phase == "Pending" or shown.get(uid, 0) < 0:
                    continue
                shown.setdefault(uid, 0)
                for i, line in enumerate(self._log(pod, follow)):
                    # What broke off is read again from its beginning.
                    if i >= shown[uid]:
                        shown[uid], was_quiet = i + 1, False
                        yield line
                if phase in ("Succeeded", "Failed"):
                    shown[uid] = -1
            if over or not follow:
                break
            if was_quiet:
                time.sleep(POLL_S)
        if not shown and over:
            raise JobError(
                f"{id}: its pods are gone, and their logs with them; collect them in the cluster, or see the output"
            )
        if not shown:
            raise JobError(f"{id}: nothing has been said yet; `ldm-batch status {id} --kube` tells why it waits")

    def cancel(self, id: str) -> None:
        """Delete the RayJob; it stays to be seen until its pods have gone. What is committed stays."""
        found = self._alive(id)
        self.api.delete(self._place(found["metadata"]["name"]), propagationPolicy="Foreground")

    def suspend(self, id: str) -> None:
        """Give the cluster back and keep the RayJob; under Kueue the queue is told not to admit it."""
        found = self._alive(id)
        if self._submission(found).phase == "suspended":
            raise JobError(f"{id} is suspended already; nothing is to be stopped")
        self._set(found, suspended=True)

    def resume(self, id: str) -> None:
        found = self._alive(id)
        if self._submission(found).phase != "suspended":
            raise JobError(f"{id} is not suspended; there is nothing to resume")
        self._set(found, suspended=False)

    def _set(self, found: Manifest, suspended: bool) -> None:
        name = found["metadata"]["name"]
        note = {"metadata": {"annotations": {SUSPENDED: "true" if suspended else None}}}
        if not _queue(found):
            self.api.patch(self._place(name), {**note, "spec": {"suspend": suspended}})
            return
        workload = self._workload(found)
        if workload is None:
            raise LdmError(f"{name}: Kueue has no Workload of it yet; try again in a moment")
        self.api.patch(self._place(name), note)
        group, one = workload
        self.api.patch(
            place(self.namespace, "workloads", one["metadata"]["name"], group), {"spec": {"active": not suspended}}
        )

    def _create(self, manifest: Manifest, **query: str) -> Manifest:
        # Strict: a server whose KubeRay is older would drop what it does not know.
        return self.api.create(place(self.namespace, "rayjobs", group=RAY), manifest, fieldValidation="Strict", **query)

    def _send_files(self, files: Manifest, made: Manifest) -> None:
        """Give a RayJob its files, which go with it; its pods wait for them.

        After it, as of several who submit the API server lets one make it: only that one's files are ever touched.
        """
        uid = made["metadata"]["uid"]
        owner = {"apiVersion": RAY, "kind": "RayJob", "name": made["metadata"]["name"], "uid": uid}
        owner |= {"controller": False, "blockOwnerDeletion": False}
        owned = {**files, "metadata": files["metadata"] | {"ownerReferences": [owner]}}
        at = place(self.namespace, "configmaps")
        name = files["metadata"]["name"]
        for _ in range(3):
            try:
                self.api.create(at, owned)
                return
            except Refused as refused:
                there = self.api.find(place(self.namespace, "configmaps", name))
                meta = there["metadata"] if there else {}
                if any(one["uid"] == uid for one in meta.get("ownerReferences", ())):
                    return
                if refused.status != 409:
                    raise
            if there is not None:
                # Of a RayJob that was deleted, and goes a moment after it.
                with suppress(Refused):
                    self.api.delete(place(self.namespace, "configmaps", name), preconditions={"uid": meta["uid"]})
        raise LdmError(f"{self.api.said}: ConfigMap {name} is somebody else's; delete it, then submit again")

    def _mend_files(self, job: Job, parcel: Parcel, found: Manifest) -> None:
        """Of a submission that died after it had made the RayJob."""
        name = found["metadata"]["name"]
        if self.api.find(place(self.namespace, "configmaps", name)) is None:
            self._send_files(manifests(job, parcel, name, self.namespace)[0], found)

    def _place(self, name: str) -> str:
        return place(self.namespace, "rayjobs", name, RAY)

    def _rayjobs(self, selector: str) -> Manifests:
        try:
            return self.api.items(place(self.namespace, "rayjobs", group=RAY), selector)
        except Refused as refused:
            if refused.status != 404:
                raise
            raise LdmError(f"{self.api.said}: there is no {RAY} here; {INSTALL}") from None

    def _all(self, id: str) -> Manifests:
        """All that was ever submitted under this id and is still there, the last one last."""
        found = self._rayjobs(f"{OURS},{ID_LABEL}={id}")
        return sorted(found, key=lambda one: (len(one["metadata"]["name"]), one["metadata"]["name"]))

    def _find(self, id: str) -> Manifest:
        found = None
        if id and id.replace("-", "").isalnum() and len(id) <= 63:
            known = self._all(id)
            found = known[-1] if known else self.api.find(self._place(id))
            # A RayJob of somebody else's is not ours to end; one of a RayCronJob has none of our labels.
            if found is not None and not found["spec"].get("entrypoint", "").startswith(DRIVER):
                found = None
        if found is None:
            raise JobError(
                f"{id[:80]}: no such submission in namespace {self.namespace}; `ldm-batch list --kube` shows those "
                "that are there"
            )
        return found

    def _alive(self, id: str) -> Manifest:
        found = self._find(id)
        if (phase := self._submission(found).phase) in ENDED:
            raise JobError(f"{id} is {phase} already; `ldm-batch submit` with its job file does what is left")
        return found

    def _submission(self, found: Manifest) -> Submission:
        meta, status = found["metadata"], found.get("status", {})
        phase, message = phase_of(found)
        failed = int(status.get("failed", 0))
        url = status.get("dashboardURL", "")
        return Submission(
            id=meta.get("labels", {}).get(ID_LABEL, meta["name"]),
            phase=phase,
            message=message,
            attempt=max(1, failed if phase == "failed" else failed + 1),
            created_at=_utc(meta.get("creationTimestamp")),
            dashboard=f"http://{url}" if url and "://" not in url else url or None,
        )

    def _submitters(self, name: str) -> Manifests:
        pods = self.api.items(place(self.namespace, "pods"), f"job-name={name}")
        return sorted(pods, key=lambda pod: (pod["metadata"].get("creationTimestamp", ""), pod["metadata"]["name"]))

    def _log(self, pod: Manifest, follow: bool) -> Iterator[str]:
        path = f"{place(self.namespace, 'pods', pod['metadata']['name'])}/log"
        try:
            yield from self.api.lines(path, follow="true" if follow else "false")
        except Refused as refused:
            # 400: its container has not started; 404: it went in the meantime.
            if refused.status not in (400, 404):
                raise

    def _why(self, found: Manifest) -> str:
        """Why it waits, in the words of who lets it wait."""
        if found["spec"].get("suspend") and _queue(found):
            queue = found["metadata"]["labels"][QUEUE_LABEL]
            workload = self._workload(found)
            conditions = workload[1].get("status", {}).get("conditions", []) if workload else []
            said = [c.get("message", "") for c in conditions if c.get("type") == "QuotaReserved"]
            return f"waits in queue {queue}" + (f": {_one_line(said[0])}" if said and said[0] else "")
        cluster = found.get("status", {}).get("rayClusterName")
        pods = self.api.items(place(self.namespace, "pods"), f"ray.io/cluster={cluster}") if cluster else []
        for pod in pods:
            if reason := why_pending(pod):
                return f"pod {pod['metadata']['name']}: {reason}"
        return ""

    def _workload(self, found: Manifest) -> tuple[str, Manifest] | None:
        group = kueue(self.api)
        if group is None:
            return None
        at = place(self.namespace, "workloads", group=group)
        found_by = self.api.items(at, f"kueue.x-k8s.io/job-uid={found['metadata']['uid']}")
        return (group, found_by[0]) if found_by else None


def phase_of(found: Manifest) -> tuple[Phase, str]:
    """What a RayJob is to us, and why."""
    spec, status, meta = found["spec"], found.get("status", {}), found["metadata"]
    deployment, job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    said = _one_line(status.get("message", ""))
    reason = ": ".join(part for part in (status.get("reason", ""), said) if part)
    if deployment == "Complete":
        return ("cancelled", "stopped on its cluster") if job == "STOPPED" else ("succeeded", "")
    if deployment in ("Failed", "ValidationFailed"):
        return "failed", reason or "no reason given"
    if meta.get("deletionTimestamp"):
        return "cancelled", "its pods are going"
    if spec.get("suspend") or deployment in ("Suspending", "Suspended"):
        if _queue(found) and meta.get("annotations", {}).get(SUSPENDED) != "true":
            return "queued", f"waits in queue {meta['labels'][QUEUE_LABEL]}"
        return "suspended", "its cluster is given back; what is committed stays"
    if deployment == "Running":
        return "running", ""
    return "queued", WAITING.get(deployment, deployment) + (f" ({reason})" if reason else "")


def why_pending(pod: Manifest) -> str:
    """Why a pod does not run: no node takes it, or its image or a Secret is not to be had."""
    status = pod.get("status", {})
    for one in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        waiting = one.get("state", {}).get("waiting") or {}
        if waiting.get("reason", "PodInitializing") not in ("PodInitializing", "ContainerCreating"):
            return _one_line(f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": "))
    for condition in status.get("conditions", ()):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return _one_line(condition.get("message", "no node takes it"))
    return ""


def _queue(found: Manifest) -> bool:
    return bool(found["metadata"].get("labels", {}).get(QUEUE_LABEL))


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]


def _utc(text: str | None) -> str:
    if text is None:
        return ""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(UTC).isoformat(timespec="seconds")
