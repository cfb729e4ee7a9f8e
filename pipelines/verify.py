"""Verify: read back what an output says that it holds, and hold it against its plans.

Parts first, then the files that they name; a shard at a time, and of each row only a line for the digest stays.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import manifest, shard_file
from pipelines.errors import JobError, NotWhole
from pipelines.inputs import BadImage
from pipelines.latents_file import NotLatents, as_array, read_latents
from pipelines.loading import image_loader
from pipelines.plans import Plan, job_of, read_plans, read_shard
from pipelines.regenerate import Regenerated, regenerated
from pipelines.shards import Shard
from pipelines.stages import EncodeStage
from pipelines.storage import Info, Store
from pipelines.totals import Counting, Totals, unplanned
from pipelines.weights import fetch, identify

MAX_FAULTS = 20
READERS = 8
FOLDERS_HELD = 4
MAX_PSNR_DB = 100.0


@dataclass
class Decoded:
    """Rows that were decoded, and how near they are to their source images, where these are still there."""

    num_rows: int = 0
    num_compared: int = 0
    psnr_db_mean: float | None = None
    psnr_db_min: float | None = None


Damage = dict[tuple[str, int], frozenset[str] | None]
"""(plan id, shard) -> keys of rows that are not as they should be; None where the shard has no part."""

Place = tuple[str, int, str]
"""Plan id, shard and key of a row."""


@dataclass
class Report:
    """What was read back. `faults` are the first MAX_FAULTS of `num_faults`, a line each; `damage` is all of it."""

    output: str
    totals: Totals = field(default_factory=Totals)
    num_files_seen: int = 0
    num_rows_read: int = 0
    num_files_read: int = 0
    num_bytes_read: int = 0
    num_faults: int = 0
    faults: list[str] = field(default_factory=list)
    decoded: Decoded | None = None
    regenerated: Regenerated | None = None
    damage: Damage = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return NotWhole.exit_code if self.num_faults else 0

    def fault(self, text: str, *rows: Place) -> None:
        """Note what is wrong, and with which rows; making them again mends it."""
        self.num_faults += 1
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(text)
        for plan_id, shard, key in rows:
            self.damage[plan_id, shard] = (self.damage.get((plan_id, shard)) or frozenset()) | {key}


@dataclass(frozen=True)
class Piece:
    """What a row says of a file, or of a part of it: `member` is a name in a tar, or a row's number."""

    file: str
    member: str | None
    sha256: str | None
    num_bytes: int | None
    row: Place
    kind: str = "picture"


def verify(
    output: str,
    storage_options: dict[str, Any] | None = None,
    deep: bool = False,
    sample: int | None = None,
    decode: int = 0,
    regenerate: int = 0,
    seed: int = 0,
    source_options: dict[str, Any] | None = None,
) -> Report:
    """Read an output back: every part, and whether each file that they name is there at its size.

    Args:
        deep: read every file too, and hold it against what the manifest says.
        sample: read the files of so many rows.
        decode: so many rows of latents are decoded by the autoencoder that made them.
        regenerate: so many rows are made again here, and their bytes compared.
        seed: chooses which rows those are.
        source_options: for fsspec, of the images and the model.

    Raises:
        NotWhole: no plan is there, or one that cannot be read; all other faults are in the report.
        JobError: `decode` of an output without latents, or whose model is no longer to be had.
        StorageError: the store refuses or does not answer.
    """
    store = Store(output, storage_options)
    plans = read_plans(store)
    if not plans:
        raise NotWhole(f"{output} holds no plan of ldm-batch; check the path")
    report = Report(output)
    counting = Counting(plans)
    # A deep look reads them all.
    to_read = _Lot(None if deep else sample, seed)
    to_decode, to_make = _Lot(decode, seed), _Lot(regenerate, seed)
    listing = Listing(store)
    for plan in plans:
        if deep:
            _read_rows(store, plan, report)
        for shard, stated in _parts(store, plan, counting, report):
            rows = _inside(plan, stated, report)
            if deep:
                _read_files(store, plan, rows, report)
            else:
                _look_for_files(listing, plan, rows, report)
            for row in rows:
                if row["status"] == "ok":
                    to_read.offer(row["key"], (plan, shard, row))
                    to_make.offer(row["key"], (plan, shard, row))
                    if row["format"] == "latents":
                        to_decode.offer(row["key"], (plan, shard, row))
    for plan, shard, row in to_read.drawn():
        # What is known to be missing is not told twice.
        if row["key"] not in (report.damage.get((plan.plan_id, shard.index)) or ()):
            _read_files(store, plan, [row], report)
    for name in unplanned(plans, manifest.part_names(store)):
        report.fault(f"{name}: no plan names this part")
    report.totals = counting.totals()
    _check_success(store, report)
    if decode:
        _decode(store, to_decode.drawn(), report, source_options or {})
    if regenerate:
        report.regenerated = regenerated(store, to_make.drawn(), source_options or {})
        for text in report.regenerated.different:
            report.fault(text)
    return report


