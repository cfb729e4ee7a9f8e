"""What a model folder says of itself, read from its JSON files alone: no torch, no weights."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ldm_ops.schedulers import is_flow, scheduler_name

PLAIN_UPSCALER = "LDMSuperResolutionPipeline"
"""The upscaler that knows the image alone."""

UPSCALERS = (PLAIN_UPSCALER, "StableDiffusionUpscalePipeline")
DEFAULT_SCALE = 0.18215  # diffusers' own for an AutoencoderKL that states none, as the first ones do
AUTOENCODES = frozenset({"encode", "decode"})
PROMPT_ENCODERS: dict[str, tuple[str | None, ...]] = {
    "StableDiffusionPipeline": ("prompt_embeds",),
    "StableDiffusionInpaintPipeline": ("prompt_embeds",),
    "StableDiffusionXLPipeline": ("prompt_embeds", None, "pooled_prompt_embeds"),
    "StableDiffusionXLInpaintPipeline": ("prompt_embeds", None, "pooled_prompt_embeds"),
    "StableDiffusion3Pipeline": ("prompt_embeds", None, "pooled_prompt_embeds"),
    "FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds"),
    "PixArtAlphaPipeline": ("prompt_embeds", "prompt_attention_mask"),
    "PixArtSigmaPipeline": ("prompt_embeds", "prompt_attention_mask"),
}
"""Pipelines whose `encode_prompt` is known, and what it returns, in order; None is what belongs to guidance."""

WITH_T5 = frozenset({"StableDiffusion3Pipeline", "FluxPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline"})
"""Those of them that take a `max_sequence_length`."""

PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


class ModelFacts(BaseModel, frozen=True):
    """Sizes in pixels. `size_multiple`: height and width must be multiples of it. `ops`: what it can be used for.
    `max_noise_level`: of an upscaler with a prompt.
    `folder` is where all this was read."""

    pipeline: str
    size_multiple: int
    default_height: int
    default_width: int
    scheduler: str
    flow_matching: bool
    has_safety_checker: bool
    ops: frozenset[str]
    latent_scale: float = 1.0
    latent_shift: float = 0.0
    latent_factor: int = 8
    max_noise_level: int | None = None
    folder: str = ""


class NotAModel(ValueError):
    """A folder that cannot be loaded, with what to do about it."""


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NotAModel(f"{path} is not valid JSON ({error}); download the model again") from None
    if not isinstance(value, dict):
        raise NotAModel(f"{path} holds a {type(value).__name__}, not an object; download the model again")
    return value


def describe(folder: Path) -> ModelFacts:
    """Read a folder in diffusers' layout.

    Raises:
        NotAModel: no model_index.json, code of its own, pickled weights without safetensors, a config of wrong types.
    """
    try:
        return _describe(folder)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        if isinstance(error, NotAModel):
            raise
        raise NotAModel(
            f"{folder}: a config.json holds a value of the wrong type ({error}); download it again"
        ) from None


def _describe(folder: Path) -> ModelFacts:
    index = _read(folder / "model_index.json")
    alone = _read(folder / "config.json")
    if not index and alone.get("_class_name") == "AutoencoderKL":
        return _autoencoder(folder, alone)
    if not index:
        raise NotAModel(f"{folder} has no model_index.json; give a folder in diffusers' layout (save_pretrained)")
    pipeline = index.get("_class_name")
    components = {
        name: value
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[0] is not None
    }
    for name, (library, cls) in components.items():
        if (folder / f"{library}.py").exists() or (folder / name / f"{library}.py").exists():
            raise NotAModel(f"{folder}: {name} runs code from the folder itself ({library}.py, {cls}); not allowed")
    if not isinstance(pipeline, str):
        raise NotAModel(f"{folder}: custom pipelines are not allowed (_class_name {pipeline!r})")
    for name in components:
        part = folder / name
        if not part.is_dir():
            raise NotAModel(
                f"{folder}: model_index.json names {name}, but there is no such folder; the copy is not whole"
            )
        pickled = sorted(p.name for p in part.iterdir() if p.suffix in PICKLED)
        if pickled and not any(p.suffix == ".safetensors" for p in part.iterdir()):
            raise NotAModel(
                f"{folder}: {name} holds no safetensors ({pickled[0]} is pickled, which can run code when loaded); "
                "convert it with pipeline.save_pretrained(folder, safe_serialization=True)"
            )
    if not any(folder.rglob("*.safetensors")):
        raise NotAModel(f"{folder} holds no *.safetensors; save it with save_pretrained(safe_serialization=True)")
    vae = _read(folder / "vae" / "config.json")
    channels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or [0] * 4
    factor = 2 ** (len(channels) - 1)
    is_unet = "unet" in components
    backbone = _read(folder / ("unet" if is_unet else "transformer") / "config.json")
    sample = backbone.get("sample_size") or 128
    height, width = (sample, sample) if isinstance(sample, int) else (int(sample[0]), int(sample[1]))
    scheduler = str(_read(folder / "scheduler" / "scheduler_config.json").get("_class_name", ""))
    with contextlib.suppress(ValueError):  # A class that only this model uses keeps its name.
        scheduler = scheduler_name(scheduler)
    return ModelFacts(
        pipeline=pipeline,
        size_multiple=max(8, factor) if is_unet else 2 * factor,
        default_height=height * factor,
        default_width=width * factor,
        scheduler=scheduler,
        flow_matching=is_flow(scheduler),
        has_safety_checker="safety_checker" in components,
        ops=_ops(pipeline, vae),
        latent_scale=vae.get("scaling_factor") or DEFAULT_SCALE,
        latent_shift=vae.get("shift_factor") or 0.0,
        latent_factor=factor,
        max_noise_level=index.get("max_noise_level"),
        folder=str(folder),
    )


def _ops(pipeline: str, vae: dict[str, Any]) -> frozenset[str]:
    if pipeline in UPSCALERS:
        return frozenset({"upscale"})
    ops = {"txt2img", "img2img", "inpaint"}
    if vae.get("_class_name") == "AutoencoderKL":
        ops |= AUTOENCODES
    return frozenset(ops | {"embed"} if pipeline in PROMPT_ENCODERS else ops)


def _autoencoder(folder: Path, config: dict[str, Any]) -> ModelFacts:
    """Facts of a folder that holds an autoencoder and nothing else."""
    if not any(folder.glob("*.safetensors")):
        raise NotAModel(f"{folder} holds no *.safetensors; save it with save_pretrained(safe_serialization=True)")
    factor = 2 ** (len(config.get("block_out_channels") or [0] * 4) - 1)
    return ModelFacts(
        pipeline="AutoencoderKL",
        size_multiple=max(8, factor),
        default_height=0,
        default_width=0,
        scheduler="",
        flow_matching=False,
        has_safety_checker=False,
        ops=AUTOENCODES,
        latent_scale=config.get("scaling_factor") or DEFAULT_SCALE,
        latent_shift=config.get("shift_factor") or 0.0,
        latent_factor=factor,
        folder=str(folder),
    )
