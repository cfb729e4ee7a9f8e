"""The manifests of a job: what an expert would have written, and nothing that a shell could read otherwise."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.backend import Parcel
from pipelines.errors import JobError
from pipelines.job import Job, parse_job
from pipelines.rayjob import config_map, entrypoint, job_of, manifests, rayjob, while_busy
from pipelines.rayjob_rules import violations
from tests.kube.operator import in_shells

Make = Callable[..., Parcel]
FULL: dict[str, Any] = {
    "namespace": "batch",
    "service_account": "reader",
    "image_pull_secrets": ["registry"],
    "head": {"cpus": 4, "memory": "16Gi", "node_selector": {"pool": "heads"}},
    "workers": [
        {"name": "l4", "cpus": "8", "memory": "32Gi", "gpus": 1, "replicas": 8, "min_replicas": 0, "spot": "gke"},
        {"name": "h100", "gpus": 8, "replicas": 2, "spot": "eks", "tolerations": [{"key": "dear", "value": "x"}]},
        {"name": "fetch", "gpus": 0, "cpus": "16", "replicas": 3},
    ],
    "env": {"REGION": "north"},
    "secrets": ["s3"],
    "volumes": [{"claim": "shared", "path": "/data"}, {"secret": "signer", "path": "/etc/signer"}],
    "model_cache": {"claim": "models"},
    "priority_class": "batch-low",
    "retries": 5,
    "deadline_s": 3600,
    "start_deadline_s": 600,
    "ttl_s": 30,
    "grace_s": 300,
}


def the_rayjob(parcel: Parcel) -> dict[str, Any]:
    made = rayjob(job_of(parcel), parcel)
    assert violations(made) == []
    return made


def test_a_job_with_nothing_but_an_image_gets_good_defaults(make_parcel: Make) -> None:
    parcel = make_parcel()
    made = the_rayjob(parcel)
    spec, cluster = made["spec"], made["spec"]["rayClusterSpec"]
    assert made["metadata"]["name"] == parcel.id
    assert (spec["shutdownAfterJobFinishes"], spec["backoffLimit"], spec["suspend"]) == (True, 3, False)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["authOptions"] == {"mode": "token"}
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 1)
    assert "enableInTreeAutoscaling" not in cluster
    for template in (spec["submitterPodTemplate"], cluster["headGroupSpec"]["template"], group["template"]):
        pod, (container,) = template["spec"], template["spec"]["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_every_field_of_the_cluster_section_reaches_the_manifest(make_parcel: Make) -> None:
    made = the_rayjob(make_parcel(**FULL))
    spec, cluster = made["spec"], made["spec"]["rayClusterSpec"]
    assert (spec["activeDeadlineSeconds"], spec["preRunningDeadlineSeconds"]) == (3600, 600)
    assert (spec["backoffLimit"], spec["ttlSecondsAfterFinished"]) == (5, 30)
    assert (cluster["enableInTreeAutoscaling"], cluster["autoscalerOptions"]["version"]) == (True, "v2")
    assert made["metadata"]["namespace"] == "batch"
    l4, h100, fetch = cluster["workerGroupSpecs"]
    # All at once, since the run fits its pools to what it finds; idle ones go.
    assert (l4["replicas"], l4["minReplicas"], l4["maxReplicas"]) == (8, 0, 8)
    pod = l4["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert {t["key"] for t in pod["tolerations"]} == {"nvidia.com/gpu", "cloud.google.com/gke-spot"}
    assert pod["terminationGracePeriodSeconds"] == 300
    assert "-lt 290 " in pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2]
    assert pod["containers"][0]["resources"]["limits"] == {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "1"}
    assert {t["key"] for t in h100["template"]["spec"]["tolerations"]} == {"dear", "nvidia.com/gpu"}
    assert "nvidia.com/gpu" not in fetch["template"]["spec"]["containers"][0]["resources"]["limits"]
    head = cluster["headGroupSpec"]["template"]
    assert head["metadata"]["annotations"]["prometheus.io/scrape"] == "true"
    away = head["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    kept_off = away["nodeSelectorTerms"][0]["matchExpressions"]
    assert {(one["key"], one["operator"]) for one in kept_off} == {
        ("cloud.google.com/gke-spot", "NotIn"),
        ("eks.amazonaws.com/capacityType", "NotIn"),
    }
    for template in (head, l4["template"]):
        container = template["spec"]["containers"][0]
        environ = {one["name"]: one.get("value") for one in container["env"]}
        assert environ["HF_HOME"] == "/models"
        assert (environ["HF_HUB_OFFLINE"], environ["REGION"]) == ("1", "north")
        assert container["envFrom"] == [{"secretRef": {"name": "s3"}}]
        mounted = {m["mountPath"]: m.get("readOnly", False) for m in container["volumeMounts"]}
        assert mounted == {
            "/etc/ldm-batch": True, "/data": False, "/etc/signer": True, "/models": True, "/dev/shm": False
        }  # fmt: skip
        shm = next(v["emptyDir"] for v in template["spec"]["volumes"] if "emptyDir" in v)
        assert shm["medium"] == "Memory"
        assert (template["spec"]["serviceAccountName"], template["spec"]["priorityClassName"]) == (
            "reader",
            "batch-low",
        )
        assert template["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    submitter = spec["submitterPodTemplate"]["spec"]
    assert "envFrom" not in submitter["containers"][0]


def test_under_kueue_the_job_is_of_fixed_size_and_begins_suspended(make_parcel: Make) -> None:
    made = the_rayjob(make_parcel(queue="gpus", workers=[{"replicas": 4, "gpus": 1}]))
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert made["spec"]["suspend"] is True
    assert "enableInTreeAutoscaling" not in made["spec"]["rayClusterSpec"]


def test_a_toleration_reads_as_in_a_pod(make_parcel: Make) -> None:
    tolerations = [{"key": "team", "value": "a"}, {"key": "dear"}, {}]
    made = the_rayjob(make_parcel(head={"tolerations": tolerations}))
    assert made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["tolerations"] == [
        {"key": "team", "operator": "Equal", "value": "a"},
        {"key": "dear", "operator": "Exists"},
        {"operator": "Exists"},
    ]


def test_ray_is_told_of_gpus_whose_name_kuberay_does_not_know(make_parcel: Make) -> None:
    workers = [{"gpus": 2, "gpu_resource": "gpu.intel.com/i915"}, {"name": "fetch", "gpus": 0}]
    some, none = the_rayjob(make_parcel(workers=workers))["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (some["rayStartParams"], none["rayStartParams"]) == ({"num-gpus": "2"}, {})


def test_the_environment_of_this_machine_is_not_told_beside_the_job(
    make_parcel: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET", "of-this-machine")
    parcel = make_parcel(job={"sink": {"path": "s3://${env:BUCKET}/out"}})
    both = manifests(job_of(parcel), parcel)
    assert "of-this-machine" not in json.dumps(both)
    assert both[1]["metadata"]["annotations"]["ldm-batch/output"] == "s3://${env:BUCKET}/out"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "false"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/etc/gcp/key.json"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/etc/aws/credentials"),
    ],
)
def test_a_variable_that_only_sounds_like_a_secret_is_taken(name: str, value: str) -> None:
    assert job_with(env={name: value}).cluster.env == {name: value}


def test_gpus_are_those_that_a_stage_s_worker_needs_if_none_are_said(make_parcel: Make) -> None:
    stages = [{"op": "txt2img", "model": "builtin:shapes", "num_gpus": 0.5}]
    (group,) = the_rayjob(make_parcel(job={"stages": stages}))["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_entrypoint_survives_both_shells_word_by_word(tmp_path: Path) -> None:
    hostile = (
        "--limit",
        "3",
        "a b",
        "$(touch pwned)",
        "`touch pwned`",
        "; touch pwned",
        "it's",
        '"',
        "\\",
        "*",
        "&& x",
    )
    shutil.copy("/bin/true", tmp_path / "true")
    program = tmp_path / "ldm-batch"
    program.write_text(
        "#!/usr/bin/env python3\nimport json, os, sys\nprint(json.dumps([os.getcwd(), *sys.argv[1:]]))\n"
    )
    program.chmod(0o755)
    line = in_shells(entrypoint(hostile)).replace("/etc/ldm-batch", str(tmp_path))
    environ = {"PATH": f"{tmp_path}:/usr/local/bin:/usr/bin:/bin"}
    said = subprocess.run(["/bin/bash", "-ce", line], env=environ, capture_output=True, text=True, cwd="/")
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout) == [str(tmp_path), "run", "job.yaml", "--dead-letters-ok", *hostile]
    assert not (tmp_path / "pwned").exists()
    # HTTPMode has one shell alone.
    assert shlex.split(entrypoint(hostile))[-len(hostile) :] == list(hostile)


def test_a_pod_that_is_told_to_go_waits_for_its_workers_and_for_no_longer(tmp_path: Path) -> None:
    def seconds(*titles: str) -> float:
        for i, title in enumerate(("bash", "ray::IDLE", *titles)):
            (tmp_path / str(i)).mkdir(exist_ok=True)
            (tmp_path / str(i) / "cmdline").write_text(f"{title}\0")
        start = time.monotonic()
        line = while_busy(2).replace("/proc", str(tmp_path))
        assert subprocess.run(["/bin/sh", "-c", line], check=False).returncode == 0
        return time.monotonic() - start

    assert seconds() < 1
    assert seconds("ray::MapWorker(MapBatches(Txt2Img)).submit") > 1.9


@pytest.mark.parametrize("name", ["a" * 63, "Weird..Name_9", "0", "x" + "-" * 61, "a.b"])
def test_any_name_of_a_job_gives_one_that_kuberay_takes(make_parcel: Make, name: str) -> None:
    made = the_rayjob(make_parcel(name=name))
    assert len(made["metadata"]["name"]) <= 41


def test_small_files_travel_in_a_config_map_byte_by_byte_and_the_cluster_section_stays(
    make_parcel: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEAM", "pictures")
    parcel = make_parcel(env={"TEAM": "${env:TEAM}"})
    assert parcel.folder is not None
    (parcel.folder / "data").mkdir(exist_ok=True)
    (parcel.folder / "data" / "latin-1.csv").write_bytes(b"prompt\ncaf\xe9\n")
    job = job_of(parcel)
    files, made = manifests(job, parcel)
    assert files["immutable"] is True
    assert "cluster" not in yaml.safe_load(files["data"]["job.yaml"])
    assert list(files["binaryData"].values()) == ["cHJvbXB0CmNhZukK"]
    pod = made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    items = {item["path"]: item["key"] for item in pod["volumes"][0]["configMap"]["items"]}
    assert set(items) == {"job.yaml", "data/0000-prompts.csv", "data/latin-1.csv"}
    assert set(items.values()) == set(files["data"]) | set(files["binaryData"])
    assert {"name": "TEAM", "value": "pictures"} in pod["containers"][0]["env"]


def test_a_table_too_large_for_a_config_map_is_refused_with_the_way_out(make_parcel: Make) -> None:
    parcel = make_parcel()
    assert parcel.folder is not None
    (parcel.folder / "data" / "large.csv").write_bytes(b"x" * 900_001)
    with pytest.raises(JobError, match=r"data/large\.csv: .* at most 900000 travel to Kubernetes; put the table on s3"):
        config_map(job_of(parcel), parcel)


@pytest.mark.parametrize(
    ("cluster", "job", "said"),
    [
        ({"image": None}, {}, "cluster.image: missing"),
        ({}, {"sink": {"path": "/data/out"}}, "sink.path /data/out would lie in one pod"),
        ({"volumes": [{"claim": "c", "path": "/data"}]}, {"sink": {"path": "file:///database/x"}}, "below /data"),
        (
            {"volumes": [{"claim": "c", "path": "/data", "read_only": True}]},
            {"sink": {"path": "/data/x"}},
            "would lie in one pod",
        ),
        ({"volumes": [{"claim": "c", "path": "/data"}]}, {"sink": {"path": "/data/x"}}, "say so: file:///data/x"),
    ],
)
def test_what_cannot_work_in_a_pod_is_refused(
    make_parcel: Make, cluster: dict[str, Any], job: dict[str, Any], said: str
) -> None:
    parcel = make_parcel(job=job, **cluster)
    with pytest.raises(JobError, match=said):
        rayjob(job_of(parcel), parcel)


def test_an_output_on_a_claim_that_all_pods_see_is_fine(make_parcel: Make) -> None:
    the_rayjob(make_parcel(job={"sink": {"path": "file:///data/out"}}, volumes=[{"claim": "c", "path": "/data"}]))


def job_with(**cluster: Any) -> Job:
    data = {"source": {"rows": ["x"]}, "stages": [{"op": "txt2img", "model": "m"}], "sink": {"path": "o"}}
    return parse_job(yaml.safe_dump({**data, **({"cluster": cluster} if cluster else {})}))


@pytest.mark.parametrize(
    ("cluster", "said"),
    [
        ({"imagee": "x"}, "cluster.imagee: unknown field; did you mean image?"),
        ({"workers": [{"gpu": 1}]}, r"cluster.workers.0.gpu: unknown field; did you mean gpus\?"),
        ({"head": {"x": 1}}, "cluster.head.x: unknown field; one of cpus, memory"),
        ({"image": "a b"}, "cluster.image: "),
        ({"image": "x;reboot"}, "cluster.image: "),
        ({"namespace": "Prod"}, "cluster.namespace: "),
        ({"workers": []}, "cluster.workers: "),
        ({"workers": [{"memory": "16GB"}]}, "a quantity such as"),
        ({"workers": [{"memory": "100Mi"}]}, "1Gi at least"),
        ({"workers": [{"cpus": 0}]}, "a quantity such as"),
        ({"workers": [{"cpus": "٣"}]}, "a quantity such as"),
        ({"workers": [{"replicas": 2, "min_replicas": 3}]}, "3 is more than replicas, 2"),
        ({"workers": [{}, {}]}, "two groups have one name"),
        ({"workers": [{"spot": "azure"}]}, "cluster.workers.0.spot: "),
        ({"queue": "q", "workers": [{"replicas": 2, "min_replicas": 0}]}, "fixed size"),
        ({"queue": "q", "workers": [{"name": "head"}]}, "none called head"),
        ({"env": {"AWS_SECRET_ACCESS_KEY": "x"}}, "looks like a secret"),
        ({"env": {"AZURE_STORAGE_CONNECTION_STRING": "AccountKey=x"}}, "looks like a secret"),
        ({"env": {"PROXY": "http://me:hush@proxy"}}, "looks like a secret"),
        ({"env": {"a b": "x"}}, "cluster.env"),
        ({"head": {"node_selector": {"bad key!": "x"}}}, "cluster.head.node_selector"),
        ({"head": {"node_selector": {"pool": "two words"}}}, "cluster.head.node_selector"),
        ({"workers": [{"gpu_resource": "a b"}]}, "cluster.workers.0.gpu_resource"),
        ({"head": {"tolerations": [{"operator": "Exists", "key": "a", "value": "b"}]}}, "Exists takes none"),
        ({"head": {"tolerations": [{"value": "b"}]}}, "Equal needs one"),
        ({"volumes": [{"claim": "c", "path": "/a/../etc/ldm-batch"}]}, "no folder of its own"),
        ({"volumes": [{"claim": "c", "path": "/etc/ldm-batch/data"}]}, "mounted twice"),
        ({"secrets": ["../x"]}, "cluster.secrets.0"),
        ({"volumes": [{"path": "/x"}]}, "give either claim or secret"),
        ({"volumes": [{"claim": "c", "path": "relative"}]}, "cluster.volumes.0.path"),
        ({"volumes": [{"claim": "c", "path": "/tmp"}]}, "/tmp is mounted twice"),
        ({"model_cache": {"claim": "c", "path": "/a"}, "volumes": [{"claim": "d", "path": "/a/"}]}, "mounted twice"),
        ({"retries": -1}, "cluster.retries"),
        ({"deadline_s": 0}, "cluster.deadline_s"),
        ({"run_as_user": 0}, "cluster.run_as_user"),
        ({"ray_version": "latest"}, "cluster.ray_version"),
    ],
)
def test_a_wrong_cluster_section_is_one_line_that_says_where(cluster: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError, match=said) as caught:
        job_with(**cluster)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith("job.yaml:")


def test_the_cluster_section_is_no_part_of_what_a_row_is() -> None:
    plain, elsewhere = job_with(), job_with(image="x", retries=1)
    assert plain.output_settings() == elsewhere.output_settings()
    assert plain.recorded() == elsewhere.recorded()
    assert "cluster" not in plain.resolved_yaml()
