"""Safe YAML with positions: what a job file may be made of, before anyone asks what it means."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from pipelines.errors import JobError

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_ALIASES = 100
MAX_OPEN_BRACKETS = 5000
MAX_INT_BITS = 256

Loc = tuple[str | int, ...]
_ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class Document:
    """Plain values, and where each stands: `marks[("stages", 0, "op")] == (line, column)`, both from 1."""

    name: str
    data: dict[str, Any]
    marks: dict[Loc, tuple[int, int]] = field(default_factory=dict)

    def where(self, loc: Loc) -> str:
        """`file:line:column` of the nearest place that the file itself names."""
        for end in range(len(loc), -1, -1):
            if loc[:end] in self.marks:
                line, column = self.marks[loc[:end]]
                return f"{self.name}:{line}:{column}"
        return self.name


def read_yaml(text: str, name: str, environ: Mapping[str, str] | None = None) -> Document:
    """Parse one mapping; expand `${env:NAME}` and `${env:NAME:-default}` inside strings.

    Raises:
        JobError: not YAML, too large, too deep, too many aliases, a duplicate key, an unset variable.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise JobError(
            f"{name}: {size} bytes; a job file may have at most {MAX_BYTES}; put long tables into source.path"
        )
    if _deepest_bracket(text) > MAX_OPEN_BRACKETS:
        # libyaml's time grows with the square of these.
        raise JobError(f"{name}: nested deeper than {MAX_DEPTH} levels; flatten it")
    try:
        aliases = sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=_Loader))
        if aliases > MAX_ALIASES:
            raise JobError(f"{name}: {aliases} aliases; at most {MAX_ALIASES} are allowed; write the values out")
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        # Between braces its own } ends the mapping.
        line = "".join(text.splitlines()[mark.line :][:1]) if mark else ""
        hint = "; put quotes around ${…} between braces" if "${" in line else ""
        raise JobError(f"{at}: not valid YAML: {problem}{hint}") from None
    except RecursionError:
        raise JobError(f"{name}: nested deeper than {MAX_DEPTH} levels; flatten it") from None
    if node is None:
        raise JobError(f"{name}: the file is empty; start from `ldm-batch init`")
    if not isinstance(node, yaml.MappingNode):
        raise JobError(
            f"{name}: expected a mapping with source, stages and sink at the top; start from `ldm-batch init`"
        )
    document = Document(name, {})
    builder = _Builder(document, os.environ if environ is None else environ)
    document.data = builder.build(node, ())
    return document


def _deepest_bracket(text: str) -> int:
    depth = deepest = 0
    for match in re.finditer(r"[\[\]{}]", text):
        depth += 1 if match[0] in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


class _Builder:
    def __init__(self, document: Document, environ: Mapping[str, str]) -> None:
        self.document = document
        self.environ = environ
        self.nodes = 0

    def build(self, node: yaml.Node, loc: Loc) -> Any:
        self.nodes += 1
        at = f"{self.document.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
        self.document.marks.setdefault(loc, (node.start_mark.line + 1, node.start_mark.column + 1))
        if len(loc) > MAX_DEPTH:
            raise JobError(f"{at}: nested deeper than {MAX_DEPTH} levels; flatten it")
        if self.nodes > MAX_BYTES:
            raise JobError(f"{at}: aliases expand to more than {MAX_BYTES} values; write the values out")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, loc)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*loc, i)) for i, child in enumerate(node.value)]
        try:
            value = yaml.SafeLoader("").construct_object(node, deep=True)
        except Exception as error:  # noqa: BLE001 - PyYAML's constructors let KeyError and others through
            problem = getattr(error, "problem", None) or f"{node.value[:40]!r} is no {node.tag.rpartition(':')[2]}"
            raise JobError(f"{at}: not valid YAML: {problem}") from None
        if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise JobError(f"{at}: a whole number of {value.bit_length()} bits; no field takes one as large")
        return self._expand(value, at) if isinstance(value, str) else value

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            mark = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            at = f"{self.document.name}:{mark[0]}:{mark[1]}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise JobError(f"{at}: a key must be a plain word")
            key = key_node.value
            if key in out:
                raise JobError(f"{at}: {'.'.join(map(str, (*loc, key)))} is given twice; keep one")
            self.document.marks[(*loc, key)] = mark
            out[key] = self.build(value_node, (*loc, key))
        return out

    def _expand(self, text: str, at: str) -> str:
        def value(match: re.Match[str]) -> str:
            name, default = match.group(1), match.group(2)
            found = self.environ.get(name, default)
            if found is None:
                raise JobError(
                    f"{at}: the environment variable {name} is not set; set it, or write ${{env:{name}:-default}}"
                )
            return found

        return _ENV.sub(value, text)


def override(document: Document, assignment: str) -> None:
    """Apply one `--set a.b.0.c=value`; the value is read as YAML.

    Raises:
        JobError: no `=`, an empty path, an index that is not there, or a value where a mapping is needed.
    """
    path, equals, text = assignment.partition("=")
    steps = path.strip().split(".")
    if not equals or not all(steps):
        raise JobError(f"--set {assignment}: expected path=value, such as stages.0.num_inference_steps=30")
    if assignment.encode("utf-8", "replace").decode() != assignment:
        raise JobError(f"--set {assignment!r}: not UTF-8 text")
    try:
        value = yaml.safe_load(text) if text else ""
    except Exception:  # noqa: BLE001 - what YAML cannot read is the text itself
        value = text
    if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        raise JobError(f"--set {path}: a whole number of {value.bit_length()} bits; no field takes one as large")
    here: Any = document.data
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        so_far = ".".join(steps[: i + 1])
        if isinstance(here, list):
            if not (step.isascii() and step.isdigit()) or int(step) >= len(here):
                raise JobError(f"--set {path}: {so_far}: no such item; the list has {len(here)} (from 0)")
            if last:
                here[int(step)] = value
            else:
                here = here[int(step)]
        elif isinstance(here, dict):
            if last:
                here[step] = value
            else:
                here = here.setdefault(step, {})
        else:
            raise JobError(f"--set {path}: {so_far}: {'.'.join(steps[:i])} is a value, not a section")
