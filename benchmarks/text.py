"""How many rows go through the text encoder where prompts repeat, against `encode_prompt` for each batch.

    python -m benchmarks.text [--distinct 40] [--repeats 10]

Prompts stand `repeats` times each in a shuffled list, under one negative prompt, in batches of 8 with `builtin:shapes`.
A hook on the text encoder counts the rows of every call. The embeddings that the pipeline is called with are compared,
bit by bit, with those that `encode_prompt` gives for each batch, and for each prompt alone. Last: what it costs that
every prompt is encoded alone, where none repeats.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

import ldm_ops.builtin
from ldm_ops.builtin.draw import all_captions
from ldm_ops.device import set_threads
from ldm_ops.prompts import Prompts

FOLDER = Path(ldm_ops.builtin.__file__).parent / "shapes"
NEGATIVE = "a large gray background"
BATCH_SIZE = 8


class Rows:
    """Of each call of a text encoder."""

    def __init__(self, encoder: Any) -> None:
        self.count = 0
        encoder.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.count += len(arguments[0] if arguments else named["input_ids"])

    def taken(self) -> int:
        count, self.count = self.count, 0
        return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distinct", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    set_threads(1)
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, local_files_only=True)
    rows = Rows(pipe.text_encoder)
    distinct = [str(caption) for caption in random.Random(0).sample(all_captions(), args.distinct)]
    prompts = distinct * args.repeats
    random.Random(1).shuffle(prompts)
    batches = [prompts[i : i + BATCH_SIZE] for i in range(0, len(prompts), BATCH_SIZE)]
    ours = Prompts.of(pipe, type(pipe).__name__)
    assert ours is not None
    with torch.inference_mode():
        start = time.perf_counter()
        made = [ours.arguments(pipe, some, [NEGATIVE] * len(some), True, ()) for some in batches]
        ours_s, ours_rows = time.perf_counter() - start, rows.taken()

        start = time.perf_counter()
        peer = [pipe.encode_prompt(some, "cpu", 1, True, [NEGATIVE] * len(some)) for some in batches]
        peer_s, peer_rows = time.perf_counter() - start, rows.taken()

        single = [distinct[i : i + BATCH_SIZE] for i in range(0, len(distinct), BATCH_SIZE)]
        fresh = Prompts.of(pipe, type(pipe).__name__)
        assert fresh is not None
        start = time.perf_counter()
        for some in single:
            fresh.arguments(pipe, some, None, False, ())
        fresh_s = time.perf_counter() - start
        start = time.perf_counter()
        for some in single:
            pipe.encode_prompt(some, "cpu", 1, False)
        fresh_peer_s = time.perf_counter() - start

        alone = {prompt: pipe.encode_prompt(prompt, "cpu", 1, True, NEGATIVE) for prompt in distinct}
    same_as_alone = all(
        torch.equal(given["prompt_embeds"][i], alone[prompt][0][0])
        and torch.equal(given["negative_prompt_embeds"][i], alone[prompt][1][0])
        for some, given in zip(batches, made, strict=True)
        for i, prompt in enumerate(some)
    )
    same_as_peer = all(
        torch.equal(given["prompt_embeds"], found[0]) and torch.equal(given["negative_prompt_embeds"], found[1])
        for given, found in zip(made, peer, strict=True)
    )
    result = {
        "rows": len(prompts),
        "distinct": args.distinct,
        "encoded_rows": ours_rows,
        "bar": args.distinct + 1,
        "peer_encoded_rows": peer_rows,
        "same_bits_as_alone": same_as_alone,
        "same_bits_as_peer": same_as_peer,
        "s": round(ours_s, 3),
        "peer_s": round(peer_s, 3),
        "none_repeats_s": round(fresh_s, 3),
        "none_repeats_peer_s": round(fresh_peer_s, 3),
    }
    print(json.dumps(result))
    if ours_rows > args.distinct + 1 or not (same_as_alone and same_as_peer):
        raise SystemExit("not reached")


if __name__ == "__main__":
    main()
