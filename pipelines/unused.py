"""Options that can have no effect on the job that they stand in: none is ignored in silence.

Only what a user gave is refused, never a default; `null`, `""`, `false`, `none` and empty lists ask for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ldm_ops.accelerate import Accelerate
from ldm_ops.describe import PLAIN_UPSCALER, ModelFacts
from ldm_ops.sampling import Sampling
from pipelines.errors import JobError
from pipelines.job import Job
from pipelines.stages import Adapted, AnyStage, Buckets, ImageInput, Pool, Resized, reads, row_parameters

BROUGHT_BY_ROWS = ("height", "width", "num_inference_steps", "guidance_scale", "strength", "lora", "lora_scale")
"""Columns that give an option of the stage its meaning, or have none without one."""

HALVES = ("StableDiffusion", "PixArt", "Kolors", "HunyuanDiT", "AuraFlow", "Sana")
"""How the pipelines begin (diffusers 0.42) whose denoiser sees the negative prompts, then the prompts, in one call.

FLUX has no second half, Lumina has them the other way round, with perturbed attention (PAG) there are others, and
Qwen-Image, CogView4 and more call twice a step.
"""

Unused = Iterator[tuple[str, str]]
"""(path of a field, why it has no effect and what to do)."""


def refuse_unused(job: Job, models: Sequence[ModelFacts], brought: Mapping[str, str] | None = None) -> None:
    """Raise JobError on an option that was given and that nothing looks at.

    `brought` names the parameters that rows or `source.matrix` set, each with where; None while no row has been read.
    """
    for path, reason in unused(job, models, brought):
        if _is_given(job, path):
            raise JobError(f"{path}: {reason}")
    for name, reason in unused_columns(job.stage, models[0]).items():
        if name in (brought or {}):
            raise JobError(f"{(brought or {})[name]}: {reason}")
    if brought is not None and "lora_scale" in brought and "lora" not in brought and _no_lora(job.stage):
        raise JobError(f"{brought['lora_scale']}: there is no LoRA to scale; give stages.0.lora or a column lora")


def unused(job: Job, models: Sequence[ModelFacts], brought: Mapping[str, str] | None = None) -> Unused:
    """Every field, given or not, that has no effect in this job."""
    yield from _of_source(job, models[0])
    for i, (stage, facts) in enumerate(zip(job.stages, models, strict=True)):
        there = None if i == 0 and brought is None else frozenset(brought or ()) if i == 0 else frozenset[str]()
        for name, reason in (*_of_stage(i, stage, facts), *(() if there is None else _of_rows(stage, there))):
            yield f"stages.{i}.{name}", reason
    if not job.writes_pictures:
        for name in ("format", "quality", "png_encoder", "embed_metadata"):
            if getattr(job.sink, name) != "none":
                yield f"sink.{name}", f"{job.stages[-1].op} makes no pictures; leave it out"
    elif job.sink.format != "png":
        yield "sink.png_encoder", f"sink.format is {job.sink.format}; leave it out, or use png"


def unused_columns(stage: AnyStage, facts: ModelFacts) -> dict[str, str]:
    """Columns that a user may take for a parameter of the first stage's op, and that its model or setting ignores."""
    found: dict[str, str] = {}
    rename = "rename the column, or take it out"
    if facts.pipeline == PLAIN_UPSCALER:
        reason = f"{stage.model} is a {facts.pipeline}, which sees the image alone; {rename}"
        found |= dict.fromkeys(("negative_prompt", "guidance_scale"), reason)
    if stage.op == "upscale":
        found["noise_level"] = (
            found.get("guidance_scale") or f"all rows have one: set stages.0.noise_level, and {rename}"
        )
    if isinstance(stage, Adapted) and stage.controlnet is None:
        found["controlnet_conditioning_scale"] = f"there is no stages.0.controlnet to weigh; give one, or {rename}"
    if isinstance(stage, Resized) and stage.resize == "nearest_multiple":
        reason = "stages.0.resize: nearest_multiple keeps each image's own size; use fill or fit, or "
        found |= dict.fromkeys(("height", "width"), reason + rename)
    return found


def _of_source(job: Job, facts: ModelFacts) -> Unused:
    source, stage = job.source, job.stage
    takes = row_parameters(stage, facts)
    if source.rows is not None:
        yield "source.format", "source.rows stand in the job itself; leave it out"
    ours = takes if stage.op == "embed" else takes | {"id"}
    for name in sorted(source.columns.keys() - ours):
        yield f"source.columns.{name}", f"{_takes_no(stage, facts, name)}; leave it out"
    for name in sorted(source.templates.keys() - takes):
        yield f"source.templates.{name}", f"{_takes_no(stage, facts, name)}; leave it out"
    if stage.op == "embed":
        yield "source.pass_through", "a caption stands for all rows that have it, so no column passes; leave it out"
    if reads(stage).isdisjoint({"image", "mask_image", "control_image"}):
        yield "source.allow_hosts", f"{stage.op} fetches no images; leave it out"


def _takes_no(stage: AnyStage, facts: ModelFacts, name: str) -> str:
    if name == "id" and stage.op == "embed":
        return "embed goes by the caption alone, whatever a row's id says"
    if name in ("height", "width") and isinstance(stage, Buckets):
        return "stages.0.resolution makes the sizes"
    if isinstance(stage, Adapted) and name in ("control_image", "controlnet_conditioning_scale"):
        return "there is no stages.0.controlnet that would see it"
    if name in row_parameters(stage):
        return f"{stage.model} is a {facts.pipeline} and takes no {name}"
    return f"{stage.op} takes no {name}"


