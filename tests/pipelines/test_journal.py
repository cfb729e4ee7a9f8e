"""One row pays for what it does to its worker: every death is found by the next process, and laid to the right row."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

import pipelines
from ldm_ops.op import Op, Row
from pipelines import journal
from pipelines.blocks import unpack
from pipelines.errors import RunFailed
from pipelines.inputs import BadImage, Loaded, Loader
from pipelines.job import Job
from pipelines.journal import private_folder
from pipelines.loading import LoadShard
from pipelines.plans import read_plans, read_shard
from pipelines.runner import run
from pipelines.stages import Txt2ImgStage
from pipelines.storage import Store
from pipelines.weights import identify
from pipelines.worker import Place, Worker

MakeJob = Callable[..., Job]


class Deadly(Op):
    """Does to its process what the first word of a prompt says; keeps the prompts of each batch in a file."""

    reads: ClassVar[frozenset[str]] = frozenset({"prompt"})
    writes: ClassVar[frozenset[str]] = frozenset({"image"})
    batches: Path | None = None
    once: bool = False

    def load(self, folder: Path) -> None:
        pass

    def run(self, model: None, rows: Sequence[Row]) -> list[dict[str, Any]]:
        if self.batches:
            with self.batches.open("a") as file:
                file.write(json.dumps([row["prompt"] for row in rows]) + "\n")
        if not self.once or (self.batches and len(self.batches.read_text().splitlines()) == 1):
            for row in rows:
                die(row["prompt"].split()[0])
            if len(rows) > 1 and any(row["prompt"].startswith("starve") for row in rows):
                # As the kernel does for whom it kills.
                journal.VMSTAT.write_text(f"oom_kill {(journal.oom_kills() or 0) + 1}\n")
                die("killed")
        return [{"image": picture(row["prompt"]), "nsfw": None, "intermediates": []} for row in rows]


def picture(prompt: str) -> np.ndarray[Any, Any]:
    return np.full((8, 8, 3), len(prompt), np.uint8)


class DeadlyToLoad(Deadly):
    def load(self, folder: Path) -> None:
        die("segfault")


def die(how: str) -> None:
    if how == "segfault":
        ctypes.string_at(0)
    if how == "abort":
        os.abort()
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        # With the interpreter's lock in its hands, so that no Python thread could end it.
        ctypes.PyDLL(None).sleep(1000)
    if how == "cuda":
        raise RuntimeError("CUDA error: device-side assert triggered\nwith more lines")


class DeadlyLoader(Loader):
    """Does so while images are brought in."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[Loaded | BadImage]:
        for row in rows:
            if row["prompt"].startswith("loader-"):
                die(row["prompt"].split()[0].removeprefix("loader-"))
        return [Loaded(picture(row["prompt"]), None, 8, 8, 0, 0) for row in rows]


LOADER = DeadlyLoader(frozenset({"image"}), None, 8, "#ffffff", {})


def process(job: Job, op: Deadly, folder: Path, answer: Any) -> None:
    """All shards of a planned job, as one process after the other would load and do them."""
    tempfile.tempdir = str(folder)
    journal.VMSTAT = folder / "vmstat"
    store = Store(job.sink.path)
    [plan] = read_plans(store)
    weights, _ = identify(job.stage.model, None, None, {})
    try:
        worker = Worker(Place(job.stage, 0, True, None), op, weights, journal="a-run")
        load = LoadShard(store, LOADER, "", {}, "a-run")
        for shard in plan.shards:
            rows = load.load(read_shard(store, shard.file, shard.index))
            answer.send(worker(rows).to_pylist())
        answer.send(None)
    except RunFailed as error:
        answer.send(str(error))


@pytest.fixture
def until_done(make_job: MakeJob, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], int, list[list[str]]]]:
    """Start a worker anew until it comes to an end: its rows by prompt, how often it died, its batches."""

    def do(prompts: list[str], once: bool = False, **stage: Any) -> tuple[dict[str, Any], int, list[list[str]]]:
        stage = {"batch_size": 4, "batch_timeout_s": 2, **stage}
        job = make_job(source={"rows": prompts}, stage=stage, batches_per_shard=100)
        pipelines.plan(job)
        op = Deadly(batches=tmp_path / "batches", once=once)
        servers = multiprocessing.get_context("forkserver")
        servers.set_forkserver_preload(["torch", "tests.pipelines.test_journal"])
        for deaths in range(100):
            mine, theirs = servers.Pipe(duplex=False)
            child = servers.Process(target=process, args=(job, op, tmp_path, theirs))
            child.start()
            theirs.close()
            found = []
            try:
                while (answer := mine.recv()) is not None:
                    if isinstance(answer, str):
                        raise RunFailed(answer)
                    found += answer
                rows = {row["prompt"]: row for row in found}
                assert len(rows) == len(found) == len(prompts)
                return rows, deaths, [json.loads(line) for line in (tmp_path / "batches").open()]
            except EOFError:
                continue
            finally:
                child.join()
        raise AssertionError("no end")

    return do


FINE = [f"fine {'x' * i}" for i in range(9)]
FINE_TOO = [f"too {'x' * i}" for i in range(9)]


