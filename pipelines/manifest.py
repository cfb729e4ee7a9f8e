"""What became of each row: the columns of the manifest, the parts that hold them, and how to read them all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.blocks import GEOMETRY, STAGE
from pipelines.errors import NotWhole, StorageError
from pipelines.storage import ObjectStore, Store

INTERMEDIATE = pa.struct(
    [
        ("step", pa.int32()),
        ("kind", pa.string()),
        ("uri", pa.string()),
        ("sha256", pa.string()),
        ("num_bytes", pa.int64()),
    ]
)

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("id", pa.string()),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("stage", pa.string()),
        pa.field("error_type", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("attempt", pa.int32()),
        pa.field("uri", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("num_bytes", pa.int64()),
        pa.field("format", pa.string()),
        pa.field("thumbnail", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("prompt", pa.string()),
        pa.field("negative_prompt", pa.string()),
        pa.field("seed", pa.int64()),
        pa.field("num_inference_steps", pa.int32()),
        pa.field("guidance_scale", pa.float64()),
        pa.field("scheduler", pa.string()),
        pa.field("strength", pa.float64()),
        pa.field("image", pa.string()),
        pa.field("mask_image", pa.string()),
        pa.field("control_image", pa.string()),
        pa.field("controlnet_conditioning_scale", pa.float64()),
        pa.field("lora", pa.string()),
        pa.field("lora_scale", pa.float64()),
        pa.field("lora_revision", pa.string()),
        pa.field("model", pa.string()),
        pa.field("model_revision", pa.string()),
        pa.field("source_uri", pa.string()),
        pa.field("source_row", pa.int64()),
        pa.field("num_duplicates", pa.int32()),
        *(pa.field(name, pa.int32()) for name in GEOMETRY),
        pa.field("flipped", pa.bool_()),
        pa.field("latents_row", pa.int32()),
        pa.field("latents_shape", pa.list_(pa.int32())),
        pa.field("embeddings_row", pa.int32()),
        pa.field("nsfw", pa.bool_()),
        pa.field("prompt_truncated", pa.bool_()),
        pa.field("intermediates", pa.list_(INTERMEDIATE)),
        pa.field("stages", pa.list_(STAGE)),
        pa.field("batch_size", pa.int32()),
        pa.field("device", pa.string()),
        pa.field("worker", pa.string()),
        pa.field("duration_s", pa.float64()),
        pa.field("run_id", pa.string()),
        pa.field("created_at", pa.timestamp("us", tz="UTC")),
    ]
)
"""One row per planned row; the table's other columns follow, `input.` in front where a name is taken.

`status` is ok, failed or filtered. `uri` is relative to the output; of a picture in a tar or Parquet file, `#` and its
name or row there follow; of latents and text embeddings it is the file that holds them, at row `latents_row` or
`embeddings_row`. `sha256` and `num_bytes` are of the picture, the latents or the embedding alone. `thumbnail` is a
`uri` too. Sizes in px, `duration_s` is the row's share of its device batch, over all stages. `image` is what the row
brought along. `intermediates` lists what `save_intermediates` kept; `stages` what each stage did and under which
parameters, the fields above being those of the first.
"""

FOLDER = "manifest"
METADATA_JSONL = "images/metadata.jsonl"
"""A copy for Hugging Face's imagefolder, written when all is done; readers of ours trust parts alone."""

READERS = 16
_PART = re.compile(rf"^{FOLDER}/([0-9a-f]+)/(\d{{6,}})\.parquet$")


@dataclass(frozen=True)
class PartHead:
    """What a part says of itself in its Parquet footer."""

    plan_id: str
    shard: int
    attempt: str
    num_rows: int
    num_ok: int
    num_failed: int
    num_filtered: int
    keys_digest: str

    def metadata(self) -> dict[bytes, bytes]:
        return {b"ldm_batch": json.dumps(self.__dict__, sort_keys=True).encode()}


