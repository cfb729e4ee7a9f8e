"""Make rows of an output again, here and alone, and compare their bytes with what the manifest says.

The very callables of a run do it, one after the other in this process; what they write goes to memory.
"""

from __future__ import annotations

import io
import uuid
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import manifest
from pipelines.equipment import encoder_of, plan_adapters, plan_models
from pipelines.errors import JobError
from pipelines.loading import LoadShard, image_loader
from pipelines.plans import Plan, job_of, read_shard
from pipelines.shards import Shard
from pipelines.sink import ShardWriter
from pipelines.storage import Store
from pipelines.worker import Place, Worker


@dataclass
class Regenerated:
    """Rows that were made again; those that came out otherwise are a line each."""

    num_rows: int = 0
    num_same: int = 0
    different: list[str] = field(default_factory=list)


def regenerated(
    store: Store, drawn: list[tuple[Plan, Shard, dict[str, Any]]], storage_options: dict[str, Any]
) -> Regenerated:
    """Make `drawn` manifest rows again. `storage_options` are for fsspec, of the images and the models.

    Raises:
        JobError: a model is no longer what it was, or the pictures are signed, which no two are alike.
    """
    result = Regenerated()
    plans = {plan.plan_id: plan for plan, _, _ in drawn}
    # Where memory was short, a row's batches were smaller than planned, which changes the last bits.
    sizes = {row["key"]: tuple(stage["batch_size"] for stage in row["stages"]) for _, _, row in drawn}
    for plan_id, its_sizes in dict.fromkeys((plan.plan_id, sizes[row["key"]]) for plan, _, row in drawn):
        plan = plans[plan_id]
        if plan.settings.get("sink.c2pa"):
            raise JobError(f"{store.url}: its pictures are signed, no two signatures are alike; leave out --regenerate")
        mine = [(s, row) for p, s, row in drawn if (p.plan_id, sizes[row["key"]]) == (plan_id, its_sizes)]
        before = {row["key"]: row for _, row in mine}
        shards = {shard.index: shard for shard, _ in mine}
        made = _make(store, plan, its_sizes, list(shards.values()), set(before), storage_options)
        for key, row in before.items():
            now = made[key]
            result.num_rows += 1
            if now["sha256"] == row["sha256"]:
                result.num_same += 1
            elif now["status"] != "ok":
                result.different.append(f"{row['uri']}: made again it is {now['status']} ({now['error_message']})")
            else:
                result.different.append(
                    f"{row['uri']}: made again it has other bytes (then on {row['device']}, now on {now['device']})"
                )
    return result


def _make(
    store: Store,
    plan: Plan,
    sizes: tuple[int, ...],
    shards: list[Shard],
    keys: set[str],
    storage_options: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """The manifest rows of `keys`, as this process makes them in batches of these `sizes`, one of each stage."""
    job = job_of(plan)
    source = job.source.model_copy(update={"storage_options": storage_options})
    models = plan_models(plan, job, [], storage_options)
    adapters = plan_adapters(plan, job, [], models, storage_options)
    memory = Store(f"memory://ldm-batch-{uuid.uuid4().hex}")
    loaders = [
        image_loader(stage, facts, source, beside.size_multiple)
        for stage, (_, facts), beside in zip(job.stages, models, adapters, strict=True)
    ]
    load = LoadShard(store, loaders[0], models[0][0].revision, storage_options)
    wanted = pa.array(sorted(keys), pa.string())
    tables = [read_shard(store, shard.file, shard.index) for shard in shards]
    tables = [load.load(table.filter(pc.is_in(table["key"], wanted))) for table in tables]
    for i, (planned, (weights, _)) in enumerate(zip(job.stages, models, strict=True)):
        stage = planned.model_copy(update={"batch_size": sizes[i]})
        place = Place(stage, i, i == len(job.stages) - 1, loaders[i], adapters[i])
        # What libraries say while they load a model (progress bars, deprecations) is nothing that verify found.
        with redirect_stderr(io.StringIO()):
            worker = Worker(place, stage.bare(), weights)
        tables = [worker(table) for table in tables]
    weights, facts = models[-1]
    first = models[0][0]
    encoder = encoder_of(job.stages[-1], weights, facts)
    sink = job.sink.model_copy(update={"path": memory.url})
    write = ShardWriter(memory, plan.plan_id, sink, job.layout, "", first.name, first.revision, encoder)
    try:
        for table in tables:
            write(table)
        return {row["key"]: row for table in manifest.read_tables(memory) for row in table.to_pylist()}
    finally:
        with suppress(FileNotFoundError):
            fsspec.filesystem("memory").rm(memory.url, recursive=True)
