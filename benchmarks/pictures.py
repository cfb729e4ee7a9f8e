"""Pictures to measure with: distinct, and as hard to compress as photographs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SYMMETRIES = 8
GRAIN = 2.0


def natural(size: int, seed: int) -> NDArray[np.uint8]:
    """Noise of all scales, each as strong as it is coarse (1/f, as photographs have it), and some grain."""
    rng = np.random.default_rng(seed)
    total = np.full((size, size, 3), 127.0)
    side = 4
    while side <= size:
        colours = rng.integers(0, 256, (side, side, 3), np.uint8)
        layer = Image.fromarray(colours).resize((size, size), Image.Resampling.BICUBIC)
        total += (np.asarray(layer) - 127.5) * (2.0 / side**0.75)
        side *= 2
    total += rng.normal(0, GRAIN, (size, size, 1))
    return np.clip(total, 0, 255).astype(np.uint8)


def distinct(num: int, size: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    """`num` different pictures; up to eight are one turned and mirrored, which no row of a PNG repeats."""
    bases = [natural(size, seed * 1_000_003 + i) for i in range(-(-num // SYMMETRIES))]
    turned = [np.rot90(base, k) for k in range(4) for base in bases]
    both = [*turned, *(one[:, ::-1] for one in turned)]
    return [np.ascontiguousarray(one) for one in both[:num]]
