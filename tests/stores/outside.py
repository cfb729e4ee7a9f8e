"""What somebody sees who has botocore, pyarrow and hashlib, and none of our code."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import pyarrow.parquet as pq
from botocore.config import Config
from botocore.session import Session

from tests.stores import BUCKET, Server


def client(server: Server, url: str = "") -> Any:
    """A plain client of a server, or of a proxy in front of it; it asks once."""
    return Session().create_client(
        "s3",
        endpoint_url=url or server.url,
        aws_access_key_id=server.key,
        aws_secret_access_key=server.secret,
        region_name="us-east-1",
        config=Config(
            retries={"total_max_attempts": 1},
            s3={"addressing_style": "path"},
            # rclone's answers to ranges have a checksum of the whole object.
            response_checksum_validation="when_required",
        ),
    )


def objects(server: Server, prefix: str) -> dict[str, bytes]:
    """Every object below a prefix, by its path below it."""
    s3 = client(server)
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
    keys = [found["Key"] for page in pages for found in page.get("Contents", ())]
    return {key.removeprefix(f"{prefix}/"): s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def whole_rows(found: dict[str, bytes]) -> list[dict[str, Any]]:
    """The manifest's rows: each of them once, each with a file of the size and sha256 that it states."""
    parts = [data for path, data in found.items() if path.startswith("manifest/") and path.endswith(".parquet")]
    rows = [row for part in parts for row in pq.read_table(io.BytesIO(part)).to_pylist()]
    assert len({row["key"] for row in rows}) == len(rows), "a row is there twice"
    for row in rows:
        if row["status"] == "ok":
            data = found[row["uri"]]
            assert (len(data), hashlib.sha256(data).hexdigest()) == (row["num_bytes"], row["sha256"]), row["uri"]
    return rows
