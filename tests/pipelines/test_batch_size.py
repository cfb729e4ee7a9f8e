"""`batch_size`: a number, a number per size of picture, or what a device is found to do fastest."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import load_job, run
from pipelines.batch_size import pixels_of, rows_at
from pipelines.errors import JobError, StorageError
from pipelines.job import Job, parse_job
from pipelines.loading import LoadShard
from pipelines.measuring import _apart, best_size, samples, timed_steps
from pipelines.planner import check, plan
from pipelines.plans import read_plans
from pipelines.storage import Store


def found(rates: dict[int, float | None], limit: int = 256) -> tuple[int, list[int]]:
    """The size that is chosen by a device of these rates, and the sizes that were tried."""
    curve: list[tuple[int, float | None]] = []
    size = best_size(lambda n: rates[n], limit, curve)
    return size, [n for n, _ in curve]


def test_sizes_are_doubled_until_it_gains_less_than_three_percent() -> None:
    assert found({1: 10, 2: 18, 4: 26, 8: 26.7, 16: 99}) == (4, [1, 2, 4, 8])
    assert found({1: 10, 2: 10.2}) == (1, [1, 2])


def test_the_largest_that_fits_is_not_taken_where_it_is_slower() -> None:
    assert found({1: 10, 2: 20, 4: 2.5}) == (2, [1, 2, 4])


def test_a_size_is_never_more_than_there_are_rows() -> None:
    assert found({1: 1, 2: 2, 4: 4}, limit=5) == (4, [1, 2, 4])


@pytest.mark.parametrize("room", [1, 2, 3, 5, 7, 13, 20, 31, 100])
def test_where_memory_ends_the_size_lies_within_an_eighth_of_what_fits(room: int) -> None:
    curve: list[tuple[int, float | None]] = []
    size = best_size(lambda n: None if n > room else float(n), 4096, curve)
    assert size <= room < size + max(1, size // 8) + 1
    assert len(curve) < 15


def test_a_device_without_room_for_one_row_is_given_one_all_the_same() -> None:
    assert found({1: None}) == (1, [1])


def test_pictures_take_the_rows_of_the_next_larger_size_that_is_named() -> None:
    sizes: dict[int, int] = {4096: 16, 16384: 4}
    assert [rows_at(sizes, pixels) for pixels in (0, 4096, 4097, 16384, 32768, 1 << 20)] == [16, 16, 4, 4, 2, 1]
    assert rows_at(12, 1 << 20) == 12


def test_a_control_image_tells_the_size_of_a_picture_that_has_none_else() -> None:
    row = {"image": None, "latents": None, "control_image": np.zeros((64, 96, 3), np.uint8), "height": None}
    assert pixels_of(row) == 64 * 96


@pytest.mark.parametrize("size", [64, {0: 64}])
def test_shards_of_rows_without_a_size_hold_whole_device_batches(size: Any, tmp_path: Path) -> None:
    rows = [f"a red circle {i}" for i in range(200)]
    stage = {"op": "embed", "model": "builtin:shapes", "batch_size": size}
    job = {"source": {"rows": rows}, "stages": [stage], "sink": {"path": str(tmp_path / "out")}}
    table = check(parse_job(json.dumps(job))).table
    assert table is not None
    # The null caption too.
    shards = table["shard"].to_pylist()
    assert [shards.count(shard) for shard in sorted(set(shards))] == [64, 64, 64, 9]


def test_a_picture_that_is_only_timed_has_steps_left_to_do_at_any_strength() -> None:
    assert [timed_steps(50, strength) for strength in (None, 1.0, 0.5, 0.1)] == [8, 8, 16, 50]
    assert all(int(timed_steps(1000, percent / 100) * percent / 100) >= 7 for percent in range(1, 101))
    assert timed_steps(4, 1.0) == 4


@pytest.mark.usefixtures("ray_session")
def test_images_of_sizes_that_only_their_files_tell_are_measured_by_size(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    sides = [64] * 6 + [128] * 3 + [256] * 3
    for i, side in enumerate(sides):
        Image.fromarray(np.full((side, side, 3), i, np.uint8)).save(tmp_path / "in" / f"{i:02d}.png")
    (tmp_path / "in" / "99.png").write_bytes(b"no picture")
    stage = {"op": "encode", "model": "builtin:shapes", "batch_size": "auto"}
    source = {"path": str(tmp_path / "in"), "format": "images"}
    job = parse_job(json.dumps({"source": source, "stages": [stage], "sink": {"path": str(tmp_path / "out")}}))
    # 13 files, one of which is none: shares of them.
    assert sampled(job) == [(6, 6), (3, 3), (3, 3)]


class Deadly(LoadShard):
    """A file that ends the process which decodes it."""

    def load(self, table: pa.Table) -> pa.Table:
        os.kill(os.getpid(), signal.SIGKILL)
        return table


@pytest.mark.usefixtures("ray_session")
def test_a_file_that_ends_its_decoder_is_not_measured_with() -> None:
    assert _apart(Deadly(Store("memory://none"), None, "", {}), pa.table({"status": [None]})) is None


class Refused(LoadShard):
    """A store that refuses."""

    def load(self, table: pa.Table) -> pa.Table:
        raise StorageError("s3://bucket: no permission; look at storage_options")


@pytest.mark.usefixtures("ray_session")
def test_a_store_that_refuses_what_is_to_be_measured_is_told_in_one_line() -> None:
    with pytest.raises(StorageError) as caught:
        _apart(Refused(Store("memory://none"), None, "", {}), pa.table({"status": [None]}))
    assert str(caught.value) == "s3://bucket: no permission; look at storage_options"


def test_rows_are_counted_that_can_share_a_batch(tmp_path: Path) -> None:
    rows = [{"prompt": f"a red circle {i}", "guidance_scale": 1 + i % 4} for i in range(40)]
    rows += [{"prompt": f"a red circle {i}", "height": 128, "width": 128} for i in range(7)]
    stage = {"op": "txt2img", "model": "builtin:shapes", "batch_size": "auto"}
    job = parse_job(json.dumps({"source": {"rows": rows}, "stages": [stage], "sink": {"path": str(tmp_path / "out")}}))
    assert sampled(job) == [(10, 3), (7, 3)]


def sampled(job: Job) -> list[tuple[int, int]]:
    """Of each kind of rows that would be measured: how many count, and how many were loaded."""
    seen: list[tuple[int, int]] = []

    def measure(job: Job, models: Any, adapters: Any, rows: Any, known: Any) -> Job:
        for tables, count in samples(job, (job.stage, *models[0], adapters[0]), rows):
            seen.append((count, len(tables)))
        return job

    plan(job, measure=measure)
    return seen


@pytest.mark.parametrize("wrong", ["0", "4097", "atuo", "2.5", "{}", "{x: 3}", "{4096: 0}", "null", "true"])
def test_a_wrong_batch_size_is_one_line(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        load_job(job_file(tmp_path), [f"stages.0.batch_size={wrong}"])
    assert "\n" not in str(caught.value)
    assert "stages.0.batch_size: a number from 1 to 4096, auto, or {px: rows}" in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("stages.0.workers=0", "stages.0.workers: a number from 1 to 100000, auto, or as many as fit"),
        ("stages.0.workers={min: 1, max: auto}", "stages.0.workers: a number from 1 to 100000, auto, or as many"),
        ("stages.0.workers={min: 3, max: 2}", "stages.0.workers: min 3 is more than max 2"),
        ("stages.0.workers=true", "stages.0.workers: a number from 1 to 100000, auto, or as many as fit"),
        ("batches_per_shard=x", "batches_per_shard: a number from 1 to 100000, or auto; got x"),
    ],
)
def test_a_wrong_number_that_may_be_something_else_too_is_one_line(wrong: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        load_job(job_file(tmp_path), [wrong])
    assert "\n" not in str(caught.value)
    assert said in str(caught.value)


def job_file(folder: Path, model: str = "builtin:shapes") -> Path:
    path = folder / "job.yaml"
    rows: list[Any] = [f"a {color} circle" for color in ("red", "blue", "green", "yellow", "black")]
    job = {
        "source": {"rows": [*rows, {"prompt": "a red square", "height": 64, "width": 128}]},
        "stages": [
            {"op": "txt2img", "model": model, "num_inference_steps": 2, "height": 64, "width": 64, "batch_size": "auto"}
        ],
        "sink": {"path": str(folder / "out")},
    }
    path.write_text(json.dumps(job))
    return path


class Heard:
    """A listener that keeps what was measured."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def measured(self, text: str) -> None:
        self.lines.append(text)

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def digests(out: Path) -> dict[str, str]:
    parts = [pq.read_table(part, partitioning=None) for part in sorted(out.glob("manifest/*/*.parquet"))]
    return {row["prompt"]: row["sha256"] for part in parts for row in part.to_pylist()}


