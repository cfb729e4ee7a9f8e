"""Repaint what a mask marks, with any inpainting pipeline of diffusers or by masking a plain model's latents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ldm_ops.autoencoder import Autoencoder
from ldm_ops.op import Row
from ldm_ops.pixels import from_uint8, is_one_colour
from ldm_ops.sampling import Pipeline, Sampling

if TYPE_CHECKING:
    import torch

INPAINTING_CHANNELS = (4, 9)
"""Channels of the U-Nets that diffusers' inpainting pipelines take: latents alone, or with mask and masked image."""

_NOISE_OF_KNOWN = 0x6D61736B  # folded into a row's seed, so that the pipeline's own draws stay what they are


class Inpaint(Sampling):
    """Image + mask + prompt → image of the same size; what the mask leaves out stays as it was.

    A row brings `image`, uint8 (H, W, 3), and `mask_image`, uint8 (H, W), 128 and more where it may be repainted. A
    model that is no inpainting model (Stable Diffusion 1.5, builtin:shapes) repaints by latent masking: after each step
    the latents outside the mask are put back to those of the image, with the noise of that step (Lugmayr et al. 2022,
    arXiv:2201.09865, without its jumps back; as diffusers does for U-Nets of four channels).
    """

    reads: ClassVar[frozenset[str]] = Sampling.reads | {"image", "mask_image", "strength"}

    strength: float = Field(1.0, gt=0, le=1, description="how far from the image, inside the mask")
    preserve_unmasked: bool = Field(
        True, description="put the image's own pixels back outside the mask, which the autoencoder would blur"
    )

    def _pipeline_class(self, folder: Path) -> Any:
        from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

        unet = folder / "unet" / "config.json"
        channels = json.loads(unet.read_text(encoding="utf-8")).get("in_channels") if unet.exists() else None
        plain = channels is not None and channels not in INPAINTING_CHANNELS
        return AutoPipelineForImage2Image if plain else AutoPipelineForInpainting

    def _inputs(self, model: Pipeline, rows: Sequence[Row]) -> dict[str, Any]:
        images_BCHW = from_uint8([row["image"] for row in rows])
        masks_BCHW = _masks(rows)
        strength = rows[0]["strength"]
        if "mask_image" in model.accepts:
            height, width = images_BCHW.shape[-2:]
            return {
                "image": images_BCHW,
                "mask_image": masks_BCHW,
                "height": height,
                "width": width,
                "strength": strength,
            }
        if strength == 1:
            # At full strength nothing of what the mask hides may shine through the noise.
            kept = (1 - masks_BCHW).sum((2, 3), keepdim=True).clamp(min=1)
            around = (images_BCHW * (1 - masks_BCHW)).sum((2, 3), keepdim=True) / kept
            images_BCHW = images_BCHW * (1 - masks_BCHW) + around * masks_BCHW
        return {
            "image": images_BCHW,
            "strength": strength,
            "callback_on_step_end": _Keep.of(model.pipe, images_BCHW, masks_BCHW, [row["seed"] for row in rows]),
        }

    def _may_be_one_colour(self, row: Row) -> bool:
        # What stood before a plain background may have been painted out.
        return super()._may_be_one_colour(row) or is_one_colour(row["image"][row["mask_image"] < 128])

    def _finish(self, images_BCHW: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        if not self.preserve_unmasked:
            return images_BCHW
        masks_BCHW = _masks(rows).to(images_BCHW)
        return masks_BCHW * images_BCHW + (1 - masks_BCHW) * from_uint8([row["image"] for row in rows]).to(images_BCHW)


def _masks(rows: Sequence[Row]) -> torch.Tensor:
    return (from_uint8([row["mask_image"] for row in rows]) >= 0.5).float()


def _encoded(vae: Any, inputs_BCHW: torch.Tensor) -> torch.Tensor:
    found = vae.encode(inputs_BCHW)
    # An AutoencoderTiny knows no distribution.
    latents: torch.Tensor = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
    return latents


@dataclass
class _Keep:
    """Puts the known latents back after every step: latents_BCHW, and a mask that is 1 where the model may paint."""

    known_BCHW: torch.Tensor
    noise_BCHW: torch.Tensor
    mask_BCHW: torch.Tensor

    @classmethod
    def of(cls, pipe: Any, images_BCHW: torch.Tensor, masks_BCHW: torch.Tensor, seeds: Sequence[int]) -> _Keep:
        import torch

        vae = pipe.vae
        inputs = (2 * images_BCHW - 1).to(vae.device, vae.dtype)
        # One by one, as the pipeline itself encodes under a list of generators: a row must not notice its neighbours.
        known = torch.cat([_encoded(vae, inputs[i : i + 1]) for i in range(len(inputs))])
        known = Autoencoder.of(vae).scaled(known)
        noise = [
            torch.randn(known.shape[1:], generator=torch.Generator("cpu").manual_seed(seed ^ _NOISE_OF_KNOWN))
            for seed in seeds
        ]
        # A cell of latents that holds any pixel to repaint is repainted whole.
        mask = torch.nn.functional.adaptive_max_pool2d(masks_BCHW, known.shape[-2:])
        return cls(known, torch.stack(noise).to(known), mask.to(known))

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents_BCHW = tensors["latents"]
        timesteps = pipe.scheduler.timesteps
        at = int((timesteps == timestep).nonzero()[-1])
        known_BCHW = self.known_BCHW
        if at + 1 < len(timesteps):
            following = timesteps[at + 1].reshape(1).repeat(len(latents_BCHW))
            known_BCHW = pipe.scheduler.add_noise(known_BCHW, self.noise_BCHW, following)
        mixed: torch.Tensor = self.mask_BCHW * latents_BCHW + (1 - self.mask_BCHW) * known_BCHW
        return {"latents": mixed.to(latents_BCHW.dtype)}
