"""Pictures a second through a whole job against a bare diffusers loop, in turn, on the same cores.

    python benchmarks/generation.py [--rows 256] [--batch-size 8] [--rounds 2]

The peer: one process, torch's own thread count, `pipe(prompts)` batch after batch, pictures thrown away. Ours: `run` on
one machine with every default, PNG files, digests, manifest and all; counted from the first device call to the last
part, so the model is loaded on both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import StableDiffusionPipeline

import ldm_ops.builtin
from ldm_ops.builtin.draw import all_captions
from pipelines import load_job, read_manifest, run


def bare(prompts: list[str], batch_size: int) -> float:
    """Pictures a second of a loop without a job."""
    folder = Path(ldm_ops.builtin.__file__).parent / "shapes"
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe(prompts[:batch_size], num_inference_steps=2)
    start = time.perf_counter()
    for i in range(0, len(prompts), batch_size):
        pipe(prompts[i : i + batch_size], num_inference_steps=25, guidance_scale=2.0)
    return len(prompts) / (time.perf_counter() - start)


def through_the_job(prompts: list[str], batch_size: int) -> tuple[float, float]:
    """Pictures a second from the first device call to the last part; and of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        stage = {
            "op": "txt2img",
            "model": "builtin:shapes",
            "num_inference_steps": 25,
            "guidance_scale": 2.0,
            "batch_size": batch_size,
        }
        job = {"source": {"rows": prompts}, "stages": [stage], "sink": {"path": f"{folder}/out"}}
        path = Path(folder) / "job.yaml"
        path.write_text(yaml.safe_dump(job))
        start = time.perf_counter()
        run(load_job(path))
        whole = len(prompts) / (time.perf_counter() - start)
        return len(prompts) / span_s(Path(folder) / "out"), whole


def span_s(output: Path) -> float:
    """Seconds from the first device call to the last part, of an output on a disk.

    When a call begins is written down nowhere. A shard's first row is packed after all calls of it; for the first shard
    of all that may be seconds later, as whoever packs it has to start. A worker's last one is packed after all calls of
    it, without that wait, but there may be gaps between them. Both say too late a begin; the earlier is taken.
    """
    rows = read_manifest(output, ["shard", "worker", "created_at", "duration_s"]).to_pylist()
    begin = min(_begin(rows, "shard", min), _begin(rows, "worker", max))
    # A row's own time is from before its picture is encoded, and its part committed.
    return max(part.stat().st_mtime for part in output.glob("manifest/**/*.parquet")) - begin


def _begin(rows: list[dict[str, Any]], of: str, which: Callable[[Iterable[float]], float]) -> float:
    alike: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault(row[of], []).append(row)
    return min(
        which(row["created_at"].timestamp() for row in some) - sum(row["duration_s"] for row in some)
        for some in alike.values()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    prompts = [str(caption) for caption in all_captions()][:: max(1, 2880 // args.rows)][: args.rows]
    ratios = []
    for _ in range(args.rounds):
        peer = bare(prompts, args.batch_size)
        ours, whole = through_the_job(prompts, args.batch_size)
        ratios.append(ours / peer)
        print(
            json.dumps(
                {
                    "bare": round(peer, 2),
                    "job": round(ours, 2),
                    "ratio": round(ours / peer, 3),
                    "command": round(whole, 2),
                }
            )
        )
    print(json.dumps({"median_ratio": round(statistics.median(ratios), 3), "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
