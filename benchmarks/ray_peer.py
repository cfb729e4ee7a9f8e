"""The peer: the same rows by Ray Data alone, read_parquet → map_batches → write_parquet, with or without its own
checkpoint.

    python -m benchmarks.ray_peer INPUT OUT CHECKPOINT READER MODEL STEPS BATCH WORKERS NOTES

CHECKPOINT is a folder, or `-`; READER is `default`, which puts small files together into one block, or `v1`, which
keeps them apart (Ray 2.60). The op is the product's own, so that a row costs the same.
"""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path
from typing import Any


class Sampler:
    """Callable on a batch of rows with `id` and `prompt`; adds the picture."""

    def __init__(self, model: str, steps: int, notes: str) -> None:
        import torch

        from ldm_ops.txt2img import Txt2Img

        torch.set_num_threads(1)
        self.notes = notes
        self.op = Txt2Img(model=model, num_inference_steps=steps, device="cpu")
        self.model = self.op.load(Path(model))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from PIL import Image

        descriptor = os.open(self.notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{time.time():.3f} {os.getpid()} begin 0 {len(batch['id'])}\n".encode())
        os.close(descriptor)
        rows = [self._row(prompt, i) for i, prompt in enumerate(batch["prompt"])]
        pictures = []
        for made in self.op.run(self.model, rows):
            data = io.BytesIO()
            Image.fromarray(made["image"]).save(data, "png")
            pictures.append(data.getvalue())
        return {"id": batch["id"], "image": pictures}

    def _row(self, prompt: str, seed: int) -> dict[str, Any]:
        row = {name: getattr(self.op, name, None) for name in ("guidance_scale", "num_inference_steps", "scheduler")}
        return {
            **row,
            "prompt": str(prompt),
            "negative_prompt": "",
            "seed": seed,
            "scheduler": "ddim",
            "height": 64,
            "width": 64,
            "loras": (),
        }


def main() -> None:
    source, out, checkpoint, reader, model, steps, batch, workers, notes = sys.argv[1:]
    import ray
    import ray.data

    # With two CPUs a resume from its checkpoint gets stuck: its own actors take both.
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.use_datasource_v2 = reader == "default"
    if checkpoint != "-":
        from ray.data.checkpoint import CheckpointConfig

        context.checkpoint_config = CheckpointConfig(
            id_column="id", checkpoint_path=checkpoint, delete_checkpoint_on_success=False
        )
    files = sorted(map(str, Path(source).glob("*.parquet")))
    rows = ray.data.read_parquet(files, override_num_blocks=len(files))
    made = rows.map_batches(
        Sampler,
        fn_constructor_args=(model, int(steps), notes),
        batch_size=int(batch),
        compute=ray.data.ActorPoolStrategy(size=int(workers)),
        num_cpus=0.5,
    )
    made.write_parquet(out)


if __name__ == "__main__":
    main()
