"""Captions to text embeddings, once, so that a training need not run its text encoders in every epoch."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ldm_ops.describe import PROMPT_ENCODERS, WITH_T5
from ldm_ops.device import Dtype, pick_device, pick_dtype
from ldm_ops.op import Op, Row, RowRefused
from ldm_ops.prompts import encode
from ldm_ops.sampling import ModelName, too_long

if TYPE_CHECKING:
    import torch

EmbeddingDtype = Literal["fp16", "bf16", "fp32"]


@dataclass
class TextEncoders:
    """A pipeline with its tokenizers and text encoders alone, and in which order `encode_prompt` returns what."""

    pipe: Any
    returns: tuple[str | None, ...]


class Embed(Op):
    """Caption → what a pipeline's own `encode_prompt` makes of it. A row brings `prompt`; "" is the null caption.

    Where the pipeline gives an attention mask (PixArt), its denoiser sees nothing else, and padding is left out. Where
    it gives none (Stable Diffusion, SDXL, SD3, FLUX), its denoiser attends to the padding too, whose states depend on
    the caption: then every position is kept.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"prompt"})
    writes: ClassVar[frozenset[str]] = frozenset({"prompt_embeds", "pooled_prompt_embeds", "prompt_truncated"})
    parts: ClassVar[tuple[str, ...]] = ("text_encoder",)

    model: ModelName = Field(description="a pipeline with text encoders: builtin:…, hub id, folder, s3")
    revision: str | None = Field(None, description="commit or tag of a hub model; needed there, and only there")
    variant: str | None = Field(None, description="weight file variant of the model, such as fp16")
    max_sequence_length: int | None = Field(
        None, ge=1, le=4096, description="tokens of a T5; the pipeline's own number where left out"
    )
    long_prompts: Literal["truncate", "error"] = Field(
        "truncate",
        description="of a caption longer than the text encoders take: cut it and record that, or fail the row",
    )
    dtype: Dtype = Field("auto", description="of the computation; auto is bf16 on a GPU that has it, fp32 on a CPU")
    store_dtype: EmbeddingDtype = Field("fp16", description="of what is stored")

    def load(self, folder: Path) -> TextEncoders:
        """Load tokenizers and text encoders; no denoiser, no autoencoder.

        Raises:
            ValueError: a pipeline whose `encode_prompt` is not known here, or one without the parameter that is set.
        """
        import diffusers

        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        name = index["_class_name"]
        if name not in PROMPT_ENCODERS:
            raise ValueError(f"{folder} is a {name}; embed knows {', '.join(sorted(PROMPT_ENCODERS))}")
        cls = getattr(diffusers, name)
        if self.max_sequence_length is not None and name not in WITH_T5:
            raise ValueError(f"{folder} is a {name}, without a T5; leave max_sequence_length out")
        left_out: dict[str, Any] = {
            part: None
            for part, entry in index.items()
            if isinstance(entry, list) and (entry == [None, None] or not part.startswith(("text_encoder", "tokenizer")))
        }
        if "requires_safety_checker" in inspect.signature(cls.__init__).parameters:
            left_out["requires_safety_checker"] = False
        if self.variant is not None:
            left_out["variant"] = self.variant
        device = pick_device(self.device)
        pipe = cls.from_pretrained(
            folder,
            torch_dtype=pick_dtype(self.dtype, device),
            use_safetensors=True,
            local_files_only=True,
            **left_out,
        )
        pipe.to(device)
        shape = folder / "transformer" / "config.json"
        if shape.is_file():
            # SD3 asks its denoiser, which is not here, how wide the T5 would be that it lacks.
            config = SimpleNamespace(**json.loads(shape.read_text(encoding="utf-8")))
            object.__setattr__(pipe, "transformer", SimpleNamespace(config=config))
        return TextEncoders(pipe, PROMPT_ENCODERS[name])

    def run(self, model: TextEncoders, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Embed one caption per row.

        Returns, per row: `prompt_embeds`, (tokens, D), and `pooled_prompt_embeds`, (P,) or None where the model has
        none, both in `store_dtype`, bf16 as the uint16 that hold its bits; `prompt_truncated`, bool.

        Raises:
            RowRefused: a caption that is too long, NaN, or values too large for `store_dtype`.
        """
        import torch

        truncated = [too_long(model.pipe, row["prompt"], self.max_sequence_length) for row in rows]
        if self.long_prompts == "error" and any(truncated):
            raise RowRefused("prompt.too_long", "the caption has more tokens than the text encoder takes")
        with torch.inference_mode():
            by_name = encode(model.pipe, model.returns, [row["prompt"] for row in rows], **self._options(model))
        embeds_BTD = self._stored(by_name["prompt_embeds"])
        pooled = self._stored(by_name["pooled_prompt_embeds"]) if "pooled_prompt_embeds" in by_name else None
        lengths = [embeds_BTD.shape[1]] * len(rows)
        if "prompt_attention_mask" in by_name:
            mask_BT = by_name["prompt_attention_mask"].bool().cpu()
            lengths = mask_BT.sum(1).tolist()
            if not torch.equal(mask_BT, torch.arange(mask_BT.shape[1]) < mask_BT.sum(1, keepdim=True)):
                raise RowRefused(
                    "model.unsupported", "the tokenizer pads on the left; embed takes padding on the right"
                )
        return [
            {
                "prompt_embeds": _array(embeds_BTD[i, :length]),
                "pooled_prompt_embeds": None if pooled is None else _array(pooled[i]),
                "prompt_truncated": truncated[i],
            }
            for i, length in enumerate(lengths)
        ]

    def _options(self, model: TextEncoders) -> dict[str, Any]:
        length = sequence_length(model.pipe, self.max_sequence_length)
        return {} if length is None else {"max_sequence_length": length}

    def _stored(self, values: torch.Tensor) -> torch.Tensor:
        import torch

        stored = values.to({"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[self.store_dtype])
        if not bool(torch.isfinite(stored).all()):
            raise RowRefused("model.nan", "the embedding holds NaN, or does not fit store_dtype; try bf16")
        return stored.cpu()


def sequence_length(pipe: Any, wanted: int | None) -> int | None:
    """`wanted`, else what the pipeline itself gives its T5; None where it has no such parameter."""
    asked = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    return None if asked is None else wanted or asked.default


def _array(values: torch.Tensor) -> np.ndarray[Any, Any]:
    import torch

    # numpy knows no bf16.
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).contiguous().numpy()
