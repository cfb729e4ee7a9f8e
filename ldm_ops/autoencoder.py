"""The autoencoder of a model folder, loaded alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_ops.accelerate import AccelerateAutoencoder, compile_forward, set_layout
from ldm_ops.adapter_files import vae_folder
from ldm_ops.device import Dtype, pick_device, pick_dtype

if TYPE_CHECKING:
    import torch


@dataclass
class Autoencoder:
    """A loaded AutoencoderKL, and how its latents are scaled: (latents - shift) × scale, as diffusers' pipelines do."""

    vae: Any
    scale: float
    shift: float

    @classmethod
    def of(cls, vae: Any) -> Autoencoder:
        """An autoencoder that is loaded already."""
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return cls(vae, float(vae.config.scaling_factor), float(shift))

    def scaled(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Latents as the encoder gives them → as a denoiser takes them."""
        return (latents_BCHW - self.shift) * self.scale

    def decode(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Latents as a denoiser gives them → images_BCHW in [0, 1], on the device."""
        latents_BCHW = latents_BCHW.to(self.vae.device, self.vae.dtype) / self.scale + self.shift
        images_BCHW: torch.Tensor = self.vae.decode(latents_BCHW, return_dict=False)[0]
        return (images_BCHW / 2 + 0.5).clamp(0, 1)


def load_autoencoder(
    folder: Path, device: str, dtype: Dtype, variant: str | None, accelerate: AccelerateAutoencoder | None = None
) -> Autoencoder:
    """Load FOLDER/vae, or FOLDER itself where it is an autoencoder, straight to the device.

    Raises:
        ValueError: there is no AutoencoderKL.
    """
    import torch
    from diffusers import AutoencoderKL

    device = pick_device(device)
    vae = AutoencoderKL.from_pretrained(
        vae_folder(folder),
        torch_dtype=pick_dtype(dtype, device),
        use_safetensors=True,
        local_files_only=True,
        **({"device_map": device} if device.startswith("cuda") else {}),
        **({"variant": variant} if variant else {}),
    )
    if vae.config.force_upcast and vae.dtype == torch.float16:
        # Its activations overflow in half precision (SDXL's says so itself).
        vae.to(torch.float32)
    vae = vae.to(device).eval()
    wanted = accelerate or AccelerateAutoencoder()
    set_layout([vae], wanted.channels_last, device)
    if wanted.compile is not None:
        for half in (vae.encoder, vae.decoder):
            compile_forward(half)
    return Autoencoder.of(vae)
