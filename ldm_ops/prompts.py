"""What text encoders make of prompts: as the pipelines ask for it, and each distinct prompt once."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ldm_ops.describe import PROMPT_ENCODERS

if TYPE_CHECKING:
    import torch

CACHE_BYTES = 512 << 20
"""Of host memory in each worker: some 4,000 prompts of SD 1.5 in fp16, 1,700 of SDXL, 120 of FLUX."""

POOLED = "pooled_prompt_embeds"
GIVEN = "given to projection "

RETURNS: dict[str, tuple[str | None, ...]] = {**PROMPT_ENCODERS, "StableDiffusionUpscalePipeline": ("prompt_embeds",)}

OF_CALL = ("max_sequence_length", "clean_caption")
"""What a pipeline hands from its `__call__` to its `encode_prompt`, which may have another default."""


def encode(pipe: Any, returns: Sequence[str | None], prompts: Sequence[str], **options: Any) -> dict[str, torch.Tensor]:
    """What `encode_prompt` returns for one device batch of prompts, by its name there.

    Args:
        pipe: a pipeline with at least its tokenizers and text encoders.
        returns: the names of what its `encode_prompt` returns, in order; None is left out.
        prompts: B of them.
        options: other parameters of `encode_prompt`.

    Returns:
        `prompt_embeds` (B, T, D), and where the pipeline has them `pooled_prompt_embeds` (B, P) and
        `prompt_attention_mask` (B, T).
    """
    accepts = inspect.signature(pipe.encode_prompt).parameters
    # Some pipelines ask for the prompts of their other encoders; with None those get the first one's.
    others: dict[str, Any] = {name: None for name in ("prompt_2", "prompt_3") if name in accepts}
    # What a prompt gives in guidance's other half belongs to the negative prompt's own embedding.
    guidance = {"do_classifier_free_guidance": False} if "do_classifier_free_guidance" in accepts else {}
    found = pipe.encode_prompt(
        prompt=list(prompts), device=pipe.device, num_images_per_prompt=1, **others, **guidance, **options
    )
    return {name: value for name, value in zip(returns, found, strict=False) if name is not None}


def as_called(pipe: Any) -> dict[str, Any]:
    """What a pipeline that is called with a prompt, and nothing said beside it, gives to its `encode_prompt`."""
    asked = inspect.signature(pipe.__call__).parameters
    accepts = inspect.signature(pipe.encode_prompt).parameters
    return {name: asked[name].default for name in OF_CALL if name in asked and name in accepts}


@dataclass
class Prompts:
    """The embeddings that a loaded pipeline takes in place of prompts, each distinct prompt encoded once.

    Every prompt goes through the text encoders alone, in a batch of one: the last bits of an embedding can depend on
    the shape of the batch, and must depend neither on a row's neighbours nor on what was encoded before. Only a CLIP's
    last projection, of one vector a prompt, is done for the whole device batch, whose length is fixed: of a single
    vector it is another kernel's work, with other last bits than those that a pipeline gets from its batch. On a CPU
    the embeddings are then bit by bit those of the pipeline itself (measured for the sizes of CLIP-L and bigG).

    What is held lies in host memory, so that what fits onto the device does not depend on which rows came before
    either. The least recently used go first.
    """

    returns: tuple[str | None, ...]
    options: dict[str, Any]
    takes_negative: bool
    zero_negative: bool
    max_bytes: int = CACHE_BYTES
    num_bytes: int = 0
    held: OrderedDict[Hashable, dict[str, torch.Tensor]] = field(default_factory=OrderedDict)

    @classmethod
    def of(cls, pipe: Any, class_name: str) -> Prompts | None:
        """For a pipeline whose folder names the class `class_name`; None where it has to be called with the prompts."""
        returns = RETURNS.get(class_name)
        if returns is None:
            return None
        asked = inspect.signature(pipe.__call__).parameters
        if not {name for name in returns if name is not None} <= asked.keys():
            return None
        # FLUX is guided without a second half.
        takes_negative = "negative_prompt_embeds" in asked and class_name != "FluxPipeline"
        zero_negative = bool(getattr(pipe.config, "force_zeros_for_empty_prompt", False))
        return cls(returns, as_called(pipe), takes_negative, zero_negative)

    def arguments(
        self, pipe: Any, prompts: Sequence[str], negative: Sequence[str] | None, guided: bool, adapted: Hashable
    ) -> dict[str, Any]:
        """What the pipeline is called with in place of `prompt` and `negative_prompt`, on its device.

        Args:
            pipe: the pipeline that this is for.
            prompts: B of them.
            negative: as many, or None where there are none.
            guided: whether the pipeline denoises under a negative prompt too.
            adapted: what the text encoders hold beside their own weights.
        """
        found: dict[str, Any] = dict(self._batch(pipe, prompts, adapted))
        # Without a negative prompt SDXL takes zeros, and makes them itself.
        if guided and self.takes_negative and not (negative is None and self.zero_negative):
            against = self._batch(pipe, negative if negative is not None else [""] * len(prompts), adapted)
            # PixArt has a default for it, and refuses both.
            found |= {"negative_prompt": None, **{f"negative_{name}": value for name, value in against.items()}}
        return found

    def _batch(self, pipe: Any, prompts: Sequence[str], adapted: Hashable) -> dict[str, torch.Tensor]:
        import torch

        # Before any is put together: of more than fit, the first would be gone by the last.
        rows = [self._one(pipe, prompt, adapted) for prompt in prompts]
        found = {name: torch.cat([row[name] for row in rows]).to(pipe.device) for name in rows[0]}
        given = [found.pop(name) for name in rows[0] if name.startswith(GIVEN)]
        if given:
            projected = [project(x) for project, x in zip(_projections(pipe), given, strict=True)]
            found[POOLED] = torch.cat(projected, dim=-1)
        return found

    def _one(self, pipe: Any, prompt: str, adapted: Hashable) -> dict[str, torch.Tensor]:
        key = (adapted, prompt)
        if key in self.held:
            self.held.move_to_end(key)
            return self.held[key]
        with _inputs(_projections(pipe)) as given:
            found = encode(pipe, self.returns, [prompt], **self.options)
        if POOLED in found and given:
            del found[POOLED]
            found |= {f"{GIVEN}{i}": x for i, x in enumerate(given)}
        found = {name: x.cpu() for name, x in found.items()}
        self.held[key] = found
        self.num_bytes += _num_bytes(found)
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= _num_bytes(self.held.popitem(last=False)[1])
        return found


def _projections(pipe: Any) -> list[Any]:
    """Of the text encoders that end in one; what they give, one beside the other, is the pooled embedding."""
    encoders = (getattr(pipe, f"text_encoder{n}", None) for n in ("", "_2", "_3"))
    found = (getattr(encoder, "text_projection", None) for encoder in encoders)
    return [projection for projection in found if projection is not None]


@contextmanager
def _inputs(modules: Sequence[Any]) -> Iterator[list[torch.Tensor]]:
    """What the modules are called with meanwhile, in order."""
    seen: list[torch.Tensor] = []

    def note(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        seen.append(arguments[0])

    hooks = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _num_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(x.nbytes for x in tensors.values())
