"""Job files: the shipped ones and two rich ones, with fields changed, added and taken away, as YAML and by --set."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from pipelines.job import Job, json_schema, parse_job
from pipelines.planner import check
from tests.fuzz.harness import INSIDE, Door

ROOT = Path(__file__).parents[2]
PICTURES = str(ROOT / "jobs" / "data" / "pictures")
ENVIRON = {"HOME": "/home/x", "EMPTY": "", "BRACE": "}", "NESTED": "${env:HOME}", "LINES": "a\nb: c"}

RICH: list[dict[str, Any]] = [
    {
        "name": "chain",
        "seed": 3,
        "source": {
            "rows": [{"caption": "a red circle", "n": 1, "tag": ["x"]}, {"caption": "a star", "n": 2.5}],
            "templates": {"prompt": "{{ caption }} of {{ n }}"},
            "matrix": {"guidance_scale": [1, 2.5], "seed": [1, 2]},
            "pass_through": ["tag"],
            "on_bad_row": "fail",
        },
        "stages": [
            {"op": "txt2img", "model": "builtin:shapes", "num_inference_steps": 4, "keep": True, "device": "cpu"},
            {"op": "upscale", "model": "builtin:shapes-x4", "num_inference_steps": 2, "tile_px": 64},
        ],
        "sink": {"path": "out/x", "layout": "webdataset", "format": "webp", "quality": 80, "thumbnails": 64},
        "batches_per_shard": 2,
        "max_failed": "1%",
    },
    {
        "source": {
            "rows": [{"prompt": "a star", "image": f"{PICTURES}/small-blue-star.png", "mask_image": "0,0,9,9"}],
            "columns": {"prompt": "prompt"},
            "storage_options": {"key": "x"},
        },
        "stages": [{"op": "inpaint", "model": "builtin:shapes", "strength": 0.5, "vae": "builtin:shapes"}],
        "sink": {"path": "file:///tmp/out", "metadata_jsonl": True, "embed_metadata": "none"},
        "max_failed": 3,
    },
]
SHIPPED = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "jobs").glob("*.yaml"))]
for _job in SHIPPED:
    _job["source"]["path"] = str(ROOT / _job["source"]["path"])
BASES = [*RICH, *SHIPPED]

HOSTILE = st.sampled_from(
    [
        *(
            "",
            " ",
            "x" * 3000,
            "\0",
            "\x1b[2J",
            "a\nb",
            "\u202e",
            "\ud800",
            "é",
            "=1+1",
            "~",
            "..",
            "/dev/null",
            "file://",
        ),
        *(
            "${env:HOME}",
            "${env:EMPTY}",
            "${env:NOWHERE}",
            "${env:NOWHERE:-x}",
            "${env:NESTED}",
            "${env:LINES}",
            "${env:",
        ),
        *("{{ 7*7 }}", "{{ ''.__class__ }}", "{% for i in range(9**9) %}x{% endfor %}", "{{", "{{ 'x' * 10**9 }}"),
        *("none", "auto", "all", "euler", "dpm++_2m_karras", "flow_euler", "cuda:1", "50%", "0%", "100%", "1e9%"),
        *(None, True, False, -1, 0, 1, 2, 63, 64, 1000, 2**31, 2**63, 2**64, 10**80, 0.5, -0.0, 1e308),
        *(math.nan, math.inf, -math.inf, [], {}, [[]], [None], {"a": {}}, {"": ""}, b"\xff\xfe", ["a", 1]),
    ]
)
SCHEMA = json_schema()


def of_schema(schema: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """Values that fit, as far as a schema tells."""
    if "$ref" in schema:
        return of_schema(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], depth)
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return st.one_of([of_schema(one, depth) for one in schema[union]])
    kind = schema.get("type")
    if kind == "integer":
        return st.integers(schema.get("minimum", -5), min(schema.get("maximum", 10**6), 10**6))
    if kind == "number":
        return st.floats(schema.get("minimum", schema.get("exclusiveMinimum", 0)), schema.get("maximum", 1000))
    if kind == "boolean":
        return st.booleans()
    if kind == "null":
        return st.none()
    if kind == "array":
        return st.lists(of_schema(schema.get("items", {}), depth + 1), max_size=2)
    if kind == "object" and depth < 3:
        return st.fixed_dictionaries(
            {}, optional={name: of_schema(one, depth + 1) for name, one in schema.get("properties", {}).items()}
        )
    return st.sampled_from(["a", "prompt", "caption", "image", "seed", "builtin:shapes", "1%", "#ffffff", "x.png"])


def _stage(op: str) -> dict[str, Any]:
    return next(s for name, s in SCHEMA["$defs"].items() if name.lower() == f"{op}stage")


def _fields(job: dict[str, Any]) -> list[tuple[list[Any], dict[str, Any]]]:
    """(way to a section that stands in the job, the schema's fields of it)."""
    found: list[tuple[list[Any], dict[str, Any]]] = [([], SCHEMA["properties"])]
    found += [([name], SCHEMA["$defs"][name.title()]["properties"]) for name in ("source", "sink")]
    found += [(["stages", i], _stage(stage["op"])["properties"]) for i, stage in enumerate(job["stages"])]
    return found


def _ways(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(found for step, child in steps for found in _ways(child, (*way, step)))]


def _section(job: Any, way: Any) -> Any:
    for step in way:
        job = job[step]
    return job


@st.composite
def jobs(draw: st.DrawFn) -> tuple[str, list[str]]:
    """(the file, what --set says)."""
    job = copy.deepcopy(draw(st.sampled_from(BASES)))
    sections = _fields(job)
    assignments = []
    for _ in range(draw(st.integers(0, 3))):
        how = draw(st.sampled_from(["add"] * 5 + ["set"] * 3 + ["hostile", "hostile", "delete", "copy", "rename"]))
        way, properties = draw(st.sampled_from(sections))
        name = draw(st.sampled_from(sorted(properties)))
        ways = _ways(job)[1:]
        if how == "set":
            value = draw(of_schema(properties[name]) | of_schema(properties[name]) | HOSTILE)
            text = draw(st.just(str(value)) | st.just(yaml.safe_dump(value, default_flow_style=True).strip()))
            assignments.append(f"{'.'.join(map(str, [*way, name]))}={text}")
        elif how == "add":
            try:
                _section(job, way)[name] = draw(of_schema(properties[name]))
            except (KeyError, IndexError, TypeError):
                continue
        elif ways:
            chosen = draw(st.sampled_from(ways))
            parent, last = _section(job, chosen[:-1]), chosen[-1]
            if how == "hostile":
                parent[last] = draw(HOSTILE)
            elif how == "delete":
                del parent[last]
            elif how == "copy":
                parent[last] = copy.deepcopy(_section(job, draw(st.sampled_from(ways))))
            elif isinstance(parent, dict):
                parent[draw(st.sampled_from(["", "promt", "0", "a.b", "x" * 500, "\x1b[0m", "op"]))] = parent.pop(last)
    text = yaml.safe_dump(job, sort_keys=False, allow_unicode=True, default_flow_style=draw(st.booleans()))
    for _ in range(draw(st.sampled_from([0] * 9 + [1, 2]))):
        at = draw(st.integers(0, len(text)))
        piece = draw(
            st.sampled_from(
                ["&a ", "*a", "<<: ", "{", "]", "\t", "\n", "? ", "!!python/object:os.system ", "\0", "%", "'"]
            )
        )
        text = text[:at] + piece + text[at + draw(st.integers(0, 3)) :]
    return text, assignments


def _within_reach(job: Job) -> bool:
    """Whether looking at all that the job names takes no network and no walk over this machine's disk."""
    said = [job.source.path] if isinstance(job.source.path, str) else job.source.path or []
    texts = [text for text in _texts(job.model_dump()) if "://" in text and not text.startswith("file:///tmp/out")]
    here = all(path.startswith(f"{ROOT}/jobs/") and ".." not in path and "**" not in path for path in said)
    each = math.prod(map(len, job.source.matrix.values())) * getattr(job.stage, "num_images_per_prompt", 1)
    return here and not texts and each <= 200


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for one in value.values() for text in _texts(one)]
    if isinstance(value, list):
        return [text for one in value for text in _texts(one)]
    return [value] if isinstance(value, str) else []


def enter(value: tuple[str, list[str]], folder: Path) -> str:
    text, assignments = value
    job = parse_job(text, "job.yaml", assignments, ENVIRON)
    job.resolved_yaml()
    if not _within_reach(job):
        return "valid, out of reach"
    check(job)
    return INSIDE


DOOR = Door("job files", jobs(), enter)
