"""Protocols that look right and are not. The simulation has to find each of them wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pipelines import manifest
from pipelines.errors import NotWhole
from pipelines.plans import Plan, read_plans
from pipelines.shards import Shard
from pipelines.storage import Exists
from tests.faults.simulation import OURS, Protocol

Files = list[tuple[str, bytes]]


def overwrite(store: Any, files: Files, path: str, part: Callable[[], bytes], *_: Any) -> str:
    """Fixed names: the last one to write is right."""
    for file in files:
        store.write(*file)
    store.write(path, part())
    return "mine"


def rename(store: Any, files: Files, path: str, part: Callable[[], bytes], attempt: str, *_: Any) -> str:
    """A pending mark that tells what is under way, the data, then the rename that makes it count."""
    final = path.replace(".parquet", f"-{attempt}.parquet")
    store.write(f"{final}.pending", part())
    for file in files:
        store.write(*file)
    store.write(final, part())
    store.delete(f"{final}.pending")
    return "mine"


def clean_pending(store: Any) -> None:
    """What a run that begins makes of the marks of runs that died."""
    for name in store.list(manifest.FOLDER):
        if name.endswith(".pending") and (part := store.read(name)) is not None:
            for file in manifest.texts(part):
                if file.startswith("images/"):
                    store.delete(file)
            store.delete(name.removesuffix(".pending"))
            store.delete(name)


def without_renamed(store: Any, plan: Plan) -> list[Shard]:
    there = store.list(f"{manifest.FOLDER}/{plan.plan_id}")
    done = {int(name.rpartition("/")[2][:6]) for name in there if name.endswith(".parquet")}
    return [shard for shard in plan.shards if shard.index not in done]


def all_renamed(store: Any) -> None:
    plans = read_plans(store)
    if any(without_renamed(store, plan) for plan in plans):
        raise NotWhole("not all is there")
    store.write("_SUCCESS", json.dumps({"num_ok": sum(plan.num_rows for plan in plans)}).encode())


def trust_the_answer(store: Any, files: Files, path: str, part: Callable[[], bytes], *_: Any) -> str:
    """412 means that another attempt won: delete my files."""
    for file in files:
        store.write(*file)
    try:
        store.create(path, part())
    except (Exists, OSError):
        for name, _ in files:
            store.delete(name)
        return "theirs"
    return "mine"


def collect_by_age_alone(store: Any, now_s: float, older_than_s: float, dry_run: bool) -> Any:
    """Whatever is old and no part names, of shards that are not done too."""
    parts = [store.read(name) for name in manifest.part_names(store)]
    named = {text for part in parts if part for text in manifest.texts(part)}
    for name, info in store.list("images").items():
        if name not in named and info.modified_s < now_s - older_than_s:
            store.delete(name)

    class Nothing:
        num_deleted = 0

    return Nothing


PROTOCOLS = {
    "ours": OURS,
    "fixed names, overwritten": Protocol(name=lambda stem, attempt, data: f"{stem}.png", commit=overwrite),
    "pending, then renamed": Protocol(
        name=lambda stem, attempt, data: f"{stem}-{attempt}.png",
        commit=rename,
        begin=clean_pending,
        unfinished=without_renamed,
        count=all_renamed,
    ),
    "412 means another won": Protocol(commit=trust_the_answer),
    "gc of anything old": Protocol(collect=collect_by_age_alone),
    "gc of young files": Protocol(older_than_s=0.0),
}
