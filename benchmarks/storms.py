"""A store that fails a fifth of all requests, and one that is away for a minute."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from benchmarks.figure import Figure
from benchmarks.places import place
from tests.faults.notes import Notes
from tests.faults.outside import look, objects
from tests.faults.proxy import ALWAYS, Faults, Rule, storm
from tests.faults.soak import finish, start, undisturbed, write_job

ROWS, WORKERS = 60, 2
SHARE = 0.2
AWAY_S = 60.0
LIMIT_S = 900.0


def errors(folder: Path, model: Path, store: str, seed: int) -> list[Figure]:
    """The same job through a proxy that fails nothing, and through one that fails a fifth of all requests."""
    num_shards = ROWS // 2
    numbers: dict[str, dict[str, float]] = {}
    faults: list[str] = []
    with place(store, folder) as where:
        wanted = None
        for share in (0.0, SHARE):
            with Faults((where.options or {})["endpoint_url"], storm(share), seed=seed) as proxy:
                options = {**(where.options or {}), "endpoint_url": proxy.url}
                name = f"errors-{share:g}"
                output = write_job(folder / name, model, where.out(name), options, ROWS)
                begun = time.monotonic()
                code, said = finish(start(output), LIMIT_S)
                numbers[f"{share:g}"] = {
                    "exit_code": code,
                    "whole_s": round(time.monotonic() - begun, 1),
                    "run_s": said.get("duration_s", 0.0),
                    "num_requests": len(proxy.seen),
                    "num_failed_requests": sum(rule.fired for rule in proxy.rules),
                }
                seen = look(output.path, where.options)
                wanted = wanted or seen
                faults += [f"{share:g}: {fault}" for fault in seen.differences(wanted)]
                if code:
                    faults.append(f"{share:g}: ended with {code}: {said.get('error')}")
    calm, wild = numbers["0"], numbers[f"{SHARE:g}"]
    each = [one["num_requests"] / num_shards for one in (calm, wild)]
    measured = (
        f"{store}: {'finishes' if not faults else 'DOES NOT FINISH'}, the same bytes; {wild['num_failed_requests']} of "
        f"{wild['num_requests']} requests failed; {each[1]:.1f} requests a shard, {each[0]:.1f} without errors; "
        f"{wild['whole_s']:.0f} s, {calm['whole_s']:.0f} s without"
    )
    reached = not faults and wild["num_failed_requests"] > 0.15 * wild["num_requests"]
    return [
        Figure(
            "store errors at 20 % of requests",
            "finishes; requests a shard and slowdown",
            measured,
            reached,
            {**numbers, "num_shards": num_shards, "faults": faults, "seed": seed},
        )
    ]


def away(folder: Path, model: Path, store: str) -> list[Figure]:
    """Once a third is committed, no request gets an answer for a minute."""
    with place(store, folder) as where:
        wanted = undisturbed(write_job(folder / "calm", model, where.out("calm"), where.options or {}, ROWS))
        with Faults((where.options or {})["endpoint_url"]) as proxy:
            options = {**(where.options or {}), "endpoint_url": proxy.url}
            output = write_job(folder / "away", model, where.out("away"), options, ROWS, workers=WORKERS)
            notes = Notes(folder / "away" / "notes")
            running = start(output, **notes.environ)

            def num_parts() -> int:
                return sum(name.startswith("manifest/") for name in objects(output.path, where.options))

            while num_parts() < ROWS // 2 // 3 and running.poll() is None:
                time.sleep(0.2)
            gone = Rule(".*", "", "drop", ALWAYS)
            proxy.rules.append(gone)
            before = num_parts()
            time.sleep(AWAY_S)
            still = running.poll() is None
            proxy.rules.remove(gone)
            back = time.monotonic()
            while num_parts() == before and running.poll() is None:
                time.sleep(0.1)
            first_s = time.monotonic() - back
            code, said = finish(running, LIMIT_S)
        seen = look(output.path, where.options)
    redone = notes.num_begun - ROWS // 2
    faults = seen.differences(wanted)
    if code or not still:
        faults.append(f"ended with {code}: {said.get('error')}")
    ending = "goes on by itself" if still and not code else f"ends with {code}"
    measured = (
        f"{store}: {ending}, {first_s:.1f} s after the store is back; {gone.fired} requests unanswered; {redone} of "
        f"{ROWS // 2} shards computed twice by {WORKERS} workers"
    )
    numbers = {
        "exit_code": code,
        "num_unanswered": gone.fired,
        "num_redone": redone,
        "workers": WORKERS,
        "first_commit_after_s": round(first_s, 1),
        "faults": faults,
        "begun": Counter(line[3] for line in notes._lines("begin")).most_common(3),
    }
    reached = not faults and gone.fired > 0 and notes.num_begun > 0 and redone <= WORKERS
    return [
        Figure(
            f"store away for {AWAY_S:.0f} s",
            "goes on by itself; ≤ 1 shard per worker redone",
            measured,
            reached,
            numbers,
        )
    ]
