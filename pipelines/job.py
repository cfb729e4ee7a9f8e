"""The job file: what a user may write, checked before anything runs. Imports neither torch nor ray."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from pipelines.alternatives import one_of
from pipelines.cluster_section import PARTS, Cluster
from pipelines.errors import JobError
from pipelines.stages import REFERENCES, STAGES, AnyStage, Pool, RowParameter, Stage, not_output
from pipelines.yaml_file import Document, override, read_yaml

SCHEMA_HEADER = "# yaml-language-server: $schema="

READ_ONLY = frozenset({"http", "https", "data", "git", "github", "gist", "zip", "tar", "libarchive", "reference"})
"""Where fsspec reads, and no output can lie."""

HOST = re.compile(r"((\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
"""A name, all names below one, or an address; with a port or without."""

RowName = Literal["id", RowParameter]
"""Columns of a table that mean something; all others pass through."""

MatrixName = Literal[
    "negative_prompt",
    "seed",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "scheduler",
    "strength",
    "lora",
    "lora_scale",
    "controlnet_conditioning_scale",
]


class Section(BaseModel):
    """Base of every part of a job file: unknown fields are errors, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64")


class Source(Section):
    """Where rows come from: a table (`path`) or the job file itself (`rows`)."""

    path: str | list[str] | None = Field(
        None,
        description="file, glob, list or fsspec URL of CSV, TSV, JSONL, Parquet, text with a prompt a line, WebDataset "
        "tars, or images",
    )
    rows: list[str | dict[str, Any]] | None = Field(None, description="prompts, or rows as mappings, inline")
    format: Literal[
        "auto",
        "csv",
        "tsv",
        "jsonl",
        "parquet",
        "text",
        "webdataset",
        "img2dataset",
        "images",
        "parameters",
        "manifest",
    ] = Field(
        "auto",
        description="auto goes by the ending, and a folder is one of images; parameters reads from pictures how they "
        "were made, manifest takes the pictures of an earlier run's output, img2dataset a folder that it wrote",
    )
    columns: dict[RowName, str] = Field(default_factory=dict, description="ours: theirs, such as prompt: caption")
    templates: dict[Literal["prompt", "negative_prompt"], str] = Field(
        default_factory=dict, description="Jinja over the row's columns, such as 'a {{ style }} {{ animal }}'"
    )
    matrix: dict[MatrixName, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict, description="every row is made with every combination of these values"
    )
    pass_through: Literal["all"] | list[str] = Field(
        "all", description="columns that mean nothing to ldm-batch and go into the manifest; the others are left out"
    )
    on_bad_row: Literal["refuse", "fail"] = Field(
        "refuse", description="refuse the whole job, or record a wrong row as failed and make the others"
    )
    allow_hosts: list[str] = Field(
        default_factory=list,
        description="web servers whose images may be fetched: example.com, '*.example.org', or with a port; an address "
        "that is not public only by itself, as in 127.0.0.1:8000",
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict, repr=False, description="passed to fsspec; never recorded"
    )

    @field_validator("allow_hosts")
    @classmethod
    def _hosts(cls, value: list[str]) -> list[str]:
        for entry in value:
            found = HOST.fullmatch(entry)
            if found is None or int((found[4] or ":1")[1:]) not in range(1, 1 << 16):
                raise ValueError(f"{entry!r} names no host; write example.com, '*.example.org' or 127.0.0.1:8000")
        return value

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.path is None) == (self.rows is None):
            raise ValueError("give either path or rows")
        return self


# Where the job is read: a worker has another working directory.
PemFile = Annotated[str, StringConstraints(min_length=1), AfterValidator(lambda path: str(Path(path).absolute()))]


class Signing(Section):
    """Who signs the pictures, as C2PA's content credentials; the files are read where pictures are written."""

    certificate: PemFile = Field(
        description="PEM file of the signer's certificate and those above it, the signer's first"
    )
    private_key: PemFile = Field(description="PEM file of its private key; never recorded")
    algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = Field(
        "es256", description="of the key: es256 for an elliptic curve P-256"
    )


Layout = Literal["files", "webdataset", "parquet", "latents", "embeddings"]

MADE_OF: dict[str, Layout] = {"encode": "latents", "embed": "embeddings"}
"""The one layout of what is no picture."""


