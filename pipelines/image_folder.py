"""`metadata.jsonl` beside the pictures: what Hugging Face's `load_dataset("imagefolder", …)` reads of an output.

https://huggingface.co/docs/datasets/image_dataset#imagefolder
"""

from __future__ import annotations

from pathlib import PurePosixPath

from pipelines.manifest import METADATA_JSONL, SCHEMA, read_manifest
from pipelines.shard_file import as_json, described
from pipelines.storage import Store


def write_metadata(store: Store) -> None:
    """Write the file anew from the manifest, a line for each picture, in the order of their names."""
    folder = PurePosixPath(METADATA_JSONL).parent
    lines: dict[str, bytes] = {}
    table = read_manifest(store.url, storage_options=store.storage_options)
    passed = [name for name in table.column_names if name not in SCHEMA.names]
    for batch in table.to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            if row["status"] == "ok":
                name = str(PurePosixPath(row["uri"]).relative_to(folder))
                values = described(row, passed)
                if "file_name" in values:
                    values["input.file_name"] = values.pop("file_name")
                lines[name] = as_json({"file_name": name, **values})
    data = b"".join(lines[name] + b"\n" for name in sorted(lines))
    if store.read(METADATA_JSONL) != data:
        store.write(METADATA_JSONL, data)
