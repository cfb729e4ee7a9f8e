"""Ray: start or join a cluster, and fit the pools into it before anything is scheduled."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipelines.errors import JobError, RunFailed
from pipelines.job import Pool

TASK_CPUS = 0.25
"""CPU share of one task that loads or commits a shard; two of them must always find room beside the workers."""


MEMORY_SHARE = 0.6
WORKER_BYTES = 1 << 30
"""What a worker needs beside its weights: the interpreter, torch, activations of a small batch."""


@dataclass(frozen=True)
class Fit:
    """How many workers, and what each of them gets."""

    workers: int
    num_cpus: float
    num_gpus: float


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """A Ray that is connected: the one at `address`, the one already connected, or one of our own on this machine."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's C++ core warns on stderr about what we chose (finite restarts); its log files keep everything.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    started = not ray.is_initialized()
    if started:
        reach(address)
        try:
            ray.init(
                address=address,
                include_dashboard=False if address is None else None,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            at = f"--address {address}: " if address else ""
            raise RunFailed(
                f"{at}no Ray cluster could be reached or started ({reason}); try without --address"
            ) from None
    quiet_ray_data()
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def reach(address: str | None) -> None:
    """Knock at `host:port` first: Ray itself would wait for minutes.

    Raises:
        RunFailed: nobody answers within five seconds.
    """
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise RunFailed(f"--address {address}: no Ray cluster answers there ({error}); check host and port") from None


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


def fit(pool: Pool, weights_bytes: int) -> Fit:
    """Share the cluster among the pool's workers; `auto` takes one per GPU, else one per core that memory allows.

    Raises:
        JobError: they do not fit, with the numbers.
    """
    import ray

    total = ray.cluster_resources()
    cpus, gpus, memory = total.get("CPU", 0.0), total.get("GPU", 0.0), total.get("memory", 0.0)
    room = cpus - 2 * TASK_CPUS
    if pool.workers != "auto":
        workers = pool.workers
    elif pool.num_gpus:
        workers = max(1, int(gpus / pool.num_gpus + 1e-6))
    else:
        by_memory = int(memory * MEMORY_SHARE // (2 * weights_bytes + WORKER_BYTES))
        by_cpus = int(room / pool.num_cpus) if pool.num_cpus else int(cpus) // pool.num_threads
        workers = max(1, min(by_cpus, by_memory))
    if workers * pool.num_gpus > gpus:
        raise JobError(
            f"stages.0: {workers} workers × {pool.num_gpus:g} GPUs need {workers * pool.num_gpus:g}, the "
            f"cluster has {gpus:g}; lower workers or num_gpus (0 computes on the CPU)"
        )
    num_cpus = pool.num_cpus if pool.num_cpus is not None else min(1.0, int(room / workers * 100) / 100)
    if num_cpus < 0.01 or workers * num_cpus > room + 1e-6:
        raise JobError(
            f"stages.0: {workers} workers × {max(num_cpus, 0.01):g} CPUs do not fit beside {2 * TASK_CPUS:g} for "
            f"reading and writing; the cluster has {cpus:g}; lower workers or num_cpus"
        )
    return Fit(workers, num_cpus, pool.num_gpus)
