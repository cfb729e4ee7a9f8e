"""Every shipped job four ways: 1 worker, 2 workers, killed and resumed, rows shuffled. All digests must be equal.

    python benchmarks/same_bytes.py [jobs/txt2img.yaml …]

The digest is that of (key, sha256) of every row. Shards hold one small batch, so that a kill finds only some done.
"""

from __future__ import annotations

import csv
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def command(job: Path, out: Path, *more: str) -> list[str]:
    arguments = ["run", str(job), "--json"]
    for assignment in (f"sink.path={out}", "batches_per_shard=1", "stages.0.batch_size=4", *more):
        arguments += ["--set", assignment]
    return [sys.executable, "-m", "pipelines", *arguments]


def digest(arguments: list[str]) -> str:
    done = subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True, text=True)
    return str(json.loads(done.stdout)["totals"]["digest"])


def killed(job: Path, out: Path) -> int:
    """Start a run and kill it after its first shard; the number of shards that it left."""
    arguments = command(job, out, "stages.0.workers=1")
    running = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(out.glob("manifest/*/*.parquet")) and running.poll() is None:
        time.sleep(0.02)
    running.kill()
    running.wait()
    return len(list(out.glob("manifest/*/*.parquet")))


def shuffled(table: Path, folder: Path) -> Path:
    """A copy of the table's folder in which its rows stand in another order."""
    shutil.copytree(table.parent, folder / "data")
    copy = folder / "data" / table.name
    with copy.open(newline="") as file:
        header, *rows = csv.reader(file)
    random.Random(1).shuffle(rows)
    with copy.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return copy


def main() -> None:
    jobs = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "jobs").glob("*.yaml"))
    wrong = []
    for job in jobs:
        path = yaml.safe_load(job.read_text())["source"].get("path", "")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            digests = {
                "1 worker": digest(command(job, folder / "one", "stages.0.workers=1")),
                "2 workers": digest(command(job, folder / "two", "stages.0.workers=2")),
            }
            parts = killed(job, folder / "killed")
            again = [*command(job, folder / "killed"), "--takeover"]
            digests[f"killed after {parts} shards and resumed"] = digest(again)
            if path.endswith(".csv"):
                table = shuffled(ROOT / path, folder)
                digests["rows shuffled"] = digest(command(job, folder / "shuffled", f"source.path={table}"))
        same = len(set(digests.values())) == 1
        print(json.dumps({"job": job.name, "equal": same, "digests": digests}), flush=True)
        wrong += [] if same else [job.name]
    if wrong:
        raise SystemExit(f"the bytes differ: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
