"""One output, made by real runs that are killed at random, until the same command has finished it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.faults.outside import Options, Seen, look
from tests.faults.processes import Process, family, gone, kill, wait_for

ROOT = Path(__file__).parents[2]
RUN_LIMIT_S = 300
GIVE_UP_AFTER = 60
"""Runs of one output."""


@dataclass
class Output:
    """Where runs write, and the job file that says so."""

    job: Path
    path: str
    options: Options = field(default_factory=dict)


@dataclass
class Tally:
    """What was killed, and how the runs ended; `faults` name the seed and say what a reader found wrong."""

    kills: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    num_runs: int = 0
    num_survived: int = 0
    """Deaths after which the run that they hit went on and committed more."""
    num_outputs: int = 0
    num_different: int = 0
    """Outputs that are not what an undisturbed run makes."""
    num_rows: int = 0
    num_orphans: int = 0
    num_left_behind: int = 0
    """Processes that outlived their run by half a minute, and had to be ended."""
    faults: list[str] = field(default_factory=list)

    @property
    def num_kills(self) -> int:
        return sum(self.kills.values())


def write_job(
    folder: Path,
    model: Path | str,
    out: str,
    options: Options,
    num_rows: int,
    steps: int = 12,
    workers: int = 2,
    **more: Any,
) -> Output:
    """A job of many shards of two small pictures and their thumbnails."""
    stage = {"op": "txt2img", "model": str(model), "num_inference_steps": steps, "batch_size": 2, "workers": workers}
    data = {
        "source": {"rows": [f"a red circle {i}" for i in range(num_rows)]},
        "stages": [{**stage, "num_cpus": 0.5}],
        "sink": {"path": out, "storage_options": options, "thumbnails": 16},
        "batches_per_shard": 1,
        **more,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(data))
    return Output(path, out, options)


def start(output: Output, *more: str, log: Path | None = None, **environ: str) -> subprocess.Popen[bytes]:
    """`ldm-batch run JOB`, in a process group of its own."""
    with (log or output.job.with_suffix(".log")).open("ab") as lines:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", "run", str(output.job), "--json", *more],
            cwd=ROOT,
            env={**os.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=lines,
            start_new_session=True,
        )


def finish(running: subprocess.Popen[bytes], seconds: float = RUN_LIMIT_S) -> tuple[int, dict[str, Any]]:
    """Wait for a run; its exit code and what it printed."""
    said, _ = running.communicate(timeout=seconds)
    try:
        return running.returncode, json.loads(said) if said.strip() else {}
    except ValueError:
        return running.returncode, {"not_json": said.decode(errors="replace")}


def undisturbed(output: Output, *more: str, **environ: str) -> Seen:
    """What a run makes that nobody disturbs."""
    code, said = finish(start(output, *more, **environ))
    if code:
        raise RuntimeError(f"{output.job}: the undisturbed run ended with {code}: {said.get('error')}")
    seen = look(output.path, output.options)
    if seen.differences(seen):
        raise RuntimeError(f"{output.job}: {seen.differences(seen)[0]}")
    return seen


Victims = Callable[[subprocess.Popen[bytes], str], list[Process]]


def soak(
    output: Output,
    wanted: Seen,
    rng: random.Random,
    seed: str,
    tally: Tally,
    cluster: int | None = None,
    more: tuple[str, ...] = (),
    environ: dict[str, str] | None = None,
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Kill run after run of one output, then let the last one finish, and look at what is there.

    Args:
        wanted: the same job, undisturbed.
        cluster: the process that holds the Ray cluster, where the runs do not start one each.
        enough: whether kills are done with.
    """
    environ = environ or {}
    left: list[Process] = []
    for _ in range(GIVE_UP_AFTER):
        tally.num_runs += 1
        running = start(output, *more, **environ)
        if not enough():
            left += _disturb(running, output, rng, tally, cluster, enough)
        try:
            code, said = finish(running)
        except subprocess.TimeoutExpired:
            running.kill()
            tally.faults.append(f"seed {seed}: a run hung for {RUN_LIMIT_S} s")
            continue
        tally.exits[str(code)] += 1
        if "not_json" in said:
            tally.faults.append(f"seed {seed}: --json printed {said['not_json'][:300]!r}")
        if code not in (0, 1, -9):
            tally.faults.append(f"seed {seed}: a run ended with {code}: {said.get('error')}")
        if code == 0:
            break
        # Rows may be missing now; none may be twice or torn, whoever still writes.
        tally.faults += [f"seed {seed}, after a death: {fault}" for fault in look(output.path, output.options).faults]
    else:
        tally.faults.append(f"seed {seed}: not finished in {GIVE_UP_AFTER} runs")
    for process in gone(left, 30):
        tally.num_left_behind += kill(process)
    if "Traceback" in (text := output.job.with_suffix(".log").read_text(errors="replace")):
        tally.faults.append(f"seed {seed}: a traceback: {text[text.index('Traceback') :][:2000]}")
    seen = look(output.path, output.options)
    tally.num_outputs += 1
    tally.num_different += bool(seen.differences(wanted))
    tally.num_rows += len(seen.rows)
    tally.num_orphans += seen.num_orphans
    tally.faults += [f"seed {seed}: {fault}" for fault in seen.differences(wanted)]


