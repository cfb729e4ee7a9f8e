"""Random kills: drivers, workers, raylets and whoever is at an upload, over a disk and over S3 servers."""

from __future__ import annotations

import random
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.figure import Figure
from benchmarks.places import Place, place
from tests.faults.nodes import nodes
from tests.faults.outside import Seen
from tests.faults.soak import Tally, soak, undisturbed, write_job

ROWS = 80


def measure(folder: Path, model: Path, kills: int, stores: list[str], seed: int) -> list[Figure]:
    """Kill until so many kills have hit, the same share on each store; two of three of them on a cluster of three
    nodes, the others on a Ray that each run starts for itself."""
    tally = Tally()
    wanted = undisturbed(write_job(folder / "undisturbed", model, str(folder / "undisturbed" / "out"), {}, ROWS))
    begun = time.monotonic()
    for number, store in enumerate(stores, 1):
        share = kills * number // len(stores)
        before = tally.num_kills
        with place(store, folder / store) as where:
            with nodes(3) as cluster:
                more = ("--address", cluster.address)
                _until(
                    tally,
                    before + (share - before) * 2 // 3,
                    where,
                    model,
                    wanted,
                    f"{seed} {store} cluster",
                    cluster.pid,
                    more,
                    cluster.environ,
                )
            _until(tally, share, where, model, wanted, f"{seed} {store}", None, (), {})
    minutes = (time.monotonic() - begun) / 60
    by_kind = ", ".join(f"{num} {kind}" for kind, num in tally.kills.most_common())
    measured = (
        f"{tally.num_kills} kills ({by_kind}) in {tally.num_runs} runs of {tally.num_outputs} outputs, "
        f"{tally.num_rows} rows, over {' and '.join(stores)}: {_count(tally, 'lost')} lost, "
        f"{_count(tally, 'twice')} twice, {_count(tally, 'torn')} torn, "
        f"{tally.num_outputs - tally.num_different} of {tally.num_outputs} byte-identical"
    )
    reached = (
        not tally.faults and tally.num_kills >= kills and {"driver", "worker", "raylet", "upload"} <= set(tally.kills)
    )
    numbers = {
        **asdict(tally),
        "minutes": round(minutes, 1),
        "kills_per_minute": round(tally.num_kills / minutes, 1),
        "seed": seed,
    }
    return [Figure("random kills", "≥ 200; 0 lost, 0 twice, 0 torn, byte-identical", measured, reached, numbers)]


def _until(
    tally: Tally,
    kills: int,
    where: Place,
    model: Path,
    wanted: Seen,
    seed: str,
    cluster: int | None,
    more: tuple[str, ...],
    environ: dict[str, str],
) -> None:
    number = 0
    while tally.num_kills < kills:
        name = f"{seed} {number}"
        at = where.folder / name.replace(" ", "-")
        # On a cluster a folder has to be said to be shared.
        out = where.out(at.name, shared=cluster is not None)
        output = write_job(at, model, out, where.options or {}, ROWS)
        soak(output, wanted, random.Random(name), name, tally, cluster, more, environ, lambda: tally.num_kills >= kills)
        number += 1
        print(f"  {tally.num_kills} kills, {len(tally.faults)} faults, seed {name}", flush=True)


def _count(tally: Tally, word: str) -> int:
    return sum(word in fault or (word == "torn" and "not there" in fault) for fault in tally.faults)
