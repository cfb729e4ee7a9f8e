"""The README says what the program does."""

from __future__ import annotations

import re

import pytest
from typer.main import get_command

from ldm_ops.schedulers import SCHEDULERS
from pipelines import manifest
from pipelines.cli import app
from pipelines.cluster_section import PARTS, Cluster
from pipelines.job import Job, Sink, Source
from pipelines.stages import STAGES
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_and_option_of_the_readme_exists_and_every_command_is_in_it() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert set(re.findall(r"ldm-batch ([a-z]+)", README)) == set(commands)
    options = {option for command in commands.values() for p in command.params for option in p.opts}
    assert {o for o in re.findall(r"`(--[a-z-]+)", README)} <= options


@pytest.mark.parametrize("model", [Job, Source, Sink, Cluster, *PARTS, *STAGES.values()], ids=lambda m: m.__name__)
def test_every_field_of_a_job_is_in_the_readme(model: type) -> None:
    words = set(re.findall(r"[a-z0-9_]+", README))
    assert set(model.model_fields) <= words | {"stages"}


def test_every_manifest_column_and_scheduler_is_in_the_readme() -> None:
    words = set(re.findall(r"[a-z0-9_+]+", README))
    assert set(manifest.SCHEMA.names) <= words
    assert {name.removesuffix("_karras") for name in SCHEDULERS} <= words


def test_every_file_that_the_readme_links_to_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
