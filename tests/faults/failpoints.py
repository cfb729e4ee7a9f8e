"""Every step of a shard's way into the output as a place to die at.

A scenario is what a run does with a store, without Ray and a model: plan, load, commit, count. It is done once
undisturbed, in a process of its own that notes each step; then again as often as it has steps, each time by a process
that kills itself (SIGKILL) at the next of them, and once more by one that does the rest. So a step that is new
in the product is a place to die at, too.

Steps are, of every request to the store, the moment before it and the moment after the store has applied it (a lost
reply); on a disk also the moments before each folder, file, fsync, link, rename and removal below the output.

`python -m tests.faults.failpoints OUT MODEL [SCENARIO …]` prints a line of JSON per scenario; OUT is a folder, or s3://…
with AWS_ENDPOINT_URL.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any

import yaml

from pipelines import storage
from pipelines.blocks import KEPT, RESULT_FIELDS, pack
from pipelines.dead_letters import Retry
from pipelines.job import Job, parse_job
from pipelines.loading import LoadShard, place
from pipelines.planner import plan
from pipelines.plans import read_plans
from pipelines.sink import ShardWriter
from pipelines.storage import Exists, Store
from pipelines.totals import count, unfinished, write_success
from pipelines.verify import damage
from tests.faults.outside import Options, Seen, examine, look, objects, put
from tests.ldm_ops.rows import picture

REQUESTS = ("read", "info", "list", "write", "create", "delete")
ROWS = 4
HANGS_S = 60


class Hung(Exception):
    """A child that has not ended within HANGS_S."""


@dataclass
class Found:
    """A scenario's failpoints, by name; `faults` says of those that were not recovered from what was wrong."""

    scenario: str
    store: str
    num_failpoints: int = 0
    num_fired: int = 0
    num_recovered: int = 0
    num_torn_before: int = 0
    names: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------- what is done


def make_job(out: str, model: str, options: Options | None) -> Job:
    return parse_job(
        yaml.safe_dump(
            {
                "source": {"rows": [f"a circle {i}" for i in range(ROWS)]},
                "stages": [{"op": "txt2img", "model": model, "num_inference_steps": 2, "batch_size": 2}],
                "sink": {"path": out, "storage_options": options or {}, "thumbnails": 16},
                "batches_per_shard": 1,
            }
        )
    )


def commit_all(job: Job, rows: dict[tuple[str, int], frozenset[str] | None] | None, fails: str | None = None) -> None:
    """Load, draw and commit the shards that have no part, or `rows` again; then count. As a run does it."""
    store = Store(job.sink.path, job.sink.storage_options)
    load = LoadShard(store, None, "", {})
    for one in read_plans(store):
        writer = ShardWriter(store, one.plan_id, job.sink, job.layout, "run", "m", "r")
        shards = unfinished(store, one) if rows is None else [s for s in one.shards if (one.plan_id, s.index) in rows]
        for shard in shards:
            at = place(shard, None if rows is None else rows[one.plan_id, shard.index])
            writer(_drawn(load(at), fails))
    write_success(store, count(store, read_plans(store)))


def _drawn(shard: Any, fails: str | None) -> Any:
    """A shard's rows with pictures that follow from their prompts, as a model's would."""
    import pyarrow as pa

    results = []
    for row in shard.to_pylist():
        result = {field.name: row[field.name] for field in RESULT_FIELDS}
        if row["status"] != KEPT:
            made = {"status": "ok", "pixels": pack(picture(32, 32, seed=int(row["prompt"].split()[-1])))}
            if fails is not None and fails in row["prompt"]:
                made = {"status": "failed", "stage": "txt2img", "error_type": "x", "error_message": "y"}
            result |= made
        results.append(result)
    columns = {name: shard[name] for name in shard.column_names}
    for one in RESULT_FIELDS:
        columns[one.name] = pa.array([result[one.name] for result in results], one.type)
    return pa.table(columns)


def run(job: Job) -> None:
    plan(job)
    commit_all(job, None)


def redo(job: Job, choose: Callable[..., Any]) -> None:
    store = Store(job.sink.path, job.sink.storage_options)
    rows = choose(store, read_plans(store))
    if rows:
        store.delete("_SUCCESS")
    commit_all(job, rows)


def create_and_lose_the_reply() -> None:
    """The part lands, and nobody hears of it: what follows is the read-back."""
    create = Store.create

    def lost(self: Store, path: str, data: bytes) -> None:
        create(self, path, data)
        if path.startswith("manifest/"):
            raise OSError("no answer")

    Store.create = lost  # type: ignore[method-assign]


