"""Pictures inside Parquet files, as Hugging Face datasets keep them."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pipelines.errors import JobError
from pipelines.inputs import BadImage, Loader
from pipelines.job import Job, Source, parse_job
from pipelines.planner import check
from pipelines.source import read_source
from tests.conftest import ROOT

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(shade: int = 0, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (shade, 40, 90)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def job(model: Path, out: Path, op: str = "img2img", **source: Any) -> Job:
    stage = {"op": op, "model": str(model), "num_inference_steps": 4, "batch_size": 2}
    return parse_job(yaml.safe_dump({"source": source, "stages": [stage], "sink": {"path": str(out)}}))


def rows_of(model: Path, out: Path, op: str = "img2img", **source: Any) -> list[dict[str, Any]]:
    table = check(job(model, out, op, **source)).table
    assert table is not None
    return sorted(table.to_pylist(), key=lambda row: str(row["id"]))


def loaded(rows: list[dict[str, Any]], *takes: str, **storage_options: Any) -> list[Any]:
    loader = Loader(frozenset({"image", *takes}), None, 8, "#ffffff", storage_options)
    return loader([{n: r[n] for n in ("image", "mask_image", "image_version", "height", "width")} for r in rows])


def test_a_hugging_face_dataset_comes_in_with_its_pictures(tiny_model: Path, tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (24, 16), (i, 40, 90)) for i in range(6)]
    data = {"image": pictures, "text": [f"a circle {i}" for i in range(6)], "id": [f"r{i}" for i in range(6)]}
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "id": datasets.Value("string")}
    )
    datasets.Dataset.from_dict(data, features=features).to_parquet(tmp_path / "train.parquet", batch_size=2)
    rows = rows_of(tiny_model, tmp_path / "out", path=f"{tmp_path}/*.parquet", columns={"prompt": "text"})
    assert [row["prompt"] for row in rows] == data["text"]
    cells = pq.read_table(tmp_path / "train.parquet")["image"].to_pylist()
    assert [row["image_version"] for row in rows] == [hashlib.sha256(cell["bytes"]).hexdigest() for cell in cells]
    assert rows[5]["image"] == f"{tmp_path}/train.parquet#row_group=2&row=1&column=image"
    assert [one.image[0, 0, 0] for one in loaded(rows)] == [0, 1, 2, 3, 4, 5]


def test_binary_columns_are_pictures_and_masks_where_the_job_says_so_and_pass_through_elsewhere(
    tiny_model: Path, tmp_path: Path
) -> None:
    table = {"id": ["a", "b"], "photo": [png(1), png(2)], "hole": [png(255, "L"), png(0, "L")], "raw": [b"x", b"y"]}
    pq.write_table(pa.table(table | {"prompt": ["p", "q"]}), tmp_path / "t.parquet")
    columns = {"image": "photo", "mask_image": "hole"}
    rows = rows_of(tiny_model, tmp_path / "out", "inpaint", path=str(tmp_path / "t.parquet"), columns=columns)
    assert [row["raw"] for row in rows] == [b"x", b"y"]
    made = loaded(rows, "mask_image")
    assert [one.image[0, 0, 0] for one in made] == [1, 2]
    assert [one.mask_image.shape for one in made] == [(16, 24), (16, 24)]
    assert made[0].mask_image[0, 0] != made[1].mask_image[0, 0]


def test_a_struct_without_bytes_is_a_path(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(png(9))
    cells = [{"bytes": png(7), "path": "elsewhere.png"}, {"bytes": None, "path": "p.png"}]
    table = {"id": ["a", "b"], "image": pa.array(cells, IMAGE), "prompt": ["x", "y"]}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    rows = rows_of(tiny_model, tmp_path / "out", path=str(tmp_path / "t.parquet"))
    assert rows[1]["image"] == str(tmp_path / "p.png")
    assert [one.image[0, 0, 0] for one in loaded(rows)] == [7, 9]


def test_an_empty_cell_is_its_rows_fault(tiny_model: Path, tmp_path: Path) -> None:
    cells = [None, {"bytes": None, "path": None}, {"bytes": png(7), "path": None}]
    table = {"id": ["a", "b", "c"], "image": pa.array(cells, IMAGE), "prompt": ["x", "y", "z"]}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    rows = rows_of(tiny_model, tmp_path / "out", path=str(tmp_path / "t.parquet"), on_bad_row="fail")
    assert [row["problem"] for row in rows] == ["image is empty", "image is empty", None]


@pytest.mark.parametrize("values", [pa.array([1, 2]), pa.array([[1], [2]]), pa.array([{"a": 1}, {"a": 2}])])
def test_a_column_that_can_be_no_picture_is_one_line(tiny_model: Path, tmp_path: Path, values: pa.Array) -> None:
    pq.write_table(pa.table({"image": values, "prompt": ["x", "y"]}), tmp_path / "t.parquet")
    with pytest.raises(
        JobError, match="t.parquet: column 'image' holds .*; an image is a path, a URL, or .* its bytes"
    ) as e:
        rows_of(tiny_model, tmp_path / "out", path=str(tmp_path / "t.parquet"), on_bad_row="fail")
    assert len(str(e.value).splitlines()) == 1


def test_pictures_elsewhere_in_another_file_are_the_same_rows(tiny_model: Path, tmp_path: Path) -> None:
    table = pa.table({"id": ["a", "b"], "image": pa.array([{"bytes": png(i)} for i in (1, 2)]), "prompt": ["x", "y"]})
    keys = []
    for name, one in (("one", table), ("two", table.take([1, 0]))):
        pq.write_table(one, tmp_path / f"{name}.parquet", row_group_size=1)
        rows = rows_of(tiny_model, tmp_path / "out", path=str(tmp_path / f"{name}.parquet"))
        keys.append([row["key"] for row in rows])
    assert keys[0] == keys[1]


def test_a_file_that_changed_or_went_is_a_reason(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table({"id": ["a", "b"], "image": pa.array([{"bytes": png(i)} for i in (1, 2)]), "prompt": ["x", "y"]})
    pq.write_table(table, path)
    rows = rows_of(tiny_model, tmp_path / "out", path=str(path))
    kinds = []
    pq.write_table(table.take([1, 0]), path)
    kinds.append([one.kind for one in loaded(rows)])
    pq.write_table(table.slice(0, 1), path)
    kinds.append([one.kind if isinstance(one, BadImage) else None for one in loaded(rows)])
    path.write_bytes(path.read_bytes()[:-9])
    kinds.append([one.kind for one in loaded(rows)])
    path.unlink()
    kinds.append([one.kind for one in loaded(rows)])
    assert kinds == [["image.changed"] * 2, [None, "image.missing"], ["image.broken"] * 2, ["image.missing"] * 2]


def test_a_row_group_is_read_once_for_all_its_rows_in_a_shard(
    tiny_model: Path, tmp_path: Path, s3_endpoint: str, s3_options: dict[str, Any]
) -> None:
    from tests.faults.proxy import Faults

    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(64)]
    cells = []
    for picture in noise:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    table = pa.table({"id": [f"{i:02d}" for i in range(64)], "image": pa.array(cells, IMAGE), "prompt": ["x"] * 64})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=32)
    url = f"s3://bkt/{tmp_path.name}/t.parquet"
    fsspec.filesystem("s3", **s3_options).pipe_file(url, buffer.getvalue())
    faults = Faults(s3_endpoint)
    rows = rows_of(tiny_model, tmp_path / "out", path=url, storage_options={"endpoint_url": faults.url})
    before = len(faults.seen)
    made = loaded(rows, endpoint_url=faults.url)
    requests = len(faults.seen) - before
    faults.close()
    assert all(np.array_equal(one.image, np.asarray(picture)) for one, picture in zip(made, noise, strict=True))
    assert requests < 16


@pytest.mark.parametrize("where", ["disk", "s3"])
@pytest.mark.parametrize("damage", ["page", "footer"])
def test_a_damaged_file_is_its_rows_fault_wherever_it_lies(
    tiny_model: Path, tmp_path: Path, where: str, damage: str, request: pytest.FixtureRequest
) -> None:
    options: dict[str, Any] = request.getfixturevalue("s3_options") if where == "s3" else {}
    path = f"s3://bkt/{tmp_path.name}/t.parquet" if where == "s3" else str(tmp_path / "t.parquet")
    table = pa.table({"id": ["a", "b"], "image": pa.array([{"bytes": png(i)} for i in (1, 2)]), "prompt": ["x", "y"]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    with fsspec.open(path, "wb", **options) as file:
        file.write(buffer.getvalue())
    rows = rows_of(tiny_model, tmp_path / "out", path=path, storage_options=options)
    broken = bytearray(buffer.getvalue())
    if damage == "page":
        column = pq.read_metadata(buffer).row_group(0).column(1)
        start = column.dictionary_page_offset or column.data_page_offset
        broken[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    else:
        del broken[-9:]
    with fsspec.open(path, "wb", **options) as file:
        file.write(bytes(broken))
    assert [one.kind for one in loaded(rows, **options)] == ["image.broken"] * 2


MEASURE = """
import re, sys
from pathlib import Path
from pipelines.job import Source
from pipelines.parquet_images import read_cells
from pipelines.source import read_source
def peak():  # ru_maxrss begins with the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
start = peak()
rows = sum(chunk.num_rows for chunk in read_source(Source(path=sys.argv[1])))
found = read_cells(sys.argv[1], 0, "image", {3, 200})
print(rows, len(found), (peak() - start) >> 10)
"""


def test_a_row_group_larger_than_the_memory_is_read_piece_by_piece(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    schema = pa.schema([("image", IMAGE)])
    cells = pa.array([{"bytes": rng.bytes(1 << 20), "path": None} for _ in range(240)], IMAGE)
    pq.write_table(
        pa.table([cells], schema=schema),
        tmp_path / "t.parquet",
        row_group_size=240,
        compression="none",
        write_batch_size=4,
    )
    del cells
    script = [sys.executable, "-c", MEASURE, str(tmp_path / "t.parquet")]
    rows, found, mib = map(
        int, subprocess.run(script, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split()
    )
    assert (rows, found) == (240, 2)
    assert mib < 140


def test_a_cell_that_is_a_piece_of_a_file_may_stand_in_any_table(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "all.bin").write_bytes(b"-" * 100 + png(3) + png(4))
    n = len(png(3))
    (tmp_path / "t.csv").write_text(
        f"id,prompt,image\na,x,all.bin#bytes=100-{99 + n}\nb,y,all.bin#bytes={100 + n}-{99 + n + len(png(4))}\n"
    )
    rows = rows_of(tiny_model, tmp_path / "out", path=str(tmp_path / "t.csv"))
    assert [one.image[0, 0, 0] for one in loaded(rows)] == [3, 4]
    (tmp_path / "all.bin").write_bytes(b"-" * 120)
    assert {one.kind for one in loaded(rows)} == {"image.broken"}


def test_a_parquet_file_without_pictures_comes_in_as_before(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b"], "n": [1, 2]}), tmp_path / "t.parquet")
    (chunk,) = read_source(Source(path=str(tmp_path / "t.parquet")))
    assert (chunk.columns, chunk.versions) == ({"prompt": ["a", "b"], "n": [1, 2]}, {})
