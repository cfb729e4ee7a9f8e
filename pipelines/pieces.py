"""Images that are a piece of a larger file: how a piece is written as one text, and read again.

`file.tar#bytes=512-99711` is a range of bytes as HTTP counts them, both ends included;
`file.parquet#row_group=3&row=17&column=image` is a cell, its row counted in the row group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_BYTES = re.compile(r"(.+)#bytes=(\d{1,18})-(\d{1,18})")
_CELL = re.compile(r"(.+)#row_group=(\d{1,9})&row=(\d{1,12})&column=(.+)")

GROUP = r"^(?:(.*)#bytes=\d+-\d+|(.*#row_group=\d+)&row=\d+&column=.*|.*)$"
"""Its groups hold what pieces have in common that are best read together."""

MAX_BYTES = 256 << 20
"""Of one image as it is stored."""


@dataclass(frozen=True)
class Bytes:
    """Bytes `start` to `end`, `end` not included, of `file`."""

    file: str
    start: int
    end: int

    def __str__(self) -> str:
        return f"{self.file}#bytes={self.start}-{self.end - 1}"

    def version(self, mark: str) -> str:
        """Which version of the piece there is, where `mark` tells that of the whole file."""
        return f"{mark}#{self.start}-{self.end - 1}"


@dataclass(frozen=True)
class Cell:
    """One cell of a Parquet file."""

    file: str
    row_group: int
    row: int
    column: str

    def __str__(self) -> str:
        return f"{self.file}#row_group={self.row_group}&row={self.row}&column={self.column}"


def piece(where: str) -> Bytes | Cell | None:
    """What `where` names a piece of, None where it names a whole file."""
    if match := _BYTES.fullmatch(where):
        return Bytes(match[1], int(match[2]), int(match[3]) + 1)
    if match := _CELL.fullmatch(where):
        return Cell(match[1], int(match[2]), int(match[3]), match[4])
    return None