@pytest.mark.usefixtures("ray_session")
def test_auto_is_measured_once_and_then_stays(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    job = job_file(tmp_path, str(tiny_model))
    first, again, elsewhere, by_number = Heard(), Heard(), Heard(), Heard()
    assert run(load_job(job), limit=5, listener=first).exit_code == 0
    [plan] = read_plans(Store(str(tmp_path / "out")))
    sizes = {int(pixels): rows for pixels, rows in plan.job["stages"][0]["batch_size"].items()}
    assert set(sizes) == {64 * 64}
    assert sum("rows/s at 1:" in line for line in first.lines) == 1
    # A table that has grown: its new rows are made as the old ones were, and nothing is measured.
    assert run(load_job(job), listener=again).exit_code == 0
    assert not again.lines
    assert [plan.job["stages"][0]["batch_size"] for plan in read_plans(Store(str(tmp_path / "out")))] == [
        {"4096": sizes[4096]}
    ] * 2
    parts = [pq.read_table(p, partitioning=None) for p in (tmp_path / "out").glob("manifest/*/*.parquet")]
    used = {(row["width"], row["batch_size"]) for part in parts for row in part.to_pylist()}
    assert used == {(64, sizes[4096]), (128, max(1, sizes[4096] // 2))}
    # The same sizes written down make the same bytes; and another output on this machine does not measure again.
    assert run(load_job(job, [f"sink.path={tmp_path / 'o2'}"]), limit=5, listener=elsewhere).exit_code == 0
    assert not any("rows/s at" in line for line in elsewhere.lines)
    number = [f"stages.0.batch_size={json.dumps(sizes)}", f"sink.path={tmp_path / 'o3'}"]
    assert run(load_job(job, number), limit=5, listener=by_number).exit_code == 0
    assert not by_number.lines
    assert digests(tmp_path / "o2") == digests(tmp_path / "o3")
    assert digests(tmp_path / "o2").items() <= digests(tmp_path / "out").items()


@pytest.mark.usefixtures("ray_session")
def test_rows_that_cannot_be_loaded_are_told_in_one_line(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.png").write_bytes(b"no picture")
    job = job_file(tmp_path, str(tiny_model))
    value = json.loads(job.read_text())
    value["source"] = {"path": str(tmp_path / "in"), "format": "images"}
    value["stages"] = [{"op": "encode", "model": str(tiny_model), "batch_size": "auto"}]
    job.write_text(json.dumps(value))
    with pytest.raises(JobError, match="auto cannot be measured .*; mend the rows, or give a number$"):
        run(load_job(job))


@pytest.mark.usefixtures("ray_session")
def test_a_model_that_cannot_be_loaded_is_no_fault_of_the_rows(tmp_path: Path, tiny_model: Path) -> None:
    asked = ["stages.0.accelerate={cuda_graphs: true, compile: full}", "stages.0.num_gpus=0"]
    with pytest.raises(JobError) as caught:
        run(load_job(job_file(tmp_path, str(tiny_model)), asked))
    assert str(caught.value) == (
        "stages.0: accelerate.cuda_graphs: the device is cpu; leave it out, or use a CUDA device"
    )


@pytest.mark.usefixtures("ray_session")
def test_a_later_stage_is_measured_at_any_strength_and_gets_no_more_rows_than_a_shard_holds(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    job = job_file(tmp_path, str(tiny_model))
    value = json.loads(job.read_text())
    value["source"]["rows"] = value["source"]["rows"][:5]
    value["stages"][0]["batch_size"] = 2
    # Of eight steps none would be done.
    repaint = {"op": "img2img", "model": str(tiny_model), "strength": 0.1, "num_inference_steps": 20}
    value["stages"].append({**repaint, "batch_size": "auto"})
    job.write_text(json.dumps(value))
    assert run(load_job(job)).exit_code == 0
    [plan] = read_plans(Store(str(tmp_path / "out")))
    [(pixels, rows)] = plan.job["stages"][1]["batch_size"].items()
    assert pixels == "4096"
    assert rows in (1, 2)
