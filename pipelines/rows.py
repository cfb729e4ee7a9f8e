"""From columns as a person typed them to rows as a model takes them: defaults, checks, keys, seeds.

A row's key is the sha256 of all that determines its picture, and of what tells the row from others: its id, or, where
it has none, its columns that pass through. Its seed, where none is given, follows from the job's seed and the row
itself. Neither knows where in the table the row stands.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ldm_ops.describe import ModelFacts
from pipelines.adapters import LoraReader, StageAdapters
from pipelines.cells import (
    MAX_ID_CHARS,
    MAX_PROMPT_CHARS,
    Wrong,
    is_missing,
    read_id,
    read_number,
    read_scheduler,
    read_size,
    read_strength,
    read_text,
)
from pipelines.chunk import Chunk
from pipelines.errors import JobError
from pipelines.job import Job, digest
from pipelines.references import BadReference, References, box
from pipelines.stages import ROW_PARAMETERS, AnyStage, output_settings, row_parameters
from pipelines.unused import BROUGHT_BY_ROWS, unused_columns
from pipelines.weights import Weights

PROTOCOL = 4
MAX_EXPANSION = 100_000

BROUGHT = ("image", "mask_image", "latents", "control_image")
"""Parameters that say where something lies."""

_AT = {name: i for i, name in enumerate(ROW_PARAMETERS)}


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One picture to make, or, with `problem`, one row that cannot be."""

    key: str
    id: str | None
    values: tuple[Any, ...]
    """In the order of ROW_PARAMETERS."""
    source_index: int
    problem: str | None = None
    image_version: str | None = None
    lora_revision: str | None = None
    cells: str = ""
    """What passes through, as one text; two rows of one key and other cells contradict each other."""


