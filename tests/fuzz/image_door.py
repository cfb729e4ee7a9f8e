"""Pictures of every format that comes in, damaged; and tars, Parquet files and folders that hold them."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from pipelines.blocks import error_message
from pipelines.inputs import BadImage, Loader
from pipelines.job import Job, Source
from pipelines.source import read_source
from tests.fuzz.damage import EDITS, Edit, damage, damaged
from tests.fuzz.harness import INSIDE, Door, unfit
from tests.fuzz.table_door import planned_and_written
from tests.ldm_ops.rows import picture

ENDINGS = [".png", ".jpg", ".webp", ".gif", ".tiff", ".avif", ".bmp", ".eps", ""]


def _encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    data = _encoded(NOISE, "PNG")
    made = b"".join(struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return data[:33] + made + data[33:]


def _resized(data: bytes, width: int, height: int) -> bytes:
    """A PNG that claims another size, with a checksum that fits."""
    head = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


def _exif(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "Steps: 3".encode("utf-16-be")
    return exif


def _text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", 'a star\nNegative prompt: x\nSteps: 3, Sampler: "Euler a", Size: 64x64, Seed: 5')
    info.add_itxt("XML:com.adobe.xmp", "<x/>", zip=True)
    return info


PIXELS = picture(48, 64)
NOISE = Image.fromarray(PIXELS)
ICC = b"\0\0\2\x0clcms\2\x10\0\0mntrRGB XYZ " + bytes(500)
BASES: dict[str, bytes] = {
    "png": _encoded(NOISE, "PNG", pnginfo=_text()),
    "png 16": _encoded(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), "PNG"),
    "png palette": _encoded(NOISE.quantize(16), "PNG", transparency=3),
    "png alpha": _encoded(NOISE.convert("RGBA"), "PNG"),
    "png bits": _encoded(NOISE.convert("1"), "PNG"),
    "png exif icc": _encoded(NOISE, "PNG", exif=_exif(), icc_profile=ICC),
    "png text bomb": _png_with((b"zTXt", b"parameters\0\0" + zlib.compress(b"x" * (2 << 20)))),
    "png wide": _resized(_encoded(NOISE, "PNG"), 40_000, 3000),
    "png bomb": _resized(_encoded(NOISE, "PNG"), 60_000, 60_000),
    "jpeg": _encoded(NOISE, "JPEG", quality=80),
    "jpeg progressive": _encoded(NOISE, "JPEG", progressive=True, exif=_exif(), icc_profile=ICC, comment=b"x"),
    "jpeg cmyk": _encoded(NOISE.convert("CMYK"), "JPEG"),
    "jpeg grey": _encoded(NOISE.convert("L"), "JPEG", exif=_exif(8)),
    "jpeg mpo": _encoded(NOISE, "MPO", save_all=True, append_images=[NOISE.copy()]),
    "webp": _encoded(NOISE, "WEBP", exif=_exif(3), icc_profile=ICC),
    "webp lossless": _encoded(NOISE.convert("RGBA"), "WEBP", lossless=True),
    "webp animated": _encoded(NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(9)]),
    "gif": _encoded(NOISE.quantize(32), "GIF", transparency=0),
    "gif animated": _encoded(NOISE.quantize(32), "GIF", save_all=True, append_images=[NOISE.rotate(9).quantize(32)]),
    **{
        f"tiff {packing}": _encoded(NOISE, "TIFF", compression=packing)
        for packing in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits")
    },
    "tiff float": _encoded(Image.fromarray(PIXELS[..., 0].astype(np.float32)), "TIFF"),
    "tiff 16": _encoded(Image.fromarray(PIXELS[..., 0].astype(np.uint16)), "TIFF", exif=_exif()),
    "tiff g4": _encoded(NOISE.convert("1"), "TIFF", compression="group4"),
    "avif": _encoded(NOISE, "AVIF", quality=60, exif=_exif(), icc_profile=ICC),
    "avif alpha": _encoded(NOISE.convert("RGBA"), "AVIF"),
    "bmp": _encoded(NOISE, "BMP"),
    "bmp palette": _encoded(NOISE.quantize(16), "BMP"),
    "html": b"<!doctype html><img src=x onerror=alert(1)>" * 9,
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) print\n",
}

LOADERS = [
    {"takes": frozenset({"image"}), "resize": None},
    {"takes": frozenset({"image"}), "resize": None, "decoding": "draft", "buckets": ((64, 64), (96, 40))},
    {"takes": frozenset({"image", "mask_image"}), "resize": "fit"},
    {"takes": frozenset({"image", "control_image"}), "resize": "nearest_multiple"},
]


def enter_picture(value: tuple[tuple[str, bytes], str, int], folder: Path) -> str:
    (_, data), ending, which = value
    path = folder / f"x{ending}"
    path.write_bytes(data)
    loader = Loader(**{"multiple": 8, "background": "#336699", "storage_options": {}, **LOADERS[which]})  # type: ignore[arg-type]
    where = dict.fromkeys(("image", "mask_image", "control_image"), str(path))
    size = {"height": 64 if which == 1 else None, "width": 64 if which == 1 else None}
    [loaded] = loader([{**where, **size, "image_version": None}])
    if isinstance(loaded, BadImage):
        assert unfit(error_message(str(loaded))) is None
        return loaded.kind
    assert loaded.image is not None
    assert loaded.image.dtype == np.uint8
    assert loaded.image.ndim == 3
    assert all(side % 8 == 0 for side in loaded.image.shape[:2])
    return INSIDE


PICTURE_DOOR = Door(
    "pictures",
    st.tuples(damaged(BASES), st.sampled_from(ENDINGS), st.integers(0, len(LOADERS) - 1)),
    enter_picture,
)

NAMES = [
    *(
        "a.png",
        "a.jpg",
        "a.txt",
        "a.json",
        "b.png",
        "b.txt",
        "b.json",
        "c/d.webp",
        "c/d.txt",
        "__key__.png",
        ".png",
        "a",
    ),
    *(
        "../../x.png",
        "/etc/x.png",
        "a.b.png",
        "A.PNG",
        "x" * 300 + ".png",
        "é\n.png",
        "\x1b[2J.png",
        "a.mask.png",
        "a\0b.png",
    ),
]
CONTENTS = [
    *(BASES[name] for name in ("png", "jpeg", "webp", "png wide", "html")),
    *(b"a red circle", b"\xff\xfe", b"", b"\xef\xbb\xbfa star", b"[1]", b"{", b'{"width": 9, "n": null}', b"[" * 5000),
    *(b'{"prompt": {"a": 1}, "image": 3, "id": "z"}', b'{"a": 1e999, "b": NaN, "": 1}', b'{"\\ud800": "\\ud800"}'),
]
TYPES = [tarfile.REGTYPE] * 8 + [
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.CHRTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
    b"Z",
]
TAR_FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]

Member = tuple[str, bytes, bytes]


@st.composite
def holders(draw: st.DrawFn) -> tuple[str, list[Member], int, list[Edit]]:
    """(tar, parquet, folder or img2dataset; members; how it is written; edits of its bytes)."""
    members = [
        (draw(st.sampled_from(NAMES)), draw(st.sampled_from(CONTENTS)), draw(st.sampled_from(TYPES)))
        for _ in range(draw(st.integers(0, 5)))
    ]
    # One that is fine, mostly.
    sample = [("s.png", BASES["png"], tarfile.REGTYPE), ("s.txt", b"a star", tarfile.REGTYPE)]
    members = (sample if draw(st.integers(0, 5)) else []) + members
    kind = draw(st.sampled_from(["tar", "tar", "parquet", "parquet", "img2dataset", "parameters"]))
    return kind, members, draw(st.integers(0, 5)), draw(EDITS) if draw(st.booleans()) else []


def tar_bytes(members: list[Member], format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "/etc/passwd"
            try:
                tar.addfile(info, io.BytesIO(content))
            except (ValueError, UnicodeError):
                continue
    return buffer.getvalue()


def parquet_bytes(members: list[Member], how: int) -> bytes:
    cells: list[Any] = [{"bytes": content or None, "path": name} for name, content, _ in members]
    kind = pa.struct([("bytes", pa.binary() if how % 2 else pa.large_binary()), ("path", pa.string())])
    captions = [f"caption {i}" for i in range(len(cells))]
    table = pa.table({"image": pa.array(cells, kind), "prompt": captions, "width": pa.array([9] * len(cells))})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=how + 1, compression=["zstd", "none", "snappy"][how % 3])
    return buffer.getvalue()


def enter_holder(value: tuple[str, list[Member], int, list[Edit]], folder: Path) -> str:
    kind, members, how, edits = value
    root = folder / "in"
    shutil.rmtree(root, ignore_errors=True)
    shutil.rmtree(folder / "out", ignore_errors=True)
    root.mkdir()
    source: dict[str, Any] = {"path": str(root / f"t.{kind}"), "on_bad_row": "fail"}
    if kind == "tar":
        (root / "t.tar").write_bytes(damage(tar_bytes(members, TAR_FORMATS[how % 3]), edits))
    elif kind == "parquet":
        (root / "t.parquet").write_bytes(damage(parquet_bytes(members, how), edits))
    else:
        source |= {"path": str(root), "format": kind}
        (root / "00000").mkdir()
        (root / "00000.parquet").write_bytes(damage(parquet_bytes(members, how), edits))
        for name, content, _ in members:
            if "/" not in name and "\0" not in name and len(name) < 200:
                (root / "00000" / name).write_bytes(damage(content, edits))
        (root / "00000_stats.json").write_bytes(json.dumps({"count": 1}).encode())
    if kind == "parameters":
        list(read_source(Source.model_validate(source)))
        return INSIDE
    stage = {"op": "img2img", "model": "builtin:shapes", "prompt": "a star", "height": 64, "width": 64}
    return planned_and_written(
        Job.model_validate({"source": source, "stages": [stage], "sink": {"path": str(folder / "out")}})
    )


HOLDER_DOOR = Door("containers", holders(), enter_holder)
