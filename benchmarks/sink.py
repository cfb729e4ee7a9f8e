"""Figure: pictures a second into a lossless image sink, against `Dataset.write_images` of Ray Data.

    python -m benchmarks.sink [--pictures 768] [--size 512] [--per-shard 16] [--rounds 3]

Both take the same distinct pictures, as uint8 blocks that lie in Ray's object store already, to PNG files in a local
folder, in turn, and each run is timed as a whole; the peer is given a quarter of them, as it is slow. Ours is the run's
own last step: names that follow from the content, every file synced to the disk, a manifest part for each shard.
Afterwards every picture is read back by Pillow and compared. The same without Ray: one writer against what one task of
the peer does; there also the processor time, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from pyarrow.fs import LocalFileSystem

from benchmarks.finished import finished
from benchmarks.pictures import distinct
from pipelines import manifest, read_manifest, sink
from pipelines.cluster import ray_cluster
from pipelines.fitting import TASK_CPUS
from pipelines.sink import ShardWriter

Pictures = list[NDArray[np.uint8]]
ENCODERS = ("pillow", "fpng")
WATCHED = (
    (sink, "rows_of", "rows"),
    (sink, "encode", "encode"),
    (sink, "describe", "describe"),
    (sink, "content_name", "hash"),
    (manifest, "part_bytes", "part"),
    (sink, "commit_shard", "files"),
    (os, "fsync", "fsync, all threads"),
)


class Clock:
    """How long a `with` block takes for `num` pictures: `rate` a second, `cpu_ms` of this process each."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __enter__(self) -> Clock:
        self.start, self.cpu_s = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.rate = self.num / (time.perf_counter() - self.start)
        self.cpu_ms = 1000 * (time.process_time() - self.cpu_s) / self.num


def peer(pictures: Pictures, per_block: int, folder: str, filesystem: Any = None) -> Clock:
    import ray.data

    batches = [np.stack(pictures[i : i + per_block]) for i in range(0, len(pictures), per_block)]
    dataset = ray.data.from_numpy(batches)
    with Clock(len(pictures)) as clock:
        dataset.write_images(folder, column="data", file_format="png", filesystem=filesystem)
    return clock


def peer_alone(pictures: Pictures, folder: Path) -> Clock:
    """What one task of `write_images` does, in this process: Pillow's default, one file after the other, not synced."""
    filesystem = LocalFileSystem()
    folder.mkdir()
    with Clock(len(pictures)) as clock:
        for i, picture in enumerate(pictures):
            with filesystem.open_output_stream(str(folder / f"{i}.png")) as file:
                buffer = io.BytesIO()
                Image.fromarray(picture).save(buffer, format="png")
                file.write(buffer.getvalue())
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


def ours_alone(writer: ShardWriter, shards: list[pa.Table], shares: bool = False) -> tuple[Clock, dict[str, float]]:
    """One writer in this process, without Ray; with `shares`, of its time. `fsync` is a sum over threads that are a
    part of `files`, so it may be more than that."""
    spent: dict[str, float] = {}
    with ExitStack() as stack:
        for owner, name, what in WATCHED if shares else ():
            stack.enter_context(watched(owner, name, spent, what))
        with Clock(sum(shard.num_rows for shard in shards)) as clock:
            for shard in shards:
                writer(shard)
    return clock, {what: round(seconds * clock.rate / clock.num, 3) for what, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=768)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--per-shard", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    pictures = distinct(args.pictures, args.size)
    few = pictures[: max(2 * args.per_shard, args.pictures // 4)]
    rounds: list[dict[str, Clock]] = []
    sizes: dict[str, int] = {}
    with ray_cluster(None), tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        root = Path(temporary)

        def sink_of(name: str, encoder: str) -> dict[str, Any]:
            return {"path": str(root / name), "png_encoder": encoder}

        for n in range(args.rounds + 1):
            # The first round starts Ray's processes and is thrown away.
            first = pictures[: 16 * args.per_shard] if n == 0 else None
            clocks = {
                "alone, peer": peer_alone(first or few, root / f"alone-{n}"),
                "ray, peer": peer(first or few, args.per_shard, str(root / f"peer-{n}")),
            }
            for encoder in ENCODERS:
                for where in ("alone", "ray"):
                    name = f"{where}-{encoder}-{n}"
                    made = finished(first or pictures, args.per_shard, sink_of(name, encoder))
                    clocks[f"{where}, {encoder}"] = ours(*made) if where == "ray" else ours_alone(*made)[0]
                    sizes[encoder] = compare(root / name, first or pictures)
                    shutil.rmtree(root / name)
            if n:
                rounds.append(clocks)
                print(json.dumps({name: round(clock.rate, 1) for name, clock in clocks.items()}), flush=True)
        for encoder in ENCODERS:
            made = finished(few, args.per_shard, sink_of(f"shares-{encoder}", encoder))
            print(json.dumps({f"shares, {encoder}": ours_alone(*made, shares=True)[1]}))
    for where in ("alone", "ray"):
        for encoder in ENCODERS:
            both = [(one[f"{where}, {encoder}"], one[f"{where}, peer"]) for one in rounds]
            said = {
                "rate_over_peer": spread(one.rate / theirs.rate for one, theirs in both),
                # Of Ray's processes nobody knows.
                **(
                    {"cpu_under_peer": spread(theirs.cpu_ms / one.cpu_ms for one, theirs in both)}
                    if where == "alone"
                    else {}
                ),
                "bytes_over_pillow": round(sizes[encoder] / sizes["pillow"], 3),
                "load": os.getloadavg()[0],
            }
            print(json.dumps({f"{where}, {encoder}": said}))


def spread(ratios: Iterable[float]) -> list[float]:
    """Least, median and most."""
    found = list(ratios)
    return [round(f(found), 1) for f in (min, statistics.median, max)]


if __name__ == "__main__":
    main()
