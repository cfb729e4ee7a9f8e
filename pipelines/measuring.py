"""`batch_size: auto`: what a stage does in a second at one batch size after the other, on the device that will run it.

The largest batch that fits is not the fastest: of an autoencoder it can be eight times slower. So sizes are doubled for
as long as it pays. What was found is kept on this machine and frozen into the plan, so that a resumed job, and the same
job again, makes the same bytes.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ldm_ops.describe import ModelFacts
from ldm_ops.device import free_memory
from pipelines.adapters import StageAdapters
from pipelines.batch_size import BatchSize, pixels_of, rows_at
from pipelines.blocks import rows_of
from pipelines.cluster import ray_cluster
from pipelines.dataset import BROUGHT, plain_error
from pipelines.errors import JobError, LdmError
from pipelines.fitting import TASK_CPUS, fit, selector
from pipelines.inputs import BadImage
from pipelines.job import Job, digest
from pipelines.loading import LoadShard, image_loader
from pipelines.planner import buckets_of
from pipelines.stages import AnyStage, reads
from pipelines.storage import Store
from pipelines.weights import Weights, cache_folder
from pipelines.worker import ARRAYS, Place, Worker, first_line

GAIN = 1.03
"""By how much a size has to be faster than half of it."""

MOST_ROWS = 256
MOST_STEPS = 8
"""Of a picture that is only made to be timed: the share of what comes before and after the steps is small by then."""

LONG_ENOUGH_S = 0.5
TRIES = 3
"""Rows that are tried before their kind is given up as one that cannot be made."""

Timed = tuple[int, float | None]
"""Rows of a device call, and rows a second; None where there was too little memory."""

Say = Callable[[str], None]
Equipped = tuple[AnyStage, Weights, ModelFacts, StageAdapters]


class Timer(Worker):
    """A worker of the plan to come, that is asked how fast it is. Each call takes a table of one loaded row."""

    def load_model(self) -> None:
        """Not yet: where all sizes are known, nothing is run."""

    def __call__(self, shard: pa.Table) -> pa.Table:
        self._loaded()
        return super().__call__(shard)

    def device_name(self) -> str:
        return self.device

    def pixels(self, row: pa.Table) -> int:
        return pixels_of(self._row(row))

    def time(self, row: pa.Table, size: int) -> float | None:
        """Rows a second in calls of `size`; None where there is too little memory.

        Raises:
            Exception: whatever is wrong with the row.
        """
        planned = self._row(row)
        if planned["num_inference_steps"] is not None:
            planned["num_inference_steps"] = timed_steps(planned["num_inference_steps"], planned["strength"])
        self._loaded()
        return self.device_thread.submit(self._rate, [planned] * size).result()

    def _rate(self, batch: list[dict[str, Any]]) -> float | None:
        try:
            self.op.run(self.model, batch)
            calls, begin = 0, time.perf_counter()
            while not calls or time.perf_counter() - begin < LONG_ENOUGH_S:
                self.op.run(self.model, batch)
                calls += 1
            return calls * len(batch) / (time.perf_counter() - begin)
        except Exception as error:
            if not self.op.is_out_of_memory(error):
                raise
        free_memory()
        return None

    def _loaded(self) -> None:
        if hasattr(self, "model"):
            return
        try:
            super().load_model()
        except LdmError:
            raise
        except Exception as error:  # noqa: BLE001 - a library raises what it likes
            # No row's fault.
            raise JobError(f"stages.{self.place.index}: the model cannot be loaded ({first_line(error)})") from None

    def _row(self, table: pa.Table) -> dict[str, Any]:
        [planned] = rows_of(table)
        row = self.place.row(planned)
        for refused in self._equip({0: row}).values():
            raise BadImage(refused["error_type"], refused["error_message"])
        return row


def timed_steps(num_inference_steps: int, strength: float | None) -> int:
    """`num_inference_steps` of a picture that is only timed: of those that `strength` leaves to do, MOST_STEPS."""
    return min(num_inference_steps, math.ceil(MOST_STEPS / (strength or 1.0)))


def measured(
    job: Job,
    models: list[tuple[Weights, ModelFacts]],
    adapters: list[StageAdapters],
    rows: pa.Table,
    known: list[BatchSize],
    address: str | None,
    say: Say,
) -> Job:
    """`job` with a size in the place of each `auto`, for rows such as these.

    Args:
        rows: planned ones, in the order of a plan.
        known: what an earlier plan of the same output has for each stage; empty for the first.

    Raises:
        JobError: no row can be made.
    """
    equipped: list[Equipped] = [
        (stage, *model, beside) for stage, model, beside in zip(job.stages, models, adapters, strict=True)
    ]
    if known and all(size != "auto" for size in known):
        # Another size would change the last bits of rows that are like those that are there.
        return _frozen(job, dict(enumerate(known)))
    found: dict[int, BatchSize] = {}
    last = max(i for i, stage in enumerate(job.stages) if stage.batch_size == "auto")
    say("measuring batch_size: auto …")
    with ray_cluster(address):
        try:
            tried = list(samples(job, equipped[0], rows))
            for i, one in enumerate(equipped[: last + 1]):
                sizes, tried = _stage(i, one, job, tried, i < last, say)
                if one[0].batch_size == "auto":
                    found[i] = sizes
        except Exception as error:
            raise plain_error(error) from error
    return _frozen(job, found)


def _frozen(job: Job, sizes: dict[int, BatchSize]) -> Job:
    stages = [
        stage.model_copy(update={"batch_size": sizes[i]}) if stage.batch_size == "auto" and i in sizes else stage
        for i, stage in enumerate(job.stages)
    ]
    return job.model_copy(update={"stages": stages})


def samples(job: Job, first: Equipped, rows: pa.Table) -> Iterator[tuple[list[pa.Table], int]]:
    """Of each size class of pictures, by powers of two: the largest ones with the most guidance and steps, loaded, and
    how many rows one of them can share a batch with; of sizes that only the files tell, as a sample of them says."""
    stage, weights, facts, beside = first
    loader = image_loader(stage, facts, job.source, beside.size_multiple)
    store = Store(job.sink.path, job.sink.storage_options)
    load = LoadShard(store, loader, weights.revision, job.source.storage_options)
    bring = load.load if BROUGHT.isdisjoint(reads(stage)) else partial(_apart, load)
    rows = rows.filter(pc.is_null(rows["problem"]))
    pixels = np.asarray(pc.fill_null(pc.multiply(rows["height"], rows["width"]), 0))
    guidance = np.asarray(pc.fill_null(rows["guidance_scale"], 0.0))
    classes = _size_class(pixels)
    bucket = buckets_of(rows)
    alike = np.bincount(bucket)[bucket]
    for kind in np.unique(classes):
        members = np.flatnonzero(classes == kind)
        by_work = members[np.lexsort((-guidance[members], -pixels[members]))]
        # Where only the files know how large they are, some of all.
        chosen = by_work[:TRIES] if kind else members[:: max(1, len(members) // (4 * TRIES))]
        loaded = [bring(rows.slice(int(i), 1)) for i in chosen]
        fine = [one for one in loaded if one is not None and one["status"][0].as_py() is None]
        # Half of the rows have as many beside them: more than that would be padding.
        count = int(np.median(alike[members]))
        if kind and fine:
            yield fine, count
            continue
        brought = np.array([_brought(one) for one in fine])
        kinds = _size_class(brought)
        for its in np.unique(kinds):
            same = sorted(np.flatnonzero(kinds == its), key=lambda i: -brought[i])
            yield [fine[i] for i in same], max(1, count * len(same) // len(fine))


def _apart(load: LoadShard, row: pa.Table) -> pa.Table | None:
    """`load` in a process of its own, as some files end the one that decodes them; None of these."""
    import ray

    def bring() -> pa.Table:
        return load.load(row)

    try:
        return ray.get(ray.remote(num_cpus=TASK_CPUS, max_retries=0)(bring).remote())
    except ray.exceptions.RayTaskError as error:
        # What Ray makes of it is an error of ours too, whose text is a traceback.
        raise error.cause from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
        return None


def _size_class(pixels: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(np.ceil(np.log2(np.maximum(pixels, 1))))


def _brought(loaded: pa.Table) -> int:
    """Pixels of what a row brings."""
    [row] = rows_of(loaded.select(list(ARRAYS.values())))
    return pixels_of({name: row[at] for name, at in ARRAYS.items()})


def _stage(
    index: int, one: Equipped, job: Job, samples: list[tuple[list[pa.Table], int]], goes_on: bool, say: Say
) -> tuple[BatchSize, list[tuple[list[pa.Table], int]]]:
    """The sizes of one stage, and what it makes of the samples, for the next one."""
    import ray

    stage, weights, facts, beside = one
    alone = stage.model_copy(update={"batch_size": 1})
    last = index == len(job.stages) - 1
    place = Place(alone, index, last, image_loader(stage, facts, job.source, beside.size_multiple), beside)
    op = stage.bare()
    if not stage.num_gpus and op.device == "auto":
        op = op.model_copy(update={"device": "cpu"})
    # Ray would wait for a node that can never come.
    fit([(stage, weights.num_bytes)])
    resources: dict[str, Any] = {"num_gpus": stage.num_gpus, "num_cpus": stage.num_cpus or TASK_CPUS}
    if labels := selector(stage):
        resources["label_selector"] = labels
    start = ray.remote(Timer).options(max_restarts=0, **resources)
    timer = start.remote(place, op, weights)
    sizes: dict[int, int] = {}
    made: list[tuple[list[pa.Table], int]] = []
    reason = "none of the rows that were tried can be loaded"
    for rows, count in samples:
        for row in rows:
            try:
                pixels = ray.get(timer.pixels.remote(row))
                if stage.batch_size == "auto" and pixels not in sizes:
                    most = min(MOST_ROWS, max(1, count))
                    kind = _kind(index, one, row, pixels, ray.get(timer.device_name.remote()), most)
                    size = _recall(kind)
                    if size is None:

                        def rate(size: int, row: pa.Table = row) -> float | None:
                            nonlocal timer
                            try:
                                found: float | None = ray.get(timer.time.remote(row, size))
                                return found
                            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):
                                # Where the kernel or Ray's monitor takes memory back, it takes the process.
                                timer = start.remote(place, op, weights)
                                return None

                        curve: list[Timed] = []
                        size = best_size(rate, most, curve)
                        # Without room for one row nothing was measured: something else may have had the memory.
                        if curve[0][1] is not None:
                            _keep(kind, size)
                        shown = ", ".join(f"{n}: {'no room' if r is None else f'{r:.3g}'}" for n, r in curve)
                        say(f"stages.{index}.batch_size: {size} up to {pixels} px (rows/s at {shown})")
                    sizes[pixels] = size
                if goes_on:
                    its_size: BatchSize = sizes if stage.batch_size == "auto" else stage.batch_size
                    held = rows_at(its_size, pixels) * (1 if job.batches_per_shard == "auto" else job.batches_per_shard)
                    # The last shards hold one batch of the first stage: a later stage would fill up with padding.
                    made.append(([ray.get(timer.__call__.remote(row))], count if index else min(count, held)))
                break
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, LdmError):
                    raise error.cause from None
                reason = (str(error.cause).strip().splitlines() or [type(error.cause).__name__])[0]
    ray.kill(timer)
    if (goes_on and not made) or (stage.batch_size == "auto" and not sizes):
        raise JobError(
            f"stages.{index}.batch_size: auto cannot be measured ({reason}); mend the rows, or give a number"
        )
    return sizes, [(rows, count) for rows, count in made if rows[0]["status"][0].as_py() is None]


def best_size(rate: Callable[[int], float | None], limit: int, curve: list[Timed]) -> int:
    """Rows of a device call, at most `limit`: doubled for as long as `rate` grows by GAIN; where memory ends, the
    largest that fits is sought between. What was tried is added to `curve`."""

    def tried(size: int) -> float | None:
        curve.append((size, rate(size)))
        return curve[-1][1]

    best, best_rate = 1, tried(1) or 0.0
    size = 2
    while size <= limit and best_rate:
        found = tried(size)
        if found is None:
            return _fitting(tried, best, size, best_rate)
        if found < best_rate * GAIN:
            break
        best, best_rate = size, found
        size *= 2
    return best


def _fitting(tried: Callable[[int], float | None], best: int, too_many: int, best_rate: float) -> int:
    fits = best
    while too_many - fits > max(1, best // 8):
        middle = (fits + too_many) // 2
        found = tried(middle)
        if found is None:
            too_many = middle
            continue
        fits = middle
        if found >= best_rate * GAIN:
            best, best_rate = middle, found
    return best


def _kind(index: int, one: Equipped, row: pa.Table, pixels: int, device: str, most: int) -> str:
    """All that a throughput depends on, and up to how many rows it was looked at, as a name."""
    stage, weights, _, beside = one
    packages = ("ldm-batch", "torch", "diffusers", "transformers")
    [planned] = row.select(
        ["height", "width", "num_inference_steps", "scheduler", "guidance_scale", "lora"]
    ).to_pylist()
    said = [
        weights.revision,
        beside.identity(),
        stage.bare().model_dump(mode="json"),
        planned if not index else None,
        pixels,
        device,
        stage.num_gpus,
        stage.num_threads,
        os.cpu_count() if device == "cpu" else None,
        [version(name) for name in packages],
        # The last of the sizes that are doubled: few rows must not tell a later job of many what is best.
        most.bit_length(),
    ]
    return digest(said)[:32]


def _kept(kind: str) -> Path:
    return cache_folder().parent / "batch_sizes" / f"{kind}.json"


def _recall(kind: str) -> int | None:
    try:
        size = json.loads(_kept(kind).read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return size if isinstance(size, int) and 0 < size <= MOST_ROWS else None


def _keep(kind: str, size: int) -> None:
    path = _kept(kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": size}), encoding="utf-8")
