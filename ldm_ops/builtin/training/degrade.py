"""Sharp pictures to learn upscaling from, and their small, worn copies."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ldm_ops.builtin.draw import SHAPES, coverage

SCALE = 4


def scene(rng: np.random.Generator, size_px: int) -> NDArray[np.uint8]:
    """Some shapes of any colour over each other on a plain or graded ground: (size_px, size_px, 3) uint8.

    A crop of a picture twice as large or more, so outlines run off the edge as they do at the border of a tile.
    """
    ground = rng.uniform(0, 255, 3) if rng.random() < 0.6 else np.full(3, rng.choice([0.0, 128.0, 255.0]))
    canvas = np.broadcast_to(ground, (size_px, size_px, 3)).copy()
    if rng.random() < 0.3:
        along = np.linspace(-1, 1, size_px)
        tilt = rng.uniform(-1, 1, 2)
        ramp = tilt[0] * along[:, None] + tilt[1] * along[None, :]
        canvas += ramp[..., None] * rng.uniform(-60, 60, 3)
    for _ in range(int(rng.integers(1, 4))):
        r = float(np.exp(rng.uniform(np.log(10), np.log(90))))
        center = (float(rng.uniform(-0.3, 1.3) * size_px), float(rng.uniform(-0.3, 1.3) * size_px))
        share = coverage(str(rng.choice(SHAPES)), center, r, size_px)[..., None]
        canvas = share * rng.uniform(0, 255, 3) + (1 - share) * canvas
    return np.round(np.clip(canvas, 0, 255)).astype(np.uint8)


def shrink(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A quarter of the side by bicubic resampling with anti-aliasing (Pillow)."""
    height, width = pixels.shape[:2]
    return np.asarray(Image.fromarray(pixels).resize((width // SCALE, height // SCALE), Image.Resampling.BICUBIC))


def wear(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """As `shrink`, then what happens to pictures on their way: blur before, noise and JPEG after, each now and then.

    Rombach et al. 2022 (arXiv:2112.10752), section 4.4, trained its more general upscaler on such a chain.
    """
    image = Image.fromarray(pixels)
    if rng.random() < 0.7:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 3.0))))
    kind = rng.choice([Image.Resampling.BICUBIC, Image.Resampling.BOX, Image.Resampling.BILINEAR])
    image = image.resize((image.width // SCALE, image.height // SCALE), Image.Resampling(int(kind)))
    if rng.random() < 0.7:
        noisy = np.asarray(image) + rng.normal(0, rng.uniform(1, 12), (image.height, image.width, 3))
        image = Image.fromarray(np.round(np.clip(noisy, 0, 255)).astype(np.uint8))
    if rng.random() < 0.7:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.integers(40, 96)))
        image = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
    return np.asarray(image)
