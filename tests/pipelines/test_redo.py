"""Looking at what failed or was damaged, and making it again: `errors`, `retry`, `repair`, `verify --regenerate`."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from ldm_ops.txt2img import Txt2Img
from pipelines.dead_letters import Retry, groups, write_csv
from pipelines.errors import JobError, NotWhole, RunAlive, RunFailed
from pipelines.heartbeat import Heartbeat
from pipelines.job import Job, Sink
from pipelines.planner import plan
from pipelines.runner import redo, run
from pipelines.storage import Store
from pipelines.verify import damage, verify
from tests.ldm_ops.rows import picture
from tests.pipelines.test_sink import sink_job, written
from tests.pipelines.test_verify import cut, flip

MakeJob = Callable[..., Job]
__all__ = ["sink_job"]  # a fixture

pytestmark = pytest.mark.usefixtures("ray_session")


def stored(out: Path) -> list[dict[str, Any]]:
    """Every row of every part, by nothing of ours; no key may stand twice."""
    rows = [row for path in sorted((out / "manifest").rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert len({row["key"] for row in rows}) == len(rows)
    for row in rows:
        if row["status"] == "ok" and "#" not in row["uri"]:
            assert hashlib.sha256((out / row["uri"]).read_bytes()).hexdigest() == row["sha256"]
    return sorted(rows, key=lambda row: str(row["key"]))


def files(out: Path) -> dict[str, bytes]:
    folders = [out / name for name in ("images", "data", "thumbnails")]
    return {str(p.relative_to(out)): p.read_bytes() for folder in folders for p in folder.rglob("*.*")}


def from_images(make_job: MakeJob, tmp_path: Path) -> tuple[Job, list[Path]]:
    paths = [tmp_path / "in" / f"{i}.png" for i in range(5)]
    paths[0].parent.mkdir()
    for i, path in enumerate(paths):
        Image.fromarray(picture(64, 64, seed=i)).save(path)
    rows = [{"prompt": "a circle", "image": str(path)} for path in paths]
    return make_job(source={"rows": rows}, stage={"op": "img2img"}, batches_per_shard=1), paths


def test_retry_makes_the_failed_rows_again_and_leaves_the_others(make_job: MakeJob, tmp_path: Path) -> None:
    job, paths = from_images(make_job, tmp_path)
    out = tmp_path / "out"
    plan(job)
    moved = [path.rename(path.with_suffix(".away")) for path in paths[:2]]
    # As a run whose images vanish after its plan was made.
    first = redo(job, lambda store, plans: {(p.plan_id, s.index): None for p in plans for s in p.shards})
    assert (first.exit_code, first.totals.num_failed) == (3, 2)
    assert {row["attempt"] for row in stored(out)} == {1}
    before = stored(out)
    [kind] = {row["error_type"] for row in before if row["status"] == "failed"}
    with pytest.raises(JobError, match=f"--error-type model.oom: no row of .* failed so; one of {kind}"):
        redo(job, Retry(["model.oom"]))

    # Still away: as before, but for the number of the attempt.
    again = redo(job, Retry([kind]))
    assert (again.exit_code, again.num_new_rows, again.totals.num_failed) == (3, 2, 2)
    assert {row["attempt"] for row in stored(out) if row["status"] == "failed"} == {2}

    for path in moved:
        path.rename(path.with_suffix(".png"))
    mended = redo(job, Retry())
    assert (mended.exit_code, mended.num_new_rows, mended.totals.num_ok) == (0, 2, 5)
    after = stored(out)
    for old, new in zip(before, after, strict=True):
        assert new["status"] == "ok"
        assert (new == old) is (old["status"] == "ok")
        assert new["attempt"] == (1 if old["status"] == "ok" else 3)
    assert json.loads((out / "_SUCCESS").read_text())["num_ok"] == 5
    assert verify(str(out), deep=True).faults == []
    # The same pictures as if nothing had ever been wrong.
    undisturbed = job.model_copy(update={"sink": job.sink.model_copy(update={"path": str(tmp_path / "other")})})
    run(undisturbed)
    assert files(out) == files(tmp_path / "other")
    assert (redo(job, Retry()).num_new_rows, run(job).num_new_rows) == (0, 0)


@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_repair_brings_back_every_byte_that_was_lost(make_job: MakeJob, tmp_path: Path, layout: str) -> None:
    out = tmp_path / "out"
    rows = [f"a circle {i}" for i in range(8)]
    job = make_job(
        source={"rows": rows}, sink={"path": str(out), "layout": layout, "thumbnails": 16}, batches_per_shard=1
    )
    run(job)
    whole, contents = stored(out), files(out)
    made = verify(str(out), regenerate=3).regenerated
    assert made is not None
    assert (made.num_rows, made.num_same) == (3, 3)

    first, second, third, *_ = sorted((out / ("images" if layout == "files" else "data")).rglob("*.*"))
    first.unlink()
    cut(second)
    flip(third)
    part, gone = sorted((out / "manifest").rglob("*.parquet"))[2:4]
    cut(part)
    gone.unlink()
    sorted((out / "thumbnails").rglob("*.jpg"))[-1].unlink()
    with pytest.raises(NotWhole):
        run(job)
    assert verify(str(out)).num_faults >= 3
    assert verify(str(out), deep=True).num_faults > verify(str(out)).num_faults

    mended = redo(job, lambda store, plans: damage(store))
    assert (mended.exit_code, mended.totals.num_ok) == (0, 8)
    assert verify(str(out), deep=True).faults == []
    assert [(row["key"], row["sha256"]) for row in stored(out)] == [(row["key"], row["sha256"]) for row in whole]
    assert files(out).items() >= contents.items()
    assert redo(job, lambda store, plans: damage(store)).num_new_rows == 0


def test_a_row_that_comes_out_otherwise_is_a_fault(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(source={"rows": ["a circle"]})
    run(job)
    [part] = (tmp_path / "out" / "manifest").rglob("*.parquet")
    table = pq.read_table(part)
    [row] = table.to_pylist()
    other = row["sha256"][::-1]
    at = table.schema.get_field_index("sha256")
    pq.write_table(table.set_column(at, table.schema.field(at), [[other]]), part)
    report = verify(str(tmp_path / "out"), regenerate=1)
    assert report.regenerated is not None
    assert (report.regenerated.num_rows, report.regenerated.num_same) == (1, 0)
    assert f"{row['uri']}: made again it has other bytes (then on cpu" in "\n".join(report.faults)


def test_rows_are_made_again_in_batches_of_the_size_that_memory_left_them(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_job(source={"rows": [f"a circle {i}" for i in range(3)]}))
    part = next((tmp_path / "out" / "manifest").rglob("*.parquet"))
    table = pq.read_table(part)
    rows = table.to_pylist()
    planned = rows[0]["stages"][0]["batch_size"]
    rows[0]["stages"][0]["batch_size"] = planned - 1
    pq.write_table(pa.Table.from_pylist(rows, table.schema), part)
    sizes = []
    make = Txt2Img.run

    def noted(self: Txt2Img, model: Any, some: Any) -> Any:
        sizes.append(len(some))
        return make(self, model, some)

    monkeypatch.setattr(Txt2Img, "run", noted)
    made = verify(str(tmp_path / "out"), regenerate=3).regenerated
    assert made is not None
    assert (made.num_rows, set(sizes)) == (3, {planned - 1, planned})


@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_repair_loses_no_picture_that_it_cannot_make_again(make_job: MakeJob, tmp_path: Path, layout: str) -> None:
    job, paths = from_images(make_job, tmp_path)
    job = job.model_copy(update={"sink": Sink(path=str(tmp_path / "out"), layout=layout, thumbnails=16)})
    run(job)
    before, whole = stored(tmp_path / "out"), files(tmp_path / "out")
    for path in paths:
        path.unlink()
    for path in (tmp_path / "out" / "thumbnails").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(NotWhole, match=r"5 rows could not be made again \(image.missing: .*; they stay as they were"):
        redo(job, lambda store, plans: damage(store))
    assert stored(tmp_path / "out") == before
    assert files(tmp_path / "out") == {name: data for name, data in whole.items() if "thumbnails" not in name}
    # What is lost is a dead letter, and what is not stays.
    first = sorted((tmp_path / "out" / ("images" if layout == "files" else "data")).rglob("*.*"))[0]
    first.unlink()
    with pytest.raises(NotWhole, match="rows could not be made again"):
        redo(job, lambda store, plans: damage(store))
    lost = {row["key"] for row in before if row["uri"].partition("#")[0] == str(first.relative_to(tmp_path / "out"))}
    for row in stored(tmp_path / "out"):
        assert row["status"] == ("failed" if row["key"] in lost else "ok")


def test_an_unfinished_output_is_finished_by_run_and_max_failed_counts_the_rows_made_again(
    make_job: MakeJob, tmp_path: Path
) -> None:
    job, paths = from_images(make_job, tmp_path)
    plan(job)
    paths[0].rename(paths[0].with_suffix(".away"))
    with pytest.raises(NotWhole, match="5 rows planned, 2 in the manifest .*; `ldm-batch run` does the rest"):
        redo(job, lambda store, plans: {(plans[0].plan_id, 0): None})
    assert redo(job, lambda store, plans: {(plans[0].plan_id, n): None for n in (1, 2)}).totals.num_failed == 1
    # One row is made again, and fails: all there is, though another one stands in its shard.
    strict = job.model_copy(update={"max_failed": "50%"})
    with pytest.raises(RunFailed, match="1 rows failed, max_failed is 50%"):
        redo(strict, Retry())


def test_a_run_that_is_alive_is_no_place_for_options_that_retry_has_not(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job()
    plan(job)
    with (
        Heartbeat(Store(str(tmp_path / "out")), "20260101T000000-abcdef"),
        pytest.raises(RunAlive, match=r"is alive, .*; wait until it has ended, then give the same command again$"),
    ):
        redo(job, Retry())


def test_errors_are_grouped_and_their_table_computes_nothing(sink_job: MakeJob, tmp_path: Path) -> None:
    job = sink_job()
    rows = [{"prompt": f"=SUM(A{i}) fails"} for i in range(4)] + [{"prompt": "a circle"}]
    job = job.model_copy(update={"source": job.source.model_copy(update={"rows": rows})})
    written(job, rows=5)
    [group] = groups(str(tmp_path / "out"))
    assert (group.stage, group.error_type, group.num_rows, len(group.examples)) == ("txt2img", "x", 4, 3)
    assert write_csv(str(tmp_path / "out"), tmp_path / "dead.csv") == 4
    with (tmp_path / "dead.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert sorted(row["prompt"] for row in found) == [f"'=SUM(A{i}) fails" for i in range(4)]
    nowhere = tmp_path / "nothing"
    with pytest.raises(NotWhole, match="holds no plan"):
        groups(str(nowhere))
    with pytest.raises(NotWhole, match="holds no plan"):
        redo(job.model_copy(update={"sink": Sink(path=str(nowhere))}), Retry())
    assert not nowhere.exists()


@pytest.mark.parametrize("sign", ["=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠"])
def test_no_cell_of_the_table_of_errors_is_a_formula(sink_job: MakeJob, tmp_path: Path, sign: str) -> None:
    printable = sign if sign.isprintable() else ""
    rows = [{"prompt": f"{sign}1+1 fails", "id": f"{printable}x"}, {"prompt": "a circle", "id": "fine"}]
    job = sink_job()
    written(job.model_copy(update={"source": job.source.model_copy(update={"rows": rows})}), rows=2)
    write_csv(str(tmp_path / "out"), tmp_path / "dead.csv")
    with (tmp_path / "dead.csv").open(newline="", encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert row["prompt"] == f"'{sign}1+1 fails"
    assert row["id"] == (f"'{sign}x" if printable else "x")


def test_a_table_of_errors_that_cannot_be_written_is_one_line(sink_job: MakeJob, tmp_path: Path) -> None:
    written(sink_job())
    for path in (tmp_path, tmp_path / "no" / "where.csv", Path("/dev/full")):
        with pytest.raises(JobError, match="--csv .*: cannot be written .*; choose another file"):
            write_csv(str(tmp_path / "out"), path)


def test_the_commands_say_what_there_is_to_do(make_job: MakeJob, ldm_batch: Any, tmp_path: Path) -> None:
    job = make_job(source={"rows": ["a circle", "a star"], "on_bad_row": "fail"})
    rows = [{"prompt": "a circle"}, {"prompt": "a star", "height": 63}]
    job = job.model_copy(update={"source": job.source.model_copy(update={"rows": rows})})
    assert run(job).totals.num_failed == 1
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job.recorded()))
    found = ldm_batch("errors", path)
    assert found.returncode == 3
    assert found.stdout.startswith("1 × row.invalid in plan\n  rows row 2: height 63")
    found = json.loads(ldm_batch("errors", path, "--json").stdout)
    assert (found["output"], found["num_failed"], found["exit_code"]) == (str(tmp_path / "out"), 1, 3)
    found = ldm_batch("retry", path, "--json")
    assert found.returncode == 3
    assert (json.loads(found.stdout)["num_new_rows"], json.loads(found.stdout)["num_wrong"]) == (0, 1)
    found = ldm_batch("retry", path, "--error-type", "model.nan")
    assert (found.returncode, found.stderr.count("\n")) == (2, 1)
    assert "no row of" in found.stderr
    found = ldm_batch("repair", path)
    assert (found.returncode, found.stderr) == (3, "nothing is left to do\n")
    found = ldm_batch("retry", path)
    assert f"next:\n  ldm-batch errors {tmp_path / 'out'}\n" in found.stdout
    assert "1 rows are wrong in the table; mend them there" in found.stdout
