"""One-object commit: a shard is done when its part exists.

The rules (see `commit`): an answer is not the truth, so anything but a clear success is read back; safety rests on
no lease, clock or atomicity of the store; nothing is deleted here (`gc` alone does). Data files are written before,
under names that follow from their content, so the part never names what may change.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterable
from itertools import count
from typing import Literal

from pipelines.errors import NotWhole, StorageError
from pipelines.storage import PATIENCE_S, WAIT_S, Exists, ObjectStore

Outcome = Literal["mine", "theirs"]


def content_name(stem: str, data: bytes, extension: str) -> tuple[str, str]:
    """The path of a data file and its sha256."""
    # Other content, other name: nothing that a part names can ever change under it.
    sha256 = hashlib.sha256(data).hexdigest()
    return f"{stem}-{sha256[:12]}.{extension}", sha256


def commit_shard(
    store: ObjectStore,
    files: Iterable[tuple[str, bytes]],
    path: str,
    part: Callable[[], bytes],
    attempt: str,
    attempt_of: Callable[[bytes], str | None],
    sleep: Callable[[float], None] = time.sleep,
    again: bool = False,
) -> Outcome:
    """Put a shard's files, path and content, under content names; then `commit` the part that names them.

    `part` is asked for once all files are there, so that `files` may make one while others are under way.
    `again` replaces the part that stands, as `retry` and `repair` do.
    """
    # Again where they lie already: an orphan of that name may be old, and `gc` goes by the time of the last write.
    store.write_each(files)
    content = part()
    if again:
        # In one request: whoever reads finds the old part or this one, and each holds every row once.
        store.write(path, content)
    return commit(store, path, content, attempt, attempt_of, sleep)


def commit(
    store: ObjectStore,
    path: str,
    part: bytes,
    attempt: str,
    attempt_of: Callable[[bytes], str | None],
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome:
    """Make `part` the one part at `path`, or find out that another attempt was first.

    `attempt_of` reads the attempt's id out of a part, None where the bytes are not a part. Returns "mine" where
    the part at `path` is ours, whatever the store answered, and "theirs" where another valid one stands there:
    its files are whole, ours stay for `gc`.

    Raises:
        NotWhole: something that is no part stands at `path`.
        StorageError: the store refuses, or takes none of all tries.
    """
    # Time that was waited, not the clock's: what the tries themselves took is the store's own patience.
    waited_s = 0.0
    for n in count():
        try:
            store.create(path, part)
        except (Exists, OSError) as error:
            last: Exception = error
        else:
            return "mine"
        standing = store.read(path)
        if standing is not None:
            owner = attempt_of(standing)
            if owner is None:
                raise NotWhole(f"{path} is not a part of this plan (cut off or foreign); move it away and run again")
            return "mine" if owner == attempt else "theirs"
        if waited_s > PATIENCE_S:
            raise StorageError(f"{path}: could not be committed in {n + 1} tries ({last}); run the same command again")
        wait_s = random.uniform(0, min(WAIT_S, 0.2 * 2**n))
        waited_s += wait_s
        sleep(wait_s)
    raise AssertionError("count() has no end")
