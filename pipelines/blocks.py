"""What travels between the stages of a run: planned rows and result columns, one Arrow table per shard.

Arrays are .npy bytes: one nullable binary column fits every shape and dtype, which Arrow's tensor columns do not.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

MAX_MESSAGE_CHARS = 500

ALIGNED = 64
"""Bytes of whose multiples each packed array in a column starts; what is left between them is zeros."""


def error_message(text: str) -> str:
    """`text` as a failed row tells it: one line without control characters, which a file or a server may have sent."""
    shown = "".join(c if c.isprintable() else " " for c in text.strip()[: 2 * MAX_MESSAGE_CHARS])
    return " ".join(shown.split())[:MAX_MESSAGE_CHARS]


ADAPTER = pa.struct([("kind", pa.string()), ("name", pa.string()), ("revision", pa.string()), ("scale", pa.float64())])
"""What a stage had beside its model: vae, controlnet, textual_inversion or lora, and the exact weights."""

STAGE = pa.struct(
    [
        ("op", pa.string()),
        ("status", pa.string()),
        ("model", pa.string()),
        ("model_revision", pa.string()),
        ("seed", pa.int64()),
        ("num_inference_steps", pa.int32()),
        ("guidance_scale", pa.float64()),
        ("scheduler", pa.string()),
        ("strength", pa.float64()),
        ("adapters", pa.list_(ADAPTER)),
        ("batch_size", pa.int32()),
        ("device", pa.string()),
        ("worker", pa.string()),
        ("duration_s", pa.float64()),
        ("uri", pa.string()),
        ("sha256", pa.string()),
        ("num_bytes", pa.int64()),
    ]
)
"""What one stage did to a row, under which parameters; `uri` where its picture was kept on the way."""

GEOMETRY = ("original_height", "original_width", "crop_top", "crop_left")
"""Of an image that came in: the file's own size, and the corner of what is left of it once scaled."""

KEPT = "kept"
"""The status, on its way, of a row that stays as its part says while others of its shard are made again."""

