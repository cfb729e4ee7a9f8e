"""SkyPilot's task, by what its documentation says of one."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from pipelines.cli import app
from pipelines.slices import Slice
from tests.conftest import ROOT

TASK = yaml.safe_load((ROOT / "infra/skypilot/ldm-batch.yaml").read_text())
FIELDS = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
RESOURCES = {"accelerators", "cpus", "memory", "use_spot", "disk_size", "job_recovery", "infra", "image_id", "any_of"}


def test_it_has_only_fields_that_skypilot_has() -> None:
    assert set(TASK) <= FIELDS
    assert set(TASK["resources"]) <= RESOURCES
    assert set(TASK["resources"]["job_recovery"]) <= {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}
    assert all(isinstance(value, str) for value in TASK["envs"].values())
    # Without values here, SkyPilot asks who launches for them.
    assert set(TASK["secrets"].values()) == {None}


@pytest.mark.parametrize("part", ["setup", "run"])
def test_its_commands_are_what_shellcheck_would_write(part: str) -> None:
    found = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([str(found), "--shell=bash", "-"], input=TASK[part], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert set(re.findall(r"\$\{?([A-Z]+)", TASK[part])) <= set(TASK["envs"])


def test_it_runs_what_there_is() -> None:
    assert str(Slice.parse(TASK["envs"]["SLICE"])) == "1/1"
    options = {option for p in get_command(app).commands["run"].params for option in p.opts}  # type: ignore[attr-defined]
    assert set(re.findall(r"--[a-z-]+", TASK["run"])) <= options
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert TASK["envs"]["WHEEL"] == f"ldm_batch-{project['version']}-py3-none-any.whl"
    [extras] = re.findall(r"\$\{WHEEL\}\[(.*)\]", TASK["setup"])
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
