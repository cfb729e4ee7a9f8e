"""What somebody sees of an output who has pyarrow, hashlib and the files, and none of our code."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DATA = ("images/", "data/", "thumbnails/", "intermediates/")


@dataclass
class Seen:
    """An output. `faults` are rows that stand twice, parts that cannot be read, and files missing or torn."""

    rows: dict[str, str] = field(default_factory=dict)
    """key -> sha256 of its picture, or its status."""
    pictures: dict[str, str] = field(default_factory=dict)
    """Every data file that a part names -> sha256 of what it holds."""
    planned: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    num_orphans: int = 0
    """Data files that no part names, and half-written ones."""
    finished: bool = False

    @property
    def lost(self) -> set[str]:
        return self.planned - self.rows.keys()

    def differences(self, wanted: Seen) -> list[str]:
        """All that is not as in `wanted`, an output that nobody disturbed."""
        found = list(self.faults)
        found += [f"row {key} is lost" for key in sorted((wanted.planned | self.planned) - self.rows.keys())]
        found += [f"row {key} was never planned" for key in sorted(self.rows.keys() - wanted.planned)]
        found += [
            f"row {key} has other bytes"
            for key in sorted(self.rows.keys() & wanted.rows.keys())
            if self.rows[key] != wanted.rows[key]
        ]
        if self.pictures != wanted.pictures:
            names = sorted(dict(self.pictures.items() ^ wanted.pictures.items()))
            found.append(f"{len(names)} files are not those of the undisturbed run, {names[0]} among them")
        return found + ([] if self.finished else ["there is no _SUCCESS"])


Options = dict[str, Any]
"""What a job's `storage_options` say of an S3 server; empty for a folder."""


def s3(options: Options) -> Any:
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=options["endpoint_url"],
        aws_access_key_id=options.get("key"),
        aws_secret_access_key=options.get("secret"),
    )


def objects(out: str, options: Options | None = None) -> dict[str, bytes]:
    """Every file or object of an output: its path below it -> its bytes."""
    if not out.startswith("s3://"):
        root = Path(out.removeprefix("file://"))
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    client = s3(options or {})
    bucket, _, prefix = out.removeprefix("s3://").partition("/")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    names = [item["Key"] for page in pages for item in page.get("Contents", ())]
    return {name[len(prefix) + 1 :]: client.get_object(Bucket=bucket, Key=name)["Body"].read() for name in names}


def put(out: str, contents: dict[str, bytes], options: Options | None = None) -> None:
    """An output as `objects` gave it, at another place."""
    if not out.startswith("s3://"):
        for name, data in contents.items():
            path = Path(out.removeprefix("file://")) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return
    client = s3(options or {})
    bucket, _, prefix = out.removeprefix("s3://").partition("/")
    for name, data in contents.items():
        client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=data)


def look(out: str, options: Options | None = None) -> Seen:
    """Read all of an output, and hold what its parts say against what is there."""
    return examine(objects(out, options))


def examine(contents: dict[str, bytes]) -> Seen:
    seen = Seen(finished="_SUCCESS" in contents)
    for name, data in contents.items():
        if name.startswith("_ldm/plans/") and name.endswith(".parquet") and "/rows-" in name:
            seen.planned.update(pq.read_table(pa.BufferReader(data), columns=["key"])["key"].to_pylist())
        if name.startswith("manifest/") and name.endswith(".parquet"):
            try:
                rows = pq.read_table(pa.BufferReader(data)).to_pylist()
            except (pa.ArrowException, OSError) as error:
                seen.faults.append(f"part {name} cannot be read ({error})")
                continue
            for row in rows:
                _row(seen, name, row, contents)
    data_files = {name for name in contents if name.startswith(DATA)}
    seen.num_orphans = len(data_files - seen.pictures.keys())
    return seen


def _row(seen: Seen, part: str, row: dict[str, Any], contents: dict[str, bytes]) -> None:
    if row["key"] in seen.rows:
        seen.faults.append(f"row {row['key']} stands twice, in {part} too")
    seen.rows[row["key"]] = row["sha256"] or row["status"]
    if row["status"] != "ok":
        return
    named = [(row["uri"], row["sha256"], row["num_bytes"])]
    named += [(row["thumbnail"], None, None)] if row.get("thumbnail") else []
    for uri, sha256, num_bytes in named:
        if uri not in contents:
            seen.faults.append(f"{part} names {uri}, which is not there")
            continue
        digest = hashlib.sha256(contents[uri]).hexdigest()
        seen.pictures[uri] = digest
        if sha256 is not None and (digest != sha256 or len(contents[uri]) != num_bytes):
            seen.faults.append(f"{uri} is torn: not what {part} says of it")
