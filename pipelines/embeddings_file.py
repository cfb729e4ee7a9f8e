"""A Parquet file of text embeddings, and what it says of the text encoders that made them.

One caption is read at a time, in no order, so a row group holds about as many bytes as one read is worth. zstd costs
little at that, takes 8 to 30 % off, and takes all of what some pipelines fill up with zeros.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

KEY = b"ldm_batch_embeddings"
GROUP_BYTES = 128 << 10

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("prompt_embeds", pa.binary(), nullable=False),
        pa.field("pooled_prompt_embeds", pa.binary()),
    ]
)
"""`prompt_embeds` is (num_tokens, width), `pooled_prompt_embeds` (pooled_width,): row-major little-endian `dtype`."""

DTYPES = {"fp16": "<f2", "bf16": "<u2", "fp32": "<f4"}
"""How numpy holds each stored dtype; of bf16, which it does not know, the bits."""


@dataclass(frozen=True)
class EmbeddingsHead:
    """What a file says of itself.

    Where `masked`, the pipeline gave an attention mask and padding is left out; else its denoiser attends to all of the
    tokens that are stored. `pooled_width` is 0 where there is no pooled embedding; `max_sequence_length`, of a T5, null
    where it is the pipeline's own number.
    """

    encoder: str
    encoder_revision: str
    pipeline: str
    dtype: str
    masked: bool
    max_sequence_length: int | None
    width: int = 0
    pooled_width: int = 0

    def same_encoder(self, other: EmbeddingsHead) -> bool:
        """Whether embeddings of both may stand in one training; the same weights may go by two names."""
        mine, theirs = asdict(self), asdict(other)
        return all(mine[name] == theirs[name] for name in mine if name != "encoder")


class NotEmbeddings(ValueError):
    """A file that holds none."""


def write_embeddings(
    head: EmbeddingsHead, rows: Sequence[Mapping[str, Any]], arrays: Sequence[tuple[NDArray[Any], NDArray[Any] | None]]
) -> bytes:
    """The file: for each of `rows` its key and prompt beside (prompt_embeds, pooled_prompt_embeds or None)."""
    columns: dict[str, list[Any]] = {
        "key": [row["key"] for row in rows],
        "prompt": [row["prompt"] for row in rows],
        "num_tokens": [len(embeds) for embeds, _ in arrays],
        "prompt_embeds": [_bytes(embeds, head) for embeds, _ in arrays],
        "pooled_prompt_embeds": [None if pooled is None else _bytes(pooled, head) for _, pooled in arrays],
    }
    table = pa.Table.from_pydict(columns, SCHEMA.with_metadata({KEY: json.dumps(asdict(head)).encode()}))
    largest = max(len(data) for data in columns["prompt_embeds"])
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        row_group_size=max(1, GROUP_BYTES // max(1, largest)),
    )
    return buffer.getvalue()


def read_head(metadata: Mapping[bytes, bytes] | None) -> EmbeddingsHead:
    """The head from a file's key-value metadata.

    Raises:
        NotEmbeddings: there is none.
    """
    try:
        return EmbeddingsHead(**json.loads((metadata or {})[KEY]))
    except (KeyError, ValueError, TypeError):
        raise NotEmbeddings("no text embeddings of ldm-batch") from None


def as_array(data: bytes | None, head: EmbeddingsHead, width: int) -> NDArray[Any]:
    """A stored cell as (n, width), read-only."""
    return np.frombuffer(data or b"", DTYPES[head.dtype]).reshape(-1, width)


def _bytes(array: NDArray[Any], head: EmbeddingsHead) -> bytes:
    return array.astype(DTYPES[head.dtype], copy=False).tobytes()