class Sink(Section):
    """Where results go."""

    path: Annotated[str, StringConstraints(min_length=1)] = Field(description="folder or fsspec URL")
    layout: Literal["auto", Layout] = Field(
        "auto",
        description="files, one per picture; webdataset, a tar per shard; parquet, a file per shard with an image "
        "column; latents, files by shape, where the last stage is encode; embeddings, Parquet files, of embed",
    )
    format: Literal["png", "jpeg", "webp", "jxl"] = Field(
        "png", description="png and jxl are lossless, webp too where no quality is given; jxl needs the extra jxl"
    )
    quality: int | None = Field(None, ge=1, le=100, description="of jpeg, else 95; of webp, which it makes lossy")
    png_encoder: Literal["pillow", "fpng"] = Field(
        "pillow", description="of png; fpng is many times faster, its files are larger; it needs the extra fast"
    )
    embed_metadata: Literal["a1111", "none"] = Field(
        "a1111", description="write prompt, seed and parameters into each picture, and that a model made it"
    )
    thumbnails: int | None = Field(
        None, ge=16, le=2048, description="px of the longer side; a small JPEG of each picture in a folder of their own"
    )
    metadata_jsonl: bool = Field(
        False, description="write images/metadata.jsonl when all is done, for Hugging Face's imagefolder"
    )
    latents_format: Literal["parquet", "safetensors"] = Field("parquet", description="of the layout latents")
    c2pa: Signing | None = Field(None, description="sign each picture; needs the extra c2pa")
    storage_options: dict[str, Any] = Field(
        default_factory=dict, repr=False, description="passed to fsspec; never recorded"
    )

    @model_validator(mode="after")
    def _lossless(self) -> Sink:
        if self.quality is not None and self.format in ("png", "jxl"):
            raise ValueError(f"quality: {self.format} is lossless; leave it out, or use format jpeg or webp")
        return self


