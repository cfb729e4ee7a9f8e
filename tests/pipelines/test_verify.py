"""What `verify` finds when it reads an output back: nothing where nothing is wrong, and each thing that is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import JobError, NotWhole
from pipelines.job import Job
from pipelines.plans import read_plans
from pipelines.storage import Store
from pipelines.totals import count, write_success
from pipelines.verify import psnr_db, verify
from tests.pipelines.test_sink import sink_job, written

__all__ = ["sink_job"]  # a fixture


def whole(job: Job) -> None:
    written(job)
    store = Store(job.sink.path, job.sink.storage_options)
    write_success(store, count(store, read_plans(store)))


@pytest.mark.parametrize(("layout", "files"), [("files", 4), ("webdataset", 3), ("parquet", 3)])
def test_an_output_that_is_whole_is_said_to_be(
    sink_job: Callable[..., Job], tmp_path: Path, layout: str, files: int
) -> None:
    whole(sink_job(layout=layout, thumbnails=32))
    report = verify(str(tmp_path / "out"), deep=True)
    assert (report.exit_code, report.faults, report.totals.num_ok, report.totals.num_failed) == (0, [], 2, 1)
    assert (report.num_rows_read, report.num_files_read) == (3, files)
    assert report.num_bytes_read == sum(
        path.stat().st_size
        for folder in ("images", "data", "thumbnails")
        for path in (tmp_path / "out" / folder).rglob("*.*")
    )


def test_an_output_of_a_version_without_later_columns_is_read_too(sink_job: Callable[..., Job], tmp_path: Path) -> None:
    whole(sink_job())
    for part in (tmp_path / "out" / "manifest").rglob("*.parquet"):
        table = pq.read_table(part)
        pq.write_table(table.drop_columns(["thumbnail", "embeddings_row", "lora"]), part)
    assert verify(str(tmp_path / "out"), deep=True).faults == []


def of(folder: str) -> Callable[[Path], Path]:
    return lambda out: sorted(path for path in (out / folder).rglob("*.*") if path.is_file())[0]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def tell_other(column: str, value: Any) -> Callable[[Path], None]:
    """A part that says something else of its rows, and is whole by itself."""

    def change(path: Path) -> None:
        table = pq.read_table(path)
        values = [value if old is not None else None for old in table[column].to_pylist()]
        at = table.schema.get_field_index(column)
        pq.write_table(
            table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type)), path
        )

    return change


@pytest.mark.parametrize(
    ("layout", "where", "harm", "fault"),
    [
        ("files", of("images"), Path.unlink, r"images/000000/\w+-\w+.png: missing$"),
        ("files", of("images"), cut, r"images/.*: \d+ bytes, not what its name says; it was cut off or changed"),
        ("files", of("images"), flip, "images/.*: .*not what its name says"),
        ("files", of("thumbnails"), Path.unlink, r"thumbnails/000000/\w+-\w+.jpg: missing"),
        ("files", of("manifest"), tell_other("sha256", "0" * 64), "images/.*: other content than the manifest says"),
        ("files", of("manifest"), tell_other("num_bytes", 5), r"images/.*: \d+ bytes, not 5"),
        ("files", of("manifest"), tell_other("uri", None), "a row that is ok: missing"),
        ("files", of("manifest"), cut, "manifest/.*/000000.parquet: not a whole part"),
        ("files", of("manifest"), Path.unlink, "manifest/.*/000000.parquet: missing; its shard is not done"),
        ("files", lambda out: out / "_SUCCESS", Path.unlink, "_SUCCESS: missing, though all is there"),
        ("files", lambda out: out / "_SUCCESS", cut, "_SUCCESS: cut off, or not of ldm-batch"),
        ("webdataset", of("data"), Path.unlink, r"data/000000-\w+.tar: missing \(2 rows\)"),
        ("webdataset", of("data"), cut, "data/.*.tar: .*not what its name says"),
        ("parquet", of("data"), flip, "data/.*.parquet: .*not what its name says"),
        ("parquet", of("manifest"), tell_other("sha256", "0" * 64), "data/.*#[01]: other content than the manifest"),
    ],
)
def test_each_harm_is_one_line(
    sink_job: Callable[..., Job],
    tmp_path: Path,
    layout: str,
    where: Callable[[Path], Path],
    harm: Callable[[Path], None],
    fault: str,
) -> None:
    import re

    whole(sink_job(layout=layout, thumbnails=32))
    harm(where(tmp_path / "out"))
    report = verify(str(tmp_path / "out"), deep=True)
    assert report.exit_code == 4
    assert re.match(fault, report.faults[0]), report.faults
    assert all("\n" not in line for line in report.faults)


def test_a_picture_that_a_tar_lacks_is_found(sink_job: Callable[..., Job], tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole(sink_job(layout="webdataset"))
    tar = of("data")(out)
    tell_other("uri", f"data/{tar.name}#other.png")(of("manifest")(out))
    assert verify(str(out), deep=True).faults[0] == f"data/{tar.name}#other.png: not in that file"


def test_parts_that_no_plan_names_and_counts_that_disagree_are_found(
    sink_job: Callable[..., Job], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    whole(sink_job())
    part = of("manifest")(out)
    shutil.copy(part, part.with_name("000007.parquet"))
    said = json.loads((out / "_SUCCESS").read_text())
    (out / "_SUCCESS").write_text(json.dumps(said | {"num_ok": 9}))
    first, second = verify(str(out), deep=True).faults
    assert first.endswith("000007.parquet: no plan names this part")
    assert second.startswith("_SUCCESS: says num_ok 9, the manifest 2; run the job again")
    shutil.rmtree(out / "_ldm" / "plans")
    with pytest.raises(NotWhole, match="holds no plan of ldm-batch"):
        verify(str(out), deep=True)


def test_a_sample_reads_the_files_of_so_many_rows_chosen_by_its_seed(
    sink_job: Callable[..., Job], tmp_path: Path
) -> None:
    whole(sink_job())
    pictures = sorted((tmp_path / "out" / "images").rglob("*.png"))
    flip(pictures[0])
    reports = [verify(str(tmp_path / "out"), sample=1, seed=seed) for seed in range(32)]
    assert {report.num_files_read for report in reports} == {1}
    assert {report.exit_code for report in reports} == {0, 4}
    again = [verify(str(tmp_path / "out"), sample=1, seed=seed) for seed in range(32)]
    assert again == reports


def test_what_is_missing_is_told_once_whoever_looks_for_it(sink_job: Callable[..., Job], tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole(sink_job())
    of("images")(out).unlink()
    report = verify(str(out), sample=5)
    assert (report.num_faults, report.num_files_read) == (1, 1)
    report = verify(str(out), deep=True, sample=5)
    assert (report.num_faults, report.num_rows_read) == (1, 3)


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_a_file_of_pictures_that_is_cut_off_is_found_by_listing(
    sink_job: Callable[..., Job], tmp_path: Path, layout: str
) -> None:
    whole(sink_job(layout=layout))
    path = of("data")(tmp_path / "out")
    path.write_bytes(path.read_bytes()[:2000])
    [fault] = verify(str(tmp_path / "out")).faults
    assert fault.startswith(f"data/{path.name}: 2000 bytes, fewer than the ")


def test_planned_rows_are_read_too_in_a_deep_look(sink_job: Callable[..., Job], tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole(sink_job())
    [rows] = out.glob("_ldm/plans/*/rows-*.parquet")
    rows.write_bytes(rows.read_bytes()[:-20])
    [fault] = verify(str(out), deep=True).faults
    assert fault.startswith(f"{rows} is damaged")
    rows.unlink()
    [fault] = verify(str(out), deep=True).faults
    assert fault.startswith(f"{rows} is gone")


@pytest.mark.parametrize("uri", ["/dev/zero", "images/../../elsewhere"])
def test_what_a_stranger_names_outside_of_an_output_is_not_opened(
    sink_job: Callable[..., Job], tmp_path: Path, uri: str
) -> None:
    out = tmp_path / "out"
    whole(sink_job())
    tell_other("uri", uri)(of("manifest")(out))
    for deep in (False, True):
        report = verify(str(out), deep=deep, sample=2)
        assert report.faults == [f"{uri}: lies outside of this output"] * 2
        assert report.num_bytes_read == 0


def test_a_mark_that_says_other_numbers_is_written_anew(sink_job: Callable[..., Job], tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole(sink_job())
    said = json.loads((out / "_SUCCESS").read_text())
    (out / "_SUCCESS").write_text(json.dumps(said | {"num_ok": 9}))
    store = Store(str(out))
    write_success(store, count(store, read_plans(store)))
    assert verify(str(out)).faults == []


def test_only_latents_can_be_decoded(sink_job: Callable[..., Job], tmp_path: Path) -> None:
    whole(sink_job())
    with pytest.raises(JobError, match="holds no latents to decode; --decode is for the output of an encode job"):
        verify(str(tmp_path / "out"), deep=True, decode=1)


def test_psnr_is_that_of_its_definition() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert psnr_db(black, black + 255) == 0
    assert psnr_db(black, black + 1) == pytest.approx(48.1308, abs=1e-3)
    assert psnr_db(black, black) == 100


def test_the_command_says_it_in_lines_and_in_json_on_object_storage_too(
    make_job: Callable[..., Job], ldm_batch: Any, s3_options: dict[str, Any], tmp_path: Path
) -> None:
    url = f"s3://bkt/{tmp_path.name}"
    rows = [{"prompt": "a"}, {"prompt": "b b"}]
    job = make_job(source={"rows": rows}, sink={"path": url, "layout": "webdataset", "storage_options": s3_options})
    written(job, rows=2)
    store = Store(url, s3_options)
    write_success(store, count(store, read_plans(store)))
    found = ldm_batch("verify", url, "--deep", "--json", AWS_ENDPOINT_URL=s3_options["endpoint_url"])
    assert (found.returncode, json.loads(found.stdout)["whole"]) == (0, True)
    [tar] = store.list("data")
    store.delete(tar)
    found = ldm_batch("verify", url, AWS_ENDPOINT_URL=s3_options["endpoint_url"])
    assert (found.returncode, found.stderr) == (4, f"{tar}: missing (2 rows)\n")
    assert found.stdout.startswith(f"{url}: not whole\n2 ok, 0 failed")
