"""No option is ignored in silence: what can have no effect is refused by name, and what is left out never."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from ldm_ops.describe import ModelFacts
from pipelines.errors import JobError
from pipelines.job import Job, Sink, Source, parse_job
from pipelines.planner import Planned, check, plan
from pipelines.stages import STAGES
from pipelines.unused import unused
from tests import models
from tests.ldm_ops.rows import picture

MakeJob = Callable[..., Job]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Pictures, a LoRA, and both kinds of upscalers."""
    folder = tmp_path_factory.mktemp("unused")
    (folder / "in").mkdir()
    Image.fromarray(picture()).save(folder / "in" / "a.png")
    models.tiny_ldm_x4().save_pretrained(folder / "ldm-x4")
    models.tiny_sd_x4().save_pretrained(folder / "sd-x4")
    models.save_lora(models.tiny_stable_diffusion(), folder / "lora", seed=1)
    return folder


@pytest.fixture
def made(folder: Path, tiny_model: Path, tmp_path: Path) -> MakeJob:
    """A job of one op on what it needs, nothing more; `later` is a second stage."""

    def make(op: str, later: dict[str, Any] | None = None, stage: dict[str, Any] | None = None, **fields: Any) -> Job:
        image = {"image": str(folder / "in" / "a.png")}
        own: dict[str, Any] = {
            "txt2img": {"prompt": "a"},
            "img2img": {**image, "prompt": "a"},
            "inpaint": {**image, "prompt": "a", "mask_image": "0,0,8,8"},
            "upscale": image,
            "encode": image,
            "embed": {"prompt": "a"},
        }
        row = {**own[op], **fields.pop("row", {})}
        stages = [{"op": op, "model": model_of(folder, tiny_model, op), **(stage or {})}]
        if later is not None:
            stages.append({"model": model_of(folder, tiny_model, later["op"]), **later})
        source = {"rows": [row], **fields.pop("source", {})}
        sink = {"path": str(tmp_path / "out"), **fields.pop("sink", {})}
        text = yaml.safe_dump({"source": source, "stages": stages, "sink": sink, **fields})
        return parse_job(text.replace("FOLDER", str(folder)))

    return make


def model_of(folder: Path, tiny_model: Path, op: str) -> str:
    return str(folder / "ldm-x4") if op == "upscale" else str(tiny_model)


