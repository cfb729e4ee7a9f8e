"""Images to latents, once, so that a training need not do it in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from ldm_ops.accelerate import AccelerateAutoencoder
from ldm_ops.autoencoder import Autoencoder, load_autoencoder
from ldm_ops.device import Dtype
from ldm_ops.op import Op, Row, RowRefused
from ldm_ops.pixels import from_uint8, to_host
from ldm_ops.sampling import ModelName

StoredDtype = Literal["fp16", "fp32"]


class Encode(Op):
    """Image → latents of an AutoencoderKL (Rombach et al. 2022, arXiv:2112.10752).

    A row brings `image`, uint8 (H, W, 3), and for `sample` a `seed`; all images of a batch have one size.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"image", "seed"})
    writes: ClassVar[frozenset[str]] = frozenset({"latents", "flipped"})
    parts: ClassVar[tuple[str, ...]] = ("vae",)

    model: ModelName = Field(
        description="a pipeline with a `vae`, or an autoencoder alone: builtin:…, hub id, folder, s3"
    )
    revision: str | None = Field(None, description="commit or tag of a hub model; needed there, and only there")
    variant: str | None = Field(None, description="weight file variant of the model, such as fp16")
    posterior: Literal["moments", "sample", "mode"] = Field(
        "moments",
        description="moments keeps mean and log-variance, unscaled, so that a training can sample anew; sample and "
        "mode are scaled as a denoiser takes them",
    )
    random_flip: bool = Field(False, description="mirror half of the images, decided by the row's seed, and record it")
    dtype: Dtype = Field("auto", description="of the computation; auto is bf16 on a GPU that has it, fp32 on a CPU")
    store_dtype: StoredDtype = Field("fp16", description="of what is stored")

    accelerate: AccelerateAutoencoder | None = Field(None, description="what may make it faster")

    def load(self, folder: Path) -> Autoencoder:
        """Load the autoencoder alone.

        Raises:
            ValueError: the folder has none.
        """
        return load_autoencoder(folder, self.device, self.dtype, self.variant, self.accelerate)

    def bucket(self, row: Row) -> tuple[Any, ...]:
        """The image's size."""
        return tuple(row["image"].shape)

    def run(self, model: Autoencoder, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Encode one image per row.

        Returns, per row: `latents`, fp16 or fp32 (C, H/f, W/f), with `moments` (2·C, H/f, W/f), mean before
        log-variance; `flipped`, bool.

        Raises:
            RowRefused: latents with NaN, or too large for `store_dtype`.
        """
        import torch

        flipped = [self.random_flip and bool(_coin(row["seed"])) for row in rows]
        pictures = [row["image"][:, ::-1] if flip else row["image"] for row, flip in zip(rows, flipped, strict=True)]
        with torch.inference_mode():
            images_BCHW = 2 * from_uint8(pictures, model.vae.device) - 1
            posterior = model.vae.encode(images_BCHW.to(model.vae.dtype)).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            if self.posterior == "moments":
                latents_BCHW = torch.cat([mean, logvar], 1)
            elif self.posterior == "mode":
                latents_BCHW = model.scaled(mean)
            else:
                # On the CPU whatever the device, so that the noise of a seed is the same everywhere.
                noise = [
                    torch.randn(mean.shape[1:], generator=torch.Generator("cpu").manual_seed(row["seed"]))
                    for row in rows
                ]
                latents_BCHW = model.scaled(mean + (logvar / 2).exp() * torch.stack(noise).to(mean.device))
            stored = latents_BCHW.to(torch.float16 if self.store_dtype == "fp16" else torch.float32)
            arrays, finite = to_host(stored, torch.isfinite(stored).all())
        if not finite:
            raise RowRefused("model.nan", "the latents hold NaN, or do not fit store_dtype; try fp32")
        return [{"latents": array, "flipped": flip} for array, flip in zip(arrays, flipped, strict=True)]


def _coin(seed: int) -> int:
    # One bit that has nothing to do with the noise that the same seed draws.
    return (seed * 0x9E3779B97F4A7C15 >> 61) & 1
