"""Between pixels as files hold them, uint8 (H, W, 3), and as models take them, images_BCHW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


def to_uint8(images_BCHW: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] → uint8 (B, H, W, 3) on their device, rounded as diffusers' numpy_to_pil does."""
    import torch

    return images_BCHW.permute(0, 2, 3, 1).float().mul(255).round().clamp(0, 255).to(torch.uint8).contiguous()


def to_host(*tensors: torch.Tensor) -> list[NDArray[Any]]:
    """Tensors of one device as arrays, after one wait for it in all."""
    import torch

    if not tensors[0].is_cuda:
        return [x.cpu().contiguous().numpy() for x in tensors]
    # Into pinned memory, which the device writes by itself, and each at once as the device comes to it.
    copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
    for copy, x in zip(copies, tensors, strict=True):
        copy.copy_(x.contiguous(), non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return [copy.numpy() for copy in copies]


def as_BCHW(images: torch.Tensor | NDArray[np.float32]) -> torch.Tensor:
    """What a pipeline gives for output_type="pt"; some of diffusers' older ones give (B, H, W, C) arrays even so."""
    import torch

    return images if isinstance(images, torch.Tensor) else torch.from_numpy(images).permute(0, 3, 1, 2)


def grey(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) → (H, W), by the luma of ITU-R 601 as Pillow computes it."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.fromarray(picture).convert("L"))


def is_one_colour(pixels: NDArray[np.uint8]) -> bool:
    """Whether pixels (…, C), at least one, all have the same colour."""
    first = pixels.reshape(-1, pixels.shape[-1])[:1]
    return bool(len(first)) and bool((pixels == first).all())


def from_uint8(pictures: Sequence[NDArray[np.uint8]], device: torch.device | str = "cpu") -> torch.Tensor:
    """(H, W, 3) or (H, W) uint8 each, all of one size → images_BCHW in [0, 1], float32 on the device."""
    import numpy as np
    import torch

    stack = np.stack([p if p.ndim == 3 else p[..., None] for p in pictures])
    # Of one memory layout, diffusers' own for pictures: another would run other kernels, with other last bits.
    bytes_BHWC = torch.from_numpy(np.ascontiguousarray(stack))
    if torch.device(device).type == "cuda":
        # As bytes, a quarter of the floats.
        bytes_BHWC = bytes_BHWC.pin_memory().to(device, non_blocking=True)
    return bytes_BHWC.to(device).permute(0, 3, 1, 2).float().div(255)
