"""Model references: builtin:NAME, a hub id at a revision, a local folder, s3://… — and how each reaches a node.

`identify` says on the driver which exact weights are meant (that goes into every row's key); `fetch` brings them to a
local folder, once per node however many workers ask.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ldm_ops.builtin
from ldm_ops.describe import ModelFacts, NotAModel, describe
from pipelines.errors import JobError, StorageError
from pipelines.storage import Store

BUILTIN = Path(ldm_ops.builtin.__file__).parent
WANTED = ("*.json", "*.safetensors", "*.txt", "*.model")
ALONE = "diffusion_pytorch_model"
"""How weights at the top are called: those of an autoencoder that is a model of its own."""

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
Found = TypeVar("Found")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")


@dataclass(frozen=True)
class Weights:
    """One set of weights. `revision` is exact: a commit, or a digest of the files. `num_bytes` is 0 where unknown.

    Where `parts` are named, only folders whose names begin so are weighed and fetched.
    """

    name: str
    revision: str
    kind: str
    location: str
    variant: str | None = None
    num_bytes: int = 0
    parts: tuple[str, ...] = ()
    storage_options: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)


def builtin_names() -> list[str]:
    return sorted(p.parent.name for p in BUILTIN.glob("*/model_index.json"))


def identify(
    model: str,
    revision: str | None,
    variant: str | None = None,
    storage_options: dict[str, Any] | None = None,
    parts: tuple[str, ...] = (),
) -> tuple[Weights, ModelFacts]:
    """Find out which exact weights `model` names and what they are, without loading them.

    Raises:
        JobError: no such model, no revision for a hub id, or a folder that may not be loaded.
    """
    try:
        return find(model, revision, variant, storage_options, describe, parts)
    except NotAModel as error:
        raise JobError(f"model {model}: {error}") from None


def find(
    model: str,
    revision: str | None,
    variant: str | None,
    storage_options: dict[str, Any] | None,
    look: Callable[[Path], Found],
    parts: tuple[str, ...] = (),
) -> tuple[Weights, Found]:
    """The exact weights that `model` names, and what `look` finds in a folder with their JSON files.

    The weights in that folder may be empty files that stand for what has still to be fetched.

    Raises:
        JobError: no such model, or no revision for a hub id.
    """
    try:
        if model.startswith("builtin:"):
            name = model.removeprefix("builtin:")
            folder = BUILTIN / name
            if revision or variant:
                raise JobError(f"model {model}: a built-in model has no revision and no variant; leave them out")
            if name not in builtin_names():
                raise JobError(f"model {model}: no such built-in model; one of {', '.join(builtin_names())}")
            found = look(folder)
            return _local(model, folder, None, parts), found
        folder = Path(model).expanduser()
        if revision and ("://" in model or folder.is_dir()):
            where = "a URL" if "://" in model else "a folder here"
            raise JobError(f"model {model}: this is {where}, and only a hub model has revisions; leave `revision` out")
        if "://" in model:
            return _find_url(model, variant, storage_options or {}, look, parts)
        if folder.is_dir():
            # Before the digest: what is no model may be large.
            found = look(folder)
            if variant and not any(folder.rglob(f"*.{variant}*.safetensors")):
                raise JobError(f"model {model}: no weights of variant {variant} in {folder}; leave `variant` out")
            return _local(model, folder.resolve(), variant, parts), found
        if not HUB_ID.match(model) or model.startswith("."):
            raise JobError(
                f"model {model}: no such folder; give builtin:NAME, org/name with revision, a folder or s3://…"
            )
        return _find_hub(model, revision, variant, look, parts)
    except OSError as error:
        raise JobError(f"model {model}: {error.filename} cannot be read ({error.strerror})") from None


def _local(model: str, folder: Path, variant: str | None, parts: tuple[str, ...]) -> Weights:
    size = weights_bytes(folder, parts)
    return Weights(model, digest_folder(folder), "folder", str(folder), variant, size, parts)


def weights_bytes(folder: Path, parts: tuple[str, ...] = ()) -> int:
    """Size of the safetensors under a folder; 0 where that is not known yet."""
    files = (path for path in folder.rglob("*.safetensors") if _is_of(path.relative_to(folder).as_posix(), parts))
    return sum(path.stat().st_size for path in files)


def _is_of(path: str, parts: tuple[str, ...]) -> bool:
    """Whether weights belong to one of the parts, or are those of an autoencoder that is a model of its own."""
    return not parts or path.startswith((*parts, ALONE))


def digest_folder(folder: Path) -> str:
    """sha256 over names and contents of all that could be loaded, as 16 hex digits."""
    total = hashlib.sha256()
    for path in sorted(p for pattern in WANTED for p in folder.rglob(pattern)):
        with path.open("rb") as file:
            total.update(f"{path.relative_to(folder).as_posix()} ".encode())
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def cache_folder() -> Path:
    """Where weights from object storage are kept on a node: $LDM_CACHE, or ~/.cache/ldm-batch."""
    return Path(os.environ.get("LDM_CACHE") or Path.home() / ".cache" / "ldm-batch") / "models"


def fetch(weights: Weights) -> Path:
    """The local folder with `weights`, downloaded first where needed. Safe to call from many processes at once.

    Raises:
        StorageError: the hub or the store does not give them.
    """
    if weights.kind == "folder":
        if not Path(weights.location).is_dir():
            raise StorageError(f"model {weights.name}: {weights.location} is not on this node; use s3://… or a hub id")
        return Path(weights.location)
    if weights.kind == "hub":
        patterns = _hub_patterns(weights.variant, weights.parts)
        return _hub_folder(weights.location, weights.revision, weights.variant, patterns)
    target = cache_folder() / weights.revision
    if weights.parts and not target.is_dir():
        target = target.with_name(f"{weights.revision}.{'+'.join(weights.parts)}")
    with one_at_a_time(target):
        if not target.is_dir():
            _download(weights, target, WANTED)
    return target


def _download(weights: Weights, target: Path, patterns: tuple[str, ...]) -> None:
    store = Store(weights.location, weights.storage_options, reached=True)
    partial = target.with_name(f"{target.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        for path in store.list(""):
            left_out = path.endswith(".safetensors") and not _is_of(path, weights.parts)
            if not left_out and any(Path(path).match(pattern) for pattern in patterns):
                (partial / path).parent.mkdir(parents=True, exist_ok=True)
                store.patiently(functools.partial(store.filesystem.get_file, store.uri(path), str(partial / path)))
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _find_url(
    model: str,
    variant: str | None,
    storage_options: dict[str, Any],
    look: Callable[[Path], Found],
    parts: tuple[str, ...],
) -> tuple[Weights, Found]:
    store = Store(model, storage_options)
    listing = store.filesystem.find(model, detail=True) if store.list("") else {}
    if not listing:
        raise JobError(f"model {model}: nothing there; give the folder that holds model_index.json")
    total = hashlib.sha256()
    for name in sorted(listing):
        info = listing[name]
        mark = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("mtime")
        total.update(f"{name} {info['size']} {mark}\n".encode())
    root = f"{store.filesystem._strip_protocol(model).rstrip('/')}/"
    size = sum(
        int(info["size"])
        for name, info in listing.items()
        if name.endswith(".safetensors") and _is_of(name.removeprefix(root), parts)
    )
    weights = Weights(model, total.hexdigest()[:16], "url", model.rstrip("/"), variant, size, parts, storage_options)
    folder = cache_folder() / weights.revision
    if folder.is_dir():
        return weights, look(folder)
    # The driver needs the JSON files only; the nodes that compute fetch the weights.
    facts = cache_folder() / f"{weights.revision}.facts"
    with one_at_a_time(facts):
        if not facts.is_dir():
            _download(weights, facts, ("*.json",))
            for path in store.list(""):
                if not path.endswith(".json"):
                    (facts / path).parent.mkdir(parents=True, exist_ok=True)
                    (facts / path).touch()
    return weights, look(facts)


def _find_hub(
    model: str, revision: str | None, variant: str | None, look: Callable[[Path], Found], parts: tuple[str, ...]
) -> tuple[Weights, Found]:
    commit = commit_of(model, revision)
    folder = _hub_folder(model, commit, variant, ["*.json"])
    commit = folder.name if _COMMIT.match(folder.name) else commit
    patterns = _hub_patterns(variant, parts)
    whole = _hub_folder(model, commit, variant, patterns, offline=True) if _is_cached(folder, parts) else None
    found = look(whole or _with_names(model, commit, folder))
    return Weights(model, commit, "hub", model, variant, weights_bytes(whole, parts) if whole else 0, parts), found


def commit_of(model: str, revision: str | None) -> str:
    """The commit that `revision` of a hub model means; offline it is taken as it is.

    Raises:
        JobError: no revision, or none that the hub knows.
    """
    if revision is None:
        raise JobError(
            f"model {model}: a hub model needs `revision:` (a commit, or a tag), so that the same job means the same "
            "weights next year; if a local folder was meant, it is not there"
        )
    from huggingface_hub import HfApi, constants

    if _COMMIT.match(revision) or constants.HF_HUB_OFFLINE:
        return revision
    try:
        return str(HfApi().model_info(model, revision=revision).sha)
    except Exception as error:  # noqa: BLE001 - the hub's client lets its HTTP library's exceptions through
        raise JobError(hub_problem(model, revision, error)) from None


def _is_cached(folder: Path, parts: tuple[str, ...]) -> bool:
    """Whether weights are there for every part: a job before this one may have needed some of them only."""
    index = folder / "model_index.json"
    named: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        named = json.loads(index.read_text(encoding="utf-8"))
    homes = [folder / name for name in named if _is_of(name, parts) and (folder / name / "config.json").exists()]
    return all(any(home.glob("*.safetensors")) for home in homes or [folder])


def _with_names(model: str, commit: str, folder: Path) -> Path:
    """A folder with the repository's JSON files and empty stand-ins for the rest, so that `describe` can look."""
    from huggingface_hub import HfApi

    facts = cache_folder() / f"{commit}.facts"
    with one_at_a_time(facts):
        if not facts.is_dir():
            partial = facts.with_name(f"{facts.name}.partial-{uuid.uuid4().hex[:8]}")
            shutil.copytree(folder, partial)
            try:
                names = HfApi().list_repo_files(model, revision=commit)
            except Exception as error:  # noqa: BLE001 - as above
                raise JobError(hub_problem(model, commit, error)) from None
            for name in names:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).touch()
            partial.rename(facts)
    return facts


def _hub_folder(model: str, revision: str, variant: str | None, wanted: list[str], offline: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=wanted,
                # Other variants of the same weights (model.fp16.safetensors) double the download.
                ignore_patterns=None if variant else "*/*.*.safetensors",
                local_files_only=offline,
            )
        )
    except Exception as error:  # noqa: BLE001 - the hub's client lets its HTTP library's exceptions through
        raise JobError(hub_problem(model, revision, error)) from None


def _hub_patterns(variant: str | None, parts: tuple[str, ...]) -> list[str]:
    """What a pipeline needs of a repository; a checkpoint in one file at the top is something else."""
    files = [f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"] if variant else ["*.safetensors"]
    weights = [f"{part}*/{file}" for part in parts or ("",) for file in files]
    return ["*.json", "*.txt", "*.model", *weights, f"{ALONE}*.safetensors"]


def hub_problem(model: str, revision: str, error: BaseException) -> str:
    first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return (
        f"model {model}@{revision}: not to be had ({first}); check the id, the revision, HF_TOKEN for gated models, "
        "and with HF_HUB_OFFLINE=1 that HF_HOME holds it"
    )


@contextmanager
def one_at_a_time(target: Path) -> Iterator[None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
