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

STORE_BYTES = 100 << 20


@dataclass
class Nodes:
    """Where a cluster is, whose processes it has, and what a run needs to get in."""

    pid: int
    address: str
    environ: dict[str, str]


@contextmanager
def nodes(num: int = 3, cpus: int = 2) -> Iterator[Nodes]:
    """A cluster of `num` nodes with so many CPUs each."""
    environ = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_BACKEND_LOG_LEVEL": "fatal"}
    environ |= dict([KEEP_IDLE])
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.nodes", str(num), str(cpus)],
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

    num, cpus = map(int, sys.argv[1:])
    here: dict[str, Any] = {"num_cpus": cpus, "object_store_memory": STORE_BYTES}
    # A raylet's death is noticed within two seconds, or every kill would cost half a minute of waiting.
    quick = {
        "health_check_initial_delay_ms": 2000,
        "health_check_period_ms": 500,
        "health_check_timeout_ms": 1000,
        "health_check_failure_threshold": 3,
    }
    cluster = Cluster(
        initialize_head=True, head_node_args={**here, "include_dashboard": False, "_system_config": quick}
    )
    others = [cluster.add_node(wait=False, **here) for _ in range(num - 1)]
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)  # noqa: T201
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    while not over.wait(1.0):
        for node in [node for node in others if not node.live_processes() or _is_dead(node)]:
            others.remove(node)
            node.kill_all_processes(check_alive=False, allow_graceful=False)
            time.sleep(1)
            others.append(cluster.add_node(wait=False, **here))
    cluster.shutdown()


def _is_dead(node: Any) -> bool:
    return any(name == "raylet" for name, _ in node.dead_processes())


if __name__ == "__main__":
    main()
