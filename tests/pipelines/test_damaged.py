"""What fuzzing found: a damaged file of an output is told in one line, and costs no more than its rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.dead_letters import Retry, groups
from pipelines.errors import LdmError, NotWhole, RunAlive, told_by
from pipelines.heartbeat import refuse_if_alive
from pipelines.image_source import read_earlier
from pipelines.latents_file import NotLatents, read_latents
from pipelines.loading import LoadShard
from pipelines.manifest import read_manifest, read_rows
from pipelines.plans import job_of, read_plans, read_shard
from pipelines.remembered import Memory
from pipelines.storage import Store
from pipelines.totals import count, status, write_success
from pipelines.verify import damage, verify
from tests.fuzz.output_door import output

FILES, LATENTS, SAFETENSORS = 0, 3, 4


@pytest.fixture
def held(tmp_path: Path) -> Callable[..., Path]:
    """An output of drawn pictures or latents, with a row in each shard that failed."""

    def make(which: int = FILES) -> Path:
        for path, data in output(which).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(data)
        return tmp_path

    return make


def page(path: Path, column: str) -> int:
    """Where the data of a column lie."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    [chunk] = [group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == column]
    # Behind the pages' headers.
    return int((chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 2)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def first(out: Path, pattern: str) -> Path:
    return sorted(out.glob(pattern))[0]


@pytest.mark.parametrize("column", ["status", "sha256", "prompt", "seed", "created_at"])
def test_a_bit_that_flips_in_any_column_of_a_part_is_found_and_named(held: Callable[..., Path], column: str) -> None:
    out = held()
    part = first(out, "manifest/*/*.parquet")
    flip(part, page(part, column))
    looks: list[Callable[[], object]] = [
        lambda: status(str(out)),
        lambda: groups(str(out)),
        lambda: read_manifest(out),
        lambda: list(read_earlier(str(out), {})),
        lambda: Retry()(Store(str(out)), read_plans(Store(str(out)))),
    ]
    for look in looks:
        # Whoever reads that column; who does not may go on.
        with suppress(NotWhole):
            look()
    with pytest.raises(NotWhole, match=r"000000.parquet is damaged .*; `ldm-batch repair` makes its rows again"):
        read_manifest(out)
    assert read_rows(part.read_bytes()) == {}
    report = verify(str(out))
    assert any("000000.parquet is damaged" in fault for fault in report.faults)
    [(at, keys)] = damage(Store(str(out))).items()
    assert at[1] == 0
    assert keys is not None
    assert len(keys) == pq.read_metadata(part).num_rows


def test_a_part_whose_columns_are_of_other_types_is_damaged(held: Callable[..., Path]) -> None:
    out = held()
    part = first(out, "manifest/*/*.parquet")
    table = pq.read_table(part)
    at = table.column_names.index("num_bytes")
    pq.write_table(table.set_column(at, "num_bytes", pa.array(["x"] * table.num_rows)), part)
    with pytest.raises(NotWhole, match="its column 'num_bytes' is none of a manifest"):
        status(str(out))


@pytest.mark.parametrize("name", ["num_ok", "plan_id"])
def test_a_part_that_says_nonsense_of_itself_is_not_whole(held: Callable[..., Path], name: str) -> None:
    out = held()
    part = first(out, "manifest/*/*.parquet")
    table = pq.read_table(part)
    head = json.loads(table.schema.metadata[b"ldm_batch"]) | {name: [1]}
    pq.write_table(table.replace_schema_metadata({b"ldm_batch": json.dumps(head)}), part)
    with pytest.raises(NotWhole, match="is not a whole part"):
        status(str(out))


def test_planned_rows_that_are_damaged_or_gone_are_told(held: Callable[..., Path]) -> None:
    store = Store(str(held()))
    rows = first(Path(store.url), "_ldm/plans/*/rows-*.parquet")
    whole = rows.read_bytes()
    [shard, *_] = read_plans(store)[0].shards
    flip(rows, page(rows, "seed"))
    with pytest.raises(NotWhole, match=r"rows-00000.parquet is damaged .* choose a new sink.path"):
        read_shard(store, shard.file, shard.index)
    rows.write_bytes(whole)
    names = ["kez" if name == "key" else name for name in pq.read_table(rows).column_names]
    pq.write_table(pq.read_table(rows).rename_columns(names), rows)
    with pytest.raises(NotWhole, match="is damaged"):
        read_shard(store, shard.file, 0)
    rows.write_bytes(whole)
    with pytest.raises(NotWhole, match="does not hold shard 63; .* choose a new sink.path"):
        read_shard(store, shard.file, 63)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_rows", None),
        ("job", []),
        ("plan_id", 7),
        ("shards", {"num_rows": [10**30], "cost": [1], "keys_digest": ""}),
    ],
)
def test_a_plan_that_is_none_is_told(held: Callable[..., Path], field: str, value: Any) -> None:
    store = Store(str(held()))
    path = first(Path(store.url), "_ldm/plans/*/plan.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(NotWhole, match="is no whole plan of ldm-batch"):
        read_plans(store)


def test_a_plan_whose_job_no_version_of_ours_wrote_is_told(held: Callable[..., Path]) -> None:
    store = Store(str(held()))
    [plan] = read_plans(store)
    plan.job["stages"][0]["op"] = "draw"
    with pytest.raises(NotWhole, match="holds a job that this version cannot read"):
        job_of(plan)


def test_heartbeats_and_last_words_that_cannot_be_read_stop_nobody_from_looking(held: Callable[..., Path]) -> None:
    out = held()
    for text in ("{", "[]", '{"host": 1}', '{"run_id": "\\ud800"}', ""):
        (out / "_ldm" / "runs" / "run-1" / "ended.json").write_text(text)
        (out / "_ldm" / "runs" / "run-2" / "heartbeat.json").write_text(text)
        (out / "_SUCCESS").write_text(text)
        totals, runs = status(str(out))
        assert runs[0]["ended"] in ({}, {"host": 1}, {"run_id": "\ud800"})
        with pytest.raises(RunAlive, match="run run-2 on a host that it does not name"):
            refuse_if_alive(Store(str(out)), "run-3", False, False, "wait")
        write_success(Store(str(out)), totals)
        assert json.loads((out / "_SUCCESS").read_text())["digest"] == totals.digest


@pytest.mark.parametrize("which", [LATENTS, SAFETENSORS])
def test_latents_of_which_a_bit_has_flipped_are_not_decoded(held: Callable[..., Path], which: int) -> None:
    out = held(which)
    file = first(out, "data/*/*.parquet") if which == LATENTS else first(out, "data/*/*.safetensors")
    [chunk] = read_earlier(str(out), {})
    rows = [
        {"latents": f"{out}/{where}", "image_version": version, "problem": None}
        for where, version in zip(chunk.columns["latents"], chunk.versions["latents"], strict=True)
    ]
    load = LoadShard(Store(str(out)), None, "r", {})
    assert {row["status"] for row in load.load(pa.Table.from_pylist(rows)).to_pylist()} == {None}
    flip(file, (page(file, "latents") if which == LATENTS else file.stat().st_size) - 300)
    found = load.load(pa.Table.from_pylist(rows)).to_pylist()
    [bad] = [row for row in found if row["status"] == "failed"]
    assert (bad["stage"], bad["error_type"]) == ("load", "latents.broken")
    assert "than when the plan was made" in bad["error_message"]
    beyond = [rows[0] | {"latents": rows[0]["latents"].rpartition("#")[0] + "#99"}]
    [bad] = load.load(pa.Table.from_pylist(beyond)).to_pylist()
    assert bad["error_type"] == "latents.broken"


@pytest.mark.parametrize(
    "change", [{"dtype": "O"}, {"dtype": "float16"}, {"shape": [4, 8]}, {"shape": [4, 8, -8]}, {"shape": [10**9] * 3}]
)
def test_latents_that_are_not_as_their_file_says_are_none(held: Callable[..., Path], change: dict[str, Any]) -> None:
    file = first(held(LATENTS), "data/*/*.parquet")
    table = pq.read_table(file)
    head = json.loads(table.schema.metadata[b"ldm_batch_latents"]) | change
    pq.write_table(table.replace_schema_metadata({b"ldm_batch_latents": json.dumps(head)}), file)
    with pytest.raises(NotLatents):
        read_latents(file.read_bytes())


@pytest.mark.parametrize("offsets", ["[-9,9]", "[9,1]", "[0.5,9.5]", '["a",3]', "[0,99999999]"])
def test_safetensors_whose_numbers_lie_elsewhere_are_none(held: Callable[..., Path], offsets: str) -> None:
    data = first(held(SAFETENSORS), "data/*/*.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["latents"]["data_offsets"] = json.loads(offsets)
    text = json.dumps(header).encode()
    with pytest.raises(NotLatents):
        read_latents(len(text).to_bytes(8, "little") + text + data[8 + size :])


def test_what_a_message_quotes_cannot_steer_a_terminal() -> None:
    assert str(LdmError("model \x1b[2J\u202e\ud800: none\nnext")) == "model \ufffd[2J\ufffd\ufffd: none\nnext"


def test_a_memory_of_a_table_that_is_damaged_is_none(held: Callable[..., Path]) -> None:
    store = Store(str(held()))
    [plan] = read_plans(store)
    memory = Memory(store, job_of(plan), plan.settings, None)
    assert memory.path is not None
    for text in ("{", "[]", '{"plan_ids": [[]], "num_source_rows": 1}'):
        store.write(memory.path, text.encode())
        assert memory.recall([plan]) is None
    assert count(store, [plan]).num_planned == 6


def test_the_error_of_a_task_is_known_again_by_its_traceback() -> None:
    text = (
        "  File x\npipelines.errors.NotWhole: a is gone; b\n\nThe above exception was the direct cause\nray.Other: no"
    )
    found = told_by(text)
    assert (type(found), str(found)) == (NotWhole, "a is gone; b")
    assert told_by("pipelines.errors.Unknown: x") is None
