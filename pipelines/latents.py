"""Stored latents as a torch dataset: the one file of this room that knows torch, for trainers.

from torch.utils.data import DataLoader
from pipelines.latents import LatentDataset

dataset = LatentDataset("out/latents", batch_size=16, seed=7, rank=0, world_size=1)
for batch in DataLoader(dataset, batch_size=None, num_workers=2):
    batch["latents"]  # float32 (16, C, h, w), sampled from the posterior and scaled as a denoiser takes it
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from pipelines.blocks import GEOMETRY
from pipelines.errors import JobError
from pipelines.latents_file import LatentsHead, NotLatents, as_array, open_safetensors, read_head
from pipelines.manifest import read_manifest
from pipelines.storage import Store

WINDOW_GROUPS = 8
"""Row groups whose rows are shuffled among each other, and read at a time; fewer where they are large."""

WINDOW_BYTES = 512 << 20
MAX_WORKERS = 256

OPEN_FILES = 32
READERS = 16
COLUMNS = ("key", "prompt", *GEOMETRY, "flipped")

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """A row group of one file: the unit of reading."""

    uri: str
    index: int
    num_rows: int


@dataclass(frozen=True)
class Bucket:
    """All row groups of latents of one shape."""

    head: LatentsHead
    groups: tuple[Group, ...]

    @property
    def num_rows(self) -> int:
        return sum(group.num_rows for group in self.groups)


class LatentDataset(IterableDataset[dict[str, Any]]):
    """Batches of the latents that an `encode` job left under `path`, a folder or an fsspec URL.

    A batch holds `latents`; `key` and `prompt`, lists; `original_size`, `crop_top_left` and `target_size`, int64
    (B, 2), height before width, in pixels; `flipped`, bool (B,). All latents of a batch have one shape. Of moments they
    are a sample, (mean + exp(logvar / 2) · noise - shift) · scale, in float32; with `raw` they are what is stored.

    The order is a matter of seed, epoch, rank and the number of workers alone. Every rank gets equally many batches;
    the few rows that fill none on every rank are left out, others in each epoch.

    Args:
        path: output of the job.
        batch_size: rows of a batch.
        seed: of the order and of the posterior's noise.
        shuffle: row groups in random order, and the rows of WINDOW_GROUPS of them among each other.
        rank: of this process, as in torch.distributed.
        world_size: number of such processes.
        raw: give the stored moments, not a sample of them.
        storage_options: for fsspec.

    Raises:
        JobError: no latents there, or those of several encoders.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 1,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        raw: bool = False,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise JobError(f"batch_size {batch_size}; 1 or more")
        if not 0 <= rank < world_size:
            raise JobError(f"rank {rank} of world_size {world_size}; 0 to {world_size - 1}")
        self.store = Store(path, storage_options)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.raw = raw
        self.buckets = find_buckets(self.store, storage_options)
        # Shared with DataLoader's workers: the epoch and batch to begin with, then each worker's finished epochs.
        self._state = torch.zeros(2 + MAX_WORKERS, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call] # torch's own
        self._taken = 0
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._process = os.getpid()
        # A connection that was opened here would not survive the fork of a worker.
        self.store = Store(path, storage_options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __len__(self) -> int:
        """Batches of this rank in one epoch."""
        return sum(self._batches(bucket) for bucket in self.buckets)

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch` from its start; without it each pass is the next epoch."""
        self.load_state_dict({"epoch": epoch, "num_batches": 0})

    def state_dict(self, num_taken: int | None = None) -> dict[str, int]:
        """Where this rank is.

        Under a DataLoader with workers, which read ahead, say how many batches the training has taken since this
        dataset was made, or since `set_epoch` or `load_state_dict`.
        """
        epoch, begun = self._state[:2].tolist()
        passes, num_batches = divmod(begun + (self._taken if num_taken is None else num_taken), max(1, len(self)))
        return {"epoch": epoch + passes, "num_batches": num_batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that `state` counts, with as many workers as then."""
        self._state.zero_()
        self._state[0], self._state[1] = state["epoch"], state["num_batches"]
        self._taken = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        place, count = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        if count > MAX_WORKERS:
            raise JobError(f"num_workers {count}; at most {MAX_WORKERS}")
        finished = int(self._state[2 + place])
        epoch = int(self._state[0]) + finished
        shares = [[self._share(bucket, w, count) for bucket in self.buckets] for w in range(count)]
        lengths = [sum(end - begin for begin, end in share) for share in shares]
        taken, turn = _taken(0 if finished else int(self._state[1]), lengths)
        # DataLoader begins with its first worker, who takes the part of the one whose turn it is.
        index = (place + turn) % count
        skip = taken[index]
        mine = shares[index]
        turns = np.repeat(np.arange(len(mine)), [end - begin for begin, end in mine])
        if self.shuffle:
            turns = np.random.default_rng([self.seed, epoch, self.rank, index]).permutation(turns)
        skipped = np.bincount(turns[:skip], minlength=len(mine))
        streams = [
            self._stream(i, self.buckets[i], epoch, begin + int(skipped[i]), end) for i, (begin, end) in enumerate(mine)
        ]
        # Noise of a batch is a matter of its place, so that it is the same after a resume.
        for number, which in enumerate(turns[skip:].tolist(), skip):
            if worker is None:
                self._taken += 1
            noise_seed = [self.seed, epoch, self.rank, index, number, 1]
            yield self._batch(self.buckets[which].head, next(streams[which]), noise_seed)
        self._state[2 + place] = finished + 1

    def _batches(self, bucket: Bucket) -> int:
        return bucket.num_rows // self.batch_size // self.world_size

    def _share(self, bucket: Bucket, worker: int, num_workers: int) -> tuple[int, int]:
        """First and last + 1 of a worker's batches of `bucket`, neighbours, so that no two read the same group."""
        own = self._batches(bucket)
        first = own * self.rank
        return first + own * worker // num_workers, first + own * (worker + 1) // num_workers

    def _stream(self, number: int, bucket: Bucket, epoch: int, begin: int, end: int) -> Iterator[pa.Table]:
        """The tables of batches `begin` to `end` of a bucket's order, window by window."""
        rng = np.random.default_rng([self.seed, epoch, number, 2])
        order = rng.permutation(len(bucket.groups)) if self.shuffle else np.arange(len(bucket.groups))
        first, last = begin * self.batch_size, end * self.batch_size
        place = 0
        rest: pa.Table | None = None
        step = self._window(bucket)
        for window in range(0, len(order), step):
            groups = [bucket.groups[i] for i in order[window : window + step]]
            size = sum(group.num_rows for group in groups)
            low, high = max(first - place, 0), min(last - place, size)
            if low < high:
                # Its own generator, so that those before it need not be drawn.
                among = np.random.default_rng([self.seed, epoch, number, window, 3])
                rows = (among.permutation(size) if self.shuffle else np.arange(size))[low:high]
                table = self._read(groups, rows)
                if rest is not None:
                    table = pa.concat_tables([rest, table])
                whole = table.num_rows // self.batch_size * self.batch_size
                for start in range(0, whole, self.batch_size):
                    yield table.slice(start, self.batch_size)
                rest = table.slice(whole) if whole < table.num_rows else None
            place += size

    def _window(self, bucket: Bucket) -> int:
        """Row groups to hold at a time, such that all buckets together stay within WINDOW_BYTES."""
        row_bytes = int(np.prod(bucket.head.shape)) * np.dtype(bucket.head.dtype).itemsize
        group_bytes = row_bytes * max(group.num_rows for group in bucket.groups)
        return int(min(WINDOW_GROUPS, max(1, WINDOW_BYTES // len(self.buckets) // group_bytes)))

    def _read(self, groups: list[Group], rows: Integers) -> pa.Table:
        """Rows of consecutive `groups`, by their number among all of these, in that order."""
        bounds = np.cumsum([0, *(group.num_rows for group in groups)])
        needed = [i for i in range(len(groups)) if ((rows >= bounds[i]) & (rows < bounds[i + 1])).any()]
        tables = [self._file(groups[i].uri).read_row_group(groups[i].index, [*COLUMNS, "latents"]) for i in needed]
        starts = np.cumsum([0, *(table.num_rows for table in tables)])
        moved = rows.copy()
        for k, i in enumerate(needed):
            inside = (rows >= bounds[i]) & (rows < bounds[i + 1])
            moved[inside] = rows[inside] - bounds[i] + starts[k]
        table = pa.concat_tables(tables).combine_chunks()
        return table.take(pa.array(moved)) if self.shuffle else table.slice(int(moved[0]), len(moved))

    def _file(self, uri: str) -> Any:
        if self._process != os.getpid():
            self._process = os.getpid()
            self._open = OrderedDict()
            self.store = Store(self.store.url, self.store.storage_options)
        if uri in self._open:
            self._open.move_to_end(uri)
        else:
            self._open[uri] = _open_file(self.store, uri)
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        return self._open[uri]

    def _batch(self, head: LatentsHead, table: pa.Table, noise_seed: list[int]) -> dict[str, Any]:
        # Arrow's memory is read-only; a batch is the trainer's own.
        latents = torch.from_numpy(as_array(table["latents"], head).copy())
        if head.posterior == "moments" and not self.raw:
            seed = int(np.random.SeedSequence(noise_seed).generate_state(1, np.uint64)[0] >> 1)
            mean, logvar = latents.float().chunk(2, 1)
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
            latents = logvar.mul_(0.5).exp_().mul_(noise).add_(mean).sub_(head.shift).mul_(head.scale)
        columns = {name: table[name].to_numpy() for name in GEOMETRY}
        original = np.stack([columns["original_height"], columns["original_width"]], 1)
        corner = np.stack([columns["crop_top"], columns["crop_left"]], 1)
        target = torch.tensor([[side * head.factor for side in head.shape[1:]]] * len(original))
        return {
            "latents": latents,
            "key": table["key"].to_pylist(),
            "prompt": table["prompt"].to_pylist(),
            "original_size": torch.from_numpy(original.astype(np.int64)),
            "crop_top_left": torch.from_numpy(corner.astype(np.int64)),
            "target_size": target,
            "flipped": torch.from_numpy(table["flipped"].to_numpy().astype(bool)),
        }


def find_buckets(store: Store, storage_options: dict[str, Any] | None) -> list[Bucket]:
    """All latents that the manifest of an output names, by shape.

    Raises:
        JobError: there are none, or they are of several encoders.
    """
    table = read_manifest(store.url, ["status", "uri", "format"], storage_options)
    rows = zip(*(table[name].to_pylist() for name in ("status", "uri", "format")), strict=True)
    uris = sorted({uri for status, uri, format in rows if status == "ok" and format == "latents"})
    if not uris:
        raise JobError(f"{store.url} holds no latents; give the output of an encode job")

    def look(uri: str) -> tuple[str, LatentsHead, list[Group]]:
        try:
            with _open_file(store, uri) as file:
                head = read_head(file.schema_arrow.metadata)
                sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        except NotLatents as error:
            raise JobError(f"{store.uri(uri)}: {error}") from None
        return uri, head, [Group(uri, i, size) for i, size in enumerate(sizes)]

    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(look, uris))
    first = found[0][1]
    buckets: dict[tuple[int, int, int], list[Group]] = {}
    for uri, head, groups in found:
        if not head.same_encoder(first):
            raise JobError(
                f"{store.uri(uri)} is by {head.encoder} @ {head.encoder_revision} ({head.posterior}, {head.dtype}), "
                f"others by {first.encoder} @ {first.encoder_revision} ({first.posterior}, {first.dtype}); latents of "
                "several encoders do not mix"
            )
        buckets.setdefault(head.shape, []).extend(groups)
    heads = {head.shape: head for _, head, _ in found}
    return [Bucket(heads[shape], tuple(groups)) for shape, groups in sorted(buckets.items())]


def _open_file(store: Store, uri: str) -> Any:
    """A ParquetFile, or what has its methods for the other format."""
    if uri.endswith(".safetensors"):
        if store.local is not None:
            return open_safetensors(pa.memory_map(str(store.local / uri)))
        return open_safetensors(pa.PythonFile(store.filesystem.open(store.uri(uri), "rb"), "r"))
    if store.local is not None:
        return pq.ParquetFile(store.local / uri, memory_map=True)
    return pq.ParquetFile(store.filesystem.open(store.uri(uri), "rb"), pre_buffer=True)


def _taken(num_batches: int, lengths: list[int]) -> tuple[list[int], int]:
    """How many of the first `num_batches` came from each worker, and whose turn it is.

    DataLoader asks its workers in turn, and passes over those that have none left.
    """
    rounds = 0
    while rounds < max(lengths, default=0) and sum(min(n, rounds + 1) for n in lengths) <= num_batches:
        rounds += 1
    taken = [min(n, rounds) for n in lengths]
    left = [i for i, n in enumerate(lengths) if n > rounds]
    over = num_batches - sum(taken)
    for i in left[:over]:
        taken[i] += 1
    return taken, left[over] if over < len(left) else 0
