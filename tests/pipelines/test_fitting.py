"""Pools and nodes: what goes in, what is left for tasks, and what can never be."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.errors import JobError
from pipelines.fitting import TASK_CPUS, TYPE_LABEL, Node, arrange
from pipelines.job import parse_job
from pipelines.stages import Txt2ImgStage

MIB = 1 << 20


def pool(**fields: Any) -> tuple[Txt2ImgStage, int]:
    return Txt2ImgStage(op="txt2img", model="builtin:shapes", **fields), 100 * MIB


def gpu_node(kind: str, gpus: int = 8, cpus: int = 64) -> Node:
    return Node(cpus, gpus, labels={TYPE_LABEL: kind})


@pytest.mark.parametrize(("num_nodes", "cpus"), [(1, 2), (3, 2), (7, 1), (2, 48)])
def test_auto_takes_every_core_and_leaves_room_for_two_tasks_on_nodes_that_exist(num_nodes: int, cpus: int) -> None:
    (fit,) = arrange([pool()], [Node(cpus)] * num_nodes)
    assert fit.workers == num_nodes * cpus
    # However Ray spreads them: no node takes one worker more than its cores, and what each has left counts alone.
    left = cpus - cpus * fit.num_cpus
    assert num_nodes * int((left + 1e-6) / TASK_CPUS) >= 2
    assert (cpus + 1) * fit.num_cpus > cpus


def test_auto_on_gpus_counts_them_node_by_node() -> None:
    nodes = [gpu_node("H100", 3), gpu_node("H100", 3), Node(16)]
    assert arrange([pool(num_gpus=2)], nodes)[0].workers == 2
    assert arrange([pool(num_gpus=0.5)], nodes)[0].workers == 12


def test_each_pool_gets_the_gpus_of_its_type_and_the_head_needs_neither_gpu_nor_cpu() -> None:
    nodes = [Node(0), gpu_node("H200", 8), gpu_node("L4", 4), Node(16)]
    fits = arrange([pool(num_gpus=1, accelerator_type="H200"), pool(num_gpus=1, accelerator_type="L4")], nodes)
    assert [fit.labels for fit in fits] == [{TYPE_LABEL: "H200"}, {TYPE_LABEL: "L4"}]
    assert [fit.workers for fit in fits] == [8, 4]


def test_labels_choose_nodes_as_ray_reads_them() -> None:
    nodes = [Node(8, labels={"zone": "a"}), Node(8, labels={"zone": "b"}), Node(8, labels={"zone": "c"})]

    def workers(**labels: str) -> int:
        return arrange([pool(labels=labels, num_cpus=1)], nodes)[0].workers

    assert (workers(zone="a"), workers(zone="!a"), workers(zone="in(a, b)")) == (7, 15, 15)


def test_a_pool_with_min_and_max_takes_what_fits() -> None:
    nodes = [gpu_node("A100", 8)]
    assert arrange([pool(workers={"min": 2, "max": 40}, num_gpus=1)], nodes)[0].workers == 8
    assert arrange([pool(workers={"min": 2, "max": 5}, num_gpus=1)], nodes)[0].workers == 5


@pytest.mark.parametrize(
    ("pools", "nodes", "message"),
    [
        (
            [pool(num_gpus=1, accelerator_type="H200")],
            [gpu_node("A100"), gpu_node("T4"), Node(8)],
            "stages.0.accelerator_type: the cluster has no H200; it has A100, T4; change it",
        ),
        ([pool(num_gpus=1, accelerator_type="H200")], [Node(8)], "no H200; none of its nodes names a type"),
        ([pool(labels={"disk": "nvme"})], [Node(8)], "stages.0.labels: no node of the cluster has disk: nvme"),
        ([pool(num_gpus=4)], [gpu_node("T4", 2)] * 3, "no node has 4 GPUs, the largest has 2"),
        (
            [pool(num_gpus=2, workers=3)],
            [gpu_node("T4", 3)] * 2,
            "3 workers × 0.01 CPUs and 2 GPUs do not .* 6 GPUs",
        ),
        ([pool(num_gpus=1, workers=7)], [gpu_node("T4", 3)] * 2, "7 workers × 1 GPUs need 7, the cluster has 6"),
        ([pool(workers={"min": 9, "max": 20}, num_gpus=1)], [gpu_node("T4", 8)], "9 workers × 1 GPUs need 9, .* has 8"),
        ([pool(num_cpus=8, workers=1)], [Node(4)] * 3, "stages.0.num_cpus: no node has 8 CPUs, the largest has 4"),
        ([pool(num_cpus=3, workers=3)], [Node(4), Node(4)], "3 workers × 3 CPUs do not fit .* has 8 on 2 nodes"),
        ([pool(num_cpus=4, workers=1)], [Node(4)], "1 workers × 4 CPUs do not fit beside 0.5 .* the cluster has 4"),
    ],
)
def test_what_can_never_fit_is_one_line(pools: list[Any], nodes: list[Node], message: str) -> None:
    with pytest.raises(JobError, match=message) as refusal:
        arrange(pools, nodes)
    assert "\n" not in str(refusal.value)


def test_a_thousand_nodes_of_eight_gpus_are_arranged_at_once() -> None:
    import time

    start = time.perf_counter()
    fits = arrange([pool(num_gpus=1), pool(num_gpus=0.5), pool()], [gpu_node("H100")] * 1000)
    assert sum(fit.workers * fit.num_gpus for fit in fits) == 8000
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("workers: {min: 4, max: 2}", "min 4 is more than max 2"),
        ("accelerator_type: H200", "accelerator_type without num_gpus"),
        ("num_gpus: 1.5", "only less than one GPU can be shared"),
        ("labels: {zone: 'in(a'}", "labels.zone"),
    ],
)
def test_a_pool_that_makes_no_sense_is_refused_with_its_line(said: str, problem: str) -> None:
    text = f"source: {{rows: [a]}}\nsink: {{path: out}}\nstages:\n- op: txt2img\n  model: builtin:shapes\n  {said}\n"
    with pytest.raises(JobError, match=problem):
        parse_job(text)
