"""A cluster that is not there is one line, soon."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipelines.cluster import reach
from pipelines.errors import RunFailed
from tests.conftest import ROOT, free_port


def test_an_address_where_nobody_answers_is_named_at_once() -> None:
    with pytest.raises(RunFailed, match=r"--address 127.0.0.1:\d+: no Ray cluster answers there .*check host and port"):
        reach(f"127.0.0.1:{free_port()}")


@pytest.mark.parametrize("address", [None, "auto", "local"])
def test_other_addresses_are_left_to_ray(address: str | None) -> None:
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
