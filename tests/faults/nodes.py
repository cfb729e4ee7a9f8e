"""A Ray cluster of several nodes on this machine, in a process of its own.

`python -m tests.faults.nodes NUM` starts it, prints its address, and puts a new node in the place of each whose raylet
has died, until its standard input ends.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipelines.cluster import KEEP_IDLE
from pipelines.fitting import TYPE_LABEL

STORE_BYTES = 100 << 20


@dataclass
class Nodes:
    """Where a cluster is, whose processes it has, and what a run needs to get in."""

    pid: int
    address: str
    environ: dict[str, str]


@contextmanager
def nodes(num: int = 3, cpus: int = 2, accelerator: str = "") -> Iterator[Nodes]:
    """A cluster of `num` nodes with so many CPUs each.

    With an `accelerator` the head has neither CPU nor GPU, the second node a GPU of that name, as far as Ray can tell.
    """
    environ = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_BACKEND_LOG_LEVEL": "fatal"}
    environ |= dict([KEEP_IDLE])
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.nodes", str(num), str(cpus), accelerator],
        env={**os.environ, **environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError("the cluster did not start")
        yield Nodes(process.pid, address, environ)
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


def main() -> None:
    from ray.cluster_utils import Cluster

    num, cpus, accelerator = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    here: dict[str, Any] = {"num_cpus": cpus, "num_gpus": 0, "object_store_memory": STORE_BYTES}
    with_gpu = {**here, "num_gpus": 1, "labels": {TYPE_LABEL: accelerator}} if accelerator else here
    head = {**here, "num_cpus": 0} if accelerator else here
    # A raylet's death is noticed within two seconds, or every kill would cost half a minute of waiting.
    quick = {
        "health_check_initial_delay_ms": 2000,
        "health_check_period_ms": 500,
        "health_check_timeout_ms": 1000,
        "health_check_failure_threshold": 3,
    }
    cluster = Cluster(
        initialize_head=True, head_node_args={**head, "include_dashboard": False, "_system_config": quick}
    )
    kinds = [with_gpu, *[here] * (num - 2)]
    others = [(cluster.add_node(wait=False, **kind), kind) for kind in kinds]
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)  # noqa: T201
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    while not over.wait(1.0):
        for node, kind in [(node, kind) for node, kind in others if not node.live_processes() or _is_dead(node)]:
            others.remove((node, kind))
            node.kill_all_processes(check_alive=False, allow_graceful=False)
            time.sleep(1)
            others.append((cluster.add_node(wait=False, **kind), kind))
    cluster.shutdown()


def _is_dead(node: Any) -> bool:
    return any(name == "raylet" for name, _ in node.dead_processes())


if __name__ == "__main__":
    main()
