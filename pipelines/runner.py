"""Run: do what is left of a plan. The file to read first.

planned shards − committed shards → load the rows (CPU) → the stage's workers → files and part (CPU) → receipts.
"""

from __future__ import annotations

import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ldm_ops.describe import ModelFacts
from pipelines import heartbeat, manifest
from pipelines.adapters import AND, StageAdapters
from pipelines.cluster import TASK_CPUS, Fit, fit, num_cpus, ray_cluster
from pipelines.equipment import encoder_of, plan_adapters, plan_models, signer
from pipelines.errors import (
    EXIT_DEAD_LETTERS,
    EXIT_OK,
    JobError,
    LdmError,
    NotWhole,
    RunAlive,
    RunFailed,
    told_by,
)
from pipelines.image_folder import write_metadata
from pipelines.job import Job
from pipelines.journal import MOST_DEATHS_PER_ROW, forget
from pipelines.loading import LoadShard, image_loader, place
from pipelines.planner import Planned, plan
from pipelines.plans import Plan, job_of, read_plans, read_shard
from pipelines.shards import PLANS, Shard, Shards
from pipelines.sink import ShardWriter
from pipelines.stages import AnyStage
from pipelines.stopping import stop_on_signals
from pipelines.storage import Store
from pipelines.totals import Totals, count, unfinished, write_success
from pipelines.weights import Weights
from pipelines.worker import Place, Worker

if TYPE_CHECKING:
    import ray.data

WAVE, WAVE_PER_CPU = 4096, 64
"""Shards that Ray hears of at a time, at least: each costs it memory, and a millisecond before the first begins. A wave
ends with workers that wait for the last of it, and the next loads the model again: little, at a minute a shard."""

SPARE_DEATHS = 100
"""Workers that may die, beside those that rows kill, before Ray gives a pool up."""

CALLS_PER_WORKER = 2  # the second call waits with its rows at hand while the first computes


@dataclass
class Summary:
    """How a run ended. `num_gone` rows were planned before and are not in the table now.

    `rows_per_s` is over the rows that this run committed and its whole time, loading included.
    """

    run_id: str
    output: str
    exit_code: int
    num_duplicates: int
    num_gone: int
    num_new_rows: int
    duration_s: float
    rows_per_s: float
    first_error: str | None
    totals: Totals


Rows = dict[tuple[str, int], frozenset[str] | None]
"""(plan id, shard) -> keys of rows to make again; None where a shard is to be done as if for the first time."""


WAIT_OR_HELP = "wait for it, or pass --join to help it or --takeover to replace it"
WAIT = "wait until it has ended, then give the same command again"


@dataclass(frozen=True)
class Work:
    """Shards to do of each plan, and what is known of them already. Of those in `redo`, only the rows named there."""

    todo: list[tuple[Plan, Shards]]
    redo: Rows
    models: list[tuple[Weights, ModelFacts]] = field(default_factory=list)
    adapters: list[StageAdapters] = field(default_factory=list)
    num_duplicates: int = 0
    num_gone: int = 0

    @property
    def num_rows(self) -> int:
        """How many rows there are to make."""
        if not self.redo:
            return sum(int(shards.num_rows.sum()) for _, shards in self.todo)
        chosen = ((shard, self.redo[p.plan_id, shard.index]) for p, shards in self.todo for shard in shards)
        return sum(shard.num_rows if keys is None else len(keys) for shard, keys in chosen)


