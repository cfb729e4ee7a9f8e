"""A real `ray start --head` with its dashboard, job server and metrics agent, as on the head of a cluster."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.cluster import KEEP_IDLE
from tests.conftest import free_port
from tests.faults.processes import family, kill

START_LIMIT_S = 90


@dataclass(frozen=True)
class Head:
    """Where a cluster's doors are, and what opens them."""

    dashboard: str
    gcs: str
    metrics: str
    environ: dict[str, str]


@contextmanager
def head(cpus: int = 2) -> Iterator[Head]:
    """Ray as a machine of its own would have it: another working directory, no PYTHONPATH, nothing of this checkout."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="ldm-"))  # Ray's sockets want a short path.
    # Of the code that a job brings; a cluster's own must not be found before it.
    (folder / "own/pipelines").mkdir(parents=True)
    (folder / "own/pipelines/__init__.py").write_text("raise ImportError('this is the cluster\\'s own code')\n")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ours = ("RAY_", "PYTEST_", "PYTHONPATH", "COV_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environ |= token | dict([KEEP_IDLE]) | {"PYTHONPATH": str(folder / "own"), "RAY_TMPDIR": str(folder)}
    ports = [free_port() for _ in range(4)]
    ray = str(Path(sys.executable).parent / "ray")
    names = ("--port", "--dashboard-port", "--metrics-export-port", "--dashboard-agent-listen-port")
    options = [f"{name}={port}" for name, port in zip(names, ports, strict=True)]
    client = f"--ray-client-server-port={free_port()}"
    command = [ray, "start", "--head", "--block", f"--num-cpus={cpus}", f"--temp-dir={folder}/ray", client, *options]
    process = subprocess.Popen(
        [*command, "--disable-usage-stats", "--object-store-memory=200000000", "--include-dashboard=true"],
        cwd=folder,
        env={**environ, "PATH": f"{Path(sys.executable).parent}:{environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        gcs, dashboard, metrics, _ = ports
        one = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", f"http://127.0.0.1:{metrics}", token)
        _wait_until_jobs_are_taken(one, process)
        yield one
    finally:
        # All at once: asked kindly, it takes half a minute.
        for member in family(process.pid):
            kill(member)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_jobs_are_taken(one: Head, process: subprocess.Popen[bytes]) -> None:
    import time
    import urllib.request

    request = urllib.request.Request(
        f"{one.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {one.environ['RAY_AUTH_TOKEN']}"}
    )
    until = time.monotonic() + START_LIMIT_S
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the head did not start")
