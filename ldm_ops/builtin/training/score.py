"""What share of captions a pipeline draws as told."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from ldm_ops.builtin.draw import Caption
from ldm_ops.builtin.judge import judge


def score(
    pipe: StableDiffusionPipeline, captions: list[Caption], guidance_scale: float = 2.0, first_seed: int = 0
) -> dict[str, float]:
    """Share of `captions` whose picture (25 steps) the referee agrees with, in all and by attribute."""
    seen = []
    for start in range(0, len(captions), 50):
        prompts = [str(c) for c in captions[start : start + 50]]
        generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(prompts))]
        images = pipe(
            prompts, num_inference_steps=25, guidance_scale=guidance_scale, generator=generators, output_type="np"
        ).images
        seen += [judge((image * 255).round().astype(np.uint8)) for image in images]
    pairs = list(zip(seen, captions, strict=True))
    return {
        "all": float(np.mean([v.agrees(c) for v, c in pairs])),
        "color": float(np.mean([v.color == c.color for v, c in pairs])),
        "shape": float(np.mean([v.shape == c.shape for v, c in pairs])),
        "background": float(np.mean([v.background == c.background for v, c in pairs])),
        "size": float(np.mean([v.agrees_on_size(c) for v, c in pairs])),
        "position": float(np.mean([v.agrees_on_position(c) for v, c in pairs])),
    }
