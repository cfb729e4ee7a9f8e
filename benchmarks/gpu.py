"""Every op on pipelines of published shapes: speed, share of the card's peak, memory, against diffusers called eagerly.

    python -m benchmarks.gpu [--only sd15] [--rounds 3]
    python -m benchmarks.gpu --device cpu --shrink 8      # only to see that it runs

Needs neither Ray nor a network. Each op and its peer, the bare diffusers call with the same arguments, take turns in
one process on weights of their own; FLOPs are counted by torch on the peer's call (one multiply-add is two), and the
peak is a bf16 product of 8192 × 8192 matrices in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    StableDiffusionUpscalePipeline,
)
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.published import save
from ldm_ops.decode import Decode
from ldm_ops.encode import Encode
from ldm_ops.img2img import Img2Img
from ldm_ops.inpaint import Inpaint
from ldm_ops.op import Op
from ldm_ops.txt2img import Txt2Img
from ldm_ops.upscale import Upscale

PROMPT = "a large red circle on a white background"


@dataclass(frozen=True)
class Case:
    """One op on one model. `side_px` is that of the image that comes in, or comes out where none comes in."""

    model: str
    op: type[Op]
    side_px: int
    batch_size: int
    steps: int = 0
    guidance: float = 1.0

    def small(self) -> Case:
        """The same with little work, for a laptop."""
        return replace(self, side_px=max(64, self.side_px // 8), batch_size=2, steps=min(self.steps, 2))

    @property
    def name(self) -> str:
        return f"{self.op.__name__.lower()} {self.model} {self.side_px}"


CASES = (
    Case("sd15", Txt2Img, 512, 16, 20, 7.5),
    Case("sd15", Img2Img, 512, 16, 20, 7.5),
    Case("sd15", Inpaint, 512, 16, 20, 7.5),
    Case("sd15", Encode, 512, 32),
    Case("sd15", Decode, 512, 16),
    Case("sd21", Txt2Img, 768, 8, 20, 7.5),
    Case("sdxl", Txt2Img, 1024, 4, 20, 5.0),
    Case("sdxl", Encode, 1024, 8),
    Case("sd_x4", Upscale, 128, 8, 20, 9.0),
    Case("sd_x4", Upscale, 512, 1, 20, 9.0),
)


def rows(case: Case) -> list[dict[str, Any]]:
    """What the op is given; each op takes the columns that it knows."""
    rng = np.random.default_rng(0)
    shape = (case.side_px, case.side_px)
    common = {
        "prompt": PROMPT,
        "negative_prompt": "",
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance,
        "scheduler": "ddim",
        "strength": 1.0,
        "height": case.side_px,
        "width": case.side_px,
    }
    mask = np.zeros(shape, np.uint8)
    mask[: case.side_px // 2] = 255
    return [
        {
            **common,
            "seed": i,
            "image": rng.integers(0, 256, (*shape, 3), np.uint8),
            "mask_image": mask,
            "latents": rng.standard_normal((4, case.side_px // 8, case.side_px // 8), np.float32),
        }
        for i in range(case.batch_size)
    ]


def peer(case: Case, folder: Path, device: str, dtype: torch.dtype) -> Callable[[list[dict[str, Any]]], Any]:
    """The bare diffusers call: PIL-free tensors in, numpy pictures out, as an engineer would write it by hand."""
    if case.op in (Encode, Decode):
        vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype).to(device)

        def encode(batch: list[dict[str, Any]]) -> Any:
            images = torch.from_numpy(np.stack([row["image"] for row in batch])).to(device).permute(0, 3, 1, 2)
            return vae.encode((images / 127.5 - 1).to(dtype)).latent_dist.parameters.half().cpu().numpy()

        def decode(batch: list[dict[str, Any]]) -> Any:
            latents = torch.from_numpy(np.stack([row["latents"] for row in batch])).to(device, dtype)
            images = vae.decode(latents / vae.config.scaling_factor).sample
            return (images.float().clamp(-1, 1).add(1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()

        return encode if case.op is Encode else decode
    classes = {
        Txt2Img: AutoPipelineForText2Image,
        Img2Img: AutoPipelineForImage2Image,
        Inpaint: AutoPipelineForInpainting,
        Upscale: StableDiffusionUpscalePipeline,
    }
    pipe = classes[case.op].from_pretrained(folder, torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    if case.op is Upscale and case.side_px > 256:
        pipe.vae.enable_tiling()  # Without, the decoder asks for hundreds of gigabytes.

    def call(batch: list[dict[str, Any]]) -> Any:
        arguments: dict[str, Any] = {
            "prompt": [row["prompt"] for row in batch],
            "num_inference_steps": case.steps,
            "guidance_scale": case.guidance,
            "generator": [torch.Generator("cpu").manual_seed(row["seed"]) for row in batch],
            "output_type": "np",
        }
        images = torch.from_numpy(np.stack([row["image"] for row in batch])).permute(0, 3, 1, 2) / 255
        if case.op is Txt2Img:
            arguments |= {"height": case.side_px, "width": case.side_px}
        else:
            arguments["image"] = images
        if case.op in (Img2Img, Inpaint):
            arguments["strength"] = 1.0
        if case.op is Inpaint:
            masks = torch.from_numpy(np.stack([row["mask_image"] for row in batch]))[:, None] / 255
            arguments |= {"mask_image": masks, "height": case.side_px, "width": case.side_px}
        return pipe(**arguments).images

    return call


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(action: Callable[[], Any], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def peak_memory(action: Callable[[], Any], device: str) -> float | None:
    """GB that the call allocates at most, weights included; None where the device does not count."""
    if not device.startswith("cuda"):
        action()
        return None
    torch.cuda.reset_peak_memory_stats()
    action()
    return torch.cuda.max_memory_allocated() / 1e9


def peak_tflops(device: str) -> float:
    """What a plain bf16 matrix product reaches here."""
    side = 8192 if device.startswith("cuda") else 1024
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    times = [seconds(lambda: [a @ b for _ in range(5)], device) / 5 for _ in range(5)]
    return 2 * side**3 / min(times) / 1e12


def measure(
    case: Case, folder: Path, device: str, dtype: torch.dtype, rounds: int, peak: float
) -> dict[str, float | str | None]:
    """Both sides in turn; medians over the rounds after one warm-up."""
    batch = rows(case)
    op = case.op(model="x", device=device)
    model = op.load(folder)
    ours_gb = peak_memory(lambda: op.run(model, batch), device)
    del model
    gc.collect()
    bare = peer(case, folder, device, dtype)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        bare(batch)
    flops = counter.get_total_flops()
    with torch.inference_mode():
        peer_gb = peak_memory(lambda: bare(batch), device)
    model = op.load(folder)
    op.run(model, batch)
    ours, theirs = [], []
    for _ in range(rounds):
        with torch.inference_mode():
            theirs.append(seconds(lambda: bare(batch), device))
        ours.append(seconds(lambda: op.run(model, batch), device))
    mine, other = statistics.median(ours), statistics.median(theirs)
    return {
        "case": case.name,
        "batch_size": case.batch_size,
        "steps": case.steps,
        "images_per_s": case.batch_size / mine,
        "diffusers_images_per_s": case.batch_size / other,
        "ratio": other / mine,
        "tflop_per_image": flops / case.batch_size / 1e12,
        "tflop_per_s": flops / mine / 1e12,
        "share_of_peak": flops / mine / 1e12 / peak,
        "peak_gb": ours_gb,
        "diffusers_peak_gb": peer_gb,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divide every width, to try the script out")
    parser.add_argument("--only", help="cases whose name holds this text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the models there")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    peak = peak_tflops(args.device)
    print(json.dumps({"machine": machine, "torch": torch.__version__, "bf16_peak_tflops": peak}), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        for case in CASES:
            if args.only and args.only not in case.name:
                continue
            if args.shrink > 1:
                case = case.small()
            weights = save(case.model, folder, args.device, dtype, args.shrink)
            found = measure(case, weights, args.device, dtype, args.rounds, peak)
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}), flush=True)
            gc.collect()
            if args.device.startswith("cuda"):
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