ALONE = "which sees the image alone"
SIZED = {"height": 64, "width": 64}
UNUSED: list[tuple[str, str, dict[str, Any], str]] = [
    # (field, op, what the job says, the refusal)
    ("prompt", "upscale", {"stage": {"prompt": "a"}}, f"stages.0.prompt: .*x4 is a LDMSuper.*, {ALONE}; leave it out"),
    ("negative_prompt", "upscale", {"stage": {"negative_prompt": "a"}}, f"stages.0.negative_prompt: .*{ALONE}"),
    ("guidance_scale", "upscale", {"stage": {"guidance_scale": 7.5}}, f"stages.0.guidance_scale: .*{ALONE}"),
    ("noise_level", "upscale", {"stage": {"noise_level": 20}}, f"stages.0.noise_level: .*{ALONE}"),
    ("long_prompts", "upscale", {"stage": {"long_prompts": "error"}}, f"stages.0.long_prompts: .*{ALONE}"),
    ("", "txt2img", {"later": {"op": "upscale", "guidance_scale": 2}}, f"stages.1.guidance_scale: .*{ALONE}"),
    ("", "upscale", {"row": {"guidance_scale": 2}}, f"rows: column 'guidance_scale': .*{ALONE}; rename the column"),
    ("", "upscale", {"row": {"negative_prompt": "b"}}, f"rows: column 'negative_prompt': .*{ALONE}"),
    ("", "upscale", {"row": {"noise_level": 2}}, f"rows: column 'noise_level': .*{ALONE}"),
    (
        "",
        "upscale",
        {"row": {"noise_level": 2, "prompt": "a"}, "stage": {"model": "FOLDER/sd-x4"}},
        "rows: column 'noise_level': all rows have one: set stages.0.noise_level",
    ),
    ("", "upscale", {"source": {"matrix": {"guidance_scale": [1, 2]}}}, "matrix.guidance_scale: upscale takes no guid"),
    (
        "",
        "upscale",
        {"row": {"g": 2}, "source": {"columns": {"guidance_scale": "g"}}},
        "columns.guidance_scale: .* is a",
    ),
    (
        "lora_scale",
        "txt2img",
        {"stage": {"lora_scale": 0.5}},
        "stages.0.lora_scale: there is no LoRA to scale; give lo",
    ),
    ("", "txt2img", {"row": {"lora_scale": 0.5}}, "rows: column 'lora_scale': there is no LoRA to scale"),
    ("", "txt2img", {"source": {"matrix": {"lora_scale": [1, 2]}}}, "source.matrix.lora_scale: there is no LoRA to"),
    ("", "txt2img", {"later": {"op": "img2img", "lora_scale": 1.0}}, "stages.1.lora_scale: there is no LoRA to scale"),
    ("loras", "img2img", {"stage": {"loras": {"ink": "FOLDER/lora"}}}, "stages.0.loras: no row has one of them"),
    (
        "",
        "inpaint",
        {"row": {"controlnet_conditioning_scale": 1}},
        "column 'controlnet_conditioning_scale': there is no",
    ),
    ("background", "txt2img", {"stage": {"background": "#ffffff"}}, "stages.0.background: txt2img takes no image here"),
    ("", "txt2img", {"later": {"op": "encode", "background": "#000000"}}, "stages.1.background: pictures of the stage"),
    ("resize", "img2img", {"stage": {"resize": "fill"}}, "stages.0.resize: fill needs a size; give height and width"),
    (
        "",
        "txt2img",
        {"later": {"op": "encode", "resize": "fit"}},
        "stages.1.resize: fit needs a size; give height and width",
    ),
    (
        "height",
        "img2img",
        {"stage": {"resize": "nearest_multiple", "height": 64}},
        "stages.0.height: resize: nearest_mu",
    ),
    (
        "width",
        "encode",
        {"stage": {"resize": "nearest_multiple", "width": 64}},
        "stages.0.width: resize: nearest_multi",
    ),
    ("", "encode", {"stage": {"resize": "nearest_multiple"}, "row": SIZED}, "column '(height|width)': stages.0.resize"),
    ("", "encode", {"stage": {"resolution": 64}, "source": {"matrix": {"height": [64]}}}, "encode takes no height"),
    (
        "",
        "encode",
        {"stage": {"resolution": 64}, "source": {"columns": {"height": "h"}}},
        "stages.0.resolution makes the",
    ),
    (
        "image_decoding",
        "img2img",
        {"stage": {"image_decoding": "draft"}},
        "stages.0.image_decoding: images keep their si",
    ),
    (
        "",
        "inpaint",
        {"stage": {"image_decoding": "draft", "resize": "exact", **SIZED}},
        "stages.0.image_decoding: resize: exact scales nothing down",
    ),
    (
        "bucket_multiple",
        "encode",
        {"stage": {"bucket_multiple": 64}},
        "stages.0.bucket_multiple: only resolution makes",
    ),
    (
        "max_aspect_ratio",
        "encode",
        {"stage": {"max_aspect_ratio": 3}},
        "stages.0.max_aspect_ratio: only resolution make",
    ),
    (
        "save_intermediates",
        "img2img",
        {"stage": {"save_intermediates": 9, "num_inference_steps": 10, "strength": 0.5}},
        "stages.0.save_intermediates: of 5 steps that are done none is kept; use at most 5",
    ),
    ("sink.format", "encode", {"sink": {"format": "png"}}, "sink.format: encode makes no pictures; leave it out"),
    ("sink.quality", "embed", {"sink": {"format": "jpeg", "quality": 9}}, "sink.(format|quality): embed makes no pict"),
    ("", "txt2img", {"later": {"op": "encode"}, "sink": {"format": "webp"}}, "sink.format: encode makes no pictures"),
    (
        "sink.png_encoder",
        "txt2img",
        {"sink": {"format": "webp", "png_encoder": "pillow"}},
        "sink.png_encoder: sink.format is webp; leave it out, or use png",
    ),
    ("", "encode", {"sink": {"png_encoder": "fpng"}}, "sink.png_encoder: encode makes no pictures; leave it out"),
    (
        "sink.embed_metadata",
        "embed",
        {"sink": {"embed_metadata": "a1111"}},
        "sink.embed_metadata: embed makes no pictur",
    ),
    ("sink.thumbnails", "encode", {"sink": {"thumbnails": 64}}, "sink.thumbnails: encode makes no pictures"),
    (
        "sink.metadata_jsonl",
        "embed",
        {"sink": {"metadata_jsonl": True}},
        "sink.metadata_jsonl: embed makes no pictures",
    ),
    (
        "sink.c2pa",
        "embed",
        {"sink": {"c2pa": {"certificate": "a", "private_key": "b"}}},
        "sink.c2pa: embed makes no pi",
    ),
    (
        "sink.latents_format",
        "embed",
        {"sink": {"latents_format": "safetensors"}},
        "sink.latents_format: embed makes no",
    ),
    ("source.format", "txt2img", {"source": {"format": "csv"}}, "source.format: source.rows stand in the job itself"),
    (
        "source.columns",
        "embed",
        {"row": {"n": 1}, "source": {"columns": {"id": "n"}}},
        "source.columns.id: embed goes by",
    ),
    (
        "",
        "txt2img",
        {"row": {"n": 1}, "source": {"columns": {"strength": "n"}}},
        "columns.strength: txt2img takes no st",
    ),
    (
        "",
        "txt2img",
        {"row": {"n": 1}, "source": {"columns": {"control_image": "n"}}},
        "columns.control_image: there is n",
    ),
    (
        "source.templates",
        "encode",
        {"source": {"templates": {"negative_prompt": "x"}}},
        "negative_prompt: encode takes no",
    ),
    (
        "source.matrix",
        "txt2img",
        {"source": {"matrix": {"strength": [0.5]}}},
        "matrix.strength: txt2img takes no strength",
    ),
    (
        "source.pass_through",
        "embed",
        {"source": {"pass_through": "all"}},
        "source.pass_through: a caption stands for all",
    ),
    (
        "source.allow_hosts",
        "txt2img",
        {"source": {"allow_hosts": ["a.b"]}},
        "source.allow_hosts: txt2img fetches no ima",
    ),
    ("safety_checker", "img2img", {"stage": {"safety_checker": "reject"}}, "has no safety checker; leave it out"),
    ("max_sequence_length", "embed", {"stage": {"max_sequence_length": 9}}, "without a T5; leave it out"),
    ("num_images_per_prompt", "txt2img", {"later": {"op": "img2img", "num_images_per_prompt": 2}}, "only the first st"),
    ("keep", "txt2img", {"stage": {"keep": True}}, "the last stage's pictures are always written; leave it out"),
    (
        "controlnet",
        "txt2img",
        {"later": {"op": "img2img", "controlnet": "x"}},
        "stages.1.controlnet: a control image comes",
    ),
    (
        "controlnet_conditioning_scale",
        "txt2img",
        {"stage": {"controlnet_conditioning_scale": 1}},
        "without a controlnet",
    ),
    (
        "accelerate",
        "txt2img",
        {"stage": {"accelerate": {"vae_batch_size": 8}}},
        "stages.0.accelerate.vae_batch_size: it is not less than batch_size, 8; use less",
    ),
    (
        "",
        "txt2img",
        {"stage": {"accelerate": {"guidance_interval": [0.2, 0.8]}, "guidance_scale": 1}},
        "stages.0.accelerate.guidance_interval: there is no guidance with guidance_scale of at most 1",
    ),
    (
        "",
        "upscale",
        {"stage": {"accelerate": {"guidance_interval": [0.2, 0.8]}}},
        "accelerate.guidance_interval: the model is a LDMSuper.*, which has no guidance",
    ),
    (
        "",
        "upscale",
        {"stage": {"accelerate": {"compile": "regional"}}},
        "accelerate.compile: the model is a LDMSuper.*, whose U-Net has no repeated blocks; use full",
    ),
    (
        "",
        "txt2img",
        {"stage": {"accelerate": {"compile": "full", "cuda_graphs": True}, "device": "cpu"}},
        "stages.0.accelerate.cuda_graphs: device is cpu; leave it out",
    ),
    (
        "",
        "img2img",
        {"stage": {"accelerate": {"quantize": "fp8"}, "device": "cpu"}},
        "stages.0.accelerate.quantize: fp8 needs a CUDA device, and device is cpu; use int8",
    ),
    (
        "",
        "txt2img",
        {"stage": {"accelerate": {"quantize": "int8"}, "loras": {"ink": "FOLDER/lora"}, "lora": "ink"}},
        "stages.0.accelerate.quantize: it does not go with a LoRA",
    ),
    (
        "",
        "txt2img",
        {"stage": {"accelerate": {"fuse_qkv": True}}, "row": {"lora": "FOLDER/lora/pytorch_lora_weights.safetensors"}},
        "stages.0.accelerate.fuse_qkv: it does not go with a LoRA",
    ),
    ("revision", "txt2img", {"stage": {"revision": "v1"}}, "model .* is a folder here, .*; leave `revision` out"),
    ("variant", "txt2img", {"stage": {"variant": "fp16"}}, "no weights of variant fp16"),
]

