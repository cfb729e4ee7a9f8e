"""Upscale: both kinds of upscaler, whole and by tiles."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LDMSuperResolutionPipeline, StableDiffusionUpscalePipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm_ops.op import RowRefused
from ldm_ops.tiles import starts, tiled
from ldm_ops.upscale import Upscale
from tests import models
from tests.ldm_ops.rows import picture, row


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("upscalers")
    models.tiny_ldm_x4().save_pretrained(root / "ldm")
    models.tiny_sd_x4().save_pretrained(root / "sd")
    return {"ldm": root / "ldm", "sd": root / "sd"}


def test_the_latent_diffusion_upscaler_gives_what_diffusers_gives(folders: dict[str, Path]) -> None:
    op = Upscale(model="x")
    made = op.run(op.load(folders["ldm"]), [row(seed=4, image=picture(32, 32))])[0]["image"]
    plain = LDMSuperResolutionPipeline.from_pretrained(folders["ldm"])
    expected = plain(
        Image.fromarray(picture(32, 32)), num_inference_steps=4, generator=[torch.Generator().manual_seed(4)]
    ).images[0]
    assert made.shape == (128, 128, 3)
    assert np.abs(made.astype(int) - np.asarray(expected)).max() <= 1


def test_the_text_guided_upscaler_gives_what_diffusers_gives(folders: dict[str, Path]) -> None:
    op = Upscale(model="x", noise_level=30)
    made = op.run(op.load(folders["sd"]), [row(seed=4, image=picture(32, 32))])[0]["image"]
    plain = StableDiffusionUpscalePipeline.from_pretrained(folders["sd"])
    expected = plain(
        [row()["prompt"]],
        image=[Image.fromarray(picture(32, 32))],
        noise_level=30,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(4)],
    ).images[0]
    assert made.shape == (128, 128, 3)
    assert np.array_equal(made, np.asarray(expected))


@pytest.mark.parametrize("kind", ["ldm", "sd"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 50), (7, 5), (70, 40)])
def test_any_size_comes_out_four_times_larger_and_blind_to_its_neighbours(
    folders: dict[str, Path], kind: str, height: int, width: int
) -> None:
    op = Upscale(model="x", tile_px=32, tile_overlap_px=8)
    model = op.load(folders[kind])
    mine, other = row(seed=1, image=picture(height, width)), row(seed=2, image=picture(height, width, seed=9))
    first = op.run(model, [mine, other])[0]["image"]
    assert first.shape == (4 * height, 4 * width, 3)
    assert np.array_equal(op.run(model, [other, mine])[1]["image"], first)


def test_a_sampler_that_would_spoil_the_small_image_is_refused(folders: dict[str, Path]) -> None:
    op = Upscale(model="x")
    model = op.load(folders["ldm"])
    with pytest.raises(RowRefused, match="EulerDiscreteScheduler does not fit LDMSuperResolutionPipeline; use ddim"):
        op.run(model, [row(image=picture(32, 32), scheduler="euler")])


def test_a_model_that_is_no_upscaler_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="is a StableDiffusionPipeline; upscale takes LDMSuperResolutionPipeline or"):
        Upscale(model="x").load(tiny_model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tile_px": 64, "tile_overlap_px": 40}, "tile_overlap_px 40 is more than half of tile_px 64"),
        ({"tile_px": 100}, "tile_px 100 is not a multiple of 8; use 96"),
        ({"save_intermediates": 2}, "upscale keeps no intermediates"),
    ],
)
def test_wrong_settings_say_what_is_allowed(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Upscale(model="x", **fields)


@given(size=st.integers(1, 400), tile=st.integers(8, 64), overlap=st.integers(0, 32))
def test_tiles_cover_a_side_and_share_the_overlap(size: int, tile: int, overlap: int) -> None:
    overlap = min(overlap, tile // 2)
    begins = starts(size, tile, overlap)
    assert begins[0] == 0
    assert begins[-1] + tile >= size
    assert all(a < b <= a + tile - overlap for a, b in itertools.pairwise(begins))


@pytest.mark.parametrize("scale", [1, 4])
def test_tiles_of_a_local_function_blend_into_what_the_whole_gives(scale: int) -> None:
    def enlarge(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(scale, -1).repeat_interleave(scale, -2) * 2 + 1

    x = torch.randn(2, 3, 50, 71)
    assert torch.allclose(tiled(enlarge, x, 32, 8), enlarge(x), atol=1e-6)
