"""Device batches → shards: how much is committed, and lost by a death, at a time."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

SHARE = 1 / 32
"""Of the work that is left, what a shard may be: the fewer there is, the smaller, so that at the end of a run nobody
waits for one worker (guided self-scheduling, Polychronopoulos and Kuck 1987)."""

MAX_BATCHES = 8
MAX_BYTES = 192 << 20
"""Of a shard's pictures, uncompressed, as they travel between the stages."""


def shard_of_batch(
    cost: NDArray[np.float64], num_bytes: NDArray[np.float64], batches_per_shard: int | Literal["auto"]
) -> NDArray[np.int32]:
    """The shard of each batch, from 0, consecutive.

    Args:
        cost: of each batch, its share of the work.
        num_bytes: of each batch's pictures.
        batches_per_shard: so many in each; `auto` for what suits the work and the memory.
    """
    if batches_per_shard != "auto":
        return np.arange(len(cost), dtype=np.int32) // batches_per_shard
    left = float(cost.sum())
    shard, room, first = -1, 0.0, 0
    held_cost = held_bytes = 0.0
    out = np.empty(len(cost), np.int32)
    for i, (its_cost, its_bytes) in enumerate(zip(cost.tolist(), num_bytes.tolist(), strict=True)):
        full = i - first == MAX_BATCHES or held_cost + its_cost > room or held_bytes + its_bytes > MAX_BYTES
        if shard < 0 or full:
            left -= held_cost
            shard, first, room, held_cost, held_bytes = shard + 1, i, left * SHARE, 0.0, 0.0
        held_cost += its_cost
        held_bytes += its_bytes
        out[i] = shard
    return out
