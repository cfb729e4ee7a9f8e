"""Ctrl-C and SIGTERM: finish what is in flight, begin nothing new."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipelines import heartbeat
from pipelines.errors import EXIT_INTERRUPTED, EXIT_TERMINATED
from pipelines.storage import Store


@contextmanager
def stop_on_signals(store: Store, run_id: str, on_stop: Callable[[], None] | None) -> Iterator[list[int]]:
    """First Ctrl-C or SIGTERM: shards in flight are finished, no others begun. Second: out at once.

    Yields a list that holds the exit code once a stop was asked.
    """
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def on_signal(number: int, frame: Any) -> None:
        if stopped:
            os._exit(stopped[0])
        stopped.append(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_TERMINATED)
        if on_stop:
            on_stop()
        # Not in the handler: a store's client must not be entered twice by one thread.
        threading.Thread(target=lambda: heartbeat.ask_to_stop(Store(store.url, store.storage_options), run_id)).start()

    before: dict[int, Callable[..., Any] | int | None] = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
