"""What a job file may say, and the one line that each mistake gets."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from pipelines.errors import JobError
from pipelines.job import json_schema, load_job, parse_job

ROOT = Path(__file__).parents[2]

GOOD = """\
name: x
source: {path: a.csv, columns: {prompt: caption}}
stages:
  - op: txt2img
    model: builtin:shapes
    num_inference_steps: 25
sink: {path: out/x}
"""


BILLION_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{here}: &{here} [{', '.join([f'*{before}'] * 9)}]\n" for before, here in pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "num_inference_steps: 25",
            "batchsize: 4",
            "job.yaml:6:5: stages.0.batchsize: unknown field; did you mean batch_size?",
        ),
        ("name: x", "nmae: x", "job.yaml:1:1: nmae: unknown field; did you mean name?"),
        ("columns: {", "colums: {", "job.yaml:2:23: source.colums: unknown field; did you mean columns?"),
        ("25", "many", "job.yaml:6:5: stages.0.num_inference_steps: input should be a valid integer"),
        ("25", "-3", "stages.0.num_inference_steps: input should be greater than or equal to 1; got -3"),
        ("num_inference_steps: 25", "scheduler: eulr", "unknown scheduler 'eulr'; did you mean euler or euler_a?"),
        ("num_inference_steps: 25", "guidance_scale: .nan", "stages.0.guidance_scale: input should be a finite number"),
        ("{prompt: caption}", "{promt: caption}", "source.columns.promt: input should be 'id', 'prompt'"),
        ("path: a.csv, ", "", "job.yaml:2:1: source: give either path or rows"),
        ("path: a.csv", "path: a.csv, rows: [x]", "source: give either path or rows"),
        ("op: txt2img", "op: txt3img", "job.yaml:4:5: stages.0.op: got 'txt3img'; did you mean txt2img?"),
        ("sink: {path: out/x}", "", "sink: missing; it is needed"),
        ("out/x", '"${env:NOT_SET}"', "job.yaml:7:14: the environment variable NOT_SET is not set; set it, or write"),
        ("name: x", "name: [x", "not valid YAML"),
        (
            "out/x",
            "${env:NOT_SET}",
            "; put quotes around ${…} between braces",
        ),
        ("name: x", "name: x\nname: y", "job.yaml:2:1: name is given twice; keep one"),
        ("name: x", "name: ../x", "name: string should match pattern"),
        ("path: a.csv", "path: 'http://u:pw@h/a.csv'", "source.path: holds a password; give it in storage_options"),
        ("out/x", "'s3:/b/x'", "sink.path: s3:/b/x: a URL has two slashes, as in s3://bucket/prefix"),
        ("out/x", "'s3://'", "sink.path: s3:// names no place; use a folder, file:///folder or s3://bucket/prefix"),
        ("out/x", "'http://h/x'", "sink.path: http://h/x: nothing can be written over http; use a folder or s3://"),
        ("out/x", "'~/x'", "~ is not expanded here; write ${env:HOME}, or the whole path"),
        ("name: x", "name: !!python/object:os.system x", "not valid YAML: could not determine a constructor"),
    ],
)
def test_a_mistake_is_one_line_with_its_place_and_the_way_out(old: str, new: str, message: str) -> None:
    with pytest.raises(JobError) as caught:
        parse_job(GOOD.replace(old, new), environ={})
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty; start from `ldm-batch init`"),
        ("- a\n", "expected a mapping"),
        ("a: " + "[" * 60 + "]" * 60, "nested deeper than 20 levels"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested deeper than 20 levels"),
        ("a: &a [x]\nb: [" + "*a, " * 200 + "]", "200 aliases; at most 100"),
        (BILLION_LAUGHS, "aliases expand to more than"),
        ("a: " + "x" * (1 << 20), "a job file may have at most"),
        ("a: " + "[" * 500_000, "nested deeper than 20 levels"),
        ("a: !!bool maybe", "'maybe' is no bool"),
        ("a: !!timestamp x", "'x' is no timestamp"),
        ("a: 0x" + "f" * 5000, "a whole number of 20000 bits"),
    ],
)
def test_a_hostile_file_costs_an_error_and_no_more(text: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        parse_job(text)


def test_the_environment_fills_in_values_and_defaults() -> None:
    text = GOOD.replace("25", "${env:STEPS:-30}").replace("out/x", '"s3://${env:BUCKET}/x"')
    assert parse_job(text, environ={"BUCKET": "b"}).stage.num_inference_steps == 30
    job = parse_job(text, environ={"BUCKET": "b", "STEPS": "12"})
    assert (job.stage.num_inference_steps, job.sink.path) == (12, "s3://b/x")


def test_set_overrides_any_field() -> None:
    job = parse_job(
        GOOD, overrides=["stages.0.num_inference_steps=30", "sink.path=elsewhere", "source.matrix.seed=[1, 2]"]
    )
    assert (job.stage.num_inference_steps, job.sink.path, job.source.matrix) == (30, "elsewhere", {"seed": [1, 2]})


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stages.3.model=x", "stages.3: no such item; the list has 1 (from 0)"),
        ("seed", "expected path=value"),
        ("name=\udcff", "not UTF-8 text"),
        ("name.x=1", "name is a value, not a section"),
        ("stages.0.modle=x", "stages.0.modle: unknown field; did you mean model?"),
    ],
)
def test_a_wrong_override_says_so(assignment: str, message: str) -> None:
    with pytest.raises(JobError) as caught:
        parse_job(GOOD, overrides=[assignment])
    assert message in str(caught.value)


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no such job file; `ldm-batch init` writes one"):
        load_job(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(JobError, match="cannot be read as UTF-8"):
        load_job(tmp_path / "bytes.yaml")
    with pytest.raises(JobError, match="is a folder"):
        load_job(tmp_path)


def test_what_is_recorded_holds_no_storage_options() -> None:
    text = GOOD.replace("out/x}", "s3://b/x, storage_options: {key: k, secret: CANARY}}")
    job = parse_job(text)
    assert job.sink.storage_options["secret"] == "CANARY"
    assert "CANARY" not in job.resolved_yaml()
    assert parse_job(job.resolved_yaml()).output_settings() == job.output_settings()


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_jobs_are_valid_and_point_editors_at_the_schema(path: Path) -> None:
    load_job(path)
    header = "# yaml-language-server: $schema="
    assert any(line.startswith(header) for line in path.read_text().splitlines()[:4])


def test_the_shipped_schema_is_the_one_that_the_command_prints() -> None:
    assert json.loads((ROOT / "jobs" / "job.schema.json").read_text()) == json_schema()
    assert json_schema()["additionalProperties"] is False


def test_the_schema_accepts_the_shipped_jobs_and_refuses_a_typo() -> None:
    import jsonschema

    data = yaml.safe_load((ROOT / "jobs" / "txt2img.yaml").read_text())
    jsonschema.validate(data, json_schema())
    data["stages"][0]["batchsize"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, json_schema())