class Resolver:
    """Everything about a job that turns a chunk of its table into planned rows.

    `models` are the weights and facts of each stage, in order, `adapters` what each has beside them; a row's own
    parameters are those of the first.
    """

    def __init__(
        self, job: Job, models: Sequence[tuple[Weights, ModelFacts]], adapters: Sequence[StageAdapters]
    ) -> None:
        stage, source = job.stage, job.source
        facts = models[0][1]
        self.job = job
        self.by_caption = stage.op == "embed"
        self.takes = row_parameters(stage, facts)
        self.references = References(source.storage_options, source.allow_hosts)
        self.adapters = adapters[0]
        self.loras = LoraReader(self.adapters, Path(facts.folder))
        multiple = math.lcm(facts.size_multiple, self.adapters.size_multiple)
        self.readers: dict[str, Callable[[Any], Any]] = {
            "prompt": read_text("prompt", MAX_PROMPT_CHARS),
            "negative_prompt": read_text("negative_prompt", MAX_PROMPT_CHARS),
            "seed": read_number("seed", 0, 2**63 - 1, whole=True),
            "height": read_size("height", multiple),
            "width": read_size("width", multiple),
            "num_inference_steps": read_number("num_inference_steps", 1, 1000, whole=True),
            "guidance_scale": read_number("guidance_scale", 0, 100, whole=False),
            "scheduler": read_scheduler(facts),
            "strength": read_strength,
            "controlnet_conditioning_scale": read_number("controlnet_conditioning_scale", 0, 10, whole=False),
            "lora": lambda value: self.loras.read("", value),
            "lora_scale": read_number("lora_scale", -10, 10, whole=False),
        }
        self.defaults: dict[str, Any] = {
            "prompt": getattr(stage, "prompt", None),
            "seed": None,
            **{name: getattr(stage, name, None) for name in ("negative_prompt", "height", "width", "strength")},
            **{name: getattr(stage, name, None) for name in ("num_inference_steps", "guidance_scale")},
            "scheduler": getattr(stage, "scheduler", None) or facts.scheduler or None,
            "controlnet_conditioning_scale": getattr(stage, "controlnet_conditioning_scale", None),
            "lora": self.adapters.lora,
            "lora_scale": getattr(stage, "lora_scale", None),
        }
        if self.defaults["controlnet_conditioning_scale"] is None:
            self.defaults["controlnet_conditioning_scale"] = 1.0
        if self.defaults["prompt"] is None and stage.op in ("upscale", "encode", "decode", "embed"):
            self.defaults["prompt"] = ""
        for name in ("height", "width", "scheduler"):
            if getattr(stage, name, None) is not None:
                self._of_job(f"stages.0.{name}", name, self.defaults[name])
        if stage.op == "txt2img" and "control_image" not in self.takes:
            self.defaults["height"] = self.defaults["height"] or facts.default_height
            self.defaults["width"] = self.defaults["width"] or facts.default_width
        for i, (later, (_, its_facts)) in enumerate(zip(job.stages[1:], models[1:], strict=True), 1):
            _check_later(i, later, its_facts)
        self.axes: list[tuple[str, list[Any]]] = [
            (name, [self._of_job(f"source.matrix.{name}", name, value) for value in values])
            for name, values in source.matrix.items()
        ]
        self.images = getattr(stage, "num_images_per_prompt", 1)
        combinations = math.prod(len(values) for _, values in self.axes) * self.images
        if combinations > MAX_EXPANSION:
            raise JobError(
                f"source.matrix × num_images_per_prompt makes {combinations} pictures of each row; at most "
                f"{MAX_EXPANSION}"
            )
        self.combinations = [
            {name: value for (name, _), value in zip(self.axes, values, strict=True)}
            for values in product(*(values for _, values in self.axes))
        ]
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
        # The same table has to give the same prompts.
        environment.filters.pop("random")
        environment.globals.pop("lipsum")
        self.templates: dict[str, Template] = {}
        for field, text in source.templates.items():
            try:
                self.templates[field] = environment.from_string(text)
            except TemplateError as error:
                raise JobError(f"source.templates.{field}: {error}; see Jinja's syntax") from None
        self.fixed = digest(
            {
                "protocol": PROTOCOL,
                "stages": [
                    [
                        one.op,
                        weights.revision,
                        output_settings(one, first=i == 0),
                        _beside(i, one, beside),
                    ]
                    for i, (one, (weights, _), beside) in enumerate(zip(job.stages, models, adapters, strict=True))
                ],
                **job.picture_settings(),
            }
        )
        # What rows and axes set of what decides whether an option has an effect: each with where.
        self.brought = {name: f"source.matrix.{name}" for name, _ in self.axes}
        self._watched = self.takes.intersection(BROUGHT_BY_ROWS) | unused_columns(stage, facts).keys()
        self.has_captions = False
        self._cache: dict[str, dict[Any, tuple[Any, str | None]]] = {name: {} for name in self.readers}

    def _of_job(self, where: str, name: str, value: Any) -> Any:
        try:
            return self.readers[name](value)
        except Wrong as error:
            raise JobError(f"{where}: {error}") from None

    def column(self, name: str) -> str:
        """The table's name of our column."""
        return self.job.source.columns.get(name, name)  # type: ignore[call-overload,no-any-return]

    def check_columns(self, chunk: Chunk) -> None:
        """Refuse a table that lacks what every row needs.

        Raises:
            JobError: no prompt, a mapped column that is not there, or a column that a matrix axis would override.
        """
        there = ", ".join(repr(name) for name in list(chunk.columns)[:12]) or "none"
        for name in chunk.columns:
            if not isinstance(name, str) or name.encode("utf-8", "replace").decode() != name:
                raise JobError(f"{chunk.uri}: column {name!r} has a name that is no text; rename it")
        # Rows that are mappings may leave a field out: the first of them tell what there is.
        first = chunk.has_header or chunk.first_row == 1
        for ours, theirs in self.job.source.columns.items():
            if first and theirs not in chunk.columns:
                raise JobError(f"{chunk.uri}: source.columns.{ours}: no column {theirs!r}; the table has {there}")
        if first and self.job.source.pass_through != "all":
            for name in self.job.source.pass_through:
                if name not in chunk.columns:
                    raise JobError(f"{chunk.uri}: source.pass_through: no column {name!r}; the table has {there}")
        if first:
            for name in ("prompt", "image", "mask_image", "latents", "control_image"):
                # A caption may be empty, but captions that are nowhere are a mistake.
                optional = self.defaults.get(name) is not None and not self.by_caption
                needed = name in self.takes and name not in self.templates and not optional
                if needed and self.column(name) not in chunk.columns:
                    other = ", or give stages.0.prompt" if name == "prompt" and not self.by_caption else ""
                    raise JobError(
                        f"{chunk.uri}: no column {name!r}; the table has {there}; name it with source.columns: "
                        f"{{{name}: …}}{other}"
                    )
        for name in ("image", "mask_image", "control_image"):
            typed = chunk.has_header and name in self.takes
            cell = next((c for c in chunk.columns.get(self.column(name), ()) if c is not None), "") if typed else ""
            if not isinstance(cell, str) and not (name == "mask_image" and isinstance(cell, list)):
                raise JobError(
                    f"{chunk.uri}: column {self.column(name)!r} holds {type(cell).__name__} like {str(cell)[:40]!r}; "
                    "an image is a path, a URL, or in Parquet its bytes"
                )
        if hasattr(self.job.stage, "controlnet") and "control_image" not in self.takes:
            theirs = self.column("control_image")
            if theirs in chunk.columns:
                raise JobError(
                    f"{chunk.uri}: column {theirs!r} holds control images, and no controlnet would see them; give "
                    "stages.0.controlnet, or rename the column"
                )
        for name, _ in self.axes:
            if name not in self.takes:
                raise JobError(f"source.matrix.{name}: {self.job.stage.op} takes no {name}; leave it out")
            if self.column(name) in chunk.columns:
                raise JobError(f"{chunk.uri}: {name} is a column and an axis of source.matrix; keep one")

    def passing(self, chunk: Chunk) -> list[tuple[str, list[Any]]]:
        """The columns that go into the manifest as they are: what no parameter uses, or the job's choice of that.

        None where a row stands for all that have its caption.
        """
        if self.by_caption:
            return []
        used = {self.column(name) for name in ("id", *self.takes)}
        wanted = self.job.source.pass_through
        return [
            (name, column)
            for name, column in chunk.columns.items()
            if name not in used and (name not in chunk.offered if wanted == "all" else name in wanted)
        ]

    def rows(self, chunk: Chunk) -> Iterator[PlannedRow]:
        """Every picture that the rows of `chunk` ask for; a wrong row comes once, with its problem."""
        if chunk.num_rows == 0:
            return
        self.check_columns(chunk)
        self._watch(chunk)
        raw = {name: chunk.columns.get(self.column(name)) for name in ("id", *self.takes)}
        if self.by_caption:
            raw["id"] = None
        for name in ("image", "mask_image", "control_image"):
            if (said := raw.get(name)) is not None:
                known = chunk.versions.get(self.column(name)) or [None] * len(said)
                self.references.prepare(
                    chunk.base, (one for one, mark in zip(said, known, strict=False) if mark is None)
                )
        passing = self.passing(chunk)
        for i in range(chunk.num_rows):
            cells = _cells_text(passing, i)
            try:
                if i in chunk.problems:
                    raise Wrong(chunk.problems[i])
                row_id = None if raw["id"] is None or is_missing(raw["id"][i]) else read_id(raw["id"][i])
                values = [self._value(name, raw[name], i) if name in self.takes else None for name in ROW_PARAMETERS]
                for field, template in self.templates.items():
                    values[_AT[field]] = self._render(field, template, chunk, i)
                prompt = values[_AT["prompt"]]
                if prompt is None or (not prompt.strip() and prompt != self.defaults["prompt"]):
                    raise Wrong("prompt is empty")
                versions = self._place(chunk, values, i)
                self.has_captions = self.has_captions or prompt != ""
            except Wrong as error:
                yield self._wrong(chunk, raw, i, str(error))
                continue
            yield from self._expand(row_id, values, versions, i, cells)

    def _watch(self, chunk: Chunk) -> None:
        """Remember which columns bring something, for `refuse_unused`."""
        for name in self._watched - self.brought.keys():
            theirs = self.column(name)
            # What a file with pictures says beside them tells how they were made.
            if name not in self.takes and self.column("image") in chunk.versions:
                continue
            if not all(is_missing(cell) for cell in chunk.columns.get(theirs, ())):
                self.brought[name] = f"{chunk.uri}: column {theirs!r}"

    def beside(self) -> list[PlannedRow]:
        """Rows of a job whatever its table holds: of embed the null caption, which guidance is trained on."""
        if not self.by_caption:
            return []
        return list(self._expand(None, ["" if name == "prompt" else None for name in ROW_PARAMETERS], [], 0, ""))

    def _place(self, chunk: Chunk, values: list[Any], i: int) -> list[str]:
        """Put where an image lies in place of what the table says; return its version, which the key holds instead."""
        versions: list[str] = []
        for name in BROUGHT:
            if name not in self.takes:
                continue
            said = values[_AT[name]]
            if said is None:
                raise Wrong(f"{name} is empty")
            if name == "latents":
                if name not in chunk.versions or not isinstance(said, str):
                    raise Wrong("latents come from the output of an encode job; set source.format: manifest")
                values[_AT[name]] = f"{chunk.base}/{said}"
                versions.append(str(chunk.versions[name][i]))
                continue
            try:
                where = box(said) if name == "mask_image" else None
                if where is None:
                    where = self.references.locate(chunk.base, said)
                    known = chunk.versions.get(self.column(name))
                    versions.append((known and known[i]) or self.references.version(where))
                else:
                    versions.append(where)
            except BadReference as error:
                shown = f" {said[:200]!r}" if isinstance(said, str) else ""
                raise Wrong(f"{name}{shown} {error}") from None
            values[_AT[name]] = where
        if values[_AT["lora"]] is not None:
            values[_AT["lora"]] = self.loras.read(chunk.base, values[_AT["lora"]])
        return versions

    def _wrong(self, chunk: Chunk, raw: dict[str, list[Any] | None], i: int, problem: str) -> PlannedRow:
        cells = _cells_text(list(chunk.columns.items()), i)
        text = f"wrong\0{self.fixed}\0{cells}"
        key = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]
        readable = {
            name: column[i][:MAX_ID_CHARS].encode("utf-8", "replace").decode()
            for name in ("id", "prompt", "image")
            if (column := raw.get(name)) is not None and isinstance(column[i], str)
        }
        values = tuple(readable.get(name) for name in ROW_PARAMETERS)
        return PlannedRow(key, readable.get("id") or None, values, i, problem, cells=cells)

    def _value(self, name: str, column: list[Any] | None, i: int) -> Any:
        value = None if column is None else column[i]
        if is_missing(value):
            return self.defaults.get(name)
        if name in BROUGHT or name == "lora":
            return value
        cache = self._cache[name]
        if name == "prompt" or not isinstance(value, (str, int, float)):
            return self.readers[name](value)
        found = cache.get((type(value), value))
        if found is None:
            try:
                found = (self.readers[name](value), None)
            except Wrong as error:
                found = (None, str(error))
            if len(cache) < 100_000:
                cache[(type(value), value)] = found
        if found[1] is not None:
            raise Wrong(found[1])
        return found[0]

    def _render(self, field: str, template: Template, chunk: Chunk, i: int) -> str:
        try:
            cells = {name: column[i] for name, column in chunk.columns.items()}
            text = template.render({name: cell for name, cell in cells.items() if cell is not None})
        except UndefinedError as error:
            there = ", ".join(list(chunk.columns)[:12])
            raise Wrong(f"template {field}: {error} in this row; the table has {there}") from None
        except Exception as error:  # noqa: BLE001 - a template can raise whatever Python can
            raise Wrong(f"template {field}: {error}") from None
        return str(self.readers[field](text))

    def _expand(
        self, row_id: str | None, values: list[Any], versions: list[str], i: int, cells: str
    ) -> Iterator[PlannedRow]:
        several = len(self.combinations) * self.images > 1
        where = {name: values[_AT[name]] for name in BROUGHT}
        n = 0
        for combination in self.combinations:
            for image in range(self.images):
                made = list(values)
                for name, value in combination.items():
                    made[_AT[name]] = value
                for name in BROUGHT:
                    made[_AT[name]] = None
                lora = made[_AT["lora"]]
                scale = None if lora is None else made[_AT["lora_scale"]]
                lora_revision = self.loras.revision(lora)
                # A LoRA is its content, not its name, and its scale is the product of both.
                made[_AT["lora"]] = made[_AT["lora_scale"]] = None
                contents = self.adapters.effective(lora, lora_revision, scale)
                seed = made[_AT["seed"]]
                # The sweep's axes stay out of a derived seed: pictures of one row compare under the same noise.
                if self.by_caption:
                    pass  # Nothing here is drawn.
                elif seed is None:
                    identity = row_id or "\0".join([made[_AT["prompt"]], *versions])
                    made[_AT["seed"]] = derived_seed(self.job.seed, identity, image)
                elif image:
                    # Not seed + 1, which is often the next row's own seed.
                    made[_AT["seed"]] = derived_seed(seed, "", image)
                own_id = f"{row_id}#{n}" if several and row_id is not None else row_id
                n += 1
                # A row with an id stays itself when a note beside it changes.
                told_by = cells if own_id is None else own_id
                text = json.dumps(
                    [self.fixed, own_id is None, told_by, *made, versions, contents],
                    ensure_ascii=False,
                    separators=(",", ":"),
                )
                key = hashlib.sha256(text.encode()).hexdigest()[:32]
                for name, place in where.items():
                    made[_AT[name]] = place
                made[_AT["lora"]], made[_AT["lora_scale"]] = lora, scale
                # In the order of BROUGHT; a change between plan and run is noticed by them.
                version = "\n".join(versions) or None
                yield PlannedRow(key, own_id, tuple(made), i, _no_steps(made), version, lora_revision, cells)