class Job(Section):
    """One YAML file."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = "job"
    seed: int = Field(0, ge=0, lt=2**63, description="rows without a seed derive theirs from it")
    source: Source
    stages: Annotated[list[Stage], Field(min_length=1, max_length=8)]
    sink: Sink
    batches_per_shard: Annotated[
        Annotated[int, Field(ge=1, le=100_000)] | Literal["auto"], one_of("a number from 1 to 100000, or auto")
    ] = Field("auto", description="device batches in the unit of commit and resume")
    cluster: Cluster = Field(
        default_factory=lambda: Cluster(), description="what `submit --kube` asks Kubernetes for; changes no row"
    )
    max_failed: (
        Annotated[int, Field(ge=0)] | Annotated[str, StringConstraints(pattern=r"^\d{1,2}(\.\d+)?%$")] | None
    ) = Field(None, description="stop a run in which more rows fail: a number, or 1% of the rows that it has to do")

    @field_validator("max_failed", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        share = isinstance(value, str) and re.fullmatch(r"\d{1,2}(\.\d+)?%", value)
        if value is not None and not number and not share:
            raise ValueError(f"got {str(value)[:80]!r}; a number of rows, or a share below 100% such as 1%")
        return value

    @property
    def stage(self) -> AnyStage:
        """The first stage, the one whose parameters a row may set."""
        return self.stages[0]

    @model_validator(mode="after")
    def _links(self) -> Job:
        for i, stage in enumerate(self.stages):
            before = self.stages[i - 1].op if i else None
            if stage.op == "embed" and len(self.stages) > 1:
                raise ValueError(f"stages.{i}: embed makes no image and takes none; give it a job of its own")
            if i and stage.op in ("txt2img", "inpaint"):
                takes = "no image" if stage.op == "txt2img" else "a mask, which only a row can bring"
                raise ValueError(f"stages.{i}: {stage.op} takes {takes}; it can only be the first stage")
            if (before == "encode") != (i > 0 and stage.op == "decode"):
                raise ValueError(
                    f"stages.{i}: {stage.op} cannot follow {before}; decode takes latents, all else images"
                )
            if i and getattr(stage, "image_decoding", "exact") != "exact":
                raise ValueError(f"stages.{i}.image_decoding: only the first stage decodes files; leave it out")
            if i and getattr(stage, "num_images_per_prompt", 1) != 1:
                raise ValueError(
                    f"stages.{i}.num_images_per_prompt: only the first stage multiplies rows; leave it out"
                )
            if i and getattr(stage, "controlnet", None) is not None:
                raise ValueError(
                    f"stages.{i}.controlnet: a control image comes with a row, which only the first stage has; leave "
                    "it out"
                )
            if stage.keep and stage.op == "encode":
                raise ValueError(f"stages.{i}.keep: latents on the way are not kept; leave it out")
            if stage.keep and i == len(self.stages) - 1:
                raise ValueError(f"stages.{i}.keep: the last stage's pictures are always written; leave it out")
        return self

    @model_validator(mode="after")
    def _layout(self) -> Job:
        sink, last = self.sink, self.stages[-1].op
        own = MADE_OF.get(last)
        if self.layout != own and (own or self.layout in MADE_OF.values()):
            fitting = own or "files, webdataset or parquet"
            raise ValueError(f"sink.layout: {sink.layout} does not fit {last}; use {fitting}, or leave it out")
        if last != "encode" and sink.latents_format != "parquet":
            raise ValueError(f"sink.latents_format: {last} makes no latents; leave it out")
        if own:
            for name in ("thumbnails", "metadata_jsonl", "c2pa"):
                if getattr(sink, name):
                    raise ValueError(f"sink.{name}: {last} makes no pictures; leave it out")
        if sink.metadata_jsonl and self.layout != "files":
            raise ValueError(f"sink.metadata_jsonl: {self.layout} holds it all; leave it out, or use layout files")
        return self

    @model_validator(mode="after")
    def _places(self) -> Job:
        paths = [self.source.path] if isinstance(self.source.path, str) else self.source.path or []
        places = [("sink.path", self.sink.path), *(("source.path", path) for path in paths)]
        for name, place in places:
            if (problem := problem_of(place, is_sink=name == "sink.path")) is not None:
                raise ValueError(f"{name}: {problem}")
        return self

    @property
    def layout(self) -> Layout:
        """What the output holds."""
        if self.sink.layout != "auto":
            return self.sink.layout
        return MADE_OF.get(self.stages[-1].op, "files")

    @property
    def writes_pictures(self) -> bool:
        """Whether any stage's pictures become files."""
        return self.layout not in MADE_OF.values() or any(stage.keep for stage in self.stages)

    def resolved_yaml(self, left_out: Iterable[str] = ()) -> str:
        """What `_ldm/job.yaml` keeps: every default filled in, no storage option, none of the paths `left_out`."""
        import yaml

        data = self.recorded()
        for path in left_out:
            *way, last = path.split(".")
            section: Any = data
            for step in way:
                section = section[int(step)] if isinstance(section, list) else section[step]
            section.pop(last, None)
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)

    def recorded(self) -> dict[str, Any]:
        """The job as plain values without storage options, which may hold secrets, without who signs, and where."""
        left_out: Any = {"source": {"storage_options"}, "sink": {"storage_options", "c2pa"}, "cluster": True}
        return self.model_dump(mode="json", exclude=left_out)

    def picture_settings(self) -> dict[str, Any]:
        """What of the sink decides over the bytes of a picture; nothing where none is written."""
        sink = self.sink
        if not self.writes_pictures:
            return {}
        return {
            "format": sink.format,
            "quality": (sink.quality or 95) if sink.format == "jpeg" else sink.quality,
            "embed_metadata": sink.embed_metadata,
            # The same pixels, in other bytes.
            **({"png_encoder": sink.png_encoder} if sink.png_encoder != "pillow" else {}),
            # Not the certificate: one that is renewed makes no other picture.
            **({"c2pa": True} if sink.c2pa is not None else {}),
        }

    def shape_settings(self) -> dict[str, Any]:
        """What of the sink decides how an output as a whole is laid out, and so cannot change within one."""
        return {
            "sink.layout": self.layout,
            "sink.latents_format": self.sink.latents_format,
            "sink.thumbnails": self.sink.thumbnails,
        }

    def output_settings(self) -> dict[str, Any]:
        """All that changes what comes out except the table's content, flat: {"stages.0.guidance_scale": 7.5, …}."""
        # Not how a model is spelled or where a table lies: the weights' digest and the rows' keys say what they are.
        pool = set(Pool.model_fields) - {"keep"}
        stages = [stage.model_dump(mode="json", exclude=pool | not_output(stage)) for stage in self.stages]
        source = self.source.model_dump(mode="json", include={"columns", "templates", "matrix", "pass_through"})
        rest = {"name": self.name, "seed": self.seed, "source": source, "stages": stages}
        pictures = self.picture_settings()
        return flatten({**rest, **({"sink": pictures} if pictures else {})}) | self.shape_settings()


