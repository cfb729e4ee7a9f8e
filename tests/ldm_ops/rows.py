"""Rows as ops see them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def row(prompt: str = "a large red circle on a white background", seed: int = 1, **values: Any) -> dict[str, Any]:
    """A row with every parameter of a sampling op."""
    return {
        "prompt": prompt,
        "negative_prompt": "",
        "seed": seed,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "scheduler": "ddim",
        **values,
    }


def picture(height: int = 64, width: int = 64, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth colours: (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 64
    waves = [127 + 120 * np.sin(x * a + y * b + c) for a, b, c in rng.uniform(0, 6, (3, 3))]
    return np.stack(waves, -1).astype(np.uint8)
