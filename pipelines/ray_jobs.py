"""Jobs on a Ray cluster, by the job server of its dashboard."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from pipelines.backend import ENDED, JOB_FILE, Parcel, Phase, Submission, Submissions, numbered
from pipelines.errors import EXIT_DEAD_LETTERS, EXIT_INTERRUPTED, EXIT_TERMINATED, JobError, LdmError, RunFailed

STOP_WAIT_S = 600
"""How long a driver that is asked to end may finish the shards in flight. The job server's own 3 s would lose them."""

SUSPEND_WAIT_S = 30.0

EARLY = (-signal.SIGTERM, -signal.SIGINT, signal.SIGTERM)
"""Exit codes of a driver that had not come so far as to listen for signals: Python's, and Ray's while it starts."""

PACKAGES = ("pipelines", "ldm_ops")
"""This very code travels: what was checked here is what runs there. What it imports is the cluster's."""

OURS = "ldm_batch_id"
"""Metadata by which a job of ours is known."""


class RayJobs:
    """A `backend.Backend`: `address` is that of the dashboard, http://head:8265."""

    def __init__(self, address: str) -> None:
        if not re.fullmatch(r"https?://[^/\s]+/?", address):
            raise JobError(
                f"--address {address[:200]}: the address of a cluster's dashboard is needed, such as http://head:8265; "
                "`ldm-batch run --address` takes host:port"
            )
        self.address = address.rstrip("/")
        with self._one_line():
            client = _client_class()(self.address)
        self.client: Any = client

    def submit(self, parcel: Parcel) -> tuple[Submission, bool]:
        """
        Raises:
            LdmError: the cluster cannot be asked, or has a Ray for which this code was not made.
        """
        self._refuse_other_ray()
        before = self._attempts(parcel.id)
        # Of what is suspended nothing is left at the cluster but its name.
        if before and before[-1].phase not in ENDED | {"suspended"}:
            return before[-1], False
        attempt = before[-1].attempt + 1 if before else 1
        sent = request(parcel, attempt)
        return self._start(parcel.id, attempt, sent["entrypoint"], sent["runtime_env"])

    def get(self, id: str) -> Submission:
        base, _, number = id.rpartition("-")
        known = self._attempts(id) or [one for one in self._attempts(base) if str(one.attempt) == number]
        if not known:
            raise JobError(f"{self.address}: no job {id}; `ldm-batch list --address {self.address}` shows those there")
        return known[-1]

    def list(self) -> Submissions:
        with self._one_line():
            jobs = self.client.list_jobs()
        ours = (self._submission(job) for job in jobs if OURS in (job.metadata or {}))
        # Of each the last attempt.
        last = {one.id: one for one in sorted(ours, key=lambda one: one.attempt)}
        return sorted(last.values(), key=lambda one: one.created_at)

    def logs(self, id: str, follow: bool) -> Iterator[str]:
        name = self._name(self.get(id))
        if not follow:
            with self._one_line():
                yield from self.client.get_job_logs(name).splitlines()
            return
        rest = ""
        # It closes what is open, too, where somebody looks away in the midst of a log.
        with asyncio.Runner() as runner, self._one_line():
            pieces = self.client.tail_job_logs(name)

            async def next_piece() -> str | None:
                piece: str | None = await anext(pieces, None)
                return piece

            while (piece := runner.run(next_piece())) is not None:
                *lines, rest = (rest + piece).split("\n")
                yield from lines
        if rest:
            yield rest

    def cancel(self, id: str) -> None:
        with self._one_line():
            self.client.stop_job(self._name(self._alive(id)))

    def suspend(self, id: str) -> None:
        """Ask the driver to end after the shards in flight, with the exit code that says so.

        The job server's own way to stop a job leaves no trace of why.
        """
        one = self._alive(id)
        if one.phase == "queued":
            raise JobError(f"{one.id} has not begun ({one.message}); wait until it runs, or cancel it")
        with self._one_line():
            there = self.client.get_job_info(self._name(one))
            # Beside the driver: a job without resources of its own runs on the head node, in the same folder. It stays
            # in the dashboard: what is deleted so soon is noted there as one that failed (Ray 2.60).
            helper = self.client.submit_job(
                entrypoint=f"kill -TERM $(cat {_pid_file(one.id)})", runtime_env=there.runtime_env
            )
            until = time.monotonic() + SUSPEND_WAIT_S
            while not (status := self.client.get_job_status(helper)).is_terminal() and time.monotonic() < until:
                time.sleep(0.1)
            if status != "SUCCEEDED":
                # It may have ended by itself meanwhile.
                self._alive(id)
                raise RunFailed(f"{self.address}: {one.id} could not be told to stop; `ldm-batch cancel` ends it")

    def resume(self, id: str) -> None:
        one = self.get(id)
        if one.phase not in ENDED | {"suspended"}:
            raise JobError(f"{one.id} is {one.phase}; only what has ended or is suspended can be resumed")
        with self._one_line():
            there = self.client.get_job_info(self._name(one))
            places = [there.runtime_env["working_dir"], *there.runtime_env["py_modules"]]
            if not all(self.client._package_exists(place) for place in places):
                raise JobError(
                    f"{self.address} no longer holds the files of {one.id}; `ldm-batch submit` with its job file goes "
                    "on where it stopped"
                )
        self._start(one.id, one.attempt + 1, there.entrypoint, there.runtime_env)

    def _start(self, id: str, attempt: int, entrypoint: str, environment: dict[str, Any]) -> tuple[Submission, bool]:
        made = True
        try:
            with self._one_line():
                self.client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=numbered(id, attempt),
                    runtime_env=environment,
                    metadata=_metadata(id, attempt),
                )
        except RunFailed:
            # Another may have been first.
            if not (there := self._attempts(id)) or there[-1].attempt < attempt:
                raise
            made = False
        return self.get(id), made

    def _attempts(self, id: str) -> Submissions:
        """All that was ever submitted under this id, the last one last."""
        with self._one_line():
            jobs = self.client.list_jobs()
        found = (self._submission(job) for job in jobs if (job.metadata or {}).get(OURS) == id)
        return sorted(found, key=lambda one: one.attempt)

    def _alive(self, id: str) -> Submission:
        one = self.get(id)
        if one.phase not in ("queued", "running"):
            raise JobError(f"{one.id} is {one.phase} already; nothing is to be stopped")
        return one

    def _name(self, one: Submission) -> str:
        return numbered(one.id, one.attempt)

    def _submission(self, job: Any) -> Submission:
        phase, message = phase_of(str(job.status.value), job.driver_exit_code, job.message or "")
        created = datetime.fromtimestamp((job.start_time or 0) / 1000, UTC)
        return Submission(
            id=job.metadata[OURS],
            phase=phase,
            message=message,
            attempt=int(job.metadata["ldm_batch_attempt"]),
            created_at=created.isoformat(timespec="seconds"),
            dashboard=f"{self.address}/#/jobs/{job.submission_id}",
        )

    def _refuse_other_ray(self) -> None:
        """
        Raises:
            JobError: the cluster's Ray is none that this package asks for.
        """
        with self._one_line():
            answer = self.client._do_request("GET", "/api/version")
            there = str(answer.json().get("ray_version"))
        from packaging.requirements import Requirement

        asked = [Requirement(line) for line in requires("ldm-batch") or ()]
        ray = next(one for one in asked if one.name == "ray" and one.marker is None)
        if not ray.specifier.contains(there, prereleases=True):
            raise JobError(
                f"--address {self.address}: that cluster has Ray {there}, this ldm-batch needs {ray.specifier}; "
                "use the same version on both sides"
            )

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """What the job server or its client raises, as one line."""
        try:
            yield
        except (LdmError, GeneratorExit):
            raise
        except Exception as error:  # noqa: BLE001 - the client raises RuntimeError, and what requests and aiohttp raise
            raise RunFailed(f"--address {self.address}: {_reason(error)}") from None


