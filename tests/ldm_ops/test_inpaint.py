"""Inpaint: what is masked follows the prompt, what is not stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ldm_ops.builtin import draw as drawing
from ldm_ops.builtin.draw import Caption, draw
from ldm_ops.builtin.judge import judge
from ldm_ops.inpaint import Inpaint
from tests import models
from tests.ldm_ops.rows import picture, row

SHAPES = Path(drawing.__file__).parent / "shapes"


def box(left: int, top: int, right: int, bottom: int, size: int = 64) -> NDArray[np.uint8]:
    mask = np.zeros((size, size), np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


@pytest.fixture(scope="module")
def inpainting_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-inpainting"
    models.tiny_inpainting().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("which", ["tiny_model", "inpainting_model", "builtin"])
def test_every_kind_of_model_leaves_unmasked_pixels_alone_and_repaints_the_rest(
    which: str, request: pytest.FixtureRequest
) -> None:
    folder = SHAPES if which == "builtin" else request.getfixturevalue(which)
    op = Inpaint(model="x")
    model = op.load(folder)
    mask = box(16, 8, 48, 40)
    mine = row(seed=5, image=picture(), mask_image=mask, strength=1.0)
    other = row(seed=6, image=picture(seed=2), mask_image=box(0, 0, 20, 20), strength=1.0)
    made, second = op.run(model, [mine, other])
    assert np.array_equal(made["image"][mask == 0], picture()[mask == 0])
    assert (made["image"][mask == 255] != picture()[mask == 255]).mean() > 0.5
    assert np.array_equal(op.run(model, [other, mine])[1]["image"], made["image"])
    assert np.array_equal(second["image"][20:, 20:], picture(seed=2)[20:, 20:])


def test_without_preserving_the_autoencoder_shows_outside_the_mask(tiny_model: Path) -> None:
    op = Inpaint(model="x", preserve_unmasked=False)
    mask = box(16, 16, 48, 48)
    made = op.run(op.load(tiny_model), [row(image=picture(), mask_image=mask, strength=1.0)])[0]["image"]
    assert not np.array_equal(made[mask == 0], picture()[mask == 0])


def test_nothing_of_what_the_mask_hides_shines_through_at_full_strength() -> None:
    op = Inpaint(model="x")
    model = op.load(SHAPES)
    mask = box(8, 8, 56, 56)
    hidden = [picture(seed=1), picture(seed=1)]
    hidden[1][mask == 255] = 0
    made = [op.run(model, [row(image=image, mask_image=mask, strength=1.0)])[0]["image"] for image in hidden]
    assert np.array_equal(*made)


def test_intermediate_steps_are_kept_beside_the_masking() -> None:
    op = Inpaint(model="x", save_intermediates=2)
    made = op.run(op.load(SHAPES), [row(image=picture(), mask_image=box(8, 8, 56, 56), strength=1.0)])[0]
    assert [step for step, _, _ in made["intermediates"]] == [2, 4]


def test_the_built_in_model_paints_what_the_prompt_says_into_the_mask() -> None:
    op = Inpaint(model="x")
    model = op.load(SHAPES)
    rng = np.random.default_rng(3)
    captions = [Caption("large", color, shape, "white") for color in ("red", "blue") for shape in ("circle", "square")]
    rows = [
        row(
            str(caption),
            seed=i,
            num_inference_steps=25,
            guidance_scale=2.0,
            scheduler="euler_a",
            image=draw(Caption("small", "green", "cross", "white", "in the center"), rng),
            mask_image=box(4, 4, 60, 60),
            strength=1.0,
        )
        for i, caption in enumerate(captions)
    ]
    right = [judge(out["image"]).agrees(c) for out, c in zip(op.run(model, rows), captions, strict=True)]
    assert sum(right) >= 3, right
