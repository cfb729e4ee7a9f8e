"""Plan: read the table once, say what will be made, in which batches, in which shards; write it down.

A source that has grown adds a plan with only the new keys.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ldm_ops.describe import WITH_T5, ModelFacts
from pipelines import manifest
from pipelines.adapters import StageAdapters, adapter_settings, identify_adapters
from pipelines.batch_size import BatchSize, most_rows, rows_at
from pipelines.chunk import Chunk
from pipelines.cutting import shard_of_batch
from pipelines.errors import JobError
from pipelines.images import MIME_TYPES, encode, refuse_missing
from pipelines.job import Job, digest
from pipelines.loading import image_loader
from pipelines.plans import (
    Plan,
    add_plan,
    job_of,
    read_plans,
    read_rows,
    refuse_other_job,
    refuse_other_shape,
    same_settings,
)
from pipelines.remembered import Memory, Remembered
from pipelines.row_table import OWN_FIELDS, has_negative, in_order, row_table
from pipelines.rows import PROTOCOL, PlannedRow, Resolver
from pipelines.shards import SHARDS_PER_FILE, Shards
from pipelines.signing import Signer
from pipelines.source import read_source
from pipelines.stages import SCALES
from pipelines.storage import Store, is_local
from pipelines.unused import refuse_unused, unused
from pipelines.weights import Weights, identify

MAX_PROBLEMS = 5

WRITTEN = ("images", "data", "thumbnails", "intermediates", "manifest", "_ldm")
"""Folders of an output."""

NOWHERE = Chunk("", 0, 0, {})
"""Where rows come from that no table asks for."""

BUCKET = (
    "height",
    "width",
    "num_inference_steps",
    "scheduler",
    "guidance_scale",
    "strength",
    "lora",
    "lora_scale",
    "controlnet_conditioning_scale",
)
"""What must be equal inside one device batch; beside it, whether there is a negative prompt at all: some pipelines
(SDXL) treat none and an empty one differently, and a row must not notice its neighbours."""


Measure = Callable[[Job, list[tuple[Weights, ModelFacts]], list[StageAdapters], pa.Table, list[BatchSize]], Job]
"""A job, its stages' models and adapters, planned rows, each stage's size in an earlier plan (empty for the first) →
the job with a size in the place of each `auto`."""


@dataclass
class Planned:
    """The outcome of planning: all plans of the output, and what the table held.

    `table` is the new plan's rows, None where nothing is new.
    """

    plans: list[Plan]
    new: Plan | None
    table: pa.Table | None
    num_source_rows: int
    num_pictures: int
    num_duplicates: int
    num_known: int
    num_wrong: int
    problems: list[str]
    buckets: list[dict[str, Any]]
    models: list[tuple[Weights, ModelFacts]]
    adapters: list[StageAdapters]
    num_rows: int = 0
    num_gone: int = 0
    """Rows of earlier plans that this table does not hold; they stay part of the output."""
    num_skipped: int = 0
    """What the source lists and does not hold: images that img2dataset could not download."""

    def remembered(self) -> Remembered:
        """What the same table will say to the same job."""
        return Remembered(
            [plan.plan_id for plan in self.plans],
            self.num_source_rows,
            self.num_pictures,
            self.num_duplicates,
            self.num_rows,
            self.num_wrong,
            self.num_skipped,
            self.problems,
        )

    @property
    def num_shards(self) -> int:
        return sum(len(plan.shards) for plan in self.plans)


def check(job: Job, limit: int | None = None) -> Planned:
    """Validate everything, every row too, and write nothing.

    Raises:
        JobError: the job, the model or a row is wrong.
    """
    return _Planner(job, limit).plan([], None)


def plan(job: Job, limit: int | None = None, extend: bool = False, measure: Measure | None = None) -> Planned:
    """Bring the output's plans up to date with the table, and write what is new.

    Args:
        measure: puts a size in the place of each `batch_size: auto`.

    Raises:
        JobError: the job, the model or a row is wrong.
        OutputHeldByOther: the output was made with other parameters, and `extend` is not set.
    """
    planner = _Planner(job, limit, measure)
    store = Store(job.sink.path, job.sink.storage_options)
    memory = Memory(store, job, planner.settings, limit)
    while True:
        plans = read_plans(store)
        if plans:
            refuse_other_shape(store, plans[-1].settings, job.shape_settings())
        if plans and not extend and not any(same_settings(p.settings, planner.settings) for p in plans):
            refuse_other_job(store, plans[-1].settings, planner.settings)
        if (same := memory.recall(plans)) is not None:
            return planner.known(plans, same)
        planned = planner.plan(plans, store, extend)
        if planned.new is None or planned.table is None:
            memory.keep(planned.remembered(), planner.resolver.brought)
            return planned
        if add_plan(store, len(plans) + 1, planned.new, _row_files(planned.new, planned.table)):
            memory.keep(planned.remembered(), planner.resolver.brought)
            facts = [facts for _, facts in planner.models]
            left_out = [path for path, _ in unused(job, facts, planner.resolver.brought)]
            store.write("_ldm/job.yaml", job.resolved_yaml(left_out).encode())
            return planned


def refuse_sink_in_source(job: Job) -> None:
    """Raise JobError where a later run would list its own output as input."""
    paths = [job.source.path] if isinstance(job.source.path, str) else job.source.path or []
    sink = job.sink.path.rstrip("/")
    for path in paths:
        if _lies_in(sink, path):
            raise JobError(f"sink.path {job.sink.path} lies inside source.path {path}; choose another, beside it")
        fixed = "/".join(takewhile(lambda part: not any(c in part for c in "*?["), path.split("/")))
        if _lies_in(fixed, sink) and (fixed == sink or any(_lies_in(fixed, f"{sink}/{name}") for name in WRITTEN)):
            raise JobError(
                f"source.path {path} is what the job writes, in sink.path {job.sink.path}; choose another sink"
            )


def _lies_in(path: str, folder: str) -> bool:
    if is_local(path) and is_local(folder):
        inner, outer = (Path(one.removeprefix("file://")).resolve() for one in (path, folder))
        return inner.is_relative_to(outer)
    return f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")


class _Planner:
    def __init__(self, job: Job, limit: int | None, measure: Measure | None = None) -> None:
        self.job = job
        self.limit = limit
        self.measure = measure
        self.models = [
            identify(stage.model, stage.revision, stage.variant, job.source.storage_options, stage.parts)
            for stage in job.stages
        ]
        for i, (stage, (_, facts)) in enumerate(zip(job.stages, self.models, strict=True)):
            if stage.op not in facts.ops:
                raise JobError(
                    f"stages.{i}.model: {stage.model} is a {facts.pipeline}, for {', '.join(sorted(facts.ops))}; "
                    f"{stage.op} takes another kind of model"
                )
            policy = getattr(stage, "safety_checker", None)
            if policy not in (None, "off") and not facts.has_safety_checker:
                raise JobError(
                    f"stages.{i}.safety_checker: {stage.model} has no safety checker; leave it out, or set off"
                )
            if stage.op == "upscale" and stage.noise_level > (facts.max_noise_level or stage.noise_level):
                raise JobError(
                    f"stages.{i}.noise_level: {stage.noise_level} is more than {stage.model} takes; 0 to "
                    f"{facts.max_noise_level}"
                )
            if stage.op == "embed" and stage.max_sequence_length is not None and facts.pipeline not in WITH_T5:
                raise JobError(
                    f"stages.{i}.max_sequence_length: {stage.model} is a {facts.pipeline}, without a T5; leave it out"
                )
            if i and stage.op == "decode" and self.models[i - 1][0].revision != self.models[i][0].revision:
                raise JobError(
                    f"stages.{i}.model: {stage.model} is not the model that stages.{i - 1} encodes with; give the same"
                )
            image_loader(stage, facts, job.source)
        refuse_unused(job, [facts for _, facts in self.models])
        self.adapters = [
            identify_adapters(i, stage, facts, job.source.storage_options)
            for i, (stage, (_, facts)) in enumerate(zip(job.stages, self.models, strict=True))
        ]
        refuse_sink_in_source(job)
        refuse_missing(job.sink.format, job.sink.png_encoder)
        if job.sink.c2pa is not None:
            # Before any picture is made: whether the package is there, and certificate and key fit.
            Signer(job.sink.c2pa)(encode(np.zeros((8, 8, 3), np.uint8), "png"), MIME_TYPES["png"])
        self.resolver = Resolver(job, self.models, self.adapters)
        self.settings = {
            **job.output_settings(),
            **{f"stages.{i}.model_revision": weights.revision for i, (weights, _) in enumerate(self.models)},
            **adapter_settings(self.adapters),
        }

    def plan(self, plans: list[Plan], store: Store | None, extend: bool = False) -> Planned:
        known: set[str] = set()
        held_ids: set[str] = set()
        for keys, held in _known(plans, store) if store is not None else ():
            known.update(keys)
            held_ids.update(held)
        num_held = len(known)
        counts: dict[str, int] = {}
        ids: dict[str, str] = {}
        problems: list[str] = []
        tables: list[pa.Table] = []
        num_source_rows = num_pictures = num_known = num_wrong = num_skipped = 0
        for chunk in self._limited(read_source(self.job.source, "image" in self.resolver.takes)):
            num_source_rows += chunk.num_rows
            num_skipped += chunk.num_skipped
            fresh: list[PlannedRow] = []
            for row in self.resolver.rows(chunk):
                num_pictures += 1
                if row.problem is not None:
                    num_wrong += 1
                    if len(problems) < MAX_PROBLEMS:
                        problems.append(f"{chunk.uri} row {chunk.first_row + row.source_index}: {row.problem}")
                if row.id is not None and row.problem is None:
                    self._refuse_other_row(chunk, row, ids)
                    if row.id in held_ids and row.key not in known and not extend:
                        raise JobError(
                            f"{chunk.uri} row {chunk.first_row + row.source_index}: id {row.id[:80]!r} is in "
                            f"{self.job.sink.path} already, made from other content: give the row a new id, choose a "
                            "new sink.path, or pass --extend to keep both"
                        )
                if row.key in counts:
                    counts[row.key] += 1
                elif row.key in known:
                    counts[row.key] = 1
                    num_known += 1
                else:
                    counts[row.key] = 1
                    fresh.append(row)
            if fresh:
                tables.append(row_table(chunk, fresh, self.resolver.passing(chunk)))
        if num_source_rows == 0:
            raise JobError(f"{_origin(self.job)}: the table has no rows; there is nothing to make")
        if num_wrong and self.job.source.on_bad_row == "refuse":
            more = f"\n… {num_wrong} rows are wrong in all" if num_wrong > len(problems) else ""
            raise JobError(
                "\n".join(problems) + more + "\nmend them, or set source.on_bad_row: fail to make the others"
            )
        if num_wrong == num_pictures:
            raise JobError("\n".join(problems) + "\nno row can be made")
        refuse_unused(self.job, [facts for _, facts in self.models], self.resolver.brought)
        if self.resolver.by_caption and not self.resolver.has_captions:
            raise JobError(
                f"{_origin(self.job)}: no row has a caption, and embed makes embeddings of captions; they come from a "
                "column, or in tars from .txt or a field of .json beside the images: source.columns: {prompt: …} names "
                "the column or field"
            )
        # After the table: what it asks for itself is no addition.
        for row in self.resolver.beside():
            if row.key not in counts:
                counts[row.key] = 1
                num_pictures += 1
                if row.key in known:
                    num_known += 1
                else:
                    tables.append(row_table(NOWHERE, [row], []))
        del ids, known, held_ids
        table = manifest.concat(tables) if tables else pa.schema(OWN_FIELDS).empty_table()
        new: Plan | None = None
        buckets: list[dict[str, Any]] = []
        if table.num_rows:
            table = in_order(table)
            duplicates = np.array([counts[key] - 1 for key in table["key"].to_pylist()], dtype=np.int32)
            table = table.append_column("num_duplicates", pa.array(duplicates))
            job = self._measured(table, plans) if store is not None else self.job
            new, table, buckets = self._cut(job, table)
        return Planned(
            plans=plans + ([new] if new else []),
            new=new,
            table=table if new else None,
            num_source_rows=num_source_rows,
            num_pictures=num_pictures,
            num_duplicates=num_pictures - len(counts),
            num_known=num_known,
            num_wrong=num_wrong,
            problems=problems,
            buckets=buckets,
            models=self.models,
            adapters=self.adapters,
            num_rows=len(counts),
            num_gone=0 if self.limit else num_held - num_known,
            num_skipped=num_skipped,
        )

    def known(self, plans: list[Plan], same: Remembered) -> Planned:
        """The outcome for a table that is as it was when it was planned."""
        return Planned(
            plans=plans,
            new=None,
            table=None,
            num_source_rows=same.num_source_rows,
            num_pictures=same.num_pictures,
            num_duplicates=same.num_duplicates,
            num_known=same.num_rows,
            num_wrong=same.num_wrong,
            problems=same.problems,
            buckets=[],
            models=self.models,
            adapters=self.adapters,
            num_rows=same.num_rows,
            num_gone=0 if self.limit else sum(plan.num_rows for plan in plans) - same.num_rows,
            num_skipped=same.num_skipped,
        )

    def _refuse_other_row(self, chunk: Chunk, row: PlannedRow, ids: dict[str, str]) -> None:
        content = f"{row.key}{digest(row.cells)[:32]}" if row.cells else row.key
        if ids.setdefault(str(row.id), content) != content:
            raise JobError(
                f"{chunk.uri} row {chunk.first_row + row.source_index}: id {str(row.id)[:80]!r} stands on another row "
                "with other content; ids must be unique"
            )

    def _limited(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        left = self.limit
        for chunk in chunks:
            if left is None:
                yield chunk
                continue
            take = min(left, chunk.num_rows)
            left -= take
            yield replace(chunk, num_rows=take, columns={n: c[:take] for n, c in chunk.columns.items()})
            if left == 0:
                return

    def _measured(self, table: pa.Table, plans: list[Plan]) -> Job:
        if all(stage.batch_size != "auto" for stage in self.job.stages):
            return self.job
        if self.measure is None:
            raise JobError("batch_size: auto is measured by `ldm-batch run` and `ldm-batch plan`; give a number here")
        same = [p for p in plans if same_settings(p.settings, self.settings)]
        known = [stage.batch_size for stage in job_of(same[-1]).stages] if same else []
        return self.measure(self.job, self.models, self.adapters, table, known)

    def _cut(self, job: Job, table: pa.Table) -> tuple[Plan, pa.Table, list[dict[str, Any]]]:
        bucket = buckets_of(table)
        starts = np.flatnonzero(np.diff(bucket, prepend=-1))
        within = np.arange(table.num_rows) - starts[bucket]
        batches = np.diff(np.append(starts, table.num_rows))
        # Of a size that only the worker will see, no fewer than it may take, or it would fill up with padding.
        sized = np.asarray(pc.and_(pc.is_valid(table["height"]), pc.is_valid(table["width"])))[starts]
        pixels = _pixels(table)[starts].astype(int).tolist()
        wanted = job.stage.batch_size
        size = np.array(
            [rows_at(wanted, px) if known else most_rows(wanted) for px, known in zip(pixels, sized, strict=True)]
        )
        per_bucket = -(-batches // size)
        first_batch = np.concatenate([[0], np.cumsum(per_bucket)[:-1]])
        batch = first_batch[bucket] + within // size[bucket]
        num_batches = int(per_bucket.sum())
        cost = _cost(table)
        grown = math.prod(SCALES.get(stage.op, 1) ** 2 for stage in self.job.stages)
        firsts = np.flatnonzero(np.diff(batch, prepend=-1))
        shard = shard_of_batch(
            np.add.reduceat(cost, firsts),
            np.add.reduceat(_pixels(table) * 3 * grown, firsts),
            self.job.batches_per_shard,
        )[batch]
        table = table.append_column("batch", pa.array(batch.astype(np.int32))).append_column(
            "shard", pa.array(shard.astype(np.int32))
        )
        keys = table["key"].to_pylist()
        bounds = np.append(np.flatnonzero(np.diff(shard, prepend=-1)), table.num_rows)
        pieces = [(int(a), int(b)) for a, b in pairwise(bounds)]
        digests = [manifest.keys_digest(keys[a:b]) for a, b in pieces]
        pools = [[stage.batch_size, stage.num_threads] for stage in job.stages]
        plan_id = digest([PROTOCOL, pools, digests])[:16]
        costs = np.add.reduceat(cost, bounds[:-1])
        shards = Shards.all_of(plan_id, np.diff(bounds), costs, "".join(digests))
        plan = Plan(
            plan_id=plan_id,
            job=job.recorded(),
            settings=self.settings,
            batch_size=int(size.max()),
            num_threads=job.stage.num_threads,
            num_rows=table.num_rows,
            num_batches=num_batches,
            num_wrong=table.num_rows - int(table["problem"].null_count),
            keys_digest=digest(digests),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            shards=shards,
        )
        first = table.take(pa.array(starts))
        buckets = [
            {
                **{name: first[name][i].as_py() for name in BUCKET},
                "rows": int(batches[i]),
                "batches": int(per_bucket[i]),
            }
            for i in range(len(starts))
            if not first["problem"][i].is_valid
        ]
        return plan, table, buckets


def buckets_of(table: pa.Table) -> NDArray[np.int64]:
    """The number, from 0, of what is equal in each row's batch; of planned rows, one at least, in the plan's order."""
    change = np.zeros(table.num_rows, dtype=bool)
    for name in BUCKET:
        codes = np.asarray(pc.fill_null(table[name].combine_chunks().dictionary_encode().indices, -1))
        change[1:] |= codes[1:] != codes[:-1]
    negative = np.asarray(has_negative(table))
    change[1:] |= negative[1:] != negative[:-1]
    return np.cumsum(change)


def _pixels(table: pa.Table) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of each row's picture; one of unknown size counts as a square of 1024."""
    return np.asarray(pc.fill_null(pc.multiply(table["height"], table["width"]), 1 << 20), dtype=np.float64)


