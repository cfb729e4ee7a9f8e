"""Txt2Img against diffusers itself: the same pictures, row by row, whatever stands beside a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image

from ldm_ops.op import RowRefused
from ldm_ops.sampling import Pipeline
from ldm_ops.schedulers import SCHEDULERS
from ldm_ops.txt2img import Txt2Img
from tests import models

PROMPTS = ("a large red circle on a white background", "a small blue star", "a green cross", "a pink square")


def row(prompt: str = PROMPTS[0], seed: int = 1, **values: Any) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "negative_prompt": "",
        "seed": seed,
        "height": 64,
        "width": 64,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "scheduler": "ddim",
        **values,
    }


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Txt2Img, Pipeline]:
    op = Txt2Img(model=str(tiny_model))
    return op, op.load(tiny_model)


def test_a_row_gives_the_picture_that_diffusers_gives_for_its_seed(
    loaded: tuple[Txt2Img, Pipeline], tiny_model: Path
) -> None:
    op, model = loaded
    rows = [row(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    plain = AutoPipelineForText2Image.from_pretrained(tiny_model, use_safetensors=True)
    expected = plain(
        list(PROMPTS),
        num_inference_steps=3,
        guidance_scale=3.0,
        height=64,
        width=64,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))],
    ).images
    for output, image in zip(op.run(model, rows), expected, strict=True):
        assert np.array_equal(output["image"], np.asarray(image))


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if not name.startswith("flow")])
def test_a_rows_bits_do_not_depend_on_its_place_or_its_neighbours(
    loaded: tuple[Txt2Img, Pipeline], scheduler: str
) -> None:
    op, model = loaded
    mine = row(seed=5, scheduler=scheduler)
    others = [row(prompt, seed=90 + i, scheduler=scheduler) for i, prompt in enumerate(PROMPTS)]
    first = op.run(model, [mine, *others[:3]])[0]["image"]
    last = op.run(model, [others[3], others[0], others[1], mine])[3]["image"]
    assert np.array_equal(first, last)
    assert len(np.unique(first)) > 10


def test_negative_prompt_and_guidance_of_a_row_matter(loaded: tuple[Txt2Img, Pipeline]) -> None:
    op, model = loaded
    plain = op.run(model, [row()])[0]["image"]
    assert not np.array_equal(plain, op.run(model, [row(negative_prompt="blue")])[0]["image"])
    assert not np.array_equal(plain, op.run(model, [row(guidance_scale=9.0)])[0]["image"])
    assert not np.array_equal(plain, op.run(model, [row(seed=2)])[0]["image"])


def test_every_kth_step_is_kept_with_a_preview_that_ends_as_the_picture(tiny_model: Path) -> None:
    op = Txt2Img(model=str(tiny_model), save_intermediates=2)
    output = op.run(op.load(tiny_model), [row(num_inference_steps=4), row(seed=2, num_inference_steps=4)])[1]
    steps = [step for step, _, _ in output["intermediates"]]
    assert steps == [2, 4]
    for _, latents, preview in output["intermediates"]:
        assert latents.shape == (4, 8, 8)
        assert latents.dtype == np.float32
        assert preview.shape == (64, 64, 3)
    assert np.array_equal(output["intermediates"][-1][2], output["image"])
    assert not np.array_equal(output["intermediates"][0][2], output["image"])


def test_nan_is_refused_and_never_a_black_picture(poisoned_model: Path) -> None:
    op = Txt2Img(model=str(poisoned_model))
    model = op.load(poisoned_model)
    with pytest.raises(RowRefused, match="NaN") as caught:
        op.run(model, [row("a red ring")])
    assert caught.value.kind == "model.nan"
    assert op.run(model, [row("a red star")])[0]["image"].any()


@pytest.mark.parametrize("save", [models.save_sdxl, models.save_sd3])
def test_other_families_load_through_autopipeline(save: Any, tmp_path: Path) -> None:
    save(tmp_path)
    op = Txt2Img(model=str(tmp_path))
    scheduler = "flow_euler" if save is models.save_sd3 else "euler"
    rows = [row(seed=1, scheduler=scheduler), row(seed=2, scheduler=scheduler)]
    model = op.load(tmp_path)
    first, second = op.run(model, rows)
    assert first["image"].shape == (64, 64, 3)
    assert not np.array_equal(first["image"], second["image"])
    assert np.array_equal(op.run(model, rows[::-1])[1]["image"], first["image"])


@pytest.mark.parametrize(
    ("dtype", "wanted"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("auto", torch.float32)]
)
def test_dtype_is_what_the_job_says(tiny_model: Path, dtype: Any, wanted: torch.dtype) -> None:
    assert Txt2Img(model="x", dtype=dtype, device="cpu").load(tiny_model).pipe.unet.dtype == wanted


def test_a_device_that_is_not_there_is_a_clear_error(tiny_model: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ValueError, match=r"device cuda: this machine has no CUDA device; use device: auto or cpu"):
        Txt2Img(model="x", device="cuda").load(tiny_model)


@pytest.fixture(scope="module")
def checked_models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folders = {}
    for flags in (True, False):
        folders[flags] = tmp_path_factory.mktemp("checked") / str(flags)
        models.tiny_stable_diffusion(models.safety_checker(flags)).save_pretrained(folders[flags])
    return folders


@pytest.mark.parametrize(
    ("policy", "nsfw", "shown"),
    [
        ("off", None, "picture"),
        (None, True, "picture"),
        ("flag", True, "picture"),
        ("blank", True, "black"),
        ("reject", True, "none"),
    ],
)
def test_safety_policy_decides_over_a_flagged_picture(
    checked_models: dict[bool, Path], policy: Any, nsfw: bool | None, shown: str
) -> None:
    op = Txt2Img(model="x", safety_checker=policy)
    output = op.run(op.load(checked_models[True]), [row()])[0]
    assert output["nsfw"] is nsfw
    if shown == "none":
        assert output["image"] is None
    else:
        assert bool(output["image"].any()) == (shown == "picture")


def test_a_picture_that_is_not_flagged_passes_every_policy(checked_models: dict[bool, Path]) -> None:
    for policy in ("flag", "blank", "reject"):
        op = Txt2Img(model="x", safety_checker=policy)
        output = op.run(op.load(checked_models[False]), [row()])[0]
        assert output["nsfw"] is False
        assert output["image"].any()


def test_a_policy_without_a_checker_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="has no safety checker; set safety_checker: off"):
        Txt2Img(model="x", safety_checker="reject").load(tiny_model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_noise_of_a_seed_is_the_same_on_the_gpu(tiny_model: Path) -> None:
    pictures = []
    for device in ("cpu", "cuda"):
        op = Txt2Img(model="x", device=device, dtype="fp32")
        pictures.append(op.run(op.load(tiny_model), [row(seed=5)])[0]["image"].astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def test_a_prompt_that_is_cut_says_so_or_fails(tiny_model: Path) -> None:
    long = "a large red circle on a white background " * 8
    op = Txt2Img(model="x")
    model = op.load(tiny_model)
    made = op.run(model, [row(), row(long), row(long + "and a blue star")])
    assert [out["prompt_truncated"] for out in made] == [False, True, True]
    assert np.array_equal(made[1]["image"], made[2]["image"])
    with pytest.raises(RowRefused, match="more tokens than the text encoder takes") as caught:
        Txt2Img(model="x", long_prompts="error").run(model, [row(), row(long)])
    assert caught.value.kind == "prompt.too_long"
