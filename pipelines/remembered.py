"""What planning found in a table, kept beside the plans: the next run of the same job on the same table need not read
its rows again, which for millions of them takes minutes and most of the memory of a run.

Only for jobs whose rows are told by their tables alone. Images, latents and LoRA files can change under a table that
stays, so with these every row is looked at again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import LdmError
from pipelines.job import Job
from pipelines.plans import Plan
from pipelines.shards import PLANS
from pipelines.source import table_files
from pipelines.stages import reads
from pipelines.storage import Store, is_local
from pipelines.version import version

OUTSIDE_THE_TABLE = frozenset({"image", "mask_image", "control_image", "latents"})


@dataclass(frozen=True)
class Remembered:
    """The numbers of a `Planned` whose rows are all in the plans `plan_ids`."""

    plan_ids: list[str]
    num_source_rows: int
    num_pictures: int
    num_duplicates: int
    num_rows: int
    num_wrong: int
    num_skipped: int
    problems: list[str]


class Memory:
    """Of one job and its table as they are now, at one output."""

    def __init__(self, store: Store, job: Job, settings: Mapping[str, Any], limit: int | None) -> None:
        self.store = store
        state = _state(job, settings, limit)
        digest = None if state is None else hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
        self.path = None if digest is None else f"{PLANS}/tables/{digest[:32]}.json"

    def recall(self, plans: list[Plan]) -> Remembered | None:
        """None where the rows have to be looked at."""
        body = self.store.read(self.path) if self.path is not None and plans else None
        try:
            found = None if body is None else Remembered(**json.loads(body))
            there = {plan.plan_id for plan in plans}
            return found if found is not None and set(found.plan_ids) <= there else None
        except (ValueError, TypeError, RecursionError):
            return None

    def keep(self, found: Remembered, brought: Mapping[str, str]) -> None:
        """`brought` are the parameters that rows set."""
        if self.path is not None and "lora" not in brought:
            self.store.write(self.path, json.dumps(asdict(found)).encode())


def _state(job: Job, settings: Mapping[str, Any], limit: int | None) -> dict[str, Any] | None:
    """All that the plan of a job depends on, None where that is more than its tables."""
    if not reads(job.stage).isdisjoint(OUTSIDE_THE_TABLE):
        return None
    try:
        files = table_files(job.source)
        tables = None if files is None else [[uri, _version(uri, job.source.storage_options)] for uri in files]
    except (LdmError, OSError):
        # Whoever reads the rows says what is wrong.
        return None
    if tables is None or any(mark is None for _, mark in tables):
        return None
    left_out: Any = {"source": {"storage_options"}, "sink": {"storage_options"}, "cluster": True}
    said = job.model_dump(mode="json", exclude=left_out)
    return {
        "version": version("ldm-batch"),
        "job": said,
        "settings": json.loads(json.dumps(settings)),
        "limit": limit,
        "tables": tables,
    }


def _version(uri: str, storage_options: dict[str, Any]) -> str | None:
    if is_local(uri):
        # Its content: a clock's tick is long enough to change a file twice.
        with Path(uri.removeprefix("file://")).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    folder, _, name = uri.rpartition("/")
    return Store(folder, storage_options).version(name)
