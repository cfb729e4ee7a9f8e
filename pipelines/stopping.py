"""Ctrl-C and SIGTERM: finish what is in flight, begin nothing new."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pipelines import heartbeat
from pipelines.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, LdmError
from pipelines.storage import Store

LAST_WORD_S = 2.0


@contextmanager
def stop_on_signals(
    store: Store, run_id: str, on_stop: Callable[[], None] | None, grace_s: float | None = None
) -> Iterator[list[int]]:
    """First Ctrl-C or SIGTERM: shards in flight are finished, no others begun. Second, or `grace_s` later: out at once.

    Yields a list that holds the exit code once a stop was asked. From then on the process is on its way out, and a
    further signal ends it also after this.
    """
    stopped: list[int] = []
    over = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def ask_and_wait() -> None:
        other = Store(store.url, store.storage_options)
        asking = threading.Thread(target=heartbeat.ask_to_stop, args=(other, run_id), daemon=True)
        asking.start()
        if grace_s is not None and not over.wait(grace_s):
            # So that the next run need not wait until this one has been silent for long enough.
            says = {"error": f"stopped by a signal; what was not done after {grace_s:g} s was abandoned"}
            last = threading.Thread(target=_say, args=(Store(store.url, store.storage_options), run_id, says))
            last.daemon = True
            last.start()
            last.join(LAST_WORD_S)
            os._exit(stopped[0])

    def on_signal(number: int, frame: Any) -> None:
        if stopped:
            os._exit(stopped[0])
        stopped.append(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_TERMINATED)
        if on_stop:
            on_stop()
        # Not in the handler: a store's client must not be entered twice by one thread.
        threading.Thread(target=ask_and_wait, daemon=True).start()

    before: dict[int, Callable[..., Any] | int | None] = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stopped
    finally:
        over.set()
        if not stopped:
            for number, handler in before.items():
                signal.signal(number, handler)


def _say(store: Store, run_id: str, words: dict[str, Any]) -> None:
    with suppress(LdmError):
        heartbeat.end(store, run_id, words)
