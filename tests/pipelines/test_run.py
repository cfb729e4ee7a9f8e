"""Whole runs on a real local Ray: what a user finds in the output, whatever happened on the way."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pipelines
from ldm_ops.builtin.draw import all_captions
from ldm_ops.builtin.judge import judge
from pipelines.errors import JobError, NotWhole, RunAlive, RunFailed
from pipelines.heartbeat import Heartbeat
from pipelines.job import Job
from pipelines.runner import run
from pipelines.storage import Store
from pipelines.totals import status
from pipelines.verify import verify
from pipelines.weights import digest_folder
from tests.conftest import ROOT
from tests.faults.proxy import Faults, Rule
from tests.pipelines import reader

pytestmark = pytest.mark.usefixtures("ray_session")
MakeJob = Callable[..., Job]

ROWS: list[Any] = [{"prompt": f"a red circle {i}", "num_inference_steps": 2 + i % 2, "tag": f"t{i}"} for i in range(9)]


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an ordinary run makes of ROWS: key → sha256."""
    out = tmp_path_factory.mktemp("undisturbed")
    run(make(tiny_model, out, ROWS))
    return reader.contents(out)


def make(model: Path, out: Path | str, rows: list[Any], **stage: Any) -> Job:
    import yaml

    from pipelines.job import parse_job

    options = stage.pop("storage_options", {})
    stages = [{"op": "txt2img", "model": str(model), "num_inference_steps": 2, "batch_size": 2, "workers": 1, **stage}]
    return parse_job(
        yaml.safe_dump(
            {"source": {"rows": rows}, "stages": stages, "sink": {"path": str(out), "storage_options": options}}
        )
    )


def test_every_row_ends_once_in_the_manifest_with_its_file(make_job: MakeJob, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = [*ROWS, {"prompt": "another", "id": "../../x", "seed": 11, "tag": "dup"}, ROWS[0]]
    summary = run(make_job(source={"rows": rows}))
    assert (summary.exit_code, summary.num_new_rows, summary.num_duplicates) == (0, 10, 1)
    found = reader.rows(out)
    assert len(found) == 10
    assert {row["status"] for row in found} == {"ok"}
    mine = next(row for row in found if row["id"] == "../../x")
    assert mine["seed"] == 11
    assert mine["uri"].startswith(f"images/{mine['shard']:06d}/{mine['key']}-{mine['sha256'][:12]}")
    assert (mine["device"], mine["batch_size"], mine["run_id"]) == ("cpu", 2, summary.run_id)
    assert {row["model_revision"] for row in found} == {digest_folder(Path(mine["model"]))}
    assert mine["tag"] == "dup"
    assert next(row for row in found if row["tag"] == "t0")["num_duplicates"] == 1
    assert json.loads((out / "_SUCCESS").read_text())["num_ok"] == 10
    assert not [p for p in tmp_path.rglob("*") if p.name == "x"]
    assert pipelines.read_manifest(str(out)).num_rows == 10


def test_the_same_command_again_does_nothing(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(source={"rows": ["a", "b"]})
    run(job)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "images").rglob("*.png")}
    again = run(job)
    assert (again.exit_code, again.num_new_rows, again.totals.num_ok) == (0, 0, 2)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "images").rglob("*.png")} == files


