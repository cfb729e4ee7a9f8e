"""Stored latents as a torch dataset: the one file of this room that knows torch, for trainers.

from torch.utils.data import DataLoader
from pipelines.latents import LatentDataset

dataset = LatentDataset("out/latents", batch_size=16, seed=7, rank=0, world_size=1)
for batch in DataLoader(dataset, batch_size=None, num_workers=2):
    batch["latents"]  # float32 (16, C, h, w), sampled from the posterior and scaled as a denoiser takes it
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from pipelines.blocks import GEOMETRY
from pipelines.errors import JobError
from pipelines.latents_file import LatentsHead, NotLatents, as_array, mapped, open_safetensors, read_head
from pipelines.manifest import read_manifest
from pipelines.open_files import OpenFiles, open_parquet
from pipelines.storage import Store
from pipelines.text_embeddings import TextEmbeddings

WINDOW_GROUPS = 8
"""Row groups whose rows are shuffled among each other, and read at a time; fewer where they are large."""

WINDOW_BYTES = 512 << 20
MAX_WORKERS = 256

READERS = 16
NUMBERS = (*GEOMETRY, "flipped")
COLUMNS = ["key", "prompt", *NUMBERS]

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """A row group of one file: the unit of reading."""

    uri: str
    index: int
    num_rows: int


@dataclass(frozen=True)
class Window:
    """Row groups in memory: each row's latents, views on what was read, and what stands beside them.

    `numbers` is (rows, 5): NUMBERS.
    """

    latents: list[NDArray[Any]]
    keys: list[str]
    prompts: list[str]
    numbers: Integers


@dataclass(frozen=True)
class Piece:
    """Rows of one window that stand in one batch."""

    window: Window
    rows: Integers


@dataclass(frozen=True)
class Bucket:
    """All row groups of latents of one shape."""

    head: LatentsHead
    groups: tuple[Group, ...]

    @property
    def num_rows(self) -> int:
        return sum(group.num_rows for group in self.groups)


class Batch(dict[str, Any]):
    """A dict that a DataLoader's worker sends at less cost: small tensors travel inside the message.

    Each tensor that torch sends costs a file of shared memory and a conversation about it, however few its bytes.
    """

    def __copy__(self) -> Batch:
        return Batch(self)

    def __reduce__(self) -> tuple[Any, ...]:
        small = {
            name: value.numpy()
            for name, value in self.items()
            if isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.bool)
        }
        return _received, ({name: value for name, value in self.items() if name not in small}, small)


def _received(large: dict[str, Any], small: dict[str, NDArray[Any]]) -> Batch:
    return Batch(large | {name: torch.from_numpy(value) for name, value in small.items()})


class LatentDataset(IterableDataset[dict[str, Any]]):
    """Batches of the latents that an `encode` job left under `path`, a folder or an fsspec URL.

    A batch holds `latents`; `key` and `prompt`, lists; `original_size`, `crop_top_left` and `target_size`, int64
    (B, 2), height before width, in pixels; `flipped`, bool (B,). All latents of a batch have one shape. Of moments they
    are a sample, (mean + exp(logvar / 2) · noise - shift) · scale, in float32; with `raw` they are what is stored.

    With `text_embeddings` it also holds what the pipeline's `encode_prompt` gave, as stored: `prompt_embeds` (B, T, D),
    T the longest of the batch; `prompt_attention_mask`, bool (B, T), false where a caption was filled up with zeros;
    and `pooled_prompt_embeds` (B, P) where the model has one.

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
        text_embeddings: output of an `embed` job with the captions of all rows, and the empty one.
        caption_dropout: share of rows that go without their caption, drawn anew in each epoch; their `prompt` is "".
        num_threads: threads that make batches ahead, in the same order. They hand over nothing between processes and so
            beat a DataLoader's workers; leave those out then, or give each of them its threads.
        storage_options: for fsspec.

    Raises:
        JobError: no latents or no text embeddings there, those of several encoders, or a caption without its own.
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
        text_embeddings: str | None = None,
        caption_dropout: float = 0.0,
        num_threads: int = 0,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise JobError(f"batch_size {batch_size}; 1 or more")
        if not 0 <= rank < world_size:
            raise JobError(f"rank {rank} of world_size {world_size}; 0 to {world_size - 1}")
        if not 0 <= caption_dropout <= 1:
            raise JobError(f"caption_dropout {caption_dropout}; 0 to 1")
        if num_threads < 0:
            raise JobError(f"num_threads {num_threads}; 0 or more")
        self.store = Store(path, storage_options)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.raw = raw
        self.num_threads = num_threads
        self.caption_dropout = caption_dropout
        self.buckets = find_buckets(self.store, storage_options)
        if not len(self):
            bucket = max(self.buckets, key=lambda bucket: bucket.num_rows)
            size = "×".join(str(side * bucket.head.factor) for side in reversed(bucket.head.shape[1:]))
            most = bucket.num_rows // world_size
            less = f"use at most {most}" if most else f"{world_size} ranks are too many"
            raise JobError(
                f"batch_size {batch_size} × world_size {world_size} is more than the {bucket.num_rows} rows of the "
                f"largest bucket ({size} px), so an epoch would have no batch; {less}"
            )
        self.embeddings = None if text_embeddings is None else TextEmbeddings(text_embeddings, storage_options)
        if self.embeddings is not None:
            self._refuse_missing(self.embeddings)
        # Shared with DataLoader's workers: the epoch and batch to begin with, then each worker's finished epochs.
        self._state = torch.zeros(2 + MAX_WORKERS, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call] # torch's own
        self._taken = 0
        # With a store of its own: a connection that was opened here would not survive the fork of a worker.
        self._files = OpenFiles(Store(path, storage_options), _open_file)

    def _refuse_missing(self, embeddings: TextEmbeddings) -> None:
        table = read_manifest(self.store.url, ["status", "prompt"], self.store.storage_options)
        captions = pc.unique(table.filter(pc.equal(table["status"], "ok"))["prompt"]).to_pylist()
        missing = embeddings.missing([*captions, ""] if self.caption_dropout else captions)
        if missing:
            more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise JobError(
                f"{embeddings.store.url} has no embedding of {min(missing)[:80]!r}{more}; run its embed job on the "
                "same captions"
            )

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
        asked = (
            (self.buckets[which].head, next(streams[which]), epoch, [self.seed, epoch, self.rank, index, number, 1])
            for number, which in enumerate(turns[skip:].tolist(), skip)
        )
        for batch in self._made(asked):
            if worker is None:
                self._taken += 1
            yield batch
        self._state[2 + place] = finished + 1

    def _made(self, asked: Iterator[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
        """Batches in the order that they are asked for, some of them ahead where there are threads for it."""
        if not self.num_threads:
            for arguments in asked:
                yield self._batch(*arguments)
            return
        with ThreadPoolExecutor(self.num_threads) as pool:
            ahead = deque(pool.submit(self._batch, *arguments) for arguments in islice(asked, 2 * self.num_threads))
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(self._batch, *arguments) for arguments in islice(asked, 1))

    def _batches(self, bucket: Bucket) -> int:
        return bucket.num_rows // self.batch_size // self.world_size

    def _share(self, bucket: Bucket, worker: int, num_workers: int) -> tuple[int, int]:
        """First and last + 1 of a worker's batches of `bucket`, neighbours, so that no two read the same group."""
        own = self._batches(bucket)
        first = own * self.rank
        return first + own * worker // num_workers, first + own * (worker + 1) // num_workers

    def _stream(self, number: int, bucket: Bucket, epoch: int, begin: int, end: int) -> Iterator[list[Piece]]:
        """Batches `begin` to `end` of a bucket's order, window by window; one may begin in one and end in the next."""
        rng = np.random.default_rng([self.seed, epoch, number, 2])
        order = rng.permutation(len(bucket.groups)) if self.shuffle else np.arange(len(bucket.groups))
        first, last = begin * self.batch_size, end * self.batch_size
        place = 0
        rest: list[Piece] = []
        step = self._window(bucket)
        for window in range(0, len(order), step):
            groups = [bucket.groups[i] for i in order[window : window + step]]
            size = sum(group.num_rows for group in groups)
            low, high = max(first - place, 0), min(last - place, size)
            place += size
            if low >= high:
                continue
            # Its own generator, so that those before it need not be drawn.
            among = np.random.default_rng([self.seed, epoch, number, window, 3])
            rows = (among.permutation(size) if self.shuffle else np.arange(size))[low:high]
            held, rows = self._read(bucket.head, groups, rows)
            lacking = self.batch_size - sum(len(piece.rows) for piece in rest)
            for start in range(lacking - self.batch_size, len(rows), self.batch_size):
                rest.append(Piece(held, rows[max(start, 0) : start + self.batch_size]))
                if start + self.batch_size <= len(rows):
                    yield rest
                    rest = []
            # The next one is read once this one is let go.
            del held

    def _window(self, bucket: Bucket) -> int:
        """Row groups to hold at a time, such that all buckets together stay within WINDOW_BYTES."""
        row_bytes = int(np.prod(bucket.head.shape)) * np.dtype(bucket.head.dtype).itemsize
        group_bytes = row_bytes * max(group.num_rows for group in bucket.groups)
        return int(min(WINDOW_GROUPS, max(1, WINDOW_BYTES // len(self.buckets) // group_bytes)))

    def _read(self, head: LatentsHead, groups: list[Group], rows: Integers) -> tuple[Window, Integers]:
        """What consecutive `groups` hold of `rows`, numbers among all of these; and the rows' numbers in that."""
        bounds = np.cumsum([0, *(group.num_rows for group in groups)])
        needed = [i for i in range(len(groups)) if ((rows >= bounds[i]) & (rows < bounds[i + 1])).any()]
        read = [self._group(head, groups[i]) for i in needed]
        starts = np.cumsum([0, *(table.num_rows for table, _ in read)])
        moved = rows.copy()
        for k, i in enumerate(needed):
            inside = (rows >= bounds[i]) & (rows < bounds[i + 1])
            moved[inside] = rows[inside] - bounds[i] + starts[k]
        latents = [array for _, arrays in read for array in arrays]
        beside = pa.concat_tables([table for table, _ in read])
        numbers = np.stack([beside[name].cast(pa.int64()).to_numpy() for name in NUMBERS], 1)
        return Window(latents, beside["key"].to_pylist(), beside["prompt"].to_pylist(), numbers), moved

    def _group(self, head: LatentsHead, group: Group) -> tuple[pa.Table, NDArray[Any]]:
        """COLUMNS of a row group, and its latents, which a file on this machine need not copy."""
        file = self._files[group.uri]
        if self.store.local is not None and isinstance(file, pq.ParquetFile):
            latents = mapped(self.store.local / group.uri, file, group.index, head)
            if latents is not None:
                return file.read_row_group(group.index, COLUMNS), latents
        table = file.read_row_group(group.index, [*COLUMNS, "latents"])
        return table.select(COLUMNS), as_array(table["latents"], head)

    def _batch(self, head: LatentsHead, pieces: list[Piece], epoch: int, noise_seed: list[int]) -> dict[str, Any]:
        chosen = [(piece.window, row) for piece in pieces for row in piece.rows.tolist()]
        keys = [window.keys[row] for window, row in chosen]
        numbers = np.concatenate([piece.window.numbers[piece.rows] for piece in pieces])
        stored = np.empty((len(chosen), *head.shape), head.dtype)
        for place, (window, row) in zip(stored, chosen, strict=True):
            # The only copy between Arrow's memory, which is read-only, and the trainer's own.
            place[...] = window.latents[row]
        latents = torch.from_numpy(stored)
        if head.posterior == "moments" and not self.raw:
            seed = int(np.random.SeedSequence(noise_seed).generate_state(1, np.uint64)[0] >> 1)
            mean, logvar = latents.chunk(2, 1)
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
            latents = logvar.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            latents.mul_(0.5).exp_().mul_(noise).add_(mean).sub_(head.shift).mul_(head.scale)
        prompts = [
            "" if dropped else prompt
            for prompt, dropped in zip(
                (window.prompts[row] for window, row in chosen), self._dropped(epoch, keys), strict=True
            )
        ]
        size = np.array(head.shape[1:], np.int64) * head.factor
        batch = Batch(
            latents=latents,
            key=keys,
            prompt=prompts,
            original_size=torch.from_numpy(numbers[:, :2].copy()),
            crop_top_left=torch.from_numpy(numbers[:, 2:4].copy()),
            target_size=torch.from_numpy(np.tile(size, (len(chosen), 1))),
            flipped=torch.from_numpy(numbers[:, 4].astype(bool)),
        )
        if self.embeddings is not None:
            batch.update(_embedded(self.embeddings, prompts))
        return batch

    def _dropped(self, epoch: int, keys: list[str]) -> list[bool]:
        """Whether each row goes without its caption in this epoch; a matter of seed, epoch and row alone."""
        if not self.caption_dropout:
            return [False] * len(keys)
        digests = (hashlib.sha256(f"{self.seed} {epoch} {key}".encode()).digest() for key in keys)
        return [int.from_bytes(digest[:8], "big") < self.caption_dropout * 2**64 for digest in digests]


def _embedded(embeddings: TextEmbeddings, captions: list[str]) -> dict[str, torch.Tensor]:
    values, mask, pooled = embeddings.padded(captions)
    found = {"prompt_embeds": values, "prompt_attention_mask": mask, "pooled_prompt_embeds": pooled}
    tensors = {name: torch.from_numpy(array) for name, array in found.items() if array is not None}
    if embeddings.head.dtype == "bf16":
        # numpy knows no bf16 and holds its bits.
        bits = [name for name in tensors if name != "prompt_attention_mask"]
        tensors |= {name: tensors[name].view(torch.bfloat16) for name in bits}
    return tensors


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
        except (NotLatents, pa.ArrowInvalid, FileNotFoundError) as error:
            raise JobError(f"{store.uri(uri)}: {str(error).splitlines()[0]}; encode again") from None
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
    if not uri.endswith(".safetensors"):
        return open_parquet(store, uri)
    if store.local is not None:
        return open_safetensors(pa.memory_map(str(store.local / uri)))
    return open_safetensors(pa.PythonFile(store.filesystem.open(store.uri(uri), "rb"), "r"))


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
