"""A store on a disk and on S3: the same behaviour, checked with independent readers."""

from __future__ import annotations

import os
import pickle
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import fsspec
import pytest

from pipelines import storage
from pipelines.errors import JobError, StorageError
from pipelines.listing import list_files
from pipelines.storage import Exists, Store
from tests.conftest import free_port, start_moto
from tests.faults.proxy import ALWAYS, Faults, Rule


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return Store(str(tmp_path / "store"))
    return Store(f"s3://bkt/{tmp_path.name}", request.getfixturevalue("s3_options"))


def test_what_is_written_is_read_back(store: Store) -> None:
    assert store.read("a/b.bin") is None
    store.write("a/b.bin", b"one")
    store.write("a/b.bin", b"two")
    assert store.read("a/b.bin") == b"two"
    assert {name: info.num_bytes for name, info in store.list("a").items()} == {"a/b.bin": 3}
    assert store.list("nowhere") == {}
    store.delete("a/b.bin")
    store.delete("a/b.bin")
    assert store.read("a/b.bin") is None


def test_create_never_replaces(store: Store) -> None:
    store.create("x/part", b"first")
    with pytest.raises(Exists):
        store.create("x/part", b"second")
    assert store.read("x/part") == b"first"


def test_one_of_many_creators_wins_on_a_disk(tmp_path: Path) -> None:
    # On S3: tests/stores, as moto does not promise what a race ends in.
    store = Store(str(tmp_path / "store"))
    for round_ in range(3):
        won: list[int] = []
        barrier = threading.Barrier(8)

        def create(i: int, name: str = f"race/{round_}", won: list[int] = won, barrier: Any = barrier) -> None:
            mine = Store(store.url, store.storage_options)
            barrier.wait()
            try:
                mine.create(name, str(i).encode())
                won.append(i)
            except Exists:
                pass

        threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert store.read(f"race/{round_}") == str(won[0]).encode()