def _cost(table: pa.Table) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Relative device work of each row: steps × pixels, twice with guidance."""
    steps = np.asarray(pc.fill_null(table["num_inference_steps"], 1), dtype=np.float64)
    strength = np.asarray(pc.fill_null(table["strength"], 1.0), dtype=np.float64)
    guided = np.where(np.asarray(pc.fill_null(table["guidance_scale"], 0.0)) > 1, 2.0, 1.0)
    return np.asarray(steps * strength * _pixels(table) * guided)


def _origin(job: Job) -> str:
    return "source.rows" if job.source.rows is not None else f"source.path {job.source.path}"


def _known(plans: list[Plan], store: Store) -> Iterator[tuple[list[str], list[str]]]:
    """(every key, the ids that name something makeable), file by file; a dead letter may be mended under its id."""
    for plan in plans:
        for file in sorted({shard.file for shard in plan.shards}):
            table = read_rows(store, file, ["key", "id", "problem"])
            ids = table.filter(pc.is_null(table["problem"]))["id"].drop_null()
            yield table["key"].to_pylist(), ids.to_pylist()


def _row_files(plan: Plan, table: pa.Table) -> Iterator[tuple[str, bytes]]:
    offset = 0
    for first in range(0, len(plan.shards), SHARDS_PER_FILE):
        shards = plan.shards[first : first + SHARDS_PER_FILE]
        num_rows = int(shards.num_rows.sum())
        buffer = io.BytesIO()
        # Not a row group for each shard: writing those took most of the time of a long plan.
        pq.write_table(table.slice(offset, num_rows), buffer, compression="zstd", write_page_checksum=True)
        offset += num_rows
        yield shards[0].file, buffer.getvalue()
