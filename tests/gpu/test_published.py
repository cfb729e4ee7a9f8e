"""Every op on pipelines of published shapes: on a GPU at full size in bf16, elsewhere narrow, to keep them running."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu import CASES, Case, peer, rows
from benchmarks.published import PIPELINES, save
from ldm_ops.encode import Encode

PARAMETERS_M = {
    "sd15": {"unet": 859.5, "vae": 83.7, "text_encoder": 123.1},
    "sd21": {"unet": 865.9, "vae": 83.7, "text_encoder": 340.4},
    "sdxl": {"unet": 2567.5, "vae": 83.7, "text_encoder": 123.1, "text_encoder_2": 694.7},
    "sd_x4": {"unet": 473.4, "vae": 55.3, "text_encoder": 340.4},
}


@pytest.mark.parametrize("name", list(PIPELINES))
def test_the_shapes_are_those_of_the_published_models(name: str) -> None:
    with torch.device("meta"):
        pipe = PIPELINES[name](1)
    for part, millions in PARAMETERS_M[name].items():
        assert sum(p.numel() for p in getattr(pipe, part).parameters()) / 1e6 == pytest.approx(millions, abs=0.06), part


def compare(case: Case, folder: Path, device: str, dtype: torch.dtype, shrink: int) -> None:
    weights = save(case.model, folder, device, dtype, shrink)
    batch = rows(case)
    op = case.op(model="x", device=device)
    model = op.load(weights)
    made = np.stack([out["latents" if case.op is Encode else "image"] for out in op.run(model, batch)])
    again = np.stack([out["latents" if case.op is Encode else "image"] for out in op.run(model, batch)])
    assert np.array_equal(made, again)
    assert made.astype(float).std() > 0
    with torch.inference_mode():
        theirs = np.asarray(peer(case, weights, device, dtype)(batch))
    if made.dtype == np.uint8:
        if theirs.dtype != np.uint8:
            theirs = np.round(theirs * 255)
        if "mask_image" in op.reads:  # What the mask leaves out is the image itself here.
            half = case.side_px // 2
            made, theirs = made[:, :half], theirs[:, :half]
        assert np.abs(made.astype(float) - theirs.astype(float)).mean() <= 1
    else:
        assert np.allclose(made, theirs, atol=0.02)


@pytest.mark.parametrize("case", CASES[:-1], ids=lambda case: case.name)
def test_an_op_agrees_with_the_bare_pipeline(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    compare(case.small(), tmp_path_factory.getbasetemp() / "published", "cpu", torch.float32, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_op_at_full_size_agrees_with_the_bare_pipeline(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    compare(case, tmp_path_factory.getbasetemp() / "published_bf16", "cuda", torch.bfloat16, 1)
