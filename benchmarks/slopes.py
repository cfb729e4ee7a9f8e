"""How a plan, its shards, a resume and the last count grow with the number of shards; `docs/scale.md` rests on it.

    python -m benchmarks.slopes [--shards 100000] [--folder /dev/shm]

A plan of one-row shards; then each shard's rows are read, given a picture of 16 px and committed, all by the code that
a run has for it, in one process and without Ray; then what a resume asks, and the count at the end of a run. Processor
time and memory of a quarter, half and all of them. The folder should be one that costs nothing: what a disk or a store
adds is told elsewhere.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipelines import load_job, plan
from pipelines.blocks import with_results
from pipelines.equipment import plan_models
from pipelines.loading import LoadShard, place
from pipelines.plans import job_of, read_plans
from pipelines.sink import ShardWriter
from pipelines.storage import Store
from pipelines.totals import count, unfinished


class Counted(Store):
    """A store that counts what it is asked for."""

    asked: Counter[str]

    def read(self, *arguments: Any, **named: Any) -> Any:
        self.asked["read"] += 1
        return super().read(*arguments, **named)

    def create(self, *arguments: Any, **named: Any) -> Any:
        self.asked["create"] += 1
        return super().create(*arguments, **named)

    def write_each(self, files: Any) -> None:
        files = list(files)
        self.asked["file"] += len(files)
        super().write_each(files)


def job_of_rows(folder: Path, num_rows: int) -> Path:
    rows = "".join(f"row-{i},a small red circle {i}\n" for i in range(num_rows))
    (folder / "rows.csv").write_text("id,prompt\n" + rows)
    value = {
        "source": {"path": str(folder / "rows.csv")},
        "stages": [{"op": "txt2img", "model": "builtin:shapes", "batch_size": 1}],
        "sink": {"path": str(folder / "out")},
        "batches_per_shard": 1,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def planned(job: str) -> dict[str, float]:
    start = time.process_time()
    plan(load_job(job))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"plan_cpu_s": time.process_time() - start, "plan_mb": most}


def resumed(out: str) -> dict[str, float]:
    """What a run that finds everything done asks of an output."""
    store = Store(out)
    start = time.process_time()
    plans = read_plans(store)
    assert not any(unfinished(store, one) for one in plans)
    asked = time.process_time() - start
    totals = count(store, plans)
    assert totals.num_done == totals.num_planned
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"resume_cpu_s": asked, "count_cpu_s": time.process_time() - start - asked, "count_mb": most}


def committed(out: str) -> dict[str, Any]:
    store = Counted(out)
    store.asked = Counter()
    [made] = read_plans(store)
    job = job_of(made)
    [(weights, _)] = plan_models(made, job, [], {})
    load = LoadShard(store, None, weights.revision, {})
    writer = ShardWriter(store, made.plan_id, job.sink, job.layout, "slopes", weights.name, weights.revision)
    store.asked.clear()
    pixels = np.zeros((16, 16, 3), np.uint8)
    result = {"status": "ok", "stage": "txt2img", "pixels": pixels, "stages": []}
    marks = [time.process_time()]
    held = []
    tenth = max(1, len(made.shards) // 10)
    for n, shard in enumerate(made.shards, 1):
        rows = load(place(shard))
        writer(with_results(rows, [result] * rows.num_rows))
        if n % tenth == 0:
            marks.append(time.process_time())
            held.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20)
    each = [1000 * (after - before) / tenth for before, after in pairwise(marks)]
    asked = {name: round(number / len(made.shards), 3) for name, number in store.asked.items()}
    return {
        "shard_cpu_ms_first_tenth": each[0],
        "shard_cpu_ms_last_tenth": each[-1],
        "mb_first_tenth": held[0],
        "mb_last_tenth": held[-1],
        "asked_per_shard": asked,
    }


def alone(work: Any, argument: str) -> Any:
    """In a process of its own, whose memory is then known."""
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        return other.submit(work, argument).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    for num_shards in (args.shards // 4, args.shards // 2, args.shards):
        with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
            job = job_of_rows(Path(temporary), num_shards)
            out = str(Path(temporary) / "out")
            found = {**alone(planned, str(job)), **alone(committed, out), **alone(resumed, out)}
            shown = {name: round(value, 2) if isinstance(value, float) else value for name, value in found.items()}
            print(json.dumps({"shards": num_shards, **shown}), flush=True)


if __name__ == "__main__":
    main()
