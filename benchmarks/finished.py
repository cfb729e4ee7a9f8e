"""Shards as the last stage hands them to the sink, without a model: really planned rows, and pictures made before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.blocks import pack, with_results
from pipelines.job import Job
from pipelines.planner import plan
from pipelines.plans import read_shard
from pipelines.sink import ShardWriter
from pipelines.storage import Store


def finished(
    pictures: Sequence[NDArray[np.uint8]], per_shard: int, sink: dict[str, Any]
) -> tuple[ShardWriter, list[pa.Table]]:
    """What writes the shards of a new output, and the shards."""
    stage = {"op": "txt2img", "model": "builtin:shapes", "batch_size": per_shard}
    rows = [{"id": f"{i:06d}", "prompt": f"a picture of noise, number {i}", "seed": i} for i in range(len(pictures))]
    job = Job.model_validate({"source": {"rows": rows}, "stages": [stage], "sink": sink, "batches_per_shard": 1})
    planned = plan(job).new
    assert planned is not None
    store = Store(job.sink.path, job.sink.storage_options)
    tables = []
    for shard in planned.shards:
        table = read_shard(store, shard.file, shard.index)
        results = [
            {"status": "ok", "attempt": None, "pixels": pack(pictures[seed]), "stages": []}
            for seed in table["seed"].to_pylist()
        ]
        tables.append(with_results(table, results))
    return ShardWriter(store, planned.plan_id, job.sink, job.layout, "run", "noise", "none"), tables
