"""A deterministic simulation of one output: the real plan log, commit, resume, count and gc over a store in memory.

A schedule is a seed. From it come who starts when, who runs next (one actor at a time, handed over at every request)
and what goes wrong. Actors are greenlets, so that they run the very code that production runs, unchanged. Time is
virtual. After every change of the store an outside reader, pyarrow and hashlib alone, looks at all of it.

`python -m tests.faults.simulation SEED [PROTOCOL]` replays one schedule, request by request.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from greenlet import getcurrent, greenlet

from pipelines import manifest
from pipelines.commit import commit_shard, content_name
from pipelines.errors import NotWhole, StorageError
from pipelines.gc import collect
from pipelines.heartbeat import present_s
from pipelines.plans import Plan, add_plan, read_plans
from pipelines.shards import Shard, Shards
from pipelines.storage import Exists, Info
from pipelines.totals import count, unfinished, write_success

HOUR = 3600.0
OLD = 24 * HOUR
ROWS_PER_SHARD = 2
TABLES = (4, 6)
"""Rows of the table, first and after it has grown."""


class Killed(BaseException):
    """`kill -9`: no request of this actor goes out any more, not even from a `finally`."""


class Violation(Exception):
    """What no reader may ever see."""


@dataclass(frozen=True)
class Weather:
    """How a schedule goes wrong: probabilities per request, times in virtual seconds."""

    atomic: bool = True
    lost: float = 0.05
    conflict: float = 0.03
    late: float = 0.03
    max_late_s: float = 72 * HOUR
    killed: float = 0.02
    asleep: float = 0.01
    max_asleep_s: float = 72 * HOUR
    outcomes: int | None = 1
    """How many results a row may have: 1 where it always gives the same bytes; None where each attempt has its own."""
    grows: bool = True
    """Whether drivers may come with different tables."""
    redoes: bool = False
    """Whether rows are made again and parts replaced, as `retry` and `repair` do."""


def forecast(seed: int) -> Weather:
    rng = random.Random(f"weather {seed}")
    atomic = rng.random() < 0.6
    redoes = rng.random() < 0.4
    # Where parts may be replaced, gc asks that nobody is as late as its age rule. On a store that checks first and puts
    # later that is always so, and two different tables planned in the same instant are not told apart.
    longest = 72 * HOUR if atomic and not redoes else 3 * HOUR
    return Weather(
        atomic=atomic,
        lost=rng.choice([0.0, 0.05, 0.2, 0.4]),
        conflict=rng.choice([0.0, 0.05]),
        late=rng.choice([0.0, 0.03, 0.1]),
        max_late_s=longest,
        killed=rng.choice([0.0, 0.005, 0.02]),
        asleep=rng.choice([0.0, 0.02, 0.05]),
        max_asleep_s=longest,
        outcomes=rng.choice([1, 1, 2, None]),
        grows=atomic,
        redoes=redoes,
    )


@dataclass
class Actor:
    name: str
    body: Callable[[Actor], None]
    wakes_s: float = 0.0
    waits: Callable[[], bool] | None = None
    dead: bool = False
    immortal: bool = False
    thread: greenlet = field(init=False)


class World:
    """The store's objects, the clock, and who lives."""

    def __init__(self, seed: int, weather: Weather, trace: Callable[[str], None] | None) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.weather = weather
        self.clock = 0.0
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.in_flight: list[tuple[float, Callable[[], None]]] = []
        self.actors: list[Actor] = []
        self.num_attempts = 0
        self.fired: dict[str, int] = {}
        self.trace = trace

    def did(self, what: str) -> None:
        self.fired[what] = self.fired.get(what, 0) + 1

    def say(self, *words: object) -> None:
        if self.trace:
            self.trace(f"{self.clock / HOUR:7.2f} h  " + " ".join(map(str, words)))

    def start(self, name: str, body: Callable[[Actor], None], at_s: float | None = None) -> Actor:
        actor = Actor(name, body, self.clock if at_s is None else at_s)
        actor.thread = greenlet(self._live)
        self.actors.append(actor)
        return actor

    def _live(self, actor: Actor) -> None:
        try:
            actor.body(actor)
        except Killed:
            pass
        except (StorageError, NotWhole) as error:
            self.say(actor.name, "ends with", type(error).__name__, error)
        self.say(actor.name, "is over")

    def kill(self, actor: Actor) -> None:
        actor.dead = True
        if actor in self.actors:
            self.actors.remove(actor)
            self.did("killed")
            self.say(actor.name, "is killed")

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Let actors run, and late requests land, until all are over."""
        while self.actors and not (until and until()):
            ready = [a for a in self.actors if a.wakes_s <= self.clock and not (a.waits and a.waits())]
            if not ready:
                # Nobody is awake: the night passes.
                times = [a.wakes_s for a in self.actors if a.wakes_s > self.clock]
                times += [at for at, _ in self.in_flight]
                if not times:
                    raise Violation("every actor waits for another")
                self.clock = max(self.clock, min(times))
                self.land()
                continue
            self.clock += self.rng.random() * 60
            self.land()
            actor = ready[int(self.rng.random() * len(ready))]
            if actor.dead:
                continue
            actor.thread.parent = getcurrent()
            actor.thread.switch(actor)
            if actor.thread.dead and actor in self.actors:
                self.actors.remove(actor)

    def land(self, everything: bool = False) -> None:
        """Late requests reach the store."""
        if self.in_flight:
            landing = [one for one in self.in_flight if everything or one[0] <= self.clock]
            for one in sorted(landing, key=lambda one: one[0]):
                self.in_flight.remove(one)
                self.did("late")
                one[1]()

    def put(self, path: str, data: bytes) -> None:
        self.objects[path] = (data, self.clock)
        check(self.objects)

    def remove(self, path: str) -> None:
        if self.objects.pop(path, None) is not None:
            check(self.objects)


class SimulatedStore:
    """What one actor sees of the store: an `ObjectStore` whose every request may go wrong."""

    url = "sim://out"

    def __init__(self, world: World, actor: Actor) -> None:
        self.world, self.actor = world, actor

    def uri(self, path: str) -> str:
        return f"{self.url}/{path}"

    def pause(self, _: float = 0.0) -> None:
        """Hand over; perhaps to be killed, or to wake up days later."""
        world, actor = self.world, self.actor
        if actor.dead:
            raise Killed
        luck = world.rng.random()
        if luck < world.weather.killed and not actor.immortal:
            world.kill(actor)
        elif luck > 1 - world.weather.asleep and not actor.immortal:
            world.did("asleep")
            actor.wakes_s = world.clock + world.rng.random() * world.weather.max_asleep_s
        actor.thread.parent.switch()
        if actor.dead:
            raise Killed

    def wait(self, condition: Callable[[], bool]) -> None:
        """Hand over for as long as the condition holds."""
        self.actor.waits = condition
        self.pause()
        self.actor.waits = None

    def _request(self, what: str, path: str, action: Callable[[], None]) -> bool:
        """One try; True where the answer came back. It may have landed, or land later, without one."""
        self.pause()
        world, luck = self.world, self.world.rng.random()
        if luck < world.weather.lost:
            world.did("lost")
            landed = world.rng.random() < 0.5
            world.say(self.actor.name, what, path, "→ reply lost,", "landed" if landed else "not landed")
            if landed:
                action()
            return False
        if luck < world.weather.lost + world.weather.late:
            at_s = world.clock + world.rng.random() * world.weather.max_late_s
            world.say(self.actor.name, what, path, f"→ no answer, will land at {at_s / HOUR:.2f} h")
            world.in_flight.append((at_s, action))
            return False
        world.say(self.actor.name, what, path)
        action()
        return True

    def _patiently(self, what: str, path: str, action: Callable[[], None]) -> None:
        for _ in range(5):
            if self._request(what, path, action):
                return
        raise StorageError(f"{path}: no answer")

    def read(self, path: str) -> bytes | None:
        self.pause()
        found = self.world.objects.get(path)
        return found[0] if found else None

    def info(self, path: str) -> Info | None:
        self.pause()
        found = self.world.objects.get(path)
        return Info(len(found[0]), found[1]) if found else None

    def list(self, prefix: str) -> dict[str, Info]:
        self.pause()
        return {
            path: Info(len(data), at_s)
            for path, (data, at_s) in self.world.objects.items()
            if path.startswith(f"{prefix}/")
        }

    def names(self, prefix: str) -> list[str]:
        return [*self.list(prefix)]

    def write(self, path: str, data: bytes) -> None:
        self._patiently("write", path, lambda: self.world.put(path, data))

    def delete(self, path: str) -> None:
        self._patiently("delete", path, lambda: self.world.remove(path))

    def create(self, path: str, data: bytes) -> None:
        world = self.world
        if world.rng.random() < world.weather.conflict:
            self.pause()
            world.did("conflict")
            raise Exists(path)  # 409, which clients tell as "exists", though nothing does
        there: list[bool] = []

        def land() -> None:
            if not world.weather.atomic:
                if path in world.objects:
                    world.did("replaced")
                world.put(path, data)
                return
            there.append(path in world.objects)
            if not there[-1]:
                world.put(path, data)

        if not world.weather.atomic:
            self.pause()
            if path in world.objects:
                raise Exists(path)
        if not self._request("create", path, land):
            # The client's own second try meets what its first one left.
            if path in world.objects and world.rng.random() < 0.5:
                raise Exists(path)
            raise OSError("no answer")
        if there and there[-1]:
            raise Exists(path)

    def write_each(self, files: Iterable[tuple[str, bytes]]) -> None:
        self.each(lambda file: self.write(*file), files)

    def each(self, action: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        todo = list(enumerate(items))
        self.world.rng.shuffle(todo)
        done = {i: action(item) for i, item in todo}
        return [done[i] for i in sorted(done)]


# ---------------------------------------------------------------- the outside reader: no code of ours below this line


@lru_cache(None)
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@lru_cache(None)
def rows(part: bytes) -> list[tuple[str, str, str, int]]:
    table = pq.read_table(io.BytesIO(part), columns=["key", "uri", "sha256", "num_bytes"])
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def check(objects: dict[str, tuple[bytes, float]]) -> set[str]:
    """The keys that the parts hold; each once, each with its file whole.

    Raises:
        Violation: something is twice, missing or torn.
    """
    keys: set[str] = set()
    for path, (data, _) in objects.items():
        if path.startswith("manifest/") and path.endswith(".parquet"):
            for key, uri, digest, num_bytes in rows(data):
                if key in keys:
                    raise Violation(f"row {key} stands twice in the manifest")
                keys.add(key)
                if uri not in objects:
                    raise Violation(f"{path} names {uri}, which is not there")
                content = objects[uri][0]
                if len(content) != num_bytes or sha256(content) != digest:
                    raise Violation(f"{uri} does not hold what {path} says")
    return keys


# ------------------------------------------------------------------------------------------------ runs, workers, gc


@lru_cache(None)
def plan_of(keys: tuple[str, ...]) -> Plan:
    plan_id = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
    each = [keys[i : i + ROWS_PER_SHARD] for i in range(0, len(keys), ROWS_PER_SHARD)]
    digests = "".join(manifest.keys_digest(some) for some in each)
    shards = Shards.all_of(plan_id, [ROWS_PER_SHARD] * len(each), [1.0] * len(each), digests)
    return Plan(plan_id, {}, {"keys": list(keys)}, 1, 1, len(keys), len(keys), 0, "", "", shards)


@lru_cache(None)
def made(key: str, outcome: int) -> bytes:
    return f"picture {outcome} of {key}".encode()


@lru_cache(None)
def part_of(plan_id: str, shard: int, attempt: str, files: tuple[tuple[str, str, str, int], ...]) -> bytes:
    table = pa.table(
        {
            "key": [key for key, *_ in files],
            "status": ["ok" for _ in files],
            "error_type": pa.nulls(len(files), pa.string()),
            "uri": [uri for _, uri, _, _ in files],
            "sha256": [digest for _, _, digest, _ in files],
            "num_bytes": [num_bytes for *_, num_bytes in files],
        }
    )
    digest = manifest.keys_digest(key for key, *_ in files)
    head = manifest.PartHead(plan_id, shard, attempt, len(files), len(files), 0, 0, digest)
    return manifest.part_bytes(table, head)


@dataclass(frozen=True)
class Protocol:
    """What `tests/faults/naive.py` replaces; the defaults are what production runs."""

    name: Callable[[str, str, bytes], str] = lambda stem, attempt, data: content_name(stem, data, "png")[0]
    commit: Callable[..., str] = commit_shard
    begin: Callable[[Any], None] = lambda store: None
    unfinished: Callable[[Any, Plan], list[Shard]] = unfinished
    count: Callable[[Any], None] = lambda store: write_success(store, count(store, read_plans(store)))
    older_than_s: float = OLD
    collect: Callable[..., Any] = collect


OURS = Protocol()


def bring_up_to_date(store: Any, num_rows: int, sleep: Callable[[float], None]) -> list[Plan]:
    """The loop of `planner.plan`: rows that no plan holds make a new one."""
    table = [f"k{i}" for i in range(num_rows)]
    while True:
        plans = read_plans(store)
        known = {key for plan in plans for key in plan.settings["keys"]}
        fresh = tuple(key for key in table if key not in known)
        if not fresh:
            return plans
        plan = plan_of(fresh)
        if add_plan(store, len(plans) + 1, plan, [(plan.shards[0].file, b"rows")], sleep):
            return [*plans, plan]


def attempt_at(
    plan: Plan, shard: Shard, attempt: str, outcome: Callable[[], int], name: Callable[[str, str, bytes], str]
) -> tuple[list[tuple[str, bytes]], str, bytes]:
    """What one attempt commits: files, the part's path, the part."""
    files, records = [], []
    for key in plan.settings["keys"][shard.index * ROWS_PER_SHARD :][:ROWS_PER_SHARD]:
        data = made(key, outcome())
        path = name(f"images/{shard.index:06d}/{key}", attempt, data)
        files.append((path, data))
        records.append((key, path, sha256(data), len(data)))
    part = part_of(plan.plan_id, shard.index, attempt, tuple(records))
    return files, manifest.part_path(plan.plan_id, shard.index), part


