"""Weights that go beside a stage's model: which files exactly, whether they fit, and how they reach a node.

`identify_adapters` says on the driver what is meant; a row's own LoRAs are read by `LoraReader` and fetched, on the
node that needs them, by `LoraShelf`.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ldm_ops.adapter_files import (
    Unfit,
    check_controlnet,
    check_embedding,
    check_lora,
    check_vae,
    control_multiple,
    is_t2i_adapter,
    read_shapes,
    refuse_pickle,
)
from ldm_ops.adapters import Adapters, Loras
from ldm_ops.describe import PICKLED, ModelFacts
from ldm_ops.op import RowRefused
from pipelines.cells import Wrong
from pipelines.errors import JobError, StorageError
from pipelines.references import BadReference, locate, split
from pipelines.stages import Adapted, AnyStage, FileReference
from pipelines.storage import Store, is_local
from pipelines.weights import HUB_ID, Weights, cache_folder, commit_of, fetch, find, hub_problem, one_at_a_time

AND = " + "
"""Between the LoRAs of a row that has several."""

NONE = "none"
ADAPTERS = ".adapters."
"""In the names of a plan's settings that tell which adapters it was made for."""

MAX_LORAS = 8
_TOKEN = re.compile(r"^\S{1,200}$")


@dataclass(frozen=True)
class AdapterFile:
    """One file of weights. `location` is an absolute path, a URL, or org/name@commit/file of a hub."""

    model: str
    sha256: str
    location: str
    scale: float = 1.0
    storage_options: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)


