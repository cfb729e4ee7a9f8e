"""What a plan is, where an output keeps its plans, and whose output it is.

A plan is immutable. `_ldm/plans/0001.json` and so on are the log of an output's plans (created only if absent, so two
planners cannot both add one); each names a folder with the plan itself and its rows.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipelines.commit import commit
from pipelines.errors import NotWhole, OutputHeldByOther
from pipelines.job import Job
from pipelines.manifest import METADATA_JSONL, SCHEMA
from pipelines.shards import PLANS, Shards
from pipelines.storage import ObjectStore

OWN = ("key", "id", "prompt", "seed", "shard", "problem")
"""Columns that the rows of every plan have."""


@dataclass(frozen=True)
class Plan:
    """What one plan says; `num_` counts are rows of this plan."""

    plan_id: str
    job: dict[str, Any]
    settings: dict[str, Any]
    batch_size: int
    num_threads: int
    num_rows: int
    num_batches: int
    num_wrong: int
    keys_digest: str
    created_at: str
    shards: Shards = field(repr=False)

    def to_json(self) -> bytes:
        return json.dumps(vars(self) | {"shards": self.shards.to_json()}, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Plan:
        """
        Raises:
            ValueError, TypeError, KeyError: it is no plan.
        """
        value = json.loads(data)
        plan = cls(**{**value, "shards": Shards.all_of(value["plan_id"], **value["shards"])})
        numbers = (plan.batch_size, plan.num_threads, plan.num_rows, plan.num_batches)
        texts = (plan.plan_id, plan.keys_digest, plan.created_at)
        # It becomes part of paths.
        if re.fullmatch(r"[0-9A-Za-z]{1,64}", str(plan.plan_id)) is None:
            raise ValueError(f"plan_id {plan.plan_id!r}")
        if not (_all_are(int, numbers) and _all_are(str, texts) and _all_are(dict, (plan.job, plan.settings))):
            raise TypeError("a field of another type")
        return plan


def job_of(plan: Plan) -> Job:
    """The job that a plan was made of.

    Raises:
        NotWhole: this version of ldm-batch does not read it.
    """
    try:
        return Job.model_validate(plan.job)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise NotWhole(
            f"plan {plan.plan_id} holds a job that this version cannot read ({field}: {first['msg']}); use the version "
            "that made it, or choose a new sink.path"
        ) from None


def _all_are(kind: type, values: Iterable[Any]) -> bool:
    return all(type(value) is kind for value in values)


def read_plans(store: ObjectStore) -> list[Plan]:
    """The output's plans, oldest first; empty where there are none."""
    plans = []
    for name in sorted(store.list(PLANS)):
        if name.count("/") == 2 and name.endswith(".json"):
            claim = store.read(name)
            try:
                body = store.read(f"{PLANS}/{json.loads(claim)['plan_id']}/plan.json") if claim else None
                plan = None if body is None else Plan.from_json(body)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                raise NotWhole(f"{store.uri(name)} is no whole plan of ldm-batch; choose a new sink.path") from None
            if plan is None:
                raise NotWhole(f"{store.uri(name)} names a plan that is not there; choose a new sink.path")
            plans.append(plan)
    return plans


def add_plan(
    store: ObjectStore,
    number: int,
    plan: Plan,
    rows: Iterable[tuple[str, bytes]],
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Write a plan and claim place `number` of the output's log for it; False where another plan stands there.

    `rows` are the files that its shards name, path and content.
    """
    # Before the claim: a crash in between must not leave a mark that says too much.
    store.delete("_SUCCESS")
    store.delete(METADATA_JSONL)
    for path, data in rows:
        store.write(path, data)
    store.write(f"{PLANS}/{plan.plan_id}/plan.json", plan.to_json())
    path, claim = f"{PLANS}/{number:04d}.json", json.dumps({"plan_id": plan.plan_id}).encode()
    if commit(store, path, claim, plan.plan_id, _plan_id, sleep) == "theirs":
        return False
    # A store that checks and then puts may have taken another table's claim since. One that lands still later is not
    # seen here; its parts are counted at the end (`totals.count`), so it cannot pass unnoticed.
    return _plan_id(store.read(path) or b"") == plan.plan_id


def _plan_id(claim: bytes) -> str | None:
    try:
        return str(json.loads(claim)["plan_id"])
    except (ValueError, TypeError, KeyError):
        return None


def same_settings(held: dict[str, Any], now: dict[str, Any]) -> bool:
    return bool(held == json.loads(json.dumps(now)))


def refuse_other_job(store: ObjectStore, held: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise OutputHeldByOther with the difference."""
    now = json.loads(json.dumps(now))
    names = [name for name in sorted(held.keys() | now.keys()) if held.get(name) != now.get(name)]
    # Not what is spelled out, off, only because something beside it is on.
    asked = [name for name in names if not {repr(held.get(name)), repr(now.get(name))} <= {"None", "False"}]
    changes = [f"{name} {held.get(name)!r}, now {now.get(name)!r}" for name in asked or names]
    more = f" and {len(changes) - 4} more" if len(changes) > 4 else ""
    raise OutputHeldByOther(
        f"{store.url} holds another job ({'; '.join(changes[:4])}{more}): choose a new sink.path, or pass --extend "
        "to add the changed rows beside the old ones"
    )


def refuse_other_shape(store: ObjectStore, held: dict[str, Any], shape: dict[str, Any]) -> None:
    """Raise OutputHeldByOther where the rows of an output would lie in two ways: those it holds are not made again."""
    for name, now in shape.items():
        if held.get(name, now) != now:
            raise OutputHeldByOther(
                f"{store.url} holds {name} {held[name]!r}, now {now!r}; an output has one: choose a new sink.path"
            )


def read_shard(store: ObjectStore, file: str, index: int) -> pa.Table:
    """The planned rows of one shard.

    Raises:
        NotWhole: they are gone, or cannot be read.
    """
    table = _rows(store, file, lambda parquet: parquet.read(use_threads=False), OWN)
    rows = table.filter(pc.equal(table["shard"], index)).combine_chunks()
    if not rows.num_rows:
        raise NotWhole(
            f"{store.uri(file)} does not hold shard {index}; the plan cannot be followed; choose a new sink.path"
        )
    return rows


def read_rows(store: ObjectStore, file: str, columns: list[str]) -> pa.Table:
    """`columns` of all planned rows in a file of a plan.

    Raises:
        NotWhole: as `read_shard`.
    """
    return _rows(store, file, lambda parquet: parquet.read(columns, use_threads=False), columns)


def _rows(store: ObjectStore, file: str, read: Callable[[pq.ParquetFile], pa.Table], needed: Iterable[str]) -> pa.Table:
    data = store.read(file)
    if data is None:
        raise NotWhole(f"{store.uri(file)} is gone; the plan cannot be followed; choose a new sink.path")
    try:
        table = read(pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True))
        table.validate(full=True)
        for name in needed:
            wanted = SCHEMA.field(name).type if name in SCHEMA.names else pa.string()
            if table.schema.field(name).type != wanted:
                raise KeyError(f"column {name} is no {wanted}")
    except (pa.ArrowException, OSError, IndexError, KeyError, OverflowError) as error:
        reason = (str(error).splitlines() or ["empty"])[0][:200]
        raise NotWhole(
            f"{store.uri(file)} is damaged ({reason}); the plan cannot be followed; choose a new sink.path"
        ) from None
    return table
