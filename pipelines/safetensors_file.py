"""Latents of one shape as a safetensors file (https://huggingface.co/docs/safetensors), read group by group.

One tensor (N, C, h, w) named `latents`; what stands beside each row, and what the file says of itself, is JSON under
one key of the metadata: safetensors keeps several in no fixed order, and the same latents have to give the same bytes.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors.numpy import save

MAX_HEADER_BYTES = 100_000_000
"""Of safetensors' own reader."""


def write(table: pa.Table, latents: NDArray[Any], key: bytes) -> bytes:
    """The file: `latents` (N, C, h, w), the rows of `table` beside them, and what its schema says under `key`."""
    about = {"head": json.loads(table.schema.metadata[key]), "rows": table.to_pydict()}
    return bytes(save({"latents": np.ascontiguousarray(latents)}, {key.decode(): json.dumps(about)}))


class SafetensorsFile:
    """A file that `write` made, with the few methods of pyarrow's ParquetFile that readers of latents need.

    Raises:
        ValueError: it is none, or cut off.
    """

    def __init__(self, source: pa.NativeFile, key: bytes, fields: list[pa.Field], rows_per_group: int) -> None:
        self.source = source
        self.rows_per_group = rows_per_group
        try:
            num_bytes = int.from_bytes(source.read(8), "little")
            if num_bytes > MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
            header = json.loads(source.read(num_bytes))
            about = json.loads(header["__metadata__"][key.decode()])
            begin, end = header["latents"]["data_offsets"]
            if not 0 <= begin < end <= source.size() - 8 - num_bytes:
                raise ValueError("cut off")
            schema = pa.schema(fields)
            self.rows = pa.table({name: about["rows"][name] for name in schema.names}, schema)
            self.row_bytes = int(end - begin) // self.rows.num_rows
        except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError, pa.ArrowException) as error:
            raise ValueError(f"no whole file of latents ({(str(error).splitlines() or ['empty'])[0][:100]})") from None
        self.begin = 8 + num_bytes + int(begin)
        self.schema_arrow = schema.with_metadata({key: json.dumps(about["head"]).encode()})

    @property
    def num_row_groups(self) -> int:
        return int(-(-self.rows.num_rows // self.rows_per_group))

    @property
    def metadata(self) -> SafetensorsFile:
        return self

    def row_group(self, index: int) -> pa.Table:
        """The rows of a group, without their latents."""
        return self.rows.slice(index * self.rows_per_group, self.rows_per_group)

    def read_row_group(self, index: int, columns: list[str]) -> pa.Table:
        """`columns` of a group's rows; `latents` as fixed-size binary, as in Parquet."""
        return self._with_latents(index * self.rows_per_group, self.row_group(index)).select(columns)

    def read(self) -> pa.Table:
        return self._with_latents(0, self.rows)

    def _with_latents(self, first: int, rows: pa.Table) -> pa.Table:
        self.source.seek(self.begin + first * self.row_bytes)
        data = self.source.read_buffer(rows.num_rows * self.row_bytes)
        if data.size != rows.num_rows * self.row_bytes:
            raise ValueError("no whole file of latents (cut off)")
        width = pa.binary(self.row_bytes)
        latents = pa.Array.from_buffers(width, rows.num_rows, [None, data])
        table = rows.append_column(pa.field("latents", width, nullable=False), latents)
        return table.replace_schema_metadata(self.schema_arrow.metadata)

    def close(self) -> None:
        self.source.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
