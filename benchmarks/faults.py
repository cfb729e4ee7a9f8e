"""The fault matrix of the README: whatever dies, nothing is lost and nothing is done twice.

    python -m benchmarks.faults [NAME …] [--kills 200] [--stores local,ceph] [--out FILE]

Each NAME makes a line of the table, with the bar and what was measured; all of them if left out:

    soak        random SIGKILLs of drivers, workers, raylets and uploads; prints its seeds
    failpoints  a death at every step of plan, load, commit, retry and repair
    errors      a fifth of all requests fail
    away        the store is away for a minute
    redone      work done twice after a kill, beside Ray Data's write_parquet and CheckpointConfig
    resume      a plan of a million shards, half of them done (--shards)
    poison      rows that raise, hang, crash, take all memory or give NaN
    damage      flipped bits, missing files, cut footers
    two-runs    refuse, --join, --takeover

What is looked at is what a reader finds who has pyarrow, hashlib and the files, and none of our code. It needs the
`dev` extra; times are worth quoting from a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import damage, failpoints, redone, soak, storms, two_runs
from benchmarks.figure import Figure
from tests.stores import Unavailable

Part = Callable[[Path, Path, argparse.Namespace], list[Figure]]

S3 = ("ceph", "moto")


def remote(args: argparse.Namespace) -> str:
    """The first S3 server of those that were asked for."""
    return next((store for store in args.stores if store in S3), "moto")


def resume(args: argparse.Namespace) -> list[Figure]:
    from benchmarks.resume import measure

    found = measure(args.shards)
    reached = found["first_s"] <= 60 and found["peak_mb"] <= 1000
    reached = reached and (found["times_faster"] >= 5 or found["times_less_memory"] >= 5)
    measured = (
        f"{found['first_s']} s to the first new shard, {found['peak_mb']} MB; Ray's checkpoint at as many rows "
        f"{found['peer_first_s']} s, {found['peer_peak_mb']} MB: {found['times_faster']} × faster, "
        f"{found['times_less_memory']} × less memory"
    )
    bar = "≤ 60 s, ≤ 1 GB; ≥ 5 × faster or ≤ 1/5 the memory of Ray's checkpoint"
    return [Figure(f"resume of a plan of {args.shards:,} shards, half done", bar, measured, reached, found)]


def poison(folder: Path) -> list[Figure]:
    from benchmarks.poison import measure

    found = asdict(measure(folder))
    reached = found["precision"] == found["recall"] == found["right_types"] == 1.0 and not found["num_changed"]
    measured = (
        f"precision {found['precision']:g}, recall {found['recall']:g} over {found['num_poisonous']} of "
        f"{found['num_rows']} rows; {found['num_changed']} others changed"
    )
    return [Figure("poison rows: raise, hang, segfault, OOM, NaN", "1.0 and 1.0", measured, reached, found)]


PARTS: dict[str, Part] = {
    "soak": lambda folder, model, args: soak.measure(folder, model, args.kills, args.stores, args.seed),
    "failpoints": lambda folder, model, args: failpoints.measure(folder, model, args.stores),
    "errors": lambda folder, model, args: storms.errors(folder, model, remote(args), args.seed),
    "away": lambda folder, model, args: storms.away(folder, model, remote(args)),
    "redone": lambda folder, model, args: redone.measure(folder, model),
    "resume": lambda folder, model, args: resume(args),
    "poison": lambda folder, model, args: poison(folder),
    "damage": lambda folder, model, args: damage.measure(folder, model, args.seed),
    "two-runs": lambda folder, model, args: two_runs.measure(folder, model),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts of the table")
    parser.add_argument("--kills", type=int, default=200, help="how many the soak makes")
    parser.add_argument(
        "--stores",
        type=lambda text: text.split(","),
        default=["local", "ceph"],
        help="local, ceph (fetched from the distribution's packages), moto; commas between",
    )
    parser.add_argument("--shards", type=int, default=1_000_000, help="of the plan that is resumed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write all numbers as JSON")
    args = parser.parse_args()
    if unknown := set(args.names) - PARTS.keys():
        parser.error(f"{min(unknown)}: no such part; choose from {', '.join(PARTS)}")
    return args


def main() -> None:
    args = arguments()
    # As the tests do: one thread, no hub; and the same for all that is started.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "AWS_DEFAULT_REGION": "us-east-1"}
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        model = folder / "tiny"
        script = (
            "import sys; from tests.models import tiny_stable_diffusion as make; make().save_pretrained(sys.argv[1])"
        )
        subprocess.run([sys.executable, "-c", script, str(model)], check=True, capture_output=True)
        print("| figure | bar | measured | |\n|---|---|---|---|", flush=True)
        for part in args.names or PARTS:
            begun = time.monotonic()
            (folder / part).mkdir()
            try:
                found = PARTS[part](folder / part, model, args)
            except Unavailable as error:
                found = [Figure(part, "", f"not measured: {str(error).splitlines()[0]}", False)]
            for figure in found:
                figure.numbers["took_s"] = round(time.monotonic() - begun, 1)
                figures.append(figure)
                print(figure.line(), flush=True)
                for fault in figure.numbers.get("faults", [])[:10]:
                    print(f"  {fault}", file=sys.stderr, flush=True)
            if args.out:
                args.out.write_text(json.dumps([asdict(one) for one in figures], indent=1, default=_plain))
    if any(one.reached is False for one in figures):
        raise SystemExit(1)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


if __name__ == "__main__":
    main()
