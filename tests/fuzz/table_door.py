"""Tables of every format with hostile cells in every column, and damaged bytes; planned, written and read again."""

from __future__ import annotations

import bz2
import csv
import datetime
import decimal
import gzip
import io
import json
import lzma
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from pipelines import manifest
from pipelines.blocks import pack, with_results
from pipelines.job import Job
from pipelines.loading import LoadShard, place
from pipelines.planner import plan
from pipelines.sink import ShardWriter
from pipelines.storage import Store
from tests.fuzz.damage import EDITS, Edit, damage
from tests.fuzz.harness import INSIDE, Door
from tests.fuzz.job_door import PICTURES
from tests.ldm_ops.rows import picture

PNG = f"{PICTURES}/small-blue-star.png"
FINE: dict[str, list[Any]] = {
    "id": ["a", "b", 7, "", None],
    "prompt": ["a red circle", "a star", "é ✓ 🟥", 'a, "b"\nc'],
    "negative_prompt": ["", "blue", None],
    "seed": [1, "2", 2**63 - 1, 0, None],
    "height": [64, "64", 128, None],
    "width": [64, 72.0, "", None],
    "num_inference_steps": [1, "25", 1000, None],
    "guidance_scale": [0, 2.5, "7", None],
    "scheduler": ["ddim", "euler_a", "DPM++ 2M Karras", None],
    "strength": [0.5, "1", 1, None],
    "image": [PNG],
    "mask_image": [PNG, "0,0,8,8", "1,1,60,60"],
    "note": ["x", 1, 2.5, None, True],
    "input.width": [1, None],
    "status": ["ok", "failed"],
}
HOSTILE: list[Any] = [
    *("\0", "\x1b[31m", "a\r\nb", "\u202e", "=1+1", "@SUM(A1)", "-1", "+", "x" * 600, "x" * 200_000, "💥" * 300),
    *("../../etc/passwd", "/dev/null", "/proc/self/environ", "a/b", "..", "", " ", "file:///etc/passwd", "file://x"),
    *("http://169.254.169.254/", "ftp://x/y", "javascript:alert(1)", "<script>", "'; DROP TABLE x;--", "${env:HOME}"),
    *("{{ 7*7 }}", "{% raw %}", "nan", "inf", "-inf", "1e999", "0x10", "1_000", "٣", "1.5", "9" * 400, "9" * 5000),
    *("1,2,3", "9,9,1,1", "0,0,9,9,9", "x.tar#bytes=0-9", f"{PNG}#bytes=0-99", f"{PNG}#bytes=99-0", "none", "null"),
    *("x.parquet#row_group=0&row=0&column=a", f"{PNG}#row_group=0&row=0&column=a", "true", "None", "NaN", "\ufeff"),
    *(-1, 0, 10**9, 2**31, 2**63, 2**64, 10**100, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf, True, False),
    *([], {}, [1, 2], [0, 0, 8, 8], [None], {"a": 1}, {"a": {}}, {"": []}, [[]], [{"a": [1]}, {"a": "x"}], "\ud800"),
]
COLUMNS = [
    *FINE,
    "caption",
    "Prompt",
    " prompt",
    "key",
    "shard",
    "input.status",
    "",
    "x" * 300,
    "\0",
    "a\nb",
    "=x",
    "pixels",
]

STAGES: list[dict[str, Any]] = [
    {"op": "txt2img"},
    {"op": "txt2img", "prompt": "a star", "num_images_per_prompt": 3},
    {"op": "img2img", "height": 64, "width": 64},
    {"op": "inpaint", "strength": 1.0},
    {"op": "encode", "resolution": 64, "bucket_multiple": 8},
    {"op": "embed"},
    {"op": "upscale", "model": "builtin:shapes-x4"},
]
SOURCES: list[dict[str, Any]] = [
    {},
    {},
    {"templates": {"prompt": "{{ note }} {{ seed * 2 }} {{ id[0] }}"}},
    {"templates": {"negative_prompt": "{% for c in note %}{{ c }}{% endfor %}{{ 1 / width }}"}},
    {"matrix": {"guidance_scale": [1, 2], "seed": [1, 2]}},
    {"columns": {"prompt": "caption"}},
    {"pass_through": ["note"]},
    {"pass_through": []},
]
NEEDED = [[], [], ["note", "seed", "id"], ["note", "width"], [], ["caption"], ["note"], []]
AXES = [set(), set(), set(), set(), {"guidance_scale", "seed"}, set(), set(), set()]
FORMATS = ["csv", "tsv", "jsonl", "parquet", "txt"]
PACKED: dict[str, Any] = {"": lambda data: data, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
LAYOUTS = ["files", "webdataset", "parquet"]

Row = dict[str, Any]


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, list[Row], list[Edit], int, int, int]:
    """(ending, rows, edits of the bytes, and which stage, source and layout)."""
    stage, source = draw(st.integers(0, len(STAGES) - 1)), draw(st.integers(0, len(SOURCES) - 1))
    # Mostly what such a job needs, so that its cells are looked at.
    needed = ["prompt", "image", "mask_image", *NEEDED[source]][draw(st.sampled_from([0, 0, 0, 0, 0, 0, 1])) :]
    others = draw(st.lists(st.sampled_from(COLUMNS), max_size=4, unique=True))
    columns = list(dict.fromkeys([*needed, *(name for name in others if name not in AXES[source])]))
    rows: list[Row] = [
        {name: draw(st.sampled_from(FINE.get(name, ["x", 1, None]))) for name in columns}
        for _ in range(draw(st.integers(1, 5)))
    ]
    for _ in range(draw(st.integers(0, 4))):
        draw(st.sampled_from(rows))[draw(st.sampled_from(columns))] = draw(st.sampled_from(HOSTILE))
    ending = draw(st.sampled_from(FORMATS)) + draw(st.sampled_from(["", "", "", "", "", *PACKED]))
    edits = draw(EDITS) if draw(st.integers(0, 5)) == 0 else []
    return ending, rows, edits, stage, source, draw(st.integers(0, len(LAYOUTS) - 1))