ALWAYS = {
    *(
        "op",
        "model",
        "device",
        "dtype",
        "batch_size",
        "workers",
        "num_gpus",
        "num_cpus",
        "accelerator_type",
        "labels",
        "num_threads",
        "batch_timeout_s",
    ),
    *("scheduler", "num_inference_steps", "strength", "preserve_unmasked", "lora", "vae", "textual_inversion"),
    *("tile_px", "tile_overlap_px", "resolution", "posterior", "random_flip", "store_dtype"),
    *("sink.path", "sink.layout", "source.path", "source.rows", "source.on_bad_row", "source.storage_options"),
    # The same job may be tried on a local folder.
    "sink.storage_options",
}
"""Fields that have an effect wherever they may stand."""


def problem(job: Callable[[], Job]) -> str:
    with pytest.raises(JobError) as caught:
        check(job())
    return str(caught.value)


@pytest.mark.parametrize(("field", "op", "says", "message"), UNUSED)
def test_an_option_without_any_effect_is_refused_by_its_name(
    made: MakeJob, field: str, op: str, says: dict[str, Any], message: str
) -> None:
    import re

    said = problem(lambda: made(op, **says))
    assert re.search(message, said), said
    assert len(said.splitlines()) == 1


def test_every_field_either_always_has_an_effect_or_is_refused_where_it_has_none() -> None:
    fields = {name for stage in STAGES.values() for name in stage.model_fields}
    fields |= {f"sink.{name}" for name in Sink.model_fields} | {f"source.{name}" for name in Source.model_fields}
    assert fields == ALWAYS | {field for field, *_ in UNUSED if field}


