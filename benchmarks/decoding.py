"""Processor time of a photograph from JPEG bytes to the size that a model takes: exact, draft, and plain Pillow.

    python benchmarks/decoding.py [--size 4000x3000] [--to 512] [--repeats 12]

The three take turns. Plain Pillow is open, turn upright, RGB and `ImageOps.fit` with Lanczos. A draft still reads every
byte of the JPEG, so the heavier the file, the less it gains: three weights are measured.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from pipelines.inputs import Loaded, Loader
from pipelines.stages import ImageDecoding


def photograph(width: int, height: int, grain: float, quality: int) -> bytes:
    """A JPEG of soft shapes, edges and some grain, which makes most of its bytes."""
    rng = np.random.default_rng(0)
    soft = Image.fromarray(rng.integers(0, 256, (height // 50, width // 50, 3), np.uint8))
    soft = soft.resize((width, height), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))
    noise = rng.normal(0, grain, (height, width, 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(soft) + noise, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def measure(path: Path, to: int, repeats: int) -> dict[str, float]:
    row = {"image": str(path), "image_version": None, "height": to, "width": to}

    def ours(decoding: ImageDecoding) -> Callable[[], NDArray[np.uint8]]:
        loader = Loader(frozenset({"image"}), None, 8, "#ffffff", {}, decoding=decoding)

        def load() -> NDArray[np.uint8]:
            (loaded,) = loader([row])
            assert isinstance(loaded, Loaded)
            return loaded.image

        return load

    def plain() -> NDArray[np.uint8]:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            return np.asarray(ImageOps.fit(upright, (to, to), Image.Resampling.LANCZOS))

    ways = {"pillow": plain, "exact": ours("exact"), "draft": ours("draft")}
    times: dict[str, list[float]] = {name: [] for name in ways}
    made: dict[str, NDArray[np.uint8]] = {}
    for turn in range(repeats + 1):
        for name, load in ways.items():
            start = time.process_time()
            made[name] = load()
            if turn:
                times[name].append(time.process_time() - start)
    assert np.array_equal(made["exact"], made["pillow"])
    error = float(np.square(made["draft"].astype(float) - made["exact"]).mean())
    median = {name: statistics.median(each) for name, each in times.items()}
    return {
        "jpeg_mb": round(path.stat().st_size / 1e6, 2),
        **{f"{name}_ms": round(1000 * each, 1) for name, each in median.items()},
        "exact_over_pillow": round(median["pillow"] / median["exact"], 2),
        "draft_over_pillow": round(median["pillow"] / median["draft"], 2),
        "draft_psnr_db": round(10 * math.log10(255**2 / error), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4000x3000")
    parser.add_argument("--to", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=12)
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.jpg"
        for grain, quality in ((2, 75), (4, 85), (6, 90)):
            path.write_bytes(photograph(width, height, grain, quality))
            print(json.dumps({"quality": quality, **measure(path, args.to, args.repeats)}))


if __name__ == "__main__":
    main()
