"""Run a network on overlapping tiles and blend what they give, so that memory does not grow with the image.

The tiles' results are averaged with weights that fall linearly towards a tile's border. Applied to a denoiser at each
step (Bar-Tal et al. 2023, arXiv:2302.08113), all tiles work on one common field of noise, and no seam has time to grow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles of `tile` begin along a side of `size`: evenly spread, at least `overlap` in common."""
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def tiled(
    function: Callable[[torch.Tensor], torch.Tensor], x_BCHW: torch.Tensor, tile: int, overlap: int
) -> torch.Tensor:
    """`function` on tiles of `tile` × `tile`; it may enlarge both sides by one whole factor.

    Returns what `function` returns for the whole where that fits into one tile.
    """
    import torch

    height, width = x_BCHW.shape[-2:]
    if height <= tile and width <= tile:
        return function(x_BCHW)
    total: torch.Tensor | None = None
    for top in starts(height, tile, overlap):
        for left in starts(width, tile, overlap):
            piece = x_BCHW[..., top : top + tile, left : left + tile]
            made = function(piece)
            scale = made.shape[-1] // piece.shape[-1]
            if total is None:
                total = made.new_zeros((*made.shape[:2], height * scale, width * scale))
                weights = made.new_zeros((1, 1, height * scale, width * scale))
            weight = _hat(made.shape[-2], overlap * scale)[:, None] * _hat(made.shape[-1], overlap * scale)[None, :]
            weight = weight.to(made)
            place = (
                ...,
                slice(top * scale, top * scale + made.shape[-2]),
                slice(left * scale, left * scale + made.shape[-1]),
            )
            total[place] += made * weight
            weights[place] += weight
    assert total is not None
    return torch.div(total, weights)


def _hat(size: int, ramp: int) -> torch.Tensor:
    """1 in the middle, falling linearly over `ramp` towards both ends, never 0."""
    import torch

    along = torch.arange(size) + 0.5
    return (torch.minimum(along, size - along) / max(1, ramp)).clamp(max=1)


def tile_unet(unet: Any, tile: int, overlap: int) -> None:
    """Let a diffusers U-Net work on tiles of its input; conditioning goes to every tile whole."""
    whole = unet.forward

    def forward(sample: torch.Tensor, timestep: Any, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        def one(piece: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = whole(piece, timestep, *args, return_dict=False, **kwargs)[0]
            return made

        made = tiled(one, sample, tile, overlap)
        return Sample(made) if return_dict else (made,)

    unet.forward = forward


def tile_decoder(vae: Any, tile: int, overlap: int) -> None:
    """Let a diffusers autoencoder decode by tiles of its latents."""
    whole = vae.decode

    def decode(latents: torch.Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        def one(piece: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = whole(piece, *args, return_dict=False, **kwargs)[0]
            return made

        made = tiled(one, latents, tile, overlap)
        return Sample(made) if return_dict else (made,)

    vae.decode = decode


class Sample:
    """What diffusers' models return under return_dict."""

    def __init__(self, sample: torch.Tensor) -> None:
        self.sample = sample
