"""Captions to embeddings, held against what each pipeline's own encode_prompt gives in the same process."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm_ops.embed import Embed
from ldm_ops.op import RowRefused
from tests import models

CAPTIONS = ["a red circle", "", "a large blue ring on a white background", "a star"]
PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": models.tiny_stable_diffusion,
    "sdxl": models.tiny_sdxl,
    "sd3": models.tiny_sd3,
    "flux": models.tiny_flux,
    "pixart": models.tiny_pixart,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each pipeline as a folder without its denoiser and autoencoder, so that loading them would fail."""
    made = {}
    for name, build in PIPELINES.items():
        made[name] = tmp_path_factory.mktemp("text") / name
        if name == "sd3":
            models.save_sd3(made[name])
        else:
            build().save_pretrained(made[name])
        for part in ("unet", "transformer", "vae"):
            for weights in (made[name] / part).glob("*.safetensors"):
                weights.write_bytes(b"")
    return made


def rows(captions: list[str] = CAPTIONS) -> list[dict[str, Any]]:
    return [{"prompt": caption} for caption in captions]


def embed(folder: Path, captions: list[str] = CAPTIONS, **fields: Any) -> list[dict[str, Any]]:
    op = Embed(model="x", **fields)
    return op.run(op.load(folder), rows(captions))


def expected(name: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(prompt_embeds, attention mask, pooled) by the pipeline itself, in fp32."""
    pipe = PIPELINES[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    wanted = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False}
    known = inspect.signature(pipe.encode_prompt).parameters
    with torch.inference_mode():
        found = pipe.encode_prompt(
            CAPTIONS, device="cpu", num_images_per_prompt=1, **{k: v for k, v in wanted.items() if k in known}
        )
    places = {"sd": (0, None, None), "flux": (0, None, 1), "pixart": (0, 1, None)}.get(name, (0, None, 2))
    embeds, mask, pooled = (None if at is None else found[at] for at in places)
    return embeds, mask, pooled


@pytest.mark.parametrize("name", PIPELINES)
def test_an_embedding_is_what_the_pipeline_itself_encodes(name: str, folders: dict[str, Path]) -> None:
    embeds, mask, pooled = expected(name)
    made = embed(folders[name], store_dtype="fp32")
    for i, out in enumerate(made):
        wanted = embeds[i] if mask is None else embeds[i][mask[i].bool()]
        assert np.array_equal(out["prompt_embeds"], wanted.numpy())
        assert (out["pooled_prompt_embeds"] is None) == (pooled is None)
        assert pooled is None or np.array_equal(out["pooled_prompt_embeds"], pooled[i].numpy())
    for dtype, kind in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        rounded = embed(folders[name], store_dtype=dtype)
        for exact, out in zip(made, rounded, strict=True):
            for part in ("prompt_embeds", "pooled_prompt_embeds"):
                if exact[part] is not None:
                    assert (
                        out[part].tobytes()
                        == torch.from_numpy(exact[part]).to(kind).view(torch.int16).numpy().tobytes()
                    )


def test_only_padding_that_a_denoiser_masks_is_left_out(folders: dict[str, Path]) -> None:
    assert [len(out["prompt_embeds"]) for out in embed(folders["pixart"])] == [4, 1, 9, 3]
    assert {len(out["prompt_embeds"]) for out in embed(folders["sd"])} == {32}
    assert {len(out["prompt_embeds"]) for out in embed(folders["flux"])} == {512}
    assert {len(out["prompt_embeds"]) for out in embed(folders["flux"], max_sequence_length=16)} == {16}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_captions_embedding_does_not_depend_on_its_neighbours(name: str, folders: dict[str, Path]) -> None:
    forth, back = embed(folders[name]), embed(folders[name], CAPTIONS[::-1])[::-1]
    alone = [embed(folders[name], [caption] * 4)[0] for caption in CAPTIONS[:2]]
    for others in (back, alone):
        for a, b in zip(forth, others, strict=False):
            assert np.array_equal(a["prompt_embeds"], b["prompt_embeds"])


def test_a_caption_that_is_too_long_is_told_or_refused(folders: dict[str, Path]) -> None:
    long = ["a red circle " * 20, "a red circle"]
    assert [out["prompt_truncated"] for out in embed(folders["sd"], long)] == [True, False]
    assert [out["prompt_truncated"] for out in embed(folders["pixart"], long, max_sequence_length=8)] == [True, False]
    assert [out["prompt_truncated"] for out in embed(folders["pixart"], long)] == [False, False]
    with pytest.raises(RowRefused, match="more tokens than the text encoder takes"):
        embed(folders["sd"], long, long_prompts="error")


def test_nan_and_a_parameter_that_the_pipeline_lacks_are_refused(poisoned_model: Path, tiny_model: Path) -> None:
    with pytest.raises(RowRefused, match="holds NaN, or does not fit store_dtype"):
        embed(poisoned_model, ["a red ring"])
    with pytest.raises(ValueError, match="is a StableDiffusionPipeline, without a T5; leave max_sequence_length out"):
        embed(tiny_model, max_sequence_length=64)
