"""From prompts or JPEGs to files on one GPU, with the peer that an engineer would write, in turn: see `gpu.py`.

The peers are diffusers called eagerly, batch after batch, with what comes before and after in the same loop, or, for
the encoder, a DataLoader with a worker for each core. Ours is an op with the work of the CPU beside it in threads, as
a job does it in processes of its own; the job itself, which needs Ray, is not in these figures. Eager is the op as it
is, compiled the same with `compile: full`; compiling is not in the time, and told beside it.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, AutoPipelineForText2Image, StableDiffusionUpscalePipeline
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import Case, forget, rounded, rows, synchronize
from benchmarks.published import save
from ldm_ops.accelerate import Accelerate, AccelerateAutoencoder
from ldm_ops.encode import Encode
from ldm_ops.op import Op
from ldm_ops.txt2img import Txt2Img
from ldm_ops.upscale import Upscale
from pipelines.images import PngEncoder, encode
from pipelines.inputs import Loaded, Loader

CORES = os.cpu_count() or 1

Batch = list[dict[str, Any]]


@dataclass(frozen=True)
class Line:
    """One line of the table. `bars` are the least ratios to each peer, `least` images a second, `least_busy` the share
    of the time that the GPU works; `limit` is what the FLOPs of the model allow at 790 TFLOP/s."""

    number: int
    case: Case
    batches: int
    peer_batches: tuple[int, ...]
    bars: tuple[float, ...]
    least: float
    limit: float
    scheduler: str = "ddim"
    least_busy: float = 0.0

    def small(self) -> Line:
        return replace(self, case=self.case.small(), batches=2, peer_batches=self.peer_batches[-1:])


LINES = (
    Line(10, Case("sdxl", Txt2Img, 1024, 4, 20, 5.0), 4, (4,), (2.0,), 1.4, 2.81),
    Line(11, Case("sd15", Txt2Img, 512, 16, 50, 7.5), 3, (1, 4, 8, 16), (3.5, 1.6), 3.8, 9.54),
    Line(12, Case("sd21", Txt2Img, 512, 16, 1, 0.0), 32, (16,), (6.0,), 60, 235, "euler", 0.9),
    Line(12, Case("sd15", Txt2Img, 512, 16, 4, 0.0), 16, (16,), (6.0,), 60, 138, "lcm", 0.9),
    Line(13, Case("sd15", Encode, 256, 64), 32, (64,), (1.5,), 1000, 2760),
    Line(13, Case("sd15", Encode, 512, 32), 16, (32,), (1.5,), 270, 699),
    Line(14, Case("sd_x4", Upscale, 128, 16, 20, 9.0), 3, (16,), (2.0,), 0, 16.3),
)


def jpegs(folder: Path, side_px: int, count: int) -> list[Path]:
    """JPEG files of four times the pixels that the model takes, soft shapes and some grain."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        soft = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        big = np.asarray(soft.resize((2 * side_px, 2 * side_px), Image.Resampling.BICUBIC)).astype(float)
        path = folder / f"{i}.jpg"
        Image.fromarray(np.clip(big + rng.normal(0, 4, big.shape), 0, 255).astype(np.uint8)).save(path, quality=90)
        paths.append(path)
    return paths


def batches(line: Line, size: int) -> Iterator[Batch]:
    """All rows of a line in batches of `size`, each with a seed of its own."""
    [row, *_] = rows(replace(line.case, batch_size=1))
    total = line.case.batch_size * line.batches
    for first in range(0, total, size):
        numbers = range(first, min(first + size, total))
        yield [{**row, "scheduler": line.scheduler, "seed": i} for i in numbers]


