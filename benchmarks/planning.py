"""Time and memory of planning a large table.

    python benchmarks/planning.py [--rows 1000000]

A CSV with ids, prompts, per-row parameters and a column that passes through is planned and written, then planned again
as a resume would.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import tempfile
import time
from pathlib import Path

import yaml

from pipelines import load_job, plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    args = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "prompts.csv"
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "prompt", "guidance_scale", "num_inference_steps", "tag"])
            for i in range(args.rows):
                prompt = f"a small red circle number {i} on a white background"
                writer.writerow([f"row-{i}", prompt, rng.choice([3, 5, 7.5]), rng.choice([20, 25, 30]), f"t{i % 7}"])
        stage = {"op": "txt2img", "model": "builtin:shapes", "batch_size": 16}
        data = {"source": {"path": str(table)}, "stages": [stage], "sink": {"path": f"{folder}/out"}}
        path = Path(folder) / "job.yaml"
        path.write_text(yaml.safe_dump(data))
        job = load_job(path)
        times = []
        for _ in range(2):
            start = time.perf_counter()
            planned = plan(job)
            times.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    result = {
        "rows": planned.num_known,
        "plan_s": round(times[0], 1),
        "again_s": round(times[1], 1),
        "peak_gb": round(peak, 2),
    }
    print(json.dumps(result | {"shards": planned.num_shards}))


if __name__ == "__main__":
    main()
