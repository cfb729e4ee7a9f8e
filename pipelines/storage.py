"""A folder on a disk or under any fsspec URL, as the few operations that the protocol needs.

Local: a sibling file, fsync, then a link (create) or rename (write), and fsync of the folder. S3: one request per
object, `If-None-Match: *` for create, through s3fs. Anything else fsspec reaches: create checks first, which is not
atomic, and need not be (see `commit`).
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import fsspec
import stamina
from fsspec.utils import glob_translate

from pipelines.errors import JobError, StorageError

S = TypeVar("S")
T = TypeVar("T")
_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{32}").fullmatch
_MAGIC_AT_END = re.compile(r"[^*?\[]+/[^/]+")

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 60
ATTEMPTS = 6
PATIENCE_S = 60.0
IN_FLIGHT = 16


class Exists(Exception):
    """A store says that the object is there already; not proof that somebody else wrote it."""


@dataclass(frozen=True)
class Info:
    """One listed object."""

    num_bytes: int
    modified_s: float


class ObjectStore(Protocol):
    """All that commit, resume, the count at the end and `gc` ask of a store; `Store` says what each does.

    The simulation in `tests/faults` has one in memory and drives the same code with it.
    """

    url: str

    def uri(self, path: str) -> str: ...

    def read(self, path: str) -> bytes | None: ...

    def info(self, path: str) -> Info | None: ...

    def list(self, prefix: str) -> dict[str, Info]: ...

    def write(self, path: str, data: bytes) -> None: ...

    def create(self, path: str, data: bytes) -> None: ...

    def delete(self, path: str) -> None: ...

    def each(self, action: Callable[[S], T], items: Iterable[S]) -> Iterable[T]: ...


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


class Store:
    """One output or input root. Paths are relative, with `/`. Picklable: every process opens its own connection."""

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None) -> None:
        self.url = url.rstrip("/") if not is_local(url) else url.removeprefix("file://")
        self.storage_options = dict(storage_options or {})
        self._fs: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # Another process has another working directory.
        url = str(self.local.absolute()) if self.local is not None else self.url
        return {"url": url, "storage_options": self.storage_options, "_fs": None}

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    @property
    def local(self) -> Path | None:
        """The folder, where the store is one on this machine."""
        return Path(self.url) if is_local(self.url) else None

    def uri(self, path: str) -> str:
        return f"{self.url}/{path}"

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes | None:
        """The object's bytes from `start` to before `end`, as far as it has them, or None where there is none."""

        def get() -> bytes | None:
            try:
                if (root := self.local) is not None:
                    with (root / path).open("rb") as file:
                        file.seek(start)
                        return file.read(-1 if end is None else end - start)
                if end is not None and end <= start:
                    return b""
                return bytes(self.filesystem.cat_file(self.uri(path), start=start or None, end=end))
            except FileNotFoundError:
                return None

        return self._patiently(get)

    def read_with(self, path: str, reader: Callable[[Any], T]) -> T | None:
        """What `reader` makes of the open object, of which it may take any bytes; None where there is none."""

        def read() -> T | None:
            try:
                with self.filesystem.open(self.uri(path), "rb") as file:
                    return reader(file)
            except FileNotFoundError:
                return None

        return self._patiently(read)

    def version(self, path: str) -> str | None:
        """A mark of what lies there now, its size with the ETag or the time of change; None where nothing does."""

        def look() -> str | None:
            try:
                return _remote_version(self.filesystem.info(self.uri(path)))
            except FileNotFoundError:
                return None

        return self._patiently(look)

    def info(self, path: str) -> Info | None:
        """Size and time of one object, None where there is none."""

        def look() -> Info | None:
            try:
                if (root := self.local) is not None:
                    stat = (root / path).stat()
                    return Info(stat.st_size, stat.st_mtime)
                found = self.filesystem.info(self.uri(path))
                return Info(int(found["size"]), _timestamp(found))
            except FileNotFoundError:
                return None

        return self._patiently(look)

    def write(self, path: str, data: bytes) -> None:
        """Put a whole object, replacing what is there. Only for names that follow from the content, and for hints."""
        if (root := self.local) is not None:
            with self._sibling(root / path, data) as written:
                written.replace(root / path)
            _fsync_folder((root / path).parent)
            return
        self._patiently(lambda: self.filesystem.pipe_file(self.uri(path), data))

    def create(self, path: str, data: bytes) -> None:
        """Put a whole object only where there is none: one request, no retry.

        Raises:
            Exists: the store says so. It may be wrong, and it may be our own earlier try.
            OSError: anything may have happened; read it back.
            StorageError: refused for good (credentials, permission, no such bucket).
        """
        if (root := self.local) is not None:
            try:
                with self._sibling(root / path, data) as written:
                    os.link(written, root / path)
            except FileExistsError:
                raise Exists(path) from None
            _fsync_folder((root / path).parent)
            return
        try:
            if self.url.startswith("s3://"):
                self.filesystem.pipe_file(self.uri(path), data, mode="create")
            elif self.filesystem.exists(self.uri(path)):
                raise Exists(path)
            else:
                self.filesystem.pipe_file(self.uri(path), data)
        except FileExistsError:
            raise Exists(path) from None
        except Exists:
            raise
        except Exception as error:
            refusal = self._refusal(error)
            if refusal is not None:
                raise refusal from None
            raise OSError(f"{self.uri(path)}: {error}") from error

    def list(self, prefix: str) -> dict[str, Info]:
        """Everything under a folder: relative path → size and time."""

        def ls() -> dict[str, Info]:
            if (root := self.local) is not None:
                return {
                    str(p.relative_to(root)): Info(p.stat().st_size, p.stat().st_mtime)
                    for p in (root / prefix).rglob("*")
                    if p.is_file() and not p.name.startswith(".tmp-")
                }
            cut = len(self.filesystem._strip_protocol(self.url)) + 1
            found = self.filesystem.find(self.uri(prefix), detail=True)
            return {name[cut:]: Info(int(i["size"]), _timestamp(i)) for name, i in found.items()}

        return self._patiently(ls)

    def leftovers(self) -> Iterable[str]:
        """Half-written files that dead processes left on a disk; no other store shows any."""
        root = self.local
        return [] if root is None else [str(p.relative_to(root)) for p in root.rglob(".tmp-*") if _TEMPORARY(p.name)]

    def delete(self, path: str) -> None:
        """Remove one object if it is there. Never for what a part may name."""

        def remove() -> None:
            try:
                if (root := self.local) is not None:
                    (root / path).unlink()
                else:
                    self.filesystem.rm_file(self.uri(path))
            except FileNotFoundError:
                pass

        self._patiently(remove)

    def each(self, action: Callable[[S], T], items: Iterable[S]) -> Iterable[T]:
        """`action` of every item, some at a time; results in the order of the items."""
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            return list(pool.map(action, items))

    def probe(self) -> None:
        """Find out now, not after an hour of GPU time, whether this store takes a write.

        Raises:
            StorageError: it does not, with what to do.
        """
        path = f"_ldm/probe-{uuid.uuid4().hex}"
        self.write(path, b"ldm-batch checks that it may write here\n")
        self.delete(path)

    @property
    def filesystem(self) -> Any:
        """The fsspec filesystem, with the clients' stacked retries (5 × 5) turned down to ours."""
        if self._fs is None:
            protocol = urlsplit(self.url).scheme
            options = dict(self.storage_options)
            if protocol == "s3":
                config = {
                    "connect_timeout": CONNECT_TIMEOUT_S,
                    "read_timeout": READ_TIMEOUT_S,
                    "retries": {"total_max_attempts": 1},
                    **options.pop("config_kwargs", {}),
                }
                options = {"config_kwargs": config, **options}
            options = {"use_listings_cache": False, **options}
            try:
                self._fs = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
            except TypeError as error:
                raise StorageError(
                    f"{self.url}: storage_options: {error}; see fsspec's options for {protocol}"
                ) from None
            except (ImportError, ValueError) as error:
                raise StorageError(f"{self.url}: {error}; use a path, s3://… or another fsspec URL") from None
            if protocol == "s3":
                self._fs.retries = 1
        return self._fs

    def _patiently(self, action: Callable[[], T]) -> T:
        """Run with retries; what the store refuses for good is a StorageError at once."""
        last: BaseException | None = None
        try:
            for attempt in stamina.retry_context(
                on=_Again, attempts=ATTEMPTS, timeout=PATIENCE_S, wait_initial=0.1, wait_max=10, wait_jitter=0.5
            ):
                with attempt:
                    try:
                        return action()
                    except StorageError:
                        raise
                    except Exception as error:
                        refusal = self._refusal(error)
                        if refusal is not None:
                            raise refusal from None
                        last = error
                        raise _Again from error
        except _Again:
            pass
        raise StorageError(f"{self.url}: no answer after {ATTEMPTS} tries ({last}); check the endpoint and the network")

    def _refusal(self, error: BaseException) -> StorageError | None:
        """A StorageError where trying again cannot help."""
        text = f"{error}".splitlines()[0] if f"{error}" else type(error).__name__
        name = type(error).__name__
        if self.local is not None:
            return StorageError(f"{self.url}: {text}; choose a folder that you may write to, with room on its disk")
        code = error_code(error)
        if isinstance(error, TypeError):
            return StorageError(f"{self.url}: storage_options: {text}; see the options of fsspec's client for it")
        if name in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError"):
            return StorageError(
                f"{self.url}: {text}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or storage_options"
            )
        if isinstance(error, PermissionError) or code in ("403", "AccessDenied", "ExpiredToken"):
            return StorageError(
                f"{self.url}: the store refuses these credentials ({code or text}); check AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_ENDPOINT_URL or storage_options"
            )
        if code == "NoSuchBucket" or (isinstance(error, FileNotFoundError) and "bucket" in text.lower()):
            return StorageError(f"{self.url}: no such bucket; create it, or choose another path")
        return None

    def _sibling(self, target: Path, data: bytes) -> _Written:
        return _Written(self, target, data)


