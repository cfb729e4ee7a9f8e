"""Figure: pictures a second into a lossless image sink, against `Dataset.write_images` of Ray Data.

    python -m benchmarks.sink [--pictures 768] [--size 512] [--per-shard 16] [--rounds 3] [--cpus 2]

Both take the same distinct pictures, as uint8 blocks that lie in Ray's object store already, to PNG files in a local
folder, in turn, and each run is timed as a whole. Ours is the run's own last step: names that follow from the content,
every file and folder synced to the disk, a manifest part for each shard. Afterwards every picture is read back by
Pillow and compared. The peer is given fewer pictures, as it is slow.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from benchmarks.finished import finished
from benchmarks.pictures import distinct
from pipelines import manifest, read_manifest, sink
from pipelines.cluster import TASK_CPUS, quiet_ray_data
from pipelines.sink import ShardWriter

Pictures = list[NDArray[np.uint8]]


def peer(pictures: Pictures, per_block: int, folder: str, filesystem: Any = None) -> float:
    """Pictures a second."""
    import ray.data

    batches = [np.stack(pictures[i : i + per_block]) for i in range(0, len(pictures), per_block)]
    dataset = ray.data.from_numpy(batches)
    start = time.perf_counter()
    dataset.write_images(folder, column="data", file_format="png", filesystem=filesystem)
    return len(pictures) / (time.perf_counter() - start)


def ours(writer: ShardWriter, shards: list[pa.Table]) -> float:
    """Pictures a second."""
    import ray.data

    dataset = ray.data.from_blocks(shards)
    start = time.perf_counter()
    receipts = dataset.map_batches(writer, batch_size=None, batch_format="pyarrow", num_cpus=TASK_CPUS, max_retries=3)
    done = sum(
        sum(batch["num_ok"].to_pylist())
        for batch in receipts.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    )
    took = time.perf_counter() - start
    assert done == sum(shard.num_rows for shard in shards)
    return done / took


def compare(folder: Path, pictures: Pictures) -> int:
    """Bytes of all pictures of an output, once each is found to be what went in."""
    rows = read_manifest(folder).to_pylist()
    assert sorted(row["seed"] for row in rows) == list(range(len(pictures)))
    for row in rows:
        with Image.open(folder / row["uri"]) as image:
            assert np.array_equal(np.asarray(image), pictures[row["seed"]]), row["uri"]
            assert f"Seed: {row['seed']}" in image.info["parameters"]
    return sum(row["num_bytes"] for row in rows)


@contextmanager
def watched(owner: Any, name: str, spent: dict[str, float], what: str) -> Iterator[None]:
    """Add the time of every call of `owner.name` to `spent`."""
    real: Callable[..., Any] = getattr(owner, name)

    def timed(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return real(*arguments, **named)
        finally:
            spent[what] = spent.get(what, 0.0) + time.perf_counter() - start

    with mock.patch.object(owner, name, timed):
        yield


def shares(writer: ShardWriter, shards: list[pa.Table]) -> dict[str, float]:
    """Of the time of one writer alone, without Ray: where it goes. `fsync` is a sum over threads, so it is part of
    `files`, or more than it."""
    spent: dict[str, float] = {}
    with ExitStack() as stack:
        for owner, name, what in (
            (sink, "encode", "encode"),
            (sink, "content_name", "hash"),
            (sink, "describe", "describe"),
            (sink, "_rows", "rows"),
            (manifest, "part_bytes", "part"),
            (sink, "commit_shard", "files"),
            (os, "fsync", "fsync, all threads"),
        ):
            stack.enter_context(watched(owner, name, spent, what))
        start, cpu = time.perf_counter(), time.process_time()
        for shard in shards:
            writer(shard)
        whole, cpu = time.perf_counter() - start, time.process_time() - cpu
    num = sum(shard.num_rows for shard in shards)
    return {
        "ms_a_picture": round(1000 * whole / num, 2),
        "cpu_ms_a_picture": round(1000 * cpu / num, 2),
        **{what: round(seconds / whole, 3) for what, seconds in spent.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=768)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--per-shard", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    import ray

    ray.init("local", num_cpus=args.cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    quiet_ray_data()
    pictures = distinct(args.pictures, args.size)
    few = pictures[: max(args.per_shard * args.cpus, args.pictures // 8)]
    rates: dict[str, list[float]] = {"write_images": [], "pillow": [], "fpng": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        root = Path(temporary)

        def sink_of(name: str, encoder: str) -> dict[str, Any]:
            return {"path": str(root / name), "png_encoder": encoder}

        for n in range(args.rounds + 1):
            # The first round starts Ray's processes and is thrown away.
            some = pictures[: args.per_shard * args.cpus * 2] if n == 0 else few
            rate = peer(some, args.per_shard, str(root / f"peer-{n}"))
            line = {"write_images": rate}
            for encoder in ("pillow", "fpng"):
                name = f"{encoder}-{n}"
                some = pictures[: args.per_shard * args.cpus * 2] if n == 0 else pictures
                line[encoder] = ours(*finished(some, args.per_shard, sink_of(name, encoder)))
                compare(root / name, some)
            if n:
                for name, rate in line.items():
                    rates[name].append(rate)
                print(json.dumps({name: round(rate, 1) for name, rate in line.items()}), flush=True)
        sizes = {}
        for encoder in ("pillow", "fpng"):
            name = f"alone-{encoder}"
            print(json.dumps({encoder: shares(*finished(few, args.per_shard, sink_of(name, encoder)))}), flush=True)
            sizes[encoder] = compare(root / name, few)
    ray.shutdown()
    for encoder in ("pillow", "fpng"):
        ratios = [own / theirs for own, theirs in zip(rates[encoder], rates["write_images"], strict=True)]
        print(
            json.dumps(
                {
                    "png_encoder": encoder,
                    "over_write_images": [
                        round(min(ratios), 1),
                        round(statistics.median(ratios), 1),
                        round(max(ratios), 1),
                    ],
                    "bytes_over_pillow": round(sizes[encoder] / sizes["pillow"], 3),
                    "load": os.getloadavg()[0],
                }
            )
        )


if __name__ == "__main__":
    main()
