"""What options that change the picture cost and save, on a model whose pictures can be judged: `builtin:shapes`.

    python -m benchmarks.lossy [--captions 100]

Held-out captions, 25 steps, one draw of noise each: error against the exact picture of the same seed, share of pictures
that are right in colour, shape and background, and FLOPs of the whole batch, counted by torch, against the exact ones.
How much faster they are is another question, of a device: `benchmarks/gpu.py`. int8 is left out without torchao.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from ldm_ops.accelerate import Accelerate
from ldm_ops.builtin import draw
from ldm_ops.builtin.judge import judge
from ldm_ops.builtin.training.captions import choose, split
from ldm_ops.txt2img import Txt2Img

BATCH = 10
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"channels_last": True},
    {"vae_batch_size": 1},
    {"fuse_qkv": True},
    {"guidance_interval": (0.0, 0.8)},
    {"guidance_interval": (0.2, 0.8)},
    {"guidance_interval": (0.0, 0.4)},
    {"deep_cache": 2},
    {"deep_cache": 3},
    {"deep_cache": 5},
    {"deep_cache": 2, "guidance_interval": (0.0, 0.8)},
    {"quantize": "int8"},
)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float | None:
    """Decibels, over all pictures; None where they are equal."""
    error = np.square(a.astype(float) - b.astype(float)).mean()
    return None if error == 0 else round(float(10 * np.log10(255**2 / error)), 1)


def pictures(captions: list[draw.Caption], accelerate: dict[str, Any]) -> tuple[NDArray[np.uint8], int]:
    """The pictures and the FLOPs that they took."""
    op = Txt2Img(model="builtin:shapes", device="cpu", accelerate=Accelerate(**accelerate))
    model = op.load(Path(draw.__file__).parent / "shapes")
    common = {"negative_prompt": "", "num_inference_steps": 25, "guidance_scale": 2.0, "scheduler": None}
    size = {"height": draw.IMAGE_PX, "width": draw.IMAGE_PX}
    rows = [{"prompt": str(caption), "seed": i, **common, **size} for i, caption in enumerate(captions)]
    made: list[NDArray[np.uint8]] = []
    with FlopCounterMode(display=False) as counter:
        for i in range(0, len(rows), BATCH):
            made += [output["image"] for output in op.run(model, rows[i : i + BATCH])]
    return np.stack(made), counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=100)
    captions = choose(split()[1], np.random.default_rng(0), parser.parse_args().captions)
    torch.set_num_threads(1)
    exact: tuple[NDArray[np.uint8], int] | None = None
    for option in OPTIONS:
        if "quantize" in option and importlib.util.find_spec("torchao") is None:
            continue
        made, flops = pictures(captions, option)
        exact = exact or (made, flops)
        right = sum(judge(picture).agrees(caption) for picture, caption in zip(made, captions, strict=True))
        found = {
            "psnr_db": psnr(made, exact[0]),
            "right": round(right / len(captions), 3),
            # Torch counts no int8 product.
            "flops": None if "quantize" in option else round(flops / exact[1], 3),
        }
        print(json.dumps({"option": option, **found}), flush=True)


if __name__ == "__main__":
    main()
