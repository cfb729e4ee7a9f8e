"""Say what a picture shows, from its pixels alone: the referee of `builtin:shapes`.

Rules, no learning: the border tells the background, the median of what differs from it tells the color, and the
outline is compared with each ideal shape drawn into the same bounding box (intersection over union).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ldm_ops.builtin.draw import BACKGROUNDS, COLORS, IMAGE_PX, POSITIONS, SHAPES, Caption, coverage

MAX_COLOR_DISTANCE = 80.0  # Euclidean, 8-bit RGB: about half the way between two neighbours of the palette
MIN_IOU = 0.70
MIN_ONE_OBJECT = 0.92  # share of the marked pixels that the largest connected piece must hold
SMALL_TO_LARGE_PX = 15.0  # half extents: small ends at 13, large begins at 17


@dataclass(frozen=True)
class Verdict:
    """What was seen; None where no word of the vocabulary fits. `center_xy` and `radius` are in pixels."""

    background: str | None
    color: str | None
    shape: str | None
    iou: float = 0.0
    center_xy: tuple[float, float] = (0.0, 0.0)
    radius: float = 0.0

    def agrees(self, caption: Caption) -> bool:
        """Color, shape and background are all as the caption says."""
        return (self.background, self.color, self.shape) == (caption.background, caption.color, caption.shape)

    def agrees_on_size(self, caption: Caption) -> bool:
        return (self.radius < SMALL_TO_LARGE_PX) == (caption.size == "small")

    def agrees_on_position(self, caption: Caption) -> bool:
        """The centre lies on the side of the frame that the caption names; True where it names none."""
        if not caption.position:
            return True
        slack = max(1.0, IMAGE_PX / 2 - self.radius - 2.0) / 3
        for offset, cell in zip(self.center_xy, POSITIONS[caption.position], strict=True):
            third = int(np.clip(np.floor((offset - IMAGE_PX / 2) / (2 * slack) + 1.5), 0, 2))
            near_edge = abs(((offset - IMAGE_PX / 2) / (2 * slack) + 1.5) % 1 - 0.5) > 0.35
            if third != cell and not (near_edge and abs(third - cell) == 1):
                return False
        return True


def nearest(rgb: NDArray[np.floating], palette: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {name: float(np.linalg.norm(rgb - np.array(value))) for name, value in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= MAX_COLOR_DISTANCE else None


def largest_piece(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest 4-connected piece of a mask."""
    todo = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    best: set[tuple[int, int]] = set()
    while todo:
        piece = {todo.pop()}
        front = set(piece)
        while front:
            front = {(y + dy, x + dx) for y, x in front for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))} & todo
            todo -= front
            piece |= front
        best = max(best, piece, key=len)
    out = np.zeros_like(mask)
    if best:
        out[tuple(np.array(sorted(best)).T)] = True
    return out


def _extent(shape: str) -> tuple[float, float]:
    """(width, height) of the shape's bounding box for a half extent of 1."""
    return {
        "circle": (2.0, 2.0),
        "ring": (2.0, 2.0),
        "cross": (2.0, 2.0),
        "square": (1.76, 1.76),
        "triangle": (2.0, 1.732),
        "star": (1.902, 1.809),
    }[shape]


def judge(image: NDArray[np.uint8]) -> Verdict:
    """Look at one (64, 64, 3) uint8 picture."""
    pixels = image.astype(np.float64)
    border = np.concatenate(
        [
            pixels[:2].reshape(-1, 3),
            pixels[-2:].reshape(-1, 3),
            pixels[:, :2].reshape(-1, 3),
            pixels[:, -2:].reshape(-1, 3),
        ]
    )
    paper = np.median(border, axis=0)
    background = nearest(paper, BACKGROUNDS)
    away = np.linalg.norm(pixels - paper, axis=2)
    if away.max() < 40:
        return Verdict(background, None, None)
    ink = np.median(pixels[away > 0.7 * np.quantile(away, 0.995)], axis=0)
    direction = (ink - paper) / np.dot(ink - paper, ink - paper)
    mask = (pixels - paper) @ direction > 0.5
    piece = largest_piece(mask)
    if piece.sum() < 20 or piece.sum() < MIN_ONE_OBJECT * mask.sum():
        return Verdict(background, nearest(ink, COLORS), None)
    ys, xs = np.nonzero(piece)
    left, top, right, bottom = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
    center = (float(left + right) / 2, float(top + bottom) / 2)
    best_shape, best_iou, best_r = SHAPES[0], 0.0, 0.0
    for shape in SHAPES:
        width, height = _extent(shape)
        r = float((right - left) / width + (bottom - top) / height) / 2
        # The star's box is not centred on the point that it is drawn around.
        drop = 0.5 * (1 - 0.809) * r - 0.05 * r if shape == "star" else 0.0
        # A box of whole pixels is half a pixel off, which at 9 px is much: the fit may move by that, and no further.
        for scale, dx, dy in product((0.94, 1.0, 1.06), (-0.5, 0.0, 0.5), (-0.5, 0.0, 0.5)):
            ideal = coverage(shape, (center[0] + dx, center[1] + drop + dy), r * scale) > 0.5
            iou = float((ideal & piece).sum() / (ideal | piece).sum())
            if iou > best_iou:
                best_shape, best_iou, best_r = shape, iou, r
    shape_seen = best_shape if best_iou >= MIN_IOU else None
    return Verdict(background, nearest(ink, COLORS), shape_seen, best_iou, center, best_r)
