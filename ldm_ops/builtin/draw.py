"""Captioned pictures of one shape on a plain background: the whole training set of `builtin:shapes`.

A picture is exact: coverage of a pixel is the clipped signed distance to the shape's outline, so edges are
anti-aliased and a caption is true by construction. Nothing here reads a file or the network.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

IMAGE_PX = 64
Floats = NDArray[np.floating[Any]]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 25, 25),
    "green": (20, 160, 40),
    "blue": (30, 60, 230),
    "yellow": (250, 225, 20),
    "purple": (140, 30, 170),
    "orange": (255, 140, 0),
    "cyan": (0, 220, 230),
    "pink": (255, 140, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES: dict[str, tuple[float, float]] = {"small": (9.0, 13.0), "large": (17.0, 22.0)}  # half extents, px

# A column and a row of a 3 × 3 grid, laid over the places where the whole shape still fits.
POSITIONS: dict[str, tuple[int, int]] = {
    "in the top left": (0, 0),
    "at the top": (1, 0),
    "in the top right": (2, 0),
    "on the left": (0, 1),
    "in the center": (1, 1),
    "on the right": (2, 1),
    "in the bottom left": (0, 2),
    "at the bottom": (1, 2),
    "in the bottom right": (2, 2),
}
MARGIN_PX = 2.0

HELD_OUT_SHARE = 0.14
"""Share of the (size, color, shape, background) combinations that training never draws."""


@dataclass(frozen=True, order=True)
class Caption:
    """What a picture shows. `position` is a phrase of POSITIONS, or "" for anywhere."""

    size: str
    color: str
    shape: str
    background: str
    position: str = ""

    def __str__(self) -> str:
        where = f" {self.position}" if self.position else ""
        return f"a {self.size} {self.color} {self.shape}{where} on a {self.background} background"

    def is_held_out(self) -> bool:
        """True for combinations kept from training, whatever their position; stable across versions."""
        name = "/".join((self.size, self.color, self.shape, self.background))
        digest = hashlib.sha256(name.encode()).digest()
        return int.from_bytes(digest[:4], "big") / 2**32 < HELD_OUT_SHARE


def all_captions() -> list[Caption]:
    """Every caption of the grammar, in a fixed order."""
    return [Caption(*words) for words in product(SIZES, COLORS, SHAPES, BACKGROUNDS, ("", *POSITIONS))]


def _distance(shape: str, x: Floats, y: Floats, r: float) -> Floats:
    """Signed distance (px, negative inside) to an outline of half extent `r`; y points down."""
    if shape == "circle":
        return np.asarray(np.hypot(x, y) - r)
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.775 * r) - 0.225 * r
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88 * r
    if shape == "cross":
        ax, ay = np.abs(x), np.abs(y)
        return np.maximum(np.maximum(ax, ay) - r, np.minimum(ax, ay) - 0.33 * r)
    if shape == "triangle":
        # Equilateral and upright, its bounding box centred: 2r wide, √3·r high.
        base = y - 0.866 * r
        side = np.abs(x) - 0.577 * (y + 0.866 * r)
        return np.asarray(np.maximum(base, side))
    if shape == "star":
        # Fold the plane into half of one of five wedges; there the outline is a single segment.
        yc = y - 0.05 * r
        angle = np.arctan2(x, -yc)
        wedge = 2 * np.pi / 5
        folded = np.abs(np.mod(angle + wedge / 2, wedge) - wedge / 2)
        rho = np.hypot(x, yc)
        px, py = rho * np.cos(folded), rho * np.sin(folded)
        inner = 0.42 * r
        tip = np.array([r, 0.0])
        dent = np.array([inner * np.cos(wedge / 2), inner * np.sin(wedge / 2)])
        edge = dent - tip
        normal = np.array([-edge[1], edge[0]])
        normal = -normal / np.hypot(*normal) if normal[0] < 0 else normal / np.hypot(*normal)
        away: Floats = (px - tip[0]) * normal[0] + (py - tip[1]) * normal[1]
        return away
    raise ValueError(f"no such shape: {shape}; one of {', '.join(SHAPES)}")


def coverage(shape: str, center_xy: tuple[float, float], r: float, size_px: int = IMAGE_PX) -> NDArray[np.float32]:
    """Share of each pixel that the shape covers: (size_px, size_px), float32 in [0, 1]."""
    axis = np.arange(size_px, dtype=np.float32) + 0.5
    x, y = np.meshgrid(axis - center_xy[0], axis - center_xy[1])
    share: NDArray[np.float32] = np.clip(0.5 - _distance(shape, x, y, r), 0.0, 1.0).astype(np.float32)
    return share


def draw(caption: Caption, rng: np.random.Generator, scale: int = 1) -> NDArray[np.uint8]:
    """One picture of `caption`, its place, extent and tint drawn from `rng`: (64·scale, 64·scale, 3) uint8.

    Another `scale` draws the same picture with more pixels: outlines are exact at any size.
    """
    r = float(rng.uniform(*SIZES[caption.size]))
    low, high = r + MARGIN_PX, IMAGE_PX - r - MARGIN_PX
    if caption.position:
        cell = POSITIONS[caption.position]
        third = (high - low) / 3
        center = tuple(float(low + third * (c + rng.uniform(0, 1))) for c in cell)
    else:
        center = tuple(float(rng.uniform(low, high)) for _ in range(2))
    ink = np.clip(np.array(COLORS[caption.color]) + rng.normal(0, 4, 3), 0, 255)
    paper = np.clip(np.array(BACKGROUNDS[caption.background]) + rng.normal(0, 2), 0, 255)
    place = (center[0] * scale, center[1] * scale)
    share = coverage(caption.shape, place, r * scale, IMAGE_PX * scale)[..., None]
    pixels: NDArray[np.uint8] = np.round(share * ink + (1 - share) * paper).astype(np.uint8)
    return pixels
