"""What can make a model faster beyond what is always done: asked for by name, and part of every row's key.

`channels_last`, `compile`, `cuda_graphs`, `fuse_qkv` and `vae_batch_size` give the same picture up to rounding, the
others another one. None has been measured on a GPU yet; `benchmarks/gpu.py` measures each.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ldm_ops.tiles import Sample

if TYPE_CHECKING:
    import torch

Compiled = Literal["regional", "full"]
Quantized = Literal["int8", "fp8"]


class _Option(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    channels_last: bool | None = Field(
        None,
        description="memory layout of the convolutions; on a CUDA device true, elsewhere false, if left out",
    )

    @property
    def asks_for_something(self) -> bool:
        """Whether anything differs from the defaults."""
        return bool(self.model_dump(exclude_defaults=True))


class AccelerateAutoencoder(_Option):
    """Of an autoencoder alone."""

    compile: Literal["full"] | None = Field(None, description="torch.compile of the encoder or decoder")


class Accelerate(_Option):
    """Of a pipeline."""

    compile: Compiled | None = Field(
        None,
        description="torch.compile: regional of each of the denoiser's repeated blocks, which is ready several times "
        "sooner; full of the whole denoiser and decoder",
    )
    cuda_graphs: bool = Field(False, description="with compile: full, on a CUDA device: replay recorded kernels")
    fuse_qkv: bool = Field(False, description="one projection for query, key and value; not with a LoRA")
    vae_batch_size: int | None = Field(
        None, ge=1, le=4096, description="pictures that are decoded at a time; all of batch_size, if left out"
    )
    guidance_interval: tuple[float, float] | None = Field(
        None, description="shares of the steps between which there is guidance, such as [0.2, 0.8]; inexact"
    )
    deep_cache: int | None = Field(
        None, ge=2, le=20, description="run the inner part of the U-Net at every N-th step alone; inexact"
    )
    quantize: Quantized | None = Field(
        None, description="arithmetic of the denoiser's linear layers; inexact; needs the extra quantize"
    )

    @model_validator(mode="after")
    def _check(self) -> Accelerate:
        if self.cuda_graphs and self.compile != "full":
            raise ValueError("cuda_graphs records what is compiled as a whole; add compile: full, or leave it out")
        if self.deep_cache is not None and self.compile == "full":
            raise ValueError("deep_cache leaves out parts of what compile: full makes one; use compile: regional")
        if self.guidance_interval is not None:
            start, stop = self.guidance_interval
            if not 0 <= start < stop <= 1:
                raise ValueError(f"guidance_interval [{start:g}, {stop:g}]: use two shares in order, from 0 to 1")
            if (start, stop) == (0, 1):
                raise ValueError("guidance_interval [0, 1] is all steps; leave it out")
        return self


def denoiser(pipe: Any) -> Any:
    """The U-Net or transformer of a pipeline."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def autoencoder(pipe: Any) -> Any:
    """The autoencoder of a pipeline."""
    return pipe.vqvae if hasattr(pipe, "vqvae") else pipe.vae


def set_up(pipe: Any, accelerate: Accelerate, device: str) -> None:
    """Change a loaded pipeline's parts as asked, each in itself.

    Raises:
        ValueError: what a part, the device or the installation cannot do.
    """
    import torch

    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    set_layout(parts, accelerate.channels_last, device)
    model = denoiser(pipe)
    if accelerate.fuse_qkv:
        if not hasattr(model, "fuse_qkv_projections"):
            raise ValueError(f"accelerate.fuse_qkv: {type(model).__name__} does not know it; leave it out")
        model.fuse_qkv_projections()
    if accelerate.quantize is not None:
        quantize(model, accelerate.quantize, device)
    compile_parts(pipe, accelerate.compile, accelerate.cuda_graphs, device)
    if accelerate.vae_batch_size is not None:
        split_decoder(autoencoder(pipe), accelerate.vae_batch_size)


