"""How fast a training reads stored latents, against a bare pyarrow scan of the same files; and memory over many rows.

    python benchmarks/latents.py [NUM_ROWS]

Writes latents of SD 1.5's shape at 512 px in two buckets (moments in fp16, 64 KiB a row) through the project's own
sink, then reads all of them: by pyarrow alone, by LatentDataset as stored (`raw`), and sampled from the moments; in one
process, with two DataLoader workers, and unshuffled.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader

from pipelines.blocks import pack, with_results
from pipelines.job import Sink
from pipelines.latents import LatentDataset
from pipelines.latents_file import LatentsHead
from pipelines.row_table import OWN_FIELDS
from pipelines.sink import ShardWriter
from pipelines.storage import Store

SHAPES = ((8, 64, 64), (8, 48, 80))
ROWS_PER_SHARD = 512
HEAD = LatentsHead("made-up", "0" * 16, "moments", "", (0, 0, 0), 0.18215, 0.0, 8)


def write(out: Path, num_rows: int) -> None:
    writer = ShardWriter(Store(str(out)), "0" * 16, Sink(path=str(out)), "run", "made-up", "0" * 16, HEAD)
    rng = np.random.default_rng(0)
    noise = [rng.standard_normal(shape).astype(np.float16) for shape in SHAPES]
    schema = pa.schema([*OWN_FIELDS, ("num_duplicates", pa.int32()), ("shard", pa.int32())])
    for shard, first in enumerate(range(0, num_rows, ROWS_PER_SHARD)):
        numbers = range(first, min(first + ROWS_PER_SHARD, num_rows))
        rows = [{"key": f"{i:032x}", "prompt": f"caption {i % 1000}", "shard": shard} for i in numbers]
        results: list[dict[str, Any]] = [
            {
                "status": "ok",
                "latents_data": pack(np.roll(noise[i % 2], i)),
                "flipped": False,
                "original_height": 512,
                "original_width": 512,
                "crop_top": 0,
                "crop_left": 0,
            }
            for i in numbers
        ]
        writer(with_results(pa.Table.from_pylist(rows, schema=schema), results))


def scan(out: Path) -> int:
    size = 0
    for path in sorted((out / "data").rglob("*.parquet")):
        with pq.ParquetFile(path, memory_map=True) as file:
            for i in range(file.num_row_groups):
                latents = file.read_row_group(i)["latents"]
                for chunk in latents.chunks:
                    # A copy, as any reader must make that hands a tensor to a training.
                    size += np.frombuffer(chunk.buffers()[1], np.uint8).copy().nbytes
    return size


def read(out: Path, workers: int, **options: Any) -> int:
    rows = 0
    for batch in DataLoader(LatentDataset(str(out), batch_size=32, **options), batch_size=None, num_workers=workers):
        rows += len(batch["key"])
    return rows


def main() -> None:
    num_rows = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        out = Path(folder) / "latents"
        write(out, num_rows)
        size = scan(out)
        stored = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        ways: dict[str, Any] = {
            "pyarrow scan": lambda: scan(out),
            "raw": lambda: read(out, 0, raw=True),
            "raw, in order": lambda: read(out, 0, raw=True, shuffle=False),
            "raw, 2 workers": lambda: read(out, 2, raw=True),
            "sampled": lambda: read(out, 0),
            "sampled, 2 workers": lambda: read(out, 2),
        }
        best = dict.fromkeys(ways, float("inf"))
        memory: dict[str, int] = {}
        for _ in range(3):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                best[name] = min(best[name], time.perf_counter() - start)
                memory.setdefault(name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        result = {
            "rows": num_rows,
            "latents_mb": size / 1e6,
            "all_files_mb": stored / 1e6,
            "mb_per_s": {name: round(size / seconds / 1e6) for name, seconds in best.items()},
            "peak_mb_of_this_process_after": memory,
        }
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