def request(parcel: Parcel, attempt: int) -> dict[str, Any]:
    """What the job server is sent; the folders of this machine that it names are uploaded first."""
    command = shlex.join(["python", "-m", "pipelines", "run", JOB_FILE, *parcel.arguments])
    return {
        "submission_id": numbered(parcel.id, attempt),
        "entrypoint": f"echo $$ > {_pid_file(parcel.id)}; exec {command}",
        "runtime_env": {
            "working_dir": str(parcel.folder),
            "py_modules": [str(Path(__file__).parents[1] / package) for package in PACKAGES],
            "excludes": ["**/__pycache__/", "*.pyc"],
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
        },
        "metadata": _metadata(parcel.id, attempt),
    }


def _metadata(id: str, attempt: int) -> dict[str, str]:
    return {OURS: id, "ldm_batch_attempt": str(attempt)}


def phase_of(status: str, exit_code: int | None, message: str) -> tuple[Phase, str]:
    """What a job of Ray's is to us, and why, from its status and its driver's exit code."""
    if status == "PENDING":
        return "queued", _last_line(message)
    if status == "RUNNING":
        return "running", ""
    if status == "STOPPED":
        return "cancelled", ""
    if status == "SUCCEEDED":
        return "succeeded", ""
    if exit_code == EXIT_DEAD_LETTERS:
        return "succeeded", "some rows failed; `ldm-batch errors` shows them"
    if exit_code in (EXIT_TERMINATED, EXIT_INTERRUPTED, *EARLY):
        return "suspended", "stopped by a signal; what is committed stays"
    return "failed", _last_line(message)


def _last_line(message: str) -> str:
    """Of a job's message, which ends with the driver's last words."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


def _reason(error: Exception) -> str:
    kind = type(error).__name__
    if kind == "AuthenticationError":
        if os.environ.get("RAY_AUTH_MODE") == "token":
            return "the cluster does not take this token; set RAY_AUTH_TOKEN to the one that it was started with"
        return "the cluster asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
    # Ray's client says only that it could not connect.
    if "[SSL" in f"{error} {error.__context__}":
        return (
            "no TLS there, or none that is trusted (REQUESTS_CA_BUNDLE names a CA); a dashboard itself speaks http://"
        )
    if isinstance(error, OSError):
        return "no job server answers there; check host and port, and that the cluster has a dashboard (ray[default])"
    lines = [line.strip(" .") for line in str(error).splitlines() if line.strip(" .")]
    return (lines[-1] if lines else kind)[:500]


def _pid_file(id: str) -> str:
    return f"{id}.pid"


def _client_class() -> Any:
    """
    Raises:
        JobError: what Ray's own client needs is not installed.
    """
    # They win over what its user says, in Ray's client.
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    try:
        import aiohttp  # noqa: F401 - Ray's client goes without these two until it is used
        import requests  # noqa: F401
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise JobError(
            f"submit --address needs Ray's job client ({error.name} is missing); pip install 'ldm-batch[submit]'"
        ) from None
    logging.getLogger("ray").setLevel(logging.ERROR)
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return JobSubmissionClient
