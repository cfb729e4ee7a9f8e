"""Latents to images: later, or on cheaper devices than those that made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from ldm_ops.accelerate import AccelerateAutoencoder
from ldm_ops.autoencoder import Autoencoder, load_autoencoder
from ldm_ops.device import Dtype
from ldm_ops.op import Op, Row, RowRefused
from ldm_ops.pixels import to_host, to_uint8
from ldm_ops.sampling import ModelName


class Decode(Op):
    """Latents → image, with the autoencoder that made them.

    A row brings `latents`, (C, h, w), scaled, or `moments`, (2·C, h, w), of which the mean is taken.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"latents"})
    writes: ClassVar[frozenset[str]] = frozenset({"image", "nsfw", "intermediates"})
    parts: ClassVar[tuple[str, ...]] = ("vae",)

    model: ModelName = Field(description="the model that the latents come from: builtin:…, hub id, folder, s3")
    revision: str | None = Field(None, description="commit or tag of a hub model; needed there, and only there")
    variant: str | None = Field(None, description="weight file variant of the model, such as fp16")
    dtype: Dtype = Field("auto", description="of the computation; auto is bf16 on a GPU that has it, fp32 on a CPU")

    accelerate: AccelerateAutoencoder | None = Field(None, description="what may make it faster")

    def load(self, folder: Path) -> Autoencoder:
        """Load the autoencoder alone.

        Raises:
            ValueError: the folder has none.
        """
        return load_autoencoder(folder, self.device, self.dtype, self.variant, self.accelerate)

    def bucket(self, row: Row) -> tuple[Any, ...]:
        """The latents' size."""
        return tuple(row["latents"].shape)

    def run(self, model: Autoencoder, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Decode one picture per row: `image`, uint8 (H, W, 3).

        Raises:
            RowRefused: latents of another autoencoder, or a picture with NaN.
        """
        import numpy as np
        import torch

        # Contiguous, whatever the rows' arrays are: another memory layout runs other kernels, with other last bits.
        latents_BCHW = torch.from_numpy(np.ascontiguousarray(np.stack([row["latents"] for row in rows]))).float()
        channels = model.vae.config.latent_channels
        if latents_BCHW.shape[1] == 2 * channels:
            latents_BCHW = model.scaled(latents_BCHW[:, :channels])
        elif latents_BCHW.shape[1] != channels:
            raise RowRefused(
                "latents.channels",
                f"{latents_BCHW.shape[1]} channels; this autoencoder has {channels}, its moments {2 * channels}",
            )
        with torch.inference_mode():
            images_BCHW = model.decode(latents_BCHW)
            pictures, finite = to_host(to_uint8(images_BCHW), torch.isfinite(images_BCHW).all())
        if not finite:
            raise RowRefused("model.nan", "the autoencoder gave NaN; try dtype: fp32 or bf16")
        return [{"image": picture, "nsfw": None, "intermediates": []} for picture in pictures]
