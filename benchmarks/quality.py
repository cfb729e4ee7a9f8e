"""How well `builtin:shapes` draws what it is told, and how well its autoencoder keeps a picture.

    python benchmarks/quality.py

200 held-out captions (their combination of size, colour, shape and background was never drawn in training), drawn with
replacement, and then every one of them, each under DRAWS draws of noise; 25 steps, judged by rules on pixels; and the
reconstruction of 400 held-out pictures.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from ldm_ops.builtin import draw
from ldm_ops.builtin.draw import Caption
from ldm_ops.builtin.training.autoencoder import psnr
from ldm_ops.builtin.training.captions import held_out_sample, split
from ldm_ops.builtin.training.score import score

DRAWS = 4


def scores(pipe: StableDiffusionPipeline, captions: list[Caption]) -> dict[str, Any]:
    """The mean over all draws by attribute, and each draw's share of pictures that are right in all."""
    found = [score(pipe, captions, 2.0, first_seed=100_000 * draw) for draw in range(DRAWS)]
    return {name: round(mean(draw[name] for draw in found), 4) for name in found[0]} | {
        "draws": [round(draw["all"], 4) for draw in found]
    }


def main() -> None:
    folder = Path(draw.__file__).parent / "shapes"
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    captions = held_out_sample(200)
    everything = split()[1]
    result = {
        "captions": len(captions),
        "distinct": len(set(captions)),
        "the sample": scores(pipe, captions),
        f"all {len(everything)} held-out captions": scores(pipe, everything),
        "autoencoder_psnr_db": psnr(pipe.vae, split()[1], torch.device("cpu")),
        "parameters_m": {
            name: round(sum(p.numel() for p in getattr(pipe, name).parameters()) / 1e6, 2)
            for name in ("vae", "unet", "text_encoder")
        },
        "megabytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
