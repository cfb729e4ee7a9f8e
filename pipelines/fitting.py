"""Fit the stages' pools into a cluster before anything is scheduled, node by node."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.errors import JobError
from pipelines.stages import Pool, Workers

TASK_CPUS = 0.25
"""CPU share of one task that loads or commits a shard; two of them must always find room beside the workers."""

MEMORY_SHARE = 0.6
WORKER_BYTES = 1 << 30
"""What a worker needs beside its weights: the interpreter, torch, activations of a small batch."""

TYPE_LABEL = "ray.io/accelerator-type"
"""Where Ray says what GPUs a node has."""

EPSILON = 1e-6


@dataclass(frozen=True)
class Node:
    """What a node has."""

    cpus: float
    gpus: float = 0.0
    memory: float = float(1 << 50)
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """How many workers, what each of them gets, and the labels that its node must have."""

    workers: int
    num_cpus: float
    num_gpus: float
    labels: Mapping[str, str] = field(default_factory=dict)


def fit(pools: Sequence[tuple[Pool, int]]) -> list[Fit]:
    """`arrange` for the cluster that is connected."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    return arrange(
        pools,
        [
            Node(
                cpus=node["Resources"].get("CPU", 0.0),
                gpus=node["Resources"].get("GPU", 0.0),
                memory=node["Resources"].get("memory", 0.0),
                labels=node["Labels"],
            )
            for node in alive
        ],
    )


