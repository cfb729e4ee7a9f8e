"""`submit` and what looks after a job, against the real job server of a real Ray head."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import ray
import yaml

from pipelines.rayjob import entrypoint
from tests.cluster.head import Head, head
from tests.conftest import free_port
from tests.faults.outside import look

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def ray_head() -> Iterator[Head]:
    with head() as there:
        yield there


def write_job(folder: Path, model: Path, num_rows: int, **stage: Any) -> Path:
    """A job with a table of its own, relative to where it is submitted."""
    (folder / "rows").mkdir(parents=True)
    (folder / "rows/prompts.csv").write_text("caption\n" + "".join(f"a red circle {i}\n" for i in range(num_rows)))
    stages = [{"op": "txt2img", "model": str(model), "num_inference_steps": 2, "batch_size": 2, "workers": 1, **stage}]
    job = {
        "name": "Rot.Test_1",
        "source": {"path": "rows/prompts.csv", "columns": {"prompt": "caption"}},
        "stages": stages,
        "sink": {"path": f"file://{folder}/out"},
        "batches_per_shard": 1,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def submitted(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[0])
    return answer


def scrape(there: Head) -> str:
    request = urllib.request.Request(
        f"{there.metrics}/metrics", headers={"Authorization": f"Bearer {there.environ['RAY_AUTH_TOKEN']}"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read().decode())


def test_a_job_submitted_twice_runs_once_on_the_code_of_here_and_tells_its_figures(
    tiny_model: Path, tmp_path: Path, ray_head: Head, ldm_batch: Command
) -> None:
    job = write_job(tmp_path, tiny_model, 6)
    there = ["--address", ray_head.dashboard]
    secret = {"SECRET_OF_HERE": "tell-nobody", **ray_head.environ}
    first = submitted(ldm_batch("submit", job, *there, "--json", cwd=tmp_path, **secret))
    again = submitted(ldm_batch("submit", job, *there, "--json", cwd=tmp_path, **secret))
    assert (first["id"], first["submitted"], again["submitted"]) == (again["id"], True, False)
    assert first["id"].startswith("rot-test-1-")
    # The cluster has code of its own under this name that does not even load.
    said = ldm_batch("logs", "-f", first["id"], *there, cwd=tmp_path, **secret)
    assert "6 ok, 0 failed, 0 filtered of 6 planned" in said.stdout, said.stdout + said.stderr
    assert "tell-nobody" not in said.stdout
    figures = ""
    until = time.monotonic() + 30
    while "ray_ldm_rows_total" not in figures and time.monotonic() < until:
        figures = scrape(ray_head)
        time.sleep(0.5)
    rows = [line for line in figures.splitlines() if line.startswith("ray_ldm_rows_total{")]
    assert sum(float(line.rpartition(" ")[2]) for line in rows) == 6
    assert all('status="ok"' in line and 'stage="txt2img"' in line for line in rows)
    names = {line.partition("{")[0] for line in figures.splitlines() if line.startswith("ray_ldm_")}
    assert {f"ray_ldm_{name}" for name in ("batch_seconds_count", "device_busy_ratio", "upload_seconds_count")} <= names
    assert {"ray_ldm_queue_depth", "ray_ldm_shards_done"} <= names
    seen = look(f"file://{tmp_path}/out")
    assert (len(seen.rows), seen.faults, seen.finished) == (6, [], True)
    listed = json.loads(ldm_batch("list", *there, "--json", cwd=tmp_path, **secret).stdout)["submissions"]
    assert [(one["id"], one["phase"]) for one in listed if one["id"] == first["id"]] == [(first["id"], "succeeded")]
    assert "tell-nobody" not in json.dumps(listed)


def test_a_suspended_job_goes_on_where_it_stopped(
    tiny_model: Path, tmp_path: Path, ray_head: Head, ldm_batch: Command
) -> None:
    job = write_job(tmp_path, tiny_model, 90, num_inference_steps=25)
    there = ["--address", ray_head.dashboard, "--json"]

    def ask(verb: str) -> dict[str, Any]:
        return submitted(ldm_batch(verb, job, *there, cwd=tmp_path, **ray_head.environ))

    def wait_for(*phases: str) -> dict[str, Any]:
        until = time.monotonic() + 100
        while (now := ask("status"))["phase"] not in phases and time.monotonic() < until:
            time.sleep(0.3)
        assert now["phase"] in phases, now
        return now

    ask("submit")
    parts = tmp_path / "out/manifest"
    until = time.monotonic() + 100
    while not list(parts.glob("*/*.parquet")) and time.monotonic() < until:
        time.sleep(0.1)
    ask("suspend")
    assert wait_for("suspended", "succeeded", "failed")["phase"] == "suspended"
    before = len(list(parts.glob("*/*.parquet")))
    assert 0 < before < 45
    refused = ldm_batch("suspend", job, *there[:2], cwd=tmp_path, **ray_head.environ)
    assert (refused.returncode, "is suspended already" in refused.stderr) == (2, True)
    ask("resume")
    assert wait_for("succeeded", "failed", "suspended")["attempt"] == 2
    seen = look(f"file://{tmp_path}/out")
    assert (len(seen.rows), seen.faults, seen.finished) == (90, [], True)
    runs = [json.loads(path.read_text()) for path in (tmp_path / "out/_ldm/runs").glob("*/ended.json")]
    assert sorted(run["exit_code"] for run in runs) == [0, 143]
    assert sum(run["num_new_rows"] for run in runs) == 90


def test_what_cannot_be_is_one_line_before_anything_starts(
    tiny_model: Path, tmp_path: Path, ray_head: Head, ldm_batch: Command
) -> None:
    job = write_job(tmp_path, tiny_model, 2)
    nobody = f"http://127.0.0.1:{free_port()}"
    for arguments, problem in [
        (["submit", job, "--address", nobody], "no job server answers there; check host and port"),
        (["submit", job], "no cluster is named; give --address http://head:8265, or --kube"),
        (["status", "nobody-0123456789", "--address", ray_head.dashboard], "no job nobody-0123456789; `ldm-batch list"),
        (["submit", job, "--address", "head:8265"], "the address of a cluster's dashboard is needed"),
        (
            ["submit", job, "--address", ray_head.dashboard.replace("http", "https")],
            "a dashboard itself speaks http://",
        ),
        (["submit", job, "--address", nobody, "--set", "sink.path=out"], "sink.path out is relative to a folder"),
        (["submit", job, "--address", nobody, "--slice", "9/8"], "--slice '9/8': give a number from 1 on"),
        (["run", job, "--address", "ray://127.0.0.1:1"], "Ray Data does not work through a Ray Client"),
        (["run", job, "--address", nobody], "that is a dashboard; `ldm-batch submit --address"),
        (["run", job, "--address", ray_head.dashboard[7:]], "what answers there is no Ray cluster; check the port"),
    ]:
        done = ldm_batch(*arguments, cwd=tmp_path, **ray_head.environ)
        assert (done.returncode in (1, 2), problem in done.stderr) == (True, True), done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    stranger = ldm_batch("list", "--address", ray_head.dashboard, cwd=tmp_path, RAY_AUTH_MODE="disabled")
    assert "asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in stranger.stderr
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    stranger = ldm_batch("list", "--address", ray_head.dashboard, cwd=tmp_path, **wrong)
    assert "does not take this token; set RAY_AUTH_TOKEN to the one" in stranger.stderr
    assert not (tmp_path / "out").exists()


def test_a_cluster_with_another_ray_or_python_is_told_apart_before_anything_starts(
    tiny_model: Path, tmp_path: Path, ray_head: Head, ldm_batch: Command
) -> None:
    job = write_job(tmp_path, tiny_model, 2)
    claim(ray_head, {"ray_version": "2.9.0", "python_version": "3.9.1"})
    done = ldm_batch("run", job, "--address", ray_head.gcs, cwd=tmp_path, **ray_head.environ)
    claim(ray_head, {"ray_version": ray.__version__, "python_version": platform.python_version()})
    problem = "that cluster has Ray 2.9.0 and Python 3.9.1, this machine Ray 2."
    assert (done.returncode, problem in done.stderr.splitlines()[-1]) == (2, True), done.stderr
    assert "Traceback" not in done.stderr

    class Old(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"version": "4", "ray_version": "2.9.0"}')

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Old)
    Thread(target=server.serve_forever, daemon=True).start()
    old = f"http://127.0.0.1:{server.server_port}"
    done = ldm_batch("submit", job, "--address", old, cwd=tmp_path, RAY_AUTH_MODE="disabled")
    server.shutdown()
    assert f"--address {old}: that cluster has Ray 2.9.0, this ldm-batch needs" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def claim(there: Head, versions: dict[str, str]) -> None:
    """Let the cluster say that it was started by other versions, in the place where Ray looks for them."""
    script = (
        "import json, sys\n"
        "from ray._raylet import GcsClient\n"
        "at = {'namespace': b'cluster'}\n"
        "gcs = GcsClient(address=sys.argv[1])\n"
        "said = json.loads(gcs.internal_kv_get(b'CLUSTER_METADATA', **at))\n"
        "new = json.dumps({**said, **json.loads(sys.argv[2])}).encode()\n"
        "gcs.internal_kv_put(b'CLUSTER_METADATA', new, overwrite=True, **at)\n"
    )
    arguments = [sys.executable, "-c", script, there.gcs, json.dumps(versions)]
    subprocess.run(arguments, env={**os.environ, **there.environ}, check=True, timeout=60)


def test_the_line_that_kuberay_writes_for_bash_gives_the_driver_every_word(ray_head: Head, tmp_path: Path) -> None:
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
    program = tmp_path / "ldm-batch"
    program.write_text(
        "#!/usr/bin/env python3\nimport json, os, sys\nprint(json.dumps([os.getcwd(), *sys.argv[1:]]))\n"
    )
    program.chmod(0o755)
    line = entrypoint(hostile).replace("/etc/ldm-batch", str(tmp_path)).replace(" ldm-batch ", f" {program} ")
    ray, at = Path(sys.executable).parent / "ray", f"--address {ray_head.dashboard}"
    # As its operator puts it together.
    submit = f"{ray} job submit {at} --no-wait --submission-id kuberay-1 -- {line} ;"
    known, follow = f"{ray} job status {at} kuberay-1", f"{ray} job logs {at} --follow kuberay-1"
    script = f"if ! {known} >/dev/null 2>&1 ; then {submit} fi ; {follow}"
    environ = {**os.environ, **ray_head.environ}
    said = subprocess.run(["/bin/bash", "-ce", script], env=environ, capture_output=True, text=True, timeout=150)
    assert said.returncode == 0, said.stdout + said.stderr
    words = [json.loads(one) for one in said.stdout.splitlines() if one.startswith('["/')]
    assert words == [[str(tmp_path), "run", "job.yaml", "--dead-letters-ok", *hostile]], said.stdout
    assert not list(tmp_path.rglob("pwned"))
