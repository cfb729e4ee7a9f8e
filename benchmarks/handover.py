"""Whether the device waits: our pipeline around a device that only sleeps, and plain Ray Data around the same.

    python -m benchmarks.handover [busy-250] [busy-50] [scale-out] [shards] [million] [--batches 240] [--rounds 3]

    busy-250   16 pictures of 512 px in 250 ms, through PNG files by fpng, digests and manifest: ideal time ÷ span, one
               worker
    busy-50    32 images of 256 px in 50 ms, from JPEG files to latents: the same
    scale-out  batches a second of 8 workers at 250 ms each ÷ 8 × those of one, while all of them work: without the
               start and the tail of a run
    shards     shards a second that one driver moves, a device batch taking no time; and the driver's own CPU time
    million    1,000,000 rows, a device batch of 64 taking no time, tiny pictures into a Parquet file a shard: rows a
               second of the last nine tenths of the shards, and the driver's memory when a tenth of them are done, at
               the end, and at most

The span is from the begin of a worker's first batch to the end of its last one. The peer's actor is the same sleep
under Ray Data's defaults, its pictures encoded by the same encoder and written in tasks behind it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from benchmarks.asleep import Asleep, EncodeAsleep, photo, wait
from pipelines import load_job, plan
from pipelines.cluster import ray_cluster
from pipelines.dataset import dataset
from pipelines.equipment import encoder_of, plan_models
from pipelines.fitting import Fit
from pipelines.heartbeat import Permit
from pipelines.loading import image_loader
from pipelines.plans import Plan, job_of
from pipelines.sink import ShardWriter
from pipelines.storage import Store
from pipelines.worker import Place


@dataclass(frozen=True)
class Load:
    """What is asked of a pipeline."""

    op: str
    side: int
    batch_size: int
    seconds: float
    num_batches: int
    batches_per_shard: int | str = "auto"
    workers: int = 1
    layout: str = "files"


def planned(load: Load, folder: Path) -> tuple[Store, Plan]:
    """A job of that many batches, planned as any other."""
    num_rows = load.num_batches * load.batch_size
    stage: dict[str, Any] = {"op": load.op, "model": "builtin:shapes", "batch_size": load.batch_size}
    source: dict[str, Any]
    if load.op == "txt2img":
        stage |= {"height": load.side, "width": load.side, "num_inference_steps": 1}
        (folder / "rows.csv").write_text("prompt\n" + "".join(f"a red circle {i}\n" for i in range(num_rows)))
        source = {"path": str(folder / "rows.csv")}
    else:
        (folder / "in").mkdir()
        for i in range(num_rows):
            Image.fromarray(photo(load.side, i * 97)).save(folder / "in" / f"{i:06d}.jpg", quality=90)
        source = {"path": str(folder / "in"), "format": "images"}
    data = {
        "source": source,
        "stages": [stage],
        "sink": {
            "path": str(folder / "out"),
            **({"png_encoder": "fpng", "layout": load.layout} if load.op == "txt2img" else {}),
        },
        "batches_per_shard": load.batches_per_shard,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(data))
    job = load_job(path)
    return Store(job.sink.path), plan(job).plans[0]


def ours(load: Load, folder: Path, done: Callable[[int], None] = lambda num_shards: None) -> float:
    """Run all of it; seconds from the first receipt's request to the last receipt. `done` hears of each."""
    store, made = planned(load, folder)
    job = job_of(made)
    [stage] = job.stages
    [(weights, facts)] = plan_models(made, job, [], {})
    asleep = {"txt2img": Asleep, "encode": EncodeAsleep}[load.op]
    op = asleep(**stage.bare().model_dump(), seconds=load.seconds, notes=str(folder / "notes"))
    place = Place(stage, 0, True, image_loader(stage, facts, job.source, 1))
    encoder = encoder_of(stage, weights, facts)
    receipts = dataset(
        store,
        made.shards,
        {},
        [(Fit(load.workers, 0.1, 0.0), (place, op, weights, Permit(store, "asleep")))],
        writer=ShardWriter(
            store, made.plan_id, job.sink, job.layout, "asleep", weights.name, weights.revision, encoder
        ),
        join=False,
        storage_options={},
        journal=f"asleep-{time.time()}",
    )
    begin = time.perf_counter()
    num_rows = 0
    for n, batch in enumerate(receipts.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)):
        num_rows += sum(receipt["num_ok"] for receipt in batch.to_pylist())
        done(n + 1)
    if num_rows != load.num_batches * load.batch_size:
        raise RuntimeError(f"{num_rows} rows are ok, {load.num_batches * load.batch_size} were planned")
    return time.perf_counter() - begin


class Sleeper:
    """The peer's actor."""

    def __init__(self, load: Load, notes: str) -> None:
        self.load = load
        self.notes = notes

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        begin = time.time()
        if self.load.op == "txt2img":
            made = {"id": batch["id"], "image": np.stack([photo(self.load.side, i * 97) for i in batch["id"]])}
        else:
            side = self.load.side // 8
            made = {"path": batch["path"], "latents": np.zeros((len(batch["image"]), 8, side, side), np.float16)}
        wait(begin, self.load.seconds, self.notes)
        return made


