"""A cluster that is not there is one line, soon."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from pipelines.cluster import knock, ray_cluster, reach, refuse_other_doors
from pipelines.errors import JobError, RunFailed
from tests.conftest import ROOT, free_port


def test_an_address_where_nobody_answers_is_named_at_once() -> None:
    with pytest.raises(RunFailed, match=r"--address 127.0.0.1:\d+: no Ray cluster answers there .*check host and port"):
        reach(f"127.0.0.1:{free_port()}")


def test_a_python_that_is_too_old_is_one_line() -> None:
    script = "import sys; sys.version_info = (3, 10, 4); import pipelines"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.endswith("ldm-batch needs 3.11; give the cluster a newer one\n")
    assert len(found.stderr.splitlines()) == 1


def test_a_port_where_somebody_else_answers_is_named_at_once() -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(RunFailed, match=r"what answers there is no Ray cluster; check the port: .* dashboard's$"):
            reach(f"127.0.0.1:{server.server_port}")
        server.shutdown()


def test_auto_where_no_cluster_is_found_is_named_before_anything_is_planned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # As on a machine with no Ray but that of these tests.
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RunFailed, match="--address auto: no Ray cluster is found on this machine; start a node"):
        knock("auto")


@pytest.mark.parametrize("address", ["nonsense", "a b:1", "head:", "head:123456", "tcp://head:6379", ";touch x"])
def test_what_is_no_address_is_refused_before_anybody_is_asked(address: str) -> None:
    with pytest.raises(JobError, match="no address of a Ray cluster; give host:port of its head") as caught:
        refuse_other_doors(address)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("address", ["auto", "local"])
def test_other_addresses_are_left_to_ray(address: str) -> None:
    reach(address)


def test_nobody_joins_a_cluster_of_our_own_without_its_token() -> None:
    script = """
import os, subprocess, sys
from pipelines.cluster import ray_cluster
with ray_cluster(None):
    import ray
    address = ray.get_runtime_context().gcs_address
    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    join = f"import ray; ray.init(address={address!r}); print('joined')"
    found = subprocess.run([sys.executable, "-c", join], env=stranger, capture_output=True, text=True, timeout=60)
    print(found.returncode, found.stdout.strip(), "Unauthenticated" in found.stderr + found.stdout)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    code, *said = found.stdout.split()
    assert code != "0", found.stdout
    assert said == ["True"]


def test_a_cluster_that_somebody_left_on_this_machine_is_not_joined_unasked() -> None:
    script = """
from pipelines.cluster import ray_cluster
with ray_cluster(None):
    import ray
    print(len(ray.nodes()))
"""
    # Not in pytest's folder: Ray's sockets want a short path.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        # Where `ray start` notes what it started.
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray/ray_current_cluster").write_text(f"127.0.0.1:{free_port()}")
        environ = {**os.environ, "RAY_TMPDIR": folder}
        found = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT, env=environ
        )
    assert found.stdout.split() == ["1"], found.stderr


def test_a_cluster_that_the_environment_names_is_joined_and_is_named_where_it_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(RunFailed, match=r"RAY_ADDRESS 127.0.0.1:\d+: no Ray cluster answers"), ray_cluster(None):
        pass