def error_code(error: BaseException) -> str:
    """What S3 calls an error, such as SlowDown; "" where it did not say."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict) and (code := str(response.get("Error", {}).get("Code", ""))):
            return code
        cause = cause.__cause__ or cause.__context__
    return ""


class _Again(Exception):
    """Worth another try."""


class _Written:
    """A complete, synced file beside its target, gone at the end unless it was renamed."""

    def __init__(self, store: Store, target: Path, data: bytes) -> None:
        self.store, self.data = store, data
        self.path = target.parent / f".tmp-{uuid.uuid4().hex}"

    def __enter__(self) -> Path:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("xb") as file:
                file.write(self.data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self.path.unlink(missing_ok=True) if self.path.parent.is_dir() else None
            raise self.store._refusal(error) or error from None
        return self.path

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _timestamp(info: dict[str, Any]) -> float:
    for name in ("LastModified", "mtime", "updated", "last_modified", "created"):
        value = info.get(name)
        if value is not None:
            return float(value.timestamp()) if hasattr(value, "timestamp") else float(value)
    return 0.0


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
    return root, ((name[stem:], _remote_version(found[name])) for name in sorted(found))


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
    token: dict[str, str] = {}
    while True:
        page = store._patiently(
            lambda: store.filesystem.call_s3(
                "list_objects_v2",
                Bucket=bucket,
                Prefix=prefix,
                **options,
                **token,  # noqa: B023 - called at once
            )
        )
        here = [(o["Key"][len(prefix) :], _remote_version({**o, "size": o["Size"]})) for o in page.get("Contents", ())]
        files = [(name, mark) for name, mark in here if name and not name.endswith("/") and (not fits or fits(name))]
        if files:
            yield files
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def _find(store: Store, url: str, pattern: bool) -> dict[str, dict[str, Any]]:
    look = store.filesystem.glob if pattern else store.filesystem.find

    def find() -> dict[str, dict[str, Any]]:
        try:
            return dict(look(url, detail=True))
        except ValueError as error:
            raise StorageError(f"{url}: {error}; check the pattern") from None

    return store._patiently(find)


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


def _remote_version(info: dict[str, Any]) -> str:
    mark = info.get("ETag") or info.get("etag") or info.get("md5Hash") or _timestamp(info)
    return f"{info.get('size')} {mark}"
