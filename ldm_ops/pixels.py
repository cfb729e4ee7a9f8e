"""Between pixels as files hold them, uint8 (H, W, 3), and as models take them, images_BCHW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


def to_uint8(images_BCHW: torch.Tensor) -> list[NDArray[np.uint8]]:
    """Images in [0, 1] → (H, W, 3) uint8 each, rounded on the device as diffusers' numpy_to_pil does."""
    import torch

    bytes_BHWC = images_BCHW.permute(0, 2, 3, 1).float().mul(255).round().clamp(0, 255).to(torch.uint8)
    return list(bytes_BHWC.cpu().contiguous().numpy())


def as_BCHW(images: torch.Tensor | NDArray[np.float32]) -> torch.Tensor:
    """What a pipeline gives for output_type="pt"; some of diffusers' older ones give (B, H, W, C) arrays even so."""
    import torch

    return images if isinstance(images, torch.Tensor) else torch.from_numpy(images).permute(0, 3, 1, 2)


def grey(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) → (H, W), by the luma of ITU-R 601 as Pillow computes it."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.fromarray(picture).convert("L"))


def from_uint8(pictures: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
    """(H, W, 3) or (H, W) uint8 each, all of one size → images_BCHW in [0, 1], float32 on the CPU."""
    import numpy as np
    import torch

    stack = np.stack([p if p.ndim == 3 else p[..., None] for p in pictures])
    # Of one memory layout, diffusers' own for pictures: another would run other kernels, with other last bits.
    return torch.from_numpy(np.ascontiguousarray(stack)).permute(0, 3, 1, 2).float().div(255)
