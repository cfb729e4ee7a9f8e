"""A folder on a disk or under any fsspec URL, as the few operations that the protocol needs.

Local: a sibling file, fsync, then a link (create) or rename (write), and fsync of the folder. S3: one request per
object, `If-None-Match: *` for create, through s3fs. Anything else fsspec reaches: create checks first, which is not
atomic, and need not be (see `commit`).
"""

from __future__ import annotations

import builtins
import logging
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import fsspec

from pipelines.errors import StorageError

S = TypeVar("S")
T = TypeVar("T")
_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{32}").fullmatch

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 60
SLOWEST_BYTES_PER_S = 20_000
PATIENCE_S = 600.0
FIRST_PATIENCE_S = 8.0
WAIT_S = 10.0
SAY_AFTER_S = 15.0
IN_FLIGHT = 16
# A body that was damaged or cut on its way is the fault of the way.
_ON_THE_WAY = {"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch"}
_log = logging.getLogger("pipelines")
_connections: dict[str, Any] = {}


class Exists(Exception):
    """A store says that the object is there already; not proof that somebody else wrote it."""


@dataclass(frozen=True, slots=True)
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

    def names(self, prefix: str) -> Iterable[str]: ...

    def write(self, path: str, data: bytes) -> None: ...

    def write_each(self, files: Iterable[tuple[str, bytes]]) -> None: ...

    def create(self, path: str, data: bytes) -> None: ...

    def delete(self, path: str) -> None: ...

    def each(self, action: Callable[[S], T], items: Iterable[S]) -> Iterable[T]: ...


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


