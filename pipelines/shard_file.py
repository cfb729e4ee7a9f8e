"""The pictures of a shard in one file: a tar as WebDataset reads it, or Parquet with Hugging Face's image column.

Both hold, beside each picture, what the manifest says of it; nothing in them depends on the run that wrote them.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.manifest import SCHEMA

Kind = Literal["webdataset", "parquet"]
EXTENSIONS: dict[Kind, str] = {"webdataset": "tar", "parquet": "parquet"}

DESCRIPTION = (
    "key",
    "id",
    "prompt",
    "negative_prompt",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "scheduler",
    "strength",
    "controlnet_conditioning_scale",
    "lora_scale",
    "lora_revision",
    "width",
    "height",
    "model_revision",
    "nsfw",
)
"""The columns of the manifest that a picture is described with; those that pass through follow.

Not `model` and `lora`, which are only how the job spells them: the same row gives the same bytes.
"""

ROWS_PER_GROUP = 100
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# https://huggingface.co/docs/datasets/about_dataset_features
FEATURES = {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}).encode()}


@dataclass(frozen=True)
class Picture:
    """An encoded picture, the name that it has in the file (its key and the format's ending), and its manifest row."""

    name: str
    data: bytes
    row: dict[str, Any]


def described(row: Mapping[str, Any], passed: Iterable[str]) -> dict[str, Any]:
    """What JSON says of a picture: its row's DESCRIPTION and what passed through; JSON has no NaN and no
    infinity, at any depth, and gets null."""
    return {name: _finite(row.get(name)) for name in (*DESCRIPTION, *passed)}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def as_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str).encode("utf-8", "replace")


def write(kind: Kind, pictures: Sequence[Picture], passed: Sequence[pa.Field]) -> tuple[bytes, list[str]]:
    """The file, and what tells each picture in it from the others: its name in a tar, its row in Parquet."""
    if kind == "webdataset":
        return _tar(pictures, [field.name for field in passed]), [picture.name for picture in pictures]
    return _parquet(pictures, passed), [str(i) for i in range(len(pictures))]


def read(data: bytes, members: Sequence[str]) -> dict[str, bytes]:
    """The pictures that `members` name, of those that are there.

    Raises:
        ValueError: it is no such file.
    """
    try:
        if data[:4] == b"PAR1":
            column = pq.ParquetFile(pa.BufferReader(data)).read(["image"])["image"]
            return {m: column[int(m)]["bytes"].as_py() for m in members if m.isdigit() and int(m) < len(column)}
        found = {}
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            wanted = set(members)
            for info in tar:
                if info.name in wanted and (member := tar.extractfile(info)) is not None:
                    found[info.name] = member.read()
        return found
    except (tarfile.TarError, pa.ArrowException, KeyError, OSError) as error:
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from None


def _tar(pictures: Sequence[Picture], passed: Sequence[str]) -> bytes:
    buffer = io.BytesIO()
    # A fresh TarInfo has no owner and the time 0, so that the same pictures give the same bytes.
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for picture in pictures:
            key = picture.row["key"]
            members = {
                picture.name: picture.data,
                f"{key}.json": as_json(described(picture.row, passed)),
                f"{key}.txt": (picture.row["prompt"] or "").encode("utf-8", "replace"),
            }
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _parquet(pictures: Sequence[Picture], passed: Sequence[pa.Field]) -> bytes:
    fields = [*(SCHEMA.field(name) for name in DESCRIPTION), *passed]
    images = pa.array([{"bytes": p.data, "path": p.name} for p in pictures], IMAGE)
    beside = [pa.array([p.row.get(field.name) for p in pictures], field.type) for field in fields]
    schema = pa.schema([pa.field("image", IMAGE), *fields], metadata=FEATURES)
    buffer = io.BytesIO()
    # Small groups, as the hub's viewer asks for; pictures are compressed already and repeat nothing.
    pq.write_table(
        pa.Table.from_arrays([images, *beside], schema=schema),
        buffer,
        row_group_size=ROWS_PER_GROUP,
        compression="none",
        use_dictionary=[field.name for field in fields],
    )
    return buffer.getvalue()