def another_is_first() -> None:
    """A part of another attempt, with other bytes of its own, stands there when ours comes."""
    create = Store.create

    def late(self: Store, path: str, data: bytes) -> None:
        if not path.startswith("manifest/") or self.read(path) is not None:
            return create(self, path, data)
        _as_another(self, path, data)
        raise Exists(path)

    Store.create = late  # type: ignore[method-assign]


def _as_another(store: Store, path: str, data: bytes) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines import manifest

    table = pq.read_table(pa.BufferReader(data))
    head = manifest.read_head(data)
    assert head is not None
    from dataclasses import replace

    store.write(path, manifest.part_bytes(table, replace(head, attempt="another")))


def lose_a_picture(contents: dict[str, bytes]) -> None:
    del contents[min(name for name in contents if name.startswith("images/"))]


def cut_a_part(contents: dict[str, bytes]) -> None:
    name = max(name for name in contents if name.startswith("manifest/"))
    contents[name] = contents[name][:-9]


@dataclass(frozen=True)
class Scenario:
    """`before` is run undisturbed, `change` made to what it left, `action` dies, and then does the rest."""

    action: Callable[[Job], None]
    before: Callable[[Job], None] | None = None
    change: Callable[[dict[str, bytes]], None] = lambda contents: None
    weather: Callable[[], None] = lambda: None
    damaged: bool = False


def _planned(job: Job) -> None:
    plan(job)


def _with_failures(job: Job) -> None:
    plan(job)
    commit_all(job, None, fails="circle 1")


SCENARIOS = {
    "run": Scenario(run),
    "run, reply of the commit lost": Scenario(run, before=_planned, weather=create_and_lose_the_reply),
    "run, another attempt was first": Scenario(run, before=_planned, weather=another_is_first),
    "retry": Scenario(lambda job: redo(job, Retry()), before=_with_failures),
    "repair of a missing picture": Scenario(
        lambda job: redo(job, lambda store, plans: damage(store)), before=run, change=lose_a_picture, damaged=True
    ),
    "repair of a cut part": Scenario(
        lambda job: redo(job, lambda store, plans: damage(store)), before=run, change=cut_a_part, damaged=True
    ),
}


# ------------------------------------------------------------------------------------------------------ where it dies


class Steps:
    """Counts steps, and ends this process at the one that it is told."""

    def __init__(self, root: str, die_at: int | None, told: int) -> None:
        self.root, self.die_at, self.told = root, die_at, told
        self.num = 0
        self.lock = Lock()

    def step(self, name: str) -> None:
        with self.lock:
            self.num += 1
            if self.die_at is None or self.num == self.die_at:
                os.write(self.told, f"{name}\n".encode())
            if self.num == self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def kind(self, path: str) -> str:
        """What a path is, without the digits that differ from row to row."""
        folder, _, name = path.rpartition("/")
        words = ("images", "thumbnails", "manifest", "rows", "plans", "_SUCCESS", "_ldm")
        return next((word for word in words if word in name or word in folder), "beside _SUCCESS")

    def at_requests(self) -> None:
        for name in REQUESTS:
            self._wrap(name, getattr(Store, name))

    def _wrap(self, name: str, request: Callable[..., Any]) -> None:
        def wrapped(store: Store, path: str, *rest: Any, **more: Any) -> Any:
            self.step(f"before {name} {self.kind(path)}")
            answer = request(store, path, *rest, **more)
            self.step(f"after {name} {self.kind(path)}, reply lost")
            return answer

        setattr(Store, name, wrapped)

    def on_disk(self) -> None:
        fsync = os.fsync

        def before_fsync(descriptor: int) -> None:
            at = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            self.step(f"before fsync {self.kind(at[len(self.root) + 1 :])}")
            fsync(descriptor)
            self.step(f"after fsync {self.kind(at[len(self.root) + 1 :])}")

        os.fsync = before_fsync

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in ("open", "os.mkdir", "os.link", "os.rename", "os.remove"):
                return
            if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & os.O_CREAT):
                return
            path = os.fspath(arguments[0]) if isinstance(arguments[0], (str, os.PathLike)) else ""
            if path.startswith(self.root):
                target = os.fspath(arguments[1]) if event in ("os.link", "os.rename") else path
                self.step(f"before {event.removeprefix('os.')} {self.kind(target[len(self.root) + 1 :])}")

        sys.addaudithook(hook)


