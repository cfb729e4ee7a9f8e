"""Rows that are samples: members of a tar, or files of a folder, that share a name up to its first dot.

WebDataset's convention (https://github.com/webdataset/webdataset), which img2dataset writes too: `0001.jpg` is the
image of sample `0001`, `0001.txt` its caption, `0001.json` its other columns. Nothing is ever unpacked: an image is
named as a range of bytes of its tar.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.chunk import CHUNK_ROWS, OF_THE_IMAGE, Chunk
from pipelines.errors import JobError
from pipelines.image_source import IMAGE_SUFFIXES
from pipelines.listing import list_files
from pipelines.pieces import Bytes
from pipelines.storage import Store, is_local

TEXT_SUFFIXES = frozenset({".txt", ".json"})
MAX_TEXT_BYTES = 1 << 20
HASHED_AT_A_TIME = 1 << 20
READERS = 16
FILES_AT_A_TIME = 1024
READ_AHEAD = 4 << 20


@dataclass
class Part:
    """One member or file of a sample: of a text its content, of an image where it lies, in which version."""

    name: str
    place: str = ""
    text: bytes = b""
    version: str | None = None
    problem: str | None = None

    @property
    def key(self) -> str:
        """The sample that it belongs to; empty where it belongs to none."""
        folder, slash, base = self.name.removeprefix("./").rpartition("/")
        stem, dot, _ = base.partition(".")
        hidden = not stem or not dot or (stem.startswith("__") and stem.endswith("__"))
        return "" if hidden else f"{folder}{slash}{stem}"

    @property
    def extension(self) -> str:
        return "." + self.name.rpartition("/")[2].partition(".")[2].lower()


def read_tar(uri: str, storage_options: dict[str, Any]) -> Iterator[Chunk]:
    """A row per sample of one tar: its key as `id`, `image`, the caption as `prompt`, and what its JSON holds.

    Raises:
        JobError: it is no tar, or a compressed one.
    """
    folder, _, name = uri.rpartition("/")
    if is_local(uri):
        with Path(uri.removeprefix("file://")).open("rb") as file:
            yield from _chunks(uri, _members(uri, name, file, None))
        return
    store = Store(folder, storage_options)
    mark = store.version(name)
    with store.filesystem.open(uri, "rb", block_size=READ_AHEAD, cache_type="readahead") as file:
        yield from _chunks(uri, _members(uri, name, file, f"{uri} {mark}"))


def read_img2dataset(path: str, storage_options: dict[str, Any]) -> Iterator[Chunk]:
    """The samples of img2dataset's output, of its tars or of its folders; what it could not download is skipped.

    Raises:
        JobError: there is none.
    """
    root, listing = list_files(path, storage_options)
    store = Store(root or ".", storage_options)
    found = False
    for (kind, folder), group in groupby(listing, key=lambda file: _kind(file[0])):
        if kind == "parquet":
            for name, _ in group:
                yield Chunk(store.uri(name), 1, 0, {}, num_skipped=_not_downloaded(store, name))
        elif kind == "tar":
            for name, _ in group:
                for chunk in read_tar(store.uri(name), storage_options):
                    found = True
                    chunk.base = store.uri(folder) if folder else store.url
                    yield chunk
        elif kind == "sample":
            for chunk in _chunks(store.uri(folder), _files(store, group)):
                found = True
                chunk.base = store.url
                yield chunk
    if not found:
        raise JobError(f"source.path {path}: no tar and no image there; give the folder that img2dataset wrote")


def _kind(name: str) -> tuple[str, str]:
    folder, _, _ = name.rpartition("/")
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in (".tar", ".parquet"):
        return suffix[1:], folder
    # Beside the folders of samples lie statistics.
    is_part = bool(folder) and (suffix in IMAGE_SUFFIXES or suffix in TEXT_SUFFIXES)
    return "sample" if is_part else "other", folder


def _not_downloaded(store: Store, name: str) -> int:
    data = store.read(name)
    try:
        status = pq.read_table(pa.BufferReader(data or b""), columns=["status"])["status"]
    except (pa.ArrowException, KeyError, OSError):
        return 0
    return int(pc.sum(pc.not_equal(status, "success")).as_py() or 0)


class _Careful:
    """A file of which no header can ask for much: tarfile reads a long name or a pax header at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_TEXT_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.file.read(size)


def _members(uri: str, name: str, file: IO[bytes], mark: str | None) -> Iterator[Part]:
    """Every member as a Part; a damaged tar ends in one that says so. `mark` is the version of a tar in a store."""
    start = file.read(2)
    file.seek(0)
    if start == b"\x1f\x8b":
        raise JobError(f"{uri}: a compressed tar has no places to read from; unpack it (gunzip), as images are packed")
    try:
        tar = tarfile.TarFile(fileobj=_Careful(file))  # type: ignore[arg-type]
    except tarfile.TarError as error:
        raise JobError(f"{uri}: not a tar ({error}); is the copy whole?") from None
    last = ""
    while True:
        try:
            member = tar.next()
        except (tarfile.TarError, ValueError) as error:
            yield _cut(last, f"the tar is damaged or cut off after {last!r} ({error})")
            return
        # tarfile keeps every member otherwise.
        tar.members = []  # type: ignore[attr-defined]
        if member is None:
            break
        if member.isdir():
            continue
        if member.size < 0:
            yield _cut(last, f"the tar is damaged after {last!r} (a size below zero)")
            return
        last = member.name
        place = Bytes(name, member.offset_data, member.offset_data + member.size)

        part = Part(member.name, str(place), problem=_refused(member))
        if part.problem is None and part.extension in TEXT_SUFFIXES:
            file.seek(place.start)
            part.text = file.read(min(member.size, MAX_TEXT_BYTES + 1))
        elif part.problem is None and part.extension in IMAGE_SUFFIXES:
            part.version = _sha256(file, place) if mark is None else place.version(mark)
        yield part
    file.seek(tar.offset)
    if file.read(512) != b"\0" * 512:
        yield _cut(last, f"the tar is damaged or cut off after {last!r} (no end mark)")


