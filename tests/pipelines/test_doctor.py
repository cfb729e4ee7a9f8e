"""What `doctor` says of stores that hold to what they promise, and of one that does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.doctor import _checksums, doctor
from pipelines.errors import StorageError
from pipelines.storage import Store
from tests.faults.proxy import Faults, Rule


def test_a_local_folder_is_fine_and_left_as_it_was(tmp_path: Path) -> None:
    found = doctor(str(tmp_path))
    assert found.exit_code == 0
    assert {f.verdict for f in found.findings} == {"ok", "skipped"}
    assert found.mode.startswith("conditional writes")
    assert list(tmp_path.rglob("*")) == []


def test_an_s3_server_is_asked_for_checksums_and_multipart_too(
    s3_options: dict[str, Any], tmp_path: Path, ldm_batch: Any
) -> None:
    url = f"s3://bkt/{tmp_path.name}"
    found = ldm_batch("doctor", url, "--json", AWS_ENDPOINT_URL=s3_options["endpoint_url"])
    assert found.returncode == 0, found.stderr
    said = {finding["name"]: finding["verdict"] for finding in json.loads(found.stdout)["findings"]}
    # moto takes any checksum, and does not promise what a race ends in.
    assert (said.pop("checksums"), said.pop("one winner") in ("ok", "weak")) == ("weak", True)
    assert said == {
        name: "ok"
        for name in (
            "access",
            "read after write",
            "listing",
            "create if absent",
            "multipart",
            "latency",
            "bandwidth",
        )
    }
    assert Store(url, s3_options).list("") == {}


def test_a_store_that_checks_before_it_writes_is_weak_and_usable() -> None:
    # fsspec's memory has no conditional write, so create checks first.
    found = doctor("memory://doctor")
    assert found.exit_code == 0
    assert {f.name: f.verdict for f in found.findings}["create if absent"] == "ok"


def test_a_store_that_ignores_conditions_is_told_from_one_that_honours_them(
    s3_options: dict[str, Any], tmp_path: Path
) -> None:
    rule = Rule("PUT", "/bkt/", "forget_condition", times=1_000_000)
    faults = Faults(s3_options["endpoint_url"], [rule])
    try:
        found = doctor(f"s3://bkt/{tmp_path.name}", {**s3_options, "endpoint_url": faults.url})
    finally:
        faults.close()
    assert rule.fired > 300
    said = {f.name: f.verdict for f in found.findings}
    assert (said["create if absent"], said["one winner"], found.exit_code) == ("weak", "weak", 0)
    assert found.mode.startswith("read-back")


@pytest.mark.parametrize(("code", "error", "verdict"), [(400, "BadDigest", "ok"), (503, "SlowDown", "weak")])
def test_only_a_refusal_of_the_damaged_body_is_taken_for_one(
    s3_options: dict[str, Any], tmp_path: Path, code: int, error: str, verdict: str
) -> None:
    rule = Rule("PUT", "/damaged$", "status", times=1_000, code=code, error=error)
    faults = Faults(s3_options["endpoint_url"], [rule])
    try:
        store = Store(f"s3://bkt/{tmp_path.name}", {**s3_options, "endpoint_url": faults.url})
        found, text = _checksums(store, "damaged")
    finally:
        faults.close()
    assert (found, rule.fired > 0) == (verdict, True), text


def test_no_bucket_is_one_line(s3_options: dict[str, Any]) -> None:
    with pytest.raises(StorageError, match="no such bucket"):
        doctor("s3://not-there/x", s3_options)
