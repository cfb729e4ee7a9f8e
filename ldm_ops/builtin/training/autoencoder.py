"""Train the KL autoencoder, then its decoder alone."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from ldm_ops.builtin.draw import IMAGE_PX, Caption
from ldm_ops.builtin.training.captions import EVAL_SEED, choose, choose_hard, learning_rate, pictures, split

log = logging.getLogger("train_shapes")

VAE_CHANNELS = (16, 48, 96, 160)
LATENT_CHANNELS = 8
KL_WEIGHT = 2e-3  # per pixel and channel, against a mean absolute error
DECODER_NOISE = 0.1  # at most, of latents with deviation 1


def new_vae() -> AutoencoderKL:
    levels = len(VAE_CHANNELS)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_PX,
    )


@torch.inference_mode()
def psnr(vae: AutoencoderKL, captions: list[Caption], device: torch.device, count: int = 400) -> float:
    """Reconstruction of held-out pictures in dB: 10·log10(1 / mean squared error over all of them)."""
    rng = np.random.default_rng(EVAL_SEED)
    errors = []
    for _ in range(count // 50):
        images = pictures(choose(captions, rng, 50), rng, device)
        again = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append(((again - images) / 2).square().mean().item())
    return -10 * math.log10(float(np.mean(errors)))


def train_vae(out: Path, steps: int, batch_size: int, device: torch.device) -> None:
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    train, held_out = split()
    vae = new_vae().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    start = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1.5e-3)
        images = pictures(choose(train, rng, batch_size), rng, device)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            again = vae.decode(posterior.sample()).sample
        error = again.float() - images
        kl = posterior.kl().float().mean() / images[0].numel()
        loss = error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            vae.eval()
            log.info(
                "vae %d/%d  loss %.4f  kl %.0f  held-out %.2f dB  %.0f images/s",
                step + 1,
                steps,
                loss.item(),
                kl.item() * images[0].numel(),
                psnr(vae, held_out, device),
                batch_size * (step + 1) / (time.monotonic() - start),
            )
            vae.train()
            vae.save_pretrained(out / "vae")


def train_decoder(out: Path, steps: int, batch_size: int, device: torch.device) -> None:
    """Go on with the decoder of OUT/pipeline alone; the latents, and so the U-Net's work, stay what they are.

    It learns on pictures that blur most and on latents with a little noise, as a U-Net leaves them.
    """
    torch.manual_seed(6)
    rng = np.random.default_rng(6)
    train, held_out = split()
    vae = AutoencoderKL.from_pretrained(out / "pipeline" / "vae").to(device, memory_format=torch.channels_last)
    vae.requires_grad_(False)
    learned = [*vae.decoder.requires_grad_(True).parameters(), *vae.post_quant_conv.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(learned, lr=5e-4, betas=(0.9, 0.99), weight_decay=1e-4)
    start = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 5e-4)
        images = pictures(choose_hard(train, rng, batch_size), rng, device)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(images).latent_dist.sample()
                spread = DECODER_NOISE * torch.rand(batch_size, 1, 1, 1, device=device)
                latents = latents + spread * torch.randn_like(latents)
            again = vae.decode(latents).sample
        error = again.float() - images
        loss = error.abs().mean() + 2 * error.square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            vae.eval()
            log.info(
                "decoder %d/%d  loss %.4f  held-out %.2f dB  %.0f images/s",
                step + 1,
                steps,
                loss.item(),
                psnr(vae, held_out, device),
                batch_size * (step + 1) / (time.monotonic() - start),
            )
            vae.train()
            vae.save_pretrained(out / "pipeline" / "vae")


@torch.no_grad()
def whiten(vae: AutoencoderKL, captions: list[Caption], device: torch.device) -> None:
    """Give every latent channel mean 0 and deviation 1 over the training set, and the decoder the inverse.

    The scale goes into the two 1×1 convolutions beside the latents, so the autoencoder computes the same pictures, and
    `scaling_factor` is exactly 1.
    """
    rng = np.random.default_rng(2)
    means_BCHW = torch.cat(
        [vae.encode(pictures(choose(captions, rng, 100), rng, device)).latent_dist.mean for _ in range(20)]
    )
    mu, sigma = means_BCHW.mean((0, 2, 3)), means_BCHW.std((0, 2, 3))
    log.info("latents before whitening: mean %s  std %s", mu.tolist(), sigma.tolist())
    channels = vae.config.latent_channels
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    weight[:channels] /= sigma[:, None, None, None]
    bias[:channels] = (bias[:channels] - mu) / sigma
    bias[channels:] -= 2 * sigma.log()
    weight = vae.post_quant_conv.weight
    vae.post_quant_conv.bias += (weight[:, :, 0, 0] * mu).sum(1)
    weight *= sigma[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)
