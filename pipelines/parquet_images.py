"""Images inside Parquet files, as Hugging Face datasets keep them: found when planning, read again when loading.

A column of `datasets.Image` is a struct of `bytes` and `path` (https://huggingface.co/docs/datasets/about_dataset_features);
a plain binary column is one where the job says so. A table's cell then says where its bytes lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.chunk import CHUNK_ROWS, OF_THE_IMAGE, Chunk
from pipelines.errors import JobError
from pipelines.pieces import Cell

BATCH_BYTES = 8 << 20
PAGE_BUFFER = 1 << 20


def open_parquet(file: IO[bytes] | str) -> pq.ParquetFile:
    """A Parquet file that is read page by page: a row group of pictures can be larger than the memory.

    How large a page is its writer decides; pyarrow's has up to 1,024 rows unless `write_batch_size` says otherwise.
    """
    return pq.ParquetFile(file, pre_buffer=False, buffer_size=PAGE_BUFFER)


def read_parquet(uri: str, file: IO[bytes], images: Collection[str]) -> Iterator[Chunk]:
    """Every row; where a column holds images as bytes, cells name their places. `images` are those of the job.

    Raises:
        JobError: no Parquet, or a column stands there twice.
    """
    try:
        parquet = open_parquet(file)
    except pa.ArrowInvalid as error:
        raise JobError(f"{uri}: not a Parquet file ({str(error).splitlines()[0]})") from None
    names = parquet.schema_arrow.names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise JobError(f"{uri}: column {twice[0]!r} stands twice in the table; rename one")
    held = {f.name for f in parquet.schema_arrow if _is_image(f.type) or (f.name in images and _is_binary(f.type))}
    # As beside the pictures of a tar: they tell of what is there, and order nothing.
    told = {name: f"input.{name}" for name in OF_THE_IMAGE if held and f"input.{name}" not in names}
    first = 1
    for columns, versions in _blocks(uri.rpartition("/")[2], parquet, held):
        rows = len(columns[names[0]]) if names else 0
        columns = {told.get(name, name): column for name, column in columns.items()}
        yield Chunk(uri, first, rows, columns, versions=versions)
        first += rows


_Block = tuple[dict[str, list[Any]], dict[str, list[str | None]]]


def _blocks(name: str, parquet: pq.ParquetFile, held: Collection[str]) -> Iterator[_Block]:
    if not held:
        for batch in parquet.iter_batches(batch_size=CHUNK_ROWS):
            yield batch.to_pydict(), {}
        return
    columns: dict[str, list[Any]] = {column: [] for column in parquet.schema_arrow.names}
    versions: dict[str, list[str | None]] = {column: [] for column in held}
    num_rows = 0
    for group in range(parquet.num_row_groups):
        row = 0
        for batch in parquet.iter_batches(batch_size=_rows_at_a_time(parquet, group), row_groups=[group]):
            for column in columns:
                if column not in held:
                    columns[column] += batch[column].to_pylist()
                    continue
                data, paths = _parts(batch[column])
                for i in range(batch.num_rows):
                    there = data[i].is_valid
                    columns[column].append(str(Cell(name, group, row + i, column)) if there else paths[i].as_py())
                    versions[column].append(hashlib.sha256(data[i].as_buffer()).hexdigest() if there else None)
            row += batch.num_rows
            num_rows += batch.num_rows
            if num_rows >= CHUNK_ROWS:
                yield columns, versions
                columns, versions = {name: [] for name in columns}, {name: [] for name in versions}
                num_rows = 0
    if num_rows:
        yield columns, versions


def read_cells(file: IO[bytes] | str, row_group: int, column: str, rows: Collection[int]) -> dict[int, bytes]:
    """The bytes of some rows of one column and row group, which is read once; a row that is not there is left out.

    Raises:
        pa.ArrowException, OSError: no Parquet, or not whole.
    """
    parquet = open_parquet(file)
    if row_group >= parquet.num_row_groups or column not in parquet.schema_arrow.names:
        return {}
    found: dict[int, bytes] = {}
    first, last = 0, max(rows)
    batches = parquet.iter_batches(_rows_at_a_time(parquet, row_group), row_groups=[row_group], columns=[column])
    for batch in batches:
        data, _ = _parts(batch[column])
        for row in range(first, first + batch.num_rows):
            if row in rows and data[row - first].is_valid:
                found[row] = data[row - first].as_py()
        first += batch.num_rows
        if first > last:
            break
    return found


def _rows_at_a_time(parquet: pq.ParquetFile, group: int) -> int:
    head = parquet.metadata.row_group(group)
    return int(max(1, min(CHUNK_ROWS, BATCH_BYTES * head.num_rows // max(1, head.total_byte_size))))


def _parts(column: pa.Array) -> tuple[pa.Array, pa.Array]:
    """(bytes, paths) of an image column."""
    if not pa.types.is_struct(column.type):
        return column, pa.nulls(len(column), pa.string())
    has_path = column.type.get_field_index("path") >= 0
    path = pc.struct_field(column, "path") if has_path else pa.nulls(len(column), pa.string())
    return pc.struct_field(column, "bytes"), path


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_image(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return False
    fields = {field.name: field.type for field in kind}
    return "bytes" in fields and _is_binary(fields["bytes"]) and fields.keys() <= {"bytes", "path"}