def arrange(pools: Sequence[tuple[Pool, int]], nodes: Sequence[Node]) -> list[Fit]:
    """Share `nodes` among the stages' pools, given each one's weights in bytes.

    `auto` takes one worker per GPU, else one per core that memory allows; several stages that leave it at that share
    alike; `{min, max}` takes as many as fit now. Pools that all fit at once can never wait for each other.

    Raises:
        JobError: they do not fit, with the numbers.
    """
    wanted = [selector(pool) for pool, _ in pools]
    where = [[i for i, node in enumerate(nodes) if _matches(node.labels, labels)] for labels in wanted]
    for i, (pool, _) in enumerate(pools):
        _refuse_homeless(i, pool, wanted[i], [nodes[at] for at in where[i]], nodes)
    counts = [_first_guess(i, pools, where, nodes) for i in range(len(pools))]
    lowest = [_lowest(pool.workers) for pool, _ in pools]
    shares = _shares(pools, counts, where, nodes)
    # The guess is over each pool alone; together they may not go into the nodes that there are.
    while shares is None and any(count > low for count, low in zip(counts, lowest, strict=True)):
        i = max(range(len(pools)), key=lambda i: counts[i] - lowest[i])
        counts[i] -= max(1, (counts[i] - lowest[i]) // 64)
        shares = _shares(pools, counts, where, nodes)
    if shares is None:
        raise _unfit(pools, counts, nodes)
    return [
        Fit(count, share, pool.num_gpus, labels)
        for count, share, (pool, _), labels in zip(counts, shares, pools, wanted, strict=True)
    ]


def selector(pool: Pool) -> dict[str, str]:
    """The labels that a node must have for a pool's workers."""
    return pool.labels | ({TYPE_LABEL: pool.accelerator_type} if pool.accelerator_type else {})


def _matches(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """As Ray reads a label selector: a value, !value, in(a,b) or !in(a,b)."""
    return all(_value_matches(labels.get(name), value) for name, value in wanted.items())


def _value_matches(there: str | None, wanted: str) -> bool:
    no, wanted = wanted.startswith("!"), wanted.removeprefix("!")
    listed = re.fullmatch(r"in\((.*)\)", wanted)
    values = {value.strip() for value in listed[1].split(",")} if listed else {wanted}
    return (there in values) != no


def _lowest(workers: Workers) -> int:
    if workers == "auto":
        return 1
    return workers if isinstance(workers, int) else workers.min


def _refuse_homeless(i: int, pool: Pool, wanted: dict[str, str], where: list[Node], nodes: Sequence[Node]) -> None:
    """
    Raises:
        JobError: not one worker of the pool would find a node.
    """
    if not where and pool.accelerator_type and not pool.labels:
        kinds = sorted({f"{n.labels[TYPE_LABEL]}" for n in nodes if TYPE_LABEL in n.labels})
        there = f"it has {', '.join(kinds)}" if kinds else "none of its nodes names a type"
        raise JobError(
            f"stages.{i}.accelerator_type: the cluster has no {pool.accelerator_type}; {there}; change it, or leave it "
            "out"
        )
    if not where:
        said = ", ".join(f"{name}: {value}" for name, value in wanted.items())
        raise JobError(
            f"stages.{i}.labels: no node of the cluster has {said}; start one with `ray start --labels`, or leave them "
            "out"
        )
    most_gpus = max(node.gpus for node in where)
    if pool.num_gpus > most_gpus + EPSILON and pool.num_gpus <= sum(node.gpus for node in where) + EPSILON:
        raise JobError(
            f"stages.{i}.num_gpus: no node has {pool.num_gpus:g} GPUs, the largest has {most_gpus:g}; a worker's GPUs "
            "are all on one node"
        )
    most_cpus = max(node.cpus for node in where)
    if pool.num_cpus and pool.num_cpus > most_cpus + EPSILON and len(nodes) > 1:
        raise JobError(
            f"stages.{i}.num_cpus: no node has {pool.num_cpus:g} CPUs, the largest has {most_cpus:g}; lower it"
        )


def _first_guess(
    i: int, pools: Sequence[tuple[Pool, int]], where: Sequence[Sequence[int]], nodes: Sequence[Node]
) -> int:
    """How many workers a pool has that shares each of its nodes fairly with the others that leave it open."""
    pool, size = pools[i]
    if isinstance(pool.workers, int):
        return pool.workers

    def alike(j: int) -> bool:
        return bool(pools[j][0].num_gpus) == bool(pool.num_gpus)

    rivals = [
        sum(at in where[j] for j, (p, _) in enumerate(pools) if alike(j) and not isinstance(p.workers, int))
        for at in where[i]
    ]
    fixed = [
        (p, p.workers)
        for j, (p, _) in enumerate(pools)
        if isinstance(p.workers, int) and not set(where[i]).isdisjoint(where[j])
    ]
    some = [nodes[at] for at in where[i]]
    if pool.num_gpus:
        taken = sum(count * p.num_gpus for p, count in fixed)
        whole = [int(n.gpus / pool.num_gpus + EPSILON) * pool.num_gpus for n in some]
        count = int((sum(g / r for g, r in zip(whole, rivals, strict=True)) - taken) / pool.num_gpus + EPSILON)
    else:
        each = pool.num_cpus or pool.num_threads
        taken = sum(count * ((p.num_cpus or 0) if pool.num_cpus else p.num_threads) for p, count in fixed)
        taken += 2 * TASK_CPUS if pool.num_cpus else 0.0
        need = 2 * size + WORKER_BYTES
        by_memory = sum(int(n.memory * MEMORY_SHARE / r // need) for n, r in zip(some, rivals, strict=True))
        count = min(int((sum(n.cpus / r for n, r in zip(some, rivals, strict=True)) - taken) / each), by_memory)
    low = _lowest(pool.workers)
    return max(low, count if pool.workers == "auto" else min(count, pool.workers.max))


def _shares(
    pools: Sequence[tuple[Pool, int]], counts: list[int], where: Sequence[Sequence[int]], nodes: Sequence[Node]
) -> list[float] | None:
    """The CPUs of a worker of each pool: what is left in equal parts, one at most; None where they do not go in."""

    def given(each: float) -> list[float]:
        return [pool.num_cpus if pool.num_cpus is not None else each for pool, _ in pools]

    def goes_in(each: float) -> bool:
        return _goes_in(pools, counts, given(each), where, nodes)

    if all(pool.num_cpus is not None for pool, _ in pools):
        return given(1.0) if goes_in(1.0) else None
    low, high = 0, 101
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if goes_in(middle / 100) else (low, middle)
    return given(low / 100) if low else None


def _goes_in(
    pools: Sequence[tuple[Pool, int]],
    counts: list[int],
    shares: list[float],
    where: Sequence[Sequence[int]],
    nodes: Sequence[Node],
) -> bool:
    """Whether all workers find a node each, and two tasks beside them; the pickiest and the largest go first."""
    free = [[node.cpus, node.gpus] for node in nodes]
    order = sorted(range(len(pools)), key=lambda i: (len(where[i]), -pools[i][0].num_gpus, -shares[i]))
    for i in order:
        left = counts[i]
        num_gpus = pools[i][0].num_gpus
        # A worker without a GPU leaves the nodes that have some to the others, as Ray does.
        for at in sorted(where[i], key=lambda at: 0.0 if num_gpus else nodes[at].gpus):
            room = free[at]
            fitting = int((room[0] + EPSILON) / shares[i]) if shares[i] else left
            if num_gpus:
                fitting = min(fitting, int((room[1] + EPSILON) / num_gpus))
            taken = min(left, fitting)
            room[0] -= taken * shares[i]
            room[1] -= taken * num_gpus
            left -= taken
        if left:
            return False
    return sum(int((cpus + EPSILON) / TASK_CPUS) for cpus, _ in free) >= 2


def _unfit(pools: Sequence[tuple[Pool, int]], counts: list[int], nodes: Sequence[Node]) -> JobError:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    several = f" on {len(nodes)} nodes" if len(nodes) > 1 else ""
    needed_gpus = sum(count * pool.num_gpus for count, (pool, _) in zip(counts, pools, strict=True))
    if needed_gpus > gpus + EPSILON:
        what = _list(counts, [f"{pool.num_gpus:g} GPUs" for pool, _ in pools], [pool.num_gpus > 0 for pool, _ in pools])
        return JobError(
            f"{what} need {needed_gpus:g}, the cluster has {gpus:g}; lower workers or num_gpus (a fraction shares a "
            "GPU, 0 computes on the CPU)"
        )
    shares = [pool.num_cpus or 0.01 for pool, _ in pools]
    named = [
        f"{share:g} CPUs" + (f" and {pool.num_gpus:g} GPUs" if pool.num_gpus else "")
        for share, (pool, _) in zip(shares, pools, strict=True)
    ]
    what = _list(counts, named, [True] * len(pools))
    has = f"{cpus:g}" + (f" and {gpus:g} GPUs" if gpus else "")
    return JobError(
        f"{what} do not fit beside {2 * TASK_CPUS:g} for reading and writing; the cluster has {has}{several}; lower "
        "workers, num_cpus or num_gpus"
    )


def _list(counts: list[int], shares: list[str], named: list[bool]) -> str:
    parts = zip(counts, shares, named, strict=True)
    return " and ".join(f"stages.{i}: {n} workers × {share}" for i, (n, share, named) in enumerate(parts) if named)
