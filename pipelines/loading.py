"""The first step of a shard's way: its planned rows, and the images that they bring along."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ldm_ops.describe import ModelFacts
from pipelines import manifest
from pipelines.blocks import GEOMETRY, KEPT, RESULT_FIELDS, error_message, rows_of, with_results
from pipelines.errors import JobError
from pipelines.inputs import BadImage, Loaded, Loader, bucket_sizes
from pipelines.job import Source
from pipelines.journal import journal_of
from pipelines.latents_file import LatentsHead, NotLatents, as_array, read_latents
from pipelines.plans import read_shard
from pipelines.shards import Shard
from pipelines.stages import AnyStage, Background, Buckets, Resized, reads
from pipelines.storage import Store


def image_loader(stage: AnyStage, facts: ModelFacts, source: Source, size_multiple: int = 1) -> Loader | None:
    """How images come into `stage`; None where it takes none. `size_multiple` is what its adapters ask for.

    Raises:
        JobError: its buckets are none.
    """
    takes = reads(stage)
    if not isinstance(stage, Background) or takes.isdisjoint({"image", "control_image"}):
        return None
    resize, multiple = None, 1
    if isinstance(stage, Resized):
        resize, multiple = stage.resize, math.lcm(facts.size_multiple, size_multiple)
    buckets: tuple[tuple[int, int], ...] = ()
    if isinstance(stage, Buckets) and stage.resolution is not None:
        step = math.lcm(stage.bucket_multiple, multiple)
        buckets = bucket_sizes(stage.resolution, step, stage.max_aspect_ratio)
        if not buckets:
            raise JobError(
                f"resolution {stage.resolution}: no bucket of multiples of {step} has so few pixels within "
                f"max_aspect_ratio {stage.max_aspect_ratio:g}; use a smaller bucket_multiple"
            )
    return Loader(
        takes,
        resize,
        multiple,
        stage.background,
        source.storage_options,
        buckets,
        decoding=getattr(stage, "image_decoding", "exact"),
        allow_hosts=tuple(source.allow_hosts),
    )


FILES_HELD = 2
"""Files of latents at a time; the plan sorts rows by where their latents lie."""


Files = dict[str, tuple[LatentsHead, pa.Table] | NotLatents]

PLACE = pa.schema(
    [
        ("file", pa.string()),
        ("shard", pa.int32()),
        ("part", pa.string()),
        ("unless_done", pa.bool_()),
        ("redo", pa.list_(pa.string())),
    ]
)


def place(shard: Shard, redo: frozenset[str] | None = None, unless_done: bool = False) -> pa.Table:
    """Where a shard's rows stand in its plan; with `redo`, keys, the others are left as its part says."""
    values = {
        "file": shard.file,
        "shard": shard.index,
        "part": manifest.part_path(shard.plan_id, shard.index),
        "unless_done": unless_done,
        "redo": None if redo is None else sorted(redo),
    }
    return pa.Table.from_pylist([values], schema=PLACE)


class LoadShard:
    """Callable on a `place`; returns its rows with what they bring along, none where all is done."""

    def __init__(
        self,
        store: Store,
        loader: Loader | None,
        encoder: str,
        storage_options: dict[str, Any],
        journal: str | None = None,
    ) -> None:
        self.journal = journal
        self.store = store
        self.loader = loader
        self.encoder = encoder
        self.storage_options = storage_options

    def __call__(self, place: pa.Table) -> pa.Table:
        [at] = place.to_pylist()
        table = read_shard(self.store, at["file"], at["shard"])
        if at["unless_done"] and self.store.read(at["part"]) is not None:
            return with_results(table, [])
        if at["redo"] is None:
            return self.load(table)
        part = self.store.read(at["part"])
        attempts = {} if part is None else manifest.read_attempts(part)
        again = pc.is_in(table["key"], pa.array(at["redo"], pa.string()))
        loaded = self.load(table.filter(again))
        made = iter(rows_of(loaded.select([field.name for field in RESULT_FIELDS])))
        return with_results(
            table,
            [
                # No attempt is known of a row whose part cannot be read: it was one, at least.
                {**next(made), "attempt": attempts.get(key, 1) + 1} if redone else {"status": KEPT}
                for key, redone in zip(table["key"].to_pylist(), again.to_pylist(), strict=True)
            ],
        )

    def load(self, table: pa.Table) -> pa.Table:
        """Planned rows with what they bring along."""
        rows = table.to_pylist()
        results = [{} if row["problem"] is None else _failed("plan", "row.invalid", row["problem"]) for row in rows]
        fine = [i for i, result in enumerate(results) if not result]
        if not fine or (self.loader is None and all(rows[i]["latents"] is None for i in fine)):
            return with_results(table, results)
        if self.journal is None:
            self._bring(rows, fine, results, {})
            return with_results(table, results)
        record = journal_of(self.journal).open(f"load-{rows[0]['key']}", f"loading shard {rows[0]['shard']}")
        for i in fine:
            if death := record.verdict(rows[i]["key"]):
                results[i] = _failed("load", death.kind, death.words)
        fine = [i for i in fine if not results[i]]
        files: Files = {}
        for some in [[i] for i in fine] if record.suspects else [fine]:
            with record.doing([rows[i]["key"] for i in some]):
                self._bring(rows, some, results, files)
        record.close()
        return with_results(table, results)

    def _bring(self, rows: list[dict[str, Any]], some: list[int], results: list[dict[str, Any]], files: Files) -> None:
        if self.loader is not None:
            for i, loaded in zip(some, self.loader([rows[i] for i in some]), strict=True):
                results[i] = _image(loaded)
        for i in some:
            if rows[i]["latents"] is not None:
                results[i] = self._latents(rows[i]["latents"], rows[i]["image_version"], files)

    def _latents(self, where: str, version: str | None, files: Files) -> dict[str, Any]:
        uri, _, number = where.rpartition("#")
        if uri not in files:
            folder, _, name = uri.rpartition("/")
            data = Store(folder, self.storage_options, reached=True).read(name)
            while len(files) >= FILES_HELD:
                files.pop(next(iter(files)))
            try:
                files[uri] = read_latents(data) if data is not None else NotLatents("there is no such file")
            except NotLatents as error:
                files[uri] = error
        found = files[uri]
        if isinstance(found, NotLatents):
            return _failed("load", "latents.broken", f"{uri}: {found}")
        head, rows = found
        if head.encoder_revision != self.encoder:
            made_by = f"{head.encoder} @ {head.encoder_revision}"
            return _failed("load", "latents.encoder", f"{uri} is by {made_by}, not {self.encoder}")
        if int(number) >= rows.num_rows:
            return _failed("load", "latents.broken", f"{uri}: it has {rows.num_rows} rows, none at {number}")
        latents = as_array(rows["latents"].slice(int(number), 1), head)[0]
        # Numbers are stored as they are: nothing else would tell of a bit that has flipped.
        if version is not None and hashlib.sha256(latents.tobytes()).hexdigest() != version:
            return _failed("load", "latents.broken", f"{uri}: other latents at {number} than when the plan was made")
        return {"latents_data": latents}


def _image(loaded: Loaded | BadImage) -> dict[str, Any]:
    if isinstance(loaded, BadImage):
        return _failed("load", loaded.kind, str(loaded))
    return {
        "pixels": loaded.image,
        "mask_pixels": loaded.mask_image,
        "control_pixels": loaded.control_image,
        **{name: getattr(loaded, name) for name in GEOMETRY},
    }


def _failed(stage: str, kind: str, message: str) -> dict[str, Any]:
    return {"status": "failed", "stage": stage, "error_type": kind, "error_message": error_message(message)}
