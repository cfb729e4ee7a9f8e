"""Ray: start or join a cluster, and fit the pools into it before anything is scheduled."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipelines.errors import JobError
from pipelines.job import Pool

TASK_CPUS = 0.25
"""CPU share of one task that loads or commits a shard; two of them must always find room beside the workers."""


@dataclass(frozen=True)
class Fit:
    """What one worker gets. `threads` is for torch."""

    num_cpus: float
    num_gpus: float
    threads: int


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """A Ray that is connected: the one at `address`, the one already connected, or one of our own on this machine."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's C++ core warns on stderr about what we chose (finite restarts); its log files keep everything.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(
            address=address,
            include_dashboard=False if address is None else None,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    quiet_ray_data()
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def quiet_ray_data() -> None:
    """One shard is one block all the way, and our own progress line is the only one."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A block that Ray splits would be committed as two halves of a shard.
    context.target_max_block_size = None
    context.max_errored_blocks = 0
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def fit(pool: Pool) -> Fit:
    """Share the cluster among the pool's workers.

    Raises:
        JobError: they do not fit, with the numbers.
    """
    import ray

    total = ray.cluster_resources()
    cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if pool.workers * pool.num_gpus > gpus:
        raise JobError(
            f"stages.0: {pool.workers} workers × {pool.num_gpus:g} GPUs need {pool.workers * pool.num_gpus:g}, the "
            f"cluster has {gpus:g}; lower workers or num_gpus (0 computes on the CPU)"
        )
    room = cpus - 2 * TASK_CPUS
    num_cpus = pool.num_cpus if pool.num_cpus is not None else min(1.0, int(room / pool.workers * 100) / 100)
    if num_cpus < 0.01 or pool.workers * num_cpus > room + 1e-6:
        raise JobError(
            f"stages.0: {pool.workers} workers × {max(num_cpus, 0.01):g} CPUs do not fit beside {2 * TASK_CPUS:g} for "
            f"reading and writing; the cluster has {cpus:g}; lower workers or num_cpus"
        )
    cores = int(max(node["Resources"].get("CPU", 1) for node in nodes))
    per_node = -(-pool.workers // len(nodes))
    return Fit(num_cpus, pool.num_gpus, threads=max(1, cores // per_node))