@pytest.mark.parametrize(
    ("how", "kind", "words", "deaths"),
    [
        ("segfault", "worker.crash", r"the worker died: Segmentation fault in string_at \(.*ctypes/.*\); 2 times", 3),
        ("abort", "worker.crash", r"the worker died: Aborted in die \(.*test_journal.py:\d+\); 2 times", 3),
        ("hang", "worker.timeout", r"no result within batch_timeout_s 2 in die \(.*\d+\); 2 times with this", 3),
        ("cuda", "worker.crash", "the worker ended itself: CUDA error: device-side assert triggered; 2 times", 3),
        ("killed", "worker.crash", "killed without a word, as Ray's memory monitor and .*; 4 times with this", 5),
    ],
)
def test_a_row_that_kills_its_worker_is_the_only_one_that_fails(
    until_done: Any, how: str, kind: str, words: str, deaths: int
) -> None:
    rows, died, batches = until_done([*FINE[:5], f"{how} a red circle", *FINE[5:]])
    import re

    assert [prompt for prompt, row in rows.items() if row["status"] == "failed"] == [f"{how} a red circle"]
    dead = rows[f"{how} a red circle"]
    assert (dead["stage"], dead["error_type"]) == ("txt2img", kind)
    assert re.search(words, dead["error_message"]), dead["error_message"]
    assert died == deaths
    assert {len(batch) for batch in batches} == {4}
    for prompt in FINE:
        assert (unpack(rows[prompt]["pixels"]) == picture(prompt)).all()


def test_a_batch_for_which_the_kernel_finds_no_memory_is_done_row_by_row(until_done: Any, tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("oom_kill 3\n")
    rows, deaths, batches = until_done([f"starve {i}" for i in range(9)])
    assert {(row["status"], row["stages"][0]["batch_size"]) for row in rows.values()} == {("ok", 1)}
    # In a batch, then alone in one of its shape; from there on every row has one of its own.
    assert (deaths, [len(batch) for batch in batches]) == (2, [4, 4, *[1] * 9])


def test_an_image_that_kills_its_loader_is_the_only_one_that_fails(until_done: Any) -> None:
    rows, deaths, _ = until_done([*FINE, "loader-segfault a red circle"])
    dead = rows["loader-segfault a red circle"]
    assert {prompt for prompt, row in rows.items() if row["status"] == "failed"} == {dead["prompt"]}
    assert (dead["stage"], dead["error_type"], deaths) == ("load", "worker.crash", 3)
    assert dead["error_message"].startswith("the worker died: Segmentation fault in string_at (")


def test_rows_that_all_kill_their_worker_come_to_an_end(until_done: Any) -> None:
    prompts = [f"segfault {i}" for i in range(5)]
    rows, deaths, _ = until_done(prompts)
    assert {row["error_type"] for row in rows.values()} == {"worker.crash"}
    # Each batch once, each row of the first twice; the second holds one row, which is alone from the first time on.
    assert deaths == 1 + 4 * 2 + 2


def test_a_worker_that_is_killed_from_outside_costs_no_row(until_done: Any) -> None:
    # In the plan's order, which goes by prompts: it is the first batch that dies.
    rows, deaths, batches = until_done(["killed a", "too b", "too c", "too d", "too e"], once=True)
    assert deaths == 1
    assert {row["status"] for row in rows.values()} == {"ok"}
    # Those that it was at are done alone then.
    assert sorted(sorted(set(batch)) for batch in batches[1:]) == sorted([prompt] for prompt in rows)
    assert {len(batch) for batch in batches} == {4}


@pytest.mark.timeout(600)
def test_whole_runs_bury_exactly_the_rows_that_kill_their_worker(
    ray_session: None, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A model that does such things; all else is the ordinary run.
    monkeypatch.setattr(Txt2ImgStage, "op_class", Deadly)
    # Each alone in its batch, or a test would take minutes: what stands beside others is tried above.
    poison = {"segfault 1": "worker.crash", "killed 2": "worker.crash", "hang 3": "worker.timeout"}
    stage = {"batch_size": 1, "batch_timeout_s": 5, "workers": 2}
    summary = run(make_job(source={"rows": [*FINE, *poison, *FINE_TOO]}, stage=stage, batches_per_shard=3))
    found = {row["prompt"]: row for row in pipelines.read_manifest(summary.output).to_pylist()}
    assert len(found) == len(FINE) + len(poison) + len(FINE_TOO)
    assert {prompt: row["error_type"] for prompt, row in found.items() if row["status"] != "ok"} == poison
    assert summary.exit_code == 3
    for prompt in (*FINE, *FINE_TOO):
        with Image.open(f"{summary.output}/{found[prompt]['uri']}") as image:
            assert (np.asarray(image) == picture(prompt)).all()
    assert not list(private_folder().glob(f"{summary.run_id}*"))


def test_a_run_whose_model_kills_its_workers_ends_with_one_line(
    ray_session: None, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Txt2ImgStage, "op_class", DeadlyToLoad)
    with pytest.raises(RunFailed, match=r"^stages.0: loading .*: 3 workers died in a row, .*Segmentation.*string_at"):
        run(make_job())


def test_the_journal_is_of_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old = private_folder() / "old"
    old.mkdir()
    os.utime(old, (0, 0))
    assert private_folder().stat().st_mode & 0o777 == 0o700
    assert not old.exists()
    private_folder().chmod(0o755)
    with pytest.raises(RunFailed, match="is not a folder of this user alone; take it away, or set TMPDIR"):
        private_folder()
