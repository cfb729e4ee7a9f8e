"""Weights that go beside a model's own: another autoencoder, a ControlNet or T2I-Adapter, textual inversions, LoRAs.

All but the LoRAs belong to the job and are there from the start; LoRAs come and go with the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_ops.adapter_files import is_t2i_adapter, is_tiny_vae, t2i_pipeline, vae_folder
from ldm_ops.op import Op, RowRefused

if TYPE_CHECKING:
    import torch

Loras = tuple[tuple[Path, float], ...]
"""Files and the scale of each, as `set_adapters` takes them."""


@dataclass(frozen=True)
class Adapters:
    """Local files and folders of a job's adapters; a folder with the variant of its weights, an embedding with its
    token."""

    vae: tuple[Path, str | None] | None = None
    controlnet: tuple[Path, str | None] | None = None
    textual_inversion: tuple[tuple[str, Path], ...] = ()

    @property
    def is_t2i(self) -> bool:
        """Whether the control images go through a T2I-Adapter, in place of a ControlNet."""
        return self.controlnet is not None and is_t2i_adapter(self.controlnet[0])

    def pipeline_class(self, folder: Path) -> Any:
        """The diffusers class that loads `folder` beside them, where the op's own class does not."""
        import diffusers

        return getattr(diffusers, t2i_pipeline(folder)) if self.is_t2i else None

    def components(self, dtype: torch.dtype) -> dict[str, Any]:
        """What `from_pretrained` takes in place of a model's own parts."""
        import diffusers

        found: dict[str, Any] = {}
        control = ("adapter", diffusers.T2IAdapter) if self.is_t2i else ("controlnet", diffusers.ControlNetModel)
        for (name, cls), place in ((("vae", diffusers.AutoencoderKL), self.vae), (control, self.controlnet)):
            if place is not None:
                folder, variant = place
                if name == "vae":
                    folder = vae_folder(folder)
                    cls = diffusers.AutoencoderTiny if is_tiny_vae(folder) else cls
                found[name] = cls.from_pretrained(
                    folder,
                    torch_dtype=dtype,
                    use_safetensors=True,
                    local_files_only=True,
                    **({"variant": variant} if variant else {}),
                )
        return found

    def add_tokens(self, pipe: Any) -> None:
        """Teach the pipeline's text encoders the tokens of the textual inversions."""
        from safetensors.torch import load_file

        for token, path in self.textual_inversion:
            tensors = load_file(path)
            if "clip_l" not in tensors:
                pipe.load_textual_inversion(next(iter(tensors.values())), token=token)
                continue
            for name, n in (("clip_l", ""), ("clip_g", "_2")):
                pipe.load_textual_inversion(
                    tensors[name],
                    token=token,
                    tokenizer=getattr(pipe, f"tokenizer{n}"),
                    text_encoder=getattr(pipe, f"text_encoder{n}"),
                )


NO_ADAPTERS = Adapters()


class LoraSlot:
    """The LoRAs that a pipeline holds at the moment; `of_text` are the same where its text encoders hold any of them,
    else empty."""

    def __init__(self) -> None:
        self.held: Loras = ()
        self.of_text: Loras = ()

    def hold(self, pipe: Any, wanted: Loras) -> None:
        """Make the pipeline hold exactly these; without any it is what it was before the first.

        Raises:
            RowRefused: one of them does not fit.
        """
        if wanted == self.held:
            return
        names = [f"lora_{i}" for i in range(len(wanted))]
        if [path for path, _ in wanted] != [path for path, _ in self.held]:
            if self.held:
                pipe.unload_lora_weights()
            self.held = self.of_text = ()
            self._load(pipe, names, [path for path, _ in wanted])
        if wanted:
            pipe.set_adapters(names, adapter_weights=[scale for _, scale in wanted])
            of_text = any(part.startswith("text_encoder") and held for part, held in pipe.get_list_adapters().items())
            self.of_text = wanted if of_text else ()
        self.held = wanted

    def _load(self, pipe: Any, names: Sequence[str], paths: Sequence[Path]) -> None:
        if paths and not hasattr(pipe, "load_lora_weights"):
            raise RowRefused("model.unsupported", f"{type(pipe).__name__} takes no LoRA")
        for name, path in zip(names, paths, strict=True):
            problem = None
            try:
                pipe.load_lora_weights(
                    path.parent, weight_name=path.name, adapter_name=name, local_files_only=True, use_safetensors=True
                )
                if not any(name in held for held in pipe.get_list_adapters().values()):
                    problem = "nothing in it is for this model"
            except Exception as error:
                if Op.is_out_of_memory(error):
                    # No fault of the file: the worker halves the batch, and begins with a pipeline that holds none.
                    pipe.unload_lora_weights()
                    raise
                # torch names the tensors on the lines after its first.
                problem = " ".join(str(error).split()) or type(error).__name__
            if problem is not None:
                pipe.unload_lora_weights()
                raise RowRefused("lora.unfit", f"{path.name} does not fit {type(pipe).__name__}: {problem}")
