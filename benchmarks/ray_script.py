"""A whole txt2img job against the script that one writes with plain Ray Data: a class around a diffusers pipeline in
`map_batches`, then `write_images`.

    python -m benchmarks.ray_script [--rows 256] [--rounds 3]

    uniform    every row alike
    mixed      3 sizes × 3 step counts × guidance on and off, drawn for each row; the script splits each of its batches
               into what a pipeline can take, as it comes

Both have two workers of one thread each and batches of 8. Counted from the first device call to the last file, so that
the model is loaded on both sides; ours writes a manifest, digests and a part for each shard too.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import ldm_ops.builtin
from benchmarks.generation import span_s
from ldm_ops.builtin.draw import all_captions
from pipelines import load_job, run
from pipelines.cluster import ray_cluster

Row = dict[str, Any]
SIZES = (48, 64, 80)
STEPS = (10, 15, 25)
GUIDANCE = (1.0, 2.0)
BATCH_SIZE, WORKERS = 8, 2
BY = ("height", "width", "num_inference_steps", "guidance_scale")


def uniform(num_rows: int) -> list[Row]:
    prompts = [str(caption) for caption in all_captions()][:: max(1, 2880 // num_rows)][:num_rows]
    return [
        {"prompt": prompt, "height": 64, "width": 64, "num_inference_steps": 25, "guidance_scale": 2.0}
        for prompt in prompts
    ]


def mixed(num_rows: int) -> list[Row]:
    rng = random.Random(0)
    rows = uniform(num_rows)
    for row in rows:
        row["height"] = row["width"] = rng.choice(SIZES)
        row |= {"num_inference_steps": rng.choice(STEPS), "guidance_scale": rng.choice(GUIDANCE)}
    return rows


class Painter:
    """The script's actor."""

    def __init__(self, notes: str) -> None:
        import torch
        from diffusers import StableDiffusionPipeline

        folder = Path(ldm_ops.builtin.__file__).parent / "shapes"
        self.pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
        self.pipe.set_progress_bar_config(disable=True)
        self.notes = notes

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with suppress(FileExistsError), Path(self.notes).open("x") as file:
            file.write(str(time.time()))
        rows = [{name: column[i] for name, column in batch.items()} for i in range(len(batch["prompt"]))]
        images = []
        for shape, group in groupby(sorted(rows, key=_shape), _shape):
            height, width, steps, guidance = shape
            made = self.pipe(
                [str(row["prompt"]) for row in group],
                height=int(height),
                width=int(width),
                num_inference_steps=int(steps),
                guidance_scale=float(guidance),
                output_type="np",
            )
            images += list((made.images * 255).round().astype(np.uint8))
        if len({image.shape for image in images}) == 1:
            return {"image": np.stack(images)}
        ragged = np.empty(len(images), object)
        ragged[:] = images
        return {"image": ragged}


def _shape(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in BY)


def script(rows: list[Row], folder: Path) -> float:
    """Seconds of plain Ray Data."""
    import ray.data

    notes = folder / "begun"
    made = ray.data.from_items(rows).map_batches(
        Painter, fn_constructor_args=(str(notes),), batch_size=BATCH_SIZE, concurrency=WORKERS, num_cpus=0.75
    )
    made.write_images(str(folder / "images"), column="image")
    if len(list((folder / "images").iterdir())) != len(rows):
        raise RuntimeError("the script lost pictures")
    return time.time() - float(notes.read_text())


def job(rows: list[Row], folder: Path) -> float:
    """Seconds of ours."""
    with (folder / "rows.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    stage = {"op": "txt2img", "model": "builtin:shapes", "batch_size": BATCH_SIZE, "workers": WORKERS}
    value = {"source": {"path": str(folder / "rows.csv")}, "stages": [stage], "sink": {"path": str(folder / "out")}}
    (folder / "job.yaml").write_text(yaml.safe_dump(value))
    run(load_job(folder / "job.yaml"))
    return span_s(folder / "out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    tables: dict[str, Callable[[int], list[Row]]] = {"uniform": uniform, "mixed": mixed}
    for name, table in tables.items():
        rows = table(args.rows)
        ratios = []
        for _ in range(args.rounds):
            seconds = {}
            for who, how in (("script", script), ("job", job)):
                with tempfile.TemporaryDirectory() as folder, ray_cluster(None):
                    seconds[who] = how(rows, Path(folder))
            ratios.append(seconds["script"] / seconds["job"])
            print(
                json.dumps({"table": name, **{who: round(len(rows) / s, 2) for who, s in seconds.items()}}), flush=True
            )
        found = {"median_ratio": round(statistics.median(ratios), 2), "ratios": [round(r, 2) for r in ratios]}
        print(json.dumps({"table": name, **found}), flush=True)


if __name__ == "__main__":
    main()
