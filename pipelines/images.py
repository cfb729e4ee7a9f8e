"""Pixels → the bytes of an image file."""

from __future__ import annotations

import importlib.util
import io
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo, putchunk

from pipelines.errors import JobError
from pipelines.generation_text import XMP, exif

Format = Literal["png", "jpeg", "webp", "jxl"]
PngEncoder = Literal["pillow", "fpng"]
EXTENSIONS: dict[str, str] = {"png": "png", "jpeg": "jpg", "webp": "webp", "jxl": "jxl"}
MIME_TYPES: dict[str, str] = {name: f"image/{name}" for name in EXTENSIONS}

MOST_PX = {"webp": 16_383, "jpeg": 65_500}
"""Of a picture's longer side, where a format or its library has an end."""

JPEG_QUALITY, THUMBNAIL_QUALITY = 95, 85

_Z_RLE = 3
# Its signature and the chunk IHDR, which is the first (https://www.w3.org/TR/png-3/#5ChunkOrdering).
_PNG_HEAD_BYTES = 8 + 4 + 4 + 13 + 4


def refuse_missing(format: Format, png_encoder: PngEncoder = "pillow") -> None:
    """Raise JobError where this Python cannot write `format`, or not with that encoder."""
    if format == "jxl" and importlib.util.find_spec("pillow_jxl") is None:
        raise JobError("sink.format: jxl needs the package pillow-jxl-plugin; pip install 'ldm-batch[jxl]', or use png")
    if png_encoder == "fpng" and importlib.util.find_spec("fpng") is None:
        raise JobError("sink.png_encoder: fpng needs the package fpng; pip install 'ldm-batch[fast]', or use pillow")


def encode(
    pixels: NDArray[np.uint8],
    format: Format,
    quality: int | None = None,
    text: str | None = None,
    png_encoder: PngEncoder = "pillow",
) -> bytes:
    """Encode uint8 (H, W, 3); png and jxl without loss, webp too without a quality, jpeg at 95 where none is given.

    The same pixels and text give the same bytes. `text` tells how the picture was made; with it goes the mark that a
    model made it (see `generation_text`).
    """
    if format == "jxl":
        import pillow_jxl  # noqa: F401 - makes the format known to Pillow
    buffer = io.BytesIO()
    options: dict[str, Any] = {
        # Run lengths only: 4 to 5 times the speed of Pillow's default, within 2 % of its size.
        "png": {"compress_level": 1, "compress_type": _Z_RLE},
        "jpeg": {"quality": quality or JPEG_QUALITY, "subsampling": 0},
        "webp": {"lossless": True, "method": 0} if quality is None else {"quality": quality},
        "jxl": {"lossless": True, "effort": 3, "num_threads": 1},
    }[format]
    if format == "png":
        options["pnginfo"] = _notes(text)
        if png_encoder == "fpng":
            return _by_fpng(pixels, options["pnginfo"])
    elif text is not None:
        options |= {"exif": exif(text), "xmp": XMP}
    Image.fromarray(pixels).save(buffer, format=format, **options)
    return buffer.getvalue()


def _notes(text: str | None) -> PngInfo:
    notes = PngInfo()
    if text is not None:
        notes.add_itxt("parameters", text) if not text.isascii() else notes.add_text("parameters", text)
        notes.add_itxt("XML:com.adobe.xmp", XMP.decode())
    return notes


def _by_fpng(pixels: NDArray[np.uint8], notes: PngInfo) -> bytes:
    """As https://github.com/richgel999/fpng compresses; its arithmetic is whole numbers, the same on any processor."""
    refuse_missing("png", "fpng")
    import fpng

    image = memoryview(fpng.from_ndarray(np.ascontiguousarray(pixels)))
    buffer = io.BytesIO()
    buffer.write(image[:_PNG_HEAD_BYTES])
    for name, body, _ in notes.chunks:
        putchunk(buffer, name, body)
    buffer.write(image[_PNG_HEAD_BYTES:])
    return buffer.getvalue()


def thumbnail(pixels: NDArray[np.uint8], side: int) -> bytes:
    """A JPEG whose longer side is `side` px, or the picture's own where that is less."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    image.save(buffer, format="jpeg", quality=THUMBNAIL_QUALITY)
    return buffer.getvalue()