def peer_pictures(line: Line, weights: Path, device: str, dtype: torch.dtype) -> Callable[[int, Path], None]:
    """`pipe(prompts)` and `image.save`, batch after batch."""
    cls = StableDiffusionUpscalePipeline if line.case.op is Upscale else AutoPipelineForText2Image
    pipe = cls.from_pretrained(weights, torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)

    def run(size: int, out: Path) -> None:
        for batch in batches(line, size):
            given: dict[str, Any] = {"height": line.case.side_px, "width": line.case.side_px}
            if line.case.op is Upscale:
                given = {"image": [Image.fromarray(row["image"]) for row in batch]}
            images = pipe(
                [row["prompt"] for row in batch],
                num_inference_steps=line.case.steps,
                guidance_scale=line.case.guidance,
                generator=[torch.Generator("cpu").manual_seed(row["seed"]) for row in batch],
                **given,
            ).images
            for row, image in zip(batch, images, strict=True):
                image.save(out / f"{row['seed']}.png")

    return run


def our_pictures(line: Line, op: Op, model: Any) -> Callable[[int, Path], None]:
    """The op, and a job's own encoder beside it."""
    fast: PngEncoder = "fpng" if importlib.util.find_spec("fpng") else "pillow"

    def write(picture: NDArray[np.uint8], path: Path) -> None:
        path.write_bytes(encode(picture, "png", png_encoder=fast))

    def run(size: int, out: Path) -> None:
        with ThreadPoolExecutor(CORES) as pool:
            waiting: list[Future[None]] = []
            for batch in batches(line, size):
                made = op.run(model, batch)
                pairs = zip(batch, made, strict=True)
                waiting += [pool.submit(write, o["image"], out / f"{row['seed']}.png") for row, o in pairs]
            for one in waiting:
                one.result()

    return run


def write_latents(file: Path, latents: NDArray[Any]) -> None:
    flat = latents.reshape(len(latents), -1)
    column = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
    pq.write_table(pa.table({"latents": column}), file, compression="none")


class Opened(torch.utils.data.Dataset[Any]):
    """What a DataLoader reads: JPEG → float tensor."""

    def __init__(self, paths: list[Path], side_px: int) -> None:
        self.paths, self.side_px = paths, side_px

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(io.BytesIO(self.paths[i].read_bytes())) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (self.side_px, self.side_px), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def peer_latents(line: Line, weights: Path, device: str, paths: list[Path]) -> Callable[[int, Path], None]:
    """A DataLoader, an eager autoencoder in fp16, `.cpu()` after every batch."""
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    vae = AutoencoderKL.from_pretrained(weights / "vae", torch_dtype=dtype).to(device)

    def run(size: int, out: Path) -> None:
        loader = torch.utils.data.DataLoader(
            Opened(paths, line.case.side_px),
            batch_size=size,
            num_workers=CORES,
            pin_memory=device.startswith("cuda"),
        )
        for i, images in enumerate(loader):
            posterior = vae.encode(images.to(device, dtype)).latent_dist
            write_latents(out / f"{i}.parquet", posterior.parameters.half().cpu().numpy())

    return run


def our_latents(line: Line, op: Op, model: Any, paths: list[Path]) -> Callable[[int, Path], None]:
    """A job's own loader in threads, the op, and Parquet files beside it."""
    loader = Loader(frozenset({"image"}), "fill", 8, "#ffffff", {})
    size_px = {"height": line.case.side_px, "width": line.case.side_px}

    def load(path: Path) -> dict[str, Any]:
        [loaded] = loader([{"image": str(path), "image_version": None, **size_px}])
        assert isinstance(loaded, Loaded)
        return {"image": loaded.image, "seed": 0}

    def run(size: int, out: Path) -> None:
        pieces = [paths[i : i + size] for i in range(0, len(paths), size)]
        with ThreadPoolExecutor(CORES) as pool:
            # Two batches ahead of the device.
            ahead = [[pool.submit(load, path) for path in piece] for piece in pieces[:2]]
            writing: list[Future[None]] = []
            for i in range(len(pieces)):
                batch = [one.result() for one in ahead.pop(0)]
                if i + 2 < len(pieces):
                    ahead.append([pool.submit(load, path) for path in pieces[i + 2]])
                latents = np.stack([output["latents"] for output in op.run(model, batch)])
                writing.append(pool.submit(write_latents, out / f"{i}.parquet", latents))
            for one in writing:
                one.result()

    return run


