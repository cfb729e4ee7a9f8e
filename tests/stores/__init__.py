"""Servers that the tests and `benchmarks/faults.py` run against: real ones, each a context manager."""

from __future__ import annotations

import http.client
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_LIMIT_S = 60
KEY, SECRET, BUCKET = "AKTESTTEST", "SKTESTTESTTEST", "bkt"


class Unavailable(Exception):
    """This store cannot be had on this machine; why."""


@dataclass
class Server:
    """A running S3 server with a bucket `bkt`."""

    url: str
    key: str = KEY
    secret: str = SECRET

    @property
    def storage_options(self) -> dict[str, Any]:
        return {"endpoint_url": self.url, "key": self.key, "secret": self.secret}


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel gives to whoever asks for any."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def wait_for(ready: Callable[[], bool], limit_s: float) -> bool:
    """Ask until it is so, or until `limit_s` have passed."""
    until = time.monotonic() + limit_s
    while not ready():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, http.client.HTTPException):
        return False
    return True


def spawn(command: list[str], log: Path, environ: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a server that does not outlive this process, whatever becomes of it."""
    with log.open("ab") as out:
        return subprocess.Popen(
            # Its end of the pipe closes when this process is gone, however that came.
            ["sh", "-c", 'exec 3<&0 </dev/null; { read _ <&3; kill -9 $$; } & exec "$@" 3<&-', "sh", *command],
            env=environ,
            cwd=log.parent,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL it and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()


@contextmanager
def serving(name: str, url: str, command: list[str]) -> Iterator[None]:
    """One process that answers at `url`.

    Raises:
        Unavailable: it did not; with what it said.
    """
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
        log = Path(folder) / "log"
        process = spawn(command, log)
        try:
            if not wait_for(lambda: process.poll() is not None or answers(url), START_LIMIT_S) or process.poll():
                raise Unavailable(f"{name} did not start\n{log.read_text(errors='replace')[-1500:]}")
            yield
        finally:
            kill(process)
