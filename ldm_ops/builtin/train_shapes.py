"""Train `builtin:shapes` from nothing: `python -m ldm_ops.builtin.train_shapes OUT`.

Six steps; each leaves its result in OUT, so each can be run alone with `--only`: the autoencoder; the text encoder
with the U-Net on cached latents; the decoder alone; the U-Net twice more, at lower rates and on fresh pictures; the
export to fp16 safetensors in diffusers' layout. Seeded; some three hours on two CPU cores, minutes on a GPU. The recipe
follows the latent diffusion paper (Rombach et al. 2022, arXiv:2112.10752): KL-regularised autoencoder, latents rescaled
by their component-wise standard deviation, classifier-free guidance by dropping captions.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from pathlib import Path

import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from ldm_ops.builtin.training.autoencoder import train_decoder, train_vae
from ldm_ops.builtin.training.denoiser import FINISH, FIRST, POLISH, train_unet


def export(out: Path, target: Path) -> None:
    """The finished pipeline as fp16 safetensors, small enough to commit."""
    pipe = StableDiffusionPipeline.from_pretrained(out / "pipeline").to(torch.float16)
    # Fresh noise at each step mends a shape that began badly.
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.save_pretrained(target, safe_serialization=True)
    forget_paths(target)


def average(before: Path, after: Path) -> None:
    """Put the mean of both pipelines' U-Nets and text encoders into `after`.

    Both lie in one basin, and their mean generalises better than either (Wortsman et al. 2022, arXiv:2203.05482).
    """
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        first, second = load_file(before / name), load_file(after / name)
        mean = {key: (first[key] + value) / 2 if value.is_floating_point() else value for key, value in second.items()}
        save_file(mean, after / name, metadata={"format": "pt"})


def forget_paths(folder: Path) -> None:
    """Drop what diffusers and transformers write about the folders that the parts were loaded from."""
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=("vae", "unet", "decoder", "finish", "polish", "export"))
    parser.add_argument("--vae-steps", type=int, default=7000)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--unet-steps", type=int, default=12_000)
    parser.add_argument("--unet-batch", type=int, default=64)
    parser.add_argument("--decoder-steps", type=int, default=2000)
    parser.add_argument("--finish-steps", type=int, default=11_000)
    parser.add_argument("--polish-steps", type=int, default=3500)
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
        train_unet(args.out, args.unet_steps, args.unet_batch, args.cache, FIRST, device)
    if args.only in (None, "decoder"):
        train_decoder(args.out, args.decoder_steps, args.vae_batch, device)
    if args.only in (None, "finish"):
        train_unet(args.out, args.finish_steps, args.unet_batch, args.cache, FINISH, device)
    if args.only in (None, "polish"):
        shutil.copytree(args.out / "pipeline", args.out / "finished", dirs_exist_ok=True)
        train_unet(args.out, args.polish_steps, args.unet_batch, args.cache, POLISH, device)
        average(args.out / "finished", args.out / "pipeline")
    if args.only in (None, "export"):
        export(args.out, args.target)


if __name__ == "__main__":
    main()
