"""A slice of a plan: the shards that one of several drivers does. One driver moves some tens of shards a second."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.errors import JobError

if TYPE_CHECKING:
    from pipelines.shards import Shards

MAX_SLICES = 10_000


@dataclass(frozen=True)
class Slice:
    """Number `number` of `of`, from 1: every shard whose index leaves the remainder `number - 1`.

    Neighbouring shards are alike, so all slices have about the same work; and which they are never changes.
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Slice:
        """
        Raises:
            JobError: it is not `3/8`.
        """
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text, re.ASCII)
        if match is None or not 1 <= int(match[1]) <= int(match[2]) <= MAX_SLICES:
            raise JobError(
                f"--slice {text[:80]!r}: give a number from 1 on and how many there are, {MAX_SLICES} at most: 3/8"
            )
        return cls(int(match[1]), int(match[2]))

    def take(self, shards: Shards) -> Shards:
        """Those of `shards` that are in the slice."""
        return shards.take(shards.indices % self.of == self.number - 1)

    def has(self, index: int) -> bool:
        return index % self.of == self.number - 1

    def meets(self, other: Slice) -> bool:
        """Whether any shard is in both, in a plan that is long enough."""
        return (self.number - other.number) % math.gcd(self.of, other.of) == 0

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"
