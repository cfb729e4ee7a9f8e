"""Plan, attempts, deaths, resume, extend, retry, count and gc in any order that hypothesis can think of.

In memory, where many orders are quick, and on a real disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipelines import manifest
from pipelines.commit import commit_shard
from pipelines.errors import NotWhole
from pipelines.gc import collect
from pipelines.heartbeat import present_s
from pipelines.plans import Plan, read_plans
from pipelines.shards import Shard
from pipelines.storage import Exists, Info, ObjectStore, Store
from pipelines.totals import count, unfinished, write_success
from tests.faults.simulation import (
    HOUR,
    OLD,
    OURS,
    ROWS_PER_SHARD,
    attempt_at,
    bring_up_to_date,
    check,
    made,
    part_of,
    rows,
    sha256,
)

ANY = st.integers(0, 1 << 20)
OUTCOME = st.sampled_from([0, 0, 1])


def no_sleep(_: float) -> None:
    pass


class Dead(BaseException):
    """No request of this attempt goes out any more."""


class Memory:
    """A store that is a dict, and does what it is told."""

    url = "memory://out"

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.now_s = 1e9

    def uri(self, path: str) -> str:
        return f"{self.url}/{path}"

    def read(self, path: str) -> bytes | None:
        return self.objects[path][0] if path in self.objects else None

    def info(self, path: str) -> Info | None:
        return Info(len(self.objects[path][0]), self.objects[path][1]) if path in self.objects else None

    def list(self, prefix: str) -> dict[str, Info]:
        found = {path: self.info(path) for path in self.objects if path.startswith(f"{prefix}/")}
        return {path: info for path, info in found.items() if info is not None}

    def names(self, prefix: str) -> list[str]:
        return [*self.list(prefix)]

    def write(self, path: str, data: bytes) -> None:
        self.objects[path] = (data, self.now_s)

    def create(self, path: str, data: bytes) -> None:
        if path in self.objects:
            raise Exists(path)
        self.write(path, data)

    def delete(self, path: str) -> None:
        self.objects.pop(path, None)

    def write_each(self, files: Iterable[tuple[str, bytes]]) -> None:
        self.each(lambda file: self.write(*file), files)

    def each(self, action: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        return [action(item) for item in items]


class Dying:
    """A store as an attempt sees it that dies before its request number `requests`, or right after it."""

    def __init__(self, store: ObjectStore, requests: int, after: bool) -> None:
        self.store, self.left, self.after = store, requests, after

    def __getattr__(self, name: str) -> Any:
        asked = getattr(self.store, name)
        if name not in ("read", "info", "list", "write", "create", "delete"):
            return asked

        def request(*arguments: Any) -> Any:
            self.left -= 1
            if self.left < 0 and not self.after:
                raise Dead
            answer = asked(*arguments)
            if self.left < 0:
                raise Dead
            return answer

        return request

    def write_each(self, files: Iterable[tuple[str, bytes]]) -> None:
        self.each(lambda file: self.write(*file), files)

    def each(self, action: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        return [action(item) for item in items]


class Output(RuleBasedStateMachine):
    """One output. `parts` is the model: what was committed, and has to stand there until rows of it are made again."""

    @initialize()
    def begin(self) -> None:
        self.num_rows = 0
        self.num_attempts = 0
        self.plans: list[Plan] = []
        self.parts: dict[str, bytes] = {}
        self.open()

    store: Any

    def open(self) -> None:
        self.store = Memory()

    def objects(self) -> dict[str, tuple[bytes, float]]:
        return dict(self.store.objects)

    def pass_time(self, seconds: float) -> None:
        self.store.now_s += seconds

    @property
    def shards(self) -> list[tuple[Plan, Shard]]:
        return [(plan, shard) for plan in self.plans for shard in plan.shards]

    def attempt(self, plan: Plan, shard: Shard, outcome: int) -> tuple[list[tuple[str, bytes]], str, bytes, str]:
        self.num_attempts += 1
        name = f"a{self.num_attempts}"
        return *attempt_at(plan, shard, name, lambda: outcome, OURS.name), name

    def again(self, plan: Plan, shard: Shard, outcome: int) -> tuple[list[tuple[str, bytes]], str, bytes, str]:
        """As `retry` does: the first row of a part made again, the others as the part has them."""
        self.num_attempts += 1
        name = f"a{self.num_attempts}"
        path = manifest.part_path(plan.plan_id, shard.index)
        (key, *_), *kept = rows(self.parts[path])
        data = made(key, 2 + outcome)
        uri = OURS.name(f"images/{shard.index:06d}/{key}", name, data)
        part = part_of(plan.plan_id, shard.index, name, ((key, uri, sha256(data), len(data)), *kept))
        return [(uri, data)], path, part, name

    def commit(self, plan: Plan, shard: Shard, outcome: int) -> None:
        files, path, part, name = self.attempt(plan, shard, outcome)
        said = commit_shard(self.store, files, path, lambda: part, name, manifest.attempt_of, no_sleep)
        assert said == ("theirs" if path in self.parts else "mine")
        self.parts.setdefault(path, part)

    @precondition(lambda self: self.num_rows < 12)
    @rule(more=st.integers(1, 2))
    def the_table_grows(self, more: int) -> None:
        self.num_rows += more * ROWS_PER_SHARD
        self.plans = bring_up_to_date(self.store, self.num_rows, no_sleep)

    @precondition(lambda self: self.num_rows < 12)
    @rule(requests=st.integers(0, 6), after=st.booleans())
    def somebody_dies_while_planning(self, requests: int, after: bool) -> None:
        self.num_rows += ROWS_PER_SHARD
        with contextlib.suppress(Dead):
            bring_up_to_date(Dying(self.store, requests, after), self.num_rows, no_sleep)
        # The same command again.
        self.plans = bring_up_to_date(self.store, self.num_rows, no_sleep)
        assert sum(plan.num_rows for plan in self.plans) == self.num_rows

    @rule()
    def it_is_planned_again(self) -> None:
        assert bring_up_to_date(self.store, self.num_rows, no_sleep) == self.plans == read_plans(self.store)

    @precondition(lambda self: self.plans)
    @rule(which=ANY, outcome=OUTCOME)
    def somebody_commits_a_shard(self, which: int, outcome: int) -> None:
        self.commit(*self.shards[which % len(self.shards)], outcome)

    @precondition(lambda self: self.plans)
    @rule(which=ANY, outcome=OUTCOME, requests=st.integers(0, ROWS_PER_SHARD + 2), after=st.booleans())
    def somebody_dies_in_a_commit(self, which: int, outcome: int, requests: int, after: bool) -> None:
        files, path, part, name = self.attempt(*self.shards[which % len(self.shards)], outcome)
        dying = Dying(self.store, requests, after)
        with contextlib.suppress(Dead):
            commit_shard(dying, files, path, lambda: part, name, manifest.attempt_of, no_sleep)
        # The part may have landed, whole, though nobody heard of it.
        if path not in self.parts and (there := self.store.read(path)) is not None:
            assert there == part
            self.parts[path] = part

    @precondition(lambda self: self.parts)
    @rule(which=ANY, outcome=OUTCOME, requests=st.integers(0, 9), after=st.booleans())
    def a_row_is_made_again(self, which: int, outcome: int, requests: int, after: bool) -> None:
        done = [at for at in self.shards if manifest.part_path(at[0].plan_id, at[1].index) in self.parts]
        files, path, part, name = self.again(*done[which % len(done)], outcome)
        dying = Dying(self.store, requests, after)
        try:
            said = commit_shard(dying, files, path, lambda: part, name, manifest.attempt_of, no_sleep, again=True)
            assert said == "mine"
            self.parts[path] = part
        except Dead:
            there = self.store.read(path)
            assert there in (part, self.parts[path])
            self.parts[path] = there

    @precondition(lambda self: self.plans)
    @rule(outcome=OUTCOME)
    def a_run_does_the_rest(self, outcome: int) -> None:
        left = [(plan, shard) for plan in self.plans for shard in unfinished(self.store, plan)]
        wanted = {manifest.part_path(plan.plan_id, shard.index) for plan, shard in self.shards} - self.parts.keys()
        assert {manifest.part_path(plan.plan_id, shard.index) for plan, shard in left} == wanted
        for plan, shard in left:
            self.commit(plan, shard, outcome)
        write_success(self.store, count(self.store, self.plans))
        assert json.loads(self.objects()["_SUCCESS"][0])["num_ok"] == self.num_rows

    @rule(hours=st.sampled_from([1, 30]))
    def time_passes_and_gc_comes_by(self, hours: int) -> None:
        self.pass_time(hours * HOUR)
        before = self.objects()
        now_s = present_s(self.store)
        collect(self.store, now_s, OLD, dry_run=False)
        gone = before.keys() - self.objects().keys()
        assert not [path for path in gone if before[path][1] > now_s - OLD]
        parts = {manifest.part_path(plan.plan_id, shard.index): shard.index for plan, shard in self.shards}
        not_done = {f"images/{index:06d}" for path, index in parts.items() if path not in self.parts}
        folders = {path.rpartition("/")[0] for path in gone}
        assert all(folder.startswith("images/") for folder in folders)
        assert not folders & not_done

    @invariant()
    def nothing_is_missing_twice_or_torn(self) -> None:
        objects = self.objects()
        check(objects)
        assert {path: data for path, (data, _) in objects.items() if path.startswith("manifest/")} == self.parts

    @precondition(lambda self: not self.plans or len(self.parts) < len(self.shards))
    @rule()
    def nobody_calls_it_whole_too_early(self) -> None:
        assert "_SUCCESS" not in self.objects()
        if self.plans:
            with pytest.raises(NotWhole, match="rows planned"):
                write_success(self.store, count(self.store, self.plans))


class OutputOnDisk(Output):
    def open(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.store = Store(str(self.root))

    def teardown(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def objects(self) -> dict[str, tuple[bytes, float]]:
        found = [path for path in self.root.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.root)): (path.read_bytes(), path.stat().st_mtime) for path in found}

    def pass_time(self, seconds: float) -> None:
        for path in self.root.rglob("*.*"):
            then = path.stat().st_mtime - seconds
            os.utime(path, (then, then))


QUICK = settings(stateful_step_count=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
TestAnyOrder = Output.TestCase
TestAnyOrder.settings = settings(QUICK, max_examples=400)
TestAnyOrderOnDisk = OutputOnDisk.TestCase
TestAnyOrderOnDisk.settings = settings(QUICK, max_examples=30)
