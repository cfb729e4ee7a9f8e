"""What all ops that denoise under a prompt have in common."""

from __future__ import annotations

import inspect
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, StringConstraints

from ldm_ops.accelerate import Accelerate, set_up
from ldm_ops.adapters import NO_ADAPTERS, Adapters, Loras, LoraSlot
from ldm_ops.autoencoder import Autoencoder
from ldm_ops.device import Dtype, pick_device, pick_dtype
from ldm_ops.op import Op, Row, RowRefused
from ldm_ops.pixels import as_BCHW, from_uint8, grey, is_one_colour, to_host, to_uint8
from ldm_ops.prompts import Prompts
from ldm_ops.schedulers import make_scheduler, scheduler_name, stay_on_host
from ldm_ops.skipping import Steps, skip

if TYPE_CHECKING:
    import torch

SchedulerName = Annotated[str, AfterValidator(scheduler_name)]
SafetyPolicy = Literal["off", "flag", "blank", "reject"]
ModelName = Annotated[str, StringConstraints(min_length=1)]


@dataclass
class Pipeline:
    """A loaded pipeline. `checker` is the safety checker taken off it, so that it can flag without blackening.
    `prompts` is None where the pipeline has to be called with the prompts themselves."""

    pipe: Any
    steps: Steps
    checker: Any
    scheduler_name: str
    scheduler_config: Mapping[str, Any]
    accepts: frozenset[str]
    controlled: bool = False
    loras: LoraSlot = field(default_factory=LoraSlot)
    prompts: Prompts | None = None


@dataclass
class Kept:
    """Latents of one batch after chosen denoising steps: latents_BCHW as the pipeline holds them."""

    every: int
    steps: list[int] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if (step + 1) % self.every == 0:
            self.steps.append(step + 1)
            self.latents.append(tensors["latents"].detach().clone())
        return {}


@dataclass
class _Both:
    """An op's own callback, then the one that looks at what it left."""

    first: Any
    kept: Kept

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        changed: dict[str, Any] = self.first(pipe, step, timestep, tensors)
        self.kept(pipe, step, timestep, {**tensors, **changed})
        return changed


