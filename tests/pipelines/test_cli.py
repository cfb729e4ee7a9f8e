"""The command line as a user meets it: a process of its own, its output, its exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from tests.conftest import ROOT, start_moto
from tests.pipelines import reader

LdmBatch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def job_file(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(num_rows: int = 3, steps: int = 2, **changes: object) -> Path:
        stage = {"op": "txt2img", "model": str(tiny_model), "num_inference_steps": steps, "batch_size": 2, "workers": 1}
        data = {
            "source": {"rows": [f"a red circle {i}" for i in range(num_rows)]},
            "stages": [stage],
            "sink": {"path": str(tmp_path / "out")},
            "batches_per_shard": 1,
            **changes,
        }
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


@pytest.mark.parametrize("command", [["--help"], ["run", "--help"], ["check", "jobs/txt2img.yaml"], ["schema"]])
def test_help_check_and_schema_import_neither_torch_nor_ray(command: list[str]) -> None:
    code = (
        "import sys; from pipelines.cli import app\n"
        f"try: app({command!r})\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert not {'torch', 'ray', 'diffusers', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_new_user_gets_from_init_to_pictures(ldm_batch: LdmBatch, tmp_path: Path) -> None:
    made = ldm_batch("init", cwd=tmp_path)
    assert made.returncode == 0
    assert "ldm-batch check job.yaml" in made.stdout
    checked = ldm_batch("check", "job.yaml", cwd=tmp_path)
    assert (checked.returncode, "job.yaml is fine" in checked.stdout) == (0, True)
    assert (tmp_path / "job.csv").exists()
    again = ldm_batch("init", cwd=tmp_path)
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    ran = ldm_batch("run", "job.yaml", "--set", "stages.0.num_inference_steps=2", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "4 ok, 0 failed, 0 filtered of 4 planned" in ran.stdout
    assert "ldm-batch status out/starter" in ran.stdout
    assert "4/4 pictures" in ran.stderr
    assert "\x1b" not in ran.stderr, "plain lines where there is no terminal"
    assert len(reader.rows(tmp_path / "out" / "starter")) == 4
    nothing = ldm_batch("run", "job.yaml", "--set", "stages.0.num_inference_steps=2", cwd=tmp_path)
    assert (nothing.returncode, "nothing is left to do" in nothing.stderr) == (0, True)
    changed = ldm_batch("run", "job.yaml", "--set", "stages.0.num_inference_steps=3", cwd=tmp_path)
    assert changed.returncode == 2
    assert "holds another job (stages.0.num_inference_steps 2, now 3)" in changed.stderr


def test_plan_and_status_speak_json(ldm_batch: LdmBatch, job_file: Callable[..., Path]) -> None:
    path = job_file(num_rows=5)
    planned = json.loads(ldm_batch("plan", path, "--limit", "4", "--json").stdout)
    assert (planned["num_source_rows"], planned["num_rows"], planned["num_shards_left"]) == (4, 4, 2)
    assert planned["buckets"][0]["rows"] == 4
    status = json.loads(ldm_batch("status", path, "--json").stdout)
    assert (status["num_planned"], status["num_ok"], status["num_shards_done"]) == (4, 0, 0)
    checked = json.loads(ldm_batch("check", path, "--json").stdout)
    assert checked["num_rows"] == 5


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "none.yaml"], 2, "none.yaml: no such job file; `ldm-batch init` writes one"),
        (["status", "nowhere"], 4, "nowhere holds no plan of ldm-batch"),
        (["doctor", "s3://"], 2, "s3:// names no place; use a folder, file:///folder or s3://bucket/prefix"),
        (["check", "jobs/txt2img.yaml", "--set", "stages.0.batchsize=3"], 2, "did you mean batch_size?"),
        (["check", "jobs/txt2img.yaml", "--set", "source.path=none.csv"], 2, "source.path none.csv: no such file"),
        (["run", "jobs/txt2img.yaml", "--set", "sink.path=/proc/out"], 1, "choose a folder that you may write to"),
    ],
)
def test_a_users_mistake_is_one_line_and_an_exit_code(
    ldm_batch: LdmBatch, arguments: list[str], code: int, message: str
) -> None:
    plain = ldm_batch(*arguments)
    assert (plain.returncode, plain.stdout) == (code, "")
    assert message in plain.stderr
    assert len(plain.stderr.splitlines()) == 1
    as_json = ldm_batch(*arguments, "--json")
    assert json.loads(as_json.stdout)["exit_code"] == as_json.returncode == code


def test_wrong_s3_credentials_fail_within_ten_seconds_with_the_fix(
    ldm_batch: LdmBatch, job_file: Callable[..., Path]
) -> None:
    server, url = start_moto(INITIAL_NO_AUTH_ACTION_COUNT="0")
    try:
        start = time.monotonic()
        ran = ldm_batch("run", job_file(sink={"path": "s3://bkt/x"}), AWS_ENDPOINT_URL=url, AWS_ACCESS_KEY_ID="AKWRONG")
        assert time.monotonic() - start < 10
    finally:
        server.kill()
        server.wait()
    assert ran.returncode == 1
    assert "refuses these credentials" in ran.stderr
    assert "check AWS_ACCESS_KEY_ID" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def start(path: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", "run", str(path), *options],
        cwd=ROOT,
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_a_part(out: Path, process: subprocess.Popen[str]) -> None:
    """One of this very run: the workers of a killed one may still commit what they have in hand."""
    before = {run.name for run in (out / "_ldm/runs").glob("*")}
    theirs: set[Path] = set()
    for _ in range(600):
        for part in set(out.glob("manifest/*/*.parquet")) - theirs:
            if pq.read_table(part, columns=["run_id"])["run_id"][0].as_py() not in before:
                return
            theirs.add(part)
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("no part in a minute")


def test_interrupted_terminated_and_resumed_gives_the_bytes_of_an_undisturbed_run(
    ldm_batch: LdmBatch, job_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = job_file(num_rows=60, steps=22)
    run = start(path)
    wait_for_a_part(tmp_path / "out", run)
    second = ldm_batch("run", path)
    assert second.returncode == 75
    assert "is alive" in second.stderr
    done = 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        run.send_signal(number)
        stdout, stderr = run.communicate(timeout=60)
        assert run.returncode == code, stderr
        assert stdout.endswith("stopped; the same command again does the rest\n")
        assert "shards in flight are finished first" in stderr
        assert "Traceback" not in stderr
        before, done = done, len(reader.rows(tmp_path / "out"))
        assert before < done < 60
        assert not (tmp_path / "out" / "_SUCCESS").exists()
        if number == signal.SIGINT:
            run = start(path)
            wait_for_a_part(tmp_path / "out", run)
    resumed = ldm_batch("run", path, "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["num_new_rows"] == 60 - done
    elsewhere = json.loads(ldm_batch("run", path, "--set", f"sink.path={tmp_path / 'other'}", "--json").stdout)
    assert reader.contents(tmp_path / "out") == reader.contents(tmp_path / "other")
    assert json.loads(resumed.stdout)["totals"]["digest"] == elsewhere["totals"]["digest"]


def test_a_killed_run_resumes_and_a_second_interrupt_is_immediate(
    ldm_batch: LdmBatch, job_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = job_file(num_rows=40, steps=12)
    killed = start(path)
    wait_for_a_part(tmp_path / "out", killed)
    killed.kill()
    killed.communicate()
    interrupted = start(path)
    wait_for_a_part(tmp_path / "out", interrupted)
    interrupted.send_signal(signal.SIGINT)
    time.sleep(0.3)
    interrupted.send_signal(signal.SIGINT)
    at = time.monotonic()
    interrupted.communicate(timeout=30)
    assert interrupted.returncode == 130
    assert time.monotonic() - at < 3
    hurried = start(path, "--grace", "0.1")
    wait_for_a_part(tmp_path / "out", hurried)
    hurried.send_signal(signal.SIGTERM)
    at = time.monotonic()
    hurried.communicate(timeout=30)
    assert hurried.returncode == 143
    assert time.monotonic() - at < 5
    assert len(reader.rows(tmp_path / "out")) < 40
    runs = [json.loads(path.read_text()) for path in (tmp_path / "out/_ldm/runs").glob("*/ended.json")]
    assert sum("abandoned" in run.get("error", "") for run in runs) == 1
    resumed = ldm_batch("run", path)
    assert resumed.returncode == 0, resumed.stderr
    assert len(reader.rows(tmp_path / "out")) == 40


def test_a_job_of_any_name_that_init_writes_is_fine(ldm_batch: Any, tmp_path: Path) -> None:
    for name in ("a: b.yaml", "x #1.yaml"):
        assert ldm_batch("init", name, cwd=tmp_path).returncode == 0
        assert ldm_batch("check", name, cwd=tmp_path).returncode == 0
    refused = ldm_batch("init", "job.csv", cwd=tmp_path)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert not (tmp_path / "job.csv").exists()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("sink.path=pics/out", "sink.path pics/out lies inside source.path pics; choose another, beside it"),
        ("sink.path=" + "x" * 300, "File name too long"),
        ("source.storage_options=sup3rs3cret", "source.storage_options: expected a mapping of fsspec's options"),
    ],
)
def test_what_cannot_be_is_one_line_without_secrets(
    ldm_batch: Any, tiny_model: Path, tmp_path: Path, assignment: str, message: str
) -> None:
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "a.png").touch()
    job = {
        "source": {"path": "pics"},
        "stages": [{"op": "encode", "model": str(tiny_model)}],
        "sink": {"path": "out"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    done = ldm_batch("plan", "job.yaml", "--set", assignment, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert len(done.stderr.strip().splitlines()) == 1
    assert message in done.stderr
    assert "sup3rs3cret" not in done.stderr


@pytest.mark.parametrize("content", ['{"pl', "[]", '{"plan_id": "gone"}', "7"])
def test_a_damaged_plan_log_is_one_line(ldm_batch: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "out" / "_ldm" / "plans").mkdir(parents=True)
    (tmp_path / "out" / "_ldm" / "plans" / "0001.json").write_text(content)
    done = ldm_batch("status", "out", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (4, 1)
    assert "plan" in done.stderr
