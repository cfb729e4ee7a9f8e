"""Files of one output, opened when they are asked for; a few of them stay open."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq

from pipelines.storage import Store

MAX_OPEN = 64


class OpenFiles:
    """Open files by their path below the store, as `open_file` opens them.

    Picklable and safe to use after a fork: each process opens its own.
    """

    def __init__(self, store: Store, open_file: Callable[[Store, str], Any]) -> None:
        self.store = store
        self.open_file = open_file
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_process": 0}

    def __getitem__(self, uri: str) -> Any:
        if self._process != os.getpid():
            # A connection that was opened in another process would not survive the fork.
            self._process = os.getpid()
            self._open = OrderedDict()
            self.store = Store(self.store.url, self.store.storage_options, self.store.reached)
        if uri in self._open:
            self._open.move_to_end(uri)
        else:
            self._open[uri] = self.open_file(self.store, uri)
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)[1].close()
        return self._open[uri]


def open_parquet(store: Store, uri: str) -> pq.ParquetFile:
    """One Parquet file of the store."""
    if store.local is not None:
        # Not mapped: its pages would count as this process's memory for as long as it is open.
        return pq.ParquetFile(store.local / uri)
    return pq.ParquetFile(store.filesystem.open(store.uri(uri), "rb"), pre_buffer=True)
