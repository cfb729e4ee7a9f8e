"""Valid bytes, a little wrong: bits flipped, pieces cut out, doubled, made zero, and numbers that mean a size."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from hypothesis import strategies as st

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)

Edit = tuple[str, int, int]

# A format's head is where its sizes and offsets stand, and Parquet's is at the end.
_POSITIONS = st.one_of(st.integers(0, 256), st.integers(-256, -1), st.integers(0, 1 << 20))
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "take", "double", "zero", "number16", "number32", "none"]),
        _POSITIONS,
        st.integers(0, 255),
    ),
    max_size=4,
)


def damage(data: bytes, edits: list[Edit]) -> bytes:
    """`data` after each of `edits`: what, where, how."""
    for kind, position, value in edits:
        if not data:
            break
        at = position % len(data)
        if kind == "flip":
            data = data[:at] + bytes([data[at] ^ 1 << value % 8]) + data[at + 1 :]
        elif kind == "set":
            data = data[:at] + bytes([value]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "take":
            data = data[:at] + data[at + value :]
        elif kind == "double":
            data = data[: at + value] + data[at:]
        elif kind == "zero":
            data = data[:at] + bytes(min(value, len(data) - at)) + data[at + value :]
        elif kind.startswith("number"):
            number = NUMBERS[value % len(NUMBERS)]
            packed = struct.pack("<>"[value % 2] + "I", number)
            packed = packed[:2] if kind == "number16" else packed
            data = data[:at] + packed + data[at + len(packed) :]
    return data


def damaged(bases: Mapping[str, bytes]) -> st.SearchStrategy[tuple[str, bytes]]:
    """(name, bytes) of one of `bases`, after some edits or none."""
    return st.builds(lambda name, edits: (name, damage(bases[name], edits)), st.sampled_from(sorted(bases)), EDITS)
