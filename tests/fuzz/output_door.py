"""What an output holds, damaged: parts, plans, heartbeats, tars, latents; and every command that reads it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import socket
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from PIL import Image

from pipelines.blocks import pack, with_results
from pipelines.dead_letters import Retry, groups
from pipelines.embeddings_file import EmbeddingsHead
from pipelines.errors import LdmError
from pipelines.gc import gc
from pipelines.heartbeat import RUNS, Heartbeat, refuse_if_alive
from pipelines.job import Job, Source
from pipelines.latents_file import LatentsHead
from pipelines.loading import LoadShard, place
from pipelines.manifest import read_manifest
from pipelines.planner import plan
from pipelines.plans import read_plans
from pipelines.sink import ShardWriter
from pipelines.source import read_source
from pipelines.storage import Store
from pipelines.totals import count, status, unfinished, write_success
from pipelines.verify import verify
from tests.fuzz.damage import EDITS, damage
from tests.fuzz.harness import INSIDE, Door, unfit
from tests.ldm_ops.rows import picture

Files = dict[str, bytes]
SINKS: list[dict[str, Any]] = [
    {"thumbnails": 32},
    {"layout": "webdataset"},
    {"layout": "parquet"},
    {"latents_format": "parquet"},
    {"latents_format": "safetensors"},
    {},
]
LATENTS = LatentsHead("m", "r", "mode", "float32", (4, 8, 8), 1.0, 0.0, 8)
EMBEDDINGS = EmbeddingsHead("m", "r", "StableDiffusionPipeline", "fp16", False, None)


@cache
def output(which: int) -> Files:
    """A whole output of some layout, with a row that failed: path → bytes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        _write(out, which)
        return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def _write(out: Path, which: int) -> None:
    op = "encode" if which in (3, 4) else "embed" if which == 5 else "txt2img"
    images = [{"image": str(out.parent / f"{i}.png"), "prompt": f"a star {i}", "note": i} for i in range(6)]
    for i, row in enumerate(images):
        Image.fromarray(picture(64, 64, seed=i)).save(row["image"])
    rows = images if op == "encode" else [{"prompt": row["prompt"], "note": row["note"]} for row in images]
    stage = {"op": op, "model": "builtin:shapes", "batch_size": 2}
    job = Job.model_validate(
        {
            "source": {"rows": rows},
            "stages": [stage],
            "sink": {"path": str(out), **SINKS[which]},
            "batches_per_shard": 2,
        }
    )
    planned = plan(job)
    assert planned.new is not None
    store = Store(str(out))
    with Heartbeat(store, "run-1"):
        store.write(f"{RUNS}/run-1/ended.json", b'{"exit_code": 0, "totals": {"num_ok": 5}}')
    dead = {"run_id": "run-2", "host": socket.gethostname(), "boot": "b", "pid": 1, "born": "1"}
    store.write(f"{RUNS}/run-3/heartbeat.json", b"{}")
    store.write(f"{RUNS}/run-2/heartbeat.json", json.dumps(dead).encode())
    encoder = {"encode": LATENTS, "embed": EMBEDDINGS}.get(op)
    for shard in planned.new.shards:
        table = LoadShard(store, None, "", {})(place(shard))
        results: list[dict[str, Any]] = []
        for i, _ in enumerate(table.to_pylist()):
            made = {
                "txt2img": {"pixels": pack(picture(64, 64))},
                "encode": {"latents_data": pack(np.full((4, 8, 8), i, np.float32))},
                "embed": {
                    "embeds_data": pack(np.full((3, 5), i, np.float16)),
                    "pooled_data": pack(np.ones(7, np.float16)),
                },
            }[op]
            results.append({"status": "ok", **made})
        results[-1] = {"status": "failed", "stage": op, "error_type": "model.nan", "error_message": "x"}
        ShardWriter(store, planned.new.plan_id, job.sink, job.layout, "run-1", "m", "r", encoder)(
            with_results(table, results)
        )
    write_success(store, count(store, read_plans(store)))


LEAVES: list[Any] = [None, "", "x", "../../x", "\x1b[2J", -1, 0, 1, 10**30, 1.5, True, [], {}, [1], {"a": 1}, "999999"]
CHANGES = ["json", "table", "bytes", "bytes", "gone", "twice"]

Change = tuple[str, int, int, int, list[tuple[str, int, int]]]


@st.composite
def outputs(draw: st.DrawFn) -> tuple[int, list[Change], list[str]]:
    """(which output, what becomes of its files, who looks at it)."""
    numbers = st.integers(0, 1 << 16)
    changes = st.tuples(st.sampled_from(CHANGES), numbers, numbers, st.integers(0, len(LEAVES) - 1), EDITS)
    looks = draw(st.lists(st.sampled_from(sorted(LOOKS)), min_size=1, max_size=2, unique=True))
    return draw(st.integers(0, len(SINKS) - 1)), draw(st.lists(changes, min_size=1, max_size=2)), looks


