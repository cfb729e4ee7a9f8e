"""Figures of a run for Prometheus, by way of Ray's metrics agent on each node; silent outside Ray.

Ray puts `ray_` in front of each name, and tells the node beside the tags given here.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
"""Upper bounds of histograms' buckets."""

METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "ldm_rows_total": ("Counter", "rows committed, by how they ended and in which stage", ("status", "stage")),
    "ldm_batch_seconds": ("Histogram", "seconds of one device batch", ("stage",)),
    "ldm_device_busy_ratio": ("Gauge", "share of a worker's time that goes into device batches", ("stage", "worker")),
    "ldm_upload_seconds": ("Histogram", "seconds that a shard's encoding, uploads and commit take", ()),
    "ldm_queue_depth": ("Gauge", "shards that a driver has given to Ray and that are not committed yet", ("ldm_job",)),
    "ldm_shards_done": ("Gauge", "shards that a run has committed", ("ldm_job",)),
}
"""Name → kind in `ray.util.metrics`, what it tells, tags."""

WINDOW_S = 10.0


def record(name: str, value: float, **tags: str) -> None:
    """Add to a counter, set a gauge, or put one more value into a histogram."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    metric = _metric(name)
    put = {"Counter": "inc", "Gauge": "set", "Histogram": "observe"}[METRICS[name][0]]
    getattr(metric, put)(value, tags)


class Busy:
    """How much of its time a worker spends in device batches."""

    def __init__(self, stage: str, worker: str) -> None:
        self.tags = {"stage": stage, "worker": worker}
        self.since = self.last = time.monotonic()
        self.busy_s = 0.0

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Around a device batch."""
        begin, self.last = time.monotonic(), math.inf
        try:
            yield
        finally:
            end = self.last = time.monotonic()
            record("ldm_batch_seconds", end - begin, stage=self.tags["stage"])
            self.busy_s += end - begin
            window = max(1e-6, end - self.since)
            record("ldm_device_busy_ratio", min(1.0, self.busy_s / window), **self.tags)
            if window >= WINDOW_S:
                self.since, self.busy_s = end, 0.0

    def watch(self) -> None:
        """Tell of times without a batch, too: a gauge stays where it was put."""
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(WINDOW_S)
            if time.monotonic() - self.last > WINDOW_S:
                record("ldm_device_busy_ratio", 0.0, **self.tags)


@cache
def _metric(name: str) -> Any:
    from ray.util import metrics

    kind, description, tags = METRICS[name]
    more = {"boundaries": SECONDS} if kind == "Histogram" else {}
    return getattr(metrics, kind)(name, description=description, tag_keys=tags, **more)
