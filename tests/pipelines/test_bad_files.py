"""One run over everything that a folder, a tar and a Parquet file from the internet may hold."""

from __future__ import annotations

import csv
import io
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pipelines.job import Job, parse_job
from pipelines.runner import run
from tests.conftest import ROOT
from tests.pipelines import reader
from tests.pipelines.test_inputs import BAD, encoded, png_claiming

BOX = "0,0,8,8"
MEMORY_CAP_MIB = 700
"""At most 128 Mi pixels are decoded at a time, 384 MiB as RGB; what Pillow needs beside them is not in our hands."""


def noise(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(noise(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def gif_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(noise().quantize(8), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    at = data.index(b",") + 5
    data[at : at + 4] = struct.pack("<HH", width, height)
    return bytes(data)


def bmp_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(noise(), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def tiff(tags: list[tuple[int, int, int, int]], next_ifd: int = 0) -> bytes:
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + struct.pack("<I", next_ifd)


def png_with(kind: bytes, body: bytes) -> bytes:
    data = encoded(noise())
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data[:33] + chunk + data[33:]


CUT = {f"half.{format}": encoded(noise(), format) for format in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")}

FILES: dict[str, tuple[bytes, str]] = {
    **{name: (make(), kind) for name, (make, kind) in BAD.items()},
    # Half an AVIF is not even told to be one.
    **{n: (data[: len(data) // 2], "image.format" if "AVIF" in n else "image.broken") for n, data in CUT.items()},
    **{f"nothing.{end}": (b"", "image.broken") for end in ("jpg", "webp", "bmp", "tiff", "gif", "avif")},
    "bomb.jpg": (jpeg_claiming(65_500, 65_500), "image.too_large"),
    "bomb.gif": (gif_claiming(65_535, 65_535), "image.too_large"),
    "bomb.bmp": (bmp_claiming(1 << 20, 1 << 20), "image.too_large"),
    # Within the cap, and next to nothing behind it.
    "hollow.png": (png_claiming(11_000, 11_000), "image.broken"),
    "hollow.jpg": (jpeg_claiming(11_000, 11_000)[:-200], "image.broken"),
    "hollow.bmp": (bmp_claiming(11_000, 11_000), "image.broken"),
    "hollow2.jpg": (jpeg_claiming(11_500, 11_500)[:-200], "image.broken"),
    "hollow3.jpg": (jpeg_claiming(11_400, 11_400)[:-200], "image.broken"),
    "text.bomb.png": (png_with(b"zTXt", b"a\0\0" + zlib.compress(b"x" * (64 << 20), 9)), "image.broken"),
    "huge.chunk.png": (encoded(noise())[:33] + struct.pack(">I", 0x7FFFFFFF) + b"iCCP" + b"x" * 64, "image.broken"),
    "loop.tiff": (tiff([(256, 3, 1, 64), (257, 3, 1, 64)], next_ifd=8), "image.format"),
    "offsets.tiff": (tiff([(256, 3, 1, 64), (257, 3, 1, 64), (273, 4, 1 << 28, 8)]), "image.format"),
    "script.jpg": (b"<?php echo 1; ?>" * 40, "image.format"),
    "program.png": (b"\x7fELF" + b"\0" * 600, "image.format"),
    "archive.webp": (b"PK\3\4" + b"\0" * 600, "image.format"),
    "sound.webp": (b"RIFF\x24\0\0\0WAVEfmt " + b"\0" * 60, "image.format"),
    "film.avif": (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + b"\0" * 600, "image.format"),
    "fits.png": (b"SIMPLE  =                    T" + b" " * 2900, "image.format"),
}

FINE = {
    "16bit.png": encoded(Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 15)),
    "cmyk.jpg": encoded(noise("CMYK"), "JPEG"),
    "palette.png": encoded(noise().quantize(16)),
    "grey-alpha.png": encoded(noise("LA")),
    "png-named.jpg": encoded(noise()),
    "no-ending": encoded(noise(), "WEBP", lossless=True),
}


def make_folder(folder: Path) -> dict[str, str]:
    """Files, and a table of them; returns what is expected of each id, `ok` or the kind of error."""
    expected: dict[str, str] = {}
    rows: list[tuple[str, str, str]] = []
    for name, (data, kind) in FILES.items():
        (folder / name).write_bytes(data)
        rows.append((name, name, BOX))
        expected[name] = kind
    for name, data in FINE.items():
        (folder / name).write_bytes(data)
        rows.append((name, name, BOX))
        expected[name] = "ok"
    (folder / "mask8.png").write_bytes(encoded(Image.new("L", (8, 8), 255)))
    (folder / "goes.png").write_bytes(FINE["png-named.jpg"])
    others = {
        "mask of another size": ("png-named.jpg", "mask8.png", "mask.size"),
        "mask that is none": ("png-named.jpg", "page.jpg", "mask.format"),
        "mask that is a bomb": ("png-named.jpg", "bomb.png", "mask.too_large"),
        "box beyond": ("png-named.jpg", "0,0,999,8", "mask.size"),
        "empty box": ("png-named.jpg", "8,8,8,8", "row.invalid"),
        "mask missing": ("png-named.jpg", "nowhere.png", "row.invalid"),
        "missing": ("nowhere.png", BOX, "row.invalid"),
        "gone since": ("goes.png", BOX, "image.missing"),
        "folder": (".", BOX, "row.invalid"),
        "web": ("http://169.254.169.254/latest/meta-data", BOX, "row.invalid"),
        "newline": ("a\nb.png", BOX, "row.invalid"),
        "empty cell": ("", BOX, "row.invalid"),
        "pipe": ("pipe", BOX, "row.invalid"),
        "circle": ("circle", BOX, "row.invalid"),
        "beyond the end": ("mask8.png#bytes=0-99999", BOX, "row.invalid"),
        "range too large": ("mask8.png#bytes=0-999999999999", BOX, "row.invalid"),
        "range backwards": ("mask8.png#bytes=9-1", BOX, "row.invalid"),
    }
    os.mkfifo(folder / "pipe")
    (folder / "circle").symlink_to("circle")
    for name, (image, mask, kind) in others.items():
        rows.append((name, image, mask))
        expected[name] = kind
    with (folder / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "image", "mask_image"), *rows])
    return expected


def make_tar(path: Path) -> dict[str, str]:
    told = b'{"mask_image": [0, 0, 8, 8]}'
    with tarfile.open(path, "w") as tar:

        def add(name: str, data: bytes, kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, len(data)
            tar.addfile(info, io.BytesIO(data))

        add("../../etc/evil.png", FINE["png-named.jpg"])
        add("/abs.png", FINE["png-named.jpg"])
        add("linked.png", b"", tarfile.SYMTYPE, "/etc/passwd")
        add("hard.png", b"", tarfile.LNKTYPE, "linked.png")
        add("device.png", b"", tarfile.BLKTYPE)
        add("blind.json", told)
        for name, data in (
            ("tarred-cut", CUT["half.JPEG"][:900]),
            ("tarred-page", b"<html>"),
            ("tarred", CUT["half.PNG"]),
        ):
            add(f"{name}.jpg", data)
            add(f"{name}.json", told)
    names = ("../../etc/evil", "/abs", "linked", "hard", "device", "blind")
    return {
        **dict.fromkeys(names, "row.invalid"),
        "tarred-cut": "image.broken",
        "tarred-page": "image.format",
        "tarred": "ok",
    }


def make_parquet(path: Path) -> dict[str, str]:
    cells = {
        "cell": FINE["cmyk.jpg"],
        "cell-cut": CUT["half.WEBP"][:300],
        "cell-zero": b"",
        "cell-bomb": FILES["bomb.jpg"][0],
    }
    image = pa.array([*({"bytes": data, "path": None} for data in cells.values()), None])
    ids = [*cells, "cell-null"]
    pq.write_table(pa.table({"id": ids, "image": image, "mask_image": [BOX] * len(ids)}), path, row_group_size=2)
    kinds = ("ok", "image.broken", "image.broken", "image.too_large", "row.invalid")
    return dict(zip(ids, kinds, strict=True))


def job(model: Path, folder: Path, out: Path) -> Job:
    paths = [str(folder / name) for name in ("t.csv", "t.tar", "t.parquet")]
    stage = {"op": "inpaint", "model": str(model), "prompt": "x", "num_inference_steps": 1, "strength": 1.0}
    stage |= {"batch_size": 4, "workers": 1, "height": 64, "width": 64}
    source = {"path": paths, "on_bad_row": "fail"}
    return parse_job(yaml.safe_dump({"source": source, "stages": [stage], "sink": {"path": str(out)}}))


LOAD_ALL = """
import re, sys
from pathlib import Path
import pyarrow as pa
from pipelines.job import load_job
from pipelines.inputs import Loader
from pipelines.loading import LoadShard, place
from pipelines.plans import read_plans
from pipelines.storage import Store
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
store = Store(sys.argv[1])
loader = Loader(frozenset({"image", "mask_image"}), None, 8, "#ffffff", {})
load, before, seen = LoadShard(store, loader, "", {}), peak(), 0
for plan in read_plans(store):
    for shard in plan.shards:
        seen += load(place(shard)).num_rows
print(seen, peak() - before)
"""


class Remover:
    """Takes a file away between the plan and its run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def measured(self, text: str) -> None: ...

    def planned(self, *_: Any) -> None:
        self.path.unlink()

    def started(self) -> None: ...

    def progress(self, *_: Any) -> None: ...

    def stopping(self) -> None: ...


@pytest.mark.usefixtures("ray_session")
def test_eighty_bad_files_in_one_run_are_a_reason_each_and_end_nothing(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    expected = make_folder(folder) | make_tar(folder / "t.tar") | make_parquet(folder / "t.parquet")
    assert sum(kind != "ok" for kind in expected.values()) >= 80
    before = {str(p) for p in tmp_path.rglob("*")}
    one = job(tiny_model, folder, tmp_path / "out")
    summary = run(one, listener=Remover(folder / "goes.png"))
    found: dict[str, dict[str, Any]] = {row["id"]: row for row in reader.rows(tmp_path / "out")}
    assert summary.exit_code == 3
    assert {id: row["error_type"] or "ok" for id, row in found.items()} == expected
    for row in found.values():
        if row["status"] == "failed":
            assert row["error_message"]
            assert len(row["error_message"].splitlines()) == 1
    # Nothing is written but the output.
    after = {str(p) for p in tmp_path.rglob("*") if not p.is_relative_to(tmp_path / "out")}
    assert after == before - {str(folder / "goes.png")}
    script = [sys.executable, "-c", LOAD_ALL, str(tmp_path / "out")]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split()
    assert int(done[0]) == len(expected)
    assert int(done[1]) < MEMORY_CAP_MIB
