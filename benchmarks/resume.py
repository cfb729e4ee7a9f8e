"""How long until a run goes on that has half of a very long plan behind it, and how much memory that takes.

    python -m benchmarks.resume [--shards 1000000] [--rows-per-shard 8] [--without-peer]

Ours: a table of that many rows, planned; half of the shards' parts exist (stand-ins: a resume only lists them).
`ldm-batch run` of that job is timed until the first new part stands in the output.

The peer: Ray Data with its job checkpoint (`ray.data.checkpoint.CheckpointConfig`) on as many rows, half of them done
by an earlier run, timed until the second run has written its first file. Memory is the sum of the proportional set
sizes (PSS) of all processes of a run, shared memory among them, and of the driver alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipelines import load_job, plan

FILES = 20
"""Of the peer's input."""


def measure(
    num_shards: int = 1_000_000, rows_per_shard: int = 8, with_peer: bool = True, seed: int = 0
) -> dict[str, Any]:
    """The figures, ours and the peer's."""
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {"shards": num_shards, **_ours(Path(folder), num_shards, rows_per_shard, seed)}
    if with_peer:
        with tempfile.TemporaryDirectory() as folder:
            result |= _peer(Path(folder), num_shards * rows_per_shard)
        result["times_faster"] = round(result["peer_first_s"] / result["first_s"], 1)
        result["times_less_memory"] = round(result["peer_peak_mb"] / result["peak_mb"], 1)
    return result


def _plan(job: Path) -> str:
    return plan(load_job(job)).plans[0].plan_id


def _ours(folder: Path, num_shards: int, rows_per_shard: int, seed: int) -> dict[str, Any]:
    table = folder / "prompts.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt"])
        writer.writerows([f"row-{i}", f"a small red circle {i}"] for i in range(num_shards * rows_per_shard))
    stage: dict[str, Any] = {"op": "txt2img", "model": "builtin:shapes", "num_inference_steps": 1, "workers": 1}
    stage["batch_size"] = rows_per_shard
    data = {
        "source": {"path": str(table)},
        "stages": [stage],
        "sink": {"path": str(folder / "out")},
        "batches_per_shard": 1,
    }
    job = folder / "job.yaml"
    job.write_text(yaml.safe_dump(data))
    start = time.perf_counter()
    # In a process of its own, whose memory is then free.
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        plan_id = other.submit(_plan, job).result()
    planning_s = time.perf_counter() - start
    parts = folder / "out" / "manifest" / plan_id
    parts.mkdir(parents=True)
    order = random.Random(seed).sample(range(num_shards), num_shards)
    for i in order[: num_shards // 2]:
        (parts / f"{i:06d}.parquet").write_bytes(b"stand-in")
    left = sorted(order[num_shards // 2 :])[:256]
    command = [sys.executable, "-m", "pipelines", "run", str(job)]
    first_s, peak_mb, driver_mb = watch(command, lambda: any((parts / f"{i:06d}.parquet").exists() for i in left))
    return {
        "planning_s": round(planning_s, 1),
        "first_s": round(first_s, 1),
        "peak_mb": round(peak_mb),
        "driver_peak_mb": round(driver_mb),
    }


_PEER = """
import sys, ray
from ray.data.checkpoint import CheckpointConfig
folder, pattern = sys.argv[1], sys.argv[2].split(",")
ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
context = ray.data.DataContext.get_current()
context.enable_progress_bars = False
context.checkpoint_config = CheckpointConfig(
    id_column="id", checkpoint_path=folder + "/checkpoint", delete_checkpoint_on_success=False
)
rows = ray.data.read_parquet(pattern).map_batches(lambda batch: batch, batch_size=1024)
rows.write_parquet(folder + "/out")
"""


def _peer(folder: Path, num_rows: int) -> dict[str, Any]:
    (folder / "in").mkdir()
    files = [folder / "in" / f"{n:03d}.parquet" for n in range(FILES)]
    for n, path in enumerate(files):
        ids = range(n * num_rows // FILES, (n + 1) * num_rows // FILES)
        prompts = [f"a small red circle {i}" for i in ids]
        pq.write_table(pa.table({"id": [f"row-{i}" for i in ids], "prompt": prompts}), path)
    script = folder / "peer.py"
    script.write_text(_PEER)

    def command(some: list[Path]) -> list[str]:
        return [sys.executable, str(script), str(folder), ",".join(map(str, some))]

    subprocess.run(command(files[: FILES // 2]), check=True, capture_output=True)
    before = len(list((folder / "out").glob("*.parquet")))
    first_s, peak_mb, driver_mb = watch(command(files), lambda: len(list((folder / "out").glob("*.parquet"))) > before)
    return {
        "peer_first_s": round(first_s, 1),
        "peer_peak_mb": round(peak_mb),
        "peer_driver_peak_mb": round(driver_mb),
    }


def watch(command: list[str], is_there: Callable[[], bool]) -> tuple[float, float, float]:
    """Run until something is there, then kill: seconds until then, and peak memory in MB of all and of the driver."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    everything = driver = 0.0
    try:
        while not is_there():
            if process.poll() is not None:
                assert process.stderr is not None
                raise RuntimeError(f"it ended before: {process.stderr.read().decode()[-2000:]}")
            sizes = _memory_mb(process.pid)
            everything, driver = max(everything, sum(sizes.values())), max(driver, sizes.get(process.pid, 0.0))
            time.sleep(0.25)
        return time.perf_counter() - start, everything, driver
    finally:
        for pid in _memory_mb(process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.kill()
        process.wait()


def _memory_mb(root: int) -> dict[int, float]:
    """PSS of a process and all that descend from it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    sizes = {}
    for pid in family:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        sizes[pid] = next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("Pss:")), 0.0)
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--rows-per-shard", type=int, default=8)
    parser.add_argument("--without-peer", action="store_true")
    args = parser.parse_args()
    print(json.dumps(measure(args.shards, args.rows_per_shard, not args.without_peer)))


if __name__ == "__main__":
    main()
