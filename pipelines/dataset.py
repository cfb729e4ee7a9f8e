"""Shards as Ray Data moves them: load, the stages' workers, the sink; and what its errors mean."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from pipelines.errors import LdmError, RunFailed, told_by
from pipelines.fitting import TASK_CPUS, Fit
from pipelines.journal import MOST_DEATHS_PER_ROW
from pipelines.loading import LoadShard, place
from pipelines.shards import Shards
from pipelines.sink import ShardWriter
from pipelines.stages import reads
from pipelines.storage import Store
from pipelines.weights import Weights
from pipelines.worker import Place, Worker

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

SPARE_DEATHS = 100
"""Workers that may die, beside those that rows kill, before Ray gives a pool up."""

CALLS_PER_WORKER = 3  # one computes, one packs what it made, and one waits with its rows at hand

Rows = dict[tuple[str, int], frozenset[str] | None]
"""(plan id, shard) -> keys of rows to make again; None where a shard is to be done as if for the first time."""


BROUGHT = frozenset({"image", "control_image", "latents"})
"""What a stage may read that is not in a plan's rows."""


class Reader(Worker):
    """A worker that is given the place of a shard, and reads its rows itself."""

    def __init__(self, *arguments: Any, load: LoadShard) -> None:
        super().__init__(*arguments)
        self.load = load

    def __call__(self, shard: pa.Table) -> pa.Table:
        return super().__call__(self.load(shard))


def dataset(
    store: Store,
    todo: Shards,
    redo: Rows,
    stages: list[tuple[Fit, tuple[Any, ...]]],
    writer: ShardWriter,
    join: bool,
    storage_options: dict[str, Any],
    journal: str,
) -> ray.data.Dataset:
    """The whole pipeline, lazily; one shard is one block from end to end. `join` skips shards that are done by now."""
    import ray.data

    # In memory: Ray's own range would add read tasks of one whole CPU each, for which a small machine has no room.
    # `from_arrow` would start a task for each.
    places = ray.data.from_blocks([place(shard, redo.get((shard.plan_id, shard.index)), join) for shard in todo])
    first: Place = stages[0][1][0]
    first_weights: Weights = stages[0][1][2]
    # Finite, and more than it takes: each death either names rows in the journal, or is one of few that may not.
    deaths = SPARE_DEATHS + MOST_DEATHS_PER_ROW * int(todo.num_rows.sum())
    load = LoadShard(store, first.loader, first_weights.revision, storage_options, journal)
    shape: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    task = {**shape, "num_cpus": TASK_CPUS, "max_retries": deaths}
    # What brings nothing along is read by its worker, while that computes the shard before: an operator costs a driver
    # 5 ms a shard, and each of its processes seconds of imports.
    brings = not BROUGHT.isdisjoint(reads(first.stage))
    with warnings.catch_warnings():
        # Ray Data's defaults start what dies again for ever; finite limits have no named parameter yet (Ray 2.60).
        warnings.simplefilter("ignore")
        shards = places.map_batches(load, **task) if brings else places
        for pool, arguments in stages:
            at: Place = arguments[0]
            # A class of its own per stage, or Ray's dashboard calls all of them by the same name.
            own = {} if brings or at.index else {"load": load}
            worker_class = type(f"{at.stage.op.title()}{at.index or ''}", (Reader if own else Worker,), {})
            # The public method refuses whole blocks together with GPUs (Ray 2.60); this is what it calls itself.
            shards = shards.map_batches_internal(
                worker_class,
                **shape,
                fn_constructor_args=(*arguments, journal),
                fn_constructor_kwargs=own,
                # No more shards on a worker than it computes and holds ready, or the last ones wait for the busiest.
                compute=ray.data.ActorPoolStrategy(
                    size=pool.workers,
                    max_tasks_in_flight_per_actor=CALLS_PER_WORKER,
                    max_concurrent_calls_per_actor=CALLS_PER_WORKER,
                    # Ray's own lock would be around the whole call, and the device wait while results are packed.
                    enable_true_multi_threading=True,
                ),
                num_cpus=pool.num_cpus,
                num_gpus=pool.num_gpus,
                label_selector=dict(pool.labels) or None,
                max_restarts=deaths,
                max_task_retries=deaths,
            )
        return shards.map_batches(writer, **task)


def plain_error(error: BaseException) -> LdmError:
    """The one of ours inside what Ray raised, else RunFailed with the innermost message."""
    seen: list[BaseException] = []
    here: BaseException | None = error
    while here is not None and here not in seen:
        seen.append(here)
        if isinstance(here, LdmError):
            return here
        here = getattr(here, "cause", None) or here.__cause__ or here.__context__
    # Of a worker that died while it started only the text of its traceback is left.
    for one in seen:
        if (ours := told_by(str(one))) is not None:
            return ours
    # Ray Data hangs a wordless exception of its own behind the one that tells.
    inner = next((error for error in reversed(seen) if str(error).strip()), seen[-1])
    first, chained, _ = str(error).partition("The above exception was the direct cause")
    lines = [line for line in (first if chained else str(inner)).strip().splitlines() if line.strip()]
    what = lines[-1] if lines else str(inner)
    kind = "" if chained else f"{type(inner).__name__}: "
    return RunFailed(f"{kind}{what}; what is committed stays, run the same command again")
