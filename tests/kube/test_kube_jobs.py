"""Submitting to Kubernetes, over HTTP to a fake API server whose operator runs what it is given."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pipelines.backend import Parcel
from pipelines.errors import JobError, LdmError
from pipelines.kube_jobs import KubeJobs, phase_of, why_pending
from pipelines.rayjob import job_of, rayjob
from tests.kube.api_server import FakeKube, Fault
from tests.kube.certificate import write_certificate
from tests.kube.operator import Operator, wait_until

Make = Callable[..., Parcel]
End = Callable[..., None]
RAY, KUEUE = "ray.io/v1", "kueue.x-k8s.io/v1beta1"


def made(kube: FakeKube) -> tuple[int, int]:
    """How many RayJobs and ConfigMaps there are."""
    return len(kube.all(RAY, "rayjobs")), len(kube.all("v1", "configmaps"))


def reach(jobs: KubeJobs, id: str, phase: str) -> None:
    wait_until(lambda: jobs.get(id).phase == phase, 20)


def test_a_job_is_submitted_followed_retried_and_done(
    kube: FakeKube, jobs: KubeJobs, operator: Operator, make_parcel: Make, endings: End
) -> None:
    kube.put(
        "v1",
        "secrets",
        {"metadata": {"name": "s3"}, "data": {"AWS_SECRET_ACCESS_KEY": base64.b64encode(b"hush").decode()}},
    )
    parcel = make_parcel(secrets=["s3"], env={"REGION": "north"})
    first, is_new = jobs.submit(parcel)
    assert (first.id, first.phase, first.attempt, is_new) == (parcel.id, "queued", 1, True)
    reach(jobs, parcel.id, "running")
    lines: list[str] = []
    kube.cut_log_after = 2
    follower = threading.Thread(target=lambda: lines.extend(jobs.logs(parcel.id, follow=True)))
    follower.start()
    assert (again := jobs.submit(parcel))[1] is False
    assert again[0].id == parcel.id
    # The connection broke after two lines, and no line is lost or told twice.
    wait_until(lambda: "region north key hush" in lines)
    # Two attempts are killed; each one after is a new cluster.
    for i, code in enumerate((137, 1, 0)):
        wait_until(lambda i=i: sum(line.startswith("called with") for line in lines) == i + 1, 20)
        endings(code)
        wait_until(lambda code=code: f"ends with {code}" in lines, 20)
    reach(jobs, parcel.id, "succeeded")
    follower.join(20)
    assert not follower.is_alive()
    assert [line for line in lines if line.startswith("ends")] == ["ends with 137", "ends with 1", "ends with 0"]
    assert sum(line.startswith("called with") for line in lines) == 3
    assert "called with [run] [job.yaml] [--dead-letters-ok]" in lines
    assert "region north key hush" in lines
    assert jobs.get(parcel.id).attempt == 3
    assert [state for _, state in operator.walked] == [
        "Initializing", "Running", "Retrying", "Initializing", "Running", "Retrying", "Initializing", "Running",
        "Complete",
    ]  # fmt: skip
    # No secret has travelled, and what travelled goes with the RayJob.
    (rayjob,), (files,) = kube.all(RAY, "rayjobs"), kube.all("v1", "configmaps")
    assert "hush" not in str(rayjob) + str(files)
    assert files["metadata"]["ownerReferences"][0]["uid"] == rayjob["metadata"]["uid"]
    assert kube.all(RAY, "rayclusters") == []
    kube.remove(rayjob)
    assert made(kube) == (0, 0)


def test_retries_end_and_what_has_ended_is_submitted_anew(
    kube: FakeKube, jobs: KubeJobs, operator: Operator, make_parcel: Make, endings: End
) -> None:
    parcel = make_parcel(retries=1)
    endings(2, 2)
    jobs.submit(parcel)
    reach(jobs, parcel.id, "failed")
    failed = jobs.get(parcel.id)
    assert (failed.attempt, "exit code 2" in failed.message) == (2, True)
    second, is_new = jobs.submit(parcel)
    assert (second.id, is_new) == (parcel.id, True)
    assert {one["metadata"]["name"] for one in kube.all(RAY, "rayjobs")} == {parcel.id, f"{parcel.id}-2"}
    endings(0)
    reach(jobs, parcel.id, "succeeded")
    assert [one.phase for one in jobs.list()] == ["failed", "succeeded"]
    assert jobs.get(f"{parcel.id}-2").phase == "succeeded"
    for act in (jobs.cancel, jobs.suspend, jobs.resume):
        with pytest.raises(JobError, match="is succeeded already"):
            act(parcel.id)


def test_suspended_gives_the_cluster_back_and_resumed_starts_another(
    kube: FakeKube, jobs: KubeJobs, operator: Operator, make_parcel: Make, endings: End
) -> None:
    parcel = make_parcel()
    jobs.submit(parcel)
    reach(jobs, parcel.id, "running")
    with pytest.raises(JobError, match="not suspended"):
        jobs.resume(parcel.id)
    jobs.suspend(parcel.id)
    assert jobs.get(parcel.id).phase == "suspended"
    with pytest.raises(JobError, match="is suspended already; nothing is to be stopped"):
        jobs.suspend(parcel.id)
    wait_until(lambda: operator.walked[-1][1] == "Suspended")
    assert kube.all(RAY, "rayclusters") == []
    # Followed while nothing goes on, it ends; the same submission is found again.
    assert jobs.submit(parcel)[1] is False
    jobs.resume(parcel.id)
    reach(jobs, parcel.id, "running")
    # Resumed before its cluster has gone.
    jobs.suspend(parcel.id)
    wait_until(lambda: operator.walked[-1][1] in ("Suspending", "Suspended"))
    jobs.resume(parcel.id)
    reach(jobs, parcel.id, "running")
    endings(0)
    reach(jobs, parcel.id, "succeeded")


def test_one_job_in_two_namespaces_or_clusters_is_two_submissions(
    kube: FakeKube, tmp_path: Path, make_parcel: Make
) -> None:
    head = rayjob(job_of(make_parcel()), make_parcel())["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    operator = Operator(kube, tmp_path)

    def identity(namespace: str) -> str:
        return operator.environment(head["containers"][0], namespace)["LDM_BATCH_SUBMISSION"]

    # A cluster that lets nobody have its certificate tells namespaces apart all the same.
    found = [identity("here"), identity("there")]
    for certificate in ("one", "another"):
        root = {"metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": certificate}}
        kube.put("v1", "configmaps", root, "here")
        assert identity("here") == identity("here")
        found.append(identity("here"))
    assert len(set(found)) == 4


def test_cancelled_is_deleted_with_all_that_belongs_to_it(
    kube: FakeKube, jobs: KubeJobs, operator: Operator, make_parcel: Make
) -> None:
    parcel = make_parcel()
    jobs.submit(parcel)
    reach(jobs, parcel.id, "running")
    jobs.cancel(parcel.id)
    wait_until(lambda: made(kube) == (0, 0))
    assert kube.all("v1", "pods") == []
    with pytest.raises(JobError, match=f"{parcel.id}: no such submission in namespace default"):
        jobs.get(parcel.id)
    assert jobs.list() == []


def test_while_it_waits_it_says_for_what(kube: FakeKube, jobs: KubeJobs, operator: Operator, make_parcel: Make) -> None:
    operator.no_room = True
    parcel = make_parcel()
    jobs.submit(parcel)
    wait_until(lambda: "Insufficient nvidia.com/gpu" in jobs.get(parcel.id).message, 20)
    with pytest.raises(JobError, match="nothing has been said yet"):
        list(jobs.logs(parcel.id, follow=False))


def queue(kube: FakeKube, name: str = "gpus", **spec: Any) -> None:
    kube.put(KUEUE, "localqueues", {"metadata": {"name": name}, "spec": spec})


def test_under_kueue_it_waits_in_its_queue_and_is_suspended_there(
    kube: FakeKube, jobs: KubeJobs, make_parcel: Make
) -> None:
    queue(kube)
    parcel = make_parcel(queue="gpus")
    submitted, _ = jobs.submit(parcel)
    assert (submitted.phase, submitted.message) == ("queued", "waits in queue gpus")
    with pytest.raises(LdmError, match="no Workload of it yet"):
        jobs.suspend(parcel.id)
    (job,) = kube.all(RAY, "rayjobs")
    condition = {"type": "QuotaReserved", "status": "False", "message": "insufficient quota for\n nvidia.com/gpu"}
    labels = {"kueue.x-k8s.io/job-uid": job["metadata"]["uid"]}
    workload = {
        "metadata": {"name": "w", "labels": labels},
        "spec": {"active": True},
        "status": {"conditions": [condition]},
    }
    kube.put(KUEUE, "workloads", workload)
    assert jobs.get(parcel.id).message == "waits in queue gpus: insufficient quota for nvidia.com/gpu"
    kube.denied.add(("list", "workloads"))
    assert jobs.get(parcel.id).message == "waits in queue gpus"
    with pytest.raises(LdmError, match="cannot list .*workloads.*; ask whoever runs the cluster for that right"):
        jobs.suspend(parcel.id)
    kube.denied.clear()
    jobs.suspend(parcel.id)
    assert jobs.get(parcel.id).phase == "suspended"
    assert kube.all(KUEUE, "workloads")[0]["spec"]["active"] is False
    jobs.resume(parcel.id)
    assert jobs.get(parcel.id).phase == "queued"
    assert kube.all(KUEUE, "workloads")[0]["spec"]["active"] is True


def denied(kube: FakeKube) -> None:
    kube.denied |= {("create", "rayjobs"), ("get", "pods/log")}


@pytest.mark.parametrize(
    ("spoil", "cluster", "said"),
    [
        (lambda kube: kube.groups.discard("ray.io"), {}, "there is no ray.io/v1 here; KubeRay is not installed"),
        (lambda kube: kube.old_kuberay("preRunningDeadlineSeconds"), {}, "older than 1.7; update KubeRay"),
        (denied, {}, "rights: not in namespace default: create rayjobs.ray.io, get pods/log; ask for a role"),
        (lambda kube: None, {"queue": "gpus"}, "queue: cluster.queue gpus: no such LocalQueue .*; there is none"),
        (lambda kube: queue(kube, "other"), {"queue": "gpus"}, "no such LocalQueue in .*; there is other"),
        (lambda kube: kube.groups.discard("kueue.x-k8s.io"), {"queue": "gpus"}, "Kueue is not installed"),
        (lambda kube: None, {"secrets": ["s3"]}, "secret: s3: there is none of that name"),
        (lambda kube: None, {"model_cache": {"claim": "models"}}, "claim: models: there is none"),
        (lambda kube: None, {"service_account": "reader"}, "service account: reader: there is none"),
        (lambda kube: kube.faults.append(Fault("GET", "^/version", 401)), {}, "does not take these credentials"),
        (lambda kube: kube.faults.append(Fault("POST", "rayjobs$", 403, "quota exceeded")), {}, "quota exceeded"),
        (lambda kube: kube.faults.append(Fault("POST", "rayjobs$", 422, "admission webhook said no")), {}, "said no"),
        (lambda kube: kube.faults.append(Fault("POST", "configmaps$", 403, "no configmaps")), {}, "no configmaps"),
        (lambda kube: kube.faults.append(Fault("POST", "rayjobs$", 500, "etcd is full")), {}, "etcd is full .HTTP 500"),
    ],
)
def test_what_the_cluster_lacks_is_one_line_and_nothing_is_made(
    kube: FakeKube, jobs: KubeJobs, make_parcel: Make, spoil: Callable[[FakeKube], None], cluster: Any, said: str
) -> None:
    parcel = make_parcel(**cluster)
    spoil(kube)
    with pytest.raises(LdmError, match=said) as caught:
        jobs.submit(parcel)
    assert len(str(caught.value).splitlines()) == 1
    assert made(kube) == (0, 0)


def test_an_operator_that_does_not_know_a_field_is_found_by_a_dry_run(
    kube: FakeKube, jobs: KubeJobs, make_parcel: Make
) -> None:
    # The CRD may not be looked at, and knows less than this package.
    kube.denied.add(("get", "customresourcedefinitions"))
    kube.missing_fields.add("submitterConfig")
    with pytest.raises(LdmError, match='unknown field "spec.submitterConfig" .HTTP 400'):
        jobs.submit(make_parcel())
    assert made(kube) == (0, 0)


def test_a_lost_answer_and_a_rival_make_no_second_job(kube: FakeKube, jobs: KubeJobs, make_parcel: Make) -> None:
    parcel = make_parcel()
    # After the dry run that of the job itself, then that of its files.
    kube.faults.append(Fault("POST", "configmaps$", 0))
    jobs._create = lose_second_answer(kube, jobs)  # type: ignore[method-assign]
    submitted, _ = jobs.submit(parcel)
    assert (submitted.id, made(kube)) == (parcel.id, (1, 1))
    # Files that the garbage collector takes away in a moment: their RayJob is gone.
    (job,) = kube.all(RAY, "rayjobs")
    kube.objects.pop((RAY, "rayjobs", "default", job["metadata"]["name"]))
    assert KubeJobs().submit(parcel)[1] is True
    assert made(kube) == (1, 1)
    assert owners(kube) == {kube.all(RAY, "rayjobs")[0]["metadata"]["uid"]}


def owners(kube: FakeKube) -> set[str]:
    return {one["metadata"]["ownerReferences"][0]["uid"] for one in kube.all("v1", "configmaps")}


def test_a_submission_that_died_without_sending_the_files_is_mended_by_the_next(
    kube: FakeKube, jobs: KubeJobs, make_parcel: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    parcel = make_parcel()
    with monkeypatch.context() as patch:
        patch.setattr(KubeJobs, "_send_files", lambda *_: None)
        assert jobs.submit(parcel)[1] is True
    assert made(kube) == (1, 0)
    assert KubeJobs().submit(parcel)[1] is False
    assert made(kube) == (1, 1)
    assert owners(kube) == {kube.all(RAY, "rayjobs")[0]["metadata"]["uid"]}


def test_who_is_refused_touches_nothing_of_who_was_first(
    kube: FakeKube, jobs: KubeJobs, make_parcel: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    parcel = make_parcel()
    look = jobs._all

    def look_too_early(id: str) -> Any:
        found = look(id)
        # Between the look and what follows another submits.
        assert KubeJobs().submit(parcel)[1] is (not found)
        return found

    monkeypatch.setattr(jobs, "_all", look_too_early)
    kube.faults.append(Fault("POST", "configmaps$", 500, times=0))
    assert jobs.submit(parcel)[1] is False
    assert made(kube) == (1, 1)
    assert [path for verb, path in kube.requests if verb == "DELETE"] == []


def lose_second_answer(kube: FakeKube, jobs: KubeJobs) -> Callable[..., Any]:
    create = jobs._create

    def lossy(manifest: Any, **query: str) -> Any:
        if not query:
            kube.faults.append(Fault("POST", "rayjobs$", 0))
        return create(manifest, **query)

    return lossy


def test_two_at_once_are_one_job(kube: FakeKube, make_parcel: Make) -> None:
    parcel = make_parcel()
    answers: list[bool] = []
    both = [threading.Thread(target=lambda: answers.append(KubeJobs().submit(parcel)[1])) for _ in range(4)]
    for one in both:
        one.start()
    for one in both:
        one.join(30)
    assert sorted(answers) == [False, False, False, True]
    assert made(kube) == (1, 1)


def test_a_name_that_is_none_is_unknown_and_never_part_of_an_address(kube: FakeKube, jobs: KubeJobs) -> None:
    for id in ("nothing", "../../secrets/s3", "a?watch=1", "", "x,y", "é"):
        with pytest.raises(JobError, match="no such submission"):
            jobs.get(id)
    assert all(path.count("/") <= 7 and "secrets" not in path for _, path in kube.requests)


def test_a_list_of_many_comes_page_by_page_and_begins_again_when_it_grew_old(kube: FakeKube, jobs: KubeJobs) -> None:
    labels = {"app.kubernetes.io/managed-by": "ldm-batch"}
    for i in range(1100):
        kube.put(RAY, "rayjobs", {"metadata": {"name": f"job-{i:04d}", "labels": labels}, "spec": {}})
    kube.put(RAY, "rayjobs", {"metadata": {"name": "somebody-else-s"}, "spec": {}})
    assert len(jobs.list()) == 1100
    pages = jobs.api.items("/apis/ray.io/v1/namespaces/default/rayjobs", "")
    assert len(pages) == 1101
    get, calls = jobs.api.get, []

    def old(path: str, **query: str) -> Any:
        calls.append(query)
        if len(calls) == 2:
            kube.faults.append(Fault("GET", "rayjobs$", 410, "The provided continue parameter is too old"))
        return get(path, **query)

    jobs.api.get = old  # type: ignore[method-assign]
    assert len(jobs.list()) == 1100


def test_a_busy_server_is_asked_again(kube: FakeKube, jobs: KubeJobs) -> None:
    kube.faults.append(Fault("GET", "rayjobs$", 503, "busy", times=2))
    assert jobs.list() == []


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("token", "does not take these credentials; log in again"),
        ("context", "--context prod: no such context; the kubeconfig has fake"),
        ("address", "no Kubernetes API answers at http://127.0.0.1:9"),
        ("stranger", "self-signed certificate"),
        ("none", "no cluster to be found"),
        ("broken", "no cluster to be found"),
        ("html", "answers no JSON; is that a Kubernetes API server"),
    ],
)
def test_no_way_to_a_cluster_is_one_line(
    kube: FakeKube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, said: str
) -> None:
    file = kube.kubeconfig(tmp_path / "kubeconfig", token="wrong" if way == "token" else None)
    if way == "address":
        file.write_text(file.read_text().replace(kube.url, "http://127.0.0.1:9"))
    elif way == "stranger":
        write_certificate(tmp_path / "another.pem")
        file.write_text(file.read_text().replace("kube.pem", "another.pem"))
    elif way == "none":
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
    elif way == "broken":
        file.write_text("clusters: [")
    elif way == "html":
        kube.answer = says_html  # type: ignore[method-assign]
    with pytest.raises(LdmError, match=said) as caught:
        KubeJobs(context="prod" if way == "context" else None).list()
    assert len(str(caught.value).splitlines()) == 1
    assert kube.token not in str(caught.value)


async def says_html(request: Any, body: Any) -> web.Response:
    return web.Response(text="<html>It works!</html>")


def test_the_namespace_is_that_of_the_option_else_of_the_job_else_of_the_context(
    kube: FakeKube, tmp_path: Path, make_parcel: Make
) -> None:
    kube.kubeconfig(tmp_path / "kubeconfig", namespace="of-context")
    places = [(None, {}), (None, {"namespace": "of-job"}), ("of-option", {"namespace": "of-job"})]
    for option, cluster in places:
        KubeJobs(namespace=option).submit(make_parcel(**cluster))
    found = [one["metadata"]["namespace"] for one in kube.all(RAY, "rayjobs")]
    assert found == ["of-context", "of-job", "of-option"]


def status(deployment: str, job: str = "", **more: Any) -> dict[str, Any]:
    meta = {"name": "x", **more.pop("metadata", {})}
    spec = more.pop("spec", {})
    return {"metadata": meta, "spec": spec, "status": {"jobDeploymentStatus": deployment, "jobStatus": job, **more}}


@pytest.mark.parametrize(
    ("found", "phase", "said"),
    [
        ({"metadata": {"name": "x"}, "spec": {}}, "queued", "has not seen it yet"),
        (status("Initializing"), "queued", "its cluster starts"),
        (status("Running", "RUNNING"), "running", ""),
        (status("Retrying", "FAILED", reason="AppFailed", message="exit\n1"), "queued", "AppFailed: exit 1"),
        (status("Complete", "SUCCEEDED"), "succeeded", ""),
        (status("Complete", "STOPPED"), "cancelled", "stopped"),
        (status("Failed", "FAILED", reason="DeadlineExceeded", message="m"), "failed", "DeadlineExceeded: m"),
        (status("ValidationFailed", message="wrong"), "failed", "wrong"),
        (status("Suspending", spec={"suspend": True}), "suspended", "given back"),
        (status("Running", metadata={"deletionTimestamp": "t"}), "cancelled", "pods are going"),
        (status("SomethingNew"), "queued", "SomethingNew"),
    ],
)
def test_each_state_of_kuberay_is_a_phase(found: dict[str, Any], phase: str, said: str) -> None:
    assert phase_of(found)[0] == phase
    assert said in phase_of(found)[1]


def test_a_pod_whose_image_or_secret_is_not_there_says_so() -> None:
    waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
    pod = {"status": {"phase": "Pending", "containerStatuses": [{"state": {"waiting": waiting}}]}}
    assert why_pending(pod) == "ImagePullBackOff: Back-off pulling image"
    pod["status"]["containerStatuses"] = [{"state": {"waiting": {"reason": "ContainerCreating"}}}]  # type: ignore[index]
    assert why_pending(pod) == ""


def test_a_rayjob_of_somebody_else_is_none_of_ours_to_end(kube: FakeKube, jobs: KubeJobs, make_parcel: Make) -> None:
    jobs.submit(parcel := make_parcel())
    theirs = kube.all(RAY, "rayjobs")[0]
    nightly, training = ({"name": name, "namespace": "default"} for name in ("nightly-x1", "training"))
    # Of a RayCronJob.
    kube.put(RAY, "rayjobs", {**theirs, "metadata": nightly})
    assert jobs.get("nightly-x1").id == "nightly-x1"
    kube.put(RAY, "rayjobs", {**theirs, "metadata": training, "spec": theirs["spec"] | {"entrypoint": "python x.py"}})
    with pytest.raises(JobError, match="training: no such submission"):
        jobs.cancel("training")
    assert {one["metadata"]["name"] for one in kube.all(RAY, "rayjobs")} == {parcel.id, "nightly-x1", "training"}
