"""How fast a training reads stored latents, against a bare pyarrow scan of the same files; and memory over many rows.

    python benchmarks/latents.py [NUM_ROWS]

Writes latents of SD 1.5's shape at 512 px in two buckets (moments in fp16, 64 KiB a row) through the project's own
sink, then reads all of them: by pyarrow alone, by LatentDataset as stored (`raw`) and sampled from the moments, in one
process, with threads, with two DataLoader workers, and unshuffled. Then the memory over 100,000 smaller ones.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
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
ROUNDS = 3
HEAD = LatentsHead("made-up", "0" * 16, "moments", "", (0, 0, 0), 0.18215, 0.0, 8)


def write(out: Path, num_rows: int, shapes: tuple[tuple[int, ...], ...], per_shard: int) -> None:
    writer = ShardWriter(Store(str(out)), "0" * 16, Sink(path=str(out)), "latents", "run", "made-up", "0" * 16, HEAD)
    rng = np.random.default_rng(0)
    noise = [rng.standard_normal(shape).astype(np.float16) for shape in shapes]
    schema = pa.schema([*OWN_FIELDS, ("num_duplicates", pa.int32()), ("shard", pa.int32())])
    for shard, first in enumerate(range(0, num_rows, per_shard)):
        numbers = range(first, min(first + per_shard, num_rows))
        rows = [{"key": f"{i:032x}", "prompt": f"caption {i % 1000}", "shard": shard} for i in numbers]
        results: list[dict[str, Any]] = [
            {
                "status": "ok",
                "latents_data": pack(np.roll(noise[i % len(noise)], i)),
                "flipped": False,
                "original_height": 512,
                "original_width": 512,
                "crop_top": 0,
                "crop_left": 0,
            }
            for i in numbers
        ]
        writer(with_results(pa.Table.from_pylist(rows, schema=schema), results))


def scan(out: Path, copy: bool = True) -> int:
    size = 0
    for path in sorted((out / "data").rglob("*.parquet")):
        with pq.ParquetFile(path, memory_map=True) as file:
            for i in range(file.num_row_groups):
                latents = file.read_row_group(i)["latents"]
                for chunk in latents.chunks:
                    view = np.frombuffer(chunk.buffers()[1], np.uint8)
                    # As any reader must make one that hands a tensor of its own to a training.
                    size += (view.copy() if copy else view).nbytes
    return size


def reader(out: Path, workers: int, **options: Any) -> Callable[[], int]:
    """One epoch of a dataset that is open already, as all but the first of a training are."""
    dataset = LatentDataset(str(out), batch_size=32, **options)
    loader: Any = dataset
    if workers:
        loader = DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=True)
    return lambda: sum(len(batch["key"]) for batch in loader)


def speed(out: Path) -> dict[str, Any]:
    """Medians over ROUNDS, in which all ways take turns: MB/s, MB per second of this process's CPU time, and both as
    shares of the bare scan's of the same round."""
    size = scan(out)
    ways: dict[str, Any] = {
        "pyarrow scan": lambda: scan(out),
        "pyarrow scan, no copy": lambda: scan(out, copy=False),
        "stored": reader(out, 0, raw=True),
        "stored, in order": reader(out, 0, raw=True, shuffle=False),
        "stored, 1 thread ahead": reader(out, 0, raw=True, num_threads=1),
        "stored, 2 workers": reader(out, 2, raw=True),
        "sampled": reader(out, 0),
        "sampled, 2 threads": reader(out, 0, num_threads=2),
        "sampled, 2 workers": reader(out, 2),
    }
    for way in ways.values():
        way()
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start, cpu = time.perf_counter(), time.process_time()
            way()
            rates[name].append((size / (time.perf_counter() - start) / 1e6, size / (time.process_time() - cpu) / 1e6))
    bare = rates["pyarrow scan"]
    result: dict[str, Any] = {}
    for name, found in rates.items():
        result[name] = {
            "mb_per_s": round(median(wall for wall, _ in found)),
            "of_scan": round(median(wall / base for (wall, _), (base, _) in zip(found, bare, strict=True)), 2),
        }
        if "workers" not in name:
            result[name] |= {
                "mb_per_cpu_s": round(median(cpu for _, cpu in found)),
                "cpu_of_scan": round(median(cpu / base for (_, cpu), (_, base) in zip(found, bare, strict=True)), 2),
            }
    return result


def memory_mb() -> tuple[int, int]:
    """Resident memory of this process, and what of it is not pages of files, which the kernel can take back."""
    status = Path("/proc/self/status").read_text()
    whole, anonymous = (int(re.findall(rf"{name}:\s+(\d+)", status)[0]) >> 10 for name in ("VmRSS", "RssAnon"))
    return whole, anonymous


def memory(out: Path) -> dict[str, Any]:
    """(resident, anonymous) MB after each fifth of an epoch of many rows, and after a second one."""
    dataset = LatentDataset(str(out), batch_size=64)
    num_batches = len(dataset)
    after = {"0": memory_mb()}
    for epoch in range(2):
        for number, _ in enumerate(dataset, 1):
            if number % (num_batches // 5) == 0:
                after[f"epoch {epoch}, {number * 64} rows"] = memory_mb()
    return after


def main() -> None:
    num_rows = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        large, many = Path(folder) / "large", Path(folder) / "many"
        write(many, 100_000, ((8, 16, 16),), 2048)
        result: dict[str, Any] = {"100000 rows of 4 KiB, (resident, anonymous) MB": memory(many)}
        write(large, num_rows, SHAPES, 512)
        result |= {"rows": num_rows, "speed": speed(large)}
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
