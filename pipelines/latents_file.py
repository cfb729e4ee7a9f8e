"""A file of latents of one shape, and what it says of the encoder that made them.

In Parquet the latents are a column of fixed-size binary, row-major little-endian, not of fixed-size lists: pyarrow 26
reads the former at the speed of memory and the latter twenty times slower, for the sake of a validity bit per number.
The other format is `safetensors_file`.
"""

from __future__ import annotations

import io
import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
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
WHOLE_PAGES = b"ldm_batch_whole_pages"
"""Says that the latents of a row group are one page, so that its bytes are theirs, one after the other."""
ROWS_PER_GROUP = 256
DTYPES = ("float16", "float32")

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
    about[WHOLE_PAGES] = b"1"
    table = pa.Table.from_arrays(arrays, schema=schema.with_metadata(about))
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        # Noise-like numbers: compression and dictionaries would only cost.
        compression="none",
        use_dictionary=["prompt"],
        row_group_size=ROWS_PER_GROUP,
        # A page ends where a batch does, at the earliest.
        write_batch_size=ROWS_PER_GROUP,
        data_page_size=(1 << 31) - 1,
    )
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
        head = LatentsHead(**{**value, "shape": tuple(value["shape"])})
        sides = all(type(side) is int and 0 < side < 1 << 20 for side in head.shape)
        if len(head.shape) != 3 or not sides or head.dtype not in DTYPES:
            raise ValueError
    except (KeyError, ValueError, TypeError, RecursionError):
        raise NotLatents("no latents of ldm-batch") from None
    return head


def as_array(column: pa.ChunkedArray | pa.Array, head: LatentsHead) -> NDArray[Any]:
    """The `latents` column as (rows, C, h, w), a view on Arrow's own memory where it is one chunk."""
    array = column
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks == 1 else pa.concat_arrays(array.chunks)
    width = array.type.byte_width
    data = np.frombuffer(array.buffers()[1], np.uint8)[array.offset * width : (array.offset + len(array)) * width]
    return data.view(np.dtype(head.dtype)).reshape(len(array), *head.shape)


def mapped(path: Path, file: pq.ParquetFile, group: int, head: LatentsHead) -> NDArray[Any] | None:
    """The latents of a row group of a file on this machine, (rows, C, h, w), without a copy: its pages are mapped.

    None where the file does not say that it is laid out so.
    """
    if WHOLE_PAGES not in (file.schema_arrow.metadata or {}):
        return None
    rows = file.metadata.row_group(group)
    chunk = rows.column(file.schema_arrow.get_field_index("latents"))
    size = rows.num_rows * int(np.prod(head.shape)) * np.dtype(head.dtype).itemsize
    # What stands before the numbers is the page's header.
    begin = chunk.data_page_offset + chunk.total_compressed_size - size
    start = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as opened:
        pages = mmap.mmap(
            opened.fileno(),
            begin - start + size,
            # Read at once and in order, not row by row as rows are asked for.
            flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0),
            prot=mmap.PROT_READ,
            offset=start,
        )
    return np.frombuffer(pages, head.dtype, offset=begin - start, count=size // np.dtype(head.dtype).itemsize).reshape(
        rows.num_rows, *head.shape
    )


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
        raise NotLatents((str(error).splitlines() or ["empty"])[0]) from None
    head = read_head(table.schema.metadata)
    width = int(np.prod(head.shape)) * np.dtype(head.dtype).itemsize
    if "latents" not in table.column_names or table.schema.field("latents").type != pa.binary(width):
        raise NotLatents(f"its rows are no latents of {' × '.join(map(str, head.shape))} {head.dtype}")
    return head, table