def damage(store: Store) -> Damage:
    """Everything of an output that a deep look finds missing or changed, as rows to make again.

    Raises:
        NotWhole: no plan is there.
    """
    return verify(store.url, store.storage_options, deep=True).damage


class _Lot:
    """Up to `size` of all that is offered, chosen by seed and key alone; none where there is no size."""

    def __init__(self, size: int | None, seed: int) -> None:
        self.size = size or 0
        self.seed = seed
        self.heap: list[tuple[int, str, int, Any]] = []
        self.num_offered = 0

    def offer(self, key: str, item: Any) -> None:
        if not self.size:
            return
        rank = int.from_bytes(hashlib.sha256(f"{self.seed} {key}".encode()).digest()[:8], "big")
        push = heapq.heappush if len(self.heap) < self.size else heapq.heappushpop
        # Items are never compared, should a key come twice.
        self.num_offered += 1
        push(self.heap, (-rank, key, self.num_offered, item))

    def drawn(self) -> list[Any]:
        return [item for *_, item in sorted(self.heap, key=lambda entry: entry[:3])]


def _parts(
    store: Store, plan: Plan, counting: Counting, report: Report
) -> Iterator[tuple[Shard, list[dict[str, Any]]]]:
    """The manifest rows of every shard of `plan` whose part is whole."""
    shards = iter(plan.shards)
    with ThreadPoolExecutor(READERS) as pool:
        while block := list(islice(shards, READERS)):
            paths = [manifest.part_path(plan.plan_id, shard.index) for shard in block]
            for shard, path, part in zip(block, paths, pool.map(store.read, paths), strict=True):
                head = None if part is None else manifest.read_head(part)
                everything = [(plan.plan_id, shard.index, key) for key in _keys(store, shard, head)]
                if part is None:
                    report.fault(f"{path}: missing; its shard is not done, run the job again")
                    report.damage[plan.plan_id, shard.index] = None
                elif head is None:
                    report.fault(f"{path}: not a whole part", *everything)
                elif head.keys_digest != shard.keys_digest:
                    report.fault(f"{path}: does not hold the rows that the plan names", *everything)
                elif (table := _rows(store, plan, shard, part, report)) is not None:
                    counts = {name: 0 for name in ("ok", "failed", "filtered")}
                    for status in table["status"].to_pylist():
                        counts[status] = counts.get(status, 0) + 1
                    if counts != {"ok": head.num_ok, "failed": head.num_failed, "filtered": head.num_filtered}:
                        everything = [(plan.plan_id, shard.index, key) for key in table["key"].to_pylist()]
                        report.fault(f"{path}: its rows are not as many of each status as it says", *everything)
                    counting.add(head, table)
                    yield shard, table.to_pylist()


def _rows(store: Store, plan: Plan, shard: Shard, part: bytes, report: Report) -> pa.Table | None:
    try:
        return manifest.read_part(part, None, manifest.part_path(plan.plan_id, shard.index))
    except NotWhole as error:
        report.fault(str(error), *((plan.plan_id, shard.index, key) for key in _keys(store, shard, None)))
        return None


def _keys(store: Store, shard: Shard, head: manifest.PartHead | None) -> list[str]:
    """The planned keys of a shard, where its part does not tell them."""
    if head is not None and head.keys_digest == shard.keys_digest:
        return []
    return [str(key) for key in read_shard(store, shard.file, shard.index)["key"].to_pylist()]


def _pieces(plan: Plan, row: dict[str, Any]) -> Iterator[Piece]:
    """All that a manifest row names."""
    at = (plan.plan_id, row["shard"], row["key"])
    if row["status"] == "ok":
        file, mark, member = (row["uri"] or "").partition("#")
        said = (row["sha256"], row["num_bytes"], at)
        if row["format"] == "latents":
            yield Piece(file, str(row["latents_row"]), *said, kind="latents")
        elif row["format"] == "embeddings":
            yield Piece(file, str(row["embeddings_row"]), *said, kind="embeddings")
        else:
            yield Piece(file, member if mark else None, *said)
    for other in [*(row["stages"] or ()), *(row["intermediates"] or ())]:
        if other is not None and other.get("uri") is not None:
            yield Piece(other["uri"], None, other.get("sha256"), other.get("num_bytes"), at)
    if row.get("thumbnail") is not None:
        yield Piece(row["thumbnail"], None, None, None, at)


