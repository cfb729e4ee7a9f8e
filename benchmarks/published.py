"""Pipelines of published shapes with random weights, for measuring and testing without any download.

The numbers are the `config.json` files of Stable Diffusion 1.5, 2.1, XL and x4-upscaler on the hub. Only the
vocabulary is the small one of `builtin:shapes`: which token is looked up costs nothing. `shrink` divides every width,
so that the same code runs on a laptop.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm_ops.builtin.words import write_tokenizer

MAX_TOKENS = 77


def tokenizer() -> CLIPTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        words = write_tokenizer(Path(folder))
    words.model_max_length = MAX_TOKENS
    return words


def _text(words: CLIPTokenizer, width: int, layers: int, heads: int, shrink: int, **config: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width // shrink,
        intermediate_size=4 * width // shrink,
        num_hidden_layers=max(1, layers // shrink),
        num_attention_heads=max(1, heads // shrink),
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **config,
    )


def _vae(shrink: int, widths: tuple[int, ...] = (128, 256, 512, 512), **config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(width // shrink for width in widths),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32 // shrink,
        **config,
    )


def _unet(shrink: int, widths: tuple[int, ...], attention: tuple[bool, ...], **config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        block_out_channels=tuple(width // shrink for width in widths),
        norm_num_groups=32 // shrink,
        **config,
    )


def _noise(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=False,
    )


def stable_diffusion_15(shrink: int) -> StableDiffusionPipeline:
    words = tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(shrink, sample_size=512, scaling_factor=0.18215),
        text_encoder=CLIPTextModel(_text(words, 768, 12, 12, shrink)),
        tokenizer=words,
        unet=_unet(
            shrink,
            (320, 640, 1280, 1280),
            (True, True, True, False),
            sample_size=64,
            cross_attention_dim=768 // shrink,
            attention_head_dim=8,
        ),
        scheduler=_noise("epsilon"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_21(shrink: int) -> StableDiffusionPipeline:
    words = tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(shrink, sample_size=768, scaling_factor=0.18215),
        text_encoder=CLIPTextModel(_text(words, 1024, 23, 16, shrink, hidden_act="gelu")),
        tokenizer=words,
        unet=_unet(
            shrink,
            (320, 640, 1280, 1280),
            (True, True, True, False),
            sample_size=96,
            cross_attention_dim=1024 // shrink,
            attention_head_dim=tuple(max(1, heads // shrink) for heads in (5, 10, 20, 20)),
            use_linear_projection=True,
        ),
        scheduler=_noise("v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(shrink: int) -> StableDiffusionXLPipeline:
    words = tokenizer()
    pooled = 1280 // shrink
    return StableDiffusionXLPipeline(
        vae=_vae(shrink, sample_size=1024, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(_text(words, 768, 12, 12, shrink)),
        text_encoder_2=CLIPTextModelWithProjection(
            _text(words, 1280, 32, 20, shrink, hidden_act="gelu", projection_dim=pooled)
        ),
        tokenizer=words,
        tokenizer_2=words,
        unet=_unet(
            shrink,
            (320, 640, 1280),
            (False, True, True),
            sample_size=128,
            cross_attention_dim=2048 // shrink,
            attention_head_dim=tuple(max(1, heads // shrink) for heads in (5, 10, 20)),
            transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=6 * 256 + pooled,
        ),
        scheduler=_noise("epsilon"),
    )


def stable_diffusion_x4(shrink: int) -> StableDiffusionUpscalePipeline:
    words = tokenizer()
    return StableDiffusionUpscalePipeline(
        vae=_vae(shrink, (128, 256, 512), sample_size=256, scaling_factor=0.08333),
        text_encoder=CLIPTextModel(_text(words, 1024, 23, 16, shrink, hidden_act="gelu")),
        tokenizer=words,
        unet=_unet(
            shrink,
            (256, 512, 512, 1024),
            (False, True, True, True),
            sample_size=128,
            in_channels=7,
            out_channels=4,
            cross_attention_dim=1024 // shrink,
            attention_head_dim=8,
            num_class_embeds=1000,
            only_cross_attention=(True, True, True, False),
            use_linear_projection=True,
        ),
        low_res_scheduler=DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear"),
        scheduler=_noise("v_prediction"),
        max_noise_level=350,
    )


PIPELINES: dict[str, Callable[[int], Any]] = {
    "sd15": stable_diffusion_15,
    "sd21": stable_diffusion_21,
    "sdxl": stable_diffusion_xl,
    "sd_x4": stable_diffusion_x4,
}


def tiny_vae(folder: Path) -> Path:
    """An AutoencoderTiny of diffusers' own numbers, which are TAESD's; seeded, saved under `folder`."""
    target = folder / "tiny_vae"
    if not target.exists():
        torch.manual_seed(0)
        AutoencoderTiny().save_pretrained(target)
    return target


def save(name: str, folder: Path, device: str, dtype: torch.dtype, shrink: int = 1) -> Path:
    """Make one of PIPELINES on the device, seeded, and save it as diffusers does; returns its folder."""
    target = folder / name
    if not (target / "model_index.json").exists():
        torch.manual_seed(0)
        with torch.device(device):
            pipe = PIPELINES[name](shrink)
        pipe.to(device, dtype)
        pipe.save_pretrained(target, safe_serialization=True)
    return target
