"""What a picture says of itself, read by Pillow alone, and what others' pictures say."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm_ops.schedulers import SCHEDULERS
from pipelines.generation_text import describe, parse, read
from pipelines.images import encode

ROW: dict[str, Any] = {
    "prompt": "a large red circle, on a white background",
    "negative_prompt": "blurry: very",
    "num_inference_steps": 25,
    "scheduler": "euler_a",
    "guidance_scale": 2.0,
    "seed": 7,
    "model_revision": "0123abcd",
    "model": "/home/somebody/models/mine",
    "strength": None,
}
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)


def test_the_text_is_what_other_tools_read() -> None:
    assert describe(ROW, 24, 16) == (
        "a large red circle, on a white background\nNegative prompt: blurry: very\n"
        "Steps: 25, Sampler: Euler a, CFG scale: 2, Seed: 7, Size: 24x16, Model hash: 0123abcd"
    )


def test_a_png_carries_it_as_text_and_says_that_a_model_made_it() -> None:
    for text in ("plain\nSteps: 1", "Кот 🐈\nSteps: 1"):
        with Image.open(io.BytesIO(encode(PIXELS, "png", text=text))) as image:
            assert image.info["parameters"] == text
            assert "trainedAlgorithmicMedia" in image.info["XML:com.adobe.xmp"]
            assert np.array_equal(np.asarray(image), PIXELS)
            assert read(image) == text


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_other_formats_carry_it_as_exif_comment(format: Any) -> None:
    text = "Кот, a cat\nSteps: 1"
    with Image.open(io.BytesIO(encode(PIXELS, format, text=text))) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment == b"UNICODE\0" + text.encode("utf-16-be")
        assert b"trainedAlgorithmicMedia" in image.info["xmp"]
        assert read(image) == text


def test_a_prompt_longer_than_a_jpeg_can_hold_is_cut() -> None:
    for format in ("jpeg", "webp"):
        with Image.open(io.BytesIO(encode(PIXELS, format, text="🐈" * 100_000))) as image:  # type: ignore[arg-type]
            found = read(image)
            assert found is not None
            assert len(found) == 16_000


def test_without_a_text_a_picture_says_nothing() -> None:
    for format in ("png", "jpeg", "webp"):
        data = encode(PIXELS, format)  # type: ignore[arg-type]
        assert b"trainedAlgorithmicMedia" not in data
        with Image.open(io.BytesIO(data)) as image:
            assert read(image) is None


words = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\x85\u2028\u2029"), max_size=40)


@given(
    prompt=words,
    negative=words,
    scheduler=st.sampled_from(sorted(SCHEDULERS)),
    seed=st.integers(0, 2**63 - 1),
    strength=st.none() | st.sampled_from([0.25, 1.0]),
)
def test_what_is_written_is_read_back(
    prompt: str, negative: str, scheduler: str, seed: int, strength: float | None
) -> None:
    prompt, negative = prompt.strip(), negative.strip()
    row = {**ROW, "prompt": prompt, "negative_prompt": negative, "scheduler": scheduler, "seed": seed}
    again = parse(describe({**row, "strength": strength}, 24, 16))
    if not prompt.startswith("Negative prompt:"):
        assert (again["prompt"], again["negative_prompt"]) == (prompt, negative)
    assert (again["scheduler"], int(again["seed"]), again["width"], again["height"]) == (scheduler, seed, "24", "16")
    assert ("strength" in again) == (strength is not None)


def test_a_text_of_the_web_ui_is_understood() -> None:
    text = (
        "masterpiece, (cat:1.2)\nsecond line\nNegative prompt: bad hands,\nugly\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 1234567890, Size: 512x768, "
        'Model hash: 6ce0161689, Model: v1-5-pruned, Lora hashes: "a: 12, b: 34", Version: v1.9.0'
    )
    assert parse(text) == {
        "prompt": "masterpiece, (cat:1.2)\nsecond line",
        "negative_prompt": "bad hands,\nugly",
        "num_inference_steps": "20",
        "guidance_scale": "7.5",
        "seed": "1234567890",
        "width": "512",
        "height": "768",
        "scheduler": "dpm++_2m_karras",
    }


@pytest.mark.parametrize("text", ["", "a cat", "Negative prompt: x", "a\nb\nc"])
def test_a_text_without_parameters_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no line with Steps and Seed"):
        parse(text)