def as_bytes(ending: str, rows: list[Row]) -> bytes:
    """The table as others would write it, valid for its format."""
    kind, _, packing = ending.partition(".")
    names = list(rows[0])
    if kind == "jsonl":
        data = "\n".join(json.dumps(row) for row in rows).encode("utf-8", "surrogatepass")
    elif kind == "txt":
        data = "\n".join(str(row.get("prompt")) for row in rows).encode("utf-8", "replace")
    elif kind == "parquet":
        table = pa.table({name: _column([row[name] for row in rows], i) for i, name in enumerate(names)})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        data = buffer.getvalue()
    else:
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter="," if kind == "csv" else "\t")
        writer.writerow(names)
        writer.writerows([["" if v is None else v for v in row.values()] for row in rows])
        data = text.getvalue().encode("utf-8", "replace")
    return bytes(PACKED[f".{packing}" if packing else ""](data))


def _column(values: list[Any], i: int) -> pa.Array:
    """Of the values' own type where they have one; else of types that no CSV has."""
    try:
        array = pa.array(values)
        pq.write_table(pa.table({"x": array}), io.BytesIO())
        return array
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        others = [
            pa.array([decimal.Decimal("1.5")] * len(values)),
            pa.array([datetime.datetime(1, 1, 1)] * len(values), pa.timestamp("us")),
            pa.array([datetime.timedelta(days=1)] * len(values)),
            pa.array([b"\xff\0"] * len(values)),
            pa.array(["x"] * len(values)).dictionary_encode(),
            pa.array([[("a", 1)]] * len(values), pa.map_(pa.string(), pa.int64())),
            pa.array([None] * len(values)),
            pa.array([2**64 - 1] * len(values), pa.uint64()),
            pa.array([datetime.date(9999, 12, 31)] * len(values)),
            pa.array([datetime.time(1)] * len(values)),
        ]
        return others[i % len(others)]


def enter(value: tuple[str, list[Row], list[Edit], int, int, int], folder: Path) -> str:
    ending, rows, edits, stage, source, layout = value
    path = folder / f"t.{ending}"
    path.write_bytes(damage(as_bytes(ending, rows), edits))
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    made = {"model": "builtin:shapes", "batch_size": 2} | STAGES[stage]
    pictures = made["op"] not in ("encode", "embed")
    job = Job.model_validate(
        {
            "source": {"path": str(path), "on_bad_row": "fail"} | SOURCES[source],
            "stages": [made],
            "sink": {"path": str(out)} | ({"layout": LAYOUTS[layout]} if pictures else {}),
        }
    )
    return planned_and_written(job)


def planned_and_written(job: Job) -> str:
    """Plan, load what rows bring along, and commit them with a drawn picture for what a model makes."""
    planned = plan(job)
    assert planned.new is not None
    store = Store(job.sink.path)
    loader = None
    if job.stage.op not in ("txt2img", "embed"):
        from pipelines.loading import image_loader

        loader = image_loader(job.stage, planned.models[0][1], job.source)
    load, fine = LoadShard(store, loader, "", {}), 0
    for shard in planned.new.shards:
        loaded = load(place(shard))
        results = [
            {"status": row["status"], "stage": row["stage"], "error_type": row["error_type"], "error_message": "x"}
            if row["status"]
            else {"status": "ok", "pixels": pack(picture(8, 8))}
            for row in loaded.to_pylist()
        ]
        fine += sum(result["status"] == "ok" for result in results)
        ShardWriter(store, planned.new.plan_id, job.sink, job.layout, "run", "m", "r")(with_results(loaded, results))
    read = manifest.read_manifest(job.sink.path)
    assert read.num_rows == planned.num_rows
    return INSIDE if fine else "no row is fine"


DOOR = Door("tables", tables(), enter)
