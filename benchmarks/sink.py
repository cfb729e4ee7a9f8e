"""Figure: pictures a second into a lossless image sink, against `Dataset.write_images` of Ray Data.

    python -m benchmarks.sink [--pictures 768] [--size 512] [--per-shard 16] [--rounds 3] [--cpus 2]

Both take the same distinct pictures, as uint8 blocks that lie in Ray's object store already, to PNG files in a local
folder, in turn, and each run is timed as a whole; the peer is given a quarter of them, as it is slow. Ours is the run's
own last step: names that follow from the content, every file synced to the disk, a manifest part for each shard.
Afterwards every picture is read back by Pillow and compared. Beside the time stands the processor time of all of Ray's
processes, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from benchmarks.finished import finished
from benchmarks.pictures import distinct
from pipelines import manifest, read_manifest, sink
from pipelines.cluster import TASK_CPUS, quiet_ray_data
from pipelines.sink import ShardWriter

Pictures = list[NDArray[np.uint8]]
ENCODERS = ("pillow", "fpng")


class Clock:
    """How long a `with` block takes for `num` pictures: `rate` a second, `cpu_ms` each of this process and below it."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __enter__(self) -> Clock:
        self.start, self.cpu_s = time.perf_counter(), _cpu_s()
        return self

    def __exit__(self, *_: object) -> None:
        self.rate = self.num / (time.perf_counter() - self.start)
        self.cpu_ms = 1000 * (_cpu_s() - self.cpu_s) / self.num


def _cpu_s() -> float:
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.Error):
            total += sum(process.cpu_times()[:2])
    return total


def peer(pictures: Pictures, per_block: int, folder: str, filesystem: Any = None) -> Clock:
    import ray.data

    batches = [np.stack(pictures[i : i + per_block]) for i in range(0, len(pictures), per_block)]
    dataset = ray.data.from_numpy(batches)
    with Clock(len(pictures)) as clock:
        dataset.write_images(folder, column="data", file_format="png", filesystem=filesystem)
    return clock


def ours(writer: ShardWriter, shards: list[pa.Table]) -> Clock:
    import ray.data

    dataset = ray.data.from_blocks(shards)
    num = sum(shard.num_rows for shard in shards)
    with Clock(num) as clock:
        receipts = dataset.map_batches(writer, batch_size=None, batch_format="pyarrow", num_cpus=TASK_CPUS)
        batches = receipts.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        assert sum(sum(batch["num_ok"].to_pylist()) for batch in batches) == num
    return clock


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
    few = pictures[: max(args.per_shard * args.cpus, args.pictures // 4)]
    rounds: list[dict[str, Clock]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        root = Path(temporary)

        def sink_of(name: str, encoder: str) -> dict[str, Any]:
            return {"path": str(root / name), "png_encoder": encoder}

        for n in range(args.rounds + 1):
            # The first round starts Ray's processes and is thrown away.
            first = pictures[: args.per_shard * args.cpus * 2] if n == 0 else None
            clocks = {"write_images": peer(first or few, args.per_shard, str(root / f"peer-{n}"))}
            for encoder in ENCODERS:
                name = f"{encoder}-{n}"
                clocks[encoder] = ours(*finished(first or pictures, args.per_shard, sink_of(name, encoder)))
                compare(root / name, first or pictures)
                shutil.rmtree(root / name)
            if n:
                rounds.append(clocks)
                print(
                    json.dumps({name: [round(c.rate, 1), round(c.cpu_ms, 2)] for name, c in clocks.items()}), flush=True
                )
        sizes = {}
        for encoder in ENCODERS:
            name = f"alone-{encoder}"
            print(json.dumps({encoder: shares(*finished(few, args.per_shard, sink_of(name, encoder)))}), flush=True)
            sizes[encoder] = compare(root / name, few)
    ray.shutdown()
    for encoder in ENCODERS:
        said: dict[str, Any] = {"png_encoder": encoder, "bytes_over_pillow": round(sizes[encoder] / sizes["pillow"], 3)}
        said["rate_over_write_images"] = spread(one[encoder].rate / one["write_images"].rate for one in rounds)
        said["cpu_under_write_images"] = spread(one["write_images"].cpu_ms / one[encoder].cpu_ms for one in rounds)
        print(json.dumps({**said, "load": os.getloadavg()[0]}))


def spread(ratios: Iterable[float]) -> list[float]:
    """Least, median and most."""
    found = list(ratios)
    return [round(f(found), 1) for f in (min, statistics.median, max)]


if __name__ == "__main__":
    main()
