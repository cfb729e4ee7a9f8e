"""Nothing is lost, twice or torn in ten thousand schedules; and each protocol that should fail does."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from tests.faults.naive import PROTOCOLS
from tests.faults.simulation import HOUR, Violation, Weather, forecast, simulate

BLOCKS, BLOCK = 10, 1000


@pytest.mark.parametrize("block", range(BLOCKS))
def test_no_schedule_loses_doubles_or_tears_a_row(block: int) -> None:
    fired: Counter[str] = Counter()
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        fired.update(simulate(seed))
    # A schedule in which nothing goes wrong shows nothing.
    for what in ("lost", "late", "killed", "asleep", "conflict", "theirs", "replaced", "gc deleted"):
        assert fired[what] > BLOCK // 20, (what, fired)


def broken_by(name: str, seed: int, weather: Weather | None = None) -> str | None:
    try:
        simulate(seed, PROTOCOLS[name], weather)
    except Violation as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", sorted(PROTOCOLS.keys() - {"ours"}))
def test_a_naive_protocol_is_found_wrong(name: str) -> None:
    seed, said = next((seed, said) for seed in range(3000) if (said := broken_by(name, seed)))
    assert f"replay: python -m tests.faults.simulation {seed}" in said
    assert broken_by("ours", seed) is None


def test_a_schedule_replays_request_by_request() -> None:
    told: tuple[list[str], list[str]] = ([], [])
    for lines in told:
        simulate(7, trace=lines.append)
    # The name of a clock object is drawn by production code, not by the seed.
    first, second = ([line for line in lines if "_ldm/clock-" not in line] for lines in told)
    assert len(first) > 50
    assert first == second


def test_on_a_store_that_checks_and_then_puts_gc_trusts_that_no_request_takes_as_long_as_its_age_rule() -> None:
    # What is left, and said so in `pipelines/gc.py`: here requests may take three days, and files go after one.
    slow = (
        (seed, replace(weather, max_late_s=72 * HOUR, max_asleep_s=72 * HOUR))
        for seed in range(3000)
        if not (weather := forecast(seed)).atomic
    )
    assert "which is not there" in next(said for seed, weather in slow if (said := broken_by("ours", seed, weather)))