class Done:
    """What this run has committed so far."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.num_left = 0
        self.first_error: str | None = None

    def add(self, receipt: dict[str, Any]) -> None:
        if receipt["outcome"] == "mine":
            self.num_rows += receipt["num_ok"] + receipt["num_failed"] + receipt["num_filtered"]
        self.num_left += receipt["num_left"]
        self.first_error = self.first_error or receipt["first_error"]


class Failed:
    """Counts the rows that fail, and stops a run in which too many do."""

    def __init__(self, max_failed: int | str | None, num_rows: int) -> None:
        self.said = max_failed
        self.limit = max_failed
        if isinstance(max_failed, str):
            self.limit = int(num_rows * float(max_failed.removesuffix("%")) / 100)
        self.num_rows = 0

    def add(self, receipt: dict[str, Any]) -> None:
        """
        Raises:
            RunFailed: these are more than `max_failed`.
        """
        self.num_rows += receipt["num_failed"]
        if isinstance(self.limit, int) and self.num_rows > self.limit:
            raise RunFailed(
                f"{self.num_rows} rows failed, max_failed is {self.said}; the last: {receipt['first_error']}; what is "
                "committed stays; `ldm-batch errors` shows them, `ldm-batch retry` tries them again"
            )


class Listener(Protocol):
    """What a run tells while it goes on; `progress` comes once per committed shard, with that shard's numbers."""

    def planned(self, planned: Planned, plans: list[tuple[Plan, Shards]]) -> None: ...

    def redoing(self, plans: list[tuple[Plan, Shards]], num_rows: int) -> None: ...

    def started(self) -> None: ...

    def progress(self, num_rows: int, num_failed: int, cost: float) -> None: ...

    def stopping(self) -> None: ...


def run(
    job: Job,
    limit: int | None = None,
    extend: bool = False,
    join: bool = False,
    takeover: bool = False,
    address: str | None = None,
    listener: Listener | None = None,
    grace_s: float | None = None,
) -> Summary:
    """Plan, do what is left, count. `grace_s` after Ctrl-C or SIGTERM what is still in flight is abandoned.

    Raises:
        LdmError: any of its kinds; whatever was committed before stays, and the same call does the rest.
    """

    def prepare(store: Store) -> Work:
        planned = plan(job, limit, extend)
        todo = [(p, shards) for p in planned.plans if (shards := unfinished(store, p))]
        # The longest first, so that at the end of a run nobody waits for one of them.
        todo = [(p, shards.take(np.argsort(-shards.cost, kind="stable"))) for p, shards in todo]
        if join:
            # Another run walks the same lists from the front; where both meet, `load_shard` sees what is done.
            todo = [(p, shards.take(np.random.default_rng().permutation(len(shards)))) for p, shards in todo]
        if listener:
            listener.planned(planned, todo)
        return Work(todo, {}, planned.models, planned.adapters, planned.num_duplicates, planned.num_gone)

    return _alone(job, prepare, join, takeover, WAIT_OR_HELP, address, listener, grace_s)


def redo(
    job: Job,
    choose: Callable[[Store, list[Plan]], Rows],
    address: str | None = None,
    listener: Listener | None = None,
    grace_s: float | None = None,
) -> Summary:
    """Make rows again that are in the manifest already, as they were planned, and put new parts in the old one's place.

    A part is replaced in one request, so that a reader finds each row once at any time, in the old state or the new.

    Args:
        job: whose output it is; of it, only where things lie and how much of the cluster to take.
        choose: which rows of which shards of an output.

    Raises:
        LdmError: any of its kinds; each shard is as before or made again, and the same call does the rest.
    """

    # Before anything is written: it may be the wrong place.
    output = Store(job.sink.path, job.sink.storage_options)
    if not any(True for _ in output.names(PLANS)):
        raise NotWhole(f"{output.url} holds no plan of ldm-batch; `ldm-batch run` makes one")

    def prepare(store: Store) -> Work:
        plans = read_plans(store)
        rows = choose(store, plans)
        asked = {p.plan_id: [shard for plan_id, shard in rows if plan_id == p.plan_id] for p in plans}
        todo = [(p, some) for p in plans if (some := p.shards.only(asked[p.plan_id]))]
        if todo:
            store.delete("_SUCCESS")
            store.delete(manifest.METADATA_JSONL)
        work = Work(todo, rows)
        if listener:
            listener.redoing(todo, work.num_rows)
        return work

    return _alone(job, prepare, False, False, WAIT, address, listener, grace_s)


def _alone(
    job: Job,
    prepare: Callable[[Store], Work],
    join: bool,
    takeover: bool,
    way_out: str,
    address: str | None,
    listener: Listener | None,
    grace_s: float | None,
) -> Summary:
    """Do what `prepare` finds, unless another run is at it; `way_out` is what to do then."""
    store = Store(job.sink.path, job.sink.storage_options)
    store.probe()
    run_id = heartbeat.new_run_id()
    with heartbeat.Heartbeat(store, run_id):
        try:
            heartbeat.refuse_if_alive(store, run_id, join, takeover, way_out)
            summary = _run(job, store, run_id, prepare(store), join, address, listener, grace_s)
        except BaseException as error:
            # A store that has just been silent for minutes is given seconds, and what went wrong first is told.
            with suppress(LdmError):
                last = Store(store.url, store.storage_options)
                heartbeat.end(last, run_id, {"error": f"{type(error).__name__}: {error}"[:2000]})
            raise
        finally:
            forget(run_id)
        heartbeat.end(store, run_id, asdict(summary))
    return summary


