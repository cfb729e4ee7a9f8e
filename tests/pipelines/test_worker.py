"""How a worker finds the row that fails, and the batch that fits."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipelines
from ldm_ops.adapters import NO_ADAPTERS, Adapters
from ldm_ops.op import Op, Row
from ldm_ops.txt2img import Txt2Img
from pipelines.blocks import with_results
from pipelines.heartbeat import Permit, ask_to_stop
from pipelines.job import Job, parse_job
from pipelines.loading import LoadShard, place
from pipelines.planner import check
from pipelines.storage import Store
from pipelines.worker import STALE_S, Place, Worker, make
from tests import models
from tests.ldm_ops.rows import row as picture_row


class Fragile(Op):
    """Raises for bad rows, and for batches larger than its memory; keeps the sizes that it was given."""

    reads: ClassVar[frozenset[str]] = frozenset({"n"})
    writes: ClassVar[frozenset[str]] = frozenset({"image"})
    bad: frozenset[int] = frozenset()
    memory: int = 1000

    def load(self, folder: Path) -> list[int]:
        return []

    def run(self, model: list[int], rows: Sequence[Row]) -> list[dict[str, Any]]:
        model.append(len(rows))
        if len(rows) > self.memory:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        if any(row["n"] in self.bad for row in rows):
            raise ValueError("a bad row is among them")
        return [{"image": np.full((1, 1, 3), row["n"], np.uint8), "nsfw": None, "intermediates": []} for row in rows]


@given(count=st.integers(1, 16), size=st.integers(1, 16), bad=st.frozensets(st.integers(0, 15)))
def test_exactly_the_bad_rows_fail_and_every_batch_has_one_shape(count: int, size: int, bad: frozenset[int]) -> None:
    shapes: list[int] = []
    results = make(Fragile(bad=bad), shapes, [{"n": i} for i in range(count)], size)
    assert [r["status"] for r in results] == ["failed" if i in bad else "ok" for i in range(count)]
    assert {r["error_type"] for r in results if r["status"] == "failed"} <= {"ValueError"}
    assert set(shapes) == {size}
    for i, result in enumerate(results):
        if result["status"] == "ok":
            assert result["pixels"].ravel()[-3:].tolist() == [i] * 3


@pytest.mark.parametrize(("size", "memory", "expected"), [(8, 8, 8), (8, 5, 4), (8, 3, 2), (8, 1, 1), (5, 2, 2)])
def test_a_batch_that_does_not_fit_is_halved_and_says_so(size: int, memory: int, expected: int) -> None:
    results = make(Fragile(memory=memory), [], [{"n": i} for i in range(size)], size)
    assert [r["status"] for r in results] == ["ok"] * size
    assert {r["batch_size"] for r in results} == {expected}


@pytest.mark.parametrize(
    "words",
    ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"],
)
def test_memory_that_cuda_itself_lacks_halves_the_batch_and_ends_no_process(words: str) -> None:
    class Short(Fragile):
        def run(self, model: list[int], rows: Sequence[Row]) -> list[dict[str, Any]]:
            if len(rows) > self.memory:
                raise RuntimeError(f"{words}\nCUDA kernel errors might be reported later")
            return super().run(model, rows)

    results = make(Short(memory=2), [], [{"n": i} for i in range(4)], 4)
    assert [(r["status"], r["batch_size"]) for r in results] == [("ok", 2)] * 4


def test_a_lora_that_finds_room_beside_a_smaller_batch_is_no_fault_of_its_row(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = models.save_lora(models.tiny_stable_diffusion(), tmp_path, 1)
    op = Txt2Img(model="x")
    model = op.load(tiny_model)
    load = model.pipe.load_lora_weights

    def without_room(*arguments: Any, **options: Any) -> None:
        monkeypatch.undo()
        load(*arguments, **options)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(model.pipe, "load_lora_weights", without_room)
    rows = [picture_row(seed=seed, height=64, width=64, loras=((lora, 1.0),)) for seed in (1, 2)]
    assert [(r["status"], r["batch_size"]) for r in make(op, model, rows, 2)] == [("ok", 1)] * 2


def test_one_row_that_does_not_fit_is_a_dead_letter_of_its_own_kind() -> None:
    results = make(Fragile(memory=0), [], [{"n": 1}, {"n": 2}], 2)
    assert [(r["status"], r["error_type"], r["batch_size"]) for r in results] == [("failed", "model.oom", 1)] * 2


class Held(Txt2Img):
    """A device that is busy until it is let go; `begun` has the prompts of each of its batches."""

    begun: ClassVar[list[list[str]]] = []
    busy: ClassVar[threading.Event] = threading.Event()
    may_end: ClassVar[threading.Event] = threading.Event()

    def load(self, folder: Path, adapters: Any = None) -> Any:
        return None

    def run(self, model: Any, rows: Sequence[Row]) -> list[dict[str, Any]]:
        self.begun.append([row["prompt"] for row in rows])
        self.busy.set()
        assert self.may_end.wait(30)
        picture = np.full((64, 64, 3), len(self.begun), np.uint8)
        return [{"image": picture, "nsfw": None, "intermediates": []} for _ in rows]


def test_a_shard_that_waits_for_the_device_is_not_begun_once_a_stop_was_asked(
    make_job: Callable[..., Job], tmp_path: Path
) -> None:
    job = make_job(source={"rows": ["a red circle", "a blue square"]}, stage={"batch_size": 1}, batches_per_shard=1)
    planned = pipelines.plan(job)
    store = Store(job.sink.path)
    weights = planned.models[0][0]
    worker = Worker(Place(job.stage, 0, True, None), Held(**job.stage.bare().model_dump()), weights, Permit(store, "r"))
    load = LoadShard(store, None, weights.revision, {})
    first, second = (load(place(shard)) for shard in planned.plans[0].shards)
    with ThreadPoolExecutor(2) as pool:
        doing = pool.submit(worker, first)
        assert Held.busy.wait(30)
        waiting = pool.submit(worker, second)
        assert not threading.Event().wait(STALE_S + 0.2)
        ask_to_stop(store, "r")
        Held.may_end.set()
        assert doing.result(30)["status"].to_pylist() == ["ok"]
        assert waiting.result(30).num_rows == 0
    assert len(Held.begun) == 1


class Threaded(Txt2Img):
    """Its model is a list of the threads that it is called in: on, and off again."""

    def load(self, folder: Path, adapters: Adapters = NO_ADAPTERS) -> Any:
        return []

    def run(self, model: Any, rows: Sequence[Row]) -> list[dict[str, Any]]:
        model.append(threading.get_ident())
        time.sleep(0.01)
        model.append(threading.get_ident())
        return [{"image": np.zeros((8, 8, 3), np.uint8), "nsfw": None, "intermediates": []} for _ in rows]


def test_one_thread_alone_has_the_device_whoever_brings_the_shards(tmp_path: Path) -> None:
    stage = {"op": "txt2img", "model": "builtin:shapes", "batch_size": 2}
    source = {"rows": [f"a red circle {i}" for i in range(6)]}
    job = parse_job(json.dumps({"source": source, "stages": [stage], "sink": {"path": str(tmp_path / "out")}}))
    planned = check(job)
    assert planned.table is not None
    shard = with_results(planned.table, [{}] * 6)
    worker = Worker(Place(job.stage, 0, True, None), Threaded(**job.stage.bare().model_dump()), planned.models[0][0])
    with ThreadPoolExecutor(4) as callers:
        done = list(callers.map(worker, [shard] * 8))
    assert all(table["status"].to_pylist() == ["ok"] * 6 for table in done)
    assert len(worker.model) == 2 * 3 * 8
    assert len(set(worker.model)) == 1
