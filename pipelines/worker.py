"""One worker: an actor that holds a loaded model and does one stage of the shards that it is given."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from ldm_ops.device import device_name, free_memory, keep_to_share, set_threads
from ldm_ops.op import Op, Row, RowRefused
from ldm_ops.sampling import Sampling
from pipelines.adapters import LoraShelf, StageAdapters
from pipelines.batch_size import pixels_of, rows_at
from pipelines.blocks import GEOMETRY, RESULT_FIELDS, error_message, rows_of, with_results
from pipelines.errors import JobError
from pipelines.heartbeat import Permit
from pipelines.inputs import BadImage, Loader
from pipelines.journal import Death, Record, journal_of
from pipelines.metrics import Busy
from pipelines.rows import derived_seed
from pipelines.stages import ROW_PARAMETERS, AnyStage
from pipelines.weights import Weights, fetch


@dataclass(frozen=True)
class Place:
    """A stage, and where it stands in its job."""

    stage: AnyStage
    index: int
    is_last: bool
    loader: Loader | None
    adapters: StageAdapters = field(default_factory=StageAdapters)

    def row(self, planned: Row) -> dict[str, Any]:
        """What the op sees of a row: its own parameters in the first stage, later the stage's."""
        if self.index == 0:
            row = {name: planned[name] for name in ROW_PARAMETERS}
        else:
            row = {name: getattr(self.stage, name, None) for name in ROW_PARAMETERS}
            row["prompt"] = row["prompt"] if row["prompt"] is not None else planned["prompt"]
            row["seed"] = derived_seed(planned["seed"], f"stage {self.index}", 0)
            row["lora"] = self.adapters.lora
        row["key"] = planned["key"]
        row["lora_revision"] = self.adapters.lora_revision if self.index else planned["lora_revision"]
        for name, packed in ARRAYS.items():
            row[name] = planned[packed]
        return row

    def fit(self, row: dict[str, Any]) -> None:
        """Cut what an earlier stage made to what this one takes; in the first, it came in so.

        Raises:
            BadImage: it cannot be.
        """
        if self.index and self.loader is not None:
            cut = self.loader.fit(row["image"], row["height"], row["width"])
            row["image"] = cut.image
            if self.stage.op == "encode":
                # What a training has to know is the cut that these latents show.
                row["geometry"] = {name: getattr(cut, name) for name in GEOMETRY}


ARRAYS = {
    "image": "pixels",
    "mask_image": "mask_pixels",
    "control_image": "control_pixels",
    "latents": "latents_data",
}
"""What an op calls them: how they travel."""

STALE_S = 1.0
"""How old a permit may be when a shard is begun: to look again is a request, for which the device would wait."""