USED: list[tuple[str, dict[str, Any]]] = [
    *((op, {}) for op in ("txt2img", "img2img", "inpaint", "upscale", "encode", "embed")),
    ("upscale", {"stage": {"model": "FOLDER/sd-x4", "noise_level": 5, "guidance_scale": 2, "negative_prompt": "b"}}),
    # A caption is carried along even where the model does not look at it, and an empty cell asks for nothing.
    ("upscale", {"row": {"prompt": "a caption", "negative_prompt": "", "guidance_scale": None}}),
    ("upscale", {"stage": {"negative_prompt": "", "prompt": None}}),
    ("txt2img", {"stage": {"lora_scale": 0.5}, "row": {"lora": "FOLDER/lora/pytorch_lora_weights.safetensors"}}),
    ("txt2img", {"stage": {"loras": {"ink": "FOLDER/lora"}}, "source": {"matrix": {"lora": ["ink", "none"]}}}),
    ("img2img", {"stage": {"resize": "fill"}, "row": {"width": 64}}),
    ("img2img", {"stage": {"image_decoding": "draft", "height": 64}}),
    ("encode", {"stage": {"image_decoding": "draft", "resolution": 64, "bucket_multiple": 8}}),
    ("encode", {"stage": {"posterior": "sample", "image_decoding": "exact"}, "seed": 7}),
    ("encode", {"seed": 7, "sink": {"embed_metadata": "none", "thumbnails": None}}),
    ("txt2img", {"sink": {"storage_options": {"anon": True}}}),
    ("txt2img", {"stage": {"accelerate": {"deep_cache": 2, "channels_last": False, "vae_batch_size": 4}}}),
    (
        "txt2img",
        {"stage": {"accelerate": {"guidance_interval": [0, 0.5]}, "guidance_scale": 1}, "row": {"guidance_scale": 3}},
    ),
    ("encode", {"stage": {"accelerate": {"channels_last": True}}}),
    ("txt2img", {"stage": {"keep": True}, "later": {"op": "encode"}, "sink": {"format": "webp", "quality": 80}}),
    ("txt2img", {"stage": {"save_intermediates": 4, "num_inference_steps": 3}, "row": {"num_inference_steps": 8}}),
]


