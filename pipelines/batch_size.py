"""How many rows one device call takes: a number for all, or more of small pictures than of large ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from pipelines.alternatives import one_of

Rows = Annotated[int, Field(ge=1, le=4096)]
Pixels = Annotated[int, Field(ge=0, le=1 << 40)]


BatchSize = Annotated[
    Rows | Literal["auto"] | Annotated[dict[Pixels, Rows], Field(min_length=1)],
    one_of("a number from 1 to 4096, auto, or {px: rows} such as {262144: 16, 1048576: 4}"),
]

UNMEASURED = 8
"""What `auto` counts as where nothing is run."""


def rows_at(batch_size: BatchSize, pixels: int) -> int:
    """Rows of one device call on pictures of so many pixels.

    Those larger than any that is named take fewer in proportion.
    """
    if batch_size == "auto":
        return UNMEASURED
    if isinstance(batch_size, int):
        return batch_size
    roomy = [limit for limit in batch_size if limit >= pixels]
    if roomy:
        return batch_size[min(roomy)]
    largest = max(batch_size)
    return max(1, batch_size[largest] * largest // pixels)


def most_rows(batch_size: BatchSize) -> int:
    """Rows of one device call on the pictures of which it takes most."""
    return max(batch_size.values()) if isinstance(batch_size, dict) else rows_at(batch_size, 0)


def pixels_of(row: Mapping[str, Any]) -> int:
    """Of what an op is given for a row: its image, its latents, or else its control image, or the size that the picture
    is to have; 0 of a caption."""
    for given in ("image", "latents", "control_image"):
        if row.get(given) is not None:
            height, width = row[given].shape[-2:] if given == "latents" else row[given].shape[:2]
            return int(height * width)
    return (row.get("height") or 0) * (row.get("width") or 0)