def _cut(last: str, problem: str) -> Part:
    return Part(f"{last or 'first'}.cut", problem=problem)


def _refused(member: tarfile.TarInfo) -> str | None:
    shown = repr(member.name[:200])
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return f"member {shown} names a place outside of the tar; pack it again with plain names"
    if member.issym() or member.islnk():
        return f"member {shown} is a link; pack the file itself"
    if not member.isreg() or member.issparse():
        return f"member {shown} is no plain file (a device, a pipe or a sparse file); pack a plain one"
    return None


def _sha256(file: IO[bytes], place: Bytes) -> str:
    found = hashlib.sha256()
    file.seek(place.start)
    left = place.end - place.start
    while left and (data := file.read(min(left, HASHED_AT_A_TIME))):
        found.update(data)
        left -= len(data)
    return found.hexdigest()


def _files(store: Store, listing: Iterable[tuple[str, str]]) -> Iterator[Part]:
    files = iter(listing)
    while block := list(islice(files, FILES_AT_A_TIME)):
        texts = [name for name, _ in block if PurePosixPath(name).suffix.lower() in TEXT_SUFFIXES]
        with ThreadPoolExecutor(READERS) as pool:
            read = dict(zip(texts, pool.map(lambda name: store.read(name, 0, MAX_TEXT_BYTES + 1), texts), strict=True))
        for name, mark in block:
            # A local file's content is looked at when the row is planned.
            version = None if is_local(store.url) else f"{store.uri(name)} {mark}"
            yield Part(name.rpartition("/")[2], name, read.get(name) or b"", version)


def _chunks(uri: str, parts: Iterable[Part]) -> Iterator[Chunk]:
    samples = (
        sample
        for key, group in groupby(parts, key=lambda part: part.key)
        if key and (sample := _Sample(key, list(group))).is_one
    )
    first = 1
    while block := list(islice(samples, CHUNK_ROWS)):
        rows = [sample.row for sample in block]
        # A tar without a single caption lacks prompts, and no column: its rows may have the stage's own.
        names = list(dict.fromkeys(chain(("id", "image", "prompt"), (name for row in rows for name in row))))
        yield Chunk(
            uri,
            first,
            len(block),
            {name: [row.get(name) for row in rows] for name in names},
            has_header=False,
            versions={"image": [sample.version for sample in block]},
            problems={i: sample.problem for i, sample in enumerate(block) if sample.problem is not None},
        )
        first += len(block)


class _Sample:
    """One row: what the parts under one key say, and what is wrong with them."""

    def __init__(self, key: str, parts: list[Part]) -> None:
        self.row: dict[str, Any] = {"id": key}
        self.version: str | None = None
        self.problem = next((part.problem for part in parts if part.problem is not None), None)
        images = [part for part in parts if part.extension in IMAGE_SUFFIXES]
        # The caption first: it is the prompt, whatever the JSON says.
        texts = sorted((p for p in parts if p.extension in TEXT_SUFFIXES), key=lambda p: p.extension, reverse=True)
        self.is_one = bool(images or texts or self.problem)
        if self.problem is not None or not self.is_one:
            return
        names = [part.name for part in [*images, *texts]]
        twice = next((name for name in names if names.count(name) > 1), None)
        if len(images) != 1 or twice is not None:
            found = f"{twice!r} twice" if twice else ", ".join(repr(part.name) for part in images) or "no image"
            self.problem = f"a sample has one image, sample {key[:200]!r} has {found}"
            return
        try:
            for part in texts:
                self._read(part)
        except ValueError as error:
            self.problem = str(error)
            return
        self.row["image"] = images[0].place
        self.version = images[0].version

    def _read(self, part: Part) -> None:
        if len(part.text) > MAX_TEXT_BYTES:
            raise ValueError(f"{part.name!r} is larger than {MAX_TEXT_BYTES >> 20} MiB; captions and JSON are small")
        try:
            text = part.text.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{part.name!r} is not UTF-8; save it as UTF-8") from None
        if part.extension == ".txt":
            self.row["prompt"] = text.strip()
            return
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{part.name!r} is not valid JSON ({error})") from None
        if not isinstance(value, dict):
            raise ValueError(f"{part.name!r} holds a {type(value).__name__}, not an object")
        for name, cell in value.items():
            taken = name in self.row or name in ("image", *OF_THE_IMAGE)
            self.row[f"input.{name}" if taken else name] = cell
