"""Probe a store for what a run needs of it and for what makes a run cheaper, before any GPU is paid for.

The probes follow those of Elasticsearch's repository analysis: many writers at once on one name, reads right after
writes, listings right after writes, and what becomes of a body that was damaged on its way.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from threading import Barrier
from typing import Any, Literal

from pipelines.errors import StorageError
from pipelines.storage import Exists, Store, error_code

WRITERS, ROUNDS = 16, 20
READS = 20
LARGE_BYTES = 8 << 20

Verdict = Literal["ok", "weak", "broken", "skipped"]


@dataclass
class Finding:
    """One probe. `weak` costs work at most, `broken` means that no run can rely on this store."""

    name: str
    verdict: Verdict
    text: str


@dataclass
class Diagnosis:
    """What a store does, and how a run will fare on it."""

    url: str
    findings: list[Finding] = field(default_factory=list)
    mode: str = ""

    @property
    def exit_code(self) -> int:
        return StorageError.exit_code if any(f.verdict == "broken" for f in self.findings) else 0


def doctor(url: str, storage_options: dict[str, Any] | None = None) -> Diagnosis:
    """Probe the store at `url`, in a folder of its own below it that is removed at the end.

    Raises:
        StorageError: it refuses these credentials, has no such bucket or does not answer.
    """
    folder = f"_ldm/doctor-{uuid.uuid4().hex}"
    store = Store(url, storage_options)
    store.probe()
    diagnosis = Diagnosis(
        store.url, [Finding("access", "ok", "takes writes, reads and deletes with these credentials")]
    )
    probes: list[tuple[str, Callable[[Store, str], tuple[Verdict, str]]]] = [
        ("read after write", _read_after_write),
        ("listing", _listing),
        ("create if absent", _create),
        ("one winner", _race),
        ("checksums", _checksums),
        ("multipart", _multipart),
        ("latency", _latency),
        ("bandwidth", _bandwidth),
    ]
    try:
        for number, (name, probe) in enumerate(probes):
            diagnosis.findings.append(Finding(name, *probe(store, f"{folder}/{number}")))
    finally:
        for path in store.list(folder):
            store.delete(path)
        if store.local is not None:
            _remove_empty(store.local, store.local / folder)
    verdicts = {finding.name: finding.verdict for finding in diagnosis.findings}
    if diagnosis.exit_code:
        diagnosis.mode = "a run cannot rely on this store; use another"
    elif verdicts["create if absent"] == "ok" and verdicts["one winner"] == "ok":
        diagnosis.mode = "conditional writes: two runs at once never commit a shard twice"
    else:
        diagnosis.mode = "read-back: what is committed stays whole, but two runs at once may both make a shard"
    return diagnosis


def _remove_empty(root: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        (root / "_ldm").rmdir()  # Of an output it is not empty.


def _read_after_write(store: Store, path: str) -> tuple[Verdict, str]:
    stale = 0
    for n in range(READS):
        body = f"{path} {n}".encode()
        # New objects, as a part is, and the same name anew, as a heartbeat is.
        for name in (f"{path}/{n}", f"{path}/again"):
            store.write(name, body)
            stale += store.read(name) != body
    if stale:
        return "broken", f"{stale} of {2 * READS} reads right after a write gave something else"
    return "ok", f"{2 * READS} of {2 * READS} reads right after a write gave what was written"


def _listing(store: Store, path: str) -> tuple[Verdict, str]:
    missing = 0
    for n in range(READS):
        store.write(f"{path}/{n}", b"x")
        missing += f"{path}/{n}" not in store.list(path)
    if missing:
        return "weak", f"{missing} of {READS} new objects were not listed at once; a resume may do shards twice"
    return "ok", f"{READS} of {READS} new objects were listed at once"


def _create(store: Store, path: str) -> tuple[Verdict, str]:
    try:
        store.create(path, b"first")
    except (Exists, StorageError) as error:
        return "broken", f"refused where there is nothing ({error})"
    except OSError as error:
        return "weak", f"answered with an error where there is nothing ({error}); run doctor again"
    try:
        store.create(path, b"second")
    except Exists:
        if store.read(path) == b"first":
            return "ok", "refused where there is an object"
        return "broken", "refused, and yet overwrote the object"
    except OSError as error:
        return "weak", f"answered with an error where there is an object ({error})"
    return "weak", "not honoured: the second write went through"


def _race(store: Store, path: str) -> tuple[Verdict, str]:
    barrier = Barrier(WRITERS)

    def write(at: tuple[int, int]) -> bool:
        round_, writer = at
        barrier.wait()
        try:
            store.create(f"{path}/{round_}", f"{writer}".encode())
        except (Exists, OSError, StorageError):
            return False
        return True

    fine = 0
    with ThreadPoolExecutor(WRITERS) as pool:
        for round_ in range(ROUNDS):
            won = [n for n, win in enumerate(pool.map(write, ((round_, n) for n in range(WRITERS)))) if win]
            fine += len(won) == 1 and store.read(f"{path}/{round_}") == f"{won[0]}".encode()
    text = f"{fine} of {ROUNDS} rounds of {WRITERS} writers had one winner, whose object stayed"
    return ("ok" if fine == ROUNDS else "weak"), text


def _checksums(store: Store, path: str) -> tuple[Verdict, str]:
    if not store.url.startswith("s3://"):
        return "skipped", "of S3 alone"
    bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
    wrong = base64.b64encode(hashlib.md5(b"another body", usedforsecurity=False).digest()).decode()
    key = f"{prefix}/{path}".lstrip("/")
    try:
        store.filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=b"the body", ContentMD5=wrong)
    except Exception as error:  # noqa: BLE001 - botocore makes its classes at run time
        code = error_code(error)
        if code in ("BadDigest", "InvalidDigest"):
            return "ok", "a body that does not fit its checksum is refused"
        return "weak", f"could not be asked ({code or str(error)[:120]}); run doctor again"
    return "weak", "a body that does not fit its checksum is taken; `verify --deep` is what finds such damage"


def _multipart(store: Store, path: str) -> tuple[Verdict, str]:
    if not store.url.startswith("s3://"):
        return "skipped", "of S3 alone"
    bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
    where = {"Bucket": bucket, "Key": f"{prefix}/{path}".lstrip("/")}
    call = store.filesystem.call_s3
    try:
        upload = call("create_multipart_upload", **where)["UploadId"]
        call("upload_part", **where, UploadId=upload, PartNumber=1, Body=b"x" * 1024)
        call("abort_multipart_upload", **where, UploadId=upload)
    except Exception as error:  # noqa: BLE001 - botocore makes its classes at run time
        return "weak", f"no multipart upload can be begun and given up ({str(error)[:120]}); needed above 100 MB"
    left = store.read(path)
    return ("ok", "an upload that is given up leaves nothing") if left is None else ("broken", "left an object behind")


def _latency(store: Store, path: str) -> tuple[Verdict, str]:
    def time_of(action: Callable[[], object]) -> float:
        start = time.perf_counter()
        action()
        return (time.perf_counter() - start) * 1000

    puts = [time_of(partial(store.write, f"{path}/{n}", b"x" * 4096)) for n in range(READS)]
    gets = [time_of(partial(store.read, f"{path}/{n}")) for n in range(READS)]
    text = f"4 kB: write {median(puts):.1f} ms, read {median(gets):.1f} ms (medians of {READS})"
    return "ok", text


def _bandwidth(store: Store, path: str) -> tuple[Verdict, str]:
    body = bytes(LARGE_BYTES)
    start = time.perf_counter()
    store.write(path, body)
    middle = time.perf_counter()
    same = store.read(path) == body
    end = time.perf_counter()
    rates = [LARGE_BYTES / seconds / 1e6 for seconds in (middle - start, end - middle)]
    text = f"{LARGE_BYTES >> 20} MiB: write {rates[0]:.0f} MB/s, read {rates[1]:.0f} MB/s, one request at a time"
    return ("ok" if same else "broken"), text if same else "a large object came back otherwise"
