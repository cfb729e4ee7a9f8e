"""One Ray, one S3 server and one set of small models for the whole session; real classes all of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pytest
import yaml

from pipelines.cluster import KEEP_IDLE
from pipelines.job import Job, parse_job
from tests.stores import Server, Unavailable, free_port
from tests.stores.ceph import Ceph, start_ceph
from tests.stores.openstack import start_swift
from tests.stores.rclone import start_rclone

# Before anything imports huggingface_hub: a test that asks a hub is a broken test.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault(*KEEP_IDLE)
# One torch thread, as a worker has: with more, the last bits on a CPU can depend on a row's place in its batch, and two
# test processes would fight over the cores.
os.environ["OMP_NUM_THREADS"] = "1"
# Before Ray starts: its workers inherit them, as they would a user's.
os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}

S = TypeVar("S")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion pipeline of the real classes, random weights, 64 px, a second to load."""
    from tests.models import tiny_stable_diffusion

    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    tiny_stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def poisoned_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with NaN in the embedding of the word `ring`: a prompt that names it gives NaN."""
    import torch

    from tests.models import tiny_stable_diffusion

    pipe = tiny_stable_diffusion()
    token = pipe.tokenizer.convert_tokens_to_ids("ring</w>")
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[token] = float("nan")
    folder = tmp_path_factory.mktemp("models") / "poisoned"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A real local Ray with two CPUs."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def make_job(tiny_model: Path, tmp_path: Path) -> Callable[..., Job]:
    """A job on the tiny model; keywords replace sections (`source=…`) or, with a dict for `stage`, single fields."""

    def make(stage: dict[str, Any] | None = None, sink: str | dict[str, Any] | None = None, **fields: Any) -> Job:
        defaults = {"op": "txt2img", "model": str(tiny_model), "num_inference_steps": 2, "batch_size": 2, "workers": 1}
        target = sink if isinstance(sink, dict) else {"path": sink or str(tmp_path / "out")}
        data = {"source": {"rows": ["a red circle"]}, **fields, "stages": [defaults | (stage or {})], "sink": target}
        return parse_job(yaml.safe_dump(data))

    return make


def start_moto(**environ: str) -> tuple[subprocess.Popen[bytes], str]:
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env={**os.environ, **environ},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(200):
        try:
            urllib.request.urlopen(f"{url}/moto-api/", timeout=1).close()
            return server, url
        except OSError:
            time.sleep(0.1)
    server.kill()
    raise RuntimeError("moto did not start")


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 server with a bucket `bkt`."""
    server, url = start_moto()
    fsspec.filesystem("s3", endpoint_url=url, skip_instance_cache=True).mkdir("bkt")
    yield url
    server.kill()
    server.wait()


@pytest.fixture
def s3_options(s3_endpoint: str) -> dict[str, Any]:
    return {"endpoint_url": s3_endpoint}


@contextmanager
def or_skipped(name: str, start: Callable[[], AbstractContextManager[S]]) -> Iterator[S]:
    with ExitStack() as stack:
        try:
            server = stack.enter_context(start())
        except Unavailable as why:
            pytest.skip(f"no {name} here: {why}")
        yield server


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    """A real object store, which keeps its word on conditional writes."""
    with or_skipped("Ceph", start_ceph) as server:
        yield server


@pytest.fixture(scope="session")
def rclone() -> Iterator[Server]:
    """A store that does not heed conditions."""
    with or_skipped("rclone", start_rclone) as server:
        yield server


@pytest.fixture(scope="session")
def swift() -> Iterator[Server]:
    """A store that looks whether there is an object, and then writes."""
    with or_skipped("Swift", start_swift) as server:
        yield server


@pytest.fixture
def ldm_batch() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line as a user would, in a process of its own."""

    def run(*arguments: str | Path, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipelines", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, **environ},
            capture_output=True,
            text=True,
            timeout=150,
        )

    return run
