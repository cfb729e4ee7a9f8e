"""Tars of samples: WebDataset's own, img2dataset's two layouts, hostile and damaged ones."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml
from PIL import Image

from pipelines.errors import JobError
from pipelines.inputs import BadImage, Loader
from pipelines.job import Job, Source, parse_job
from pipelines.planner import Planned, check, plan
from pipelines.source import read_source


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (shade, 40, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def job(model: Path, out: Path, **source: Any) -> Job:
    stage = {"op": "img2img", "model": str(model), "strength": 0.5, "num_inference_steps": 4, "batch_size": 2}
    return parse_job(yaml.safe_dump({"source": source, "stages": [stage], "sink": {"path": str(out)}}))


def planned_rows(planned: Planned) -> dict[str, dict[str, Any]]:
    assert planned.table is not None
    return {row["id"]: row for row in planned.table.to_pylist()}


def loader(**storage_options: Any) -> Loader:
    return Loader(frozenset({"image"}), None, 8, "#ffffff", storage_options)


def sent_through(rows: list[dict[str, Any]], **storage_options: Any) -> list[Any]:
    wanted = ("image", "image_version", "height", "width")
    return loader(**storage_options)([{name: row[name] for name in wanted} for row in rows])


def write_dataset(path: Path, num_samples: int = 5) -> Path:
    """As anybody would, with the webdataset package."""
    with webdataset.TarWriter(str(path)) as sink:
        for i in range(num_samples):
            sample = {"__key__": f"a/{i:04d}", "png": png(i), "txt": f"a circle {i}\n", "json": {"tag": f"t{i}"}}
            sink.write(sample)
    return path


def test_a_webdataset_is_a_row_per_sample_and_an_image_is_its_bytes_inside_the_tar(
    tiny_model: Path, tmp_path: Path
) -> None:
    path = write_dataset(tmp_path / "shard-0.tar")
    rows = planned_rows(check(job(tiny_model, tmp_path / "out", path=f"{tmp_path}/shard-*.tar")))
    expected = {s["__key__"]: s for s in webdataset.WebDataset(str(path), shardshuffle=False)}
    assert sorted(rows) == sorted(expected)
    for key, row in rows.items():
        assert (row["prompt"], row["tag"]) == (expected[key]["txt"].decode().strip(), f"t{int(key[-1])}")
        file, _, span = row["image"].partition("#bytes=")
        first, _, last = span.partition("-")
        data = Path(file).read_bytes()[int(first) : int(last) + 1]
        assert data == expected[key]["png"]
        assert row["image_version"] == hashlib.sha256(data).hexdigest()
    loaded = sent_through(list(rows.values()))
    assert [one.image[0, 0, 0] for one in loaded] == [int(row["id"][-1]) for row in rows.values()]
    # Nothing is unpacked.
    assert [p.name for p in tmp_path.iterdir()] == ["shard-0.tar"]


@pytest.mark.parametrize("filled_with", [b"", b"\0" * 20_000])
def test_half_a_jpeg_is_broken_in_a_tar_as_it_is_in_a_folder(
    tiny_model: Path, tmp_path: Path, filled_with: bytes
) -> None:
    buffer = io.BytesIO()
    noise = Image.effect_noise((128, 128), 80).convert("RGB")
    small = noise.resize((16, 16))
    thumbnail = io.BytesIO()
    small.save(thumbnail, "JPEG")
    # With a small picture inside, which has an end of its own.
    noise.save(buffer, "JPEG", quality=95, exif=b"Exif\0\0" + thumbnail.getvalue())
    whole = buffer.getvalue()
    half = whole[: len(whole) // 2] + filled_with
    for name, data in (("half", half), ("whole", whole)):
        (tmp_path / f"{name}.jpg").write_bytes(data)
    pack(tmp_path / "s.tar", {"half.jpg": half, "half.txt": b"x", "whole.jpg": whole, "whole.txt": b"x"})
    in_tar = planned_rows(check(job(tiny_model, tmp_path / "out", path=str(tmp_path / "s.tar"))))
    table = [{"id": name, "prompt": "x", "image": f"{tmp_path}/{name}.jpg"} for name in ("half", "whole")]
    in_folder = planned_rows(check(job(tiny_model, tmp_path / "out", rows=table)))
    for rows in (in_tar, in_folder):
        broken, fine = sent_through([rows["half"], rows["whole"]])
        assert (broken.kind, fine.image.shape) == ("image.broken", (128, 128, 3))


def test_embed_of_samples_without_captions_says_what_is_missing(tiny_model: Path, tmp_path: Path) -> None:
    members = {"a.png": png(), "a.json": b'{"caption": "a circle"}', "b.png": png(1)}
    pack(tmp_path / "s.tar", members)

    def embed(**source: Any) -> Job:
        data = {"source": {"path": str(tmp_path / "s.tar"), **source}, "sink": {"path": str(tmp_path / "out")}}
        return parse_job(yaml.safe_dump(data | {"stages": [{"op": "embed", "model": str(tiny_model)}]}))

    with pytest.raises(JobError, match=r"s.tar: no row has a caption, .*; they come from a column, or in tars"):
        check(embed())
    # Some have none, which is what the null caption is for.
    planned = check(embed(columns={"prompt": "caption"}))
    assert planned.table is not None
    assert set(planned.table["prompt"].to_pylist()) == {"a circle", ""}
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    with pytest.raises(JobError, match="no column 'prompt'; the table has 'id', 'image'; name it with source.columns"):
        check(embed(path=f"{tmp_path}/*.png"))


def test_the_same_samples_in_another_tar_are_the_same_rows(tiny_model: Path, tmp_path: Path) -> None:
    members = {f"{i}.{end}": data for i in range(3) for end, data in (("jpg", png(i)), ("txt", b"x"))}
    keys = []
    for name, order in (("one", list(members)), ("two", [*list(members)[4:], *list(members)[:4]])):
        (tmp_path / name).mkdir()
        pack(tmp_path / name / "s.tar", {member: members[member] for member in order})
        rows = planned_rows(check(job(tiny_model, tmp_path / "out", path=str(tmp_path / name / "s.tar"))))
        keys.append({row["id"]: row["key"] for row in rows.values()})
    assert keys[0] == keys[1]


def test_a_tar_on_s3_is_read_by_ranges_and_one_that_was_replaced_is_noticed(
    tiny_model: Path, tmp_path: Path, s3_options: dict[str, Any]
) -> None:
    store = fsspec.filesystem("s3", **s3_options)
    url = f"s3://bkt/{tmp_path.name}/shard-0.tar"
    store.pipe_file(url, write_dataset(tmp_path / "s.tar").read_bytes())
    source = {"path": url.replace("-0", "-*"), "storage_options": s3_options}
    rows = planned_rows(check(job(tiny_model, tmp_path / "out", **source)))
    assert [row["prompt"] for _, row in sorted(rows.items())] == [f"a circle {i}" for i in range(5)]
    loaded = sent_through(list(rows.values()), **s3_options)
    assert [one.image[0, 0, 0] for one in loaded] == [int(row["id"][-1]) for row in rows.values()]
    # A table that names the same bytes brings the same pictures.
    table = {"rows": [{"image": row["image"], "prompt": "x"} for row in rows.values()], "storage_options": s3_options}
    named = check(job(tiny_model, tmp_path / "named", **table)).table
    assert named is not None
    assert not [one for one in sent_through(named.to_pylist(), **s3_options) if isinstance(one, BadImage)]
    store.pipe_file(url, write_dataset(tmp_path / "other.tar", 7).read_bytes())
    assert {one.kind for one in sent_through(list(rows.values()), **s3_options)} == {"image.changed"}
    again = planned_rows(check(job(tiny_model, tmp_path / "out", **source)))
    assert not {row["key"] for row in again.values()} & {row["key"] for row in rows.values()}


def test_metadata_of_the_picture_order_no_size_and_names_that_are_taken_stand_under_input(tmp_path: Path) -> None:
    told = json.dumps({"width": 24, "height": 16, "id": 7, "prompt": "other", "url": "https://x", "seed": 3}).encode()
    pack(tmp_path / "s.tar", {"./a.JPG": png(), "./a.json": told, "./a.txt": b"caption", "._a.jpg": b"", "b": b""})
    (chunk,) = read_source(Source(path=str(tmp_path / "s.tar")))
    assert {name: column[0] for name, column in chunk.columns.items() if name != "image"} == {
        "id": "a",
        "prompt": "caption",
        "seed": 3,
        "url": "https://x",
        "input.width": 24,
        "input.height": 16,
        "input.id": 7,
        "input.prompt": "other",
    }


def link(tar: tarfile.TarFile, name: str, kind: bytes, target: str = "/etc/passwd") -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    tar.addfile(info)


def hostile(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for i, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
            link(tar, f"odd{i}.jpg", kind)
        files: dict[str, bytes] = {
            "../../up.png": png(),
            "/abs.png": png(),
            "a/../b.png": png(),
            "two.jpg": png(),
            "two.png": png(),
            "none.txt": b"no image",
            "words.png": png(),
            "words.json": b"{not json",
            "list.png": png(),
            "list.json": b"[1]",
            "latin.png": png(),
            "latin.txt": b"\xff\xfe",
            "long.png": png(),
            "long.txt": b"x" * ((1 << 20) + 1),
            "twice.png": png(),
            "good.png": png(5),
            "good.txt": b"a fine one",
        }
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            if name == "twice.png":
                tar.addfile(info, io.BytesIO(data))


WRONG = {
    "up": "names a place outside of the tar",
    "/abs": "names a place outside of the tar",
    "a/../b": "names a place outside of the tar",
    "odd0": "is a link",
    "odd1": "is a link",
    "odd2": "is no plain file",
    "odd3": "is no plain file",
    "two": "sample 'two' has 'two.jpg', 'two.png'",
    "none": "sample 'none' has no image",
    "words": "'words.json' is not valid JSON",
    "list": "'list.json' holds a list",
    "latin": "'latin.txt' is not UTF-8",
    "long": "'long.txt' is larger than 1 MiB",
    "twice": "'twice.png' twice",
}


def test_what_a_tar_may_not_hold_is_its_samples_fault_alone_and_is_never_written_anywhere(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    hostile(tmp_path / "in" / "s.tar")
    source = {"path": str(tmp_path / "in" / "s.tar"), "templates": {"prompt": "a picture"}}
    planned = check(job(tiny_model, tmp_path / "out", **source, on_bad_row="fail"))
    rows = planned_rows(planned)
    problems = {row["id"].removeprefix("../../"): row["problem"] for row in rows.values() if row["problem"]}
    assert problems.keys() == WRONG.keys()
    for key, reason in WRONG.items():
        assert reason in problems[key]
        assert len(problems[key].splitlines()) == 1
    assert [row["id"] for row in rows.values() if not row["problem"]] == ["good"]
    with pytest.raises(JobError, match=r"s.tar row 1: member 'odd0.jpg' is a link; pack the file itself"):
        check(job(tiny_model, tmp_path / "out", **source))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["s.tar"]


@pytest.mark.parametrize(
    ("damage", "whole"),
    [
        (lambda data: data[: 512 * 5 + 10], 1),
        (lambda data: data[: 512 * 13], 3),
        # Whether the last sample is whole nobody can tell.
        (lambda data: data[: 512 * 12], 2),
        (lambda data: data[: 512 * 12 + 100], 2),
        (lambda data: data[: 512 * 12] + b"x" * 2048, 2),
    ],
    ids=["inside a picture", "after a header", "before a header", "inside a header", "garbage"],
)
def test_a_damaged_tar_says_after_which_member_and_gives_what_comes_before(
    tiny_model: Path, tmp_path: Path, damage: Callable[[bytes], bytes], whole: int
) -> None:
    members = {f"{i}.{end}": data for i in range(5) for end, data in (("png", png(i)), ("txt", b"x"))}
    data = pack(tmp_path / "s.tar", members).read_bytes()
    (tmp_path / "s.tar").write_bytes(damage(data))
    source = {"path": str(tmp_path / "s.tar")}
    rows = planned_rows(check(job(tiny_model, tmp_path / "out", **source, on_bad_row="fail")))
    fine = sorted(id for id, row in rows.items() if not row["problem"])
    assert fine == [str(i) for i in range(whole)]
    assert any("the tar is damaged or cut off after" in (row["problem"] or "") for row in rows.values())
    with pytest.raises(JobError, match="damaged or cut off"):
        check(job(tiny_model, tmp_path / "out", **source))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a tar"),
        (b"<html>" * 500, "not a tar"),
        (b"\x1f\x8b" + b"\0" * 600, "a compressed tar has no places to read from; unpack it"),
    ],
)
def test_what_is_no_tar_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(JobError, match=message):
        list(read_source(Source(path=str(tmp_path / "s.tar"))))


def test_a_header_that_claims_gigabytes_takes_no_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x" * 90)
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 3 << 30
    (tmp_path / "s.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 2048)
    with (tmp_path / "s.tar").open("r+b") as file:
        file.truncate(4 << 30)
    with pytest.raises(JobError, match="not a tar .*a header of"):
        list(read_source(Source(path=str(tmp_path / "s.tar"))))


def img2dataset(folder: Path, layout: str) -> None:
    """What img2dataset 1.47 leaves: two shards, one picture of each not downloaded."""
    folder.mkdir()
    for shard in range(2):
        rows, members = [], {}
        for i in range(3):
            key, failed = f"{shard:05d}{i:04d}", i == 1
            told = {
                "url": f"https://example.com/{i}.jpg",
                "caption": f"a star {shard} {i}",
                "key": key,
                "status": "failed_to_download" if failed else "success",
                "error_message": "HTTP Error 404: Not Found" if failed else None,
                "width": None if failed else 24,
                "height": None if failed else 16,
                "sha256": None if failed else "0" * 64,
            }
            rows.append(told)
            if not failed:
                members |= {f"{key}.jpg": png(10 * shard + i), f"{key}.txt": told["caption"].encode()}
                members[f"{key}.json"] = json.dumps(told).encode()
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 3, "successes": 2}))
        if layout == "tar":
            pack(folder / f"{shard:05d}.tar", members)
        else:
            (folder / f"{shard:05d}").mkdir()
            for name, data in members.items():
                (folder / f"{shard:05d}" / name).write_bytes(data)


@pytest.mark.parametrize("where", ["disk", "s3"])
@pytest.mark.parametrize("layout", ["tar", "files"])
def test_what_img2dataset_wrote_comes_in_and_what_it_could_not_download_is_counted(
    tiny_model: Path, tmp_path: Path, layout: str, where: str, request: pytest.FixtureRequest
) -> None:
    img2dataset(tmp_path / "laion", layout)
    options: dict[str, Any] = {}
    path = str(tmp_path / "laion")
    if where == "s3":
        options = request.getfixturevalue("s3_options")
        path = f"s3://bkt/{tmp_path.name}/laion"
        fsspec.filesystem("s3", **options).put(f"{tmp_path}/laion/", f"{path}/", recursive=True)
    planned = plan(job(tiny_model, tmp_path / "out", path=path, format="img2dataset", storage_options=options))
    rows = planned_rows(planned)
    assert (planned.num_rows, planned.num_skipped, planned.num_wrong) == (4, 2, 0)
    assert sorted(rows) == ["000000000", "000000002", "000010000", "000010002"]
    row = rows["000010002"]
    assert (row["prompt"], row["url"], row["input.width"]) == ("a star 1 2", "https://example.com/2.jpg", 24)
    assert (row["height"], row["width"], row["input.sha256"], row["input.status"]) == (None, None, "0" * 64, "success")
    loaded = sent_through(list(rows.values()), **options)
    assert not [one for one in loaded if isinstance(one, BadImage)]
    assert [one.image[0, 0, 0] for one in loaded] == [10 * int(i[4]) + int(i[-1]) for i in rows]


def test_a_folder_without_samples_says_so(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(JobError, match="no tar and no image there; give the folder that img2dataset wrote"):
        list(read_source(Source(path=str(tmp_path), format="img2dataset")))
