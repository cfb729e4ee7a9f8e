"""Train the text encoder and the U-Net on cached latents."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm_ops.builtin.draw import BACKGROUNDS, COLORS, IMAGE_PX, POSITIONS, SHAPES, SIZES, Caption
from ldm_ops.builtin.training.autoencoder import LATENT_CHANNELS, whiten
from ldm_ops.builtin.training.captions import (
    choose,
    choose_hard,
    held_out_sample,
    learning_rate,
    pictures,
    split,
)
from ldm_ops.builtin.training.score import score
from ldm_ops.builtin.words import MAX_TOKENS, write_tokenizer

log = logging.getLogger("train_shapes")

TEXT_WIDTH = 128
UNET_CHANNELS = (128, 192)
DROP_CAPTION = 0.10


@dataclass(frozen=True)
class Phase:
    """One stretch of training: its seed and peak learning rate, and how often a word is left out of a caption.

    `resume` goes on from OUT/pipeline, with fresh pictures and small shapes and stars more often.
    """

    seed: int
    peak: float
    drop_position: float
    drop_size: float
    drop_background: float
    resume: bool


FIRST = Phase(seed=5, peak=1e-3, drop_position=0.40, drop_size=0.08, drop_background=0.04, resume=False)
FINISH = Phase(seed=50, peak=6e-4, drop_position=0.15, drop_size=0.08, drop_background=0.04, resume=True)
# Words left out more often, so that a colour and a shape are learned apart from the company that they mostly keep.
POLISH = Phase(seed=51, peak=4e-4, drop_position=0.15, drop_size=0.25, drop_background=0.20, resume=True)


@torch.inference_mode()
def cache_latents(
    vae: AutoencoderKL, captions: list[Caption], count: int, phase: Phase, device: torch.device
) -> tuple[list[Caption], Tensor]:
    """`count` captioned pictures, and the mean and deviation of their latents (count, 2·C, 8, 8) in fp16."""
    rng = np.random.default_rng(phase.seed)
    draw_some = choose_hard if phase.resume else choose
    vae = vae.to(device, memory_format=torch.channels_last)
    chosen, moments = [], []
    for _ in range(count // 100):
        batch = draw_some(captions, rng, 100)
        images = pictures(batch, rng, device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
        chosen += batch
        moments.append(torch.cat([posterior.mean, posterior.std], 1).half())
    return chosen, torch.cat(moments)


def wording(caption: Caption, rng: np.random.Generator, phase: Phase) -> str:
    """The caption as a person may type it: words left out now and then, all of them for guidance."""
    if rng.random() < DROP_CAPTION:
        return ""
    size = "" if rng.random() < phase.drop_size else caption.size + " "
    where = f" {caption.position}" if caption.position and rng.random() >= phase.drop_position else ""
    paper = "" if rng.random() < phase.drop_background else f" on a {caption.background} background"
    return f"a {size}{caption.color} {caption.shape}{where}{paper}"


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=IMAGE_PX // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=UNET_CHANNELS,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        # The pooled caption joins the time embedding: colours and shapes are learned several times sooner than through
        # cross-attention alone.
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def teach_words(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[Caption], device: torch.device
) -> None:
    """A head start: read size, color, shape, background and position off the text encoder's last token."""
    answers = [list(SIZES), list(COLORS), list(SHAPES), list(BACKGROUNDS), ["", *POSITIONS]]
    heads = nn.ModuleList(nn.Linear(TEXT_WIDTH, len(a)) for a in answers).to(device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=1e-3)
    rng = np.random.default_rng(4)
    for _ in range(300):
        batch = choose(captions, rng, 128)
        tokens = tokenizer([str(c) for c in batch], padding="max_length", return_tensors="pt").input_ids.to(device)
        pooled = encoder(tokens).pooler_output
        loss = torch.zeros((), device=device)
        for head, words, field in zip(
            heads, answers, ("size", "color", "shape", "background", "position"), strict=True
        ):
            target = torch.tensor([words.index(getattr(c, field)) for c in batch], device=device)
            loss = loss + nn.functional.cross_entropy(head(pooled), target)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    log.info("words learned: cross-entropy %.4f", loss.item())


