"""How many bytes an encoded dataset takes whose captions repeat ten times, against what must be kept at least.

    python benchmarks/embeddings.py [NUM_PICTURES]

Draws pictures of 256 px, ten to a caption, encodes them and embeds their captions with `builtin:shapes` by two whole
jobs, and adds up every file that both leave: data, manifests, plans. Against that stands one copy of the latents and
one embedding for each distinct caption, and the empty one, without any file around them.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from ldm_ops.builtin.draw import all_captions, draw
from pipelines import read_manifest
from pipelines.job import parse_job
from pipelines.runner import run

REPEATS = 10


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    num_pictures = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    captions = all_captions()[: num_pictures // REPEATS]
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        with (folder / "table.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["id", "image", "prompt"])
            for i in range(len(captions) * REPEATS):
                caption = captions[i // REPEATS]
                picture = draw(caption, np.random.default_rng(i), scale=4)
                Image.fromarray(picture).save(folder / f"{i}.png")
                table.writerow([i, f"{i}.png", str(caption)])
        sizes = {}
        for op in ("encode", "embed"):
            stage = {"op": op, "model": "builtin:shapes", "batch_size": 16}
            job = {"stages": [stage], "source": {"path": str(folder / "table.csv")}, "sink": {"path": str(folder / op)}}
            summary = run(parse_job(yaml.safe_dump(job)))
            sizes[op] = (
                folder_bytes(folder / op),
                sum(read_manifest(folder / op, ["num_bytes"])["num_bytes"].to_pylist()),
            )
            sizes[op] = (*sizes[op], summary.totals.num_ok, summary.num_duplicates)
        whole, least = (sum(size[i] for size in sizes.values()) for i in (0, 1))
        result = {
            **{
                op: {"file_bytes": size[0], "num_bytes": size[1], "rows": size[2], "duplicates": size[3]}
                for op, size in sizes.items()
            },
            "whole_of_least": round(whole / least, 4),
        }
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
