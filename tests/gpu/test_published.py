"""Every op on pipelines of published shapes: on a GPU at full size in bf16, elsewhere narrow, to keep them running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import CASES, OPTIONS, Case, Peer, made_by, measure, op_of, peer, rows
from benchmarks.gpu_figures import LINES
from benchmarks.gpu_figures import measure as measure_figure
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


ROUNDING = ("contiguous", "fuse_qkv", "regional", "full", "cuda_graphs", "vae_batch_size")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("option", ROUNDING)
def test_an_exact_option_at_full_size_changes_no_more_than_rounding(
    option: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    case = CASES[0]
    weights = save(case.model, tmp_path_factory.getbasetemp() / "published_bf16", "cuda", torch.bfloat16)
    made = {}
    for name in ("default", option):
        op = op_of(case, "cuda", name)
        assert op is not None
        model = op.load(weights)
        made[name] = made_by(op, model, rows(case))
        assert np.array_equal(made[name], made_by(op, model, rows(case)[::-1])[::-1])
    assert np.abs(made["default"].astype(float) - made[option].astype(float)).mean() <= 1


def test_the_benchmark_runs_narrow_on_a_cpu(tmp_path: Path) -> None:
    case = CASES[0].small()
    weights = save(case.model, tmp_path, "cpu", torch.float32, 8)
    bare = Peer.of(case, weights, "cpu", torch.float32, rows(case))
    found, exact = {}, []
    for option in ("default", "guidance_interval", "deep_cache"):
        op = op_of(case, "cpu", option)
        assert op is not None
        found[option] = measure(case, option, op, bare, weights, "cpu", 1, 1.0, exact)
    assert found["default"]["error_db"] is None
    assert found["default"]["tflop_per_image"] == pytest.approx(bare.flops / case.batch_size / 1e12)
    # Of two steps the first is not guided; the second does without the inner part.
    assert found["guidance_interval"]["tflop_per_image"] < found["default"]["tflop_per_image"]
    assert found["deep_cache"]["tflop_per_image"] < found["default"]["tflop_per_image"]
    assert found["deep_cache"]["error_db"] > 20


def test_options_that_an_op_does_not_know_are_left_out_of_the_benchmark() -> None:
    by_op = {case.op: {name for name in OPTIONS if op_of(case, "cpu", name) is not None} for case in CASES}
    assert by_op[Encode] == {"default", "contiguous", "full"}
    assert by_op[CASES[0].op] == set(OPTIONS)


@pytest.mark.parametrize("line", [LINES[2], LINES[4]], ids=lambda line: line.case.name)
def test_a_figure_is_measured_from_prompts_or_jpegs_to_files(line: Any, tmp_path: Path) -> None:
    small = line.small()
    weights = save(small.case.model, tmp_path, "cpu", torch.float32, 8)
    [found] = measure_figure(small, weights, tmp_path, "cpu", torch.float32, 1)
    assert found["images_per_s"] > 0
    assert len(found["ratios"]) == len(line.bars)
    assert list((tmp_path / "out").iterdir())
