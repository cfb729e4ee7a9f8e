"""Where a model runs, and in which precision."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import StringConstraints

if TYPE_CHECKING:
    import torch

Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Device = Annotated[str, StringConstraints(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]


def pick_device(device: str) -> str:
    """`auto` → cuda, else mps, else cpu.

    Raises:
        ValueError: the named device is not on this machine.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device}: this machine has no CUDA device; use device: auto or cpu")
    return device


def pick_dtype(dtype: Dtype, device: str) -> torch.dtype:
    """`auto` → bf16 where the GPU has it, else fp16 on a GPU, fp32 on a CPU."""
    import torch

    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype != "auto":
        return named[dtype]
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if device != "mps" and torch.cuda.is_bf16_supported() else torch.float16


def set_threads(count: int) -> None:
    """Let torch use `count` CPU threads in this process; to be called before anything imports torch.

    On a CPU the count can change the last bits of a picture (torch 2.13: oneDNN's small 1×1 convolutions in fp32).
    """
    # The OpenMP count belongs to each calling thread and starts from the environment, which Ray sets to 1.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(count)
    import torch

    torch.set_num_threads(count)


def keep_to_share(num_gpus: float) -> None:
    """Let this process take no more of its GPU's memory than its share, where that is less than a whole one: what runs
    out of memory is then its own batch, and not that of another process beside it. Of whole ones it may take all, also
    where it had a share before."""
    if num_gpus > 0:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(min(1.0, num_gpus))


def device_name(device: str) -> str:
    """What a manifest says of a device: the GPU's name, mps or cpu."""
    import torch

    device = pick_device(device)
    return str(torch.cuda.get_device_name(device)) if device.startswith("cuda") else device


def free_memory() -> None:
    """Give cached device memory back, so that a smaller batch finds room."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
