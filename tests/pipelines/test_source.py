"""Every format gives the same rows; every broken table gives one line."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import manifest
from pipelines.errors import JobError, StorageError
from pipelines.job import Source
from pipelines.source import read_source

ROWS = [{"prompt": "a red circle", "note": 'über, "quoted"\nline'}, {"prompt": "a blue star", "note": "x"}]


def write(path: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    kind = path.suffixes[0]
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == ".txt":
        path.write_text("\n".join(row["prompt"] for row in rows) + "\n\n")
    else:
        with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def rows(**source: Any) -> list[dict[str, Any]]:
    return [
        {name: column[i] for name, column in chunk.columns.items()}
        for chunk in read_source(Source(**source))
        for i in range(chunk.num_rows)
    ]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet", "t.csv.gz"])
def test_every_table_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert rows(path=str(write(tmp_path / name))) == ROWS


def test_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    assert [row["prompt"] for row in rows(path=str(write(tmp_path / "t.txt")))] == ["a red circle", "a blue star"]


def test_rows_may_stand_in_the_job_itself() -> None:
    assert rows(rows=["a", {"prompt": "b", "seed": 3}]) == [{"prompt": "a", "seed": None}, {"prompt": "b", "seed": 3}]


def test_globs_and_lists_read_every_file_in_order(tmp_path: Path) -> None:
    for i in (2, 1, 3):
        write(tmp_path / f"part-{i}.csv", [{"prompt": f"p{i}"}])
    assert [r["prompt"] for r in rows(path=str(tmp_path / "part-*.csv"))] == ["p1", "p2", "p3"]
    listed = [str(tmp_path / "part-3.csv"), str(tmp_path / "part-1.csv")]
    assert [r["prompt"] for r in rows(path=listed)] == ["p3", "p1"]


@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "t.jsonl"])
def test_tables_are_read_from_object_storage(tmp_path: Path, s3_options: dict[str, Any], name: str) -> None:
    url = f"s3://bkt/source/{name}"
    with fsspec.open(url, "wb", **s3_options) as file:
        file.write(write(tmp_path / name).read_bytes())
    assert rows(path=url, storage_options=s3_options) == ROWS
    assert rows(path=url.replace("/t.", "/?."), storage_options=s3_options) == ROWS


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfprompt\na\n")
    assert rows(path=str(tmp_path / "t.csv")) == [{"prompt": "a"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "the table is empty; the first line must name the columns"),
        ("t.csv", b"prompt,prompt\na,b\n", "column 'prompt' stands twice in the header"),
        ("t.csv", b"prompt,x\na,b,c\n", r"t.csv row 1: 3 fields, the header has 2; put quotes"),
        ("t.csv", b'prompt\n"a', "unexpected end of data; check the quotes"),
        ("t.csv", b"prompt\n\xff\xfe\n", "not UTF-8"),
        ("t.jsonl", b'{"prompt": "a"}\n{oops\n', "t.jsonl line 2: not valid JSON"),
        ("t.jsonl", b'["a"]\n', "t.jsonl line 1: a list, not an object"),
        ("t.jsonl", b'{"custom_id": "a", "body": {"prompt": "a", "n": -1}}', "t.jsonl line 1: n is -1; a whole number"),
        ("t.parquet", b"PAR1 not really", "not a Parquet file"),
        ("t.xlsx", b"", "unknown ending '.xlsx'; one of .csv, .tsv"),
        ("t.csv.gz", b"not gzip", "cannot be read"),
        ("t.csv.gz", gzip.compress(b"prompt\na red circle\n" * 99, mtime=0)[:-9], "cannot be read .*is the copy whole"),
        ("t.csv.xz", b"not xz", "cannot be read"),
        ("t.csv.zst", b"", "unknown ending '.zst'"),
        ("t.jsonl", b'{"prompt": "a", "x": ' + b"9" * 5000 + b"}", "t.jsonl line 1: not valid JSON"),
    ],
)
def test_a_broken_table_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(JobError, match=message):
        rows(path=str(tmp_path / name))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.csv", "no such file"),
        ("none", "none: no such file or folder"),
        ("none/", "no such folder"),
        ("*.csv", "no file matches"),
        (".", "no image there .* name its tars"),
    ],
)
def test_a_path_without_a_table_says_so(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        rows(path=f"{tmp_path}/{path}")


@pytest.mark.parametrize(("format", "pattern"), [("webdataset", r"\*.tar"), ("csv", r"\*.csv"), ("text", r"\*.txt")])
def test_a_folder_in_place_of_files_is_told_how_to_name_them(tmp_path: Path, format: str, pattern: str) -> None:
    with pytest.raises(JobError, match=f"is a folder; name a file, or a pattern such as {tmp_path}/{pattern}$"):
        rows(path=f"{tmp_path}/", format=format)


def test_a_missing_object_says_so(s3_options: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="no such file"):
        rows(path="s3://bkt/nowhere/t.csv", storage_options=s3_options)


def test_openai_batch_requests_are_rows(tmp_path: Path) -> None:
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/images", "body": {"prompt": "a cat", "size": "64x128"}},
        {"custom_id": "b", "body": {"model": "x", "prompt": "a dog", "n": 2, "seed": 3}},
    ]
    (tmp_path / "batch.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    found = rows(path=str(tmp_path / "batch.jsonl"))
    assert [row["id"] for row in found] == ["a", "b#0", "b#1"]
    assert (found[0]["prompt"], found[0]["width"], found[0]["height"]) == ("a cat", "64", "128")
    assert (found[1]["prompt"], found[1]["seed"]) == ("a dog", 3)


def test_a_folder_may_have_brackets_links_and_dead_links(tmp_path: Path) -> None:
    folder = tmp_path / "photos [2024]"
    (folder / "below").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in (folder / "a.png", folder / "below" / "b.png", tmp_path / "other" / "c.png"):
        name.write_bytes(b"x")
    (folder / "linked").symlink_to(tmp_path / "other")
    (folder / "loop").symlink_to(folder)
    (folder / "dead.png").symlink_to(tmp_path / "nowhere")
    assert [row["id"] for row in rows(path=str(folder))] == ["a.png", "below/b.png", "linked/c.png"]
    assert [row["id"] for row in rows(path=f"{tmp_path}/photos*/*.png")] == [
        "photos [2024]/a.png",
        "photos [2024]/dead.png",
    ]
    twice = rows(path=[str(folder / "below"), str(tmp_path / "other")])
    assert len({row["id"] for row in twice}) == 2


def test_an_earlier_run_is_read_part_by_part_as_if_it_were_one_table(tmp_path: Path) -> None:
    def part(shard: int, tags: list[Any], **more: Any) -> None:
        found = [
            {"key": f"k{shard}{i}", "id": f"r{shard}{i}", "shard": shard, "status": "failed" if tag is None else "ok"}
            | {"uri": f"images/{shard}{i}.png", "sha256": f"{shard}{i}", "prompt": f"p{i}"}
            for i, tag in enumerate(tags)
        ]
        own = {field.name: pa.array([row.get(field.name) for row in found], field.type) for field in manifest.SCHEMA}
        table = pa.table({**own, "tag": tags, **more})
        keys = [row["key"] for row in found]
        head = manifest.PartHead("ab", shard, "x", len(found), 0, 0, 0, manifest.keys_digest(keys))
        path = tmp_path / manifest.part_path("ab", shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(manifest.part_bytes(table, head))

    part(0, [1, None, 2])
    part(1, ["x", "y"], note=["n", "m"])
    part(2, [None])
    whole = [row for row in manifest.read_manifest(tmp_path).to_pylist() if row["status"] == "ok"]
    found = rows(path=str(tmp_path), format="manifest")
    # A column of numbers in one part and of text in another is text everywhere.
    assert [(row["id"], row["tag"], row["note"]) for row in found] == [
        ("r00", "1", None),
        ("r02", "2", None),
        ("r10", "x", "n"),
        ("r11", "y", "m"),
    ]
    for mine, theirs in zip(found, whole, strict=True):
        assert (mine["image"], mine["prompt"]) == (theirs["uri"], theirs["prompt"])
        assert (mine["tag"], mine["note"]) == (theirs["tag"], theirs["note"])


def test_a_wrong_storage_option_is_told_at_once(tmp_path: Path) -> None:
    source = Source(path="s3://bucket/t.csv", storage_options={"nonsense": 1})
    with pytest.raises((JobError, StorageError), match="storage_options: .*nonsense"):
        list(read_source(source))
