"""Flipped bits, missing files and cut footers: what `verify --deep` finds, and what `repair` mends."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.figure import Figure
from pipelines.verify import verify
from tests.faults.outside import Seen, look
from tests.faults.soak import ROOT, Output, undisturbed, write_job

ROWS = 300
MISSING, CUT = 30, 10


def measure(folder: Path, model: Path, seed: int) -> list[Figure]:
    """Two rounds: a bit of every picture; then files taken away and parts cut."""
    output = write_job(folder, model, str(folder / "out"), {}, ROWS, 2, batches_per_shard=2)
    wanted = undisturbed(output)
    rng = random.Random(seed)
    false_alarms = _command("verify", output, "--deep")[1]["num_faults"]
    bits = _round(output, wanted, lambda: _flip(folder / "out", rng))
    files = _round(output, wanted, lambda: _lose_and_cut(folder / "out", rng))
    reached = not false_alarms and all(one["found"] == one["harmed"] and one["mended"] for one in (bits, files))
    measured = (
        f"{bits['found']} of {bits['harmed']} flipped bits found, {files['found']} of {files['harmed']} missing files "
        f"and cut parts; {false_alarms} false alarms; mended: {bits['mended'] and files['mended']}, byte-identical"
    )
    numbers = {"bits": bits, "files": files, "false_alarms": false_alarms, "seed": seed}
    return [
        Figure(
            f"flipped bits in {ROWS} pictures, missing files, cut footers",
            "`verify --deep` finds all; `repair` mends all",
            measured,
            reached,
            numbers,
        )
    ]


def _round(output: Output, wanted: Seen, harm: Any) -> dict[str, Any]:
    """Do harm; `found` counts the things harmed of which some row was found to be damaged, and no other row."""
    harmed: dict[str, set[str]] = harm()
    verified, told = _command("verify", output, "--deep")
    damaged = {key for keys in verify(output.path, deep=True).damage.values() for key in keys or ()}
    others = damaged - set().union(*harmed.values())
    found = sum(keys <= damaged for keys in harmed.values())
    # Beside what was harmed: that _SUCCESS counts more than parts that cannot be read.
    extra = int(any(path.endswith(".parquet") for path in harmed))
    repaired, _ = _command("repair", output)
    differences = look(output.path).differences(wanted)
    again, _ = _command("verify", output, "--deep")
    return {
        "harmed": len(harmed),
        "found": found if verified == 4 and told["num_faults"] == len(harmed) + extra and not others else 0,
        "num_faults": told["num_faults"],
        "num_others": len(others),
        "mended": not differences and (repaired, again) == (0, 0),
        "exits": (verified, repaired, again),
        "differences": differences[:5],
    }


def _flip(out: Path, rng: random.Random) -> dict[str, set[str]]:
    """One bit of every picture, anywhere in its file; which row each is of."""
    harmed = {}
    for path in sorted((out / "images").rglob("*.png")):
        data = bytearray(path.read_bytes())
        at = rng.randrange(8 * len(data))
        data[at // 8] ^= 1 << at % 8
        path.write_bytes(data)
        harmed[path.name] = {path.name.partition("-")[0]}
    return harmed


def _lose_and_cut(out: Path, rng: random.Random) -> dict[str, set[str]]:
    """Take pictures and thumbnails away, and the ends off parts; which rows each is of."""
    harmed = {}
    parts = rng.sample(sorted((out / "manifest").rglob("*.parquet")), CUT)
    for number, path in enumerate(parts):
        harmed[str(path)] = set(pq.read_table(path, columns=["key"])["key"].to_pylist())
        size = path.stat().st_size
        # In turn: a byte short, without its footer, empty.
        path.write_bytes(path.read_bytes()[: (size - 1, size - rng.randrange(9, size), 0)[number % 3]])
    # Of other shards: nobody can say which files a cut part named.
    cut = set().union(*harmed.values())
    for pattern in ("images/**/*.png", "thumbnails/**/*.jpg"):
        there = [path for path in sorted(out.glob(pattern)) if path.name.partition("-")[0] not in cut]
        for path in rng.sample(there, MISSING):
            path.unlink()
            harmed[str(path)] = {path.name.partition("-")[0]}
    return harmed


def _command(name: str, output: Output, *more: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", name, str(output.job), "--json", *more],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
    )
    return done.returncode, json.loads(done.stdout)
