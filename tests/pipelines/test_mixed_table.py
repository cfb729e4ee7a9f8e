"""What a mixed table costs: the benchmark's figures, and whether it counts what a U-Net really does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.mixed_table import FEWER_CALLS, USEFUL, Counts, measure
from ldm_ops.txt2img import Txt2Img
from tests.ldm_ops.rows import row


def test_a_mixed_table_is_done_with_little_padding_and_few_calls() -> None:
    found = measure(2000, 0)
    assert USEFUL <= found["useful"] <= 1
    assert found["fewer_calls"] >= FEWER_CALLS


def test_the_benchmark_counts_what_a_real_pipeline_does(tiny_model: Path) -> None:
    op = Txt2Img(model="x")
    model = op.load(tiny_model)
    counts, seen = Counts(), Counts()

    def note(_: Any, arguments: tuple[Any, ...]) -> None:
        seen.calls += 1
        seen.sample_steps += len(arguments[0])

    model.pipe.unet.register_forward_pre_hook(note)
    for steps, guidance in ((2, 1.0), (3, 7.5)):
        more = {"height": 64, "width": 64, "num_inference_steps": steps, "guidance_scale": guidance}
        rows = [row(seed=seed, **more) for seed in range(3)]
        counts.add(rows)
        op.run(model, rows)
    assert (seen.calls, seen.sample_steps) == (counts.calls, counts.sample_steps) == (5, 24)
