"""Every op on pipelines of published shapes: speed, share of the card's peak, memory, against diffusers called eagerly.

    python -m benchmarks.gpu [--only sd15] [--options default,full,…] [--rounds 3]     # ops, by every option
    python -m benchmarks.gpu --figures [--only 12] [--rounds 3]                        # prompts or JPEGs to files
    python -m benchmarks.gpu --device cpu --shrink 8 [--figures]                       # only to see that it runs

Needs neither Ray nor a network. Each op and its peer, the bare diffusers call with the same arguments, take turns in
one process on weights of their own; FLOPs are counted by torch on the peer's call (one multiply-add is two), and the
peak is a bf16 product of 8192 × 8192 matrices in the same run. An option that leaves work out has its own FLOPs
counted; what it changes is told in decibels against the op's default, on random weights: on real ones see
`benchmarks/lossy.py`. Power is the mean that nvidia-smi tells, waits are what torch's sync debug mode counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from numpy.typing import NDArray
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.published import save, tiny_vae
from ldm_ops.accelerate import Accelerate, AccelerateAutoencoder
from ldm_ops.adapters import Adapters
from ldm_ops.decode import Decode
from ldm_ops.encode import Encode
from ldm_ops.img2img import Img2Img
from ldm_ops.inpaint import Inpaint
from ldm_ops.op import Op
from ldm_ops.sampling import Sampling
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


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "contiguous": {"channels_last": False},
    "fuse_qkv": {"fuse_qkv": True},
    "regional": {"compile": "regional"},
    "full": {"compile": "full"},
    "cuda_graphs": {"compile": "full", "cuda_graphs": True},
    "vae_batch_size": {"vae_batch_size": 1},
    "guidance_interval": {"guidance_interval": (0.2, 0.8)},
    "deep_cache": {"deep_cache": 3},
    "tiny_vae": {},
    "int8": {"quantize": "int8"},
    "fp8": {"quantize": "fp8"},
    "fp8_full": {"quantize": "fp8", "compile": "full"},
}
"""What `accelerate` is set to, by a name; `tiny_vae` is an autoencoder of TAESD's shape instead of the model's own."""

LEAVES_OUT = ("guidance_interval", "deep_cache", "tiny_vae")


def op_of(case: Case, device: str, option: str) -> Op | None:
    """The op with an option; None where the one knows nothing of the other."""
    known = AccelerateAutoencoder if case.op in (Encode, Decode) else Accelerate
    if option == "tiny_vae" and case.op in (Encode, Decode, Upscale):
        return None
    try:
        return case.op(model="x", device=device, accelerate=known(**OPTIONS[option]))  # type: ignore[call-arg]
    except ValidationError:
        return None


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


@contextmanager
def power(device: str) -> Iterator[list[float]]:
    """Fills in the mean of what the card draws meanwhile, in W, where nvidia-smi is there to tell."""
    found: list[float] = []
    smi = shutil.which("nvidia-smi") if device.startswith("cuda") else None
    if smi is None:
        yield found
        return
    asked = [smi, "--query-gpu=power.draw", "--format=csv,noheader,nounits", "-lms", "200"]
    with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) as process:
        yield found
        process.terminate()
        said, _ = process.communicate()
    readings = [float(line) for line in said.split() if line.replace(".", "", 1).isdigit()]
    found += [statistics.mean(readings)] if readings else []


def waits(action: Callable[[], Any], device: str) -> int | None:
    """How often the host waits for the device in one call."""
    if not device.startswith("cuda"):
        return None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in seen)


def made_by(op: Op, model: Any, batch: list[dict[str, Any]]) -> NDArray[Any]:
    return np.stack([output["latents" if isinstance(op, Encode) else "image"] for output in op.run(model, batch)])


def error_db(made: NDArray[Any], exact: NDArray[Any]) -> float | None:
    """PSNR of pictures; of latents against their own range. None where they are equal."""
    error = np.square(made.astype(float) - exact.astype(float)).mean()
    peak = 255.0 if exact.dtype == np.uint8 else float(np.ptp(exact.astype(float)))
    return None if error == 0 else float(10 * np.log10(peak**2 / error))


@dataclass
class Peer:
    """The bare call on weights of its own, with what all options are measured against."""

    call: Callable[[list[dict[str, Any]]], Any]
    load_s: float
    flops: int
    peak_gb: float | None

    @classmethod
    def of(cls, case: Case, folder: Path, device: str, dtype: torch.dtype, batch: list[dict[str, Any]]) -> Peer:
        start = time.perf_counter()
        call = peer(case, folder, device, dtype)
        synchronize(device)
        load_s = time.perf_counter() - start
        with torch.inference_mode():
            with FlopCounterMode(display=False) as counter:
                call(batch)
            return cls(call, load_s, counter.get_total_flops(), peak_memory(lambda: call(batch), device))


def measure(
    case: Case, option: str, op: Op, bare: Peer, folder: Path, device: str, rounds: int, peak: float, exact: list[Any]
) -> dict[str, Any]:
    """Both sides in turn; medians over the rounds after a warm-up, in which what is compiled is compiled.

    `exact` is what errors are told against; where it is empty, this is what the next ones are.
    """
    batch = rows(case)
    # The peer's weights lie there too.
    others_gb = torch.cuda.memory_allocated() / 1e9 if device.startswith("cuda") else 0.0
    start = time.perf_counter()
    if option == "tiny_vae":
        assert isinstance(op, Sampling)
        model = op.load(folder, Adapters(vae=(tiny_vae(folder.parent), None)))
    else:
        model = op.load(folder)
    synchronize(device)
    load_s = time.perf_counter() - start
    warm_up_s = seconds(lambda: op.run(model, batch), device)
    made: list[NDArray[Any]] = []
    with power(device) as watts:
        gb = peak_memory(lambda: made.append(made_by(op, model, batch)), device)
    if not exact:
        exact += made
    flops = bare.flops
    if option in LEAVES_OUT:
        with FlopCounterMode(display=False) as counter:
            op.run(model, batch)
        flops = counter.get_total_flops()
    ours, theirs = [], []
    for _ in range(rounds):
        with torch.inference_mode():
            theirs.append(seconds(lambda: bare.call(batch), device))
        ours.append(seconds(lambda: op.run(model, batch), device))
    mine, other = statistics.median(ours), statistics.median(theirs)
    return {
        "case": case.name,
        "option": option,
        "batch_size": case.batch_size,
        "steps": case.steps,
        "images_per_s": case.batch_size / mine,
        "diffusers_images_per_s": case.batch_size / other,
        "ratio": other / mine,
        "ratio_range": [round(min(theirs) / max(ours), 3), round(max(theirs) / min(ours), 3)],
        "tflop_per_image": flops / case.batch_size / 1e12,
        "tflop_per_s": flops / mine / 1e12,
        "share_of_peak": flops / mine / 1e12 / peak,
        "share_of_790": flops / mine / 790e12,
        "error_db": error_db(made[0], exact[0]),
        "peak_gb": None if gb is None else gb - others_gb,
        "diffusers_peak_gb": bare.peak_gb,
        "watts": watts[0] if watts else None,
        "waits": waits(lambda: op.run(model, batch), device),
        "load_s": load_s,
        "diffusers_load_s": bare.load_s,
        "warm_up_s": warm_up_s,
    }


def forget(device: str) -> None:
    """Give back what a model held."""
    gc.collect()
    torch._dynamo.reset()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divide every width, to try the script out")
    parser.add_argument("--only", help="cases whose name holds this text")
    parser.add_argument("--options", default=",".join(OPTIONS), help="of these; errors are against the first")
    parser.add_argument("--figures", action="store_true", help="from prompts or JPEGs to files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the models there")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    peak = peak_tflops(args.device)
    print(json.dumps({"machine": machine, "torch": torch.__version__, "bf16_peak_tflops": peak}), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        if args.figures:
            from benchmarks.gpu_figures import measure_figures

            measure_figures(folder, Path(scratch), args.device, dtype, args.shrink, args.only, args.rounds)
            return
        for case in CASES:
            if args.only and args.only not in case.name:
                continue
            if args.shrink > 1:
                case = case.small()
            weights = save(case.model, folder, args.device, dtype, args.shrink)
            bare = Peer.of(case, weights, args.device, dtype, rows(case))
            exact: list[Any] = []
            for option in args.options.split(","):
                op = op_of(case, args.device, option)
                if op is None:
                    continue
                try:
                    found = measure(case, option, op, bare, weights, args.device, args.rounds, peak, exact)
                except ValueError as error:
                    # What this model, device or installation cannot do.
                    found = {"case": case.name, "option": option, "refused": str(error)}
                print(json.dumps(rounded(found)), flush=True)
                forget(args.device)
            del bare
            forget(args.device)


if __name__ == "__main__":
    main()
