"""What `gc` deletes and what it leaves, on a disk and on S3, seen by fsspec and an independent reader."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest

from pipelines import heartbeat
from pipelines.errors import NotWhole, RunAlive
from pipelines.gc import collect, gc
from pipelines.job import Job
from pipelines.storage import Store
from tests.faults.proxy import ALWAYS, Faults, Rule
from tests.pipelines import reader
from tests.pipelines.test_sink import sink_job, written
from tests.stores import BUCKET, Server, outside, wait_for

__all__ = ["sink_job"]  # a fixture

DAY = 24 * 3600.0
LdmBatch = Callable[..., subprocess.CompletedProcess[str]]


def files(out: str, **options: Any) -> set[str]:
    """Every file under an output, with its size, but for what runs and gc say of themselves."""
    filesystem, root = fsspec.core.url_to_fs(out, **options)
    filesystem.invalidate_cache()
    return {name.removeprefix(root) for name in filesystem.find(root)}


def orphan(folder: str, data: bytes = b"of an attempt that died") -> str:
    return f"{folder}-{hashlib.sha256(data).hexdigest()[:12]}.png"


def age(path: Path, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(path, (then, then))


@pytest.fixture
def littered(sink_job: Callable[..., Job], tmp_path: Path) -> tuple[Path, list[Path]]:
    """A finished output on a disk, all of it days old, and the files in it that no part names."""
    written(sink_job(thumbnails=32))
    out = tmp_path / "out"
    names = ["images/000000/k", "thumbnails/000000/k", "intermediates/000000/k-0001", "data/000000"]
    strays = [out / orphan(name) for name in names]
    for path in strays:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"of an attempt that died")
    for path in out.rglob("*"):
        age(path, 3)
    return out, strays


def test_what_no_part_names_goes_and_all_else_stays(littered: tuple[Path, list[Path]]) -> None:
    out, strays = littered
    kept = [out / "images" / "metadata.jsonl", out / "images" / "000000" / "mine.txt", out / "notes-0123456789ab.png"]
    for path in kept:
        path.write_bytes(b"of somebody else")
        age(path, 3)
    before = files(str(out))
    seen = reader.contents(out)
    dry = gc(str(out), dry_run=True)
    assert (dry.num_deleted, dry.num_bytes_deleted) == (4, 4 * 23)
    assert files(str(out)) == before
    garbage = gc(str(out))
    assert (garbage.num_deleted, garbage.num_bytes_deleted, garbage.num_young) == (4, 4 * 23, 0)
    assert before - files(str(out)) == {str(path).removeprefix(str(out)) for path in strays}
    assert files(str(out)) <= before
    assert reader.contents(out) == seen
    assert gc(str(out)).num_deleted == 0


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_files_of_whole_shards_are_known_by_the_rows_inside_them(
    sink_job: Callable[..., Job], tmp_path: Path, layout: str
) -> None:
    written(sink_job(layout=layout))
    out = tmp_path / "out"
    [file] = (out / "data").iterdir()
    copy = file.with_name(orphan("000000").replace(".png", file.suffix))
    shutil.copy(file, copy)
    [part] = (out / "manifest").rglob("*.parquet")
    age(file, 3)
    age(copy, 3)
    assert gc(str(out)).num_young == 1, "the part may have been replaced a moment ago"
    age(part, 3)
    assert gc(str(out)).num_deleted == 1
    assert file.exists()
    assert not copy.exists()


def test_half_written_files_of_dead_processes_go_too(littered: tuple[Path, list[Path]]) -> None:
    out, _ = littered
    old, young = (out / "manifest" / f".tmp-{i:032x}" for i in range(2))
    theirs = out / ".tmp-of-somebody"
    for path in (old, young, theirs):
        path.write_bytes(b"half")
    age(old, 3)
    age(theirs, 3)
    garbage = gc(str(out))
    assert (garbage.num_deleted, garbage.num_young) == (5, 1)
    assert (old.exists(), young.exists(), theirs.exists()) == (False, True, True)


def test_young_files_stay_and_a_file_that_is_written_again_is_young(littered: tuple[Path, list[Path]]) -> None:
    out, strays = littered
    Store(str(out)).write(str(strays[0].relative_to(out)), strays[0].read_bytes())
    garbage = gc(str(out), older_than_s=2 * DAY)
    assert (garbage.num_deleted, garbage.num_young, garbage.num_bytes_young) == (3, 1, 23)
    assert strays[0].exists()
    assert gc(str(out), older_than_s=4 * DAY).num_deleted == 0


def test_files_of_a_shard_without_a_part_stay_however_old(littered: tuple[Path, list[Path]]) -> None:
    out, strays = littered
    [part] = (out / "manifest").rglob("*.parquet")
    part.rename(out / "aside.parquet")
    before = files(str(out))
    garbage = gc(str(out))
    assert (garbage.num_deleted, garbage.num_not_done) == (0, 4 + 4)
    assert files(str(out)) == before
    # A part that somebody moved about under manifest/ still names its files.
    (out / "aside.parquet").rename(out / "manifest" / "aside.parquet")
    assert gc(str(out)).num_not_done == 4
    assert files(str(out)) >= {str(path).removeprefix(str(out)) for path in strays}


def test_a_part_that_cannot_be_read_stops_gc(littered: tuple[Path, list[Path]]) -> None:
    out, strays = littered
    [part] = (out / "manifest").rglob("*.parquet")
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(NotWhole, match="is not a whole part, so nobody can say which files it names"):
        gc(str(out))
    assert all(path.exists() for path in strays)


def test_gc_leaves_an_output_to_a_run_that_is_alive(littered: tuple[Path, list[Path]]) -> None:
    out, strays = littered
    # Younger or older than gc: it has no turn of its own.
    with heartbeat.Heartbeat(Store(str(out)), "20991231T000000-abcdef"), pytest.raises(RunAlive) as refusal:
        gc(str(out))
    assert f"run 20991231T000000-abcdef on {os.uname().nodename} (pid {os.getpid()}) is alive" in str(refusal.value)
    assert all(path.exists() for path in strays)


def test_on_s3_too(make_job: Callable[..., Job], s3_options: dict[str, Any], tmp_path: Path) -> None:
    out = f"s3://bkt/{tmp_path.name}"
    written(make_job(source={"rows": ["a", "b", "c"]}, sink={"path": out, "storage_options": s3_options}))
    store = Store(out, s3_options)
    stray = orphan("images/000000/k")
    store.write(stray, b"of an attempt that died")
    before = files(out, **s3_options)
    assert (gc(out, s3_options).num_deleted, gc(out, s3_options).num_young) == (0, 1)
    # The server's clock cannot be set; a day from now it is as old as it has to be.
    tomorrow = heartbeat.present_s(store) + DAY + 60
    assert collect(store, tomorrow, DAY, dry_run=True).num_deleted == 1
    assert files(out, **s3_options) == before
    assert collect(store, tomorrow, DAY, dry_run=False).num_deleted == 1
    assert {name.lstrip("/") for name in before - files(out, **s3_options)} == {stray}
    assert len(reader.rows(out, **s3_options)) == 3


def test_the_command_says_how_much_and_refuses_ages_that_are_none(
    littered: tuple[Path, list[Path]], ldm_batch: LdmBatch
) -> None:
    out, _ = littered
    said = ldm_batch("gc", out, "--dry-run")
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout == f"{out}: would delete 4 files that no part names, 0.0 MB\n"
    found = json.loads(ldm_batch("gc", out, "--older-than", "7d", "--json").stdout)
    assert (found["num_deleted"], found["num_young"], found["older_than_s"]) == (0, 4, 7 * DAY)
    for wrong in ("1", "0h", "5m", "a day"):
        refused = ldm_batch("gc", out, "--older-than", wrong)
        assert refused.returncode == 2
        assert refused.stderr == (
            f"--older-than {wrong}: give minutes, hours or days, one hour at least: 90m, 24h, 7d\n"
        )
    empty = ldm_batch("gc", out / "images")
    assert (empty.returncode, empty.stderr) == (4, f"{out}/images holds no plan of ldm-batch; check the path\n")


def test_parts_that_no_plan_names_are_not_passed_over(littered: tuple[Path, list[Path]]) -> None:
    # Two tables planned at once on a store that does not keep its word about "only if absent".
    from pipelines.plans import read_plans
    from pipelines.totals import count

    out, _ = littered
    [part] = (out / "manifest").rglob("*.parquet")
    other = out / "manifest" / "0123456789abcdef" / "000000.parquet"
    other.parent.mkdir()
    pq.write_table(pq.read_table(part), other)
    store = Store(str(out))
    with pytest.raises(NotWhole, match=r"0123456789abcdef/000000\.parquet: no plan names this part; move it away"):
        count(store, read_plans(store))


UPLOADER = """
import sys
from pipelines.storage import Store
Store(sys.argv[1], {"endpoint_url": sys.argv[2], "key": sys.argv[3], "secret": sys.argv[4]}).write(
    "data/000000-0123456789ab.tar", bytes(101 << 20)
)
"""


def test_uploads_that_were_killed_in_the_middle_are_given_up(
    make_job: Callable[..., Job], ceph: Server, tmp_path: Path, ldm_batch: LdmBatch
) -> None:
    server = ceph  # moto says of every upload that it is from 2010
    out = f"s3://{BUCKET}/{tmp_path.name}"
    rule = Rule("PUT", "partNumber=[23]", "delay", ALWAYS, seconds=60)
    with Faults(server.url, [rule]) as faults:
        uploader = subprocess.Popen([sys.executable, "-c", UPLOADER, out, faults.url, server.key, server.secret])
        s3 = outside.client(server)

        def parts() -> int:
            begun = s3.list_multipart_uploads(Bucket=BUCKET, Prefix=f"{tmp_path.name}/").get("Uploads", ())
            whose = [{"Bucket": BUCKET, "Key": one["Key"], "UploadId": one["UploadId"]} for one in begun]
            return sum(len(s3.list_parts(**one).get("Parts", ())) for one in whose)

        assert wait_for(lambda: rule.fired > 0 and parts() == 1, 60)
        uploader.kill()
        uploader.wait()
    sink = {"path": out, "storage_options": server.storage_options}
    written(make_job(source={"rows": ["a", "b", "c"]}, sink=sink))
    before = outside.objects(server, tmp_path.name)
    assert "data/000000-0123456789ab.tar" not in before
    environ = {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": server.key, "AWS_SECRET_ACCESS_KEY": server.secret}
    said = ldm_batch("gc", out, "--json", **environ)
    assert (said.returncode, json.loads(said.stdout)["num_young"], parts()) == (0, 1, 1), said.stderr
    # The server's clock cannot be set: everything is as old as it has to be.
    dry = gc(out, server.storage_options, older_than_s=-60, dry_run=True)
    assert (dry.num_uploads, dry.num_bytes_uploads, parts()) == (1, 50 << 20, 1)
    # Of somebody else, in the same folder.
    s3.create_multipart_upload(Bucket=BUCKET, Key=f"{tmp_path.name}/video.mp4")
    done = gc(out, server.storage_options, older_than_s=-60)
    assert (done.num_uploads, done.num_bytes_uploads, parts()) == (1, 50 << 20, 0)
    left = s3.list_multipart_uploads(Bucket=BUCKET, Prefix=f"{tmp_path.name}/")["Uploads"]
    assert [one["Key"] for one in left] == [f"{tmp_path.name}/video.mp4"]
    assert {path for path in outside.objects(server, tmp_path.name) if "_ldm" not in path} == {
        path for path in before if "_ldm" not in path
    }
