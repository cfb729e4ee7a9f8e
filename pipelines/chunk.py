"""Some rows of a source, as they come in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CHUNK_ROWS = 20_000

OF_THE_IMAGE = ("width", "height")
"""What columns beside a picture tell of it, and no order for the one to make."""


@dataclass
class Chunk:
    """Some consecutive rows as equally long columns. `first_row` counts from 1, without a header.

    `has_header` says that every chunk of the file has the same columns. Relative paths in cells are relative to `base`.
    `versions` tells by column, where a source knows it, which version of each image is there: a content's sha256, or
    a store's mark. `problems` tells by row what is wrong with it already, and `num_skipped` what else the source holds
    that is no row. `offered` are columns for the stages that take them, which pass through only by their names.
    """

    uri: str
    first_row: int
    num_rows: int
    columns: dict[str, list[Any]]
    has_header: bool = True
    base: str = ""
    versions: dict[str, list[str | None]] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)
    num_skipped: int = 0
    offered: frozenset[str] = frozenset()
