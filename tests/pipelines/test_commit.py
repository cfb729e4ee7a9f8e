"""The commit's rules under lost replies, rivals, zombies and weak stores, by simulation and against a real server."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from pipelines.commit import commit
from pipelines.errors import NotWhole, StorageError
from pipelines.manifest import PartHead, attempt_of, keys_digest, part_bytes, read_head
from pipelines.storage import Exists, Store
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

    with pytest.raises(StorageError, match=r"could not be committed in 8 tries \(timed out\)"):
        commit(Silent(), "part", b"x", "me", attempt_of, no_sleep)


class SimulatedStore:
    """In memory; loses replies, and, where not atomic, checks first and writes later."""

    def __init__(self, rng: random.Random, lost: float, atomic: bool) -> None:
        self.objects: dict[str, bytes] = {}
        self.rng, self.lost, self.atomic = rng, lost, atomic
        self.pause: Callable[[], None] = lambda: None

    def create(self, path: str, data: bytes) -> None:
        self.pause()
        there = path in self.objects
        if not self.atomic:
            self.pause()
        if there:
            raise Exists(path)
        if self.rng.random() < 0.1:
            raise OSError("409 although nothing is there")
        self.objects[path] = data
        self.pause()
        if self.rng.random() < self.lost:
            raise OSError("the reply is lost")

    def read(self, path: str) -> bytes | None:
        self.pause()
        return self.objects.get(path)


def simulate(seed: int, lost: float, atomic: bool, naive: bool) -> list[str]:
    """Two workers commit the same shard in a random interleaving; what an outside reader finds wrong at the end."""
    import threading

    rng = random.Random(seed)
    store = SimulatedStore(rng, lost, atomic)
    turn = [threading.Semaphore(0), threading.Semaphore(0)]
    back = threading.Semaphore(0)
    alive = [True, True]
    outcomes: dict[str, str] = {}
    local = threading.local()

    def pause() -> None:
        back.release()
        turn[local.me].acquire()

    store.pause = pause

    def work(me: int) -> None:
        local.me = me
        turn[me].acquire()
        attempt = f"a{me}"
        store.objects[f"file-{attempt}"] = b"picture"
        try:
            if naive:
                # "412 means that somebody else won": delete my files.
                try:
                    store.create("part", attempt.encode())
                except (Exists, OSError):
                    store.objects.pop(f"file-{attempt}")
            else:
                answer = commit(store, "part", attempt.encode(), attempt, lambda data: data.decode(), no_sleep)
                outcomes[attempt] = answer
        except StorageError:
            pass  # Tried in vain; a later run does the shard.
        alive[me] = False
        back.release()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    while any(alive):
        me = rng.choice([i for i in range(2) if alive[i]])
        turn[me].release()
        back.acquire()
    for thread in threads:
        thread.join()
    owner = store.objects.get("part")
    if owner is None:
        return ["an attempt says that it committed, and there is no part"] if "mine" in outcomes.values() else []
    wrong = [] if f"file-{owner.decode()}" in store.objects else ["the part names a file that is gone"]
    if atomic:
        # With a store that keeps its word, exactly the owner of the part may say that it is his.
        for attempt, outcome in outcomes.items():
            if outcome != ("mine" if attempt == owner.decode() else "theirs"):
                wrong.append(f"{attempt} says {outcome}, the part is {owner.decode()}'s")
    return wrong


def seeds(count: int) -> Iterator[int]:
    return iter(range(count))


@pytest.mark.parametrize("atomic", [True, False])
def test_in_no_interleaving_does_a_part_name_a_missing_file(atomic: bool) -> None:
    broken = [seed for seed in seeds(400) if simulate(seed, lost=0.4, atomic=atomic, naive=False)]
    assert broken == []


def test_the_simulation_finds_the_naive_protocol_wrong() -> None:
    assert sum(bool(simulate(seed, lost=0.4, atomic=True, naive=True)) for seed in seeds(200)) > 20
