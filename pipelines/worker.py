"""One worker: an actor that holds a loaded model and makes the shards that it is given."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa

from ldm_ops.device import device_name, free_memory, set_threads
from ldm_ops.op import Op, Row, RowRefused
from pipelines.blocks import RESULT_FIELDS, pack
from pipelines.storage import Store
from pipelines.weights import Weights, fetch

MAX_MESSAGE_CHARS = 500


class Worker:
    """Callable on one shard, a table of planned rows; returns it with RESULT_FIELDS, or empty once a stop is asked."""

    def __init__(
        self, op: Op, weights: Weights, batch_size: int, stage: str, threads: int, store: Store, stop_path: str
    ) -> None:
        set_threads(threads)
        self.op = op
        self.batch_size = batch_size
        self.stage = stage
        self.store = store
        self.stop_path = stop_path
        self.model = op.load(fetch(weights))
        self.device = device_name(op.device)
        self.safe_size: dict[tuple[int, int], int] = {}
        self.name = f"{socket.gethostname()}:{os.getpid()}"

    def __call__(self, shard: pa.Table) -> pa.Table:
        planned = shard.to_pylist()
        if self.store.read(self.stop_path) is not None:
            planned = []
        results: list[dict[str, Any]] = []
        for _, batch in groupby(planned, key=lambda row: row["batch"]):
            results += self._batch(list(batch))
        out = shard.slice(0, len(planned))
        for field in RESULT_FIELDS:
            values = [result.get(field.name) for result in results]
            out = out.append_column(field, pa.array(values, field.type))
        return out

    def _batch(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if rows[0]["problem"] is not None:
            return [
                {"status": "failed", "stage": "plan", "error_type": "row.invalid", "error_message": row["problem"]}
                for row in rows
            ]
        start = time.perf_counter()
        shape = (rows[0]["height"], rows[0]["width"])
        results = make(self.op, self.model, rows, self.safe_size.get(shape, self.batch_size))
        self.safe_size[shape] = min(result["batch_size"] for result in results)
        each = (time.perf_counter() - start) / len(rows)
        common = {"stage": self.stage, "device": self.device, "worker": self.name, "duration_s": each}
        return [{**common, **result} for result in results]


def make(op: Op, model: Any, rows: Sequence[Row], size: int) -> list[dict[str, Any]]:
    """One result per row; never raises for a row's fault.

    Each device batch is padded to `size` with its last row, so the device sees one shape. Where it raises, it is halved
    (and padded again) until the row that cannot be done is alone; where memory is short, the shape itself is halved,
    which changes the last bits and is therefore recorded in the row's `batch_size`.
    """
    if len(rows) > size:
        pieces = [rows[i : i + size] for i in range(0, len(rows), size)]
        return [result for piece in pieces for result in make(op, model, piece, size)]
    try:
        outputs = op.run(model, [*rows, *[rows[-1]] * (size - len(rows))])[: len(rows)]
        return [{**success(output), "batch_size": size} for output in outputs]
    except Exception as error:  # noqa: BLE001 - the one place where any row's fault becomes its own row's failure
        if "CUDA error" in str(error):
            # A poisoned context fails every later row too; only a new process is clean.
            os._exit(1)
        short_of_memory = op.is_out_of_memory(error) and size > 1
        if len(rows) == 1 and not short_of_memory:
            return [{**failure(op, error), "batch_size": size}]
    # Outside the handler, where the exception no longer holds the failed batch's tensors.
    if short_of_memory:
        free_memory()
        return make(op, model, rows, -(-size // 2))
    middle = len(rows) // 2
    return make(op, model, rows[:middle], size) + make(op, model, rows[middle:], size)


def success(output: dict[str, Any]) -> dict[str, Any]:
    """An op's output as result columns; a picture that the policy rejects is `filtered`."""
    image = output["image"]
    if image is None:
        return {"status": "filtered", "nsfw": output["nsfw"], "error_type": "safety.rejected"}
    return {
        "status": "ok",
        "image": pack(image),
        "nsfw": output["nsfw"],
        "intermediates": [
            {"step": step, "latents": pack(latents), "preview": pack(preview)}
            for step, latents, preview in output["intermediates"]
        ],
    }


def failure(op: Op, error: Exception) -> dict[str, Any]:
    """An exception as result columns: a type to group by, and a short message."""
    if isinstance(error, RowRefused):
        kind = error.kind
    else:
        kind = "model.oom" if op.is_out_of_memory(error) else type(error).__name__
    first = (str(error).strip().splitlines() or [""])[0]
    return {"status": "failed", "error_type": kind, "error_message": first[:MAX_MESSAGE_CHARS]}
