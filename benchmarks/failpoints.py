"""A death at every step: `tests/faults/failpoints.py` in full, on a disk and on S3 servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.figure import Figure
from benchmarks.places import place
from tests.faults.soak import ROOT


def measure(folder: Path, model: Path, stores: list[str]) -> list[Figure]:
    found: list[dict[str, Any]] = []
    for store in stores:
        with place(store, folder / store) as where:
            options = where.options or {}
            environ = {
                "AWS_ENDPOINT_URL": options.get("endpoint_url", ""),
                "AWS_ACCESS_KEY_ID": options.get("key", ""),
                "AWS_SECRET_ACCESS_KEY": options.get("secret", ""),
            }
            out = f"{where.url}/failpoints" if where.url else str(folder / store / "failpoints")
            done = subprocess.run(
                [sys.executable, "-m", "tests.faults.failpoints", out, str(model)],
                cwd=ROOT,
                env={**os.environ, **(environ if options else {})},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(f"failpoints on {store}: {done.stderr[-2000:]}")
            found += [json.loads(line) | {"store": store} for line in done.stdout.splitlines()]
    total, fired, recovered = (
        sum(one[name] for one in found) for name in ("num_failpoints", "num_fired", "num_recovered")
    )
    names = {name for one in found for name in one["names"]}
    measured = (
        f"{total} failpoints ({len(names)} kinds) of {len(found) // len(stores)} scenarios on {' and '.join(stores)}: "
        f"{fired} fired, {recovered} recovered, {100 * recovered / max(total, 1):.1f} %"
    )
    faults = [fault for one in found for fault in one["faults"]]
    numbers = {"scenarios": found, "faults": faults}
    return [Figure("every failpoint of a commit", "100 % recover", measured, total == fired == recovered > 0, numbers)]
