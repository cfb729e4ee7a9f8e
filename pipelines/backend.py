"""The face that all clusters share to which a job can be sent: what travels, and what a cluster tells of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Phase = Literal["queued", "running", "suspended", "succeeded", "failed", "cancelled"]

ENDED: frozenset[Phase] = frozenset({"succeeded", "failed", "cancelled"})
"""A submission that has come so far is submitted anew under the next number."""


JOB_FILE = "job.yaml"
"""The job in a parcel's folder."""


@dataclass(frozen=True)
class Submission:
    """A job at a cluster, as its back end tells it."""

    id: str
    """The same job file and settings give the same id, so that submitting twice is one job."""
    phase: Phase
    message: str
    """Why it waits or failed, in one line; "" otherwise."""
    attempt: int
    """1 for the first; each attempt resumes from the output."""
    created_at: str
    """ISO 8601, UTC."""
    dashboard: str | None


# A class with a method `list` cannot say it.
Submissions = list[Submission]


@dataclass(frozen=True)
class Parcel:
    """What travels: never a secret."""

    id: str
    name: str
    """The job's own name."""
    job_yaml: str
    """The job with --set applied, its local source paths made relative to `folder`."""
    folder: Path | None
    """Small local files that the job reads, to travel with it."""
    arguments: tuple[str, ...]
    """Further options of `ldm-batch run`."""


class Backend(Protocol):
    """A cluster that takes jobs. Every method raises LdmError, one line, where the cluster cannot be asked."""

    def submit(self, parcel: Parcel) -> tuple[Submission, bool]:
        """What is there now, and whether this call made it."""
        ...

    def get(self, id: str) -> Submission:
        """
        Raises:
            LdmError: nothing of that id is known.
        """
        ...

    def list(self) -> Submissions: ...

    def logs(self, id: str, follow: bool) -> Iterator[str]:
        """Lines; with `follow` they end with the job."""
        ...

    def cancel(self, id: str) -> None: ...

    def suspend(self, id: str) -> None: ...

    def resume(self, id: str) -> None: ...


def submission_id(name: str, job_yaml: str) -> str:
    """`<slug of the name>-<10 hex digits of the job's sha256>`: at most 41 characters, for Kubernetes and Ray alike."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:30].strip("-") or "job"
    # A Kubernetes name of this kind begins with a letter.
    slug = slug if slug[0].isalpha() else f"job-{slug}"[:30].strip("-")
    return f"{slug}-{hashlib.sha256(job_yaml.encode()).hexdigest()[:10]}"


def numbered(id: str, attempt: int) -> str:
    """`id` for the first attempt, `id-2`, `id-3`… for those after one that has ended."""
    return id if attempt < 2 else f"{id}-{attempt}"