def _of_stage(i: int, stage: AnyStage, facts: ModelFacts) -> Unused:
    """What does not depend on the rows."""
    if facts.pipeline == PLAIN_UPSCALER:
        for name in ("prompt", "negative_prompt", "guidance_scale", "noise_level", "long_prompts"):
            yield name, f"{stage.model} is a {facts.pipeline}, which sees the image alone; leave it out"
    if isinstance(stage, Buckets) and stage.resolution is None:
        for name in ("bucket_multiple", "max_aspect_ratio"):
            yield name, "only resolution makes buckets; give it, or leave this out"
    if isinstance(stage, Sampling) and stage.accelerate is not None:
        for name, reason in _of_accelerate(stage, stage.accelerate, facts):
            yield f"accelerate.{name}", reason
    if i:
        yield "background", "pictures of the stage before have nothing transparent; leave it out"
    elif reads(stage).isdisjoint({"image", "control_image"}):
        yield "background", f"{stage.op} takes no image here; leave it out"
    if isinstance(stage, Resized) and stage.resize == "nearest_multiple":
        for name in ("height", "width"):
            yield name, "resize: nearest_multiple keeps each image's own size; use fill or fit, or leave it out"
    if isinstance(stage, ImageInput) and stage.resize == "exact" and stage.image_decoding == "draft":
        yield "image_decoding", "resize: exact scales nothing down; leave it out"


def _of_accelerate(stage: Pool, accelerate: Accelerate, facts: ModelFacts) -> Unused:
    model = f"the model is a {facts.pipeline}"
    if facts.pipeline == PLAIN_UPSCALER:
        yield "guidance_interval", f"{model}, which has no guidance; leave it out"
        yield "fuse_qkv", f"{model}, which does not know it; leave it out"
        if accelerate.compile == "regional":
            yield "compile", f"{model}, whose U-Net has no repeated blocks; use full"
    elif not facts.pipeline.startswith(HALVES) or "PAG" in facts.pipeline:
        yield "guidance_interval", f"{model}, not known to be guided by two halves of one batch; leave it out"
    if not (Path(facts.folder) / "unet").is_dir():
        yield "deep_cache", f"{model}, which has no U-Net; leave it out"
    if isinstance(stage.batch_size, int) and (accelerate.vae_batch_size or 0) >= stage.batch_size:
        yield "vae_batch_size", f"it is not less than batch_size, {stage.batch_size}; use less, or leave it out"
    device = getattr(stage, "device", "auto")
    if device in ("cpu", "mps"):
        yield "cuda_graphs", f"device is {device}; leave it out"
        if accelerate.quantize == "fp8":
            yield "quantize", f"fp8 needs a CUDA device, and device is {device}; use int8, or leave it out"
    if isinstance(stage, Adapted) and stage.controlnet is not None:
        yield "deep_cache", "it would keep what the controlnet has to change; leave one out"
    if isinstance(stage, Adapted) and (stage.lora or stage.loras):
        for name in ("fuse_qkv", "quantize"):
            yield name, "it does not go with a LoRA; leave one out"
    if find_spec("torchao") is None:
        yield "quantize", "it needs the package torchao; pip install 'ldm-batch[quantize]', or leave it out"


def _of_rows(stage: AnyStage, there: frozenset[str]) -> Unused:
    """What has an effect where rows bring something; `there` is what they bring."""
    sized = bool({"height", "width"} & there) or any(getattr(stage, name, None) for name in ("height", "width"))
    if isinstance(stage, Resized) and stage.resize in ("fill", "fit") and not sized:
        yield "resize", f"{stage.resize} needs a size; give height and width, or use nearest_multiple, or leave it out"
    keeps_size = isinstance(stage, ImageInput) and not sized and getattr(stage, "resolution", None) is None
    if keeps_size and getattr(stage, "image_decoding", "exact") == "draft":
        yield "image_decoding", "images keep their size; give height and width, or leave it out"
    if isinstance(stage, Adapted) and _no_lora(stage) and "lora" not in there:
        yield "lora_scale", "there is no LoRA to scale; give lora or a column lora, or leave it out"
        yield "loras", "no row has one of them; give lora or a column lora, or leave it out"
    if isinstance(stage, Sampling) and stage.accelerate is not None:
        if "lora" in there:
            for name in ("fuse_qkv", "quantize"):
                yield f"accelerate.{name}", "it does not go with a LoRA; leave one out"
        if "guidance_scale" not in there and stage.guidance_scale <= 1:
            yield "accelerate.guidance_interval", "there is no guidance with guidance_scale of at most 1; leave it out"
    if isinstance(stage, Sampling) and there.isdisjoint({"num_inference_steps", "strength"}):
        steps = int(stage.num_inference_steps * getattr(stage, "strength", 1.0))
        if steps < (stage.save_intermediates or 0):
            yield "save_intermediates", f"of {steps} steps that are done none is kept; use at most {steps}"


def _no_lora(stage: AnyStage) -> bool:
    return getattr(stage, "lora", None) is None


def _is_given(job: Job, path: str) -> bool:
    found: Any = job
    for step in path.split("."):
        if isinstance(found, BaseModel):
            if step not in found.model_fields_set:
                return False
            found = getattr(found, step)
        else:
            found = found[int(step)] if isinstance(found, list) else found[step]
    return found is not None and found is not False and found not in ("", [], {})