def do_shard(world: World, store: SimulatedStore, protocol: Protocol, plan: Plan, shard: Shard) -> None:
    """One attempt: make the rows, put them, commit."""
    world.num_attempts += 1
    number, outcomes = world.num_attempts, world.weather.outcomes

    def outcome() -> int:
        return number if outcomes is None else world.rng.randrange(outcomes)

    files, path, part = attempt_at(plan, shard, f"a{number}", outcome, protocol.name)
    world.did(protocol.commit(store, files, path, lambda: part, f"a{number}", manifest.attempt_of, store.pause))


def redoer(world: World) -> Callable[[Actor], None]:
    """`retry`: one row of a part is made again, the others stay as the part has them."""

    def redo(me: Actor) -> None:
        store = SimulatedStore(world, me)
        plans = read_plans(store)
        if not plans:
            return
        plan = world.rng.choice(plans)
        shard = world.rng.choice(plan.shards)
        world.num_attempts += 1
        attempt = f"a{world.num_attempts}"
        path = manifest.part_path(plan.plan_id, shard.index)
        if (part := store.read(path)) is None:
            return
        (key, *_), *kept = rows(part)[:: world.rng.choice([1, -1])]
        # Bytes that no attempt had before. The name of an old orphan, taken up again while gc's delete of it is under
        # way, would be lost: that is what gc.py says remains, and about one schedule in 10,000 finds it.
        data = made(key, 1000 + world.num_attempts)
        uri = OURS.name(f"images/{shard.index:06d}/{key}", attempt, data)
        new = part_of(plan.plan_id, shard.index, attempt, ((key, uri, sha256(data), len(data)), *kept))
        said = commit_shard(
            store, [(uri, data)], path, lambda: new, attempt, manifest.attempt_of, store.pause, again=True
        )
        world.did(f"redone, {said}")

    return redo