class Worker:
    """Callable on one shard, a table of planned rows with results so far; returns it with this stage's results.

    Empty once its `permit` is over. With the name of a `journal`, a row that kills the process becomes a dead letter
    once its successors, under the same name, have seen that it does.
    """

    def __init__(
        self, place: Place, op: Op, weights: Weights, permit: Permit | None = None, journal: str | None = None
    ) -> None:
        self.journal = None if journal is None else journal_of(journal)
        loading = self.journal and self.journal.open(
            f"stages.{place.index}-load-{actor_id()}", f"stages.{place.index}: loading {weights.name}"
        )
        set_threads(place.stage.num_threads)
        keep_to_share(place.stage.num_gpus)
        self.place = place
        self.op = op
        self.weights = weights
        self.permit = permit
        self.load_model()
        if loading:
            loading.close()
        self.loras = LoraShelf(place.adapters)
        self.device = device_name(op.device)
        self.safe_size: dict[tuple[Any, ...], int] = {}
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        # Always the same one: what torch records for `cuda_graphs` belongs to the thread that recorded it (2.13; before
        # that another thread's call fails). How many threads torch takes belongs to the calling one too.
        self.device_thread = ThreadPoolExecutor(1, "device", set_threads, (place.stage.num_threads,))
        self.busy = Busy(place.stage.op, self.name)
        if actor_id():
            self.busy.watch()

    def load_model(self) -> None:
        folder = fetch(self.weights)
        adapters = self.place.adapters
        beside = (adapters.fetch(),) if isinstance(self.op, Sampling) else ()
        try:
            self.model = self.op.load(folder, *beside)
        except ValueError as error:
            # What a part of the model, the device or the installation cannot do.
            raise JobError(f"stages.{self.place.index}: {first_line(error)}") from None

    def __call__(self, shard: pa.Table) -> pa.Table:
        asked = time.monotonic()
        if self.permit is not None and self.permit.is_over:
            return shard.slice(0, 0)
        rows = rows_of(shard)
        if not rows:
            return shard
        fresh = {i: self.place.row(planned) for i, planned in enumerate(rows) if planned["status"] is None}
        # Some calls at a time: one has the device while others' rows come in, or their results are packed.
        made = self.device_thread.submit(self._in_turn, asked, rows[0], fresh).result()
        if made is None:
            return shard.slice(0, 0)
        results = [{field.name: row[field.name] for field in RESULT_FIELDS} for row in rows]
        for i, result in made.items():
            results[i] |= self._done(rows[i], result, fresh[i])
        return with_results(shard, results)

    def _in_turn(self, asked: float, first: Row, fresh: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]] | None:
        # The shards before may have taken minutes.
        if self.permit is not None and time.monotonic() - asked > STALE_S and self.permit.is_over:
            return None
        return self._make(first, fresh)

    def _make(self, first: Row, fresh: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """The results of a shard's `fresh` rows, each by its place in the shard, as `first` one's plan has it."""
        # One after the other: what a process leaves of its end tells of one piece of work.
        record = self._record(first)
        made: dict[int, dict[str, Any]] = {}
        if record and record.deaths:
            verdicts = {i: record.verdict(row["key"]) for i, row in fresh.items()}
            made |= {i: fatality(death) for i, death in verdicts.items() if death}
        suspects = record.suspects if record else set()
        left = [i for i in fresh if i not in made]
        for some in [[i] for i in left] if suspects else [left]:
            with record.doing([fresh[i]["key"] for i in some]) if record else nullcontext():
                made |= self._equip({i: fresh[i] for i in some})
        # By what must be equal, in the shard's own order: the plan fixes the shard, and with it every batch.
        buckets: dict[tuple[Any, ...], list[int]] = {}
        for i in left:
            if i not in made:
                buckets.setdefault(self.op.bucket(fresh[i]), []).append(i)
        for bucket, members in buckets.items():
            size = self._size(fresh[members[0]])
            for start in range(0, len(members), size):
                batch = members[start : start + size]
                # One at a time, and padded, so with the same bytes.
                alone = [[i] for i in batch if fresh[i]["key"] in suspects]
                together = [i for i in batch if fresh[i]["key"] not in suspects]
                for some in ([together] if together else []) + alone:
                    made |= zip(some, self._batch(bucket, [fresh[i] for i in some], record), strict=True)
        if record:
            record.close()
        return made

    def _equip(self, rows: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Give rows the cut and the LoRAs that they are to have; those that cannot have them, as results."""
        refused = {}
        for i, row in rows.items():
            try:
                self.place.fit(row)
                row["loras"] = self.loras.take(row["lora"], row["lora_revision"], row["lora_scale"])
            except (BadImage, RowRefused) as error:
                refused[i] = failure(self.op, error)
        return refused

    def _record(self, first: Row) -> Record | None:
        if self.journal is None:
            return None
        place = f"stages.{self.place.index}"
        return self.journal.open(f"{place}-{first['key']}", f"{place}: shard {first['shard']}")

    def _size(self, row: Row) -> int:
        return rows_at(self.place.stage.batch_size, pixels_of(row))

    def _batch(
        self, bucket: tuple[Any, ...], rows: list[dict[str, Any]], record: Record | None
    ) -> list[dict[str, Any]]:
        start = time.perf_counter()

        def watched(some: Sequence[Row]) -> Watch:
            keys = [row["key"] for row in some]
            return record.doing(keys, self.place.stage.batch_timeout_s) if record else unwatched(some)

        size = self.safe_size.get(bucket, self._size(rows[0]))
        if record and len(rows) == 1 and record.starved(rows[0]["key"]):
            # What found no room in the frozen shape may find it in the smallest, as where an allocation raises.
            size = 1
        with self.busy.batch():
            results = make(self.op, self.model, rows, size, watched)
        self.safe_size[bucket] = min(result["batch_size"] for result in results)
        each = (time.perf_counter() - start) / len(rows)
        return [{**result, "duration_s": each} for result in results]

    def _done(self, before: Row, result: dict[str, Any], row: Row) -> dict[str, Any]:
        """`result` of this stage as RESULT_FIELDS, on top of what came `before`."""
        stage = self.place.stage
        record = {
            "op": stage.op,
            "status": result["status"],
            "model": self.weights.name,
            "model_revision": self.weights.revision,
            "device": self.device,
            "worker": self.name,
            **{name: result.get(name) for name in ("batch_size", "duration_s")},
            **{
                name: row.get(name)
                for name in ("seed", "num_inference_steps", "guidance_scale", "scheduler", "strength")
            },
            "adapters": self.place.adapters.records(row),
        }
        done = {**result, "stage": stage.op, "stages": [*(before["stages"] or ()), record]}
        if result["status"] == "ok":
            # Null while there is a stage to come.
            done["status"] = "ok" if self.place.is_last else None
            done["intermediates"] = [*(before["intermediates"] or ()), *result.get("intermediates", ())]
            if stage.keep:
                done["kept"] = [*(before["kept"] or ()), {"stage": self.place.index, "pixels": result["pixels"]}]
            done |= {name: True for name in ("nsfw", "prompt_truncated") if before[name]}
            done |= row.get("geometry", {})
        else:
            done["pixels"] = None
        return {field.name: done[field.name] for field in RESULT_FIELDS if field.name in done}


Watch = AbstractContextManager[Callable[[str], None]]
"""What a device batch is done in; it yields what takes the last words of a process that is about to end itself."""


@contextmanager
def unwatched(rows: Sequence[Row]) -> Iterator[Callable[[str], None]]:
    """Of a process that nobody starts again."""

    def say(words: str) -> None:
        sys.stderr.write(f"{words}\n")

    yield say


def make(
    op: Op, model: Any, rows: Sequence[Row], size: int, watched: Callable[[Sequence[Row]], Watch] = unwatched
) -> list[dict[str, Any]]:
    """One result per row; never raises for a row's fault.

    Each device batch is padded to `size` with its last row, so the device sees one shape. Where it raises, it is halved
    (and padded again) until the row that cannot be done is alone; where memory is short, the shape itself is halved,
    which changes the last bits and is therefore recorded in the row's `batch_size`.
    """
    if len(rows) > size:
        pieces = [rows[i : i + size] for i in range(0, len(rows), size)]
        return [result for piece in pieces for result in make(op, model, piece, size, watched)]
    try:
        with watched(rows) as say:
            outputs = _run(op, model, [*rows, *[rows[-1]] * (size - len(rows))], say)
        return [{**success(output), "batch_size": size} for output in outputs[: len(rows)]]
    except Exception as error:  # noqa: BLE001 - the one place where any row's fault becomes its own row's failure
        short_of_memory = op.is_out_of_memory(error) and size > 1
        if len(rows) == 1 and not short_of_memory:
            return [{**failure(op, error), "batch_size": size}]
    # Outside the handler, where the exception no longer holds the failed batch's tensors.
    if short_of_memory:
        free_memory()
        return make(op, model, rows, -(-size // 2), watched)
    middle = len(rows) // 2
    return make(op, model, rows[:middle], size, watched) + make(op, model, rows[middle:], size, watched)


def _run(op: Op, model: Any, rows: Sequence[Row], say: Callable[[str], None]) -> list[dict[str, Any]]:
    try:
        return op.run(model, rows)
    except Exception as error:
        if "CUDA error" in str(error) and not op.is_out_of_memory(error):
            # A poisoned context fails every later row too; only a new process is clean.
            say(first_line(error))
            os._exit(1)
        raise


def success(output: dict[str, Any]) -> dict[str, Any]:
    """An op's output as results; a picture that the policy rejects is `filtered`."""
    if "latents" in output:
        data = output["latents"]
        return {"status": "ok", "pixels": None, "latents_data": data, "flipped": output["flipped"]}
    if "prompt_embeds" in output:
        pooled = output["pooled_prompt_embeds"]
        return {
            "status": "ok",
            "pixels": None,
            "embeds_data": output["prompt_embeds"],
            "pooled_data": pooled,
            "prompt_truncated": output["prompt_truncated"],
        }
    image = output["image"]
    if image is None:
        return {"status": "filtered", "nsfw": output["nsfw"], "error_type": "safety.rejected"}
    return {
        "status": "ok",
        "pixels": image,
        "nsfw": output["nsfw"],
        "prompt_truncated": output.get("prompt_truncated"),
        "intermediates": [
            {"step": step, "latents": latents, "preview": preview} for step, latents, preview in output["intermediates"]
        ],
    }


def failure(op: Op, error: Exception) -> dict[str, Any]:
    """An exception as results: a type to group by, and a short message."""
    if isinstance(error, (RowRefused, BadImage)):
        kind = error.kind
    else:
        kind = "model.oom" if op.is_out_of_memory(error) else type(error).__name__
    return {"status": "failed", "error_type": kind, "error_message": error_message(first_line(error))}


def fatality(death: Death) -> dict[str, Any]:
    """What a row does to its worker as results."""
    return {"status": "failed", "error_type": death.kind, "error_message": error_message(death.words)}


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def actor_id() -> str:
    """Of the Ray actor that this process is, the same after Ray has started it again; empty outside Ray."""
    import ray

    return (ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None) or ""