RESULT_FIELDS = [
    pa.field("status", pa.string()),
    pa.field("attempt", pa.int32()),
    pa.field("stage", pa.string()),
    pa.field("error_type", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("pixels", pa.binary()),
    pa.field("mask_pixels", pa.binary()),
    pa.field("control_pixels", pa.binary()),
    pa.field("kept", pa.list_(pa.struct([("stage", pa.int32()), ("pixels", pa.binary())]))),
    pa.field("latents_data", pa.binary()),
    pa.field("embeds_data", pa.binary()),
    pa.field("pooled_data", pa.binary()),
    pa.field("flipped", pa.bool_()),
    *(pa.field(name, pa.int32()) for name in GEOMETRY),
    pa.field("nsfw", pa.bool_()),
    pa.field("prompt_truncated", pa.bool_()),
    pa.field(
        "intermediates", pa.list_(pa.struct([("step", pa.int32()), ("latents", pa.binary()), ("preview", pa.binary())]))
    ),
    pa.field("stages", pa.list_(STAGE)),
]
"""What travels beside the planned rows of a shard, from loading through every stage to the sink.

`status` is null until something is wrong, or the last stage is done; `attempt` is null for the first one. `pixels` is
the picture so far, as .npy bytes; `kept` those of earlier stages that are to be written too.
"""


PACKED = tuple(field.name for field in RESULT_FIELDS if field.type == pa.binary())
"""RESULT_FIELDS that are an array each."""

NESTED = frozenset({"kept", "intermediates"})
"""RESULT_FIELDS that hold arrays inside lists."""


def with_results(planned: pa.Table, results: list[dict[str, Any]]) -> pa.Table:
    """The first rows of `planned`, one per result, with RESULT_FIELDS as `results` say, in place of any before.

    Arrays among them are packed. Those of PACKED are copied once, and without Python's lock, for which a device would
    have to wait.
    """
    out = planned.slice(0, len(results))
    for field in RESULT_FIELDS:
        values = [result.get(field.name) for result in results]
        if field.name in PACKED:
            column = _column(values)
        elif field.name in NESTED:
            values = [[_all_packed(one) for one in value] if value else value for value in values]
            column = pa.array(values, field.type)
        else:
            column = pa.array(values, field.type)
        at = out.schema.get_field_index(field.name)
        out = out.append_column(field, column) if at < 0 else out.set_column(at, field, column)
    return out


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of a table, with arrays for what is packed: read-only, and in the table's own memory."""
    packed = [name for name in PACKED if name in table.column_names]
    rows: list[dict[str, Any]] = table.drop_columns(packed).to_pylist()
    for name in packed:
        for row, array in zip(rows, views(table[name]), strict=True):
            row[name] = array
    return rows


def _column(values: list[NDArray[Any] | bytes | None]) -> pa.Array | pa.ChunkedArray:
    """A binary column of arrays, and of what is packed already."""
    pieces = [_pieces(value) for value in values]
    sizes = [-(-sum(map(len, some)) // ALIGNED) * ALIGNED for some in pieces]
    ends = np.cumsum([0, *sizes])
    if ends[-1] > np.iinfo(np.int32).max:
        packed = [
            None if value is None else b"".join(map(bytes, some)) for value, some in zip(values, pieces, strict=True)
        ]
        return pa.array(packed, pa.binary())
    data = pa.allocate_buffer(int(ends[-1]))
    room = np.frombuffer(data, np.uint8)
    for some, start, end in zip(pieces, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        for piece in some:
            room[start : start + len(piece)] = piece
            start += len(piece)
        room[start:end] = 0
    valid = pa.array([value is not None for value in values], pa.bool_()).buffers()[1]
    return pa.Array.from_buffers(pa.binary(), len(values), [valid, pa.py_buffer(ends.astype(np.int32)), data])


def _pieces(value: NDArray[Any] | bytes | None) -> tuple[NDArray[np.uint8], ...]:
    if value is None:
        return ()
    if isinstance(value, bytes):
        return (np.frombuffer(value, np.uint8),)
    return _head(value.shape, value.dtype), np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def _all_packed(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: pack(value) if isinstance(value, np.ndarray) else value for name, value in entry.items()}


def pack(array: NDArray[Any]) -> bytes:
    """An array of any shape and dtype → .npy bytes."""
    return b"".join(piece.data for piece in _pieces(array))


@lru_cache(maxsize=1024)
def _head(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[np.uint8]:
    file = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return np.frombuffer(file.getvalue(), np.uint8)


def views(column: pa.ChunkedArray) -> Iterator[NDArray[Any] | None]:
    """What was packed into each row of a binary column, in the column's own memory: read-only, and nothing is copied.

    Arrow's own scalars copy, and pixels take as long to copy as to encode.
    """
    for chunk in filter(len, column.chunks):
        _, bounds, data = chunk.buffers()
        ends = np.frombuffer(bounds, np.int32)[chunk.offset :].tolist()
        for is_valid, start, end in zip(chunk.is_valid().to_pylist(), ends, ends[1:], strict=False):
            yield unpack(data.slice(start, end - start)) if is_valid else None


def unpack(data: bytes | pa.Buffer) -> NDArray[Any]:
    """What was packed: read-only, in the memory of `data`, and nothing is copied."""
    view = memoryview(data)
    # Of version 1, as `pack` writes it: ten bytes, the last two of which say how long the header is.
    end = 10 + int.from_bytes(view[8:10], "little")
    shape, is_fortran, dtype = _header(bytes(view[:end]))
    array = np.frombuffer(view, dtype, math.prod(shape), end)
    return array.reshape(shape, order="F" if is_fortran else "C")


@lru_cache(maxsize=1024)
def _header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Parsed once for each: numpy reads it as Python source, which takes longer than to copy a small picture."""
    file = io.BytesIO(head)
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)
