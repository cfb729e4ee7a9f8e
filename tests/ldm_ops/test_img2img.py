"""Img2Img against diffusers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image

from ldm_ops.img2img import Img2Img
from ldm_ops.sampling import Pipeline
from tests import models
from tests.ldm_ops.rows import picture, row


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Img2Img, Pipeline]:
    op = Img2Img(model="x")
    return op, op.load(tiny_model)


def test_a_row_gives_the_picture_that_diffusers_gives_for_its_seed(
    loaded: tuple[Img2Img, Pipeline], tiny_model: Path
) -> None:
    op, model = loaded
    made = op.run(model, [row(seed=3, image=picture(), strength=0.6), row(seed=4, image=picture(seed=1), strength=0.6)])
    plain = AutoPipelineForImage2Image.from_pretrained(tiny_model, use_safetensors=True)
    expected = plain(
        [row()["prompt"]] * 2,
        image=[Image.fromarray(picture()), Image.fromarray(picture(seed=1))],
        strength=0.6,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
    ).images
    for output, image in zip(made, expected, strict=True):
        assert np.array_equal(output["image"], np.asarray(image))


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a", "dpm++_2m_sde"])
def test_a_rows_bits_do_not_depend_on_its_neighbours(loaded: tuple[Img2Img, Pipeline], scheduler: str) -> None:
    op, model = loaded
    mine = row(seed=5, image=picture(), strength=0.5, scheduler=scheduler)
    others = [row(seed=90 + i, image=picture(seed=i), strength=0.5, scheduler=scheduler) for i in range(3)]
    assert np.array_equal(op.run(model, [mine, *others])[0]["image"], op.run(model, [*others, mine])[3]["image"])


def test_less_strength_stays_closer_to_the_image(loaded: tuple[Img2Img, Pipeline]) -> None:
    op, model = loaded
    pictures = [
        op.run(model, [row(num_inference_steps=20, image=picture(), strength=s)])[0]["image"].astype(int)
        for s in (0.05, 1.0)
    ]
    pipe = model.pipe
    with torch.inference_mode():
        inputs = torch.from_numpy(picture()).permute(2, 0, 1)[None].float() / 127.5 - 1
        again = pipe.vae.decode(pipe.vae.encode(inputs).latent_dist.mode()).sample
    kept = ((again[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).numpy()
    little, much = (float(np.abs(p - kept).mean()) for p in pictures)
    assert little < much


@pytest.mark.parametrize("save", [models.save_sdxl, models.save_sd3])
def test_other_families_take_an_image_too(save: Any, tmp_path: Path) -> None:
    save(tmp_path)
    op = Img2Img(model="x")
    scheduler = "flow_euler" if save is models.save_sd3 else "euler"
    rows = [row(seed=s, image=picture(seed=s), strength=0.75, scheduler=scheduler) for s in (1, 2)]
    model = op.load(tmp_path)
    first, second = op.run(model, rows)
    assert first["image"].shape == (64, 64, 3)
    assert not np.array_equal(first["image"], second["image"])
    assert np.array_equal(op.run(model, rows[::-1])[1]["image"], first["image"])