def driver(world: World, protocol: Protocol, num_rows: int, num_workers: int) -> Callable[[Actor], None]:
    """A run: plan, do what is left with some workers, count."""

    def drive(me: Actor) -> None:
        store = SimulatedStore(world, me)
        protocol.begin(store)
        plans = bring_up_to_date(store, num_rows, store.pause)
        todo = [(plan, shard) for plan in plans for shard in protocol.unfinished(store, plan)]
        world.rng.shuffle(todo)
        doing: dict[str, tuple[Actor, tuple[Plan, Shard]]] = {}
        failed: list[Exception] = []

        def work(worker: Actor) -> None:
            mine = SimulatedStore(world, worker)
            while todo and not failed:
                task = todo.pop()
                doing[worker.name] = (worker, task)
                try:
                    do_shard(world, mine, protocol, *task)
                except (StorageError, NotWhole) as error:
                    failed.append(error)
                del doing[worker.name]

        def hire() -> Actor:
            worker = world.start(f"{me.name}.{len(team)}", work)
            worker.immortal = me.immortal
            team.append(worker)
            return worker

        team: list[Actor] = []
        for _ in range(num_workers):
            hire()
        try:
            while True:
                store.wait(lambda: any(not w.thread.dead and not w.dead for w in team))
                # As Ray does: what a dead worker had in hand is given to another one.
                lost = [task for worker, task in doing.values() if worker.dead]
                doing.clear()
                todo.extend(lost)
                if not todo or failed:
                    break
                hire()
        except Killed:
            # Its workers die with it, or go on for a while without it.
            if world.rng.random() < 0.5:
                for worker in team:
                    world.kill(worker)
            raise
        if failed:
            raise failed[0]
        protocol.count(store)
        world.did("finished")

    return drive


