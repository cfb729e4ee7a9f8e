"""Each distinct prompt is encoded once, and nobody can tell from the pictures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from ldm_ops.prompts import Prompts
from ldm_ops.sampling import Pipeline
from ldm_ops.txt2img import Txt2Img
from ldm_ops.upscale import Upscale
from tests import models
from tests.ldm_ops.rows import picture, row

PROMPTS = ["a red circle", "a small blue star on a white background", "a green cross", "a pink square"]
SIZE = {"height": 64, "width": 64}


def sdxl_without_zeros() -> Any:
    pipe = models.tiny_sdxl()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    return pipe


FAMILIES: dict[str, Callable[[], Any]] = {
    "sd": models.tiny_stable_diffusion,
    "sdxl": models.tiny_sdxl,
    "sdxl-refined": sdxl_without_zeros,
    "sd3": models.tiny_sd3,
    "flux": models.whole_flux,
    "pixart": models.whole_pixart,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("families") / name for name in FAMILIES}
    for name, folder in made.items():
        if name == "sd3":
            models.save_sd3(folder)
        else:
            FAMILIES[name]().save_pretrained(folder)
    return made


def rows(prompts: list[str], name: str = "sd", **values: Any) -> list[dict[str, Any]]:
    scheduler = "flow_euler" if name in ("sd3", "flux") else "ddim"
    common = {"num_inference_steps": 2, "scheduler": scheduler, **SIZE}
    return [row(prompt, seed=seed, **common | values) for seed, prompt in enumerate(prompts)]


def encoders(pipe: Any) -> list[Any]:
    return [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None]


@contextmanager
def counted(pipe: Any) -> Iterator[list[int]]:
    """The rows of each call of the pipeline's first text encoder."""
    calls: list[int] = []

    def note(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = arguments[0] if arguments else named["input_ids"]
        calls.append(len(ids))

    hook = encoders(pipe)[0].register_forward_pre_hook(note, with_kwargs=True)
    yield calls
    hook.remove()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_picture_is_the_one_of_a_pipeline_that_is_called_with_the_prompt(name: str, folders: dict[str, Path]) -> None:
    op = Txt2Img(model="x")
    model = op.load(folders[name])
    assert model.prompts is not None
    parts = {part: None for part in ("text_encoder_3", "tokenizer_3") if name == "sd3"}
    plain = DiffusionPipeline.from_pretrained(folders[name], **parts)
    for guidance, negative in ((3.0, ""), (3.0, "a blue ring"), (1.0, "")):
        asked = rows(PROMPTS[:2], name, guidance_scale=guidance, negative_prompt=negative)
        expected = [
            plain(
                [one["prompt"]],
                **({"negative_prompt": [negative]} if negative else {}),
                **SIZE,
                num_inference_steps=2,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(one["seed"])],
                output_type="np",
            ).images[0]
            for one in asked
        ]
        # The second time without the text encoders.
        for _ in range(2):
            for one, wanted in zip(asked, expected, strict=True):
                made = op.run(model, [one])[0]["image"]
                assert np.array_equal(made, (wanted * 255).round().astype("uint8")), (guidance, negative)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_embedding_does_not_depend_on_neighbours_or_on_what_was_encoded_before(
    name: str, folders: dict[str, Path]
) -> None:
    def given(model: Pipeline, prompts: list[str]) -> dict[str, torch.Tensor]:
        assert model.prompts is not None
        with torch.inference_mode():
            found = model.prompts.arguments(model.pipe, prompts, ["a ring"] * len(prompts), True, ())
        return {name: value for name, value in found.items() if value is not None}

    op = Txt2Img(model="x")
    warm = op.load(folders[name])
    forth = given(warm, PROMPTS)
    again = given(warm, PROMPTS)
    back = given(op.load(folders[name]), PROMPTS[::-1])
    twice = given(op.load(folders[name]), [PROMPTS[i] for i in (2, 2, 1, 2)])
    assert {"flux": 2, "sd": 2}.get(name, 4) == len(forth)
    for part, wanted in forth.items():
        assert torch.equal(again[part], wanted)
        assert torch.equal(back[part].flip(0), wanted)
        assert torch.equal(twice[part], wanted[[2, 2, 1, 2]])
        assert wanted.is_contiguous()


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_have_the_bits_that_the_pipeline_gives_for_the_whole_batch(
    name: str, folders: dict[str, Path]
) -> None:
    model = Txt2Img(model="x").load(folders[name])
    assert model.prompts is not None
    known = inspect.signature(model.pipe.encode_prompt).parameters
    more = {k: None for k in ("prompt_2", "prompt_3") if k in known}
    guided = "do_classifier_free_guidance" in known
    with torch.inference_mode():
        given = model.prompts.arguments(model.pipe, PROMPTS, [""] * 4, guided, ())
        more |= {"do_classifier_free_guidance": True, "negative_prompt": [""] * 4} if guided else {}
        found = model.pipe.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, **more)
    wanted = [x for x in found if x is not None and len(x) == len(PROMPTS)]
    assert len(wanted) == len([x for x in given.values() if x is not None])
    for x in given.values():
        assert x is None or any(x.shape == y.shape and torch.equal(x, y) for y in wanted)


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart"])
def test_each_distinct_prompt_goes_through_the_text_encoder_once(name: str, folders: dict[str, Path]) -> None:
    op = Txt2Img(model="x")
    model = op.load(folders[name])
    asked = rows(PROMPTS * 10, name, negative_prompt="a ring", num_inference_steps=1)
    with counted(model.pipe) as calls:
        for first in range(0, len(asked), 8):
            op.run(model, asked[first : first + 8])
    assert calls == [1] * (len(PROMPTS) + 1)