def peer(load: Load, folder: Path) -> float:
    """The same by Ray Data's defaults; seconds as in `ours`."""
    import ray.data

    notes, out = str(folder / "notes"), folder / "out"
    out.mkdir()
    if load.op == "txt2img":
        rows = ray.data.range(load.num_batches * load.batch_size)
    else:
        (folder / "in").mkdir()
        for i in range(load.num_batches * load.batch_size):
            Image.fromarray(photo(load.side, i * 97)).save(folder / "in" / f"{i:06d}.jpg", quality=90)
        rows = ray.data.read_images(str(folder / "in"), include_paths=True)

    def write(batch: dict[str, Any]) -> dict[str, Any]:
        from pipelines.images import encode

        for i, pixels in zip(batch["id"], batch["image"], strict=True):
            (out / f"{i}.png").write_bytes(encode(pixels, "png", png_encoder="fpng"))
        return {"id": batch["id"]}

    made = rows.map_batches(
        Sleeper, fn_constructor_args=(load, notes), batch_size=load.batch_size, concurrency=load.workers, num_cpus=0.1
    )
    begin = time.perf_counter()
    if load.op == "txt2img":
        for _ in made.map_batches(write, num_cpus=0.25).iter_batches(batch_size=None):
            pass
    else:
        made.write_parquet(str(out))
    return time.perf_counter() - begin


def busy(load: Load, notes: Path) -> float:
    """Ideal time ÷ span, the mean over the workers."""
    shares = []
    lines = [line.split() for line in notes.read_text().splitlines()]
    for pid in {line[2] for line in lines}:
        own = sorted((float(begin), float(end)) for begin, end, of in lines if of == pid)
        shares.append(len(own) * load.seconds / (own[-1][1] - own[0][0]))
    return statistics.mean(shares)


def rate(load: Load, notes: Path) -> float:
    """Device batches a second of all workers, from the last one's first batch to the first one's last."""
    lines = [line.split() for line in notes.read_text().splitlines()]
    own = {pid: [(float(b), float(e)) for b, e, of in lines if of == pid] for pid in {line[2] for line in lines}}
    since = max(min(begin for begin, _ in some) for some in own.values())
    until = min(max(end for _, end in some) for some in own.values())
    return sum(since <= begin and end <= until for some in own.values() for begin, end in some) / (until - since)


def measure(run: Callable[[Load, Path], float], load: Load, look: Callable[[Load, Path], float]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        run(load, Path(folder))
        return look(load, Path(folder) / "notes")


def compare(load: Load, rounds: int) -> dict[str, Any]:
    """Both in turn."""
    found: dict[str, list[float]] = {"busy": [], "ray_defaults": []}
    for _ in range(rounds):
        found["busy"].append(measure(ours, load, busy))
        found["ray_defaults"].append(measure(peer, load, busy))
    return {name: [round(x, 4) for x in some] for name, some in found.items()}


def scale_out(batches: int) -> dict[str, Any]:
    """1 and 8 workers, small pictures: what is asked is whether one driver feeds them."""
    one = Load("txt2img", 64, 8, 0.25, batches // 4, 4)
    eight = Load("txt2img", 64, 8, 0.25, 2 * batches, 4, workers=8)
    rates = [measure(ours, one, rate), measure(ours, eight, rate)]
    peers = [measure(peer, one, rate), measure(peer, eight, rate)]
    return {
        "batches_per_s": [round(x, 2) for x in rates],
        "linear": round(rates[1] / rates[0] / 8, 3),
        "ray_defaults_linear": round(peers[1] / peers[0] / 8, 3),
    }


def shards_per_s(batches: int) -> dict[str, Any]:
    """One batch a shard, one small picture a batch: all the time is the data plane's."""
    load = Load("txt2img", 64, 1, 0.0, 5 * batches, 1, workers=1)
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_SELF)
        ours(load, Path(folder))
        after = resource.getrusage(resource.RUSAGE_SELF)
        per_s = rate(load, Path(folder) / "notes")
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"shards_per_s": round(per_s, 1), "driver_cpu_ms_per_shard": round(1000 * cpu_s / load.num_batches, 1)}


def million(num_rows: int = 1_000_000) -> dict[str, Any]:
    load = Load("txt2img", 16, 64, 0.0, num_rows // 64, layout="parquet")
    held: list[tuple[float, int]] = []

    def done(num_shards: int) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held.append((time.perf_counter(), pages * resource.getpagesize()))

    with tempfile.TemporaryDirectory() as folder:
        span_s = ours(load, Path(folder), done)
    (early, early_bytes), (late, late_bytes) = held[len(held) // 10], held[-1]
    return {
        "shards": len(held),
        "span_s": round(span_s, 1),
        "rows_per_s": round(num_rows * 0.9 / (late - early)),
        "driver_mb": {
            "tenth": early_bytes >> 20,
            "end": late_bytes >> 20,
            "most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "busy-250": lambda args: compare(Load("txt2img", 512, 16, 0.25, args.batches), args.rounds),
        "busy-50": lambda args: compare(Load("encode", 256, 32, 0.05, 3 * args.batches), args.rounds),
        "scale-out": lambda args: scale_out(args.batches),
        "shards": lambda args: shards_per_s(args.batches),
        "million": lambda args: million(),
    }
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    parser.add_argument("--batches", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with ray_cluster(None):
        for name in args.parts or parts:
            with redirect_stdout(sys.stderr):
                found = parts[name](args)
            print(json.dumps({"part": name, **found}), flush=True)


if __name__ == "__main__":
    main()
