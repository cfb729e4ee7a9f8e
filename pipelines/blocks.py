"""What travels between the stages of a run: planned rows and result columns, one Arrow table per shard.

Arrays are .npy bytes: one nullable binary column fits every shape and dtype, which Arrow's tensor columns do not.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

RESULT_FIELDS = [
    pa.field("status", pa.string()),
    pa.field("stage", pa.string()),
    pa.field("error_type", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("image", pa.binary()),
    pa.field("nsfw", pa.bool_()),
    pa.field(
        "intermediates", pa.list_(pa.struct([("step", pa.int32()), ("latents", pa.binary()), ("preview", pa.binary())]))
    ),
    pa.field("batch_size", pa.int32()),
    pa.field("device", pa.string()),
    pa.field("worker", pa.string()),
    pa.field("duration_s", pa.float64()),
]
"""What a worker adds to the planned rows of a shard."""


def pack(array: NDArray[Any]) -> bytes:
    """An array of any shape and dtype → .npy bytes."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def unpack(data: bytes) -> NDArray[Any]:
    """The inverse of `pack`."""
    return np.load(io.BytesIO(data), allow_pickle=False)  # type: ignore[no-any-return]
