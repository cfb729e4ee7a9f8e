"""The live bar and the plain lines, as their streams receive them."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from pipelines.job import Job
from pipelines.planner import check
from pipelines.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(params=[Terminal, io.StringIO])
def progress(request: pytest.FixtureRequest, make_job: Callable[..., Job]) -> Progress:
    planned = check(make_job(source={"rows": [f"p{i}" for i in range(8)] + ["p0"]}))
    progress = Progress(request.param())
    assert planned.new is not None
    progress.planned(planned, [(planned.new, planned.new.shards)])
    progress.started()
    for shard in planned.new.shards:
        progress.progress(shard.num_rows, 0, shard.cost)
    progress.done()
    return progress


def test_a_terminal_gets_a_bar_and_a_file_plain_lines(progress: Progress) -> None:
    text = progress.stream.getvalue()  # type: ignore[attr-defined]
    assert "planned 8 pictures of 9 rows, 1 duplicates made once" in text
    assert "8/8 pictures" in text
    assert "rows/s" in text
    if progress.live:
        assert "━━━━" in text
        assert text.endswith("\r\x1b[K"), "the last line is left clean"
    else:
        assert "\r" not in text
        assert "\x1b" not in text


def test_the_eta_goes_by_work_and_not_by_rows(make_job: Callable[..., Job]) -> None:
    progress = Progress(io.StringIO())
    progress.total_rows, progress.total_cost = 30, 100.0
    assert progress.seconds_left(now=0) is None
    progress.progress(10, 0, 10.0)
    assert progress.first is not None
    begun = progress.first[0]
    assert progress.seconds_left(begun) is None, "one receipt tells no rate"
    progress.progress(10, 0, 45.0)
    # 45 units of work in 9 s, 45 are left, though only 10 of 30 rows are.
    assert progress.seconds_left(begun + 9) == pytest.approx(9)
