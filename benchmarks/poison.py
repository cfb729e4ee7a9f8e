"""Rows that raise, hang, segfault, are killed, give NaN or a blank picture, among others: who fails, and who lives.

    python -m benchmarks.poison [--rows 48] [--each 1] [--workers 1]

Precision and recall are of the dead letters, against the rows that were made poisonous; the pictures of all others
must be those of a run without them. The model is a small Stable Diffusion of the real classes with NaN in the embedding
of one word. What kills a process is done by the process itself: a read of address 0, a sleep with the interpreter's
lock in its hands, SIGKILL.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ldm_ops.op import Row
from ldm_ops.sampling import Pipeline
from ldm_ops.txt2img import Txt2Img
from pipelines.job import Job, parse_job
from pipelines.manifest import read_tables
from pipelines.runner import run
from pipelines.stages import Txt2ImgStage
from pipelines.storage import Store

if TYPE_CHECKING:
    import torch

POISON = {
    "raise": "ValueError",
    "hang": "worker.timeout",
    "segfault": "worker.crash",
    "killed": "worker.crash",
    "cuda": "worker.crash",
    "oom": "model.oom",
    "ring": "model.nan",
    "blank": "model.blank",
}
"""First word of a prompt → error type of its dead letter."""


@dataclass
class Poisoned:
    """What became of a run with poison in it."""

    num_rows: int
    num_poisonous: int
    num_dead: int
    precision: float
    recall: float
    right_types: float
    num_changed: int
    undisturbed_s: float
    poisoned_s: float
    error_types: dict[str, int] = field(default_factory=dict)


class Poisonous(Txt2Img):
    """Txt2Img with a model that does to its process what the first word of a prompt says."""

    def run(self, model: Pipeline, rows: Sequence[Row]) -> list[dict[str, Any]]:
        for row in rows:
            suffer(row["prompt"].split()[0])
        return super().run(model, rows)

    def _finish(self, images_BCHW: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        for i, row in enumerate(rows):
            if row["prompt"].split()[0] == "blank":
                images_BCHW[i] = 0
        return images_BCHW


def suffer(how: str) -> None:
    if how == "raise":
        raise ValueError("a model that does not like this row")
    if how == "hang":
        # With the interpreter's lock, so that no Python thread could end it.
        ctypes.PyDLL(None).sleep(100_000)
    if how == "segfault":
        ctypes.string_at(0)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "cuda":
        raise RuntimeError("CUDA error: device-side assert triggered")
    if how == "oom":
        import torch

        torch.empty(1 << 50, dtype=torch.uint8)


def save_model(folder: Path) -> Path:
    """A tiny Stable Diffusion, with NaN in the embedding of the word `ring`."""
    import torch

    from tests.models import tiny_stable_diffusion

    pipe = tiny_stable_diffusion()
    token = pipe.tokenizer.convert_tokens_to_ids("ring</w>")
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[token] = float("nan")
    pipe.save_pretrained(folder)
    return folder


def rows_of(num_rows: int, each: int, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """`num_rows` rows in a fixed random order, `each` of every kind of poison among them.

    Those for which memory is short have a size of their own, as such rows do: all rows of a batch need the same.
    """
    poison = [{"prompt": f"{kind} a red circle {i}"} for kind in kinds for i in range(each)]
    poison = [{**row, "height": 72} if row["prompt"].startswith("oom") else row for row in poison]
    fine = [{"prompt": f"a red circle {i}"} for i in range(num_rows - len(poison))]
    return random.Random(5).sample([*poison, *fine], num_rows)


@contextmanager
def poisonous() -> Iterator[None]:
    """Let txt2img stages of this process have a model as above."""
    own = Txt2ImgStage.op_class
    Txt2ImgStage.op_class = Poisonous
    try:
        yield
    finally:
        Txt2ImgStage.op_class = own


def job(model: Path, out: Path | str, rows: list[dict[str, Any]], workers: int, timeout_s: float, **sink: Any) -> Job:
    stage = {
        "op": "txt2img",
        "model": str(model),
        "num_inference_steps": 2,
        "batch_size": 4,
        "workers": workers,
        "batch_timeout_s": timeout_s,
    }
    said = {"source": {"rows": rows}, "stages": [stage], "sink": {"path": str(out), **sink}, "batches_per_shard": 2}
    return parse_job(yaml.safe_dump(said))


def outcome(out: Path | str, **storage_options: Any) -> dict[str, tuple[str, str | None]]:
    """prompt → status, and error type or sha256."""
    rows = [row for table in read_tables(Store(str(out), storage_options)) for row in table.to_pylist()]
    return {row["prompt"]: (row["status"], row["error_type"] or row["sha256"]) for row in rows}


def measure(
    folder: Path,
    num_rows: int = 48,
    each: int = 1,
    workers: int = 1,
    kinds: Sequence[str] = tuple(POISON),
    timeout_s: float = 10.0,
) -> Poisoned:
    """One run without poison and one with it, under `folder`; needs no Ray that is connected, and takes one that is."""
    model = save_model(folder / "model")
    rows = rows_of(num_rows, each, kinds)
    first = {row["prompt"]: row["prompt"].split()[0] for row in rows}
    poison = {prompt: POISON[word] for prompt, word in first.items() if word in POISON}
    seconds = []
    for name, some in (("undisturbed", [row for row in rows if row["prompt"] not in poison]), ("poisoned", rows)):
        start = time.perf_counter()
        with poisonous():
            run(job(model, folder / name, some, workers, timeout_s))
        seconds.append(round(time.perf_counter() - start, 1))
    undisturbed, found = outcome(folder / "undisturbed"), outcome(folder / "poisoned")
    assert len(found) == num_rows
    dead = {prompt: kind for prompt, (status, kind) in found.items() if status == "failed"}
    return Poisoned(
        num_rows=num_rows,
        num_poisonous=len(poison),
        num_dead=len(dead),
        precision=len(dead.keys() & poison.keys()) / len(dead) if dead else 1.0,
        recall=len(dead.keys() & poison.keys()) / len(poison) if poison else 1.0,
        right_types=sum(dead.get(prompt) == kind for prompt, kind in poison.items()) / max(1, len(poison)),
        num_changed=sum(found[prompt] != made for prompt, made in undisturbed.items()),
        undisturbed_s=seconds[0],
        poisoned_s=seconds[1],
        error_types={kind: list(dead.values()).count(kind) for kind in sorted({*map(str, dead.values())})},
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--rows", type=int, default=48)
    arguments.add_argument("--each", type=int, default=1, help="rows of each kind of poison")
    arguments.add_argument("--workers", type=int, default=1)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), given.rows, given.each, given.workers)
    print(json.dumps(asdict(figures)), flush=True)
    if not (figures.precision == figures.recall == figures.right_types == 1.0 and not figures.num_changed):
        raise SystemExit("a wrong row died, or another changed")


if __name__ == "__main__":
    main()