def test_two_workers_make_the_same_bytes(tiny_model: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    summary = run(make(tiny_model, tmp_path, ROWS, workers=2))
    assert reader.contents(tmp_path) == undisturbed
    assert summary.exit_code == 0


def test_shuffled_rows_make_the_same_bytes(tiny_model: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    rows = random.Random(3).sample(ROWS, len(ROWS))
    run(make(tiny_model, tmp_path, rows))
    assert reader.contents(tmp_path) == undisturbed


def test_a_run_that_lost_half_its_parts_makes_the_same_bytes_again(
    tiny_model: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    job = make(tiny_model, tmp_path, ROWS)
    first = run(job)
    parts = sorted((tmp_path / "manifest").rglob("*.parquet"))
    for part in parts[::2]:
        part.unlink()
    (tmp_path / "_SUCCESS").unlink()
    again = run(job)
    assert 0 < again.num_new_rows < len(ROWS)
    assert again.totals.digest == first.totals.digest
    assert reader.contents(tmp_path) == undisturbed


def test_shards_in_one_file_are_the_same_files_after_a_resume_by_two_workers(
    make_job: MakeJob, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    out = tmp_path / "out"

    def job(workers: int) -> Job:
        return make_job(
            source={"rows": ROWS}, stage={"workers": workers}, sink={"path": str(out), "layout": "webdataset"}
        )

    def made() -> tuple[dict[str, bytes], dict[str, str]]:
        rows = pipelines.read_manifest(str(out), ["key", "sha256"]).to_pylist()
        return {p.name: p.read_bytes() for p in (out / "data").iterdir()}, {r["key"]: r["sha256"] for r in rows}

    run(job(1))
    files, contents = made()
    # The picture of a row is the same picture, wherever it lies.
    assert contents == undisturbed
    for name in sorted(files)[::2]:
        (out / "data" / name).unlink()
    for part in sorted((out / "manifest").rglob("*.parquet"))[::2]:
        part.unlink()
    (out / "_SUCCESS").unlink()
    run(job(2))
    assert made() == (files, contents)
    assert verify(str(out), deep=True).faults == []


def test_a_table_that_grows_gets_only_its_new_rows_made(
    tiny_model: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    run(make(tiny_model, tmp_path, ROWS[:5]))
    grown = run(make(tiny_model, tmp_path, ROWS[::-1]))
    assert grown.num_new_rows == 4
    assert reader.contents(tmp_path) == undisturbed


def test_an_extended_output_finishes_the_old_plan_as_it_was_begun(make_job: MakeJob, tmp_path: Path) -> None:
    pipelines.plan(make_job(source={"rows": ["a", "b"]}))
    summary = run(make_job(source={"rows": ["a", "b"]}, stage={"num_inference_steps": 3, "batch_size": 1}), extend=True)
    found = reader.rows(tmp_path / "out")
    made = sorted((row["prompt"], row["num_inference_steps"], row["batch_size"]) for row in found)
    assert made == [("a", 2, 2), ("a", 3, 1), ("b", 2, 2), ("b", 3, 1)]
    assert summary.totals.num_planned == 4


def test_on_s3_with_lost_replies_and_refusals_the_bytes_are_the_same(
    tiny_model: Path, s3_endpoint: str, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    faults = Faults(s3_endpoint)
    rules = [
        Rule("PUT", r"/manifest/.*parquet", "lose_reply", times=2),
        Rule("PUT", r"/manifest/.*parquet", "status", code=409, error="ConditionalRequestConflict"),
        Rule("PUT", r"/images/", "drop"),
        Rule("PUT", r"/images/", "lose_reply"),
        Rule("PUT", r"/images/", "status", times=3),
    ]
    faults.rules += rules
    out = f"s3://bkt/{tmp_path.name}"
    summary = run(make(tiny_model, out, ROWS, storage_options={"endpoint_url": faults.url}))
    assert [rule.fired for rule in rules] == [2, 1, 1, 1, 3]
    assert summary.exit_code == 0
    assert reader.contents(out, endpoint_url=s3_endpoint) == undisturbed
    assert status(out, {"endpoint_url": s3_endpoint})[0].digest == summary.totals.digest
    faults.close()


def test_a_poisonous_row_costs_one_row(poisoned_model: Path, tmp_path: Path) -> None:
    rows = ["a red circle", "a red ring", "a blue star", "a pink cross", "a green square"]
    summary = run(make(poisoned_model, tmp_path, rows, batch_size=4))
    found = {row["prompt"]: row for row in reader.rows(tmp_path)}
    assert summary.exit_code == 3
    assert [prompt for prompt, row in found.items() if row["status"] == "failed"] == ["a red ring"]
    dead = found["a red ring"]
    assert (dead["stage"], dead["error_type"]) == ("txt2img", "model.nan")
    assert "NaN" in dead["error_message"]
    assert summary.totals.failures == {"model.nan": 1}
    assert summary.first_error is not None
    alone = run(make(poisoned_model, tmp_path / "alone", ["a red circle"], batch_size=4))
    assert alone.exit_code == 0
    assert next(iter(reader.contents(tmp_path / "alone").values())) == found["a red circle"]["sha256"]


def test_rows_that_were_wrong_in_the_table_are_dead_letters(make_job: MakeJob, tmp_path: Path) -> None:
    rows = ["good", {"prompt": "bad", "height": 500}]
    summary = run(make_job(source={"rows": rows, "on_bad_row": "fail"}))
    dead = next(row for row in reader.rows(tmp_path / "out") if row["status"] == "failed")
    assert (summary.exit_code, dead["stage"], dead["error_type"]) == (3, "plan", "row.invalid")
    assert "height 500 is not a multiple of 8" in dead["error_message"]


def test_intermediates_are_named_by_the_manifest(make_job: MakeJob, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    run(make_job(stage={"save_intermediates": 2, "num_inference_steps": 4}))
    row = reader.rows(tmp_path / "out")[0]
    kept = {(entry["step"], entry["kind"]): tmp_path / "out" / entry["uri"] for entry in row["intermediates"]}
    assert set(kept) == {(step, kind) for step in (2, 4) for kind in ("latents", "preview")}
    assert load_file(kept[2, "latents"])["latents"].shape == (4, 8, 8)
    with Image.open(kept[4, "preview"]) as last, Image.open(tmp_path / "out" / row["uri"]) as image:
        assert last.tobytes() == image.tobytes()


def test_the_shipped_job_makes_60_pictures_of_64_rows(tmp_path: Path) -> None:
    import os

    os.chdir(ROOT)
    overrides = [f"sink.path={tmp_path}", "stages.0.workers=2"]
    summary = run(pipelines.load_job("jobs/txt2img.yaml", overrides=overrides))
    found = reader.rows(tmp_path)
    assert (len(found), summary.num_duplicates, summary.exit_code) == (60, 4, 0)
    captions = {str(caption): caption for caption in all_captions()}
    right = 0
    for row in found:
        with Image.open(tmp_path / row["uri"]) as image:
            right += judge(np.asarray(image)).agrees(captions[row["prompt"]])
    assert right >= 0.9 * len(found), right
    assert {row["scheduler"] for row in found} == {"ddim", "euler_a", "dpm++_2m"}
    assert {row["set"] for row in found} == {"catalog", "seeds", "ddim", "dpm"}


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_other_formats_say_what_they_are(make_job: MakeJob, tmp_path: Path, format: str) -> None:
    run(make_job(sink={"path": str(tmp_path / "out"), "format": format}))
    assert reader.rows(tmp_path / "out")[0]["format"] == format


def test_pools_that_do_not_fit_are_refused_with_the_numbers(make_job: MakeJob) -> None:
    rows = {"rows": [f"p{i}" for i in range(8)]}
    with pytest.raises(JobError, match="1 workers × 1 GPUs need 1, the cluster has 0; lower workers or num_gpus"):
        run(make_job(stage={"num_gpus": 1}))
    with pytest.raises(JobError, match=r"3 workers × 1 CPUs do not fit beside 0.5 .* the cluster has 2"):
        run(make_job(source=rows, stage={"workers": 3, "num_cpus": 1}))


def test_a_model_that_does_not_load_is_one_line(make_job: MakeJob, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(pipelines.LdmError) as caught:
        run(make_job(stage={"model": str(broken)}))
    assert len(str(caught.value).splitlines()) == 1


def test_a_second_run_on_the_same_output_says_who_is_there(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job()
    store = Store(str(tmp_path / "out"))
    with Heartbeat(store, "20260101T000000-abcdef"):
        with pytest.raises(RunAlive, match=r"run 20260101T000000-abcdef on .* is alive, .*--join .*--takeover"):
            run(job)
        assert not (tmp_path / "out" / "manifest").exists()
        assert run(job, join=True).exit_code == 0
        assert reader.rows(tmp_path / "out")


def test_runs_that_join_each_other_share_the_work(tiny_model: Path, tmp_path: Path, ldm_batch: Any) -> None:
    import threading

    import yaml

    rows = [f"a red circle {i}" for i in range(24)]
    stage = {"op": "txt2img", "model": str(tiny_model), "num_inference_steps": 20, "batch_size": 2, "workers": 1}
    data = {
        "source": {"rows": rows},
        "stages": [stage],
        "sink": {"path": str(tmp_path / "out")},
        "batches_per_shard": 1,
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(data))
    other: list[Any] = []
    thread = threading.Thread(target=lambda: other.append(ldm_batch("run", path, "--join", "--json")))
    thread.start()
    mine = run(pipelines.load_job(path), join=True)
    thread.join()
    theirs = json.loads(other[0].stdout)
    assert len(reader.rows(tmp_path / "out")) == 24
    # What both made is one run's; together they count every row once.
    assert mine.num_new_rows + theirs["num_new_rows"] == 24
    assert mine.exit_code == theirs["exit_code"] == 0


def test_a_refused_run_does_not_refuse_the_next_one(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job()
    with Heartbeat(Store(str(tmp_path / "out")), "20260101T000000-abcdef"):
        for _ in range(2):
            with pytest.raises(RunAlive, match="20260101T000000-abcdef"):
                run(job)
    Store(str(tmp_path / "out")).write("_ldm/runs/20260101T000000-abcdef/ended.json", b"{}")
    assert run(job).exit_code == 0


class TakenOver:
    """Asks the run that it listens to to stop, as another one does that takes over, `at` one of its words."""

    def __init__(self, out: Path, at: str) -> None:
        self.runs = out / "_ldm/runs"
        self.at = at
        self.num_waves = 0

    def _take(self, word: str) -> None:
        if word == self.at:
            (next(self.runs.iterdir()) / "stop").touch()

    def measured(self, text: str) -> None: ...

    def planned(self, *_: Any) -> None:
        self._take("planned")

    def redoing(self, *_: Any) -> None: ...

    def started(self) -> None:
        self.num_waves += 1

    def progress(self, *_: Any) -> None:
        self._take("progress")

    def stopping(self) -> None: ...


def test_a_run_that_is_taken_over_says_so(make_job: MakeJob, tmp_path: Path) -> None:
    with pytest.raises(RunAlive, match="another run has taken over"):
        run(make_job(), listener=TakenOver(tmp_path / "out", "planned"))
    assert not list((tmp_path / "out").glob("manifest/*/*"))


def test_a_run_that_is_taken_over_in_one_wave_begins_no_other(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.runner.WAVE", 4)
    monkeypatch.setattr("pipelines.runner.WAVE_PER_CPU", 0)
    rows = [f"a red circle {i}" for i in range(12)]
    job = make_job(source={"rows": rows}, stage={"batch_size": 1}, batches_per_shard=1)
    listener = TakenOver(tmp_path / "out", "progress")
    with pytest.raises(RunAlive, match="another run has taken over"):
        run(job, listener=listener)
    assert listener.num_waves == 1
    assert 1 <= len(list((tmp_path / "out").glob("manifest/*/*"))) <= 4
    assert run(job).exit_code == 0
    assert len(reader.rows(tmp_path / "out")) == 12


def test_columns_that_change_their_type_between_plans_are_read_as_text(make_job: MakeJob, tmp_path: Path) -> None:
    run(make_job(source={"rows": [{"prompt": "a", "tag": 3, "image": "mine"}]}))
    run(make_job(source={"rows": [{"prompt": "a", "tag": 3, "image": "mine"}, {"prompt": "b", "tag": "two"}]}))
    table = pipelines.read_manifest(str(tmp_path / "out"))
    assert sorted(table["tag"].to_pylist()) == ["3", "two"]
    assert "mine" in table["input.image"].to_pylist()


def test_a_takeover_asks_the_other_run_to_stop(make_job: MakeJob, tmp_path: Path) -> None:
    with Heartbeat(Store(str(tmp_path / "out")), "20260101T000000-abcdef"):
        assert run(make_job(), takeover=True).exit_code == 0
    assert (tmp_path / "out" / "_ldm" / "runs" / "20260101T000000-abcdef" / "stop").exists()


def test_a_dead_runs_heartbeat_stops_nobody(make_job: MakeJob, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"))
    heart = Heartbeat(store, "20260101T000000-abcdef")
    body = json.loads(heart.body) | {"pid": 2**22 + 1}
    store.write(heart.path, json.dumps(body).encode())
    assert run(make_job()).exit_code == 0


def test_a_part_that_is_cut_off_is_found(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(source={"rows": ["a", "b", "c"]})
    run(job)
    part = sorted((tmp_path / "out" / "manifest").rglob("*.parquet"))[0]
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(NotWhole, match=r"is not a whole part; `ldm-batch repair` makes its rows again"):
        run(job)
    part.unlink()
    assert run(job).totals.num_ok == 3


def test_status_reads_the_files_alone(make_job: MakeJob, tmp_path: Path) -> None:
    with pytest.raises(NotWhole, match="holds no plan of ldm-batch"):
        status(str(tmp_path / "out"))
    summary = run(make_job())
    totals, runs = status(str(tmp_path / "out"))
    assert totals.digest == summary.totals.digest
    assert [r["run_id"] for r in runs] == [summary.run_id]


def test_secrets_of_storage_options_are_written_nowhere(tiny_model: Path, s3_endpoint: str, tmp_path: Path) -> None:
    out = f"s3://bkt/{tmp_path.name}"
    options = {"endpoint_url": s3_endpoint, "key": "AKCANARY", "secret": "CANARY-SECRET"}
    run(make(tiny_model, out, ["a"], storage_options=options))
    store = Store(out, options)
    everything = b"".join(store.read(name) or b"" for name in store.list(""))
    assert len(everything) > 1000
    assert b"CANARY" not in everything


def test_a_run_stops_when_more_rows_fail_than_it_may_and_goes_on_when_it_may(
    make_job: MakeJob, poisoned_model: Path, tmp_path: Path
) -> None:
    # Many more shards than can be on their way while the driver reads a receipt.
    job = make_job(
        source={"rows": [f"a ring {i}" for i in range(40)] + ["a star"]},
        stage={"model": str(poisoned_model), "batch_size": 1},
        batches_per_shard=1,
        max_failed="5%",
    )
    with pytest.raises(RunFailed, match=r"^3 rows failed, max_failed is 5%; the last: model.nan: .*; what is commit"):
        run(job)
    done = pipelines.read_manifest(str(tmp_path / "out")).num_rows
    assert 3 <= done < 41
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    last = run(job.model_copy(update={"max_failed": None}))
    assert (last.exit_code, last.totals.num_failed, last.totals.num_ok) == (3, 40, 1)
    assert last.num_new_rows <= 41 - 3


class Loses:
    """Takes the plan's rows away as soon as it is made."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def measured(self, text: str) -> None: ...

    def planned(self, *_: Any) -> None:
        for path in self.out.glob("_ldm/plans/*/rows-*.parquet"):
            path.unlink()

    def started(self) -> None: ...

    def progress(self, *_: Any) -> None: ...

    def stopping(self) -> None: ...


def test_what_a_task_raises_of_ours_is_what_the_run_raises_and_nothing_beside_it(
    make_job: MakeJob, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NotWhole, match=r"rows-00000.parquet is gone; the plan cannot be followed"):
        run(make_job(), listener=Loses(tmp_path / "out"))
    assert capfd.readouterr().err == ""


def test_a_plan_of_more_shards_than_ray_hears_of_at_a_time_is_done_whole(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.runner.WAVE", 2)
    monkeypatch.setattr("pipelines.runner.WAVE_PER_CPU", 0)
    job = make_job(source={"rows": ["a ring", "a star", "a moon"]}, stage={"batch_size": 1}, batches_per_shard=1)
    summary = run(job)
    assert (summary.exit_code, summary.num_new_rows, summary.totals.num_shards_done) == (0, 3, 3)
    assert sorted(row["prompt"] for row in reader.rows(tmp_path / "out")) == ["a moon", "a ring", "a star"]