def noise_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def assemble(
    vae: AutoencoderKL, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=noise_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def train_unet(out: Path, steps: int, batch_size: int, cache: int, phase: Phase, device: torch.device) -> None:
    """Train from nothing on OUT/vae, or go on from OUT/pipeline."""
    torch.manual_seed(phase.seed)
    rng = np.random.default_rng(phase.seed)
    train, _ = split()
    tokenizer = write_tokenizer(out / "tokenizer")
    if phase.resume:
        vae = AutoencoderKL.from_pretrained(out / "pipeline" / "vae").to(device).eval()
        encoder = CLIPTextModel.from_pretrained(out / "pipeline" / "text_encoder").to(device)
        unet = UNet2DConditionModel.from_pretrained(out / "pipeline" / "unet")
    else:
        vae = AutoencoderKL.from_pretrained(out / "vae").to(device).eval()
        whiten(vae, train, device)
        encoder = new_text_encoder(tokenizer).to(device)
        teach_words(encoder, tokenizer, train, device)
        unet = new_unet()
    unet = unet.to(device, memory_format=torch.channels_last)
    encoder.train()
    unet.train()
    captions, moments = cache_latents(vae, train, cache, phase, device)
    log.info("cached %d latents, std %.3f", len(captions), moments[:, :LATENT_CHANNELS].float().std().item())
    log.info(
        "unet %.1f M, text encoder %.1f M parameters",
        *(sum(p.numel() for p in m.parameters()) / 1e6 for m in (unet, encoder)),
    )
    live = nn.ModuleList([unet, encoder])
    smooth = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)  # type: ignore[no-untyped-call] # torch's own
    average = torch.optim.swa_utils.AveragedModel(live, multi_avg_fn=smooth, use_buffers=True)
    optimizer = torch.optim.AdamW(live.parameters(), lr=phase.peak, betas=(0.9, 0.99), weight_decay=1e-2)
    alphas = noise_scheduler().alphas_cumprod.to(device)
    start = time.monotonic()
    running = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, phase.peak)
        chosen = rng.integers(0, len(captions), batch_size)
        mean, std = moments[chosen].float().chunk(2, 1)
        latents_BCHW = mean + std * torch.randn_like(mean)
        noise_BCHW = torch.randn_like(latents_BCHW)
        # One timestep per stratum: the loss of a small batch is then far less noisy.
        t = (
            ((torch.arange(batch_size, device=device) + torch.rand(batch_size, device=device)) / batch_size * 1000)
            .long()
            .clamp(max=999)
        )
        a, s = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        noisy_BCHW = (a * latents_BCHW + s * noise_BCHW).contiguous(memory_format=torch.channels_last)
        target_BCHW = a * noise_BCHW - s * latents_BCHW
        texts = [wording(captions[i], rng, phase) for i in chosen]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            states = encoder(tokens).last_hidden_state
            guess_BCHW = unet(noisy_BCHW, t, encoder_hidden_states=states).sample
        loss = (guess_BCHW.float() - target_BCHW).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(live.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update_parameters(live)
        running += loss.item()
        if (step + 1) % 100 == 0:
            log.info(
                "unet %d/%d  loss %.4f  %.0f latents/s",
                step + 1,
                steps,
                running / 100,
                batch_size * (step + 1) / (time.monotonic() - start),
            )
            running = 0.0
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            unet_average, encoder_average = average.module.eval().children()
            pipe = assemble(vae.eval(), encoder_average, tokenizer, unet_average)
            pipe.save_pretrained(out / "pipeline")
            log.info(
                "unet %d/%d  held-out %s",
                step + 1,
                steps,
                score(pipe, held_out_sample(200 if step + 1 == steps else 50)),
            )
