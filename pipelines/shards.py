"""The shards of a plan, as columns: there may be a million, and a Python object each would fill the memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

PLANS = "_ldm/plans"
SHARDS_PER_FILE = 64


@dataclass(frozen=True)
class Shard:
    """The unit of commit. `cost` is its share of the work: sample-steps × pixels. Its rows are in `file`, where the
    column `shard` has its index."""

    plan_id: str
    index: int
    num_rows: int
    keys_digest: str
    cost: float

    @property
    def file(self) -> str:
        return f"{PLANS}/{self.plan_id}/rows-{self.index // SHARDS_PER_FILE:05d}.parquet"


class Shards(Sequence[Shard]):
    """Some shards of one plan, in order.

    `indices` is int32, `num_rows` int64, `cost` float64, and `keys_digest` 16 bytes for each.
    """

    def __init__(
        self,
        plan_id: str,
        indices: NDArray[np.int32],
        num_rows: NDArray[np.int64],
        cost: NDArray[np.float64],
        keys_digest: NDArray[np.void],
    ) -> None:
        self.plan_id = plan_id
        self.indices = indices
        self.num_rows = num_rows
        self.cost = cost
        self.keys_digest = keys_digest

    @classmethod
    def all_of(cls, plan_id: str, num_rows: Iterable[int], cost: Iterable[float], keys_digest: str) -> Shards:
        """Those of a whole plan; `keys_digest` has the 32 hexadecimal digits of each, one after the other."""
        counts = np.fromiter(num_rows, np.int64)
        digests = np.frombuffer(bytes.fromhex(keys_digest), np.dtype("V16"))
        costs = np.fromiter(cost, np.float64)
        if not len(counts) == len(costs) == len(digests):
            raise ValueError(f"{len(counts)} shards, {len(costs)} costs, {len(digests)} digests")
        return cls(plan_id, np.arange(len(counts), dtype=np.int32), counts, costs, digests)

    def to_json(self) -> dict[str, Any]:
        """What `all_of` takes, of all shards of a plan."""
        return {
            "num_rows": self.num_rows.tolist(),
            "cost": self.cost.tolist(),
            "keys_digest": self.keys_digest.tobytes().hex(),
        }

    def take(self, chosen: NDArray[Any] | slice) -> Shards:
        """Those at some places of this sequence: positions, a mask, or a slice."""
        return Shards(
            self.plan_id, self.indices[chosen], self.num_rows[chosen], self.cost[chosen], self.keys_digest[chosen]
        )

    def without(self, indices: Iterable[int]) -> Shards:
        """All but those of these indices."""
        return self.take(~np.isin(self.indices, np.fromiter(indices, np.int32)))

    def only(self, indices: Iterable[int]) -> Shards:
        """Those of these indices."""
        return self.take(np.isin(self.indices, np.fromiter(indices, np.int32)))

    def waves(self, size: int) -> Iterator[Shards]:
        """All of them, up to `size` at a time."""
        for first in range(0, len(self), size):
            yield self.take(slice(first, first + size))

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, place: int) -> Shard: ...

    @overload
    def __getitem__(self, place: slice) -> Shards: ...

    def __getitem__(self, place: int | slice) -> Shard | Shards:
        if isinstance(place, slice):
            return self.take(place)
        return Shard(
            self.plan_id,
            int(self.indices[place]),
            int(self.num_rows[place]),
            self.keys_digest[place].tobytes().hex(),
            float(self.cost[place]),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shards) and (self.plan_id, self.to_json(), self.indices.tolist()) == (
            other.plan_id,
            other.to_json(),
            other.indices.tolist(),
        )

    def __hash__(self) -> int:
        return hash((self.plan_id, self.indices.tobytes()))

    def __repr__(self) -> str:
        return f"Shards({len(self)} of {self.plan_id})"