def _read_rows(store: Store, plan: Plan, report: Report) -> None:
    """Whether the planned rows can be read: without them no shard is made again, and no table planned beside them."""
    for shard in {shard.file: shard for shard in plan.shards}.values():
        try:
            read_shard(store, shard.file, shard.index)
        except NotWhole as error:
            report.fault(str(error))


def _inside(plan: Plan, rows: list[dict[str, Any]], report: Report) -> list[dict[str, Any]]:
    """Those of `rows` that name places in this output alone; a stranger's part may name any, which is never opened."""
    fine = []
    for row in rows:
        names = [piece.file for piece in _pieces(plan, row)]
        if outside := [name for name in names if name.startswith("/") or ".." in name.split("/")]:
            report.fault(f"{outside[0]}: lies outside of this output", (plan.plan_id, row["shard"], row["key"]))
        else:
            fine.append(row)
    return fine


Fault = tuple[str, list[Place]]


def _by_file(plan: Plan, rows: list[dict[str, Any]]) -> dict[str, list[Piece]]:
    files: dict[str, list[Piece]] = {}
    for row in rows:
        for piece in _pieces(plan, row):
            files.setdefault(piece.file, []).append(piece)
    return files


def _missing(file: str, pieces: list[Piece]) -> Fault:
    rows = f" ({len(pieces)} rows)" if len(pieces) > 1 else ""
    return f"{file or 'a row that is ok'}: missing{rows}", [piece.row for piece in pieces]


