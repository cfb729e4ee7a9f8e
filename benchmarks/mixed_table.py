"""What share of the denoiser's work makes pictures on a mixed table, and in how many calls.

    python -m benchmarks.mixed_table [--rows 2000] [--tables 5]

A table of 3 sizes × 3 step counts × guidance on and off, drawn for each row and so shuffled, is planned with
`batch_size: 8` and everything else as it is; each of its shards goes through the loader and the worker of a run. Only
the model is none: the op counts, for each device batch that it is given, the rows, padding too, and the calls of the
U-Net that a plain sampler makes. A sample-step is one row in one call; with guidance a row is two.

Against that: batches of 8 in the table's order, each split into groups that a pipeline can take, which pads nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ldm_ops.adapters import NO_ADAPTERS, Adapters
from ldm_ops.op import Row
from ldm_ops.txt2img import Txt2Img
from pipelines import load_job, plan
from pipelines.loading import LoadShard, place
from pipelines.storage import Store
from pipelines.worker import Place, Worker

SIZES = (512, 768, 1024)
STEPS = (20, 30, 50)
GUIDANCE = (1.0, 7.5)
BATCH_SIZE = 8
USEFUL = 0.95
FEWER_CALLS = 3.0


@dataclass
class Counts:
    """What a denoiser did; `pixel_steps` is `sample_steps`, each times the pixels of its picture."""

    calls: int = 0
    sample_steps: int = 0
    pixel_steps: int = 0

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """One device batch: all rows are alike in what matters here."""
        first = rows[0]
        steps, passes = int(first["num_inference_steps"]), 2 if float(first["guidance_scale"]) > 1 else 1
        self.calls += steps
        self.sample_steps += len(rows) * steps * passes
        self.pixel_steps += len(rows) * steps * passes * int(first["height"]) * int(first["width"])


class Counting(Txt2Img):
    """Batches as `txt2img` takes them, and one grey pixel for each row."""

    def load(self, folder: Path, adapters: Adapters = NO_ADAPTERS) -> Any:
        return Counts()

    def run(self, model: Any, rows: Sequence[Row]) -> list[dict[str, Any]]:
        model.add(rows)
        pixel = np.full((1, 1, 3), 127, np.uint8)
        return [{"image": pixel, "nsfw": None, "prompt_truncated": False, "intermediates": []} for _ in rows]


def mixed(num_rows: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for i in range(num_rows):
        side = rng.choice(SIZES)
        more = {"num_inference_steps": rng.choice(STEPS), "guidance_scale": rng.choice(GUIDANCE)}
        rows.append({"prompt": f"circle {i}", "height": side, "width": side, **more})
    return rows


def planned(rows: list[dict[str, Any]], folder: Path) -> Counts:
    """As a run does it."""
    with (folder / "table.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    stage = {"op": "txt2img", "model": "builtin:shapes", "batch_size": BATCH_SIZE}
    job = {"source": {"path": str(folder / "table.csv")}, "stages": [stage], "sink": {"path": str(folder / "out")}}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    loaded = load_job(folder / "job.yaml")
    found = plan(loaded)
    weights = found.models[0][0]
    store = Store(str(folder / "out"))
    load = LoadShard(store, None, weights.revision, {})
    worker = Worker(Place(loaded.stage, 0, True, None), Counting(**loaded.stage.bare().model_dump()), weights)
    made = sum(
        worker(load(place(shard)))["status"].to_pylist().count("ok") for one in found.plans for shard in one.shards
    )
    if made != len(rows):
        raise SystemExit(f"{made} of {len(rows)} rows were made")
    counts: Counts = worker.model
    return counts


def arrived(rows: list[dict[str, Any]]) -> Counts:
    """Batches in the table's order, each split into groups of one shape."""
    counts = Counts()

    def shape(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("height", "width", "num_inference_steps", "guidance_scale"))

    for first in range(0, len(rows), BATCH_SIZE):
        for _, group in groupby(sorted(rows[first : first + BATCH_SIZE], key=shape), shape):
            counts.add(list(group))
    return counts


def measure(num_rows: int, seed: int) -> dict[str, Any]:
    rows = mixed(num_rows, seed)
    needed = Counts()
    for row in rows:
        needed.add([row])
    with tempfile.TemporaryDirectory() as folder:
        ours = planned(rows, Path(folder))
    peer = arrived(rows)
    return {
        "rows": num_rows,
        "seed": seed,
        "useful": round(needed.sample_steps / ours.sample_steps, 4),
        "useful_by_pixels": round(needed.pixel_steps / ours.pixel_steps, 4),
        "calls": ours.calls,
        "calls_in_order_of_arrival": peer.calls,
        "fewer_calls": round(peer.calls / ours.calls, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--tables", type=int, default=5, help="drawn with the seeds 0, 1, …")
    args = parser.parse_args()
    found = [measure(args.rows, seed) for seed in range(args.tables)]
    for one in found:
        print(json.dumps(one), flush=True)
    useful, fewer = min(one["useful"] for one in found), min(one["fewer_calls"] for one in found)
    print(json.dumps({"useful": useful, "fewer_calls": fewer, "bars": [USEFUL, FEWER_CALLS]}))
    if useful < USEFUL or fewer < FEWER_CALLS:
        raise SystemExit("not reached")


if __name__ == "__main__":
    main()
