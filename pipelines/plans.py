"""What a plan is, where an output keeps its plans, and whose output it is.

A plan is immutable. `_ldm/plans/0001.json` and so on are the log of an output's plans (created only if absent, so two
planners cannot both add one); each names a folder with the plan itself and its rows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.commit import commit
from pipelines.errors import NotWhole, OutputHeldByOther
from pipelines.manifest import METADATA_JSONL
from pipelines.shards import PLANS, Shards
from pipelines.storage import ObjectStore


@dataclass(frozen=True)
class Plan:
    """What one plan says; `num_` counts are rows of this plan."""

    plan_id: str
    job: dict[str, Any]
    settings: dict[str, Any]
    batch_size: int
    num_threads: int
    batches_per_shard: int
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
        value = json.loads(data)
        return cls(**{**value, "shards": Shards.all_of(value["plan_id"], **value["shards"])})


def read_plans(store: ObjectStore) -> list[Plan]:
    """The output's plans, oldest first; empty where there are none."""
    plans = []
    for name in sorted(store.list(PLANS)):
        if name.count("/") == 2 and name.endswith(".json"):
            claim = store.read(name)
            try:
                body = store.read(f"{PLANS}/{json.loads(claim)['plan_id']}/plan.json") if claim else None
                plan = None if body is None else Plan.from_json(body)
            except (ValueError, TypeError, KeyError, AttributeError):
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
    changes = [
        f"{name} {held.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(held.keys() | now.keys())
        if held.get(name) != now.get(name)
    ]
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


def read_shard(store: ObjectStore, file: str, row_group: int) -> pa.Table:
    """The planned rows of one shard."""
    data = store.read(file)
    if data is None:
        raise NotWhole(f"{store.uri(file)} is gone; the plan cannot be followed; choose a new sink.path")
    return pq.ParquetFile(pa.BufferReader(data)).read_row_group(row_group)