def part_path(plan_id: str, shard: int) -> str:
    return f"{FOLDER}/{plan_id}/{shard:06d}.parquet"


def part_place(path: str) -> tuple[str, int] | None:
    """Plan id and shard of a part's path; None of any other path."""
    match = _PART.match(path)
    return (match[1], int(match[2])) if match else None


def keys_digest(keys: Iterable[str]) -> str:
    """Order-free digest of row keys, 32 hex digits."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:32]


def part_bytes(rows: pa.Table, head: PartHead) -> bytes:
    """A part: the shard's manifest rows, its head in the footer."""
    buffer = io.BytesIO()
    # A bit that flips later is noticed by whoever reads its page.
    pq.write_table(rows.replace_schema_metadata(head.metadata()), buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def read_head(part: bytes) -> PartHead | None:
    """The head of a part, None where the bytes are no whole part."""
    # Never through a Python file: Arrow's threads may ask it for bytes when Python is gone already, and abort at exit.
    try:
        metadata = pq.read_metadata(pa.BufferReader(part)).metadata or {}
        head = PartHead(**json.loads(metadata[b"ldm_batch"]))
        keys = _read(part, ["key"])["key"].to_pylist()
        whole = len(keys) == head.num_rows and keys_digest(keys) == head.keys_digest
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, RecursionError):
        return None
    # What JSON says may be of any type.
    numbers = (head.shard, head.num_rows, head.num_ok, head.num_failed, head.num_filtered)
    whole = whole and all(type(number) is int and 0 <= number < 1 << 31 for number in numbers)
    return head if whole and isinstance(head.plan_id, str) and isinstance(head.attempt, str) else None


def _read(part: bytes, columns: list[str] | None = None) -> pa.Table:
    # Without Arrow's own threads, which a small table does not need: a process that ends while they start is aborted.
    file = pq.ParquetFile(pa.BufferReader(part), page_checksum_verification=True)
    table = file.read(columns, use_threads=False)
    return table if columns is None else table.select([name for name in columns if name in table.column_names])


def read_rows(part: bytes) -> dict[str, dict[str, Any]]:
    """The rows of a part by key; empty where it is no whole part."""
    if read_head(part) is None:
        return {}
    try:
        return {row["key"]: row for row in read_part(part).to_pylist()}
    except NotWhole:
        return {}


def read_attempts(part: bytes) -> dict[str, int]:
    """How often each row of a part was made; empty where it is no whole part."""
    return {key: row["attempt"] for key, row in read_rows(part).items()}


def attempt_of(part: bytes) -> str | None:
    """The attempt that wrote a part; what `commit` asks of a part that stands in its way."""
    head = read_head(part)
    return head.attempt if head else None


def read_part(part: bytes, columns: tuple[str, ...] | None = None, where: str = "a part of the output") -> pa.Table:
    """A part as a table, without its head; columns of SCHEMA that an older version did not write are null.

    Raises:
        NotWhole: it cannot be read, or a column is of another type than SCHEMA says.
    """
    table = _whole(part, columns, where)
    for field in SCHEMA:
        if columns is not None and field.name not in columns:
            continue
        at = table.schema.get_field_index(field.name)
        if at < 0 and field.nullable:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
        elif at < 0 or not _alike(table.schema.field(at).type, field.type):
            raise NotWhole(
                f"{where} is damaged (its column {field.name!r} is none of a manifest); `ldm-batch repair` makes its "
                "rows again"
            )
    return table


def _whole(part: bytes, columns: tuple[str, ...] | None = None, where: str = "a part of the output") -> pa.Table:
    try:
        table = _read(part, None if columns is None else list(columns)).replace_schema_metadata(None)
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or ["empty"])[0][:200]
        raise NotWhole(f"{where} is damaged ({reason}); `ldm-batch repair` makes its rows again") from None
    return table


