"""What `builtin:shapes-x4` gains over bicubic interpolation, what tiles cost, and the memory of a large picture.

    python benchmarks/upscaling.py [NUM] [SHEET.png]

Held-out drawings, 64 → 256 px, shrunk plainly and worn by blur, noise and JPEG; the same picture by small tiles and
whole; the peak memory of a 512 → 2048 px upscale in a process of its own; and, side by side, the small picture, bicubic
interpolation, the model and the truth.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import LDMSuperResolutionPipeline
from PIL import Image

from ldm_ops.builtin import draw as drawing
from ldm_ops.builtin.draw import all_captions, draw
from ldm_ops.builtin.training.captions import choose, split
from ldm_ops.builtin.training.degrade import SCALE, shrink, wear
from ldm_ops.builtin.training.upscaler import compare, to_BCHW
from ldm_ops.upscale import Upscale

FOLDER = Path(drawing.__file__).parent / "shapes-x4"
STEPS = 20

LARGE = """
import sys
import numpy as np
from pathlib import Path
from ldm_ops.upscale import Upscale
def peak_mb():
    # Not ru_maxrss, which begins with that of the process that started this one.
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) // 1024

op = Upscale(model="x", num_inference_steps=2)
model = op.load(Path(sys.argv[1]))
row = {"prompt": "", "negative_prompt": "", "seed": 1, "num_inference_steps": 2, "guidance_scale": 1.0}
row["scheduler"] = None
before = peak_mb()
image = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
made = op.run(model, [{**row, "image": image}])[0]["image"]
assert made.shape == (2048, 2048, 3)
print(before, peak_mb())
"""


def collage(columns: int, rows: int) -> np.ndarray:
    """A large drawing of many small ones: (64·rows, 64·columns, 3) uint8."""
    rng = np.random.default_rng(8)
    captions = all_captions()
    tiles = [[draw(captions[int(rng.integers(len(captions)))], rng, 1) for _ in range(columns)] for _ in range(rows)]
    return np.concatenate([np.concatenate(line, 1) for line in tiles])


def sheet(pipe: LDMSuperResolutionPipeline, path: Path) -> None:
    """Three plain and three worn pictures, a line each: small, bicubic, the model's, the truth."""
    rng = np.random.default_rng(77)
    lines = []
    for worn in (False, True):
        for caption in choose(split()[1], rng, 3):
            truth = draw(caption, rng, SCALE)
            small = Image.fromarray(wear(truth, rng) if worn else shrink(truth))
            made = pipe(
                to_BCHW([np.asarray(small)], torch.device("cpu")),
                num_inference_steps=STEPS,
                generator=torch.Generator().manual_seed(1),
                output_type="np",
            ).images[0]
            size = (truth.shape[1], truth.shape[0])
            plain = [
                np.asarray(small.resize(size, kind)) for kind in (Image.Resampling.NEAREST, Image.Resampling.BICUBIC)
            ]
            lines.append(np.concatenate([*plain, np.round(made * 255).astype(np.uint8), truth], 1))
    Image.fromarray(np.concatenate(lines)).save(path)


def seam_error() -> dict[str, float]:
    small = collage(3, 3)
    row = {
        "prompt": "",
        "negative_prompt": "",
        "seed": 3,
        "num_inference_steps": STEPS,
        "guidance_scale": 1.0,
        "scheduler": None,
        "image": small,
    }
    pictures = []
    for tile in (64, 256):
        op = Upscale(model="x", num_inference_steps=STEPS, tile_px=tile)
        pictures.append(op.run(op.load(FOLDER), [row])[0]["image"].astype(int))
    difference = np.abs(pictures[0] - pictures[1])
    return {
        "mean of 255": float(difference.mean()),
        "share of pixels off by more than 8": float((difference > 8).mean()),
    }


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    pipe = LDMSuperResolutionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    device = torch.device("cpu")
    if len(sys.argv) > 2:
        sheet(pipe, Path(sys.argv[2]))
    result: dict[str, object] = {}
    for name, worn in (("shrunk", False), ("worn", True)):
        found = compare(pipe, device, count, STEPS, worn)
        result[name] = {**found, "gain_db": found["model_db"] - found["bicubic_db"]}
    result["tiles of 64 against one of 256"] = seam_error()
    made = subprocess.run([sys.executable, "-c", LARGE, str(FOLDER)], capture_output=True, text=True, check=True)
    before, after = (int(n) for n in made.stdout.split())
    result["512 to 2048 px, peak MB"] = {"loaded": before, "peak": after}
    result["parameters_m"] = round(sum(p.numel() for p in pipe.unet.parameters()) / 1e6, 2)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
