"""Which files a path, a folder or a pattern names, on a disk or under any fsspec URL."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from glob import glob
from itertools import chain, takewhile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fsspec.utils import glob_translate

from pipelines.errors import JobError, StorageError
from pipelines.storage import Store, is_local, remote_version

_MAGIC_AT_END = re.compile(r"[^*?\[]+/[^/]+")


def _is_there(path: str) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises where it may not look


def expand(url: str, storage_options: dict[str, Any]) -> Iterator[str]:
    """A path, a folder's URL or a glob → the files that it names, sorted.

    Raises:
        StorageError: the store refuses.
    """
    # In a web address a question mark begins the query.
    if (
        not any(c in url for c in "*?[")
        or url.startswith(("http://", "https://"))
        or (is_local(url) and _is_there(url.removeprefix("file://")))
    ):
        yield url
        return
    if is_local(url):
        yield from sorted(glob(url, recursive=True))  # noqa: PTH207 - Path.glob refuses an absolute pattern
        return
    store = Store(url, storage_options)
    protocol = urlsplit(url).scheme
    yield from sorted(f"{protocol}://{name}" for name in _find(store, url, pattern=True))


def list_files(url: str, storage_options: dict[str, Any]) -> tuple[str, Iterator[tuple[str, str]]]:
    """(root, every file under a folder, URL or glob as its path below the root and a mark of its version).

    The mark is the size with the ETag, or with the time of change where there is none; a local file has none. Nothing
    is opened. Files come in the order of their names.

    Raises:
        JobError: nothing is there.
        StorageError: the store refuses.
    """
    pattern = any(c in url for c in "*?[")
    if is_local(url):
        root = url.removeprefix("file://")
        if pattern and not _is_there(root):
            fixed = "/".join(takewhile(lambda part: not any(c in part for c in "*?["), root.split("/")))
            names = (os.path.relpath(name, fixed or ".") for name in expand(url, storage_options))
            return fixed, ((name, "") for name in names)
        if Path(root).is_file():
            return str(Path(root).parent), iter([(Path(root).name, "")])
        if not Path(root).is_dir():
            raise JobError(f"{url}: no such folder; check the path")
        return root.rstrip("/") or "/", _walk(root, "")
    store = Store(url, storage_options)
    fixed = "/".join(takewhile(lambda part: not any(c in part for c in "*?["), url.split("/"))) if pattern else url
    root = fixed.rstrip("/")
    paged = url.startswith("s3://") and (not pattern or _MAGIC_AT_END.fullmatch(url) is not None)
    if paged and (page := next(pages := _pages(store, root, url if pattern else None), None)) is not None:
        return root, chain(page, chain.from_iterable(pages))
    found = _find(store, url, pattern)
    if not found:
        raise JobError(f"{url}: nothing there; check the bucket and the prefix")
    if not pattern and list(found) == [root.partition("://")[2]]:
        root = root.rpartition("/")[0]
    stem = len(root.partition("://")[2]) + 1
    return root, ((name[stem:], remote_version(found[name])) for name in sorted(found))


def _pages(store: Store, root: str, pattern: str | None) -> Iterator[list[tuple[str, str]]]:
    """What S3 lists below `root`, a page at a time; of a pattern in the last part of `pattern`, what fits."""
    bucket, _, folder = root.partition("://")[2].partition("/")
    prefix = f"{folder}/" if folder else ""
    fits = None
    if pattern:
        try:
            fits = re.compile(glob_translate(pattern.rpartition("/")[2])).match
        except ValueError as error:
            raise StorageError(f"{pattern}: {error}; check the pattern") from None
    # Without a pattern, or with **, all that lies below; else what lies in the folder itself.
    options = {"Delimiter": "/"} if pattern and not pattern.endswith("**") else {}
    for page in store.pages(bucket, prefix, **options):
        here = [(o["Key"][len(prefix) :], remote_version({**o, "size": o["Size"]})) for o in page]
        files = [(name, mark) for name, mark in here if name and not name.endswith("/") and (not fits or fits(name))]
        if files:
            yield files


def _find(store: Store, url: str, pattern: bool) -> dict[str, dict[str, Any]]:
    look = store.filesystem.glob if pattern else store.filesystem.find

    def find() -> dict[str, dict[str, Any]]:
        try:
            return dict(look(url, detail=True))
        except ValueError as error:
            raise StorageError(f"{url}: {error}; check the pattern") from None

    return store.patiently(find)


def _walk(root: str, below: str, above: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    folder = os.path.join(root, below)  # noqa: PTH118 - Path costs five times as much here
    real = os.path.realpath(folder)
    if real in above:
        return  # A link to a folder that holds it.
    try:
        with os.scandir(folder) as entries:
            here = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from None
    for entry in here:
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir():
            yield from _walk(root, name, (*above, real))
        elif entry.is_file():
            yield name, ""
