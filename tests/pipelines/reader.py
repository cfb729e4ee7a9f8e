"""An independent reader of an output: pyarrow, hashlib and Pillow, none of our own code."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def rows(out: Path | str, **options: Any) -> list[dict[str, Any]]:
    """Every manifest row, once its file has been opened and found to be what the row says."""
    filesystem, root = fsspec.core.url_to_fs(str(out), **options)
    filesystem.invalidate_cache()
    parts = sorted(name for name in filesystem.find(f"{root}/manifest") if name.endswith(".parquet"))
    tables = [pq.read_table(io.BytesIO(filesystem.cat_file(name))) for name in parts]
    found = pa.concat_tables(tables, promote_options="permissive").to_pylist() if tables else []
    for row in found:
        if row["status"] != "ok":
            assert row["uri"] is None
            continue
        data = filesystem.cat_file(f"{root}/{row['uri']}")
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        assert len(data) == row["num_bytes"]
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert (image.format, image.size) == (row["format"].upper(), (row["width"], row["height"]))
            assert np.asarray(image).std() > 0
    keys = [row["key"] for row in found]
    assert len(keys) == len(set(keys)), "a key stands twice in the manifest"
    return found


def contents(out: Path | str, **options: Any) -> dict[str, str]:
    """key → sha256 of its picture, or the status where there is none."""
    return {row["key"]: row["sha256"] or row["status"] for row in rows(out, **options)}
