"""What is promised on stores, on real ones: Ceph keeps its word on conditional writes, rclone and Swift do not."""

from __future__ import annotations

import hashlib
import os
import pickle
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines import doctor, storage
from pipelines.commit import commit, commit_shard, content_name
from pipelines.errors import StorageError
from pipelines.job import Job
from pipelines.manifest import PartHead, attempt_of, keys_digest, part_bytes, part_path
from pipelines.runner import run
from pipelines.storage import Store
from tests.faults.proxy import ALWAYS, Faults, Rule, storm
from tests.stores import BUCKET, Server, outside, wait_for
from tests.stores.ceph import Ceph

WRITERS = 16


@pytest.fixture(params=["ceph", "rclone", "swift"])
def server(request: pytest.FixtureRequest) -> Server:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def attempt(shard: int, num_rows: int = 2) -> tuple[list[tuple[str, bytes]], bytes, str]:
    """Files, part and id of an attempt whose bytes are like no other's, as those of another kind of GPU would be."""
    own = uuid.uuid4().hex
    files, rows = [], []
    for n in range(num_rows):
        data = f"{own} {n}".encode() * 100
        uri, sha256 = content_name(f"images/{shard:06d}/k{n}", data, "png")
        files.append((uri, data))
        rows.append({"key": f"{shard} {n}", "status": "ok", "uri": uri, "sha256": sha256, "num_bytes": len(data)})
    head = PartHead("0123", shard, own, num_rows, num_rows, 0, 0, keys_digest(row["key"] for row in rows))
    return files, part_bytes(pa.Table.from_pylist(rows), head), own


