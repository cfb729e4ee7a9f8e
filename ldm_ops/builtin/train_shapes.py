"""Train `builtin:shapes` from nothing: `python -m ldm_ops.builtin.train_shapes OUT`.

Three steps, each resumable by itself because it leaves its result in OUT: the autoencoder, the text encoder with the
U-Net on cached latents, and the export to fp16 safetensors in diffusers' layout. Seeded; about two hours on two CPU
cores, minutes on a GPU. The recipe follows the latent diffusion paper (Rombach et al. 2022, arXiv:2112.10752):
KL-regularised autoencoder, latents rescaled by their component-wise standard deviation, classifier-free guidance by
dropping captions.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm_ops.builtin.draw import (
    BACKGROUNDS,
    COLORS,
    IMAGE_PX,
    POSITIONS,
    SHAPES,
    SIZES,
    Caption,
    all_captions,
    draw,
)
from ldm_ops.builtin.judge import judge
from ldm_ops.builtin.words import MAX_TOKENS, write_tokenizer

log = logging.getLogger("train_shapes")

VAE_CHANNELS = (16, 48, 96, 160)
LATENT_CHANNELS = 8
KL_WEIGHT = 2e-3  # per pixel and channel, against a mean absolute error
TEXT_WIDTH = 128
UNET_CHANNELS = (128, 192)
DROP_CAPTION, DROP_POSITION, DROP_SIZE, DROP_BACKGROUND = 0.10, 0.40, 0.08, 0.04
EVAL_SEED = 999


def split() -> tuple[list[Caption], list[Caption]]:
    """(training captions, held-out captions); no combination of attributes stands in both."""
    captions = all_captions()
    return (
        [c for c in captions if not c.is_held_out()],
        [c for c in captions if c.is_held_out()],
    )


def pictures(captions: list[Caption], rng: np.random.Generator, device: torch.device) -> Tensor:
    """Fresh pictures of `captions` as images_BCHW, float32 in [-1, 1]."""
    stack = np.stack([draw(c, rng) for c in captions])
    return torch.from_numpy(stack).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def choose(captions: list[Caption], rng: np.random.Generator, count: int) -> list[Caption]:
    return [captions[i] for i in rng.integers(0, len(captions), count)]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    along = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * along)))


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


@torch.inference_mode()
def cache_latents(
    vae: AutoencoderKL, captions: list[Caption], count: int, device: torch.device
) -> tuple[list[Caption], Tensor]:
    """`count` captioned pictures, and their moments (count, 2·C, 8, 8) in fp16."""
    rng = np.random.default_rng(3)
    vae = vae.to(device, memory_format=torch.channels_last)
    chosen, moments = [], []
    for _ in range(count // 100):
        batch = choose(captions, rng, 100)
        images = pictures(batch, rng, device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
        chosen += batch
        moments.append(torch.cat([posterior.mean, posterior.std], 1).half())
    return chosen, torch.cat(moments)


def wording(caption: Caption, rng: np.random.Generator) -> str:
    """The caption as a person may type it: words left out now and then, all of them for guidance."""
    if rng.random() < DROP_CAPTION:
        return ""
    size = "" if rng.random() < DROP_SIZE else caption.size + " "
    where = f" {caption.position}" if caption.position and rng.random() >= DROP_POSITION else ""
    paper = "" if rng.random() < DROP_BACKGROUND else f" on a {caption.background} background"
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


def score(pipe: StableDiffusionPipeline, captions: list[Caption], guidance_scale: float = 2.0) -> dict[str, float]:
    """Share of `captions` whose picture (25 steps) the referee agrees with, in all and by attribute."""
    seen = []
    for start in range(0, len(captions), 50):
        prompts = [str(c) for c in captions[start : start + 50]]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(prompts))]
        images = pipe(
            prompts, num_inference_steps=25, guidance_scale=guidance_scale, generator=generators, output_type="np"
        ).images
        seen += [judge((image * 255).round().astype(np.uint8)) for image in images]
    pairs = list(zip(seen, captions, strict=True))
    return {
        "all": float(np.mean([v.agrees(c) for v, c in pairs])),
        "color": float(np.mean([v.color == c.color for v, c in pairs])),
        "shape": float(np.mean([v.shape == c.shape for v, c in pairs])),
        "background": float(np.mean([v.background == c.background for v, c in pairs])),
        "size": float(np.mean([v.agrees_on_size(c) for v, c in pairs])),
        "position": float(np.mean([v.agrees_on_position(c) for v, c in pairs])),
    }


def held_out_sample(count: int = 200) -> list[Caption]:
    """The captions that the model card's figures are about."""
    return choose(split()[1], np.random.default_rng(EVAL_SEED), count)


def train_unet(out: Path, steps: int, batch_size: int, cache: int, device: torch.device) -> None:
    torch.manual_seed(5)
    rng = np.random.default_rng(5)
    train, _ = split()
    vae = AutoencoderKL.from_pretrained(out / "vae").to(device).eval()
    whiten(vae, train, device)
    vae.save_pretrained(out / "vae_whitened")
    captions, moments = cache_latents(vae, train, cache, device)
    log.info("cached %d latents, std %.3f", len(captions), moments[:, :LATENT_CHANNELS].float().std().item())
    tokenizer = write_tokenizer(out / "tokenizer")
    encoder = new_text_encoder(tokenizer).to(device)
    teach_words(encoder, tokenizer, train, device)
    unet = new_unet().to(device, memory_format=torch.channels_last)
    log.info(
        "unet %.1f M, text encoder %.1f M parameters",
        *(sum(p.numel() for p in m.parameters()) / 1e6 for m in (unet, encoder)),
    )
    live = nn.ModuleList([unet, encoder])
    smooth = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)  # type: ignore[no-untyped-call]
    average = torch.optim.swa_utils.AveragedModel(live, multi_avg_fn=smooth, use_buffers=True)
    optimizer = torch.optim.AdamW(live.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-2)
    alphas = noise_scheduler().alphas_cumprod.to(device)
    start = time.monotonic()
    running = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1e-3)
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
        texts = [wording(captions[i], rng) for i in chosen]
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


def export(out: Path, target: Path) -> None:
    """The finished pipeline as fp16 safetensors, small enough to commit."""
    pipe = StableDiffusionPipeline.from_pretrained(out / "pipeline").to(torch.float16)
    # Fresh noise at each step mends a shape that began badly: 96 % right against DDIM's 92 on 100 captions.
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.save_pretrained(target, safe_serialization=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=("vae", "unet", "export"))
    parser.add_argument("--vae-steps", type=int, default=7000)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--unet-steps", type=int, default=12_000)
    parser.add_argument("--unet-batch", type=int, default=64)
    parser.add_argument("--cache", type=int, default=60_000, help="captioned pictures drawn and encoded once")
    parser.add_argument("--target", type=Path, default=Path(__file__).parent / "shapes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    if args.only in (None, "vae"):
        train_vae(args.out, args.vae_steps, args.vae_batch, device)
    if args.only in (None, "unet"):
        train_unet(args.out, args.unet_steps, args.unet_batch, args.cache, device)
    if args.only in (None, "export"):
        export(args.out, args.target)


if __name__ == "__main__":
    main()