def _disturb(
    running: subprocess.Popen[bytes],
    output: Output,
    rng: random.Random,
    tally: Tally,
    cluster: int | None,
    enough: Callable[[], bool],
) -> list[Process]:
    """Kill what belongs to a run, until the run itself is hit or ends; the processes that a dead run left."""
    if rng.random() < 0.15:
        # Some die while they plan, or while Ray starts.
        time.sleep(rng.uniform(0, 12))
        return _end(running, "driver", rng, tally, cluster)
    budget = rng.randint(3, 7)
    root = cluster or running.pid
    while budget and running.poll() is None and not enough():
        kind = rng.choices(("upload", "worker", "raylet"), (6, 2, 1 if cluster else 0))[0]
        found = _until(running, root, kind)
        if not found:
            break
        if kind == "raylet":
            # The run is connected to the first node's.
            found = found[1:]
        # An upload is over soon; it is hit at any moment of its way.
        time.sleep(rng.uniform(0, 0.04) if kind == "upload" else rng.uniform(0, 1.0))
        before = _num_parts(output)
        victim = rng.choice(found) if found else None
        now = victim and next((one for one in family(root) if one.pid == victim.pid), None)
        if victim is None or now is None or now.kind != kind or now.born != victim.born or not kill(victim):
            continue
        tally.kills[kind] += 1
        budget -= 1
        time.sleep(rng.uniform(0.2, 1.0))
        tally.num_survived += running.poll() is None and _more_than(output, before, running)
    return _end(running, "driver" if cluster or rng.random() < 0.6 else "raylet", rng, tally, cluster)


def _until(running: subprocess.Popen[bytes], root: int, kind: str) -> list[Process]:
    for _ in range(RUN_LIMIT_S):
        if running.poll() is not None:
            return []
        if found := wait_for(root, kind, 1.0):
            return found
    return []


def _num_parts(output: Output) -> int:
    """Parts on a disk; what another store holds is not worth a request here."""
    if output.options:
        return 0
    return len(list(Path(output.path.removeprefix("file://")).glob("manifest/*/*.parquet")))


def _more_than(output: Output, before: int, running: subprocess.Popen[bytes]) -> bool:
    if output.options:
        return running.poll() is None
    for _ in range(40):
        if _num_parts(output) > before or running.poll() is not None:
            break
        time.sleep(0.5)
    return _num_parts(output) > before


def _end(
    running: subprocess.Popen[bytes], kind: str, rng: random.Random, tally: Tally, cluster: int | None
) -> list[Process]:
    """Kill the run itself, or the raylet that it cannot do without; what it leaves may live on for a while."""
    # What a run on somebody else's cluster leaves is for that cluster to end.
    members = [] if cluster else family(running.pid)
    found = [one for one in family(running.pid) if (one.pid == running.pid if kind == "driver" else one.kind == kind)]
    if running.poll() is None and found and kill(found[0]):
        tally.kills[kind] += 1
        if kind == "raylet":
            # Ray ends its driver where it notices in time; where it does not, the user's patience ends.
            try:
                running.wait(timeout=60)
            except subprocess.TimeoutExpired:
                tally.kills["driver"] += kill(family(running.pid)[0])
    return members
