"""How well the built-in model repaints what a mask marks, and what becomes of the pixels that it leaves out.

    python benchmarks/repaint.py [NUM]

Pictures of one held-out caption, a mask over the middle of them, a prompt for another held-out caption on the same
background; judged by rules on pixels. PSNR is over the unmasked pixels, with and without the image's own put back.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from ldm_ops.builtin import draw as drawing
from ldm_ops.builtin.draw import Caption, draw
from ldm_ops.builtin.judge import judge
from ldm_ops.builtin.training.captions import split
from ldm_ops.inpaint import Inpaint

BORDER_PX = 2
BATCH = 25


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    rng = np.random.default_rng(5)
    held_out = [c for c in split()[1] if not c.position]
    mask = np.zeros((64, 64), np.uint8)
    mask[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = 255
    pairs: list[tuple[Caption, Caption]] = []
    while len(pairs) < count:
        old, new = (held_out[i] for i in rng.integers(0, len(held_out), 2))
        if old.background == new.background and (old.color, old.shape) != (new.color, new.shape):
            pairs.append((old, new))
    folder = Path(drawing.__file__).parent / "shapes"
    result: dict[str, float] = {"pictures": count}
    for preserve in (True, False):
        op = Inpaint(model="builtin:shapes", preserve_unmasked=preserve)
        model = op.load(folder)
        images = [draw(old, np.random.default_rng([6, i])) for i, (old, _) in enumerate(pairs)]
        rows = [
            {
                "prompt": str(new),
                "negative_prompt": "",
                "seed": i,
                "num_inference_steps": 25,
                "guidance_scale": 2.0,
                "scheduler": None,
                "strength": 1.0,
                "image": images[i],
                "mask_image": mask,
            }
            for i, (_, new) in enumerate(pairs)
        ]
        made = [out["image"] for start in range(0, count, BATCH) for out in op.run(model, rows[start : start + BATCH])]
        name = "preserved" if preserve else "not preserved"
        right = [judge(image).agrees(new) for image, (_, new) in zip(made, pairs, strict=True)]
        result[f"{name}: prompt followed"] = float(np.mean(right))
        outside = [(a[mask == 0].astype(float), b[mask == 0]) for a, b in zip(made, images, strict=True)]
        error = float(np.mean([np.square(a - b).mean() for a, b in outside]))
        result[f"{name}: unmasked psnr_db"] = float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