@dataclass(frozen=True)
class StageAdapters:
    """All adapters of one stage. `lora` is what rows have that say nothing, `lora_revision` the content of it;
    `size_multiple` is in px, of height and width."""

    vae: Weights | None = None
    controlnet: Weights | None = None
    textual_inversion: tuple[tuple[str, AdapterFile], ...] = ()
    loras: dict[str, AdapterFile] = field(default_factory=dict)
    lora: str | None = None
    lora_revision: str | None = None
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    size_multiple: int = 1

    @property
    def num_bytes(self) -> int:
        """What a worker holds beside its model; 0 where that is unknown."""
        return self.controlnet.num_bytes if self.controlnet is not None else 0

    def identity(self) -> dict[str, Any]:
        """What all pictures of the stage depend on; nothing of what is not used."""
        own = {
            "vae_revision": self.vae.revision if self.vae else None,
            "controlnet_revision": self.controlnet.revision if self.controlnet else None,
            "textual_inversion": [[token, file.sha256] for token, file in self.textual_inversion],
        }
        return {name: value for name, value in own.items() if value}

    def settings(self) -> dict[str, Any]:
        """`identity`, and what rows may choose from."""
        loras = {f"loras.{name}": [file.sha256, file.scale] for name, file in self.loras.items()}
        default = {"lora": self.lora_revision} if self.lora_revision else {}
        return {**self.identity(), **loras, **default}

    def effective(self, lora: str | None, revision: str | None, scale: float | None) -> list[tuple[str, float]]:
        """(content, scale) of each LoRA that `lora` names."""
        if lora is None or revision is None:
            return []
        contents = revision.split(AND)
        factor = 1.0 if scale is None else scale
        scales = [self.loras[name].scale if name in self.loras else 1.0 for name in lora.split(AND)]
        return [(content, own * factor) for content, own in zip(contents, scales, strict=True)]

    def listed(self) -> Iterator[tuple[str, str, str]]:
        """(kind, name, exact revision) of what the job names."""
        for kind, weights in (("vae", self.vae), ("controlnet", self.controlnet)):
            if weights is not None:
                yield kind, weights.name, weights.revision
        for token, file in self.textual_inversion:
            yield "textual_inversion", f"{token} {file.model}", file.sha256[:16]
        for name, file in self.loras.items():
            yield "lora", f"{name} {file.model}", file.sha256[:16]

    def records(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What a row was made with, as the manifest lists it."""
        found: list[dict[str, Any]] = []
        for kind, weights in (("vae", self.vae), ("controlnet", self.controlnet)):
            if weights is not None:
                scale = row["controlnet_conditioning_scale"] if kind == "controlnet" else None
                found.append({"kind": kind, "name": weights.name, "revision": weights.revision, "scale": scale})
        for token, file in self.textual_inversion:
            found.append({"kind": "textual_inversion", "name": token, "revision": file.sha256})
        names = row["lora"].split(AND) if row["lora"] is not None else []
        for name, (content, scale) in zip(
            names, self.effective(row["lora"], row["lora_revision"], row["lora_scale"]), strict=True
        ):
            model = self.loras[name].model if name in self.loras else name
            found.append({"kind": "lora", "name": model, "revision": content, "scale": scale})
        return found

    def fetch(self) -> Adapters:
        """All but the LoRAs, on this node.

        Raises:
            StorageError: the hub or the store does not give them, or gives others by now.
        """

        def folder(weights: Weights | None) -> tuple[Path, str | None] | None:
            return None if weights is None else (fetch(weights), weights.variant)

        try:
            tokens = tuple((token, fetch_file(file)) for token, file in self.textual_inversion)
        except Unfit as error:
            raise StorageError(str(error)) from None
        return Adapters(folder(self.vae), folder(self.controlnet), tokens)


def identify_adapters(i: int, stage: AnyStage, facts: ModelFacts, storage_options: dict[str, Any]) -> StageAdapters:
    """Find out which exact adapters `stages.{i}` names and that they fit its model, without loading them.

    Raises:
        JobError: one that is not there, may not be loaded, or does not fit.
    """
    if not isinstance(stage, Adapted):
        return StageAdapters()
    model = Path(facts.folder)
    field_name = ""
    try:
        folders: dict[str, Weights] = {}
        multiple = 1

        def control(folder: Path) -> int:
            check_controlnet(folder, model, stage.op)
            if is_t2i_adapter(folder) and stage.save_intermediates is not None:
                raise Unfit("is a T2IAdapter, whose pipelines show no step; leave save_intermediates out")
            return control_multiple(folder)

        def vae(folder: Path) -> int:
            check_vae(folder, model)
            return 1

        for field_name, reference, look in (("vae", stage.vae, vae), ("controlnet", stage.controlnet, control)):
            if reference is not None:
                parts = ("vae",) if field_name == "vae" else ()
                folders[field_name], multiple = find(
                    reference.model, reference.revision, reference.variant, storage_options, look, parts
                )
        embeddings: list[tuple[str, AdapterFile]] = []
        for n, embedding in enumerate(stage.textual_inversion):
            field_name = f"textual_inversion.{n}"
            file, path = find_file(embedding, "learned_embeds.safetensors", storage_options)
            token = check_embedding(read_shapes(path), model, path.stem, embedding.token)
            if not _TOKEN.match(token) or token in dict(embeddings):
                raise Unfit(f"its token is {token!r}; each needs one of its own, without spaces: give it with token:")
            embeddings.append((token, file))
        loras: dict[str, AdapterFile] = {}
        for name, lora in stage.loras.items():
            field_name = f"loras.{name}"
            _refuse_without_peft()
            file, path = find_file(lora, "pytorch_lora_weights.safetensors", storage_options)
            check_lora(read_shapes(path), model)
            loras[name] = AdapterFile(file.model, file.sha256, file.location, lora.scale, storage_options)
        field_name = "lora"
        found = StageAdapters(
            folders.get("vae"),
            folders.get("controlnet"),
            tuple(embeddings),
            loras,
            storage_options=storage_options,
            size_multiple=multiple,
        )
        reader = LoraReader(found, model)
        default = reader.read("", stage.lora) if stage.lora is not None else None
        return replace(found, lora=default, lora_revision=reader.revision(default))
    except (Unfit, Wrong) as error:
        reference_text = _said(stage, field_name)
        raise JobError(f"stages.{i}.{field_name}: {reference_text}{error}") from None
    except JobError as error:
        raise JobError(f"stages.{i}.{field_name}: {error}") from None


def adapter_settings(adapters: Sequence[StageAdapters]) -> dict[str, Any]:
    """Of all stages, as a plan keeps them: {"stages.0.adapters.loras.ink": [sha256, scale], …}."""
    return {
        f"stages.{i}{ADAPTERS}{name}": value for i, one in enumerate(adapters) for name, value in one.settings().items()
    }


def _said(stage: Adapted, field_name: str) -> str:
    name, _, which = field_name.partition(".")
    value = getattr(stage, name)
    if isinstance(value, dict):
        value = value[which]
    elif isinstance(value, list):
        value = value[int(which)]
    return f"{value.model} " if hasattr(value, "model") else ""


def _refuse_without_peft() -> None:
    if find_spec("peft") is None:
        raise Wrong("LoRA needs the package peft: pip install 'ldm-batch[lora]'")


class LoraReader:
    """From what a row or job says to LoRA files that are there and fit; each is looked at once."""

    def __init__(self, adapters: StageAdapters, model: Path) -> None:
        self.adapters = adapters
        self.model = model
        self.contents: dict[str, str | Wrong] = {}

    def read(self, base: str, value: Any) -> str | None:
        """`value` with files in full, relative ones below `base`; None for `none`.

        Raises:
            Wrong: no such LoRA, or one that does not fit the model.
        """
        if not isinstance(value, str):
            raise Wrong(f"lora is a {type(value).__name__}; expected a name or a file")
        if value.strip() == NONE:
            return None
        parts = [self._part(base, part.strip()) for part in value.split(AND)]
        if len(parts) > MAX_LORAS or len(set(parts)) < len(parts):
            raise Wrong(f"lora {value[:80]!r}: at most {MAX_LORAS}, each once")
        _refuse_without_peft()
        return AND.join(parts)

    def revision(self, lora: str | None) -> str | None:
        """The content of each LoRA that `read` gave, as sha256."""
        if lora is None:
            return None
        return AND.join(
            self.adapters.loras[part].sha256 if part in self.adapters.loras else self._content(part)
            for part in lora.split(AND)
        )

    def _part(self, base: str, part: str) -> str:
        if part in self.adapters.loras:
            return part
        named = ", ".join(self.adapters.loras) or "none are named"
        if "/" not in part and not Path(part).suffix:
            raise Wrong(
                f"lora {part[:80]!r} is no name under loras ({named}) and no file; several are written 'a{AND}b', "
                f"and {NONE!r} is without"
            )
        try:
            refuse_pickle(part)
            where = locate(base, part)
        except (Unfit, BadReference) as error:
            raise Wrong(f"lora {part[:200]!r} {str(error).removeprefix(f'{part} ')}") from None
        if AND in where:
            raise Wrong(f"lora {where[:200]!r} holds {AND!r}, which stands between LoRAs; rename it")
        self._content(where)
        return where

    def _content(self, where: str) -> str:
        if where not in self.contents:
            try:
                path = _local_copy(where, self.adapters.storage_options)
                check_lora(read_shapes(path), self.model)
                self.contents[where] = file_digest(path)
            except Unfit as error:
                self.contents[where] = Wrong(f"lora {where[:200]!r} {error}")
        found = self.contents[where]
        if isinstance(found, Wrong):
            raise found
        return found


class LoraShelf:
    """From a planned row's LoRAs to files on this node."""

    def __init__(self, adapters: StageAdapters) -> None:
        self.adapters = adapters

    def take(self, lora: str | None, revision: str | None, scale: float | None) -> Loras:
        """Files and scales, in the row's order.

        Raises:
            RowRefused: the row's own file is gone, or another by now.
            StorageError: one of the job's is, or a store does not answer.
        """
        names = lora.split(AND) if lora is not None else []
        return tuple(
            (self._fetch(name, content), weight)
            for name, (content, weight) in zip(names, self.adapters.effective(lora, revision, scale), strict=True)
        )

    def _fetch(self, name: str, content: str) -> Path:
        named = self.adapters.loras.get(name)
        try:
            return fetch_file(named or AdapterFile(name, content, name, storage_options=self.adapters.storage_options))
        except Unfit as error:
            if named is None:
                raise RowRefused("lora.changed", str(error)) from None
            raise StorageError(str(error)) from None


def find_file(reference: FileReference, default_name: str, storage_options: dict[str, Any]) -> tuple[AdapterFile, Path]:
    """The one file that `reference` names, and where it lies on this machine, downloaded first where needed.

    Raises:
        JobError: the hub does not give it.
        Unfit: there is none, or it is pickled.
    """
    model = reference.model
    one_file = Path(model).suffix in (".safetensors", *PICKLED)
    local = Path(model.removeprefix("file://")).expanduser() if is_local(model) else None
    if local is not None and not local.exists() and HUB_ID.match(model) and not one_file:
        return _find_on_hub(model, reference.revision, reference.weight_name or default_name, storage_options)
    if reference.revision is not None:
        raise Unfit("is no hub id; leave revision out")
    if local is not None and local.is_dir():
        alone = sorted(local.glob("*.safetensors"))
        name = alone[0].name if len(alone) == 1 else default_name
        where = str((local / (reference.weight_name or name)).absolute())
    elif reference.weight_name is not None and (local is not None or one_file):
        raise Unfit("is no folder; leave weight_name out")
    elif local is not None:
        where = str(local.absolute())
    else:
        where = model if one_file else f"{model.rstrip('/')}/{reference.weight_name or default_name}"
    refuse_pickle(where)
    try:
        where = locate("", where)
    except BadReference as error:
        raise Unfit(str(error)) from None
    path = _local_copy(where, storage_options)
    return AdapterFile(model, file_digest(path), where, storage_options=storage_options), path


def _find_on_hub(
    model: str, revision: str | None, name: str, storage_options: dict[str, Any]
) -> tuple[AdapterFile, Path]:
    refuse_pickle(name)
    commit = commit_of(model, revision)
    path = _hub_file(model, commit, name)
    location = f"{model}@{commit}/{name}"
    return AdapterFile(model, file_digest(path), location, storage_options=storage_options), path


def fetch_file(file: AdapterFile) -> Path:
    """The file on this node, with the content that was planned. Safe to call from many processes at once.

    Raises:
        Unfit: it is gone, or another by now.
        StorageError: the hub or the store does not answer.
    """
    repository, at, rest = file.location.partition("@")
    try:
        if at and HUB_ID.match(repository):
            commit, _, name = rest.partition("/")
            path = _hub_file(repository, commit, name)
        elif is_local(file.location):
            path = Path(file.location.removeprefix("file://"))
            if not path.is_file():
                raise Unfit(f"{file.location} is not on this node; put it back, or use s3://… or a hub id")
        else:
            path = _cached(file.sha256)
            if not path.exists():
                path = _local_copy(file.location, file.storage_options)
    except JobError as error:
        raise StorageError(str(error)) from None
    if file_digest(path) != file.sha256:
        raise Unfit(f"{file.location} is another file than when the plan was made; put it back, or plan again")
    return path


def file_digest(path: Path) -> str:
    """sha256 of a file, read once as long as it does not change."""
    state = path.stat()
    return _digest(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4096)
def _digest(path: Path, modified_ns: int, num_bytes: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hub_file(model: str, commit: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, name, revision=commit))
    except Exception as error:  # noqa: BLE001 - the hub's client lets its HTTP library's exceptions through
        raise JobError(hub_problem(f"{model}/{name}", commit, error)) from None


def _cached(sha256: str) -> Path:
    return cache_folder() / "files" / f"{sha256}.safetensors"


def _local_copy(where: str, storage_options: dict[str, Any]) -> Path:
    """The file itself where it is local, else a copy in the cache.

    Raises:
        Unfit: there is none.
    """
    if is_local(where):
        path = Path(where.removeprefix("file://"))
        if not path.is_file():
            raise Unfit(f"is not there; looked for {path}")
        return path
    root, name = split(where)
    store = Store(root, storage_options)
    mark = store.version(name)
    if mark is None:
        raise Unfit(f"is not there; looked for {where}")
    # What a store's mark says was there when it was last read: a plan must not download everything again.
    note = _cached("").with_name(f"{hashlib.sha256(f'{where} {mark}'.encode()).hexdigest()}.sha256")
    with one_at_a_time(note):
        if note.exists() and _cached(note.read_text()).exists():
            return _cached(note.read_text())
        data = store.read(name)
        if data is None:
            raise Unfit(f"is not there; looked for {where}")
        sha256 = hashlib.sha256(data).hexdigest()
        for target, content in ((_cached(sha256), data), (note, sha256.encode())):
            partial_file = target.with_name(f"{target.name}.partial-{uuid.uuid4().hex[:8]}")
            partial_file.write_bytes(content)
            partial_file.rename(target)
    return _cached(sha256)
