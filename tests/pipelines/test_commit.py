"""The commit's rules against a real server and a real disk; `tests/faults/test_simulation.py` has the schedules."""

from __future__ import annotations

import pytest

from pipelines.commit import commit
from pipelines.errors import NotWhole, StorageError
from pipelines.manifest import PartHead, attempt_of, keys_digest, part_bytes, read_head
from pipelines.storage import PATIENCE_S, WAIT_S, Store
from tests.faults.proxy import Faults, Rule


def part(attempt: str) -> bytes:
    import pyarrow as pa

    table = pa.table({"key": ["k1", "k2"]})
    return part_bytes(table, PartHead("p", 0, attempt, 2, 2, 0, 0, keys_digest(["k1", "k2"])))


def no_sleep(_: float) -> None:
    pass


def test_a_part_says_who_wrote_it_and_a_cut_one_says_nothing() -> None:
    whole = part("me")
    assert attempt_of(whole) == "me"
    head = read_head(whole)
    assert head is not None
    assert (head.num_rows, head.shard) == (2, 0)
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        assert attempt_of(whole[:cut]) is None
    assert attempt_of(b"PAR1 rubbish PAR1") is None


@pytest.mark.parametrize("action", ["lose_reply", "drop", "status"])
def test_whatever_the_store_answers_the_part_that_stands_there_decides(s3_endpoint: str, action: str) -> None:
    faults = Faults(s3_endpoint)
    store = Store(f"s3://bkt/commit-{action}", {"endpoint_url": faults.url})
    rule = Rule("PUT", "/part$", action, times=2, code=409, error="ConditionalRequestConflict")  # type: ignore[arg-type]
    faults.rules.append(rule)
    assert commit(store, "part", part("mine"), "mine", attempt_of, no_sleep) == "mine"
    assert rule.fired >= 1
    assert attempt_of(store.read("part") or b"") == "mine"
    assert commit(store, "part", part("late"), "late", attempt_of, no_sleep) == "theirs"
    assert attempt_of(store.read("part") or b"") == "mine"
    faults.close()


def test_something_that_is_no_part_is_never_replaced(tmp_path: object) -> None:
    store = Store(str(tmp_path))
    store.write("part", b"half a file")
    with pytest.raises(NotWhole, match="is not a part of this plan"):
        commit(store, "part", part("me"), "me", attempt_of, no_sleep)
    assert store.read("part") == b"half a file"


def test_a_store_that_stays_silent_ends_in_an_error() -> None:
    class Silent:
        def create(self, path: str, data: bytes) -> None:
            raise OSError("timed out")

        def read(self, path: str) -> bytes | None:
            return None

    waits: list[float] = []
    with pytest.raises(StorageError, match=r"could not be committed in \d+ tries \(timed out\); run the same command"):
        commit(Silent(), "part", b"x", "me", attempt_of, waits.append)
    assert PATIENCE_S < sum(waits) < PATIENCE_S + WAIT_S
    assert max(waits) < WAIT_S
