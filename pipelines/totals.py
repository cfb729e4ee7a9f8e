"""Count what an output holds, and hold it against what was planned."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from pipelines import heartbeat, manifest
from pipelines.errors import NotWhole
from pipelines.plans import Plan, read_plans
from pipelines.shards import Shards
from pipelines.slices import Slice
from pipelines.storage import ObjectStore, Store

COUNTED = ("key", "sha256", "status", "num_bytes", "error_type")


@dataclass
class Totals:
    """What the manifest says of all plans of an output. `digest` is over (key, sha256), whatever the order."""

    num_planned: int = 0
    num_ok: int = 0
    num_failed: int = 0
    num_filtered: int = 0
    num_bytes: int = 0
    num_shards: int = 0
    num_shards_done: int = 0
    digest: str = ""
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def num_done(self) -> int:
        return self.num_ok + self.num_failed + self.num_filtered


def unfinished(store: ObjectStore, plan: Plan) -> Shards:
    """The plan's shards that have no part yet, in the plan's order."""
    return plan.shards.without(manifest.committed_shards(store, plan.plan_id))


class Counting:
    """Totals of an output, part by part."""

    def __init__(self, plans: list[Plan]) -> None:
        self._totals = Totals(num_planned=sum(p.num_rows for p in plans), num_shards=sum(len(p.shards) for p in plans))
        self._lines: list[str] = []

    def add(self, head: manifest.PartHead, rows: pa.Table) -> None:
        """Count a part that is whole; `rows` has COUNTED, at least."""
        totals = self._totals
        for key, sha256, status, size, error_type in zip(*(rows[name].to_pylist() for name in COUNTED), strict=True):
            self._lines.append(f"{key} {sha256 or status}")
            totals.num_bytes += size or 0
            if status == "failed":
                totals.failures[error_type] = totals.failures.get(error_type, 0) + 1
        totals.num_ok += head.num_ok
        totals.num_failed += head.num_failed
        totals.num_filtered += head.num_filtered
        totals.num_shards_done += 1

    def totals(self) -> Totals:
        """What was counted so far."""
        self._totals.digest = hashlib.sha256("\n".join(sorted(self._lines)).encode()).hexdigest()
        return self._totals


def count(store: ObjectStore, plans: list[Plan], part_of: Slice | None = None) -> Totals:
    """Count what every part says, or every part of a slice, and hold it against the plans.

    Raises:
        NotWhole: a part that no plan knows, or one whose rows are not the planned ones.
    """
    counting = Counting(plans if part_of is None else [_sliced(plan, part_of) for plan in plans])
    there = manifest.part_names(store)
    # Another run may have added a plan since these were read.
    if unplanned(plans, there) and (strays := unplanned(read_plans(store), there)):
        raise NotWhole(f"{store.uri(min(strays))}: no plan names this part; move it away and run again")
    shards = {plan.plan_id: plan.shards for plan in plans}
    names = (
        name
        for name in there
        if name.split("/")[1] in shards
        and (part_of is None or ((at := manifest.part_place(name)) is not None and part_of.has(at[1])))
    )
    for path, head, part in manifest.read_parts(store, names):
        place = manifest.part_place(path)
        assert place is not None
        if head.keys_digest != shards[place[0]][place[1]].keys_digest:
            raise NotWhole(f"{store.uri(path)} does not hold the rows that the plan names; move it away and run again")
        counting.add(head, manifest.read_part(part, COUNTED, store.uri(path)))
    return counting.totals()


def _sliced(plan: Plan, part_of: Slice) -> Plan:
    shards = part_of.take(plan.shards)
    return replace(plan, shards=shards, num_rows=int(shards.num_rows.sum()))


def unplanned(plans: list[Plan], names: list[str]) -> list[str]:
    """The parts of these that no plan names."""
    num_shards = {plan.plan_id: len(plan.shards) for plan in plans}
    places = ((name, manifest.part_place(name)) for name in names)
    return [name for name, place in places if place is None or place[1] >= num_shards.get(place[0], 0)]


def write_success(store: ObjectStore, totals: Totals) -> None:
    """Mark the output as whole.

    Raises:
        NotWhole: planned rows and manifest rows do not agree.
    """
    refuse_unfinished(store, totals)
    body = asdict(totals)
    said = _said(store.read("_SUCCESS"))
    if any(said.get(name) != value for name, value in body.items()):
        body["finished_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        store.write("_SUCCESS", json.dumps(body, indent=1).encode())


def refuse_unfinished(store: ObjectStore, totals: Totals) -> None:
    """
    Raises:
        NotWhole: planned rows and manifest rows do not agree.
    """
    if totals.num_done != totals.num_planned or totals.num_shards_done != totals.num_shards:
        raise NotWhole(
            f"{store.url}: {totals.num_planned} rows planned, {totals.num_done} in the manifest "
            f"({totals.num_shards_done} of {totals.num_shards} shards); `ldm-batch run` does the rest"
        )


def _said(data: bytes | None) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        value = json.loads(data or b"")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def status(output: str, storage_options: dict[str, Any] | None = None) -> tuple[Totals, list[dict[str, Any]]]:
    """Totals of an output and the last word of each of its runs, from the files alone.

    Raises:
        NotWhole: no plan is there, or a part is not whole.
    """
    store = Store(output, storage_options)
    plans = read_plans(store)
    if not plans:
        raise NotWhole(
            f"{output} holds no plan of ldm-batch; check the path, or make one with `ldm-batch run JOB.yaml`"
        )
    runs = []
    listing = store.list(heartbeat.RUNS)
    for path in sorted(name for name in listing if name.endswith("/heartbeat.json")):
        folder = path.removesuffix("/heartbeat.json")
        ended = store.read(f"{folder}/ended.json")
        runs.append({"run_id": folder.rpartition("/")[2], "ended": None if ended is None else _said(ended)})
    return count(store, plans), runs
