"""A file of latents of one shape, and what it says of the encoder that made them.

In Parquet the latents are a column of fixed-size binary, row-major little-endian, not of fixed-size lists: pyarrow 26
reads the former at the speed of memory and the latter twenty times slower, for the sake of a validity bit per number.
The other format is `safetensors_file`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines import safetensors_file
from pipelines.blocks import GEOMETRY
from pipelines.safetensors_file import SafetensorsFile

LatentsFormat = Literal["parquet", "safetensors"]

KEY = b"ldm_batch_latents"
ROWS_PER_GROUP = 256

ROW_FIELDS = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("id", pa.string()),
    pa.field("prompt", pa.string()),
    *(pa.field(name, pa.int32()) for name in GEOMETRY),
    pa.field("flipped", pa.bool_()),
]
"""What stands beside each row's latents: its caption, and SDXL's micro-conditions."""


@dataclass(frozen=True)
class LatentsHead:
    """What a file says of itself. `shape` is (C, h, w); of `moments`, C is twice the channels, means first.

    `scale` and `shift` are the encoder's: a denoiser takes (latents - shift) × scale, and so `sample` and `mode` are
    stored. An image is `factor` times as wide and high as its latents.
    """

    encoder: str
    encoder_revision: str
    posterior: str
    dtype: str
    shape: tuple[int, int, int]
    scale: float
    shift: float
    factor: int

    def same_encoder(self, other: LatentsHead) -> bool:
        """Whether latents of both may stand in one training."""
        names = ("encoder_revision", "posterior", "dtype", "scale", "shift", "factor")
        return all(getattr(self, name) == getattr(other, name) for name in names) and self.shape[0] == other.shape[0]


class NotLatents(ValueError):
    """A file that holds none."""


def write_latents(
    format: LatentsFormat, head: LatentsHead, rows: Sequence[Mapping[str, Any]], latents: Sequence[NDArray[Any]]
) -> bytes:
    """The file: `latents`, each of `head`'s shape and dtype, beside ROW_FIELDS of `rows`."""
    about = {KEY: json.dumps(asdict(head)).encode()}
    arrays = [pa.array([row[field.name] for row in rows], field.type) for field in ROW_FIELDS]
    if format == "safetensors":
        table = pa.Table.from_arrays(arrays, schema=pa.schema(ROW_FIELDS).with_metadata(about))
        return safetensors_file.write(table, np.stack(latents), KEY)
    width = int(np.prod(head.shape)) * np.dtype(head.dtype).itemsize
    arrays.append(pa.array([array.astype(f"<{array.dtype.str[1:]}").tobytes() for array in latents], pa.binary(width)))
    schema = pa.schema([*ROW_FIELDS, pa.field("latents", pa.binary(width), nullable=False)])
    table = pa.Table.from_arrays(arrays, schema=schema.with_metadata(about))
    buffer = io.BytesIO()
    # Noise-like numbers: compression and dictionaries would only cost.
    pq.write_table(table, buffer, compression="none", use_dictionary=["prompt"], row_group_size=ROWS_PER_GROUP)
    return buffer.getvalue()


def open_safetensors(source: pa.NativeFile) -> SafetensorsFile:
    """A file of `write_latents` that is safetensors, with the methods of pyarrow's ParquetFile.

    Raises:
        NotLatents: it is none, or cut off.
    """
    try:
        return SafetensorsFile(source, KEY, ROW_FIELDS, ROWS_PER_GROUP)
    except ValueError as error:
        raise NotLatents(str(error)) from None


def read_head(metadata: Mapping[bytes, bytes] | None) -> LatentsHead:
    """The head from a file's key-value metadata.

    Raises:
        NotLatents: there is none.
    """
    try:
        value = json.loads((metadata or {})[KEY])
        return LatentsHead(**{**value, "shape": tuple(value["shape"])})
    except (KeyError, ValueError, TypeError):
        raise NotLatents("no latents of ldm-batch") from None


def as_array(column: pa.ChunkedArray | pa.Array, head: LatentsHead) -> NDArray[Any]:
    """The `latents` column as (rows, C, h, w), a view on Arrow's own memory where it is one chunk."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    width = array.type.byte_width
    data = np.frombuffer(array.buffers()[1], np.uint8)[array.offset * width : (array.offset + len(array)) * width]
    return data.view(np.dtype(head.dtype)).reshape(len(array), *head.shape)


def read_latents(data: bytes) -> tuple[LatentsHead, pa.Table]:
    """A whole file.

    Raises:
        NotLatents: it holds none, or is cut off.
    """
    try:
        if data[:4] == b"PAR1":
            table = pq.read_table(pa.BufferReader(data))
        else:
            with open_safetensors(pa.BufferReader(data)) as file:
                table = file.read()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise NotLatents(str(error).splitlines()[0]) from None
    return read_head(table.schema.metadata), table
