"""Four times larger: latent diffusion super-resolution, with or without a prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from ldm_ops.accelerate import autoencoder
from ldm_ops.describe import UPSCALERS
from ldm_ops.op import Row, RowRefused
from ldm_ops.pixels import from_uint8
from ldm_ops.sampling import Kept, Pipeline, Sampling
from ldm_ops.schedulers import is_plain
from ldm_ops.tiles import tile_decoder, tile_unet

if TYPE_CHECKING:
    import torch

SCALE = 4


class Upscale(Sampling):
    """Image → image of four times the width and height.

    A row brings `image`, uint8 (H, W, 3) of any size. The model decides how: LDMSuperResolutionPipeline knows the image
    alone (Rombach et al. 2022, arXiv:2112.10752, section 4.4), StableDiffusionUpscalePipeline also a prompt and
    `noise_level`, the noise that is put on the image first.

    Memory follows the tile, not the image: the U-Net and the decoder see `tile_px` × `tile_px` of the small image at a
    time. What is as large as the image are the latents and the picture itself.
    """

    reads: ClassVar[frozenset[str]] = Sampling.reads | {"image"}

    num_inference_steps: int = Field(50, ge=1, le=1000)
    noise_level: int = Field(20, ge=0, le=1000, description="of a model with a prompt: noise on the small image")
    tile_px: int = Field(128, ge=32, le=4096, description="side of a tile, in pixels of the small image")
    tile_overlap_px: int = Field(16, ge=4, description="what neighbouring tiles have in common")

    @model_validator(mode="after")
    def _check(self) -> Upscale:
        if self.tile_overlap_px * 2 > self.tile_px:
            raise ValueError(
                f"tile_overlap_px {self.tile_overlap_px} is more than half of tile_px {self.tile_px}; use less"
            )
        if self.tile_px % 8:
            raise ValueError(f"tile_px {self.tile_px} is not a multiple of 8; use {self.tile_px // 8 * 8}")
        if self.save_intermediates is not None:
            raise ValueError("upscale keeps no intermediates; leave save_intermediates out")
        if self.accelerate is not None and self.accelerate.deep_cache is not None:
            # What is kept of one tile would be taken for the next.
            raise ValueError("upscale works by tiles; leave accelerate.deep_cache out")
        return self

    def _pipeline_class(self, folder: Path) -> Any:
        import diffusers

        name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        if name not in UPSCALERS:
            raise ValueError(f"{folder} is a {name}; upscale takes {' or '.join(UPSCALERS)}")
        return getattr(diffusers, name)

    def _set_up(self, pipe: Any) -> None:
        """Let it work by tiles."""
        tile_unet(pipe.unet, self.tile_px, self.tile_overlap_px)
        tile_decoder(autoencoder(pipe), self.tile_px, self.tile_overlap_px)

    def _arguments(self, model: Pipeline, rows: Sequence[Row], kept: Kept | None) -> dict[str, Any]:
        if "prompt" in model.accepts:
            return super()._arguments(model, rows, kept)
        name = type(model.pipe.scheduler).__name__
        if not is_plain(name):
            # LDMSuperResolutionPipeline (diffusers 0.42) lets a sampler scale the image beside the latents too.
            raise RowRefused(
                "model.unsupported", f"{name} does not fit {type(model.pipe).__name__}; use ddim, or leave it out"
            )
        # A pipeline that knows no prompts knows no negative ones either.
        arguments = super()._arguments(model, [{**row, "negative_prompt": ""} for row in rows], kept)
        return {name: value for name, value in arguments.items() if name in model.accepts}

    def _inputs(self, model: Pipeline, rows: Sequence[Row]) -> dict[str, Any]:
        import torch

        images_BCHW = from_uint8([row["image"] for row in rows])
        height, width = images_BCHW.shape[-2:]
        factor = _factor(model.pipe)
        # A border of repeated pixels up to what the U-Net can halve; it is cut off again at the end.
        border = (0, -width % factor, 0, -height % factor)
        images_BCHW = torch.nn.functional.pad(images_BCHW, border, mode="replicate")
        if "prompt" in model.accepts:
            return {"image": images_BCHW, "noise_level": self.noise_level}
        return {"image": 2 * images_BCHW - 1}

    def _finish(self, images_BCHW: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        height, width = rows[0]["image"].shape[:2]
        return images_BCHW[..., : height * SCALE, : width * SCALE]


def _factor(pipe: Any) -> int:
    """What the sides of the small image must be multiples of, a power of two."""
    # The text-guided pipeline would resize an image that is no multiple of its autoencoder's factor.
    return int(max(2 ** (len(pipe.unet.config.block_out_channels) - 1), getattr(pipe, "vae_scale_factor", 1)))
