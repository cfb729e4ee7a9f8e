"""Multipart uploads that were begun and never ended: S3 keeps their parts, bills them, and lists them nowhere else.

An object above 100 MB goes up in parts. What fails is given up there and then; what is killed stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipelines.storage import Store, http_status


@dataclass(frozen=True)
class Upload:
    """One of them; `path` is what it was to become."""

    path: str
    upload_id: str
    begun_s: float
    num_bytes: int


def unfinished_uploads(store: Store) -> Iterator[Upload]:
    """Those below a store; none where it is not S3, or a front that cannot say.

    Raises:
        StorageError: the store refuses or does not answer.
    """
    if not store.url.startswith("s3://"):
        return
    bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
    prefix = f"{prefix}/" if prefix else ""
    after: dict[str, str] = {}
    while True:
        page = _ask(store, "list_multipart_uploads", Bucket=bucket, Prefix=prefix, **after)
        for upload in page.get("Uploads", ()):
            where = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            path = upload["Key"].removeprefix(prefix)
            yield Upload(path, upload["UploadId"], upload["Initiated"].timestamp(), _num_bytes(store, where))
        if not page.get("IsTruncated"):
            return
        after = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def give_up(store: Store, upload: Upload) -> None:
    """Delete an upload's parts; whoever still sends some is refused from then on, and begins anew."""
    bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
    key = f"{prefix}/{upload.path}" if prefix else upload.path
    _ask(store, "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload.upload_id)


def _num_bytes(store: Store, where: dict[str, str]) -> int:
    total = 0
    after: dict[str, Any] = {}
    while True:
        page = _ask(store, "list_parts", **where, **after)
        total += sum(int(part["Size"]) for part in page.get("Parts", ()))
        if not page.get("IsTruncated"):
            return total
        after = {"PartNumberMarker": page["NextPartNumberMarker"]}


def _ask(store: Store, what: str, **arguments: Any) -> dict[str, Any]:
    call = partial(store.filesystem.call_s3, what, **arguments)

    def ask() -> dict[str, Any]:
        try:
            return dict(call())
        except Exception as error:
            # Ended since it was listed, or a front that knows no such request.
            if isinstance(error, FileNotFoundError) or http_status(error) in (404, 501):
                return {}
            raise

    return store.patiently(ask)
