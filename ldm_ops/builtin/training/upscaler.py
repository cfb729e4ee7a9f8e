"""Train the VQ autoencoder (f = 4) and the U-Net of `builtin:shapes-x4`, on crops."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, LDMSuperResolutionPipeline, UNet2DModel, VQModel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ldm_ops.builtin.draw import draw
from ldm_ops.builtin.training.captions import EVAL_SEED, choose, learning_rate, split
from ldm_ops.builtin.training.degrade import SCALE, scene, shrink, wear

log = logging.getLogger("train_shapes_x4")

CODES = 8192
SCENES = 0.25  # share of training crops; the rest are captioned drawings
CROP_PX = 64  # the autoencoder's: many small crops teach more than few large ones
LARGE_CROP_PX = 128  # the end of the autoencoder's training, and the U-Net's
VQ_CHANNELS = (16, 48, 64)
UNET_CHANNELS = (48, 64, 96)
PULL_STEPS = 600  # at the beginning, in which latents are pulled towards the small picture
LATENT_NOISE = 0.05  # of the latents' deviation, in place of a codebook, whose search costs twice the rest
CODEBOOK_STEPS = 0.12  # share of the steps at the end, with the codebook
PLAIN_SHARE = 0.5  # of the small pictures that are only shrunk, not worn


def to_BCHW(pictures: list[NDArray[np.uint8]], device: torch.device) -> Tensor:
    """(H, W, 3) uint8 each → images_BCHW, float32 in [-1, 1], channels last."""
    images = torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return images.contiguous(memory_format=torch.channels_last)


def crops(rng: np.random.Generator, count: int, size_px: int) -> list[NDArray[np.uint8]]:
    """Sharp pictures of `size_px`: scenes, and pieces of the captioned drawings."""
    train, _ = split()
    pictures = []
    for _ in range(count):
        if rng.random() < SCENES:
            pictures.append(scene(rng, size_px))
            continue
        whole = draw(choose(train, rng, 1)[0], rng, SCALE)
        y, x = rng.integers(0, whole.shape[0] - size_px, 2)
        pictures.append(whole[y : y + size_px, x : x + size_px])
    return pictures


def new_vqvae() -> VQModel:
    levels = len(VQ_CHANNELS)
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=VQ_CHANNELS,
        layers_per_block=1,
        latent_channels=3,
        num_vq_embeddings=CODES,
        # One group: with several, normalisation wipes out what a plain color is.
        norm_num_groups=1,
        sample_size=256,
        scaling_factor=1.0,
        # Without attention every output pixel has a finite field of view, so tiles can be computed apart.
        mid_block_add_attention=False,
    )


@torch.inference_mode()
def vq_psnr(vqvae: VQModel, device: torch.device, quantized: bool, count: int = 40) -> float:
    _, held_out = split()
    rng = np.random.default_rng(EVAL_SEED)
    errors = []
    for _ in range(count // 10):
        images = to_BCHW([draw(c, rng, SCALE) for c in choose(held_out, rng, 10)], device)
        again = vqvae.decode(vqvae.encode(images).latents, force_not_quantize=not quantized).sample.clamp(-1, 1)
        errors.append(((again - images) / 2).square().mean().item())
    return -10 * math.log10(float(np.mean(errors)))


@torch.no_grad()
def lay_codebook(vqvae: VQModel, latents: Tensor) -> None:
    """Give the latents deviation 1 in all, without changing what is decoded, and put the codes where latents are."""
    sigma = latents.std()
    vqvae.quant_conv.weight /= sigma
    vqvae.quant_conv.bias /= sigma
    vqvae.post_quant_conv.weight *= sigma
    points = (latents / sigma).permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    # Half of them where the latents are dense, half spread over all that occurs: edges are rare and need codes too.
    order = torch.randperm(len(points), device=points.device)
    dense, pool = points[order[: CODES // 2]], points[order[CODES // 2 : CODES // 2 + 40_000]]
    spread = [pool[0]]
    distance = (pool - spread[0]).square().sum(1)
    for _ in range(CODES // 2 - 1):
        spread.append(pool[distance.argmax()])
        distance = torch.minimum(distance, (pool - spread[-1]).square().sum(1))
    vqvae.quantize.embedding.weight.copy_(torch.cat([dense, torch.stack(spread)]))


def train_vqvae(out: Path, steps: int, batch_size: int, device: torch.device) -> None:
    """Most steps as a plain autoencoder under a little noise; then a codebook is laid over the latents, and used."""
    torch.manual_seed(11)
    rng = np.random.default_rng(11)
    vqvae = new_vqvae().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vqvae.parameters(), lr=5e-4, betas=(0.9, 0.99), weight_decay=1e-4)
    laid_at = steps - int(steps * CODEBOOK_STEPS)
    start = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 6e-4)
        late = step >= laid_at
        size_px, count = (LARGE_CROP_PX, batch_size // 4) if late else (CROP_PX, batch_size)
        images = to_BCHW(crops(rng, count, size_px), device)
        if step == laid_at:
            with torch.no_grad():
                batches = [to_BCHW(crops(rng, batch_size, CROP_PX), device) for _ in range(16)]
                lay_codebook(vqvae, torch.cat([vqvae.encode(batch).latents for batch in batches]))
        with torch.autocast(device.type, torch.bfloat16):
            latents = vqvae.encode(images).latents
        latents = latents.float()
        bound = latents.new_zeros(())
        if late:
            given, loss_vq, _ = vqvae.quantize(latents)
            bound = 0.25 * loss_vq
        else:
            given = latents + LATENT_NOISE * latents.std().detach() * torch.randn_like(latents)
        if step < PULL_STEPS:
            # Without, half of all beginnings never learn more than one axis of color.
            bound = (latents - nn.functional.avg_pool2d(images, SCALE)).square().mean()
        with torch.autocast(device.type, torch.bfloat16):
            again = vqvae.decoder(vqvae.post_quant_conv(given))
        error = again.float() - images
        loss = error.abs().mean() + 2 * error.square().mean() + bound
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vqvae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            vqvae.eval()
            log.info(
                "vq %d/%d  loss %.4f  held-out %.2f dB%s  %.0f crops/s",
                step + 1,
                steps,
                loss.item(),
                vq_psnr(vqvae, device, quantized=late),
                "" if late else " without a codebook",
                count / ((time.monotonic() - start) / (step + 1)),
            )
            vqvae.train()
            vqvae.save_pretrained(out / "vqvae")


def new_unet() -> UNet2DModel:
    levels = len(UNET_CHANNELS)
    return UNet2DModel(
        sample_size=64,
        in_channels=6,
        out_channels=3,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        block_out_channels=UNET_CHANNELS,
        layers_per_block=1,
        norm_num_groups=16,
        add_attention=False,
        resnet_time_scale_shift="scale_shift",
    )


def noise_scheduler() -> DDIMScheduler:
    # The pipeline hands the small picture through scale_model_input too, which only leaves it alone in samplers of this
    # family.
    return DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


@torch.inference_mode()
def cache_pairs(vqvae: VQModel, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(latents, small pictures), each (count, 3, LARGE_CROP_PX / 4, LARGE_CROP_PX / 4) in fp16."""
    rng = np.random.default_rng(13)
    latents, smalls = [], []
    for _ in range(count // 50):
        sharp = crops(rng, 50, LARGE_CROP_PX)
        small = [shrink(p) if rng.random() < PLAIN_SHARE else wear(p, rng) for p in sharp]
        with torch.autocast(device.type, torch.bfloat16):
            latents.append(vqvae.encode(to_BCHW(sharp, device)).latents.half())
        smalls.append(to_BCHW(small, device).half())
    return torch.cat(latents), torch.cat(smalls)


def compare(
    pipe: LDMSuperResolutionPipeline, device: torch.device, count: int, steps: int, worn: bool
) -> dict[str, float]:
    """Held-out drawings, 64 → 256 px: PSNR in dB of the model and of bicubic interpolation against the true picture."""
    _, held_out = split()
    rng = np.random.default_rng(EVAL_SEED + 1)
    ours, bicubic = [], []
    for start in range(0, count, 10):
        sharp = [draw(c, rng, SCALE) for c in choose(held_out, rng, 10)]
        small = [wear(p, rng) if worn else shrink(p) for p in sharp]
        generators = [torch.Generator().manual_seed(start + i) for i in range(10)]
        made = pipe(to_BCHW(small, device), num_inference_steps=steps, generator=generators, output_type="pt").images
        pixels = (made.permute(0, 2, 3, 1).float() * 255).round().cpu().numpy()
        for i, truth in enumerate(sharp):
            size = (truth.shape[1], truth.shape[0])
            plain = np.asarray(Image.fromarray(small[i]).resize(size, Image.Resampling.BICUBIC), dtype=float)
            ours.append(np.square(pixels[i] - truth).mean())
            bicubic.append(np.square(plain - truth).mean())
    return {
        "model_db": 10 * math.log10(255**2 / float(np.mean(ours))),
        "bicubic_db": 10 * math.log10(255**2 / float(np.mean(bicubic))),
    }


def train_unet(out: Path, steps: int, batch_size: int, cache: int, device: torch.device) -> None:
    torch.manual_seed(15)
    rng = np.random.default_rng(15)
    vqvae = VQModel.from_pretrained(out / "vqvae").to(device, memory_format=torch.channels_last).eval()
    latents, smalls = cache_pairs(vqvae, cache, device)
    log.info("cached %d pairs, latents' std %.3f", len(latents), latents.float().std().item())
    unet = new_unet().to(device, memory_format=torch.channels_last)
    log.info("unet %.2f M parameters", sum(p.numel() for p in unet.parameters()) / 1e6)
    smooth = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)  # type: ignore[no-untyped-call] # torch's own
    average = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=smooth, use_buffers=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-2)
    alphas = noise_scheduler().alphas_cumprod.to(device)
    start = time.monotonic()
    running = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1.5e-3)
        chosen = torch.from_numpy(rng.integers(0, len(latents), batch_size))
        clean_BCHW, small_BCHW = latents[chosen].float(), smalls[chosen].float()
        noise_BCHW = torch.randn_like(clean_BCHW)
        # One timestep per stratum, as in `builtin:shapes`.
        t = ((torch.arange(batch_size) + torch.rand(batch_size)) / batch_size * 1000).long().clamp(max=999).to(device)
        a, s = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        given_BCHW = torch.cat([a * clean_BCHW + s * noise_BCHW, small_BCHW], 1)
        with torch.autocast(device.type, torch.bfloat16):
            guess_BCHW = unet(given_BCHW.contiguous(memory_format=torch.channels_last), t).sample
        loss = (guess_BCHW.float() - (a * noise_BCHW - s * clean_BCHW)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update_parameters(unet)
        running += loss.item()
        if (step + 1) % 100 == 0:
            speed = batch_size * (step + 1) / (time.monotonic() - start)
            log.info("unet %d/%d  loss %.4f  %.0f crops/s", step + 1, steps, running / 100, speed)
            running = 0.0
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            pipe = LDMSuperResolutionPipeline(vqvae=vqvae, unet=average.module.eval(), scheduler=noise_scheduler())
            pipe.set_progress_bar_config(disable=True)
            pipe.save_pretrained(out / "pipeline")
            log.info("unet %d/%d  held-out %s", step + 1, steps, compare(pipe, device, 20, 20, worn=False))