def _run(
    job: Job,
    store: Store,
    run_id: str,
    work: Work,
    join: bool,
    address: str | None,
    listener: Listener | None,
    grace_s: float | None,
) -> Summary:
    start = time.monotonic()
    done = Done()
    failed = Failed(job.max_failed, work.num_rows)
    code = EXIT_OK
    permit = heartbeat.Permit(store, run_id)
    if work.todo:
        store.write(f"{heartbeat.RUNS}/{run_id}/environment.json", json.dumps(_environment()).encode())
        # Ray first: it takes over SIGTERM when it starts.
        on_stop = listener.stopping if listener else None
        with ray_cluster(address), stop_on_signals(store, run_id, on_stop, grace_s) as stopped:
            refuse_local_sink(store, job.sink.path)
            size = max(WAVE, int(WAVE_PER_CPU * num_cpus()))
            for one, wave in ((p, wave) for p, shards in work.todo for wave in shards.waves(size)):
                # Asked here, or by a run that takes over: its workers would only load the model to do nothing.
                if stopped or permit.is_over:
                    break
                for receipt in _execute(store, permit, job, work, one, wave, join, listener):
                    done.add(receipt)
                    try:
                        failed.add(receipt)
                    except RunFailed:
                        # Ray would go on with what it holds for as long as somebody holds its iterator.
                        heartbeat.ask_to_stop(store, run_id)
                        raise
            code = stopped[0] if stopped else EXIT_OK
        if not stopped and permit.is_over:
            raise RunAlive(f"{store.url}: another run has taken over; it does the rest")
    # Read again: a plan may have been added meanwhile.
    totals = count(store, read_plans(store))
    if code == EXIT_OK and done.num_left:
        raise NotWhole(
            f"{store.url}: {done.num_left} rows could not be made again ({done.first_error}); they stay as they were, "
            "and `ldm-batch verify --deep` says what of them is lost"
        )
    if code == EXIT_OK:
        if job.sink.metadata_jsonl:
            write_metadata(store)
        write_success(store, totals)
        code = EXIT_DEAD_LETTERS if totals.num_failed else EXIT_OK
    duration = time.monotonic() - start
    return Summary(
        run_id=run_id,
        output=store.url,
        exit_code=code,
        num_duplicates=work.num_duplicates,
        num_gone=work.num_gone,
        num_new_rows=done.num_rows,
        duration_s=round(duration, 3),
        rows_per_s=round(done.num_rows / duration, 3) if done.num_rows else 0.0,
        first_error=done.first_error,
        totals=totals,
    )


def _execute(
    store: Store,
    permit: heartbeat.Permit,
    job: Job,
    work: Work,
    plan: Plan,
    todo: Shards,
    join: bool,
    listener: Listener | None,
) -> Iterator[dict[str, Any]]:
    # An output that was extended holds plans of older versions of the job; each is finished as it was begun.
    own = job_of(plan)
    options = job.source.storage_options
    models = plan_models(plan, own, work.models, options)
    adapters = plan_adapters(plan, own, work.adapters, models, options)
    sizes = [weights.num_bytes + beside.num_bytes for (weights, _), beside in zip(models, adapters, strict=True)]
    spread = pool_stages(own, job)
    pools = fit(list(zip(spread, sizes, strict=True)))
    refuse_local_images(store, todo[0])
    stages = []
    for i, (stage, (weights, facts)) in enumerate(zip(spread, models, strict=True)):
        place = Place(
            stage,
            i,
            i == len(spread) - 1,
            image_loader(stage, facts, job.source, adapters[i].size_multiple),
            adapters[i],
        )
        op = stage.bare()
        if not pools[i].num_gpus and op.device == "auto":
            # Ray hides no GPU from a worker that asked for none; it must not take one all the same.
            op = op.model_copy(update={"device": "cpu"})
        pool = replace(pools[i], workers=min(pools[i].workers, len(todo)))
        stages.append((pool, (place, op, weights, permit)))
    first = models[0][0]
    receipts = dataset(
        store,
        todo,
        work.redo,
        stages,
        writer=ShardWriter(
            store,
            plan.plan_id,
            own.sink,
            own.layout,
            permit.run_id,
            first.name,
            first.revision,
            encoder_of(own.stages[-1], *models[-1]),
            signer(job, plan),
        ),
        join=join,
        storage_options=options,
        journal=f"{permit.run_id}-{plan.plan_id}",
    )
    if listener:
        listener.started()
    cost = dict(zip(todo.indices.tolist(), todo.cost.tolist(), strict=True))
    try:
        for batch in receipts.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for receipt in batch.to_pylist():
                yield receipt
                if listener:
                    rows = receipt["num_ok"] + receipt["num_failed"] + receipt["num_filtered"]
                    listener.progress(rows, receipt["num_failed"], cost[receipt["shard"]])
    except Exception as error:
        raise plain_error(error) from error


