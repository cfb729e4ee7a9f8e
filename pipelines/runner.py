"""Run: do what is left of a plan. The file to read first.

planned shards − committed shards → load the rows (CPU) → the stage's workers → files and part (CPU) → receipts.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from ldm_ops.describe import ModelFacts
from pipelines import heartbeat, manifest, metrics
from pipelines.adapters import StageAdapters
from pipelines.cluster import knock, num_cpus, ray_cluster
from pipelines.dataset import Rows, dataset, plain_error
from pipelines.equipment import encoder_of, plan_adapters, plan_models, signer
from pipelines.errors import (
    EXIT_DEAD_LETTERS,
    EXIT_OK,
    LdmError,
    NotWhole,
    RunAlive,
    RunFailed,
)
from pipelines.fitting import fit
from pipelines.image_folder import write_metadata
from pipelines.job import Job
from pipelines.journal import forget
from pipelines.loading import image_loader
from pipelines.measuring import measured
from pipelines.nodes import refuse_local_images, refuse_local_sink
from pipelines.planner import Planned, plan
from pipelines.plans import Plan, job_of, read_plans
from pipelines.shards import PLANS, Shards
from pipelines.sink import ShardWriter
from pipelines.slices import Slice
from pipelines.stages import AnyStage
from pipelines.stopping import stop_on_signals
from pipelines.storage import Store
from pipelines.totals import Totals, count, refuse_unfinished, unfinished, write_success
from pipelines.version import version
from pipelines.weights import Weights
from pipelines.worker import Place

WAVE, WAVE_PER_CPU = 4096, 64
"""Shards that Ray hears of at a time, at least: each costs it memory, and a millisecond before the first begins. A wave
ends with workers that wait for the last of it, and the next loads the model again: little, at a minute a shard."""


@dataclass
class Summary:
    """How a run ended. `num_gone` rows were planned before and are not in the table now.

    `rows_per_s` is over the rows that this run committed and its whole time, loading included. With a `slice` the
    totals are of its own shards, as other slices are not done yet.
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
    slice: str | None = None


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
        self.num_shards = 0
        self.num_rows = 0
        self.num_left = 0
        self.first_error: str | None = None

    def add(self, receipt: dict[str, Any]) -> None:
        if receipt["outcome"] == "mine":
            self.num_shards += 1
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

    def measured(self, text: str) -> None: ...

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
    part: Slice | None = None,
) -> Summary:
    """Plan, do what is left, count. `grace_s` after Ctrl-C or SIGTERM what is still in flight is abandoned.

    With `part` only the shards of that slice are done; the run that finds all of them there marks the output as whole.

    Raises:
        LdmError: any of its kinds; whatever was committed before stays, and the same call does the rest.
    """

    def prepare(store: Store) -> Work:
        say = listener.measured if listener else _unheard
        planned = plan(job, limit, extend, partial(measured, address=address, say=say))
        todo = [(p, shards) for p in planned.plans if (shards := _left(store, p, part))]
        # The longest first, so that at the end of a run nobody waits for one of them.
        todo = [(p, shards.take(np.argsort(-shards.cost, kind="stable"))) for p, shards in todo]
        if join:
            # Another run walks the same lists from the front; where both meet, `load_shard` sees what is done.
            todo = [(p, shards.take(np.random.default_rng().permutation(len(shards)))) for p, shards in todo]
        if listener:
            listener.planned(planned, todo)
        return Work(todo, {}, planned.models, planned.adapters, planned.num_duplicates, planned.num_gone)

    return _alone(job, prepare, join, takeover, WAIT_OR_HELP, address, listener, grace_s, part)


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
    part: Slice | None = None,
) -> Summary:
    """Do what `prepare` finds, unless another run is at it; `way_out` is what to do then."""
    knock(address)
    store = Store(job.sink.path, job.sink.storage_options)
    store.probe()
    run_id = heartbeat.new_run_id()
    with heartbeat.Heartbeat(store, run_id, part):
        try:
            heartbeat.refuse_if_alive(store, run_id, join, takeover, way_out, part)
            summary = _run(job, store, run_id, prepare(store), join, address, listener, grace_s, part)
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
    part: Slice | None,
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
                    metrics.record("ldm_shards_done", done.num_shards, ldm_job=job.name)
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
    plans = read_plans(store)
    # Only the last of several slices reads what all of them made.
    alone = part is not None and any(unfinished(store, p) for p in plans)
    totals = count(store, plans, part if alone else None)
    if code == EXIT_OK and done.num_left:
        raise NotWhole(
            f"{store.url}: {done.num_left} rows could not be made again ({done.first_error}); they stay as they were, "
            "and `ldm-batch verify --deep` says what of them is lost"
        )
    if code == EXIT_OK and alone:
        refuse_unfinished(store, totals)
        code = EXIT_DEAD_LETTERS if totals.num_failed else EXIT_OK
    elif code == EXIT_OK:
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
        slice=str(part) if alone else None,
    )


def _left(store: Store, plan: Plan, part: Slice | None) -> Shards:
    left = unfinished(store, plan)
    return left if part is None else part.take(left)


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
    num_done = 0
    metrics.record("ldm_queue_depth", len(todo), ldm_job=own.name)
    try:
        for batch in receipts.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for receipt in batch.to_pylist():
                yield receipt
                num_done += 1
                metrics.record("ldm_queue_depth", len(todo) - num_done, ldm_job=own.name)
                if listener:
                    rows = receipt["num_ok"] + receipt["num_failed"] + receipt["num_filtered"]
                    listener.progress(rows, receipt["num_failed"], cost[receipt["shard"]])
    except Exception as error:
        raise plain_error(error) from error


def _unheard(text: str) -> None:
    """What nobody listens to."""


OF_NOW = ("workers", "num_gpus", "num_cpus", "accelerator_type", "labels", "batch_timeout_s")


def pool_stages(own: Job, job: Job) -> list[AnyStage]:
    """The stages of a plan, with what the job says now of how they are run: that changes nothing of what comes out."""
    if [stage.op for stage in own.stages] != [stage.op for stage in job.stages]:
        return own.stages
    return [
        stage.model_copy(update={name: getattr(now, name) for name in OF_NOW})
        for stage, now in zip(own.stages, job.stages, strict=True)
    ]


def _environment() -> dict[str, Any]:
    packages = ("ldm-batch", "ray", "torch", "diffusers", "transformers", "pyarrow", "pillow", "numpy")
    return {"python": platform.python_version(), "platform": platform.platform(), **{p: version(p) for p in packages}}
