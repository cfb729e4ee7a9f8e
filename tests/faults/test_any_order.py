"""Plan, attempts, deaths, resume, count and gc on a real disk, in any order that hypothesis can think of."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

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
from pipelines.storage import Store
from pipelines.totals import count, unfinished, write_success
from tests.faults.simulation import HOUR, OLD, OURS, ROWS_PER_SHARD, attempt_at, bring_up_to_date, check

ANY = st.integers(0, 1 << 20)
OUTCOME = st.sampled_from([0, 0, 1])


def no_sleep(_: float) -> None:
    pass


class Output(RuleBasedStateMachine):
    """One output. `parts` is the model: what was committed first, and has to stand there for ever."""

    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.store = Store(str(self.root))
        self.num_rows = 0
        self.num_attempts = 0
        self.plans: list[Plan] = []
        self.parts: dict[str, bytes] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    @property
    def shards(self) -> list[tuple[Plan, Shard]]:
        return [(plan, shard) for plan in self.plans for shard in plan.shards]

    def commit(self, plan: Plan, shard: Shard, outcome: int) -> None:
        self.num_attempts += 1
        name = f"a{self.num_attempts}"
        files, path, part = attempt_at(plan, shard, name, lambda: outcome, OURS.name)
        said = commit_shard(self.store, files, path, part, name, manifest.attempt_of, no_sleep)
        assert said == ("theirs" if path in self.parts else "mine")
        self.parts.setdefault(path, part)

    @precondition(lambda self: self.num_rows < 12)
    @rule(more=st.integers(1, 2))
    def the_table_grows(self, more: int) -> None:
        self.num_rows += more * ROWS_PER_SHARD
        self.plans = bring_up_to_date(self.store, self.num_rows, no_sleep)

    @rule()
    def it_is_planned_again(self) -> None:
        assert bring_up_to_date(self.store, self.num_rows, no_sleep) == self.plans == read_plans(self.store)

    @precondition(lambda self: self.plans)
    @rule(which=ANY, outcome=OUTCOME)
    def somebody_commits_a_shard(self, which: int, outcome: int) -> None:
        self.commit(*self.shards[which % len(self.shards)], outcome)

    @precondition(lambda self: self.plans)
    @rule(which=ANY, outcome=OUTCOME, num_files=st.integers(1, ROWS_PER_SHARD))
    def somebody_dies_before_the_part(self, which: int, outcome: int, num_files: int) -> None:
        files, _, _ = attempt_at(*self.shards[which % len(self.shards)], "dead", lambda: outcome, OURS.name)
        for file in files[:num_files]:
            self.store.write(*file)

    @precondition(lambda self: self.plans)
    @rule(outcome=OUTCOME)
    def a_run_does_the_rest(self, outcome: int) -> None:
        left = [(plan, shard) for plan in self.plans for shard in unfinished(self.store, plan)]
        wanted = {manifest.part_path(plan.plan_id, shard.index) for plan, shard in self.shards} - self.parts.keys()
        assert {manifest.part_path(plan.plan_id, shard.index) for plan, shard in left} == wanted
        for plan, shard in left:
            self.commit(plan, shard, outcome)
        write_success(self.store, count(self.store, self.plans))
        assert json.loads((self.root / "_SUCCESS").read_bytes())["num_ok"] == self.num_rows

    @rule(hours=st.sampled_from([1, 30]))
    def time_passes_and_gc_comes_by(self, hours: int) -> None:
        for path in self.root.rglob("*.*"):
            then = path.stat().st_mtime - hours * HOUR
            os.utime(path, (then, then))
        before = set(self.root.rglob("*"))
        young = {path for path in before if path.stat().st_mtime > present_s(self.store) - OLD}
        collect(self.store, present_s(self.store), OLD, dry_run=False)
        gone = before - set(self.root.rglob("*"))
        assert not gone & young
        parts = {manifest.part_path(plan.plan_id, shard.index): shard.index for plan, shard in self.shards}
        not_done = {f"images/{index:06d}" for path, index in parts.items() if path not in self.parts}
        folders = {str(path.parent.relative_to(self.root)) for path in gone}
        assert all(folder.startswith("images/") for folder in folders)
        assert not folders & not_done

    @invariant()
    def nothing_is_missing_twice_or_torn(self) -> None:
        found = [path for path in self.root.rglob("*") if path.is_file()]
        objects = {str(path.relative_to(self.root)): (path.read_bytes(), 0.0) for path in found}
        check(objects)
        assert {path: data for path, (data, _) in objects.items() if path.startswith("manifest/")} == self.parts

    @precondition(lambda self: not self.plans or len(self.parts) < len(self.shards))
    @rule()
    def nobody_calls_it_whole_too_early(self) -> None:
        assert not (self.root / "_SUCCESS").exists()
        if self.plans:
            with pytest.raises(NotWhole, match="rows planned"):
                write_success(self.store, count(self.store, self.plans))


TestAnyOrder = Output.TestCase
TestAnyOrder.settings = settings(
    max_examples=60,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