def refuse_local_sink(store: Store, path: str) -> None:
    """Refuse to scatter an output over the disks of several nodes.

    Raises:
        JobError: `file://` in front says that the folder is shared.
    """
    import ray

    nodes = sum(node["Alive"] for node in ray.nodes())
    if store.local is not None and nodes > 1 and not path.startswith("file://"):
        raise JobError(
            f"sink.path {path} is a folder of one machine, the cluster has {nodes} nodes; use s3://…, or "
            "file:///… for a folder that all of them share"
        )


OF_NOW = ("workers", "num_gpus", "num_cpus", "batch_timeout_s")


def pool_stages(own: Job, job: Job) -> list[AnyStage]:
    """The stages of a plan, with what the job says now of how they are run: that changes nothing of what comes out."""
    if [stage.op for stage in own.stages] != [stage.op for stage in job.stages]:
        return own.stages
    return [
        stage.model_copy(update={name: getattr(now, name) for name in OF_NOW})
        for stage, now in zip(own.stages, job.stages, strict=True)
    ]


def refuse_local_images(store: Store, shard: Shard) -> None:
    """Refuse images of one machine's disk where other nodes would not find them.

    Raises:
        JobError: `file://` in front says that the folder is shared.
    """
    import ray

    if sum(node["Alive"] for node in ray.nodes()) < 2:
        return
    rows = read_shard(store, shard.file, shard.index)
    for name in ("image", "mask_image", "control_image", "latents", "lora"):
        said = (value for value in rows[name].to_pylist() if value is not None)
        places = (place for value in said for place in (value.split(AND) if name == "lora" else [value]))
        where = next((place for place in places if place.startswith("/")), None)
        if where is not None:
            raise JobError(
                f"{name} {where} is a file of one machine, the cluster has several nodes; put the files on s3://… and "
                "the like, or name them file:///… where all nodes share the folder"
            )


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
    with warnings.catch_warnings():
        # Ray Data's defaults start what dies again for ever; finite limits have no named parameter yet (Ray 2.60).
        warnings.simplefilter("ignore")
        shards = places.map_batches(load, **task)
        for pool, arguments in stages:
            at: Place = arguments[0]
            # A class of its own per stage, or Ray's dashboard calls all of them by the same name.
            worker_class = type(f"{at.stage.op.title()}{at.index or ''}", (Worker,), {})
            shards = shards.map_batches(
                worker_class,
                **shape,
                fn_constructor_args=(*arguments, journal),
                # No more shards on a worker than it computes and holds ready, or the last ones wait for the busiest.
                compute=ray.data.ActorPoolStrategy(
                    size=pool.workers,
                    max_tasks_in_flight_per_actor=CALLS_PER_WORKER,
                    max_concurrent_calls_per_actor=CALLS_PER_WORKER,
                ),
                num_cpus=pool.num_cpus,
                num_gpus=pool.num_gpus,
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


def _environment() -> dict[str, Any]:
    from importlib.metadata import version

    packages = ("ldm-batch", "ray", "torch", "diffusers", "transformers", "pyarrow", "pillow", "numpy")
    return {"python": platform.python_version(), "platform": platform.platform(), **{p: version(p) for p in packages}}