@pytest.mark.parametrize(("op", "says"), USED)
def test_what_has_an_effect_somewhere_is_taken(made: MakeJob, op: str, says: dict[str, Any]) -> None:
    assert check(made(op, **says)).num_rows


def test_what_the_output_records_is_a_job_that_can_be_planned_again(made: MakeJob, tmp_path: Path) -> None:
    job = made("upscale", later={"op": "encode"})
    plan(job)
    recorded = parse_job((tmp_path / "out" / "_ldm" / "job.yaml").read_text())
    assert plan(recorded).new is None
    assert "noise_level" not in (tmp_path / "out" / "_ldm" / "job.yaml").read_text()


def test_sizes_in_a_table_of_an_encode_job_with_buckets_tell_of_the_images(made: MakeJob) -> None:
    row = table_row(check(made("encode", stage={"resolution": 64}, row={"width": 999, "height": 31})))
    assert (row["width"], row["input.width"], row["input.height"]) == (None, 999, 31)


def test_an_upscaler_without_prompts_claims_no_guidance(made: MakeJob) -> None:
    row = table_row(check(made("upscale")))
    assert (row["guidance_scale"], row["negative_prompt"]) == (None, None)


def table_row(planned: Planned) -> dict[str, Any]:
    assert planned.table is not None
    [row] = planned.table.to_pylist()
    return dict(row)


@pytest.mark.parametrize(
    ("pipeline", "fits"),
    [
        ("StableDiffusionXLPipeline", True),
        ("PixArtSigmaPipeline", True),
        ("FluxPipeline", False),
        ("LuminaPipeline", False),
        ("QwenImagePipeline", False),
        ("StableDiffusionPAGPipeline", False),
    ],
)
def test_guidance_has_an_interval_where_its_halves_are_known(pipeline: str, fits: bool) -> None:
    stage = {"op": "txt2img", "model": "x", "accelerate": {"guidance_interval": [0.2, 0.8]}}
    job = parse_job(yaml.safe_dump({"source": {"rows": ["a"]}, "stages": [stage], "sink": {"path": "out"}}))
    facts = ModelFacts(
        pipeline=pipeline,
        size_multiple=8,
        default_height=64,
        default_width=64,
        scheduler="ddim",
        flow_matching=False,
        has_safety_checker=False,
        ops=frozenset({"txt2img"}),
    )
    refused = "stages.0.accelerate.guidance_interval" in {path for path, _ in unused(job, [facts])}
    assert refused != fits
