"""Cells as a person typed them → values that a model takes, or what is wrong with them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable
from typing import Any

from ldm_ops.describe import PLAIN_UPSCALER, ModelFacts
from ldm_ops.schedulers import is_flow, is_plain, scheduler_name

MAX_ID_CHARS = 512
MAX_PROMPT_CHARS = 100_000


class Wrong(ValueError):
    """A value that a row may not have."""


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: then the stage's own value holds."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def read_text(name: str, limit: int) -> Callable[[Any], str]:
    """Text of at most `limit` characters; a number is taken as it is written."""

    def read(value: Any) -> str:
        if not isinstance(value, str):
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise Wrong(f"{name} is a {type(value).__name__}; expected text")
            value = str(value)
        if len(value) > limit:
            raise Wrong(f"{name} has {len(value)} characters; at most {limit}")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise Wrong(f"{name} holds half a surrogate pair, which is no text; write it again") from None
        return str(value)

    return read


def read_id(value: Any) -> str:
    """A row's id: any text without control characters."""
    text = read_text("id", MAX_ID_CHARS)(value)
    if any(unicodedata.category(c) == "Cc" for c in text):
        raise Wrong(f"id {text[:80]!r} holds a control character; use printable text")
    return text


def read_number(name: str, low: float, high: float, whole: bool) -> Callable[[Any], Any]:
    """A number from `low` to `high`."""

    def read(value: Any) -> Any:
        try:
            if isinstance(value, bool):
                raise ValueError
            if whole:
                number: float = int(value) if isinstance(value, (int, str)) and "." not in str(value) else float(value)
                if number != int(number):
                    raise ValueError
                number = int(number)
            else:
                number = float(value)
        except (ValueError, TypeError, OverflowError):
            shown = str(value)[:40]
            raise Wrong(f"{name} {shown!r} is not a {'whole ' if whole else ''}number") from None
        if not low <= number <= high:
            raise Wrong(
                f"{name} {number} is out of range; {low:g} to {high:g}"
                if high < 2**62
                else f"{name} {number} is out of range; 0 to 2^63 - 1"
            )
        return number

    return read


def read_size(name: str, multiple: int) -> Callable[[Any], int]:
    """A side in pixels that is a multiple of `multiple`."""

    number = read_number(name, multiple, 16384, whole=True)

    def read(value: Any) -> int:
        size = int(number(value))
        if size % multiple:
            below = size // multiple * multiple
            raise Wrong(
                f"{name} {size} is not a multiple of {multiple}; use {max(multiple, below)} or {below + multiple}"
            )
        return size

    return read


def read_scheduler(facts: ModelFacts) -> Callable[[Any], str]:
    """The short name of a sampler that the model takes."""

    def read(value: Any) -> str:
        try:
            name = scheduler_name(str(value))
        except ValueError as error:
            raise Wrong(str(error)) from None
        if facts.pipeline == PLAIN_UPSCALER and not is_plain(name):
            raise Wrong(f"scheduler {name} does not fit {facts.pipeline}; use ddim, or leave it out")
        if is_flow(name) != facts.flow_matching:
            other = "flow-matching" if facts.flow_matching else "diffusion"
            raise Wrong(f"scheduler {name} does not fit {facts.pipeline}, a {other} model; leave it out for its own")
        return name

    return read


def read_strength(value: Any) -> float:
    """More than 0, at most 1."""
    number = float(read_number("strength", 0, 1, whole=False)(value))
    if number == 0:
        raise Wrong("strength 0 would leave the image as it is; more than 0, at most 1")
    return number