def set_layout(parts: list[Any], wanted: bool | None, device: str) -> None:
    """Lay the convolutions' weights out as `channels_last` says; what they make follows.

    Tensor cores work on that layout (1.28 times the speed of a compiled SD 1.5 on an A100, fal-ai's
    stable-diffusion-benchmarks); in another one each convolution transposes what it is given.
    """
    import torch

    if device.startswith("cuda") if wanted is None else wanted:
        for part in parts:
            part.to(memory_format=torch.channels_last)


def compile_parts(pipe: Any, how: Compiled | None, cuda_graphs: bool, device: str) -> None:
    """Let torch compile the denoiser, and with `full` the decoder.

    Raises:
        ValueError: the denoiser has no repeated blocks, or there is no CUDA device for `cuda_graphs`.
    """
    if how is None:
        return
    model = denoiser(pipe)
    if how == "regional":
        set_up_compiler()
        if not getattr(model, "_repeated_blocks", None):
            raise ValueError(f"accelerate.compile: {type(model).__name__} has no repeated blocks; use full")
        model.compile_repeated_blocks(dynamic=False)
        return
    if cuda_graphs and not device.startswith("cuda"):
        raise ValueError(f"accelerate.cuda_graphs: the device is {device}; leave it out, or use a CUDA device")
    compile_forward(model, cuda_graphs)
    compile_forward(autoencoder(pipe).decoder)


def compile_forward(module: Any, cuda_graphs: bool = False) -> None:
    """Compile a module's `forward`, anew for every shape."""
    import torch

    set_up_compiler()
    # Not max-autotune: it picks kernels with a stopwatch, so that two workers may make other last bits.
    made = torch.compile(module.forward, dynamic=False, mode="reduce-overhead" if cuda_graphs else None)
    if not cuda_graphs:
        module.forward = made
        return

    def replayed(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        # The next replay writes to the same memory, and some schedulers keep what they were given.
        return (made(*args, **{**kwargs, "return_dict": False})[0].clone(),)  # type: ignore[no-untyped-call]

    module.forward = replayed


def set_up_compiler() -> None:
    """Keep what is compiled in $LDM_CACHE/compiled for the next worker, and never give up on compiling.

    Past its default of 8 shapes torch would run the others as they are, and a row's bits would depend on which shapes
    came before it.
    """
    import torch._dynamo
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Importing the compiler sets its default, which is a temporary folder of this node.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        cache = Path(os.environ.get("LDM_CACHE") or Path.home() / ".cache" / "ldm-batch")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "compiled")
    torch._dynamo.config.recompile_limit = 10_000
    torch._dynamo.config.accumulated_recompile_limit = 100_000


def split_decoder(vae: Any, batch_size: int) -> None:
    """Let an autoencoder decode `batch_size` latents at a time: its memory peaks far above the denoiser's.

    The last ones are padded: a row's bits must not depend on how many stand before it.
    """
    import torch

    whole = vae.decode

    def decode(latents_BCHW: torch.Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        count = len(latents_BCHW)
        size = min(batch_size, count)
        padded = torch.cat([latents_BCHW, *[latents_BCHW[-1:]] * (-count % size)])
        pieces = [padded[i : i + size] for i in range(0, len(padded), size)]
        made = torch.cat([whole(piece, *args, return_dict=False, **kwargs)[0] for piece in pieces])[:count]
        return Sample(made) if return_dict else (made,)

    vae.decode = decode


def quantize(model: Any, how: Quantized, device: str) -> None:
    """Let the denoiser's linear layers compute in int8 or fp8 (e4m3), by torchao.

    Weights are scaled by channel and activations by token while the job runs, so that a row does not notice its
    neighbours in the batch; a scale for a whole tensor would be theirs too.

    Raises:
        ValueError: torchao is missing, or the device has no fp8.
    """
    import torch

    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            PerRow,
            quantize_,
        )
    except ImportError:
        raise ValueError("accelerate.quantize needs torchao; pip install 'ldm-batch[quantize]'") from None
    if how == "fp8":
        if not device.startswith("cuda") or torch.cuda.get_device_capability(device) < (8, 9):
            raise ValueError("accelerate.quantize: fp8 needs a CUDA device of capability 8.9 or more; use int8")
        quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    else:
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
