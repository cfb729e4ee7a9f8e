"""What SECURITY.md promises, where no other test shows it."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ldm_ops.txt2img import Txt2Img
from pipelines.errors import JobError, NotWhole
from pipelines.planner import check
from pipelines.plans import read_plans
from pipelines.storage import Store
from tests.conftest import ROOT
from tests.models import tiny_stable_diffusion

CANARY = "cAnArY7f3a"


def commands() -> str:
    """The command line of every process of this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(found)


@pytest.mark.timeout(400)
def test_secrets_reach_no_file_no_log_and_no_command_line(tiny_model: Path, s3_endpoint: str, tmp_path: Path) -> None:
    out = f"s3://bkt/{tmp_path.name}"
    options = {"endpoint_url": s3_endpoint, "key": f"AK{CANARY}", "secret": "${env:SECRET_OF_MINE}"}
    stage = {"op": "txt2img", "model": str(tiny_model), "num_inference_steps": 1, "workers": 1}
    job = {"source": {"rows": ["a"]}, "stages": [stage], "sink": {"path": out, "storage_options": options}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    # Short: Ray's sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as logs:
        _look_for_the_canary(tmp_path / "job.yaml", Store(out, {"endpoint_url": s3_endpoint}), Path(logs))


def _look_for_the_canary(job: Path, store: Store, logs: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    run = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "run", str(job)],
        cwd=ROOT,
        env=environ | {"SECRET_OF_MINE": f"{CANARY}-secret", "RAY_TMPDIR": str(logs)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = ""
    while run.poll() is None:
        seen += commands()
        time.sleep(1)
    stdout, stderr = run.communicate()
    assert run.returncode == 0, stderr
    # Ray was seen at work.
    assert "raylet" in seen
    written = b"".join(store.read(name) or b"" for name in store.list(""))
    files = [path.read_bytes() for path in logs.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(written) > 1000
    assert len(files) > 5
    for text in (stdout + stderr, seen):
        assert CANARY not in text
    for data in (written, *files):
        assert CANARY.encode() not in data


class Touch:
    """A pickle that leaves a file behind where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_among_the_weights_is_never_loaded(make_job: Any, tmp_path: Path) -> None:
    model, touched = tmp_path / "model", tmp_path / "touched"
    tiny_stable_diffusion().save_pretrained(model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    body = pickle.dumps(Touch(touched))
    pickle.loads(body)
    assert touched.exists(), "the pickle would do harm"
    touched.unlink()
    weights.unlink()
    for name, write in {
        "diffusion_pytorch_model.bin": lambda path: path.write_bytes(body),
        "diffusion_pytorch_model.pt": lambda path: torch.save({"x": Touch(touched)}, path),
        "diffusion_pytorch_model.safetensors": lambda path: path.write_bytes(body),
    }.items():
        path = weights.with_name(name)
        write(path)
        if path != weights:
            with pytest.raises(JobError, match="safetensors"):
                check(make_job(stage={"model": str(model)}))
        with pytest.raises(Exception, match=r".") as caught:
            Txt2Img(model=str(model)).load(model)
        assert not isinstance(caught.value, AssertionError)
        path.unlink()
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(body)
    for field in ({"lora": str(lora)}, {"textual_inversion": [str(lora)]}):
        with pytest.raises(JobError):
            check(make_job(stage=field))
    assert not touched.exists()


@pytest.mark.parametrize("plan_id", ["../../elsewhere", "/tmp/x", "a/b", "", "."])
def test_an_output_from_a_stranger_names_no_place_outside_of_itself(
    make_job: Any, tmp_path: Path, plan_id: str
) -> None:
    from pipelines.planner import plan

    plan(make_job())
    log = tmp_path / "out" / "_ldm" / "plans" / "0001.json"
    folder = log.parent / json.loads(log.read_text())["plan_id"]
    body = json.loads((folder / "plan.json").read_text()) | {"plan_id": plan_id}
    (folder / "plan.json").write_text(json.dumps(body))
    with pytest.raises(NotWhole, match="is no whole plan"):
        read_plans(Store(str(tmp_path / "out")))
    log.write_text(json.dumps({"plan_id": plan_id}))
    with pytest.raises(NotWhole, match="no whole plan|names a plan that is not there"):
        read_plans(Store(str(tmp_path / "out")))


PROBE = """
import json, os, socket, sys, time, urllib.error, urllib.request
from pathlib import Path
from pipelines.cluster import ray_cluster

def ports():
    listening, found = {}, set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                listening[f"socket:[{fields[9]}]"] = int(fields[1].rpartition(":")[2], 16)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.environ["RAY_AUTH_TOKEN"] in (process / "environ").read_text(errors="replace"):
                found |= {listening[str(fd.readlink())] for fd in (process / "fd").iterdir()
                          if str(fd.readlink()) in listening}
        except OSError:
            continue
    return found

def is_taken():
    # Every node's agent wants this port: beside another Ray on this machine, ours has none and takes no jobs.
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", 52365)) == 0 and 52365 not in ports()

def post(port, path):
    body = b'{"entrypoint": "touch %s"}' % sys.argv[1].encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"})
    try:
        return urllib.request.urlopen(request, timeout=5).status
    except urllib.error.HTTPError as error:
        return error.code
    except Exception:
        return 0

with ray_cluster(None):
    # The agent that takes jobs is the last to listen; of `ray` without its extra `default` there is none.
    until, codes = time.monotonic() + (60 if sys.argv[2] == "True" else 5), {}
    while time.monotonic() < until:
        for port in ports():
            if not any(codes.get(port, ())):
                codes[port] = [post(port, path) for path in ("/api/jobs/", "/api/job_agent/jobs/")]
        if any(401 in some for some in codes.values()) or is_taken():
            break
        time.sleep(1)
    time.sleep(2)
    taken = is_taken()
print(json.dumps({"codes": sorted({code for some in codes.values() for code in some}), "taken": taken}))
"""


def test_no_port_of_a_cluster_of_our_own_takes_a_job_from_a_stranger(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    has_agent = find_spec("aiohttp_cors") is not None
    found = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "owned"), str(has_agent)],
        capture_output=True,
        text=True,
        timeout=150,
        cwd=ROOT,
        env=environ,
    )
    assert found.returncode == 0, found.stderr
    said = json.loads(found.stdout)
    assert said["codes"], "no port was found"
    assert 401 in said["codes"] or said["taken"] or not has_agent, found.stdout
    assert not {200, 201, 202} & set(said["codes"]), found.stdout
    assert not (tmp_path / "owned").exists()