def test_a_negative_prompt_that_guidance_does_not_ask_for_is_not_encoded(folders: dict[str, Path]) -> None:
    op = Txt2Img(model="x")
    for name, guidance, negative, expected in (
        ("sd", 3.0, "", 2),
        ("sd", 1.0, "a ring", 1),
        ("sdxl", 3.0, "", 1),  # it takes zeros
        ("sdxl-refined", 3.0, "", 2),
        ("flux", 3.0, "a ring", 1),
    ):
        model = op.load(folders[name])
        with counted(model.pipe) as calls:
            op.run(model, rows(PROMPTS[:1], name, guidance_scale=guidance, negative_prompt=negative))
        assert sum(calls) == expected, (name, guidance, negative)


def test_the_cache_forgets_what_was_not_used_for_longest_and_stays_within_its_bytes(folders: dict[str, Path]) -> None:
    op = Txt2Img(model="x")
    model = op.load(folders["sd"])
    expected = [out["image"] for out in op.run(model, rows(PROMPTS, guidance_scale=1.0))]
    assert model.prompts is not None
    each = model.prompts.num_bytes // len(PROMPTS)
    assert each == 32 * models.WIDTH * 4
    small = model.prompts = Prompts.of(model.pipe, "StableDiffusionPipeline")
    assert small is not None
    small.max_bytes = 2 * each + 1
    with counted(model.pipe) as calls:
        # More at once than it holds, too.
        made = [out["image"] for out in op.run(model, rows(PROMPTS, guidance_scale=1.0))]
        assert (len(calls), small.num_bytes, len(small.held)) == (4, 2 * each, 2)
        op.run(model, rows([PROMPTS[2], PROMPTS[0], PROMPTS[2]], guidance_scale=1.0))
        assert len(calls) == 5
        op.run(model, rows([PROMPTS[2]], guidance_scale=1.0))
        assert len(calls) == 5
        op.run(model, rows([PROMPTS[3]], guidance_scale=1.0))
        assert len(calls) == 6
    assert all(np.array_equal(a, b) for a, b in zip(made, expected, strict=True))


def test_a_prompt_is_encoded_anew_where_a_lora_changes_the_text_encoder_and_only_there(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    ink = models.save_lora(models.tiny_stable_diffusion(), tmp_path / "ink", 1)
    pen = models.save_lora(models.tiny_stable_diffusion(), tmp_path / "pen", 2, text=True)
    op = Txt2Img(model="x")
    model = op.load(folders["sd"])
    counts = []
    for loras in ((), ((ink, 1.0),), ((pen, 1.0),), ((pen, 0.5),), ((pen, 1.0),), ((ink, 1.0), (pen, 1.0)), ()):
        with counted(model.pipe) as calls:
            made = op.run(model, rows(PROMPTS[:1], loras=loras, guidance_scale=1.0))
        counts.append(sum(calls))
        fresh = op.run(op.load(folders["sd"]), rows(PROMPTS[:1], loras=loras, guidance_scale=1.0))
        assert np.array_equal(made[0]["image"], fresh[0]["image"])
    assert counts == [1, 0, 1, 1, 0, 1, 0]


def test_the_upscaler_with_a_prompt_encodes_it_once_and_the_one_without_none(tmp_path: Path) -> None:
    models.tiny_sd_x4().save_pretrained(tmp_path / "sd")
    models.tiny_ldm_x4().save_pretrained(tmp_path / "ldm")
    op = Upscale(model="x")
    model = op.load(tmp_path / "sd")
    asked = [row(prompt, seed=i, image=picture(16, 16)) for i, prompt in enumerate(PROMPTS[:2] * 2)]
    with counted(model.pipe) as calls:
        made = [op.run(model, [one])[0]["image"] for one in asked]
    assert calls == [1, 1, 1]
    assert len({one.tobytes() for one in made}) == 4
    assert op.load(tmp_path / "ldm").prompts is None


def test_a_pipeline_that_is_not_known_is_called_with_the_prompts(folders: dict[str, Path]) -> None:
    op = Txt2Img(model="x")
    model = op.load(folders["sd"])
    asked = rows(PROMPTS[:1], negative_prompt="a ring")
    wanted = op.run(model, asked)[0]["image"]
    assert Prompts.of(model.pipe, "SomePipeline") is None
    model.prompts = None
    with counted(model.pipe) as calls:
        assert np.array_equal(op.run(model, asked)[0]["image"], wanted)
    assert sum(calls) == 2


def test_every_parameter_that_is_handed_over_is_one_of_the_pipelines(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        model = Txt2Img(model="x").load(folder)
        assert model.prompts is not None
        with torch.inference_mode():
            given = model.prompts.arguments(model.pipe, ["a"], ["b"], True, ())
        assert given.keys() <= inspect.signature(model.pipe.__call__).parameters.keys(), name
