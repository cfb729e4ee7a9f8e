"""Read a table of rows, whatever its format, as chunks of columns."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

import fsspec

from pipelines.chunk import CHUNK_ROWS, Chunk
from pipelines.errors import JobError, LdmError
from pipelines.image_source import holds_images, list_images, read_earlier, read_parameters
from pipelines.job import RowName, Source
from pipelines.listing import expand
from pipelines.parquet_images import read_parquet
from pipelines.samples import read_img2dataset, read_tar
from pipelines.storage import Store, is_local

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".tar": "webdataset",
}
IMAGES: tuple[RowName, ...] = ("image", "mask_image", "control_image")
MAX_PER_REQUEST = 1000
MAX_FIELD_CHARS = 1 << 20


def read_source(source: Source, with_images: bool = True) -> Iterator[Chunk]:
    """Every chunk of every file of `source`, in a fixed order; without `with_images` nobody will look at its pictures.

    Raises:
        JobError: no such file, an unknown format, or a file that is not what its ending says.
    """
    if source.rows is not None:
        rows = [{"prompt": row} if isinstance(row, str) else row for row in source.rows]
        if not rows:
            raise JobError("source.rows is empty; write at least one prompt")
        yield from _chunks("rows", rows)
        return
    paths = [source.path] if isinstance(source.path, str) else source.path or []
    if not paths:
        raise JobError("source.path is an empty list; name at least one file")
    if source.format == "img2dataset":
        for path in paths:
            yield from read_img2dataset(path, source.storage_options)
        return
    images = source.format == "auto" and all(holds_images(path) for path in paths)
    if source.format in ("images", "parameters", "manifest") or images:
        read: Callable[[str, dict[str, Any], bool], Iterator[Chunk]] = list_images
        if source.format == "manifest":
            read = partial(read_earlier, with_images=with_images)
        elif source.format == "parameters":
            read = read_parameters
        for path in paths:
            yield from read(path, source.storage_options, len(paths) == 1)
        return
    files = []
    for path in paths:
        found = list(expand(path, source.storage_options))
        if not found:
            raise JobError(f"source.path {path}: no file matches; check the pattern")
        if source.format == "auto" and all(holds_images(name) for name in found):
            # A pattern such as *.[pj][np]g shows only now what it matches.
            yield from list_images(path, source.storage_options, len(paths) == 1)
        else:
            files += found
    for uri in files:
        yield from _read_file(uri, source)


def table_files(source: Source) -> list[str] | None:
    """The files that hold all that `read_source` tells of the rows; None where there are others.

    Raises:
        StorageError: the store refuses.
    """
    if source.rows is not None:
        return []
    paths = [source.path] if isinstance(source.path, str) else source.path or []
    files = [uri for path in paths for uri in expand(path, source.storage_options)]
    kinds = {FORMATS.get(_suffix(uri)) if source.format == "auto" else source.format for uri in files}
    return files if kinds <= {"csv", "tsv", "jsonl", "parquet", "text"} else None


def _suffix(uri: str) -> str:
    # A compressed table keeps its own ending: prompts.csv.gz.
    suffixes = PurePosixPath(urlsplit(uri).path if "://" in uri else uri).suffixes
    return next((s.lower() for s in reversed(suffixes) if s not in (".gz", ".bz2", ".xz")), "")


def _read_file(uri: str, source: Source) -> Iterator[Chunk]:
    base = uri.rpartition("/")[0] if "/" in uri else ""
    for chunk in _read_table(uri, source):
        chunk.base = base
        yield chunk


def _read_table(uri: str, source: Source) -> Iterator[Chunk]:
    kind = source.format
    if kind == "auto":
        suffix = _suffix(uri)
        if suffix not in FORMATS:
            if is_local(uri) and not os.path.exists(uri.removeprefix("file://")):  # noqa: PTH110 - as in holds_images
                raise JobError(f"source.path {uri}: no such file or folder")
            raise JobError(
                f"source.path {uri}: unknown ending {suffix!r}; one of {', '.join(FORMATS)}, or set source.format"
            )
        kind = FORMATS[suffix]  # type: ignore[assignment]
    options = {} if is_local(uri) else Store(uri, source.storage_options).filesystem.storage_options
    try:
        if kind == "parquet":
            images = {source.columns.get(name, name) for name in IMAGES}
            with fsspec.open(uri, "rb", **options) as file:
                yield from read_parquet(uri, file, images)
            return
        if kind == "webdataset":
            yield from read_tar(uri, source.storage_options)
            return
        with fsspec.open(uri, "rb", compression="infer", **options) as raw:
            yield from _text_formats(uri, str(kind), raw)
    except FileNotFoundError:
        raise JobError(f"source.path {uri}: no such file") from None
    except IsADirectoryError:
        ending = next(ending for ending, one in FORMATS.items() if one == kind)
        folder = uri.rstrip("/")
        raise JobError(f"source.path {uri} is a folder; name a file, or a pattern such as {folder}/*{ending}") from None
    except UnicodeDecodeError as error:
        raise JobError(f"{uri}: not UTF-8 (byte {error.object[error.start]:#04x}); save the table as UTF-8") from None
    except PermissionError:
        raise JobError(f"source.path {uri}: not allowed to read it; check its permissions or the credentials") from None
    except LdmError:
        raise
    except Exception as error:  # noqa: BLE001 - each codec and each store's client has exceptions of its own
        refusal = None if is_local(uri) else Store(uri).refusal(error)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise JobError(f"source.path {uri}: cannot be read ({refusal or reason}); is the copy whole?") from None


def _text_formats(uri: str, kind: str, raw: IO[bytes]) -> Iterator[Chunk]:
    text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
    if kind == "text":
        lines = (line.strip() for line in text)
        yield from _chunks(uri, ({"prompt": line} for line in lines if line))
    elif kind == "jsonl":
        yield from _chunks(uri, _json_lines(uri, text))
    else:
        yield from _csv(uri, text, "," if kind == "csv" else "\t")


def _csv(uri: str, text: Iterable[str], delimiter: str) -> Iterator[Chunk]:
    csv.field_size_limit(MAX_FIELD_CHARS)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if not header:
            raise JobError(f"{uri}: the table is empty; the first line must name the columns")
        names = [name.strip() for name in header]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise JobError(f"{uri}: column {twice[0]!r} stands twice in the header; rename one")
        first = 1
        filled = (row for row in reader if row)
        while rows := list(islice(filled, CHUNK_ROWS)):
            for i, row in enumerate(rows):
                if len(row) > len(names):
                    raise JobError(
                        f"{uri} row {first + i}: {len(row)} fields, the header has {len(names)}; "
                        "put quotes around text that holds the separator"
                    )
                if len(row) < len(names):
                    row.extend([""] * (len(names) - len(row)))
            yield Chunk(uri, first, len(rows), dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
            first += len(rows)
    except csv.Error as error:
        raise JobError(f"{uri} line {reader.line_num}: {error}; check the quotes") from None


def _json_lines(uri: str, text: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise JobError(f"{uri} line {number}: not valid JSON ({error}); one object a line") from None
        if not isinstance(value, dict):
            raise JobError(f"{uri} line {number}: a {type(value).__name__}, not an object; one object a line")
        is_request = {"custom_id", "body"} <= value.keys()
        yield from _batch_request(value, f"{uri} line {number}") if is_request else (value,)


def _batch_request(value: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """A line of OpenAI's batch format as rows: `custom_id`, and in `body` prompt, n, size and any column of ours."""
    body = value["body"] if isinstance(value["body"], dict) else {}
    row = {name: cell for name, cell in body.items() if name not in ("n", "size", "model", "response_format")}
    row["id"] = value["custom_id"]
    width, by, height = str(body.get("size") or "").partition("x")
    if by:
        row |= {"width": width, "height": height}
    count = body.get("n", 1)
    if not isinstance(count, int) or not 1 <= count <= MAX_PER_REQUEST:
        raise JobError(f"{where}: n is {count!r}; a whole number from 1 to {MAX_PER_REQUEST}")
    if count == 1:
        yield row
        return
    for i in range(count):
        yield {**row, "id": f"{row['id']}#{i}"}


def _chunks(uri: str, rows: Iterable[dict[str, Any]]) -> Iterator[Chunk]:
    stream = iter(rows)
    first = 1
    while block := list(islice(stream, CHUNK_ROWS)):
        names = list(dict.fromkeys(name for row in block for name in row))
        yield Chunk(
            uri, first, len(block), {name: [row.get(name) for row in block] for name in names}, has_header=False
        )
        first += len(block)
