"""Train `builtin:shapes-x4` from nothing: `python -m ldm_ops.builtin.train_shapes_x4 OUT`.

Three steps that leave their results in OUT: the VQ autoencoder, the U-Net on cached pairs, the export to fp16
safetensors in diffusers' layout (LDMSuperResolutionPipeline). Seeded; an hour or two on two CPU cores, minutes
on a GPU. After Rombach et al. 2022 (arXiv:2112.10752), section 4.4: the small picture is concatenated to the latents of
a VQ autoencoder with f = 4.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from diffusers import LDMSuperResolutionPipeline

from ldm_ops.builtin.train_shapes import forget_paths
from ldm_ops.builtin.training.upscaler import train_unet, train_vqvae


def export(out: Path, target: Path) -> None:
    """The finished pipeline as fp16 safetensors, small enough to commit."""
    pipe = LDMSuperResolutionPipeline.from_pretrained(out / "pipeline").to(torch.float16)
    pipe.save_pretrained(target, safe_serialization=True)
    forget_paths(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=("vqvae", "unet", "export"))
    parser.add_argument("--vqvae-steps", type=int, default=4000)
    parser.add_argument("--vqvae-batch", type=int, default=16)
    parser.add_argument("--unet-steps", type=int, default=3000)
    parser.add_argument("--unet-batch", type=int, default=24)
    parser.add_argument("--cache", type=int, default=12_000, help="pairs drawn and encoded once")
    parser.add_argument("--target", type=Path, default=Path(__file__).parent / "shapes-x4")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    if args.only in (None, "vqvae"):
        train_vqvae(args.out, args.vqvae_steps, args.vqvae_batch, device)
    if args.only in (None, "unet"):
        train_unet(args.out, args.unet_steps, args.unet_batch, args.cache, device)
    if args.only in (None, "export"):
        export(args.out, args.target)


if __name__ == "__main__":
    main()
