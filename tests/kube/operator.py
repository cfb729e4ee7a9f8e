"""KubeRay's operator, as far as a RayJob's own states go; each attempt really runs the entrypoint, in a new Ray.

New → Initializing → Running → Complete | Failed | Retrying → Initializing …, Suspending → Suspended, ValidationFailed;
after `ray-operator/controllers/ray/rayjob_controller.go`. A cluster is a Ray that the driver starts on this machine, a
pod an object with a log; ConfigMaps and Secrets reach it as files and environment, as a kubelet would see to.
"""

from __future__ import annotations

import base64
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.rayjob import FOLDER
from pipelines.rayjob_rules import violations
from tests.kube.api_server import FakeKube, Object

RAY = "ray.io/v1"


@dataclass
class Attempt:
    """A cluster with a driver on it."""

    process: subprocess.Popen[bytes]
    submitter: str


@dataclass
class Operator:
    """Walks every RayJob of a fake server on through its states."""

    kube: FakeKube
    folder: Path
    environ: dict[str, str] = field(default_factory=dict)
    no_room: bool = False
    """No node takes the pods."""
    walked: list[tuple[str, str]] = field(default_factory=list)
    """(name, state) in the order in which they were entered."""

    def __post_init__(self) -> None:
        self.attempts: dict[str, Attempt] = {}

    @contextmanager
    def running(self) -> Iterator[Operator]:
        over = threading.Event()

        def work() -> None:
            while not over.wait(0.03):
                for job in self.kube.all(RAY, "rayjobs"):
                    self.walk(job)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join(timeout=30)
            for attempt in self.attempts.values():
                end(attempt.process)

    def walk(self, job: Object) -> None:
        uid, spec, status = job["metadata"]["uid"], job["spec"], job.get("status", {})
        state, attempt = status.get("jobDeploymentStatus", ""), self.attempts.get(uid)
        if job["metadata"].get("deletionTimestamp"):
            self.tear_down(job)
            self.kube.remove(job)
        # Once it has begun to suspend it goes on with that, whoever resumes the job meanwhile.
        elif state == "Suspending" or (spec.get("suspend") and state not in ("Suspended", "Complete", "Failed")):
            if state != "Suspending" and state:
                self.enter(job, "Suspending")
                return
            self.tear_down(job)
            self.enter(job, "Suspended")
        elif state in ("", "Retrying") or (state == "Suspended" and not spec.get("suspend")):
            wrong = violations({key: value for key, value in job.items() if key != "status"})
            if wrong:
                self.enter(job, "ValidationFailed", reason="ValidationFailed", message=wrong[0])
                return
            if state:
                self.tear_down(job)
            number = len([1 for name, entered in self.walked if entered == "Initializing"])
            cluster = f"{job['metadata']['name']}-{number:05d}"
            self.make_cluster(job, cluster)
            self.enter(job, "Initializing", rayClusterName=cluster, jobStatus="")
        elif state == "Initializing":
            self.start(job)
        elif state == "Running" and attempt is not None and (code := attempt.process.poll()) is not None:
            self.finish(job, attempt, code)

    def enter(self, job: Object, state: str, **status: Any) -> None:
        name = job["metadata"]["name"]
        self.walked.append((name, state))
        with self.kube.lock:
            key = (RAY, "rayjobs", job["metadata"]["namespace"], name)
            now = self.kube.objects.get(key)
            if now is None:
                return
            now = dict(now)
            now["status"] = {
                "reason": "",
                "message": "",
                **now.get("status", {}),
                **status,
                "jobDeploymentStatus": state,
            }
            self.kube.put(RAY, "rayjobs", now, job["metadata"]["namespace"])

    def make_cluster(self, job: Object, cluster: str) -> None:
        namespace, spec = job["metadata"]["namespace"], job["spec"]["rayClusterSpec"]
        owner = self.own(job)
        made = self.kube.put(
            RAY, "rayclusters", {"metadata": {"name": cluster, "ownerReferences": [owner]}, "spec": spec}, namespace
        )
        groups = [("head", 1, spec["headGroupSpec"])]
        groups += [(group["groupName"], group["replicas"], group) for group in spec["workerGroupSpecs"]]
        for group, count, of in groups:
            for i in range(count):
                labels = {"ray.io/cluster": cluster, "ray.io/group": group}
                meta = {"name": f"{cluster}-{group}-{i}", "labels": labels, "ownerReferences": [self.own(made)]}
                pod = {"metadata": meta, "spec": of["template"]["spec"], "status": {"phase": "Pending"}}
                self.kube.put("v1", "pods", pod, namespace)

    def start(self, job: Object) -> None:
        """The cluster's pods run as soon as there is room, and all that they name."""
        meta, spec = job["metadata"], job["spec"]
        namespace, cluster = meta["namespace"], job["status"]["rayClusterName"]
        pods = [
            p for p in self.kube.all("v1", "pods") if p["metadata"].get("labels", {}).get("ray.io/cluster") == cluster
        ]
        folder = self.folder / cluster
        for pod in pods:
            if self.no_room:
                message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
                condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
                status = {"phase": "Pending", "conditions": [condition]}
            elif missing := self.mount(pod, namespace, folder):
                waiting = {"reason": "CreateContainerConfigError", "message": missing}
                state = {"name": "ray", "state": {"waiting": waiting}}
                status = {"phase": "Pending", "containerStatuses": [state]}
            else:
                status = {"phase": "Running"}
            if pod["status"] != status:
                self.kube.put("v1", "pods", {**pod, "status": status}, namespace)
            if status["phase"] != "Running":
                return
        head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        number = sum(1 for name, state in self.walked if (name, state) == (meta["name"], "Initializing"))
        submitter = f"{meta['name']}-{number}"
        log = self.folder / f"{submitter}.log"
        line = in_shells(spec["entrypoint"]).replace(FOLDER, str(folder))
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["/bin/bash", "-ce", line],
                env={**os.environ, **self.environ, **self.environment(head, namespace), "RAY_JOB": submitter},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        template = spec.get("submitterPodTemplate", {"spec": {"containers": []}})
        labels = {"job-name": meta["name"], "batch.kubernetes.io/job-name": meta["name"]}
        pod_meta = {"name": submitter, "labels": labels, "ownerReferences": [self.own(job)]}
        self.kube.logs[namespace, submitter] = log
        self.kube.put(
            "v1", "pods", {"metadata": pod_meta, "spec": template["spec"], "status": {"phase": "Running"}}, namespace
        )
        self.attempts[meta["uid"]] = Attempt(process, submitter)
        url = f"{cluster}-head-svc.{namespace}.svc.cluster.local:8265"
        self.enter(job, "Running", jobStatus="RUNNING", jobId=submitter, dashboardURL=url)

    def mount(self, pod: Object, namespace: str, folder: Path) -> str:
        """What a kubelet puts into a pod's file system; why it cannot."""
        for volume in pod["spec"].get("volumes", ()):
            if "configMap" not in volume:
                continue
            name = volume["configMap"]["name"]
            found = self.kube.objects.get(("v1", "configmaps", namespace, name))
            if found is None:
                return f'configmap "{name}" not found'
            contents = {k: v.encode() for k, v in found.get("data", {}).items()}
            contents |= {k: base64.b64decode(v) for k, v in found.get("binaryData", {}).items()}
            for item in volume["configMap"]["items"]:
                target = folder / item["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(contents[item["key"]])
        for source in pod["spec"]["containers"][0].get("envFrom", ()):
            name = source["secretRef"]["name"]
            if ("v1", "secrets", namespace, name) not in self.kube.objects:
                return f'secret "{name}" not found'
        return ""

    def environment(self, container: Object, namespace: str) -> dict[str, str]:
        out: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            secret = self.kube.objects["v1", "secrets", namespace, source["secretRef"]["name"]]
            out |= {key: base64.b64decode(value).decode() for key, value in secret.get("data", {}).items()}
        for one in container.get("env", ()):
            if (value := self.value(one, namespace)) is not None:
                # A variable that was not set before stands for itself.
                out[one["name"]] = re.sub(r"\$\((\w+)\)", lambda found: out.get(found[1], found[0]), value)
        return out

    def value(self, variable: Object, namespace: str) -> str | None:
        source = variable.get("valueFrom", {})
        if source.get("fieldRef", {}).get("fieldPath") == "metadata.namespace":
            return namespace
        if asked := source.get("configMapKeyRef"):
            found = self.kube.objects.get(("v1", "configmaps", namespace, asked["name"]), {})
            said: str | None = found.get("data", {}).get(asked["key"])
            assert said is not None or asked.get("optional")
            return said
        return str(variable["value"])

    def finish(self, job: Object, attempt: Attempt, code: int) -> None:
        uid, spec, status = job["metadata"]["uid"], job["spec"], job.get("status", {})
        namespace = job["metadata"]["namespace"]
        self.attempts.pop(uid)
        pod = self.kube.objects.get(("v1", "pods", namespace, attempt.submitter))
        if pod is not None:
            phase = "Failed" if code else "Succeeded"
            self.kube.put("v1", "pods", {**pod, "status": {"phase": phase}}, namespace)
        if code == 0:
            self.enter(job, "Complete", jobStatus="SUCCEEDED", succeeded=1)
            self.tear_down(job, keep_submitter=True)
            return
        failed = status.get("failed", 0) + 1
        told = {"jobStatus": "FAILED", "failed": failed, "reason": "AppFailed"}
        told["message"] = f"Job entrypoint command failed with exit code {code}, last available logs follow"
        if failed <= spec.get("backoffLimit", 0):
            self.enter(job, "Retrying", **told)
        else:
            self.enter(job, "Failed", **told)
            self.tear_down(job, keep_submitter=True)

    def tear_down(self, job: Object, keep_submitter: bool = False) -> None:
        attempt = self.attempts.pop(job["metadata"]["uid"], None)
        if attempt is not None:
            end(attempt.process)
        for one in self.kube.owned(job["metadata"]["uid"]):
            # The files have another owner reference: they go with the RayJob alone.
            if one["kind"] == "RayCluster" or (one["kind"] == "Pod" and not keep_submitter):
                self.kube.remove(one)

    @staticmethod
    def own(one: Object) -> Object:
        meta = one["metadata"]
        return {"apiVersion": one["apiVersion"], "kind": one["kind"], "name": meta["name"], "uid": meta["uid"]}


def in_shells(entrypoint: str) -> str:
    """A line for bash that treats the entrypoint as KubeRay and Ray do together.

    KubeRay pastes it as it is into a line for bash; `ray job submit` joins the words that arrive, quoted, to a line for
    the shell that starts the driver.
    """
    join = "import os, shlex, sys; os.execv('/bin/bash', ['bash', '-c', 'exec ' + shlex.join(sys.argv[1:])])"
    return f"if ! false >/dev/null 2>&1 ; then exec python3 -c {shlex.quote(join)} {entrypoint} ; fi"


def end(process: subprocess.Popen[bytes], seconds: float = 15.0) -> None:
    """As a pod ends: SIGTERM, and SIGKILL for what is left of it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until(what: Any, seconds: float = 60.0) -> Any:
    """The first answer that is not empty."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)
    return found