class Sampling(Op):
    """Base of the ops that run a diffusers pipeline with a prompt and a seed per row.

    A row's own parameters win over the fields here. Noise comes from one CPU generator per row, as in
    `pipe(prompt, generator=torch.Generator().manual_seed(seed))`.

    A row may bring `loras`, (file, scale) each. Where the model was loaded with a ControlNet or T2I-Adapter it has to
    bring `control_image`, uint8 (H, W, 3) of the picture's size, and `controlnet_conditioning_scale`.
    """

    reads: ClassVar[frozenset[str]] = frozenset(
        {"prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "scheduler"}
    )
    writes: ClassVar[frozenset[str]] = frozenset({"image", "nsfw", "intermediates"})

    model: ModelName = Field(
        description="builtin:NAME, a hub id such as org/name, a local folder, or s3://… / gs://… of one"
    )
    revision: str | None = Field(None, description="commit or tag of a hub model; needed there, and only there")
    variant: str | None = Field(None, description="weight file variant of the model, such as fp16")
    prompt: str | None = Field(None, max_length=100_000, description="of rows that bring none of their own")
    scheduler: SchedulerName | None = Field(None, description="name of a sampler; the model's own where left out")
    num_inference_steps: int = Field(50, ge=1, le=1000)
    guidance_scale: float = Field(7.5, ge=0, le=100, allow_inf_nan=False)
    negative_prompt: str = ""
    num_images_per_prompt: int = Field(1, ge=1, le=10_000)
    dtype: Dtype = Field("auto", description="auto is bf16 on a GPU that has it, else fp16; fp32 on a CPU")
    safety_checker: SafetyPolicy | None = Field(
        None, description="what to do with a flagged picture; flag where the model has a checker, if left out"
    )
    long_prompts: Literal["truncate", "error"] = Field(
        "truncate",
        description="of a prompt longer than the text encoder takes: cut it and record that, or fail the row",
    )
    save_intermediates: int | None = Field(
        None, ge=1, description="keep the latents and a preview of every K-th denoising step"
    )
    accelerate: Accelerate | None = Field(None, description="what may make it faster, with the same picture or not")

    @abstractmethod
    def _pipeline_class(self, folder: Path) -> Any:
        """The diffusers class, or auto class, that loads `folder`."""

    @abstractmethod
    def _inputs(self, model: Pipeline, rows: Sequence[Row]) -> dict[str, Any]:
        """What this op gives the pipeline beside the common arguments."""

    def _set_up(self, pipe: Any) -> None:
        """What this op changes in the pipeline, once it is loaded."""

    def _finish(self, images_BCHW: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """A last word on the pictures, in [0, 1]."""
        return images_BCHW

    def _may_be_one_colour(self, row: Row) -> bool:
        """Whether a picture of a single colour can be what the row asks for: it brings one."""
        brought = (row.get("image"), row.get("control_image"))
        return any(is_one_colour(picture) for picture in brought if picture is not None)

    def load(self, folder: Path, adapters: Adapters = NO_ADAPTERS) -> Pipeline:
        """Load the pipeline from a local folder onto the device, and with it what goes beside it.

        Raises:
            ValueError: a folder that diffusers cannot load for this op, or no safety checker where one is asked.
        """
        device = pick_device(self.device)
        dtype = pick_dtype(self.dtype, device)
        # A place that the index leaves empty on purpose, such as SD3 without its T5, has to be named.
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        options: dict[str, Any] = {name: None for name, entry in index.items() if entry == [None, None]}
        if self.variant is not None:
            options["variant"] = self.variant
        options |= adapters.components(dtype)
        pipe = (adapters.pipeline_class(folder) or self._pipeline_class(folder)).from_pretrained(
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            # Straight from the file to the device.
            **({"device_map": device} if device == "cuda" else {}),
            **options,
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.to(device)
        adapters.add_tokens(pipe)
        checker = getattr(pipe, "safety_checker", None)
        if checker is None and self.safety_checker not in (None, "off"):
            raise ValueError(f"{folder} has no safety checker; set safety_checker: off")
        if checker is not None:
            # The pipeline would blacken what it flags; the policy here decides instead.
            pipe.register_modules(safety_checker=None)
        accelerate = self.accelerate or Accelerate()
        set_up(pipe, accelerate, device)
        self._set_up(pipe)
        return Pipeline(
            pipe=pipe,
            steps=skip(pipe, accelerate, device),
            checker=None if self.safety_checker == "off" else checker,
            scheduler_name=type(pipe.scheduler).__name__,
            scheduler_config=pipe.scheduler.config,
            accepts=frozenset(inspect.signature(pipe.__call__).parameters),
            controlled=adapters.controlnet is not None,
            prompts=Prompts.of(pipe, index["_class_name"]),
        )

    def bucket(self, row: Row) -> tuple[Any, ...]:
        """Sizes, steps, guidance, sampler; and whether there is a negative prompt at all, which SDXL tells from an
        empty one: a row must not notice its neighbours."""
        image = row.get("image")
        own = tuple(row.get(name) for name in ("height", "width", "num_inference_steps", "scheduler", "strength"))
        control = row.get("control_image")
        return (
            *own,
            row["guidance_scale"],
            bool(row["negative_prompt"]),
            None if image is None else image.shape,
            None if control is None else (control.shape, row["controlnet_conditioning_scale"]),
            row.get("loras") or (),
        )

    def run(self, model: Pipeline, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Make one picture per row.

        Returns, per row: `image`, uint8 (H, W, 3) or None where the policy rejects it; `nsfw`, bool or None where
        nothing checks; `prompt_truncated`, bool; `intermediates`, a list of (step, latents (C, H/8, W/8), preview uint8
        (H, W, 3)).

        Raises:
            RowRefused: a picture with NaN, one of a single colour, or a row that asks for what the pipeline does not
                take.
        """
        import torch

        truncated = [too_long(model.pipe, row["prompt"]) for row in rows]
        if self.long_prompts == "error" and any(truncated):
            raise RowRefused("prompt.too_long", "the prompt has more tokens than the text encoder takes")
        kept = Kept(self.save_intermediates) if self.save_intermediates else None
        self._hold_loras(model, tuple(rows[0].get("loras") or ()))
        name = rows[0]["scheduler"] or model.scheduler_name
        model.pipe.scheduler = make_scheduler(name, dict(model.scheduler_config))
        if model.pipe.device.type != "cpu":
            stay_on_host(model.pipe.scheduler)
        model.steps.begin(len(rows))
        with torch.inference_mode():
            try:
                images_BCHW = as_BCHW(model.pipe(**self._arguments(model, rows, kept)).images)
            finally:
                # What it keeps of one step for the next is device memory.
                model.steps.begin(0)
            bytes_BHWC = to_uint8(self._finish(images_BCHW, rows))
            plain = (bytes_BHWC == bytes_BHWC[:, :1, :1]).flatten(1).all(1)
            pictures, one_colour, finite = to_host(bytes_BHWC, plain, torch.isfinite(images_BCHW).all())
            if not finite:
                raise RowRefused("model.nan", "the model gave NaN; try dtype: fp32 or bf16, or another scheduler")
            flagged = self._flag(model, images_BCHW)
            for picture, is_plain, row in zip(pictures, one_colour, rows, strict=True):
                if is_plain and not self._may_be_one_colour(row):
                    colour = ", ".join(str(level) for level in picture[0, 0])
                    raise RowRefused(
                        "model.blank",
                        f"all pixels are ({colour}); try dtype: fp32 or bf16, another scheduler or guidance_scale",
                    )
            previews = to_host(*(to_uint8(decode(model.pipe, x)) for x in kept.latents)) if kept and kept.steps else []
        outputs: list[dict[str, Any]] = []
        for i, picture in enumerate(pictures):
            nsfw = None if flagged is None else flagged[i]
            hidden = bool(nsfw) and self.safety_checker in ("blank", "reject")
            image = picture if not hidden else (None if self.safety_checker == "reject" else picture * 0)
            steps = [
                (step, latents[i].float().cpu().numpy(), preview[i])
                for step, latents, preview in (zip(kept.steps, kept.latents, previews, strict=True) if kept else ())
            ]
            outputs.append(
                {
                    "image": image,
                    "nsfw": nsfw,
                    "prompt_truncated": truncated[i],
                    "intermediates": [] if hidden else steps,
                }
            )
        return outputs

    def _hold_loras(self, model: Pipeline, wanted: Loras) -> None:
        for name in ("fuse_qkv", "quantize") if wanted and self.accelerate else ():
            if getattr(self.accelerate, name):
                raise RowRefused("model.unsupported", f"a LoRA does not go with accelerate.{name}; leave one out")
        model.loras.hold(model.pipe, wanted)

    def _arguments(self, model: Pipeline, rows: Sequence[Row], kept: Kept | None) -> dict[str, Any]:
        import torch

        first = rows[0]
        arguments: dict[str, Any] = {
            **self._text(model, rows),
            "num_inference_steps": first["num_inference_steps"],
            "guidance_scale": first["guidance_scale"],
            # On the CPU whatever the device, so that the noise of a seed is the same everywhere.
            "generator": [torch.Generator("cpu").manual_seed(row["seed"]) for row in rows],
            "output_type": "pt",
            **self._inputs(model, rows),
        }
        if model.controlled:
            control = [row["control_image"] for row in rows]
            adapter = getattr(model.pipe, "adapter", None)
            if adapter is not None and adapter.config.in_channels == 1:
                control = [grey(one) for one in control]
            arguments["control_image" if "control_image" in model.accepts else "image"] = from_uint8(control)
            scale = "controlnet_conditioning_scale" if adapter is None else "adapter_conditioning_scale"
            arguments[scale] = float(first["controlnet_conditioning_scale"])
        if kept is not None:
            own = arguments.get("callback_on_step_end")
            arguments["callback_on_step_end"] = kept if own is None else _Both(own, kept)
        for name in ("negative_prompt", "callback_on_step_end"):
            if name in arguments and name not in model.accepts:
                raise RowRefused("model.unsupported", f"{type(model.pipe).__name__} takes no {name}")
        return arguments

    def _text(self, model: Pipeline, rows: Sequence[Row]) -> dict[str, Any]:
        prompts = [row["prompt"] for row in rows]
        negative = [row["negative_prompt"] or "" for row in rows] if rows[0]["negative_prompt"] else None
        if model.prompts is not None:
            guided = rows[0]["guidance_scale"] > 1
            return model.prompts.arguments(model.pipe, prompts, negative, guided, model.loras.of_text)
        return {"prompt": prompts} if negative is None else {"prompt": prompts, "negative_prompt": negative}

    def _flag(self, model: Pipeline, images_BCHW: torch.Tensor) -> list[bool] | None:
        if model.checker is None:
            return None
        pipe = model.pipe
        pictures = pipe.image_processor.numpy_to_pil(images_BCHW.float().permute(0, 2, 3, 1).cpu().numpy())
        seen = pipe.feature_extractor(pictures, return_tensors="pt").pixel_values
        seen = seen.to(images_BCHW.device, next(model.checker.parameters()).dtype)
        _, flagged = model.checker(images=images_BCHW.clone(), clip_input=seen)
        return [bool(flag) for flag in flagged]


def too_long(pipe: Any, prompt: str, max_sequence_length: int | None = None) -> bool:
    """Whether every tokenizer of the pipeline has to cut the prompt; of several, one may let the rest through.

    `max_sequence_length` is what a T5 gets, where it is not the pipeline's own number.
    """
    tokenizers = [t for t in (getattr(pipe, f"tokenizer{n}", None) for n in ("", "_2", "_3")) if t is not None]
    # What the pipeline gives a T5 at most, whatever its tokenizer says.
    asked = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    most = max_sequence_length or (asked.default if asked is not None and isinstance(asked.default, int) else 512)
    return bool(tokenizers) and all(
        len(tokenizer(_spelled(pipe, prompt, tokenizer), truncation=False, verbose=False).input_ids)
        > min(tokenizer.model_max_length, most)
        for tokenizer in tokenizers
    )


def _spelled(pipe: Any, prompt: str, tokenizer: Any) -> str:
    """The prompt as the pipeline gives it to the tokenizer: a textual inversion may be several tokens."""
    return str(pipe.maybe_convert_prompt(prompt, tokenizer)) if hasattr(pipe, "maybe_convert_prompt") else prompt


def decode(pipe: Any, latents_BCHW: torch.Tensor) -> torch.Tensor:
    """Latents as the pipeline holds them → images_BCHW in [0, 1]."""
    if latents_BCHW.ndim != 4:
        raise RowRefused(
            "model.unsupported", f"save_intermediates does not know {type(pipe).__name__}'s packed latents"
        )
    return Autoencoder.of(pipe.vae).decode(latents_BCHW)