class Store:
    """One output or input root. Paths are relative, with `/`. Picklable: every process opens a connection of its own,
    and one for all that come to it with the same options; of S3 each takes a tenth of a second of a core.

    `reached` means that somebody had an answer from there before: silence is then an outage, which is sat out for
    `PATIENCE_S`; else it is rather a slip in the endpoint, and `FIRST_PATIENCE_S` must do.
    """

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None, reached: bool = False) -> None:
        self.url = url.rstrip("/") if not is_local(url) else url.removeprefix("file://")
        self.storage_options = dict(storage_options or {})
        self.reached = reached
        self._fs: Any = None
        self._came = False

    def __getstate__(self) -> dict[str, Any]:
        # Another process has another working directory.
        url = str(self.local.absolute()) if self.local is not None else self.url
        return {
            "url": url,
            "storage_options": self.storage_options,
            "reached": self.reached,
            "_fs": None,
            "_came": True,
        }

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
                # Else s3fs asks for the size first: two requests, and of two objects where it is replaced in between.
                at_once = {"max_concurrency": 1} if self.url.startswith("s3://") else {}
                return bytes(self.filesystem.cat_file(self.uri(path), start=start or None, end=end, **at_once))
            except FileNotFoundError:
                return None

        return self.patiently(get)

    def read_with(self, path: str, reader: Callable[[Any], T]) -> T | None:
        """What `reader` makes of the open object, of which it may take any bytes; None where there is none."""

        def read() -> T | None:
            try:
                with self.filesystem.open(self.uri(path), "rb") as file:
                    return reader(file)
            except FileNotFoundError:
                return None

        return self.patiently(read)

    def version(self, path: str) -> str | None:
        """A mark of what lies there now, its size with the ETag or the time of change; None where nothing does."""

        def look() -> str | None:
            try:
                return remote_version(self.filesystem.info(self.uri(path)))
            except FileNotFoundError:
                return None

        return self.patiently(look)

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

        return self.patiently(look)

    def write(self, path: str, data: bytes, sync_folder: bool = True) -> None:
        """Put a whole object, replacing what is there. Only for names that follow from the content, and for hints.

        Without `sync_folder` a power cut may take a file away from a disk again, as if it had never been written.
        """
        if (root := self.local) is not None:
            with self._sibling(root / path, data) as written:
                written.replace(root / path)
            if sync_folder:
                _fsync_folder((root / path).parent)
            return
        self.patiently(lambda: self._put(path, data))

    def write_each(self, files: Iterable[tuple[str, bytes]]) -> None:
        """`write` of each path and content, some at a time; all of them are there to stay when it returns."""

        def one(file: tuple[str, bytes]) -> Path:
            self.write(*file, sync_folder=False)
            return Path(self.url, file[0]).parent

        folders = set(self.each(one, files))
        if self.local is not None:
            # Once for all of a shard's files: on ext4 each costs as much as a file.
            for folder in folders:
                _fsync_folder(folder)

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
                self._put(path, data, mode="create")
            elif self.filesystem.exists(self.uri(path)):
                raise Exists(path)
            else:
                self._put(path, data)
        except FileExistsError:
            raise Exists(path) from None
        except Exists:
            raise
        except Exception as error:
            # s3fs knows AWS's wording of it, not Ceph's.
            if http_status(error) == 412:
                raise Exists(path) from None
            refusal = self.refusal(error)
            if refusal is not None:
                raise refusal from None
            raise OSError(f"{self.uri(path)}: {error}") from error

    def list(self, prefix: str) -> dict[str, Info]:
        """Everything under a folder: relative path → size and time."""
        if self.local is not None:
            found: dict[str, Info] = {}
            for name in self.names(prefix):
                with suppress(FileNotFoundError):
                    stat = (self.local / name).stat()
                    found[name] = Info(stat.st_size, stat.st_mtime)
            return found
        if self.url.startswith("s3://"):
            return {
                name: Info(int(entry["Size"]), entry["LastModified"].timestamp()) for name, entry in self._below(prefix)
            }
        cut = len(self.filesystem._strip_protocol(self.url)) + 1
        there = self.patiently(lambda: self.filesystem.find(self.uri(prefix), detail=True))
        return {name[cut:]: Info(int(i["size"]), _timestamp(i)) for name, i in there.items()}

    def names(self, prefix: str) -> Iterator[str]:
        """The relative paths of `list`, some in memory at a time."""
        if (root := self.local) is not None:

            def fail(error: OSError) -> None:
                # A folder that cannot be read is not an empty one.
                if not isinstance(error, FileNotFoundError | NotADirectoryError):
                    raise self.refusal(error) or error

            # Path costs five times as much here.
            for folder, _, files in os.walk(root / prefix, onerror=fail):
                below = os.path.relpath(folder, root).replace(os.sep, "/") + "/"
                yield from (f"{below}{name}".removeprefix("./") for name in files if not name.startswith(".tmp-"))
        elif self.url.startswith("s3://"):
            yield from (name for name, _ in self._below(prefix))
        else:
            yield from self.list(prefix)

    def _below(self, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(relative path, what S3 lists) of every object under a folder."""
        bucket, _, folder = self.url.removeprefix("s3://").partition("/")
        cut = len(folder) + 1 if folder else 0
        where = "".join(f"{part}/" for part in (folder, prefix) if part)
        for entry in chain.from_iterable(self.pages(bucket, where)):
            # A web console keeps an empty folder as an object of that name.
            if not entry["Key"].endswith("/"):
                yield entry["Key"][cut:], entry

    def pages(self, bucket: str, prefix: str, **options: str) -> Iterator[builtins.list[dict[str, Any]]]:
        """What S3 lists under a prefix, a page at a time; s3fs itself would gather, and keep, all of it."""

        def ask(**token: str) -> dict[str, Any]:
            return self.patiently(
                lambda: self.filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **options, **token)
            )

        page = ask()
        yield page.get("Contents", [])
        while page.get("IsTruncated"):
            page = ask(ContinuationToken=page["NextContinuationToken"])
            yield page.get("Contents", [])

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

        self.patiently(remove)

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

    def _put(self, path: str, data: bytes, **options: Any) -> None:
        if getattr(self.filesystem, "async_impl", False):
            # s3fs asks for leave to send the body, and would wait for it for ever.
            silence_s = READ_TIMEOUT_S if self.reached else FIRST_PATIENCE_S
            options["timeout"] = silence_s + len(data) / SLOWEST_BYTES_PER_S
        self.filesystem.pipe_file(self.uri(path), data, **options)

    @property
    def filesystem(self) -> Any:
        """The fsspec filesystem, with the clients' stacked retries (5 × 5) turned down to ours."""
        if self._fs is None:
            at = repr((os.getpid(), urlsplit(self.url).scheme, sorted(self.storage_options.items())))
            if self._came and at in _connections:
                self._fs = _connections[at]
                return self._fs
            protocol = urlsplit(self.url).scheme
            options = dict(self.storage_options)
            if protocol == "s3":
                config = {
                    "connect_timeout": CONNECT_TIMEOUT_S,
                    "read_timeout": READ_TIMEOUT_S,
                    "retries": {"total_max_attempts": 1},
                    "max_pool_connections": 2 * IN_FLIGHT,
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
            if self._came:
                _connections[at] = self._fs
        return self._fs

    def patiently(self, action: Callable[[], T]) -> T:
        """Run `action`, again and again while the store is silent or busy; what it refuses for good is said at once.

        Raises:
            StorageError: it refuses, or has been silent or busy for too long.
        """
        begun = time.monotonic()
        said = False
        for n in count():
            try:
                result = action()
            except StorageError:
                raise
            except Exception as error:  # noqa: BLE001 - botocore makes its classes at run time
                refusal = self.refusal(error)
                if refusal is not None:
                    raise refusal from None
                last = first_line(error)
            else:
                self.reached = True
                return result
            # Full jitter: whoever waits for the same store must not come back all at once.
            wait_s = random.uniform(0, min(WAIT_S, 0.2 * 2**n))
            silent_s = time.monotonic() - begun
            patience_s = PATIENCE_S if self.reached else FIRST_PATIENCE_S
            if silent_s + wait_s > patience_s:
                break
            if silent_s > SAY_AFTER_S and not said:
                said = True
                _log.warning(
                    "%s: no answer for %.0f s (%s); tries for %.0f s in all", self.url, silent_s, last, patience_s
                )
            time.sleep(wait_s)
        raise StorageError(f"{self.url}: no answer for {silent_s:.0f} s ({last}); check the endpoint and the network")

    def refusal(self, error: BaseException) -> StorageError | None:
        """A StorageError where trying again cannot help."""
        text = first_line(error)
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
        if http_status(error) in (301, 400, 405, 501) and code not in _ON_THE_WAY:
            return StorageError(
                f"{self.url}: the store refuses the request ({code}: {text}); check endpoint and region"
            )
        return None

    def _sibling(self, target: Path, data: bytes) -> _Written:
        return _Written(self, target, data)


def _response(error: BaseException) -> dict[str, Any]:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(response := getattr(cause, "response", None), dict):
            return response
        cause = cause.__cause__ or cause.__context__
    return {}


def error_code(error: BaseException) -> str:
    """What S3 calls an error, such as SlowDown; "" where it did not say."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def http_status(error: BaseException) -> int:
    """The status of S3's answer; 0 where there was none."""
    return int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def first_line(error: BaseException) -> str:
    """An error for a message."""
    return next(iter(f"{error}".splitlines()), "") or type(error).__name__


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
            raise self.store.refusal(error) or error from None
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


def remote_version(info: dict[str, Any]) -> str:
    mark = info.get("ETag") or info.get("etag") or info.get("md5Hash") or _timestamp(info)
    return f"{info.get('size')} {mark}"