def _alike(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether one is the other; a struct may have got fields since."""
    if pa.types.is_list(found) and pa.types.is_list(wanted):
        return _alike(found.value_type, wanted.value_type)
    return bool(found == wanted or (pa.types.is_struct(found) and pa.types.is_struct(wanted)))


def texts(part: bytes) -> set[str]:
    """Every text in a part, whichever column it stands in; so no file that a part names, now or in a later version of
    these columns, is missing here. What follows a `#` is cut off.
    """

    def leaves(array: pa.Array) -> Iterator[pa.Array]:
        if pa.types.is_struct(array.type):
            for i in range(array.type.num_fields):
                yield from leaves(array.field(i))
        elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
            yield from leaves(array.values)
        elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            yield array

    chunks = (chunk for column in _whole(part).columns for chunk in column.chunks)
    return {
        text.partition("#")[0]
        for chunk in chunks
        for leaf in leaves(chunk)
        for text in leaf.unique().to_pylist()
        if text is not None
    }


def committed_shards(store: ObjectStore, plan_id: str) -> set[int]:
    """Shards whose part exists: one listing, nothing read."""
    return {place[1] for name in store.names(f"{FOLDER}/{plan_id}") if (place := part_place(name))}


def part_names(store: ObjectStore, folder: str = FOLDER) -> list[str]:
    """Every part under a folder; what somebody moved aside under another name is none."""
    return sorted(name for name in store.names(folder) if _PART.match(name))


def concat(tables: list[pa.Table]) -> pa.Table:
    """Tables whose columns may differ; a column whose types cannot meet becomes text."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException:
        types: dict[str, set[str]] = {}
        for table in tables:
            for field in table.schema:
                types.setdefault(field.name, set()).add(str(field.type))
        texts = []
        for table in tables:
            for i, name in enumerate(table.column_names):
                if len(types[name] - {"null"}) > 1 and not pa.types.is_string(table[name].type):
                    table = table.set_column(i, name, as_text(table[name].to_pylist()))
            texts.append(table)
        return pa.concat_tables(texts, promote_options="permissive")


def as_text(values: list[Any]) -> pa.Array:
    """Values of any kind as text: strings as they are, all else as JSON."""
    texts = [v if v is None or isinstance(v, str) else json.dumps(v, default=str) for v in values]
    return pa.array([t if t is None else t.encode("utf-8", "replace").decode() for t in texts], pa.string())


def read_parts(store: ObjectStore, paths: Iterable[str]) -> Iterator[tuple[str, PartHead, bytes]]:
    """Read and check parts, some at a time, in the order of their paths.

    Raises:
        NotWhole: one of them is no whole part.
    """

    def one(path: str) -> tuple[str, PartHead, bytes]:
        part = store.read(path)
        head = read_head(part) if part is not None else None
        if part is None or head is None:
            raise NotWhole(f"{store.uri(path)} is not a whole part; `ldm-batch repair` makes its rows again")
        return path, head, part

    names = iter(sorted(paths))
    while block := list(islice(names, READERS)):
        yield from store.each(one, block)


def read_tables(store: Store, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Every part of an output as a table, in order, some in memory at a time.

    Raises:
        NotWhole: a part is cut off.
        StorageError: no such folder.
    """
    if store.local is not None and not store.local.is_dir():
        raise StorageError(f"{store.url}: no such folder; give the output of a job")
    for name, _, part in read_parts(store, part_names(store)):
        yield read_part(part, None if columns is None else tuple(columns), store.uri(name))


def read_manifest(
    path: str | os.PathLike[str], columns: list[str] | None = None, storage_options: dict[str, object] | None = None
) -> pa.Table:
    """Every manifest row under an output folder or URL, sorted by plan and shard; empty before the first shard is done.

    Raises:
        NotWhole: a part is cut off.
        StorageError: no such folder.
    """
    tables = list(read_tables(Store(os.fspath(path), storage_options), columns))
    if not tables:
        schema = SCHEMA if columns is None else pa.schema([SCHEMA.field(name) for name in columns])
        return schema.empty_table()
    return concat(tables)
