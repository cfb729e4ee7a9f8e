"""Pack a job for a cluster: the job file with its environment left to be filled in there, and its small tables."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.backend import JOB_FILE, Parcel, submission_id
from pipelines.cluster_section import spells_secret
from pipelines.errors import JobError
from pipelines.job import Job, parse_job, read_text
from pipelines.listing import expand
from pipelines.source import table_files
from pipelines.storage import is_local
from pipelines.yaml_file import override, read_yaml

MAX_FOLDER_BYTES = 32 << 20
"""A cluster's head holds what travels in its memory."""

_VERBATIM = re.compile(r"\$\{env:[^}]*\}")


class _Verbatim(Mapping[str, str]):
    """An environment in which each `${env:NAME}` stands for itself, where `here` does not know it."""

    def __init__(self, here: Mapping[str, str]) -> None:
        self.here = here

    def __getitem__(self, name: str) -> str:
        return self.here[name]

    def get(self, name: str, default: Any = None) -> Any:
        tail = "" if default is None else f":-{default}"
        return self.here.get(name, f"${{env:{name}{tail}}}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.here)

    def __len__(self) -> int:
        return len(self.here)


def pack(path: Path, overrides: Sequence[str], arguments: Sequence[str], folder: Path) -> tuple[Job, Parcel]:
    """The job as this machine sees it, and what travels of it; its tables are copied into `folder`, which exists.

    `${env:NAME}` travels as it stands: the value is the cluster's own.

    Raises:
        JobError: the job is wrong, or means something that only this machine has.
    """
    text = read_text(path)
    # Where a variable is the cluster's alone, its place is held by its name.
    job = parse_job(text, str(path), overrides, _Verbatim(os.environ))
    document = read_yaml(text, str(path), _Verbatim({}))
    for assignment in overrides:
        override(document, assignment)
    data = document.data
    for section in ("source", "sink"):
        _refuse_secrets(f"{path}: {section}.storage_options", data[section].get("storage_options"))
    _refuse_relative(path, job, data)
    data["source"] = _pack_source(path, job, data["source"], folder)
    job_yaml = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    (folder / JOB_FILE).write_text(job_yaml, encoding="utf-8")
    # Its tables too: of one that was changed, nobody must hear that it runs already.
    tables = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("data/*"))]
    canonical = json.dumps([data, list(arguments), *tables], sort_keys=True, default=str)
    id = submission_id(job.name, canonical)
    return job, Parcel(id, job.name, job_yaml, folder, tuple(arguments))


def _refuse_secrets(where: str, options: Any) -> None:
    """Whatever travels can be read by all who may look at the cluster."""
    if not isinstance(options, (dict, list)):
        return
    for name, value in options.items() if isinstance(options, dict) else enumerate(options):
        _refuse_secrets(f"{where}.{name}", value)
        if isinstance(value, str) and not _VERBATIM.fullmatch(value) and spells_secret(str(name), value):
            raise JobError(
                f"{where}.{name}: secrets do not travel; write ${{env:NAME}}, and set NAME on the cluster's nodes"
            )


def _refuse_relative(path: Path, job: Job, data: dict[str, Any]) -> None:
    """Places that are relative to this machine's working directory."""
    if _is_relative(data["sink"]["path"]):
        raise JobError(
            f"{path}: sink.path {job.sink.path} is relative to a folder of this machine; use s3://…, or file:///… for "
            "a folder that all nodes share (--set sink.path=…)"
        )
    for i, stage in enumerate(data["stages"]):
        for name, place in _weights(stage):
            # Without a dot in front it may be a hub id.
            if _is_relative(place) and (place.startswith(("./", "../", "~")) or Path(place).exists()):
                raise JobError(
                    f"{path}: stages.{i}.{name} {place} lies on this machine and does not travel; use a hub id, "
                    "s3://…, or an absolute path that every node has"
                )
    for name in ("certificate", "private_key"):
        if _is_relative(said := (data["sink"].get("c2pa") or {}).get(name)):
            raise JobError(f"{path}: sink.c2pa.{name} {said} does not travel; give a path that every node has")


def _weights(stage: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, place) of all weights that a stage names."""
    named = [("model", stage.get("model")), ("lora", stage.get("lora"))]
    named += [(name, stage.get(name)) for name in ("vae", "controlnet")]
    named += [("textual_inversion", one) for one in stage.get("textual_inversion") or ()]
    named += [(f"loras.{name}", one) for name, one in (stage.get("loras") or {}).items()]
    for name, value in named:
        place = value.get("model") if isinstance(value, dict) else value
        if isinstance(place, str):
            yield name, place


def _is_relative(place: Any) -> bool:
    return isinstance(place, str) and "://" not in place and not place.startswith(("/", "${env:", "builtin:"))


def _pack_source(path: Path, job: Job, source: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`source` as the cluster finds it: tables of this machine are copied, what else is here alone is refused."""
    if source.get("path") is None:
        return source
    said = source["path"] if isinstance(source["path"], list) else [source["path"]]
    as_read = [job.source.path] if isinstance(job.source.path, str) else job.source.path or []
    places: list[str] = []
    num_bytes = 0
    for raw, place in zip(said, as_read, strict=True):
        if not is_local(place) or place.startswith("file://") or _VERBATIM.search(place):
            places.append(raw)
            continue
        files = list(expand(place, {}))
        here = [file for file in files if Path(file).is_file()]
        tables = table_files(job.source.model_copy(update={"path": files}))
        if not files or (len(here) < len(files) and _is_relative(place)) or (here and tables is None):
            what = "is not there" if not here and not Path(place).exists() else "holds more than a table"
            raise JobError(
                f"{path}: source.path {place} {what}; tables of this machine travel, all else lies on s3://…, or in a "
                "folder file:///… that all nodes share"
            )
        if len(here) < len(files):
            places.append(raw)
            continue
        for file in here:
            num_bytes += Path(file).stat().st_size
            if num_bytes > MAX_FOLDER_BYTES:
                raise JobError(
                    f"{path}: source.path: {file} and those before it are more than {MAX_FOLDER_BYTES >> 20} MiB, too "
                    "much to travel; put them on s3://… or the like"
                )
            target = folder / "data" / f"{len(places):04d}-{Path(file).name}"
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
            places.append(f"data/{target.name}")
    return {**source, "path": places[0] if len(places) == 1 else places}