class Listing:
    """Sizes of files, by listing the folders that they lie in; a few folders are held at a time."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.folders: dict[str, dict[str, Info]] = {}

    def num_bytes(self, file: str) -> int | None:
        """None where there is no such file."""
        folder = file.rpartition("/")[0]
        if folder not in self.folders:
            while len(self.folders) >= FOLDERS_HELD:
                self.folders.pop(next(iter(self.folders)))
        else:
            # The one used last is let go last.
            self.folders[folder] = self.folders.pop(folder)
        if folder not in self.folders:
            self.folders[folder] = self.store.list(folder)
        info = self.folders[folder].get(file)
        return None if info is None else info.num_bytes


def _least_bytes(pieces: list[Piece]) -> int:
    """What a file of many cannot be smaller than; of these only embeddings are compressed."""
    return 1 if pieces[0].kind == "embeddings" else sum(piece.num_bytes or 0 for piece in pieces)


def _look_for_files(listing: Listing, plan: Plan, rows: list[dict[str, Any]], report: Report) -> None:
    for file, pieces in _by_file(plan, rows).items():
        size = listing.num_bytes(file) if file else None
        report.num_files_seen += 1
        if size is None:
            text, places = _missing(file, pieces)
            report.fault(text, *places)
        elif pieces[0].member is None and pieces[0].num_bytes is not None and pieces[0].num_bytes != size:
            report.fault(f"{file}: {size} bytes, not {pieces[0].num_bytes}", *(piece.row for piece in pieces))
        elif pieces[0].member is not None and size < (least := _least_bytes(pieces)):
            text = f"{file}: {size} bytes, fewer than the {least} that it holds; it was cut off"
            report.fault(text, *(piece.row for piece in pieces))


def _read_files(store: Store, plan: Plan, rows: list[dict[str, Any]], report: Report) -> None:
    files = _by_file(plan, rows)
    report.num_rows_read += len(rows)
    with ThreadPoolExecutor(READERS) as pool:
        for num_bytes, faults in pool.map(lambda item: _read_file(store, *item), files.items()):
            report.num_files_read += 1
            report.num_bytes_read += num_bytes
            for text, places in faults:
                report.fault(text, *places)


def _read_file(store: Store, file: str, pieces: list[Piece]) -> tuple[int, list[Fault]]:
    """How many bytes a file has, and what is wrong with it."""
    data = store.read(file) if file else None
    rows = [piece.row for piece in pieces]
    if data is None:
        return 0, [_missing(file, pieces)]
    digest = hashlib.sha256(data).hexdigest()
    if digest[:12] not in file.rpartition("/")[2]:
        return len(data), [(f"{file}: {len(data)} bytes, not what its name says; it was cut off or changed", rows)]
    try:
        found = _members(data, pieces)
    except ValueError as error:
        return len(data), [(f"{file}: cannot be read ({error})", rows)]
    faults: list[Fault] = []
    for piece in pieces:
        where = file if piece.member is None else f"{file}#{piece.member}"
        body = data if piece.member is None else found.get(piece.member)
        if body is None:
            faults.append((f"{where}: not in that file", [piece.row]))
        elif piece.num_bytes is not None and len(body) != piece.num_bytes:
            faults.append((f"{where}: {len(body)} bytes, not {piece.num_bytes}", [piece.row]))
        elif piece.sha256 is not None and hashlib.sha256(body).hexdigest() != piece.sha256:
            faults.append((f"{where}: other content than the manifest says", [piece.row]))
    return len(data), faults


def _members(data: bytes, pieces: list[Piece]) -> dict[str, bytes]:
    names = [piece.member for piece in pieces if piece.member is not None]
    if not names:
        return {}
    if pieces[0].kind == "picture":
        return shard_file.read(data, names)
    if pieces[0].kind == "embeddings":
        try:
            table = pq.read_table(pa.BufferReader(data), columns=["prompt_embeds", "pooled_prompt_embeds"])
        except (pa.ArrowException, OSError) as error:
            raise ValueError((str(error).splitlines() or ["empty"])[0]) from None
        both = dict(enumerate(zip(*(column.to_pylist() for column in table.columns), strict=True)))
        return {name: both[int(name)][0] + (both[int(name)][1] or b"") for name in names if int(name) in both}
    try:
        head, table = read_latents(data)
    except NotLatents as error:
        raise ValueError(str(error)) from None
    latents = as_array(table["latents"], head)
    return {name: latents[int(name)].tobytes() for name in names if int(name) < len(latents)}


def _check_success(store: Store, report: Report) -> None:
    """Hold `_SUCCESS` against what was counted; before the last shard is done there should be none."""
    totals, mark = report.totals, store.read("_SUCCESS")
    whole = totals.num_done == totals.num_planned and totals.num_shards_done == totals.num_shards
    if mark is None:
        if whole and not report.num_faults:
            report.fault("_SUCCESS: missing, though all is there; run the job again, which writes it")
        return
    try:
        said = json.loads(mark)
        names = ("num_planned", "num_ok", "num_failed", "num_filtered", "num_bytes", "num_shards", "digest")
        different = [name for name in names if said[name] != asdict(totals)[name]]
    except (ValueError, KeyError, TypeError):
        report.fault("_SUCCESS: cut off, or not of ldm-batch; remove it and run the job again")
        return
    if different:
        name = different[0]
        now = asdict(totals)[name]
        report.fault(f"_SUCCESS: says {name} {said[name]}, the manifest {now}; run the job again, which writes it")


def _decode(
    store: Store, drawn: list[tuple[Plan, Shard, dict[str, Any]]], report: Report, options: dict[str, Any]
) -> None:
    """Decode latents as `decode` does, and compare them with the cut of the image that was encoded."""
    from ldm_ops.decode import Decode
    from ldm_ops.op import RowRefused

    if not drawn:
        raise JobError(f"{report.output} holds no latents to decode; --decode is for the output of an encode job")
    report.decoded = found = Decoded()
    ratios: list[float] = []
    models: dict[str, Any] = {}
    for plan, shard, row in drawn:
        job = job_of(plan)
        stage = job.stages[-1]
        assert isinstance(stage, EncodeStage)
        op = Decode(**{name: getattr(stage, name) for name in ("model", "revision", "variant", "dtype", "device")})
        if plan.plan_id not in models:
            weights, facts = identify(stage.model, stage.revision, stage.variant, options, stage.parts)
            wanted = plan.settings[f"stages.{len(job.stages) - 1}.model_revision"]
            if weights.revision != wanted:
                raise JobError(f"model {stage.model} is {weights.revision} now, the latents are of {wanted}")
            source = job.source.model_copy(update={"storage_options": options})
            with redirect_stderr(io.StringIO()):  # As in `regenerate`.
                loaded = op.load(fetch(weights))
            models[plan.plan_id] = (loaded, image_loader(stage, facts, source))
        model, loader = models[plan.plan_id]
        where = f"{row['uri']}#{row['latents_row']}"
        data = store.read(row["uri"])
        try:
            head, table = read_latents(data or b"")
            latents = as_array(table["latents"], head)[row["latents_row"]]
            made = op.run(model, [{"latents": latents}])[0]["image"]
        except (NotLatents, IndexError, RowRefused) as error:
            report.fault(f"{where}: cannot be decoded ({error})")
            continue
        found.num_rows += 1
        # What an earlier stage made was never written down.
        planned = read_shard(store, shard.file, shard.index).to_pylist() if len(job.stages) == 1 else []
        for mine in (one for one in planned if one["key"] == row["key"] and loader is not None):
            seen = loader([mine])[0]
            if not isinstance(seen, BadImage):
                ratios.append(psnr_db(made, seen.image[:, ::-1] if row["flipped"] else seen.image))
    if ratios:
        found.num_compared = len(ratios)
        found.psnr_db_mean, found.psnr_db_min = sum(ratios) / len(ratios), min(ratios)


def psnr_db(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures of one size, at most MAX_PSNR_DB."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return min(MAX_PSNR_DB, 10 * math.log10(255**2 / error)) if error else MAX_PSNR_DB
