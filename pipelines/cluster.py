"""Ray: start or join a cluster, and fit the pools into it before anything is scheduled."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pipelines.errors import JobError, RunFailed
from pipelines.stages import Pool

TASK_CPUS = 0.25
"""CPU share of one task that loads or commits a shard; two of them must always find room beside the workers."""

KEEP_IDLE = ("RAY_idle_worker_killing_time_threshold_ms", "600000")
"""Ray ends a process that has had no task for a second, and starts the next one for 2 s of a core: of shards that come
every few seconds, a fifth of a small machine (measured, Ray 2.60). A node reads it when it starts."""

LOCAL = "local"
"""What Ray calls a cluster that it starts itself."""

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
    """A Ray that is connected: the one already connected, the one at `address` or RAY_ADDRESS, or one of our own.

    A cluster that somebody else runs on this machine, whose address Ray would find in its temporary folder, is joined
    by `auto` only.
    """
    said = "--address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS") or LOCAL
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's C++ core warns on stderr about what we chose (finite restarts); its log files keep everything.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault(*KEEP_IDLE)
    # Nor is a worker that a row has killed news for stdout, where Ray would print it amid --json (2.60).
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    if address == LOCAL and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        # Whoever reaches Ray's ports can run code; of a cluster of our own nobody else knows the token. Ray reads it
        # when it is imported.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    started = not ray.is_initialized()
    if started:
        reach(address, said)
        try:
            with _quiet_stderr():
                ray.init(
                    address=address,
                    include_dashboard=False if address == LOCAL else None,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
        except Exception as error:  # noqa: BLE001 - Ray raises plain Exceptions, of a node that starts too slowly
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            at = f"{said} {address}: " if address != LOCAL else ""
            way_out = "check that it is there, or try without it" if at else "run the same command again"
            raise RunFailed(f"{at}no Ray cluster could be reached or started ({reason}); {way_out}") from None
    quiet_ray_data()
    try:
        yield
    finally:
        if started:
            ray.shutdown()


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Ray's C++ core announces on stderr that it was told to be quiet; what goes wrong comes as an exception."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a descriptor, no file
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def reach(address: str, said: str = "--address") -> None:
    """Knock at `host:port` first: Ray itself would wait for minutes.

    Raises:
        RunFailed: nobody answers within five seconds.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise RunFailed(f"{said} {address}: no Ray cluster answers there ({error}); check host and port") from None


def num_cpus() -> float:
    """Of the whole cluster that is connected."""
    import ray

    return float(ray.cluster_resources().get("CPU", 0.0))


def quiet_ray_data() -> None:
    """One shard is one block all the way, and our own progress line is the only one."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A block that Ray splits would be committed as two halves of a shard.
    context.target_max_block_size = None
    context.max_errored_blocks = 0
    # A thread for every task that sums up its process's memory, for a statistic that nobody reads.
    context.memory_usage_poll_interval_s = None
    context.issue_detectors_config.detectors = []
    # What goes wrong is raised, too.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def fit(pools: Sequence[tuple[Pool, int]]) -> list[Fit]:
    """Share the cluster among the stages' pools, given each one's weights in bytes.

    `auto` takes one worker per GPU, else one per core that memory allows; several stages that leave it at that share
    alike. Pools that all fit at once can never wait for each other.

    Raises:
        JobError: they do not fit, with the numbers.
    """
    import ray

    total = ray.cluster_resources()
    cpus, gpus, memory = total.get("CPU", 0.0), total.get("GPU", 0.0), total.get("memory", 0.0)
    room = cpus - 2 * TASK_CPUS
    autos = [(pool, size) for pool, size in pools if pool.workers == "auto"]
    # What the stages with a number of their own leave to those without.
    gpus_left = gpus - sum(_count(pool) * pool.num_gpus for pool, _ in pools if pool.workers != "auto")
    cpus_left = cpus - sum(_count(pool) * pool.num_threads for pool, _ in pools if pool.workers != "auto")
    room_left = room - sum(_count(pool) * (pool.num_cpus or 0) for pool, _ in pools if pool.workers != "auto")
    on_gpu = sum(1 for pool, _ in autos if pool.num_gpus)
    on_cpu = len(autos) - on_gpu
    counts = []
    for pool, size in pools:
        if pool.workers != "auto":
            counts.append(pool.workers)
        elif pool.num_gpus:
            counts.append(max(1, int(gpus_left / on_gpu / pool.num_gpus + 1e-6)))
        else:
            by_memory = int(memory * MEMORY_SHARE / on_cpu // (2 * size + WORKER_BYTES))
            share = room_left / on_cpu / pool.num_cpus if pool.num_cpus else cpus_left / on_cpu / pool.num_threads
            counts.append(max(1, min(int(share), by_memory)))
    needed_gpus = sum(count * pool.num_gpus for count, (pool, _) in zip(counts, pools, strict=True))
    if needed_gpus > gpus + 1e-6:
        what = _list(counts, [f"{pool.num_gpus:g} GPUs" for pool, _ in pools], [pool.num_gpus > 0 for pool, _ in pools])
        raise JobError(
            f"{what} need {needed_gpus:g}, the cluster has {gpus:g}; lower workers or num_gpus (a fraction shares a "
            "GPU, 0 computes on the CPU)"
        )
    named = sum(count * pool.num_cpus for count, (pool, _) in zip(counts, pools, strict=True) if pool.num_cpus)
    unnamed = sum(count for count, (pool, _) in zip(counts, pools, strict=True) if pool.num_cpus is None)
    each = min(1.0, int((room - named) / unnamed * 100) / 100) if unnamed else 1.0
    shares = [pool.num_cpus if pool.num_cpus is not None else each for pool, _ in pools]
    if each < 0.01 or named + unnamed * each > room + 1e-6:
        what = _list(counts, [f"{max(share, 0.01):g} CPUs" for share in shares], [True] * len(pools))
        raise JobError(
            f"{what} do not fit beside {2 * TASK_CPUS:g} for reading and writing; the cluster has {cpus:g}; lower "
            "workers or num_cpus"
        )
    return [Fit(count, share, pool.num_gpus) for count, share, (pool, _) in zip(counts, shares, pools, strict=True)]


def _count(pool: Pool) -> int:
    return 0 if pool.workers == "auto" else pool.workers


def _list(counts: list[int], shares: list[str], named: list[bool]) -> str:
    parts = zip(counts, shares, named, strict=True)
    return " and ".join(f"stages.{i}: {n} workers × {share}" for i, (n, share, named) in enumerate(parts) if named)
