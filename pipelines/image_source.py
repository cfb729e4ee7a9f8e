"""Rows that come from pictures: a listing, what pictures say about themselves, the output of an earlier run."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, UnidentifiedImageError

from pipelines import generation_text
from pipelines.chunk import CHUNK_ROWS, Chunk
from pipelines.errors import JobError
from pipelines.listing import list_files
from pipelines.manifest import SCHEMA, concat, read_tables
from pipelines.storage import Store, is_local

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
READERS = 16
OFFERED = frozenset({"id", "image", "latents", "prompt", "negative_prompt"})
"""What an earlier run's output offers the stages that take it; no table's own columns."""

FORMATS = ("PNG", "JPEG", "WEBP")
"""Kinds of picture that say how they were made."""


def holds_images(path: str) -> bool:
    """Whether a path names a folder, an image or a pattern of images, and no table."""
    # os.path: Path.is_dir raises where it may not look.
    if path.endswith("/") or (is_local(path) and os.path.isdir(path.removeprefix("file://"))):  # noqa: PTH112 - see above
        return True
    suffix = PurePosixPath(path).suffix.lower()
    return suffix in IMAGE_SUFFIXES or (not is_local(path) and not suffix and not any(c in path for c in "*?["))


def list_images(path: str, storage_options: dict[str, Any], alone: bool = True) -> Iterator[Chunk]:
    """A row per image under a folder, URL or pattern: `image` and `id` are its path below the root. Opens no file.

    Where several paths are listed (`alone` is false) ids begin with the path.

    Raises:
        JobError: there is none.
        StorageError: the store refuses.
    """
    first = 1
    base, listing = list_files(path, storage_options)
    named = ((name, version) for name, version in listing if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES)
    while block := list(islice(named, CHUNK_ROWS)):
        names = [name for name, _ in block]
        ids = names if alone else [f"{path.rstrip('/')}/{name}" for name in names]
        # A store's listing tells versions; local files are looked at when the row is planned.
        versions: dict[str, list[str | None]] = {}
        if not is_local(path):
            versions["image"] = [f"{base}/{name} {version}" for name, version in block]
        yield Chunk(path, first, len(block), {"id": ids, "image": names}, base=base or ".", versions=versions)
        first += len(block)
    if first == 1:
        raise JobError(
            f"source.path {path}: no image there ({', '.join(sorted(IMAGE_SUFFIXES))}); check the path; "
            "of a folder of tars name its tars, as in folder/*.tar, or set source.format: img2dataset"
        )


def read_parameters(path: str, storage_options: dict[str, Any], alone: bool = True) -> Iterator[Chunk]:
    """As `list_images`, with the prompt and the parameters that each picture carries. Decodes no pixel.

    Raises:
        JobError: a picture carries none.
    """
    for chunk in list_images(path, storage_options, alone):
        store = Store(chunk.base or ".", storage_options)

        def one(name: str, store: Store = store) -> dict[str, Any]:
            text = _text(store, name)
            try:
                return {} if text is None else generation_text.parse(text)
            except ValueError:
                return {}

        with ThreadPoolExecutor(READERS) as pool:
            rows = list(pool.map(one, chunk.columns["image"]))
        for name, row in zip(chunk.columns["image"], rows, strict=True):
            if not row:
                raise JobError(
                    f"source.path {store.uri(name)}: the picture does not say how it was made (no `parameters` text); "
                    "take it out, or give a table with prompts"
                )
        names = sorted({name for row in rows for name in row})
        chunk.columns |= {name: [row.get(name) for row in rows] for name in names}
        yield chunk


def _text(store: Store, name: str) -> str | None:
    try:
        if store.local is not None:
            with Image.open(store.local / name, formats=FORMATS) as image:
                return generation_text.read(image)
        with (
            store.filesystem.open(store.uri(name), "rb", block_size=1 << 16) as file,
            Image.open(file, formats=FORMATS) as image,
        ):
            return generation_text.read(image)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, struct.error):
        return None


def read_earlier(
    path: str, storage_options: dict[str, Any], alone: bool = True, with_images: bool = True
) -> Iterator[Chunk]:
    """The pictures that an earlier run made, its `ok` rows, with their prompts and what passed through.

    Without `with_images` only what is said of them, wherever they lie.

    Raises:
        JobError: there is no manifest, or no picture in it that can be read.
    """
    store = Store(path, storage_options)
    # Twice over the parts, since a manifest can be larger than the memory: what tells rows apart stands at their end.
    ids: list[str | None] = []
    held: set[str] = set()
    schemas: dict[pa.Schema, None] = {}
    for table in read_tables(store):
        schemas[table.schema] = None
        made = _made(table)
        held.update(made["format"].to_pylist())
        if with_images:
            _refuse_unreadable(path, made)
        ids += made["id"].to_pylist()
    if not ids:
        raise JobError(f"source.path {path}: no picture of an earlier run there; give the output folder of a job")
    # An output that was extended, or a table without ids, has rows that no id tells apart.
    told_apart = alone and len({*ids} - {None}) == len(ids)
    del ids
    whole = concat([schema.empty_table() for schema in schemas])
    passed = [name for name in whole.column_names if name not in SCHEMA.names] + ["negative_prompt", "prompt"]
    first = 1
    rows = (row for table in read_tables(store) for row in concat([whole, _made(table)]).to_pylist())
    while block := list(islice(rows, CHUNK_ROWS)):
        columns: dict[str, list[Any]] = {name: [row[name] for row in block] for name in passed}
        # A column that no row fills is not there, so that a stage that takes it says so.
        if with_images and held - {"latents", "embeddings"}:
            columns["image"] = [None if row["format"] in ("latents", "embeddings") else row["uri"] for row in block]
        if "latents" in held:
            rows_of = [(row["uri"], row.get("latents_row")) for row in block]
            columns["latents"] = [None if n is None else f"{uri}#{n}" for uri, n in rows_of]
        columns["id"] = [row["id"] if told_apart else row["key"] for row in block]
        versions: list[str | None] = [row["sha256"] for row in block]
        base = path.removeprefix("file://").rstrip("/")
        yield Chunk(
            path,
            first,
            len(block),
            columns,
            base=base,
            versions=dict.fromkeys(("image", "latents"), versions),
            offered=OFFERED,
        )
        first += len(block)


def _refuse_unreadable(path: str, made: pa.Table) -> None:
    for uri, format in zip(made["uri"].to_pylist(), made["format"].to_pylist(), strict=True):
        if "#" in uri or format == "jxl":
            file = uri.partition("#")[0]
            reason, instead = "is JPEG XL", "convert its pictures, or make them again with sink.format: png"
            if file != uri and format != "jxl":
                reason = "lies in one file with others"
                kind = "webdataset" if file.endswith(".tar") else "parquet"
                pattern = f"{path.rstrip('/')}/data/*{PurePosixPath(file).suffix}"
                instead = f"read these files themselves, with source.path: {pattern} and source.format: {kind}"
            raise JobError(
                f"source.path {path}: {uri} {reason}, which source.format: manifest cannot take pictures of; {instead}"
            )


def _made(table: pa.Table) -> pa.Table:
    return table.filter(pc.equal(table["status"], "ok"))
