"""Each fault of the proxy does what it says, seen by plain botocore and from behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import botocore.exceptions
import pytest
from botocore.config import Config
from botocore.session import Session

from tests.faults.proxy import ALWAYS, Faults, Rule, storm

BODY = bytes(range(256)) * 800


def client(url: str) -> Any:
    config = Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})
    return Session().create_client("s3", endpoint_url=url, config=config)


@pytest.fixture
def faults(s3_endpoint: str) -> Iterator[Faults]:
    with Faults(s3_endpoint) as faults:
        yield faults


def there(s3_endpoint: str, key: str) -> bytes | None:
    s3 = client(s3_endpoint)
    try:
        return bytes(s3.get_object(Bucket="bkt", Key=key)["Body"].read())
    except s3.exceptions.NoSuchKey:
        return None


@pytest.mark.parametrize(
    ("action", "stored"), [("drop", False), ("cut_request", False), ("lose_reply", True), ("cut_reply", True)]
)
def test_a_put_fails_for_the_client_whether_the_store_has_it_or_not(
    faults: Faults, s3_endpoint: str, action: str, stored: bool
) -> None:
    rule = Rule("PUT", f"/{action}$", action)  # type: ignore[arg-type]
    faults.rules.append(rule)
    with pytest.raises(botocore.exceptions.HTTPClientError):
        client(faults.url).put_object(Bucket="bkt", Key=action, Body=BODY)
    assert rule.fired == 1
    assert there(s3_endpoint, action) == (BODY if stored else None)


def test_half_of_a_reply_is_half_of_it(faults: Faults, s3_endpoint: str) -> None:
    client(s3_endpoint).put_object(Bucket="bkt", Key="half", Body=BODY)
    rule = Rule("GET", "/half$", "cut_reply")
    faults.rules.append(rule)
    body = client(faults.url).get_object(Bucket="bkt", Key="half")["Body"]
    assert body.read(len(BODY) // 2) == BODY[: len(BODY) // 2]
    with pytest.raises((botocore.exceptions.HTTPClientError, botocore.exceptions.IncompleteReadError)):
        body.read()
    assert rule.fired == 1


def test_late_and_slow_requests_come_whole(faults: Faults) -> None:
    rules = [
        Rule("PUT", "/slow$", "throttle", bytes_per_s=len(BODY) * 4),
        Rule("GET", "/slow$", "throttle", bytes_per_s=len(BODY) * 4),
        Rule("HEAD", "/slow$", "delay", seconds=0.3),
    ]
    faults.rules += rules
    s3 = client(faults.url)
    for call in (
        lambda: s3.put_object(Bucket="bkt", Key="slow", Body=BODY),
        lambda: s3.get_object(Bucket="bkt", Key="slow")["Body"].read(),
        lambda: s3.head_object(Bucket="bkt", Key="slow"),
    ):
        start = time.monotonic()
        answer = call()
        assert 0.2 < time.monotonic() - start < 5
        assert not isinstance(answer, bytes) or answer == BODY
    assert [rule.fired for rule in rules] == [1, 1, 1]


def test_a_storm_hits_the_share_that_it_is_told_with_every_kind_of_fault(faults: Faults) -> None:
    faults.rules += storm(0.5)
    s3 = client(faults.url)
    failed = 0
    for n in range(100):
        try:
            s3.put_object(Bucket="bkt", Key=f"storm/{n}", Body=b"x", **({"IfNoneMatch": "*"} if n % 2 else {}))
        except (botocore.exceptions.HTTPClientError, botocore.exceptions.ClientError):
            failed += 1
    assert failed == sum(rule.fired for rule in faults.rules)
    assert 35 < failed < 75
    assert min(rule.fired for rule in faults.rules) > 0
    assert {rule.times for rule in faults.rules} == {ALWAYS}