def collector(world: World, protocol: Protocol) -> Callable[[Actor], None]:
    """`gc`, without its refusal where a run is alive: as if no heartbeat could be seen."""

    def sweep(me: Actor) -> None:
        store = SimulatedStore(world, me)
        garbage = protocol.collect(store, present_s(store), protocol.older_than_s, False)
        world.fired["gc deleted"] = world.fired.get("gc deleted", 0) + garbage.num_deleted

    return sweep


def simulate(
    seed: int,
    protocol: Protocol = OURS,
    weather: Weather | None = None,
    trace: Callable[[str], None] | None = None,
) -> dict[str, int]:
    """One schedule; returns how often each fault fired.

    Raises:
        Violation: what a reader saw, with how to replay it.
    """
    world = World(seed, weather or forecast(seed), trace)
    try:
        return _simulate(world, protocol)
    except Violation as error:
        raise Violation(f"{error}\nreplay: python -m tests.faults.simulation {seed}") from error


def _simulate(world: World, protocol: Protocol) -> dict[str, int]:
    rng = world.rng
    world.say(world.weather)
    at_s = 0.0
    for i in range(rng.randint(2, 5)):
        body = driver(world, protocol, rng.choice(TABLES) if world.weather.grows else TABLES[0], rng.randint(1, 3))
        world.start(f"driver{i}", body, at_s)
        for j in range(rng.randint(0, 2) if world.weather.redoes and protocol.commit is commit_shard else 0):
            world.start(f"redo{i}.{j}", redoer(world), at_s + rng.random() * rng.choice([1, 40]) * HOUR)
        for j in range(rng.randint(0, 3)):
            world.start(f"gc{i}.{j}", collector(world, protocol), at_s + rng.random() * rng.choice([1, 40]) * HOUR)
        at_s += rng.random() * rng.choice([0.02, 0.2, 60]) * HOUR
    world.run(until=lambda: world.clock > at_s and not any(a.name.startswith("driver") for a in world.actors))
    # One driver at last that nobody kills; zombies and late requests may still be about.
    num_rows = TABLES[-1] if world.weather.grows else TABLES[0]
    for i in range(20):
        before = world.fired.get("finished", 0)
        last = world.start(f"last{i}", driver(world, protocol, num_rows, 2))
        last.immortal = True
        world.run(until=lambda last=last: last.thread.dead)
        if world.fired.get("finished", 0) > before:
            break
    else:
        raise Violation("twenty runs in a row did not finish")
    _whole(world, num_rows)
    if "_SUCCESS" not in world.objects or json.loads(world.objects["_SUCCESS"][0])["num_ok"] != num_rows:
        raise Violation("the last run finished, and _SUCCESS does not say so")
    # What still sleeps or is under way comes too late for everything, and must change nothing.
    world.run()
    world.land(everything=True)
    _whole(world, num_rows)
    world.clock += 100 * HOUR
    world.weather = replace(world.weather, lost=0, late=0, killed=0, asleep=0)
    world.start("gc at last", collector(world, protocol))
    world.run()
    _whole(world, num_rows)
    named = {
        uri
        for path in world.objects
        if path.endswith(".parquet") and path.startswith("manifest/")
        for _, uri, _, _ in rows(world.objects[path][0])
    }
    left = {path for path in world.objects if path.startswith("images/")} - named
    if left:
        raise Violation(f"gc leaves {sorted(left)[0]}, which no part names")
    return world.fired


def _whole(world: World, num_rows: int) -> None:
    wanted = {f"k{i}" for i in range(num_rows)}
    if (found := check(world.objects)) != wanted:
        raise Violation(f"rows {sorted(wanted ^ found)} are not what was planned")


# Parts are the same bytes again and again: reading them is remembered, or it would be nearly all that the time goes to.
manifest.read_head = lru_cache(None)(manifest.read_head)
manifest.read_part = lru_cache(None)(manifest.read_part)
manifest.texts = lru_cache(None)(manifest.texts)

if __name__ == "__main__":
    from tests.faults.naive import PROTOCOLS

    print(simulate(int(sys.argv[1]), PROTOCOLS[sys.argv[2] if len(sys.argv) > 2 else "ours"], trace=print))  # noqa: T201