def problem_of(place: str, is_sink: bool) -> str | None:
    """What is wrong with a path or URL, as far as it tells by itself."""
    scheme, colon, rest = place.partition("://")
    if colon and "@" in rest.partition("/")[0] and ":" in rest.partition("@")[0]:
        return "holds a password; give it in storage_options or the environment"
    if is_sink and colon and scheme.lower() in READ_ONLY:
        return f"{place}: nothing can be written over {scheme}; use a folder or s3://…"
    if (colon and scheme == "file" and not rest.startswith("/")) or (colon and not rest.strip("/")):
        return f"{place} names no place; use a folder, file:///folder or s3://bucket/prefix"
    if not colon and re.match(r"^[a-z][a-z0-9]+:", place):
        return f"{place}: a URL has two slashes, as in s3://bucket/prefix"
    if place.startswith("~") or "\0" in place:
        return f"{place!r}: ~ is not expanded here; write ${{env:HOME}}, or the whole path"
    return None


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings and lists of mappings → {"a.b.0.c": leaf}."""
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        items = dict(enumerate(value)).items()
    else:
        return {path: value}
    return {k: v for name, child in items for k, v in flatten(child, f"{path}.{name}" if path else str(name)).items()}


def digest(value: Any) -> str:
    """sha256 of canonical JSON, 64 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def load_job(path: str | Path, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Job:
    """Read and validate one job file; `overrides` are `path=value` as for `--set`.

    Raises:
        JobError: with file, line, column, field and what is allowed.
    """
    text = read_text(path)
    return parse_job(text, str(path), overrides, environ)


def read_text(path: str | Path) -> str:
    """The text of a job file.

    Raises:
        JobError: there is none, or it is no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JobError(f"{path}: no such job file; `ldm-batch init` writes one") from None
    except IsADirectoryError:
        raise JobError(f"{path} is a folder; give a job file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def parse_job(
    text: str, name: str = "job.yaml", overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Job:
    """`load_job` for text that is already at hand."""
    document = read_yaml(text, name, environ)
    for assignment in overrides:
        override(document, assignment)
    try:
        return Job.model_validate(document.data)
    except ValidationError as error:
        raise JobError("\n".join(_sentence(document, e) for e in error.errors()[:5])) from None


def _sentence(document: Document, error: Any) -> str:
    loc = _without_tag(tuple(error["loc"]))
    path = ".".join(str(step) for step in loc if not _is_branch(step)) or "job"
    at, kind, came = document.where(loc), error["type"], error.get("input")
    if kind == "extra_forbidden":
        allowed = _allowed(document, loc)
        near = difflib.get_close_matches(str(loc[-1]), allowed, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(allowed)}"
        return f"{at}: {path}: unknown field; {hint}"
    if kind == "missing":
        return f"{at}: {path}: missing; it is needed"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        op = came.get("op") if isinstance(came, dict) else None
        shown = "missing" if op is None else f"got {str(op)[:80]!r}"
        near = difflib.get_close_matches(str(op), STAGES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(STAGES)}"
        return f"{document.where((*loc, 'op'))}: {path}.op: {shown}; {hint}"
    if kind == "model_type":
        return f"{at}: {path}: expected a mapping of fields; got {type(came).__name__}"
    if "storage_options" in loc:
        return f"{at}: {path}: expected a mapping of fsspec's options"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    shown = repr(came) if isinstance(came, (str, int, float, bool, type(None))) else type(came).__name__
    return f"{at}: {path}: {message}; got {shown[:80]}" if kind != "value_error" else f"{at}: {path}: {message}"


def _without_tag(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    # pydantic puts the op's name between a stage and its field.
    return (*loc[:2], *loc[3:]) if loc[:1] == ("stages",) and len(loc) > 2 and loc[2] in STAGES else loc


def _is_branch(step: str | int) -> bool:
    # pydantic adds the name of the union's branch that failed to the end of a location.
    return isinstance(step, str) and bool(re.match(r"^(\[key\]|list\[|dict\[|str$|int$|literal\[|constrained-)", step))


def _allowed(document: Document, loc: tuple[str | int, ...]) -> list[str]:
    if loc[0] == "source" and len(loc) > 1:
        return list(Source.model_fields)
    if loc[0] == "cluster" and len(loc) > 1:
        return list(_part(Cluster, loc[1:-1]).model_fields)
    if loc[:2] == ("sink", "c2pa") and len(loc) > 2:
        return list(Signing.model_fields)
    if loc[0] == "sink" and len(loc) > 1:
        return list(Sink.model_fields)
    if loc[0] == "stages" and len(loc) > 3 and loc[2] in REFERENCES:
        return list(REFERENCES[str(loc[2])].model_fields)
    if loc[0] == "stages" and len(loc) > 3 and loc[2] == "accelerate":
        field = STAGES[document.data["stages"][loc[1]]["op"]].model_fields["accelerate"]
        return list(get_args(field.annotation)[0].model_fields)
    if loc[0] == "stages" and len(loc) > 2:
        return sorted(STAGES[document.data["stages"][loc[1]]["op"]].model_fields)
    return list(Job.model_fields)


def _part(model: type[BaseModel], way: tuple[str | int, ...]) -> type[BaseModel]:
    """The model that lies below `model` on the way of a location."""
    for step in way:
        if isinstance(step, str) and step in model.model_fields:
            parts = [part for part in PARTS if part.__name__ in str(model.model_fields[step].annotation)]
            model = parts[0] if parts else model
    return model


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a job file, for editors."""
    schema = Job.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "ldm-batch job"}