def changed(files: Files, change: Change) -> Files:
    how, which, where, leaf, edits = change
    chosen = [
        path
        for path in files
        if how in ("bytes", "gone", "twice")
        or path.endswith(".json" if how == "json" else ".parquet")
        or (how == "json" and path == "_SUCCESS")
    ]
    path = chosen[which % len(chosen)]
    data = files[path]
    if how == "gone":
        return {other: data for other, data in files.items() if other != path}
    if how == "twice":
        # Under another's name, as a careless copy does.
        return files | {chosen[where % len(chosen)]: data}
    if how == "json":
        try:
            value = json.loads(data)
        except ValueError:
            return files
        ways = _ways(value)
        data = json.dumps(_replaced(value, ways[where % len(ways)], LEAVES[leaf])).encode()
    elif how == "table":
        with contextlib.suppress(pa.ArrowException, OSError):  # Damaged before.
            data = _other_table(data, where, LEAVES[leaf])
    return files | {path: damage(data, edits) if how == "bytes" else data}


def _ways(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(found for step, child in steps for found in _ways(child, (*way, step)))]


def _replaced(value: Any, way: tuple[Any, ...], leaf: Any) -> Any:
    if not way:
        return leaf
    if isinstance(value, dict):
        return {name: _replaced(one, way[1:], leaf) if name == way[0] else one for name, one in value.items()}
    return [_replaced(one, way[1:], leaf) if i == way[0] else one for i, one in enumerate(value)]


def _other_table(data: bytes, where: int, leaf: Any) -> bytes:
    """A whole Parquet file with other columns, rows, types or words about itself."""
    table = pq.read_table(pa.BufferReader(data))
    column = where // 8 % table.num_columns
    name = table.column_names[column]
    metadata = dict(table.schema.metadata or {})
    kind = where % 8
    if kind == 0:
        table = table.drop_columns([name])
    elif kind == 1:
        table = table.set_column(column, name, pa.array(["x"] * table.num_rows))
    elif kind == 2:
        table = table.set_column(column, name, pa.nulls(table.num_rows))
    elif kind == 3:
        table = table.slice(1)
    elif kind == 4:
        table = pa.concat_tables([table, table])
    elif kind == 5:
        table = table.rename_columns(["x" if other == name else other for other in table.column_names])
    else:
        for key in [key for key in metadata if key.startswith(b"ldm_batch")]:
            try:
                value = json.loads(metadata[key])
            except ValueError:
                continue
            ways = _ways(value)
            metadata[key] = json.dumps(_replaced(value, ways[column % len(ways)], leaf)).encode()
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


def enter(value: tuple[int, list[Change], list[str]], folder: Path) -> str:
    which, changes, looks = value
    files = output(which)
    for change in changes:
        files = changed(files, change)
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    for path, data in files.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(data)
    store, url = Store(str(out)), str(out)
    said: dict[str, str] = {}
    for name in ["verify", *looks]:
        try:
            LOOKS[name](store, url)
        except LdmError as error:
            if unfit(str(error)) is not None:
                raise
            said[name] = type(error).__name__
    # Whoever reports on an output has read it, however little of it is whole.
    return said.get("verify", INSIDE)


def _load(store: Store, url: str) -> None:
    """The rows of every shard, as a retry would take them up."""
    for one in read_plans(store):
        for shard in one.shards:
            LoadShard(store, None, "r", {})(place(shard, frozenset({"x"})))


def _decode(store: Store, url: str) -> None:
    """Latents, as a job that decodes them would load them."""
    source = Source(path=url, format="manifest")
    for chunk in read_source(source):
        for i, where in enumerate(chunk.columns.get("latents", [])):
            if where is not None:
                row = {"latents": f"{url}/{where}", "image_version": chunk.versions["latents"][i], "problem": None}
                LoadShard(store, None, "r", {}).load(pa.Table.from_pylist([row]))


LOOKS: dict[str, Callable[[Store, str], object]] = {
    "verify": lambda store, url: verify(url, deep=True),
    "list": lambda store, url: verify(url),
    "status": lambda store, url: status(url),
    "errors": lambda store, url: groups(url),
    "retry": lambda store, url: Retry()(store, read_plans(store)),
    "gc": lambda store, url: gc(url, older_than_s=0.0, dry_run=True),
    "read": lambda store, url: read_manifest(url),
    "run": lambda store, url: refuse_if_alive(store, "run-3", False, False, "wait"),
    "left": lambda store, url: [unfinished(store, one) for one in read_plans(store)],
    "success": lambda store, url: write_success(store, count(store, read_plans(store))),
    "load": _load,
    "decode": _decode,
}

DOOR = Door("outputs", outputs(), enter)
