"""The demo job four ways: 1 worker, 2 workers, interrupted and resumed, rows shuffled. All digests must be equal.

python benchmarks/same_bytes.py
"""

from __future__ import annotations

import csv
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def job(out: Path, *more: str) -> list[str]:
    arguments = ["run", "jobs/txt2img.yaml", "--json", "--set", f"sink.path={out}"]
    for assignment in more:
        arguments += ["--set", assignment]
    return [sys.executable, "-m", "pipelines", *arguments]


def digest(arguments: list[str]) -> str:
    done = subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True, text=True)
    return str(json.loads(done.stdout)["totals"]["digest"])


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        digests = {
            "1 worker": digest(job(folder / "one", "stages.0.workers=1")),
            "2 workers": digest(job(folder / "two", "stages.0.workers=2")),
        }
        running = subprocess.Popen(
            job(folder / "stopped"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not list((folder / "stopped").glob("manifest/*/*.parquet")):
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        code = running.wait()
        parts = len(list((folder / "stopped").glob("manifest/*/*.parquet")))
        digests[f"interrupted (exit {code}, {parts} parts) and resumed"] = digest(job(folder / "stopped"))
        with (ROOT / "jobs/data/prompts.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        random.Random(1).shuffle(rows)
        with (folder / "shuffled.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        digests["shuffled"] = digest(job(folder / "shuffled", f"source.path={folder / 'shuffled.csv'}"))
    print(json.dumps(digests, indent=1))
    if len(set(digests.values())) != 1:
        raise SystemExit("the bytes differ")


if __name__ == "__main__":
    main()
