"""How batches are put together to shards, and what that does to the end of a run."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.cutting import MAX_BATCHES, MAX_BYTES, shard_of_batch
from pipelines.dataset import CALLS_PER_WORKER


def mixed(num_batches: int, seed: int) -> NDArray[np.float64]:
    """The costs of batches of 3 sizes × 3 step counts × guidance on and off, in the order of a plan."""
    rng = np.random.default_rng(seed)
    sides, steps, guided = (rng.choice(values, num_batches) for values in ((512, 768, 1024), (10, 25, 50), (1, 2)))
    order = np.lexsort((-guided, -steps, -sides))
    return (sides.astype(np.float64) ** 2 * steps * guided)[order]


def wait_at_the_end(costs: NDArray[np.float64], num_workers: int, calls_per_worker: int = CALLS_PER_WORKER) -> float:
    """The share of a run's time that a worker stands idle at its end, on average.

    Each takes the next shard as soon as it has fewer than `calls_per_worker`, as Ray Data hands them out.
    """
    ends = [[0.0] for _ in range(num_workers)]
    free = [(0.0, i) for i in range(num_workers) for _ in range(calls_per_worker)]
    heapq.heapify(free)
    for cost in costs.tolist():
        at, worker = heapq.heappop(free)
        end = max(at, ends[worker][-1]) + cost
        ends[worker].append(end)
        heapq.heappush(free, (end, worker))
    last = [worker[-1] for worker in ends]
    return (max(last) - sum(last) / num_workers) / max(last)


@pytest.mark.parametrize("num_batches", [500, 2_000, 20_000])
def test_eight_workers_hardly_wait_for_the_last_one(num_batches: int) -> None:
    costs = mixed(num_batches, seed=num_batches)
    shard = shard_of_batch(costs, np.ones(num_batches), "auto")
    shards = np.bincount(shard, costs)
    assert wait_at_the_end(np.sort(shards)[::-1], 8) <= 0.03
    # A measure that cannot fail would be none.
    assert wait_at_the_end(np.sort(np.bincount(np.arange(num_batches) // (num_batches // 16), costs)), 8) > 0.03


def test_a_small_job_has_a_shard_a_batch_and_a_long_one_has_full_shards() -> None:
    assert shard_of_batch(np.ones(10), np.ones(10), "auto").tolist() == list(range(10))
    sizes = np.bincount(shard_of_batch(np.ones(100_000), np.ones(100_000), "auto"))
    assert np.mean(sizes == MAX_BATCHES) > 0.98
    assert sizes[-32:].tolist() == [1] * 32


def test_a_number_of_batches_is_kept() -> None:
    assert shard_of_batch(np.ones(7), np.ones(7), 3).tolist() == [0, 0, 0, 1, 1, 1, 2]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e15), st.floats(0, 1e9)), min_size=1, max_size=400))
def test_shards_are_consecutive_and_bounded(batches: list[tuple[float, float]]) -> None:
    cost, num_bytes = np.array(batches).T
    shard = shard_of_batch(cost, num_bytes, "auto")
    assert shard[0] == 0
    assert set(np.diff(shard).tolist()) <= {0, 1}
    for i in range(shard[-1] + 1):
        mine = shard == i
        assert mine.sum() == 1 or (mine.sum() <= MAX_BATCHES and num_bytes[mine].sum() <= MAX_BYTES)
