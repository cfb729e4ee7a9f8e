"""Hostile inputs at every door: how many come in, how many are refused, how many crash.

    python -m benchmarks.fuzz [10000 [SEED [DOOR …]]]

Each door is tried in a process of its own, of which no input may cost more than 20 s; its peak memory is printed. One
that ends the process is told by its exit code.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.doors import DOORS
from tests.fuzz.harness import INSIDE, Found, fuzz

ROUND = 500


def put(name: str, num_inputs: int, seed: int) -> int:
    """Print a line for one door, and each crash; how many kinds of them."""
    total, start = Found(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        while total.num_inputs < num_inputs:
            # hypothesis keeps what it has tried.
            found = fuzz(DOORS[name], min(ROUND, num_inputs - total.num_inputs), Path(folder), seed)
            total.outcomes += found.outcomes
            total.crashes |= found.crashes
            total.peak_mib = found.peak_mib
            seed += 1
    crashed = total.outcomes.pop("crash", 0)
    refused = ", ".join(f"{kind} {n}" for kind, n in total.outcomes.most_common() if kind != INSIDE)
    num_inputs = total.num_inputs + crashed
    print(
        f"{name:11} {num_inputs:6} inputs, {total.outcomes[INSIDE] / num_inputs:.0%} inside, {crashed} crashes, "
        f"{time.perf_counter() - start:.0f} s, {total.peak_mib} MiB ({refused})",
        flush=True,
    )
    for kind, text in total.crashes.items():
        print(f"--- {kind}\n{text}", flush=True)
    return len(total.crashes)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    arguments = sys.argv[1:]
    num_inputs = int(arguments[0]) if arguments else 10_000
    seed = int(arguments[1]) if len(arguments) > 1 else 0
    doors = arguments[2:] or list(DOORS)
    if len(doors) == 1:
        sys.exit(min(1, put(doors[0], num_inputs, seed)))
    again = [sys.executable, "-m", "benchmarks.fuzz", str(num_inputs), str(seed)]
    sys.exit(max(abs(subprocess.run([*again, door], check=False).returncode) for door in doors))
