"""The first step of a shard's way: its planned rows, and the images that they bring along."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from ldm_ops.describe import ModelFacts
from pipelines.blocks import MAX_MESSAGE_CHARS, pack, with_results
from pipelines.inputs import BadImage, Loader
from pipelines.plans import read_shard
from pipelines.stages import AnyStage, Background, ImageInput
from pipelines.storage import Store


def image_loader(stage: AnyStage, facts: ModelFacts, storage_options: dict[str, Any]) -> Loader | None:
    """How images come into `stage`; None where it takes none."""
    if not isinstance(stage, Background):
        return None
    resize, multiple = (stage.resize, facts.size_multiple) if isinstance(stage, ImageInput) else (None, 1)
    return Loader(stage.reads, resize, multiple, stage.background, storage_options)


class LoadShard:
    """Callable on one place in a plan; returns its rows with their images, or none where the part is there by now."""

    def __init__(self, store: Store, loader: Loader | None) -> None:
        self.store = store
        self.loader = loader

    def __call__(self, place: pa.Table) -> pa.Table:
        file, row_group, part = (place[name][0].as_py() for name in place.column_names)
        table = read_shard(self.store, file, row_group)
        if part and self.store.read(part) is not None:
            return with_results(table, [])
        rows = table.to_pylist()
        results: list[dict[str, Any]] = [
            {}
            if row["problem"] is None
            else {
                "status": "failed",
                "stage": "plan",
                "error_type": "row.invalid",
                "error_message": row["problem"],
            }
            for row in rows
        ]
        if self.loader is not None:
            fine = [i for i, result in enumerate(results) if not result]
            for i, loaded in zip(fine, self.loader([rows[i] for i in fine]), strict=True):
                if isinstance(loaded, BadImage):
                    kind, message = loaded.kind, str(loaded)[:MAX_MESSAGE_CHARS]
                    results[i] = {"status": "failed", "stage": "load", "error_type": kind, "error_message": message}
                else:
                    mask = loaded.get("mask_image")
                    results[i] = {
                        "pixels": pack(loaded["image"]),
                        "mask_pixels": None if mask is None else pack(mask),
                    }
        return with_results(table, results)