def _beside(i: int, stage: AnyStage, adapters: StageAdapters) -> dict[str, Any]:
    """What a stage has beside its model for all rows; the first one's LoRAs are each row's own."""
    found = adapters.identity()
    if i and adapters.lora is not None:
        found["loras"] = adapters.effective(adapters.lora, adapters.lora_revision, getattr(stage, "lora_scale", None))
    return found


def _no_steps(values: list[Any]) -> str | None:
    steps, strength = values[_AT["num_inference_steps"]], values[_AT["strength"]]
    if strength is None or int(steps * strength) >= 1:
        return None
    return f"strength {strength:g} of {steps} steps leaves none to do; use at least {math.ceil(1000 / steps) / 1000:g}"


def _check_later(i: int, stage: AnyStage, facts: ModelFacts) -> None:
    """What a row's own values are checked for in the first stage, of a later one's fields."""
    readers: dict[str, Callable[[Any], Any]] = {
        "height": read_size("height", facts.size_multiple),
        "width": read_size("width", facts.size_multiple),
        "scheduler": read_scheduler(facts),
    }
    for name, read in readers.items():
        value = getattr(stage, name, None)
        if value is not None:
            try:
                read(value)
            except Wrong as error:
                raise JobError(f"stages.{i}.{name}: {error}") from None
    values = [getattr(stage, name, None) for name in ROW_PARAMETERS]
    problem = _no_steps(values)
    if problem is not None:
        raise JobError(f"stages.{i}.strength: {problem}")


def _cells_text(columns: Sequence[tuple[str, list[Any]]], i: int) -> str:
    """Row `i` of the columns as text, without empty cells: a column that only other rows fill changes nothing."""
    if not columns:
        return ""
    cells = {name: column[i] for name, column in columns if not is_missing(column[i])}
    return json.dumps(cells, default=str, sort_keys=True) if cells else ""


def derived_seed(job_seed: int, identity: str, image: int) -> int:
    """63 bits from the job's seed, a row's id (else its prompt) and the number of its picture."""
    text = f"{job_seed}\0{identity}\0{image}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
