"""Where a row's images lie, and which version of them lies there, so that a changed image is a new row."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipelines.errors import StorageError
from pipelines.pieces import MAX_BYTES, Bytes, piece
from pipelines.storage import Store, is_local
from pipelines.web import Refused, permitted

SCHEMES = frozenset({"file", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "hdfs", "memory"})
"""Stores. Servers, which a table's author could make this machine ask, only where the job names them."""

WEB = ("http://", "https://")
READERS = 8
MAX_SHOWN = 1000
_NUMBERS = re.compile(r"^(box:)?\s*[-+.\d]+(\s*,\s*[-+.\d]+)+\s*$")
_BOX = re.compile(r"^\s*(\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*$")


class BadReference(ValueError):
    """A value that names no image."""


class References:
    """Looks images up once each. A version is the sha256 of a local file, or what a store's listing tells."""

    def __init__(self, storage_options: dict[str, Any], allow_hosts: Sequence[str] = ()) -> None:
        self.storage_options = storage_options
        self.allow_hosts = allow_hosts
        self.found: dict[str, str | BadReference] = {}
        self.stores: dict[str, Store] = {}

    def prepare(self, base: str, values: Iterable[Any]) -> None:
        """Look up all of a chunk's images at a time."""
        places = set()
        for value in values:
            try:
                places.add(self.locate(base, value))
            except BadReference:
                continue
        new = sorted(places - self.found.keys())
        with ThreadPoolExecutor(READERS) as pool:
            self.found |= zip(new, pool.map(self._look, new), strict=True)

    def locate(self, base: str, value: Any) -> str:
        """The absolute path or URL that a table's value means, relative to the table itself.

        Raises:
            BadReference: it is no path, or a URL of something that is not fetched.
        """
        where = _absolute(base, value)
        if not where.startswith(WEB):
            return where
        try:
            return permitted(where, self.allow_hosts)
        except Refused as error:
            raise BadReference(str(error)) from None

    def version(self, where: str) -> str:
        """Of what lies at `where`.

        Raises:
            BadReference: nothing does.
            StorageError: the store does not say.
        """
        if where not in self.found:
            self.found[where] = self._look(where)
        found = self.found[where]
        if isinstance(found, BadReference):
            raise found
        return found

    def _look(self, where: str) -> str | BadReference:
        if where.startswith(WEB):
            # A server is asked once, when the image is fetched.
            return where
        part = piece(where)
        if part is not None and isinstance(part, Bytes):
            return self._range(where, part)
        if is_local(where):
            path = where.removeprefix("file://")
            try:
                if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - a million rows go through here
                    return BadReference("is no file")
                with open(path, "rb") as file:  # noqa: PTH123 - as above
                    return hashlib.file_digest(file, "sha256").hexdigest()
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                return BadReference(f"is not there; looked for {path[:MAX_SHOWN]} ({reason})")
        mark = self._mark(where)
        return BadReference("is not there") if mark is None else f"{where} {mark}"

    def _range(self, where: str, part: Bytes) -> str | BadReference:
        if not is_local(part.file):
            mark = self._mark(part.file)
            return BadReference("is not there") if mark is None else part.version(f"{part.file} {mark}")
        if not 0 < part.end - part.start <= MAX_BYTES:
            return BadReference(f"names {part.end - part.start} bytes; 1 to {MAX_BYTES}")
        root, name = split(part.file)
        try:
            data = Store(root).read(name, part.start, part.end)
        except StorageError as error:
            return BadReference(f"cannot be read ({error})")
        if data is not None and len(data) < part.end - part.start:
            return BadReference("reaches beyond the end of that file")
        return BadReference("is not there") if data is None else hashlib.sha256(data).hexdigest()

    def _mark(self, where: str) -> str | None:
        root, name = split(where)
        return self.stores.setdefault(root, Store(root, self.storage_options)).version(name)


def locate(base: str, value: Any) -> str:
    """As `References.locate`, of what no web server may bring.

    Raises:
        BadReference: it is no path, or a URL of something that is not fetched.
    """
    where = _absolute(base, value)
    if where.startswith(WEB):
        raise BadReference(
            f"is behind {where.partition(':')[0]}, which is not fetched; copy it to a folder or a bucket"
        )
    return where


def _absolute(base: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadReference(f"is a {type(value).__name__}; expected a path or URL")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadReference("holds half a surrogate pair, which is no text") from None
    scheme, colon, _ = value.partition("://")
    if "\n" in value or "\0" in value:
        raise BadReference("holds a line break or NUL; rename the file")
    if colon and scheme.lower() not in SCHEMES and f"{scheme.lower()}://" not in WEB:
        raise BadReference(f"is behind {scheme}, which is not fetched; copy the images to a folder or a bucket")
    if colon:
        value = f"{scheme.lower()}://{value.partition('://')[2]}"
        if scheme.lower() != "file" and not all(value.partition("://")[2].partition("/")[::2]):
            raise BadReference("names no object; bucket and key are needed")
    where = value if colon or value.startswith("/") or not base else f"{base.rstrip('/')}/{value}"
    if not is_local(where):
        return where
    # A path that says file:// goes on saying that all nodes see it.
    prefix = "file://" if where.startswith("file://") else ""
    return prefix + os.path.abspath(where.removeprefix("file://"))  # noqa: PTH100 - as above


def split(where: str) -> tuple[str, str]:
    """(root, name): one root for all objects of a bucket, so that they share a connection."""
    if is_local(where):
        path = Path(where.removeprefix("file://"))
        return str(path.parent), path.name
    scheme, _, rest = where.partition("://")
    bucket, _, name = rest.partition("/")
    return f"{scheme}://{bucket}", name


def box(value: Any) -> str | None:
    """`box:left,top,right,bottom` where a mask is given as four whole numbers in pixels of the image, else None.

    Raises:
        BadReference: numbers that are no box.
    """
    if isinstance(value, str):
        match = _BOX.match(value)
        if match is None and _NUMBERS.match(value):
            raise BadReference("is no box: four whole numbers, left, top, right, bottom, in pixels")
        numbers = [int(n) for n in match.groups()] if match else []
    else:
        numbers = list(value) if isinstance(value, (list, tuple)) else []
    if not numbers:
        return None
    if len(numbers) != 4 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise BadReference(f"{value!r}: a box is four whole numbers, left, top, right, bottom")
    left, top, right, bottom = numbers
    if left >= right or top >= bottom:
        raise BadReference(f"{value!r} is an empty box; left < right and top < bottom")
    return f"box:{left},{top},{right},{bottom}"
