"""Planned rows as one Arrow table: our columns, those that pass through, and the order that makes batches."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import manifest
from pipelines.blocks import RESULT_FIELDS
from pipelines.chunk import Chunk
from pipelines.pieces import GROUP
from pipelines.rows import PlannedRow
from pipelines.stages import ROW_PARAMETERS

OWN_FIELDS = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("id", pa.string()),
    pa.field("prompt", pa.string()),
    pa.field("negative_prompt", pa.string()),
    pa.field("seed", pa.int64()),
    pa.field("height", pa.int32()),
    pa.field("width", pa.int32()),
    pa.field("num_inference_steps", pa.int32()),
    pa.field("guidance_scale", pa.float64()),
    pa.field("scheduler", pa.string()),
    pa.field("strength", pa.float64()),
    pa.field("image", pa.string()),
    pa.field("mask_image", pa.string()),
    pa.field("latents", pa.string()),
    pa.field("control_image", pa.string()),
    pa.field("controlnet_conditioning_scale", pa.float64()),
    pa.field("lora", pa.string()),
    pa.field("lora_scale", pa.float64()),
    pa.field("lora_revision", pa.string()),
    pa.field("image_version", pa.string()),
    pa.field("source_uri", pa.string()),
    pa.field("source_row", pa.int64()),
    pa.field("problem", pa.string()),
]
LATER_FIELDS = ("num_duplicates", "batch", "shard")
RESERVED = {f.name for f in [*manifest.SCHEMA, *OWN_FIELDS, *RESULT_FIELDS]} | set(LATER_FIELDS)
"""Names that a column that passes through cannot keep."""


def row_table(chunk: Chunk, rows: list[PlannedRow], passing: list[tuple[str, list[Any]]]) -> pa.Table:
    """The rows of a chunk, with the columns of it that pass through."""
    columns: dict[str, Any] = {
        "key": [row.key for row in rows],
        "id": [row.id for row in rows],
        **{name: [row.values[i] for row in rows] for i, name in enumerate(ROW_PARAMETERS)},
        "source_uri": [chunk.uri or None] * len(rows),
        "source_row": [chunk.first_row + row.source_index if chunk.uri else None for row in rows],
        "image_version": [row.image_version for row in rows],
        "lora_revision": [row.lora_revision for row in rows],
        "problem": [row.problem for row in rows],
    }
    arrays = [pa.array(columns[f.name], f.type) for f in OWN_FIELDS]
    fields = list(OWN_FIELDS)
    taken = RESERVED | set(chunk.columns)
    for name, values in passing:
        array = _passed_through([values[row.source_index] for row in rows])
        free = name
        while free in taken and (free != name or name in RESERVED):
            free = f"input.{free}"
        fields.append(pa.field(free, array.type))
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _passed_through(values: list[Any]) -> pa.Array:
    try:
        array = pa.array(values)
        if not _has_empty_struct(array.type):  # Parquet has no place for one.
            return array
    except (pa.ArrowException, OverflowError, TypeError, UnicodeEncodeError):
        pass
    return manifest.as_text(values)


def _has_empty_struct(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_) and type_.num_fields == 0:
        return True
    return any(_has_empty_struct(type_.field(i).type) for i in range(type_.num_fields))


def in_order(table: pa.Table) -> pa.Table:
    """What must be equal inside a batch stands together."""
    # Expensive rows first, so that the end of a run does not wait for one of them; the key makes the order total.
    order = [("height", "descending"), ("width", "descending"), ("num_inference_steps", "descending")]
    rest = [
        # A worker loads a LoRA when the rows before it had another.
        ("lora", "ascending"),
        ("lora_scale", "ascending"),
        ("controlnet_conditioning_scale", "ascending"),
        ("guidance_scale", "descending"),
        ("scheduler", "ascending"),
        ("strength", "descending"),
        ("negative", "ascending"),
        # Latents that lie in one file are read together, and so are images.
        ("latents", "ascending"),
        ("file", "ascending"),
        # One worker meets the rows of a prompt, one after the other, and encodes it once.
        ("prompt", "ascending"),
        ("key", "ascending"),
    ]
    file = pc.replace_substring_regex(table["image"], GROUP, r"\1\2")
    own = table.select([field.name for field in OWN_FIELDS])
    sorted_by = own.append_column("negative", has_negative(table)).append_column("file", file)
    indices = pc.sort_indices(sorted_by, sort_keys=[*order, *rest])
    return table.combine_chunks().take(indices)


def has_negative(table: pa.Table) -> Any:
    """A boolean per row: SDXL tells no negative prompt from an empty one."""
    return pc.fill_null(pc.not_equal(table["negative_prompt"], ""), False)
