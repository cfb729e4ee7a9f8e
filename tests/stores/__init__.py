"""Servers that the tests and `benchmarks/faults.py` run against: real ones, each a context manager."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable


class Unavailable(Exception):
    """This store cannot be had on this machine; why."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for(ready: Callable[[], bool], limit_s: float) -> bool:
    """Ask until it is so, or until `limit_s` have passed."""
    until = time.monotonic() + limit_s
    while not ready():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
