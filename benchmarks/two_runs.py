"""Two runs on one output: the second is refused, helps, or takes over."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.figure import Figure
from tests.faults.outside import look
from tests.faults.soak import finish, start, undisturbed, write_job

ROWS, STEPS = 48, 200
WAYS = {"refuse": (), "join": ("--join",), "takeover": ("--takeover",)}
EXITS = {"refuse": (0, 75), "join": (0, 0), "takeover": (75, 0)}


def measure(folder: Path, model: Path) -> list[Figure]:
    """Start the second run once the first has committed; a helper earlier, as a small job is soon done."""
    wanted = undisturbed(
        write_job(folder / "undisturbed", model, str(folder / "undisturbed" / "out"), {}, ROWS, STEPS, 1)
    )
    said, faults, numbers = [], [], {}
    for way, more in WAYS.items():
        output = write_job(folder / way, model, str(folder / way / "out"), {}, ROWS, STEPS, 1)
        first = start(output, log=folder / way / "first.log")
        sign = "out/_ldm/runs/*/heartbeat.json" if way == "join" else "out/manifest/*/*.parquet"
        while not list((folder / way).glob(sign)) and first.poll() is None:
            time.sleep(0.05)
        second = start(output, *more, log=folder / way / "second.log")
        # The second first: a run that is refused ends at once.
        answers = [finish(second), finish(first)][::-1]
        exits = tuple(code for code, _ in answers)
        new = [answer.get("num_new_rows", 0) for _, answer in answers]
        found = look(output.path).differences(wanted)
        faults += [f"{way}: {fault}" for fault in found]
        if exits != EXITS[way]:
            faults.append(f"{way}: ended with {exits}: {answers}")
        if way == "join" and (sum(new) != ROWS or not all(new)):
            faults.append(f"join: the two made {new[0]} and {new[1]} rows of {ROWS}")
        said.append(f"{way}: exit {exits[0]} and {exits[1]}" + (f", {new[0]} + {new[1]} rows" if way == "join" else ""))
        numbers[way] = {"exits": exits, "num_new_rows": new, "faults": found}
    twice = sum("twice" in fault for fault in faults)
    different = any(one["faults"] for one in numbers.values())
    measured = f"{'; '.join(said)}; {twice} twice, {'NOT all' if different else 'all'} byte-identical"
    return [Figure("two runs on one output", "0 twice in each", measured, not faults, numbers | {"faults": faults})]
