"""Some rows of a source, as they come in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CHUNK_ROWS = 20_000


@dataclass
class Chunk:
    """Some consecutive rows as equally long columns. `first_row` counts from 1, without a header.

    `has_header` says that every chunk of the file has the same columns. Relative paths in cells are relative to `base`.
    `versions` tells, where a listing does, which version of each image is there (size and ETag or time).
    """

    uri: str
    first_row: int
    num_rows: int
    columns: dict[str, list[Any]]
    has_header: bool = True
    base: str = ""
    versions: list[str] | None = None
