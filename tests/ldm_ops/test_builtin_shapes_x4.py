"""The built-in upscaler, on drawings of combinations that it never saw."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import LDMSuperResolutionPipeline

from benchmarks.upscaling import FOLDER, collage
from ldm_ops.builtin.training.upscaler import compare
from ldm_ops.upscale import Upscale
from tests.ldm_ops.rows import row


@pytest.mark.parametrize("worn", [False, True])
def test_it_gains_three_decibels_over_bicubic_interpolation(worn: bool) -> None:
    pipe = LDMSuperResolutionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    found = compare(pipe, torch.device("cpu"), 10, 20, worn)
    assert found["model_db"] >= found["bicubic_db"] + 3


def test_tiles_leave_no_seam() -> None:
    small = collage(2, 2)
    pictures = []
    for tile in (64, 128):
        op = Upscale(model="builtin:shapes-x4", tile_px=tile)
        rows = [row("", seed=3, image=small, num_inference_steps=4)]
        pictures.append(op.run(op.load(FOLDER), rows)[0]["image"].astype(int))
    assert pictures[0].shape == (512, 512, 3)
    assert np.abs(pictures[0] - pictures[1]).mean() <= 1


def test_it_names_no_folder_of_the_machine_that_trained_it() -> None:
    for path in FOLDER.rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text())
