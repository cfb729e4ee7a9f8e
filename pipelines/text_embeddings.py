"""The output of an `embed` job, found again by caption."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.embeddings_file import EmbeddingsHead, NotEmbeddings, as_array, read_head
from pipelines.errors import JobError
from pipelines.manifest import read_manifest
from pipelines.open_files import OpenFiles, open_parquet
from pipelines.storage import Store

CACHE_BYTES = 256 << 20
READERS = 16

Embedding = tuple[NDArray[Any], NDArray[Any]]
"""(tokens, width) and, empty where the model has none, (pooled_width,)."""


class TextEmbeddings:
    """Embeddings under `path`, a folder or an fsspec URL, by caption.

    In memory is an index of 16 bytes a caption, and what was read last, up to CACHE_BYTES.

    Raises:
        JobError: no text embeddings there, or those of several encoders.
    """

    def __init__(self, path: str, storage_options: dict[str, Any] | None = None) -> None:
        self.store = Store(path, storage_options)
        columns = ["status", "format", "uri", "prompt", "embeddings_row"]
        try:
            table = read_manifest(path, columns, storage_options)
            wanted = pc.and_(pc.equal(table["status"], "ok"), pc.equal(table["format"], "embeddings"))
            table = table.filter(wanted)
        except pa.ArrowInvalid:
            table = None  # An output from before there were embeddings.
        if not table:
            raise JobError(f"{self.store.url} holds no text embeddings; give the output of an embed job")
        uris = table["uri"].combine_chunks().dictionary_encode()
        self.uris: list[str] = uris.dictionary.to_pylist()
        hashes = np.fromiter(map(caption_hash, table["prompt"].to_pylist()), np.uint64, table.num_rows)
        order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[order]
        self.files = np.asarray(uris.indices)[order]
        self.rows = np.asarray(table["embeddings_row"])[order]
        self.head = self._one_head()
        self._files = OpenFiles(Store(path, storage_options), open_parquet)
        self._cache: OrderedDict[str, Embedding] = OrderedDict()
        self._cached_bytes = 0
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict(), "_cached_bytes": 0, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": Lock()}

    def missing(self, captions: Iterable[str]) -> list[str]:
        """Those of `captions` that have no embedding."""
        return [caption for caption in captions if self._find(caption) is None]

    def __getitem__(self, caption: str) -> Embedding:
        """The embedding of one caption, read-only. For one thread at a time.

        Raises:
            JobError: there is none.
        """
        if caption in self._cache:
            self._cache.move_to_end(caption)
            return self._cache[caption]
        found = self._find(caption)
        if found is None:
            raise JobError(f"{self.store.url} has no embedding of {caption[:80]!r}; embed it first")
        embedding = self._read(caption, *found)
        self._cache[caption] = embedding
        self._cached_bytes += _size(embedding)
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= _size(self._cache.popitem(last=False)[1])
        return embedding

    def padded(self, captions: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[Any] | None]:
        """A batch: (B, T, width) with zeros after each caption's own tokens, the mask of these (B, T), and (B, P).

        T is the longest of the batch; of a model without a mask all are of one length.
        """
        with self._lock:
            found = [self[caption] for caption in captions]
        longest = max(len(embeds) for embeds, _ in found)
        # Whole at once where nothing is to be filled up.
        make = np.empty if all(len(embeds) == longest for embeds, _ in found) else np.zeros
        batch = make((len(found), longest, self.head.width), found[0][0].dtype)
        mask = np.zeros((len(found), longest), np.bool_)
        for i, (embeds, _) in enumerate(found):
            batch[i, : len(embeds)] = embeds
            mask[i, : len(embeds)] = True
        return batch, mask, np.stack([pooled for _, pooled in found]) if self.head.pooled_width else None

    def _find(self, caption: str) -> tuple[int, int] | None:
        wanted = np.uint64(caption_hash(caption))
        at = int(np.searchsorted(self.hashes, wanted))
        if at == len(self.hashes) or self.hashes[at] != wanted:
            return None
        return int(self.files[at]), int(self.rows[at])

    def _read(self, caption: str, file: int, row: int) -> Embedding:
        uri = self.uris[file]
        parquet = self._files[uri]
        # Every group but the last is as long as the first.
        group, inside = divmod(row, parquet.metadata.row_group(0).num_rows)
        table = parquet.read_row_group(group, ["prompt", "prompt_embeds", "pooled_prompt_embeds"])
        prompt, embeds, pooled = (table[name][inside].as_py() for name in table.column_names)
        if prompt != caption:
            raise JobError(f"{self.store.uri(uri)} row {row} is of the caption {prompt[:80]!r}, not {caption[:80]!r}")
        return (
            as_array(embeds, self.head, self.head.width),
            as_array(pooled, self.head, self.head.pooled_width or 1).reshape(-1),
        )

    def _one_head(self) -> EmbeddingsHead:
        def look(uri: str) -> EmbeddingsHead:
            try:
                with open_parquet(self.store, uri) as file:
                    return read_head(file.schema_arrow.metadata)
            except (NotEmbeddings, pa.ArrowInvalid, FileNotFoundError) as error:
                raise JobError(f"{self.store.uri(uri)}: {str(error).splitlines()[0]}; embed again") from None

        with ThreadPoolExecutor(READERS) as pool:
            heads = list(pool.map(look, self.uris))
        first = heads[0]
        for uri, head in zip(self.uris, heads, strict=True):
            if not head.same_encoder(first):
                raise JobError(
                    f"{self.store.uri(uri)} is by {_name(head)}, others by {_name(first)}; embeddings of several "
                    "encoders do not mix"
                )
        return first


def caption_hash(caption: str) -> int:
    """64 bits of a caption; a caption is compared in full once it is read."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "big")


def _size(embedding: Embedding) -> int:
    return sum(array.nbytes for array in embedding)


def _name(head: EmbeddingsHead) -> str:
    length = "" if head.max_sequence_length is None else f", {head.max_sequence_length} tokens"
    return f"{head.encoder} @ {head.encoder_revision} ({head.pipeline}, {head.dtype}{length})"