def in_a_process(
    action: Callable[[], None], root: str, die_at: int | None, weather: Callable[[], None]
) -> tuple[int, list[str]]:
    """Do `action` in a child; the signal that ended it (0: none), and the steps that it told."""
    reader, told = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            # A lock that another thread held at the fork is held for ever; then it says where it stands, and ends.
            faulthandler.register(signal.SIGALRM, chain=True)
            signal.alarm(HANGS_S)
            # One request at a time, so that the steps have an order.
            storage.IN_FLIGHT = 1
            steps = Steps(root, die_at, told)
            # Requests of the weather are steps, too.
            steps.at_requests()
            weather()
            if not root.startswith("s3://"):
                steps.on_disk()
            action()
            code = 0
        except BaseException:  # noqa: BLE001 - whatever it was, the parent has to hear of it
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(told)
    with os.fdopen(reader) as lines:
        names = lines.read().splitlines()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        raise Hung(root)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"{root}: the scenario failed by itself, after {names[-1:]}")
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), names


def rehearse(name: str, out: str, model: str, options: Options | None = None, every: int = 1, first: int = 0) -> Found:
    """Die at every step of a scenario (or at each `every`-th from `first`), and hold what comes of it against an output
    that nobody disturbed."""
    scenario = SCENARIOS[name]
    found = Found(name, "s3" if options else "disk")
    num_outs = 0

    def fresh() -> str:
        nonlocal num_outs
        num_outs += 1
        return f"{out}/{num_outs:04d}"

    def do(
        action: Callable[[Job], None], at: str, die_at: int | None = None, weather: bool = False
    ) -> tuple[int, list[str]]:
        job = make_job(at, model, options)
        return in_a_process(lambda: action(job), at, die_at, scenario.weather if weather else lambda: None)

    wanted_at = fresh()
    do(run, wanted_at)
    wanted = look(wanted_at, options)
    base: dict[str, bytes] = {}
    if scenario.before is not None:
        base_at = fresh()
        do(scenario.before, base_at)
        base = objects(base_at, options)
        scenario.change(base)
    counted_at = fresh()
    put(counted_at, base, options)
    _, steps = do(scenario.action, counted_at, weather=True)
    assert not look(counted_at, options).differences(wanted), "the scenario is wrong without any death"
    found.num_failpoints = len(steps)

    def dies(number: int, again: bool = True) -> tuple[str, int, list[str]]:
        at = fresh()
        put(at, base, options)
        try:
            return at, *do(scenario.action, at, die_at=number, weather=True)
        except Hung:
            if not again:
                raise
            return dies(number, again=False)

    for number in range(1 + first % every, len(steps) + 1, every):
        at, ended_by, told = dies(number)
        where = f"{name}, {found.store}, step {number} of {len(steps)}, {told[-1] if told else 'never reached'}"
        if ended_by != signal.SIGKILL:
            found.faults.append(f"{where}: nobody died")
            continue
        found.num_fired += 1
        found.names[told[-1]] = found.names.get(told[-1], 0) + 1
        faults = _early(at, options, scenario)
        do(scenario.action, at)
        faults += look(at, options).differences(wanted)
        found.num_recovered += not faults
        found.faults += [f"{where}: {fault}" for fault in faults]
    return found


def _early(at: str, options: Options | None, scenario: Scenario) -> list[str]:
    """What a reader finds wrong right after the death; what is not there yet is not lost."""
    if scenario.damaged:
        return []
    contents = objects(at, options)
    seen: Seen = examine(contents)
    return [f"right after it {fault}" for fault in seen.faults] + (
        ["right after it there is a _SUCCESS, and rows are missing"] if seen.finished and seen.lost else []
    )


@contextmanager
def _quiet() -> Iterator[None]:
    import logging

    logging.disable(logging.WARNING)
    yield


def _import_everything(model: str) -> None:
    """Once here, or every child does it anew."""
    # The run and the repair below are on a disk, and need it not.
    import_module("s3fs")
    with tempfile.TemporaryDirectory() as folder:
        run(make_job(folder, model, None))
        redo(make_job(folder, model, None), lambda store, plans: damage(store))


def main() -> None:
    out, model, *names = sys.argv[1:]
    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]} if out.startswith("s3://") else None
    every, first = (int(os.environ.get(name, default)) for name, default in (("EVERY", "1"), ("FIRST", "0")))
    with _quiet():
        _import_everything(model)
        for name in names or SCENARIOS:
            folder = f"{out}/{name.replace(',', '').replace(' ', '-')}"
            if not out.startswith("s3://"):
                Path(folder).mkdir(parents=True)
            print(json.dumps(asdict(rehearse(name, folder, model, options, every, first))), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
    # All is said. Threads of Arrow's and of the S3 client's may abort a process that ends while they do (seen once).
    sys.stdout.flush()
    os._exit(0)
