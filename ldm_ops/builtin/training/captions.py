"""Captions to learn from, captions kept back, and batches of pictures drawn for them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ldm_ops.builtin.draw import Caption, all_captions, draw

EVAL_SEED = 999


def split() -> tuple[list[Caption], list[Caption]]:
    """(training captions, held-out captions); no combination of attributes stands in both."""
    captions = all_captions()
    return (
        [c for c in captions if not c.is_held_out()],
        [c for c in captions if c.is_held_out()],
    )


def pictures(captions: list[Caption], rng: np.random.Generator, device: torch.device) -> Tensor:
    """Fresh pictures of `captions` as images_BCHW, float32 in [-1, 1]."""
    stack = np.stack([draw(c, rng) for c in captions])
    return torch.from_numpy(stack).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def choose(captions: list[Caption], rng: np.random.Generator, count: int) -> list[Caption]:
    return [captions[i] for i in rng.integers(0, len(captions), count)]


def choose_hard(captions: list[Caption], rng: np.random.Generator, count: int) -> list[Caption]:
    """As `choose`, but what blurs most comes more often: small stars four times, other small shapes and stars twice."""
    weights = np.array([(1 + (c.size == "small")) * (1 + (c.shape == "star")) for c in captions], float)
    return [captions[i] for i in rng.choice(len(captions), count, p=weights / weights.sum())]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    along = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * along)))


def held_out_sample(count: int = 200) -> list[Caption]:
    """The captions of the model card's figures; settings are chosen on training captions, never on these."""
    return choose(split()[1], np.random.default_rng(EVAL_SEED), count)
