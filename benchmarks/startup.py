"""What a new user waits for: --help, the first picture, the whole demo job.

python benchmarks/startup.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipelines", *arguments]


def main() -> None:
    helps = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run(command("--help"), cwd=ROOT, check=True, capture_output=True)
        helps.append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        start = time.perf_counter()
        job = subprocess.Popen(
            command("run", "jobs/txt2img.yaml", "--set", f"sink.path={out}"),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not list(out.glob("images/*/*.png")):
            time.sleep(0.05)
        first = time.perf_counter() - start
        job.wait()
        whole = time.perf_counter() - start
    print(
        json.dumps(
            {
                "help_s": round(statistics.median(helps[1:]), 2),
                "first_picture_s": round(first, 1),
                "demo_s": round(whole, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