def test_of_writers_at_the_same_moment_one_wins_or_all_agree(server: Server, tmp_path: Path) -> None:
    prefix, rounds = f"race-{tmp_path.name}", 2 if kind(server) == "swift" else 4
    store = Store(f"s3://{BUCKET}/{prefix}", server.storage_options)
    store.probe()
    for shard in range(rounds):
        attempts = [attempt(shard) for _ in range(WRITERS)]
        barrier = threading.Barrier(WRITERS)
        said = ["silent"] * WRITERS

        def write(
            n: int,
            attempts: list[Any] = attempts,
            barrier: threading.Barrier = barrier,
            said: list[str] = said,
            path: str = part_path("0123", shard),
        ) -> None:
            files, part, own = attempts[n]
            for file in files:
                store.write(*file)
            barrier.wait()
            said[n] = commit_shard(store, [], path, lambda: part, own, attempt_of)

        threads = [threading.Thread(target=write, args=(n,)) for n in range(WRITERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(said) <= {"mine", "theirs"}
        assert said.count("mine") >= 1
        if isinstance(server, Ceph):
            assert said.count("mine") == 1
            standing = store.read(part_path("0123", shard))
            assert standing is not None
            assert attempt_of(standing) == attempts[said.index("mine")][2]
    found = outside.objects(server, prefix)
    assert len(outside.whole_rows(found)) == 2 * rounds
    # Nothing that came second has been deleted in passing.
    assert sum(path.startswith("images/") for path in found) == 2 * rounds * WRITERS


@pytest.mark.parametrize("action", ["lose_reply", "drop", "status", "cut_request", "cut_reply"])
def test_ceph_holds_what_we_say_we_committed_whatever_became_of_the_answer(
    ceph: Ceph, tmp_path: Path, action: str
) -> None:
    prefix = f"answer-{tmp_path.name}"
    rule = Rule("PUT", r"/000000\.parquet$", action, 2, 409, "ConditionalRequestConflict")  # type: ignore[arg-type]
    with Faults(ceph.url, [rule]) as faults:
        store = Store(f"s3://{BUCKET}/{prefix}", {**ceph.storage_options, "endpoint_url": faults.url})
        files, part, own = attempt(0)
        assert commit_shard(store, files, part_path("0123", 0), lambda: part, own, attempt_of) == "mine"
        late = attempt(0)
        assert commit(store, part_path("0123", 0), late[1], late[2], attempt_of) == "theirs"
    assert rule.fired == 2 if action in ("drop", "status", "cut_request") else rule.fired >= 1
    rows = outside.whole_rows(outside.objects(ceph, prefix))
    assert [row["uri"] for row in rows] == [uri for uri, _ in files]


@pytest.mark.timeout(400)  # two whole runs and an outage
def test_a_run_goes_on_through_a_storm_and_an_outage_and_ends_in_the_same_bytes(
    make_job: Callable[..., Job], ray_session: None, ceph: Ceph, rclone: Server, tmp_path: Path
) -> None:
    rows = [f"a red circle {n}" for n in range(8)]

    def job(server: Server, url: str) -> Job:
        options = {**server.storage_options, "endpoint_url": url}
        sink = {"path": f"s3://{BUCKET}/run-{tmp_path.name}", "storage_options": options}
        return make_job(batches_per_shard=1, sink=sink, source={"rows": rows})

    class Away:
        """Once the first shard is there, the gateway is gone, longer than an endpoint is given that nobody reached."""

        away_s = 0.0

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_: None

        def progress(self, *_: object) -> None:
            if not self.away_s:
                self.away_s = storage.FIRST_PATIENCE_S + 2
                ceph.kill_gateway()
                threading.Timer(self.away_s, ceph.start_gateway).start()

    away = Away()
    with Faults(ceph.url, storm(0.2), seed=5) as faults:
        begun = time.monotonic()
        summary = run(job(ceph, faults.url), listener=away)
        assert time.monotonic() - begun > away.away_s > 0
        assert sum(rule.fired for rule in faults.rules) > 0.1 * len(faults.seen)
    assert (summary.exit_code, summary.num_new_rows) == (0, 8)
    assert run(job(rclone, rclone.url)).exit_code == 0
    seen = [outside.objects(server, f"run-{tmp_path.name}") for server in (ceph, rclone)]
    digests = [{row["key"]: row["sha256"] for row in outside.whole_rows(found)} for found in seen]
    assert len(digests[0]) == 8
    assert digests[0] == digests[1]
    # Nobody made a row twice: each part is of the one attempt that wrote its files.
    assert {row["attempt"] for row in outside.whole_rows(seen[0])} == {1}


def test_doctor_tells_the_stores_apart(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ROUNDS", 8)
    monkeypatch.setattr(doctor, "READS", 4)
    found = doctor.doctor(f"s3://{BUCKET}/doctor-{tmp_path.name}", server.storage_options)
    said = {finding.name: finding.verdict for finding in found.findings}
    race, create = said.pop("one winner"), said.pop("create if absent")
    # Swift refuses an object that stands, and lets several in that come at once; rclone refuses nothing.
    assert (create, race) == {"rclone": ("weak", "weak"), "ceph": ("ok", "ok"), "swift": ("ok", "weak")}[kind(server)]
    assert set(said.values()) == {"ok"}
    assert found.mode.startswith("conditional writes" if kind(server) == "ceph" else "read-back")
    assert found.exit_code == 0
    if kind(server) != "rclone":
        # What writers at the same moment made, rclone may go on listing when it is gone.
        assert outside.objects(server, f"doctor-{tmp_path.name}") == {}


def kind(server: Server) -> str:
    return "ceph" if isinstance(server, Ceph) else "swift" if server.key == "test:tester" else "rclone"


@pytest.mark.parametrize(
    ("bucket", "wrong", "says"),
    [
        (BUCKET, {"secret": "CANARY"}, r"refuses these credentials \(SignatureDoesNotMatch\); check AWS_ACCESS_KEY_ID"),
        (BUCKET, {"key": "NOBODY"}, r"refuses these credentials \(InvalidAccessKeyId\); check AWS_ACCESS_KEY_ID"),
        ("no-such-bucket", {}, "no such bucket; create it, or choose another path"),
    ],
)
def test_what_ceph_refuses_is_one_line_within_seconds(
    ceph: Ceph, bucket: str, wrong: dict[str, str], says: str
) -> None:
    begun = time.monotonic()
    with pytest.raises(StorageError, match=says) as caught:
        Store(f"s3://{bucket}/x", {**ceph.storage_options, **wrong}).probe()
    assert time.monotonic() - begun < 5
    assert "\n" not in str(caught.value)
    assert "CANARY" not in str(caught.value)


def test_credentials_that_end_stop_a_run_at_once(ceph: Ceph) -> None:
    ceph.admin("key", "create", "--uid=t", "--access-key=AKSHORT", "--secret-key=SKSHORT")
    store = Store(f"s3://{BUCKET}/ends", {**ceph.storage_options, "key": "AKSHORT", "secret": "SKSHORT"})
    store.probe()
    ceph.admin("key", "rm", "--uid=t", "--access-key=AKSHORT", "--key-type=s3")
    begun = time.monotonic()
    for attempt_at in (lambda: store.write("a", b"x"), lambda: store.create("b", b"x"), lambda: store.list("")):
        with pytest.raises(StorageError, match="refuses these credentials"):
            attempt_at()
    assert time.monotonic() - begun < 5


def test_a_store_that_was_reached_is_waited_for_and_another_is_not(
    ceph: Ceph, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(f"s3://{BUCKET}/away", ceph.storage_options)
    never = Store(store.url, store.storage_options)
    store.write("before", b"x")
    monkeypatch.setattr(storage, "FIRST_PATIENCE_S", 1.0)
    monkeypatch.setattr(storage, "SAY_AFTER_S", 1.0)
    # A worker gets the store with what is known of it.
    worker = pickle.loads(pickle.dumps(store))
    files, part, own = attempt(0)
    ceph.kill_gateway()
    try:
        begun = time.monotonic()
        with pytest.raises(StorageError, match=r"no answer for \d s .*; check the endpoint and the network"):
            never.probe()
        assert time.monotonic() - begun < 3
        timer = threading.Timer(3, ceph.start_gateway)
        timer.start()
        assert commit_shard(worker, files, part_path("0123", 0), lambda: part, own, attempt_of) == "mine"
        assert time.monotonic() - begun > 3
        timer.join()
    finally:
        if "radosgw" not in ceph.processes:
            ceph.start_gateway()
    assert "tries for 600 s in all" in caplog.text
    found = outside.objects(ceph, "away")
    assert found["before"] == b"x", "what was acknowledged is lost"
    assert len(outside.whole_rows(found)) == 2


def test_a_large_object_whose_upload_was_cut_is_whole_in_the_end_and_leaves_no_parts(ceph: Ceph) -> None:
    body = os.urandom(1 << 20) * 101
    rules = [Rule("PUT", "partNumber=2", "cut_request"), Rule("PUT", "partNumber=1", "lose_reply", ALWAYS, share=0.5)]
    with Faults(ceph.url, rules, seed=1) as faults:
        store = Store(f"s3://{BUCKET}/large", {**ceph.storage_options, "endpoint_url": faults.url})
        store.write("data/000000-0123456789ab.tar", body)
        assert rules[0].fired == 1
    s3 = outside.client(ceph)
    got = s3.get_object(Bucket=BUCKET, Key="large/data/000000-0123456789ab.tar")["Body"].read()
    assert hashlib.sha256(got).digest() == hashlib.sha256(body).digest()
    assert wait_for(lambda: not s3.list_multipart_uploads(Bucket=BUCKET, Prefix="large/").get("Uploads"), 5)
