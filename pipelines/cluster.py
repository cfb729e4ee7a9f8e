"""Ray: start or join a cluster."""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.errors import JobError, RunFailed

KEEP_IDLE = ("RAY_idle_worker_killing_time_threshold_ms", "600000")
"""Ray ends a process that has had no task for a second, and starts the next one for 2 s of a core: of shards that come
every few seconds, a fifth of a small machine (measured, Ray 2.60). A node reads it when it starts."""

LOCAL, AUTO = "local", "auto"
"""What Ray calls a cluster that it starts itself, and one that it finds on this machine."""

SETTINGS = b"\x04"
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + SETTINGS + bytes(5)
"""How a client of gRPC begins: a preface and an empty frame of settings (RFC 9113, 3.4 and 6.5), which a server answers
with its own."""


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """A Ray that is connected: the one already connected, the one at `address` or RAY_ADDRESS, or one of our own.

    A cluster that somebody else runs on this machine, whose address Ray would find in its temporary folder, is joined
    by `auto` only.
    """
    named = address
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
        knock(named)
        try:
            with _quiet_stderr():
                ray.init(
                    address=address,
                    num_cpus=_cores() if address == LOCAL else None,
                    include_dashboard=False if address == LOCAL else None,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
        except Exception as error:  # noqa: BLE001 - Ray raises plain Exceptions, of a node that starts too slowly
            _refuse_other_versions(str(error), f"{said} {address}")
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            at = f"{said} {address}: " if address != LOCAL else ""
            way_out = "check that it is there, and its token in RAY_AUTH_TOKEN" if at else "run the same command again"
            raise RunFailed(f"{at}no Ray cluster could be reached or started ({reason}); {way_out}") from None
    quiet_ray_data()
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def knock(address: str | None) -> None:
    """Look whether `ray_cluster` would find a cluster, before anybody has waited for a plan.

    Raises:
        JobError: what stands at `address` is none that a driver could be a member of.
        RunFailed: nobody answers.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    said = "--address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS") or LOCAL
    refuse_other_doors(address, said)
    if address == AUTO:
        address = _found_here(said)
    reach(address, said)


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


def _cores() -> int | None:
    """How many cores this process may use, where these are fewer than the machine has, as of a batch system's job."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return mine if 0 < mine < (os.cpu_count() or 0) else None


def refuse_other_doors(address: str, said: str = "--address") -> None:
    """
    Raises:
        JobError: Ray Data needs a driver that is a member of the cluster.
    """
    if address.startswith("ray://"):
        raise JobError(
            f"{said} {address}: Ray Data does not work through a Ray Client; give host:port on a machine of the "
            "cluster's network, or `ldm-batch submit --address http://head:8265` from anywhere"
        )
    if address.startswith(("http://", "https://")):
        raise JobError(
            f"{said} {address}: that is a dashboard; `ldm-batch submit --address {address}` sends the job there, "
            "`run` takes host:port"
        )
    if address not in (LOCAL, AUTO) and not re.fullmatch(r"(\[[^\s\[\]]+\]|[^\s\[\]:/]+):\d{1,5}", address):
        raise JobError(
            f"{said} {address[:200]}: no address of a Ray cluster; give host:port of its head, such as head:6379, "
            "or auto"
        )


def _refuse_other_versions(message: str, where: str) -> None:
    """
    Raises:
        JobError: `message` is Ray's word for a cluster of another version, in which nothing can be unpickled safely.
    """
    found = re.findall(r"^\s*(Ray|Python): (\S+)$", message, re.MULTILINE)
    if "Version mismatch" in message and len(found) == 4:
        (_, their_ray), (_, their_python), (_, our_ray), (_, our_python) = found
        raise JobError(
            f"{where}: that cluster has Ray {their_ray} and Python {their_python}, this machine Ray {our_ray} and "
            f"Python {our_python}; use the same on both sides, or `ldm-batch submit` to run on the cluster's own"
        ) from None


def reach(address: str, said: str = "--address") -> None:
    """Knock at `host:port` first: Ray itself would wait for minutes.

    Raises:
        RunFailed: nobody answers within five seconds, or somebody else.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return
    with_tls = os.environ.get("RAY_USE_TLS", "0") != "0"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as there:
            if with_tls:
                return
            there.sendall(HTTP2)
            answer = there.recv(9)
    except (OSError, OverflowError) as error:
        raise RunFailed(f"{said} {address}: no Ray cluster answers there ({error}); check host and port") from None
    if answer[3:4] != SETTINGS:
        raise RunFailed(
            f"{said} {address}: what answers there is no Ray cluster; check the port: that of `ray start --port`, 6379 "
            "if left out, and not the dashboard's"
        )


def _found_here(said: str) -> str:
    """The cluster that `auto` stands for, so that nobody waits for a plan if there is none.

    Raises:
        RunFailed: there is none.
    """
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return canonicalize_bootstrap_address(AUTO) or LOCAL
    except ConnectionError:
        raise RunFailed(
            f"{said} {AUTO}: no Ray cluster is found on this machine; start a node of it here, or give host:port"
        ) from None


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
    # What goes wrong is raised, too.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
