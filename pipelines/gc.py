"""Delete what no part names: files of attempts that died, or that came second. Nothing else deletes data files.

A file goes only when all of this holds, looked at in this order:

1. it is listed, under a name that we give;
2. every plan that has a shard of its number has that shard's part, which does not name it;
3. that part has stood there for `older_than_s`, by the store's own clock;
4. right before it goes, the file too is that old.

Why that is safe even when a run begins meanwhile, and whoever sleeps for how long: a run creates a part and never
changes it. From the moment that a shard's part stands, no other attempt of a run at that shard can be committed,
however late its requests land; so what the part does not name is named by nobody, for ever. A shard without a part is
left alone, whatever the age of its files: the same row gives the same bytes, and so the same name, and the next
attempt, or one that was asleep, may be about to name them. A plan that is added later has other keys, and so other
names; as files are listed before plans are read, no file of a plan that `gc` does not know is in the listing.

What age is for: `retry` and `repair` replace parts, and so may a run on a store whose create-if-absent is
check-then-put. The new part names files that were written before its request left, and rows of the part that it has
read. So all is spared as long as nobody takes longer than `older_than_s` from reading the old part, or writing the
first file, to the landing of the new part. What remains: a replacement that takes longer, and one that writes a file
anew, under the name of an old orphan, between the look at that file's age and the landing of its delete. A live run is
refused to keep both away.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipelines import heartbeat, manifest
from pipelines.errors import NotWhole, RunAlive
from pipelines.plans import read_plans
from pipelines.storage import ObjectStore, Store
from pipelines.uploads import give_up, unfinished_uploads

OLDER_THAN_S = 24 * 3600.0
_DATA = ("images", "data", "thumbnails", "intermediates")
_OUR_FOLDERS = (f"{manifest.FOLDER}/", "_ldm/")
_OURS = re.compile(rf"(?:{'|'.join(_DATA)})/(\d{{6,}})(?:/.+)?-[0-9a-f]{{12}}\.[a-z0-9]+", re.DOTALL)


@dataclass
class Garbage:
    """Files that no part names, and their bytes: `deleted` (or would be), too `young`, or of shards `not_done`.

    `uploads` were begun and never ended, and are given up (or would be).
    """

    output: str
    dry_run: bool
    num_deleted: int = 0
    num_bytes_deleted: int = 0
    num_young: int = 0
    num_bytes_young: int = 0
    num_not_done: int = 0
    num_bytes_not_done: int = 0
    num_uploads: int = 0
    num_bytes_uploads: int = 0

    def add(self, kind: str, num_bytes: int) -> None:
        setattr(self, f"num_{kind}", getattr(self, f"num_{kind}") + 1)
        setattr(self, f"num_bytes_{kind}", getattr(self, f"num_bytes_{kind}") + num_bytes)


def gc(
    output: str,
    storage_options: dict[str, Any] | None = None,
    older_than_s: float = OLDER_THAN_S,
    dry_run: bool = False,
) -> Garbage:
    """Delete files that no part names, and give up uploads that were never ended.

    Raises:
        RunAlive: a run works on the output; with who and where.
        NotWhole: no plan is there, or a part cannot be read, which then cannot say what it names.
        StorageError: the store refuses or does not answer.
    """
    store = Store(output, storage_options)
    if not read_plans(store):
        raise NotWhole(f"{output} holds no plan of ldm-batch; check the path")
    now_s = heartbeat.present_s(store)
    if alive := heartbeat.live_runs(store, now_s):
        raise RunAlive(f"{output}: {heartbeat.describe(alive[0])}; wait until it has ended, then run gc again")
    garbage = collect(store, now_s, older_than_s, dry_run)
    for kind, num_bytes in _sweep(store, store.leftovers(), now_s - older_than_s, dry_run):
        garbage.add(kind, num_bytes)
    for kind, num_bytes in _give_up(store, now_s - older_than_s, dry_run):
        garbage.add(kind, num_bytes)
    return garbage


def _give_up(store: Store, before_s: float, dry_run: bool) -> Iterator[tuple[str, int]]:
    # No part names what is not there yet: an upload that somebody still works on is sent again at worst.
    for upload in unfinished_uploads(store):
        if not (_OURS.fullmatch(upload.path) or upload.path.startswith(_OUR_FOLDERS)):
            continue
        old = upload.begun_s < before_s
        if old and not dry_run:
            give_up(store, upload)
        yield "uploads" if old else "young", upload.num_bytes


def collect(store: ObjectStore, now_s: float, older_than_s: float, dry_run: bool) -> Garbage:
    """Delete what no part names; `now_s` is the store's present or earlier."""
    # The order matters, see above: files, then plans, then parts.
    listed = {path: info for folder in _DATA for path, info in store.list(folder).items()}
    plans = read_plans(store)
    # A shard's number says nothing of its plan: each of several plans may have one of that number.
    parts: dict[int, list[str]] = {}
    for shard in (shard for plan in plans for shard in plan.shards):
        parts.setdefault(shard.index, []).append(manifest.part_path(shard.plan_id, shard.index))
    planned = {path for paths in parts.values() for path in paths}
    # What was moved about by hand may name files too.
    others = [name for name in store.list(manifest.FOLDER) if name.endswith(".parquet") and name not in planned]
    elsewhere = {text for path in others for text in _named(store, path) or ()}
    shards: dict[int, set[str]] = {}
    for path in listed.keys() - elsewhere:
        if match := _OURS.fullmatch(path):
            shards.setdefault(int(match[1]), set()).add(path)

    def sweep(index: int) -> list[tuple[str, int]]:
        unnamed = shards[index]
        for part in parts.get(index, ()):
            named = _named(store, part)
            if named is None:
                return [("not_done", listed[path].num_bytes) for path in unnamed]
            unnamed = unnamed - named
            # After reading it: one that was replaced in between is young.
            stands = store.info(part) if unnamed else None
            if stands is not None and stands.modified_s >= now_s - older_than_s:
                return [("young", listed[path].num_bytes) for path in unnamed]
        return _sweep(store, sorted(unnamed), now_s - older_than_s, dry_run)

    garbage = Garbage(store.url, dry_run)
    for found in store.each(sweep, sorted(shards)):
        for kind, num_bytes in found:
            garbage.add(kind, num_bytes)
    return garbage


def _sweep(store: ObjectStore, paths: Iterable[str], before_s: float, dry_run: bool) -> list[tuple[str, int]]:
    found = []
    for path in paths:
        info = store.info(path)
        if info is None:
            continue
        old = info.modified_s < before_s
        if old and not dry_run:
            store.delete(path)
        found.append(("deleted" if old else "young", info.num_bytes))
    return found


def _named(store: ObjectStore, path: str) -> set[str] | None:
    """All that a part names; None where it is not there."""
    part = store.read(path)
    if part is None:
        return None
    if manifest.read_head(part) is None:
        raise NotWhole(
            f"{store.uri(path)} is not a whole part, so nobody can say which files it names; move it away, run the job "
            "again, then gc"
        )
    return manifest.texts(part)