def busy(action: Callable[[], None], device: str) -> float | None:
    """Share of the time in which the GPU has something to do: what kernels and copies take, one after the other."""
    if not device.startswith("cuda"):
        return None
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        action()
        torch.cuda.synchronize()
        span = time.perf_counter() - start
    return float(sum(event.self_device_time_total for event in profiler.key_averages())) / 1e6 / span


def measure(line: Line, weights: Path, scratch: Path, device: str, dtype: torch.dtype, rounds: int) -> Iterator[Any]:
    """Each peer and both of ours in turn; medians over the rounds."""
    case, total = line.case, line.case.batch_size * line.batches
    out = scratch / "out"
    out.mkdir(exist_ok=True)
    known = AccelerateAutoencoder if case.op is Encode else Accelerate
    ops = {"eager": case.op(model="x", device=device)}  # type: ignore[call-arg]
    if device.startswith("cuda"):
        ops["compiled"] = case.op(model="x", device=device, accelerate=known(compile="full"))  # type: ignore[call-arg]
    loaded = {name: op.load(weights) for name, op in ops.items()}
    run: dict[str, Callable[[], None]] = {}
    if case.op is Encode:
        paths = jpegs(scratch / f"jpegs_{case.side_px}", case.side_px, min(total, 512))
        paths = (paths * -(-total // len(paths)))[:total]
        theirs = peer_latents(line, weights, device, paths)
        ours = {name: our_latents(line, op, loaded[name], paths) for name, op in ops.items()}
    else:
        theirs = peer_pictures(line, weights, device, dtype)
        ours = {name: our_pictures(line, op, loaded[name]) for name, op in ops.items()}
    for size in line.peer_batches:
        run[f"peer_{size}"] = partial(theirs, size, out)
    for name in ours:
        run[name] = partial(ours[name], case.batch_size, out)
    warm_up, times = {}, {name: [] for name in run}  # type: dict[str, float], dict[str, list[float]]
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, action in run.items():
                start = time.perf_counter()
                action()
                synchronize(device)
                took = time.perf_counter() - start
                if turn:
                    times[name].append(took)
                else:
                    warm_up[name] = took
        gpu_busy = {name: busy(run[name], device) for name in ours}
    speed = {name: total / statistics.median(each) for name, each in times.items()}
    peers = [speed[f"peer_{size}"] for size in line.peer_batches]
    # Where there are two bars, the first is of the first batch size, and the second of the best.
    against = [peers[0], max(peers)] if len(line.bars) == 2 else [max(peers)]
    for name in ours:
        ratios = [speed[name] / each for each in against]
        yield {
            "figure": line.number,
            "case": case.name,
            "steps": case.steps,
            "ours": name,
            "images_per_s": speed[name],
            "peers_images_per_s": {size: round(speed[f"peer_{size}"], 3) for size in line.peer_batches},
            "ratios": [round(ratio, 3) for ratio in ratios],
            "bars": line.bars,
            "least_images_per_s": line.least,
            "limit": line.limit,
            "share_of_limit": speed[name] / line.limit,
            "gpu_busy": gpu_busy[name],
            "first_round_s": warm_up[name],
            "reached": all(r >= bar for r, bar in zip(ratios, line.bars, strict=True))
            and speed[name] >= line.least
            and (gpu_busy[name] or 0.0) >= line.least_busy,
        }


def measure_figures(
    folder: Path, scratch: Path, device: str, dtype: torch.dtype, shrink: int, only: str | None, rounds: int
) -> None:
    """Print a JSON line for each of ours in each of LINES whose number is `only`, or whose name holds it."""
    for line in LINES:
        if only and only != str(line.number) and (only.isdigit() or only not in line.case.name):
            continue
        if shrink > 1:
            line = line.small()
        weights = save(line.case.model, folder, device, dtype, shrink)
        for found in measure(line, weights, scratch, device, dtype, rounds):
            print(json.dumps(rounded(found)), flush=True)
        forget(device)