def test_a_disk_store_leaves_no_temporary_file_behind(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write("a/x", b"1")
    store.create("a/y", b"2")
    with pytest.raises(Exists):
        store.create("a/y", b"3")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["x", "y"]


def test_one_object_is_one_request(s3_endpoint: str) -> None:
    with Faults(s3_endpoint) as faults:
        store = Store("s3://bkt/requests", {"endpoint_url": faults.url})
        store.write("warm", b"up")
        before = len(faults.seen)
        store.write("a", b"x" * 200_000)
        store.create("b", b"y")
        store.write_each([("c", b"z")])
        assert (store.read("a"), store.read("b", 0, 1), store.read("d")) == (b"x" * 200_000, b"y", None)
        store.delete("a")
        asked = [("PUT", "a"), ("PUT", "b"), ("PUT", "c"), ("GET", "a"), ("GET", "b"), ("GET", "d"), ("DELETE", "a")]
        assert faults.seen[before:] == [(method, f"/bkt/requests/{name}") for method, name in asked]


def test_stores_that_come_to_a_process_share_a_connection_and_its_own_do_not(s3_options: dict[str, Any]) -> None:
    here, other = Store("s3://bkt/shared", s3_options), Store("s3://bkt/shared", {**s3_options, "anon": True})
    came = [pickle.loads(pickle.dumps(store)) for store in (here, here, other)]
    came[0].write("a", b"x")
    assert came[1].read("a") == b"x"
    assert len({id(store.filesystem) for store in (*came, here, Store("s3://bkt/shared", s3_options))}) == 4


def test_of_many_files_each_is_synced_and_then_their_folders_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    files = {f"{folder}/{i}": f"{folder} {i}".encode() for folder in "ab" for i in range(20)}
    Store(str(tmp_path)).write_each(files.items())
    assert sorted(synced[40:]) == [tmp_path / "a", tmp_path / "b"]
    assert len({path for path in synced[:40] if path.parent in synced[40:]}) == 40
    assert {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files


def test_hiccups_of_a_store_are_retried(s3_endpoint: str) -> None:
    faults = Faults(s3_endpoint)
    store = Store("s3://bkt/hiccups", {"endpoint_url": faults.url})
    rules = [Rule("PUT", "/a$", "status", times=2), Rule("PUT", "/a$", "lose_reply"), Rule("GET", "/a$", "drop")]
    faults.rules += rules
    store.write("a", b"x")
    assert store.read("a") == b"x"
    assert [rule.fired for rule in rules] == [2, 1, 1]
    faults.close()


class ManyObjects:
    """An S3 server that lists so many objects and holds none; `pages` are the requests for them."""

    def __init__(self, num_objects: int) -> None:
        self.pages = 0
        many = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = parse_qs(urlsplit(self.path).query)
                first = int(asked.get("continuation-token", ["0"])[0])
                many.pages += 1
                last = min(first + 1000, num_objects)
                listed = "".join(
                    f"<Contents><Key>in/{i:08d}.png</Key><Size>{i}</Size><ETag>&quot;{i:x}&quot;</ETag>"
                    "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                    for i in range(first, last)
                )
                more = "true" if last < num_objects else "false"
                token = f"<NextContinuationToken>{last}</NextContinuationToken>" if last < num_objects else ""
                body = f"<ListBucketResult><IsTruncated>{more}</IsTruncated>{token}{listed}</ListBucketResult>".encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Type", "application/xml")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def test_a_bucket_is_listed_page_by_page_and_memory_does_not_grow_with_it() -> None:
    many = ManyObjects(20_000)
    root, listing = list_files("s3://bkt/in/", {"endpoint_url": many.url})
    assert (root, next(listing)) == ("s3://bkt/in", ("00000000.png", '0 "0"'))
    assert many.pages <= 2
    for _ in range(2000):
        next(listing)
    tracemalloc.start()
    last = ("", "")
    num_files = 2001
    for found in listing:
        assert found > last
        last, num_files = found, num_files + 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (num_files, many.pages, last[0]) == (20_000, 20, "00019999.png")
    assert peak < 8 << 20
    many.server.shutdown()
    many.server.server_close()


def test_a_listing_of_s3_says_the_same_as_one_of_a_disk(tmp_path: Path, s3_options: dict[str, Any]) -> None:
    names = ["b.png", "a.png", "below/c.png", "below/d/e.png", "x.txt", "é.png", "a b.png", "b.jpg"]
    filesystem = fsspec.filesystem("s3", **s3_options)
    url = f"s3://bkt/{tmp_path.name}"
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
        filesystem.pipe_file(f"{url}/in/{name}", b"x")
    filesystem.pipe_file(f"{url}/in/marker/", b"")
    filesystem.pipe_file(f"{url}/in-other/y.png", b"x")
    for pattern in ("in", "in/", "in/*.png", "in/[ab].*", "in/**", "in/*/c.png", "in/b.png"):
        there = list_files(f"{url}/{pattern}", s3_options)
        here = list_files(f"{tmp_path}/{pattern}", {})
        # A disk's ** names folders too.
        files = sorted(n for n, _ in here[1] if not Path(here[0], n).is_dir())
        assert sorted(n for n, _ in there[1]) == files
        assert there[0].removeprefix(url) == here[0].removeprefix(str(tmp_path))
    with pytest.raises(JobError, match="nothing there"):
        list_files(f"{url}/nowhere", s3_options)
    with pytest.raises(JobError, match="nothing there"):
        list_files(f"{url}/in/*.gif", s3_options)


def test_a_disk_that_may_not_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="choose a folder that you may write to"):
        Store(str(tmp_path / "file" / "out")).probe()


def test_a_folder_without_permission_says_so() -> None:
    # /proc takes no file from anybody, root included.
    with pytest.raises(StorageError, match="^/proc/out: .*choose a folder that you may write to"):
        Store("/proc/out").probe()


@pytest.fixture(scope="module")
def strict_endpoint() -> Iterator[str]:
    """An S3 server that checks its callers' credentials."""
    server, url = start_moto(INITIAL_NO_AUTH_ACTION_COUNT="0")
    yield url
    server.kill()
    server.wait()


def test_wrong_credentials_are_named_within_ten_seconds(strict_endpoint: str, s3_endpoint: str) -> None:
    start = time.monotonic()
    store = Store("s3://bkt/x", {"endpoint_url": strict_endpoint, "key": "AKWRONG", "secret": "CANARY"})
    with pytest.raises(StorageError, match=r"refuses these credentials .*; check AWS_ACCESS_KEY_ID") as caught:
        store.probe()
    assert time.monotonic() - start < 10
    assert "CANARY" not in str(caught.value)


def test_a_missing_bucket_is_named(s3_options: dict[str, Any]) -> None:
    with pytest.raises(StorageError, match="no such bucket; create it, or choose another path"):
        Store("s3://no-such-bucket/x", s3_options).probe()


def test_a_store_that_does_not_answer_is_named(s3_endpoint: str) -> None:
    store = Store("s3://bkt/x", {"endpoint_url": f"http://127.0.0.1:{free_port()}"})
    begun = time.monotonic()
    with pytest.raises(StorageError, match=r"no answer for \d+ s \(.*\); check the endpoint and the network"):
        store.probe()
    assert time.monotonic() - begun < 10


def test_what_takes_connections_and_says_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_PATIENCE_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = Store("s3://bkt/x", {"endpoint_url": f"http://127.0.0.1:{silent.getsockname()[1]}"})
        begun = time.monotonic()
        with pytest.raises(StorageError, match=r"no answer for \d+ s \(.*\); check the endpoint and the network"):
            store.probe()
        assert time.monotonic() - begun < 10


def test_a_put_that_is_stuck_is_sent_again(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "READ_TIMEOUT_S", 1)
    rule = Rule("PUT", "", "delay", seconds=8)
    with Faults(s3_endpoint, [rule]) as faults:
        store = Store("s3://bkt/stuck", {"endpoint_url": faults.url}, reached=True)
        begun = time.monotonic()
        store.write("a", b"x")
        assert time.monotonic() - begun < 8
    assert (rule.fired, Store("s3://bkt/stuck", {"endpoint_url": s3_endpoint}).read("a")) == (1, b"x")


@pytest.mark.parametrize(
    ("code", "error"), [(400, "ExpiredToken"), (400, "AuthorizationHeaderMalformed"), (501, "NotImplemented")]
)
def test_what_no_retry_can_mend_is_said_at_once(s3_endpoint: str, code: int, error: str) -> None:
    rule = Rule("PUT", "", "status", ALWAYS, code, error)
    with Faults(s3_endpoint, [rule]) as faults:
        store = Store("s3://bkt/refused", {"endpoint_url": faults.url}, reached=True)
        for attempt in (store.write, store.create):
            with pytest.raises(StorageError, match=rf"refuses .*{error}"):
                attempt("a", b"x")
    assert rule.fired == 2


def test_a_body_that_was_damaged_on_its_way_is_sent_again(s3_endpoint: str) -> None:
    rule = Rule("PUT", "", "status", 2, 400, "BadDigest")
    with Faults(s3_endpoint, [rule]) as faults:
        store = Store("s3://bkt/damaged", {"endpoint_url": faults.url})
        store.write("a", b"x")
    assert rule.fired == 2
    assert Store("s3://bkt/damaged", {"endpoint_url": s3_endpoint}).read("a") == b"x"


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(StorageError, match="use a path, s3://"):
        Store("nope://x/y").probe()


def test_any_other_fsspec_store_works_too() -> None:
    store = Store("memory://box/out")
    store.create("a", b"1")
    with pytest.raises(Exists):
        store.create("a", b"2")
    assert list(store.list("")) == ["a"]
    assert fsspec.filesystem("memory").cat("/box/out/a") == b"1"


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    store.write("manifest/a", b"x")
    assert list(store.names("nothing")) == []
    scandir = os.scandir

    def failing(path: Any) -> Any:
        # As a disk does that gives up; root may read what permissions forbid.
        if str(path).endswith("manifest"):
            raise OSError(5, "Input/output error", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(StorageError, match="Input/output error"):
        list(store.names("manifest"))
