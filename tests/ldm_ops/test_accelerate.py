"""What makes a model faster takes effect, changes the picture as little as it says, and by a row's own steps alone."""

from __future__ import annotations

import functools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, AutoPipelineForText2Image
from numpy.typing import NDArray
from pydantic import ValidationError

from ldm_ops.accelerate import Accelerate, AccelerateAutoencoder
from ldm_ops.adapter_files import check_vae
from ldm_ops.adapters import Adapters
from ldm_ops.decode import Decode
from ldm_ops.encode import Encode
from ldm_ops.inpaint import Inpaint
from ldm_ops.op import RowRefused
from ldm_ops.sampling import Pipeline
from ldm_ops.schedulers import SCHEDULERS, is_flow, make_scheduler, stay_on_host
from ldm_ops.skipping import skip
from ldm_ops.txt2img import Txt2Img
from ldm_ops.upscale import Upscale
from tests import models
from tests.ldm_ops.rows import picture, row

Pictures = NDArray[np.uint8]
Calls = Counter[tuple[str, int]]


def rows(count: int = 3, steps: int = 8, **values: Any) -> list[dict[str, Any]]:
    size = {"height": 64, "width": 64, "num_inference_steps": steps}
    return [row(seed=i, **size, **values) for i in range(count)]


def beside_others(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first row among other rows: in any order the same ones have the same largest number."""
    return [batch[0], *({**one, "prompt": "a green square", "seed": 90 + one["seed"]} for one in batch[1:])]


def made(op: Txt2Img, model: Pipeline, batch: list[dict[str, Any]]) -> Pictures:
    return np.stack([output["image"] for output in op.run(model, batch)])


def loaded(folder: Path, **accelerate: Any) -> tuple[Txt2Img, Pipeline]:
    op = Txt2Img(model="x", accelerate=Accelerate(**accelerate))
    return op, op.load(folder)


def psnr(a: Pictures, b: Pictures) -> float:
    error = np.square(a.astype(float) - b.astype(float)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def counted(**modules: Any) -> Calls:
    """Counts the calls of modules, by how many rows each sees."""
    calls: Calls = Counter()
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, given, name=name: calls.update([(name, len(given[0]))]))
    return calls


@pytest.fixture(scope="module")
def exact(tiny_model: Path) -> Pictures:
    op = Txt2Img(model="x")
    return made(op, op.load(tiny_model), rows())


@pytest.mark.parametrize("scheduler", [name for name, (_, own) in SCHEDULERS.items() if "use_karras_sigmas" not in own])
def test_no_step_waits_for_what_the_device_has_to_do(scheduler: str) -> None:
    # On torch's meta device, whose tensors hold nothing: whoever asks one for a number raises.
    is_transformer = is_flow(scheduler)
    pipe = models.tiny_sd3() if is_transformer else models.tiny_stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    pipe.to("meta")
    config = dict(pipe.scheduler.config)
    embeds = torch.zeros(2, 20, models.WIDTH * (1 + is_transformer), device="meta")
    given: dict[str, Any] = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds}
    if is_transformer:
        given |= {"pooled_prompt_embeds": embeds[:, 0], "negative_pooled_prompt_embeds": embeds[:, 0]}

    def run() -> Any:
        with torch.inference_mode():
            return pipe(num_inference_steps=3, guidance_scale=3.0, output_type="latent", **given).images

    if scheduler == "ddim":
        with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta tensors"):
            run()
    skip(pipe, Accelerate(), "meta").begin(2)
    pipe.scheduler = make_scheduler(scheduler, config)
    stay_on_host(pipe.scheduler)
    assert run().is_meta


def test_guidance_outside_its_interval_is_not_computed(tiny_model: Path, exact: Pictures) -> None:
    op, model = loaded(tiny_model, guidance_interval=(0.25, 0.75))
    calls = counted(unet=model.pipe.unet.conv_in)
    pictures = made(op, model, rows())
    assert calls == {("unet", 6): 4, ("unet", 3): 4}
    assert 20 < psnr(pictures, exact) < 60
    # As the pipeline itself, called step by step with and without guidance.
    pipe = AutoPipelineForText2Image.from_pretrained(tiny_model, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)

    def switch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        # No guidance is guidance with a scale of one.
        pipe._guidance_scale = 3.0 if 2 <= step + 1 < 6 else 1.0 + 1e-9
        return {}

    prompts = [one["prompt"] for one in rows()]
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    # Of the first step there is no callback; it is guided by 1 where the pipeline is told so.
    options = {"num_inference_steps": 8, "height": 64, "width": 64, "callback_on_step_end": switch}
    theirs = pipe(prompts, guidance_scale=1.0 + 1e-9, generator=generators, output_type="np", **options).images
    assert np.abs(pictures - theirs * 255).max() <= 1


def test_guidance_in_an_interval_goes_with_a_row_that_has_none(tiny_model: Path) -> None:
    op, model = loaded(tiny_model, guidance_interval=(0.25, 0.75))
    plain = Txt2Img(model="x")
    batch = rows(guidance_scale=1.0)
    assert np.array_equal(made(op, model, batch), made(plain, plain.load(tiny_model), batch))


def test_the_inner_part_of_a_unet_runs_at_every_nth_step(tiny_model: Path, exact: Pictures) -> None:
    op, model = loaded(tiny_model, deep_cache=3)
    unet = model.pipe.unet
    calls = counted(
        first=unet.down_blocks[0].resnets[0], mid=unet.mid_block.resnets[0], last=unet.up_blocks[-1].resnets[-1]
    )
    pictures = made(op, model, rows())
    assert calls == {("first", 6): 8, ("mid", 6): 3, ("last", 6): 8}
    assert 30 < psnr(pictures, exact) < 70
    assert np.array_equal(pictures, made(op, model, rows()))
    assert not model.steps.kept


def test_both_together_keep_nothing_from_a_batch_of_another_length(tiny_model: Path, exact: Pictures) -> None:
    op, model = loaded(tiny_model, deep_cache=3, guidance_interval=(0.25, 0.75))
    calls = counted(mid=model.pipe.unet.mid_block.resnets[0])
    assert 20 < psnr(made(op, model, rows()), exact) < 60
    # Steps 0 | 2, 5 | 6.
    assert calls == {("mid", 3): 2, ("mid", 6): 2}


@pytest.mark.parametrize(
    "accelerate",
    [{"guidance_interval": (0.0, 0.5)}, {"deep_cache": 2}, {"vae_batch_size": 3}, {"fuse_qkv": True}],
    ids=lambda one: next(iter(one)),
)
def test_a_row_does_not_notice_its_neighbours(tiny_model: Path, accelerate: dict[str, Any]) -> None:
    op, model = loaded(tiny_model, **accelerate)
    batch = rows(4)
    forth, back = made(op, model, batch), made(op, model, batch[::-1])[::-1]
    assert np.array_equal(forth, back)
    assert np.array_equal(forth[0], made(op, model, beside_others(batch))[0])


def test_pictures_are_decoded_a_few_at_a_time(tiny_model: Path, exact: Pictures) -> None:
    op, model = loaded(tiny_model, vae_batch_size=2)
    calls = counted(decoder=model.pipe.vae.decoder)
    assert psnr(made(op, model, rows()), exact) > 55
    assert calls == {("decoder", 2): 2}


def test_one_projection_stands_for_query_key_and_value(tiny_model: Path, exact: Pictures) -> None:
    op, model = loaded(tiny_model, fuse_qkv=True)
    attention = model.pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    calls = counted(fused=attention.to_qkv, query=attention.to_q)
    assert psnr(made(op, model, rows()), exact) > 55
    assert {name for name, _ in calls} == {"fused"}


def test_fused_projections_take_no_lora(tiny_model: Path, tmp_path: Path) -> None:
    file = models.save_lora(models.tiny_stable_diffusion(), tmp_path, seed=1)
    op, model = loaded(tiny_model, fuse_qkv=True)
    with pytest.raises(RowRefused, match=r"a LoRA does not go with accelerate\.fuse_qkv"):
        op.run(model, rows(1, loras=((file, 1.0),)))


def test_the_layout_of_convolutions_is_another_where_it_is_asked_for(tiny_model: Path, exact: Pictures) -> None:
    op, model = loaded(tiny_model, channels_last=True)
    assert psnr(made(op, model, rows()), exact) > 55
    weights = [model.pipe.unet.conv_out.weight, model.pipe.vae.decoder.conv_in.weight]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    _, plain = loaded(tiny_model)
    assert plain.pipe.unet.conv_out.weight.is_contiguous()


@pytest.mark.parametrize("how", ["regional", "full"])
def test_what_is_compiled_makes_the_same_picture(
    tiny_model: Path, exact: Pictures, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    from torch._dynamo.utils import counters
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    # As importing the compiler leaves it.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    # Its tracer, guards and all; not its code generator, which takes a minute for this on a CPU.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    op, model = loaded(tiny_model, compile=how)
    pictures = made(op, model, rows())
    traced = counters["stats"]["unique_graphs"]
    assert traced >= (1 if how == "regional" else 2)
    assert psnr(pictures, exact) > 55
    assert np.array_equal(made(op, model, rows()), pictures)
    assert counters["stats"]["unique_graphs"] == traced

    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")


@pytest.mark.parametrize("op", [Encode, Decode])
def test_an_autoencoder_alone_is_compiled_and_laid_out_as_asked(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, op: Any
) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    given = [{"image": picture(), "seed": 1, "latents": np.random.default_rng(0).normal(size=(4, 8, 8))}]
    plain = op(model="x")
    fast = op(model="x", accelerate=AccelerateAutoencoder(channels_last=True, compile="full"))
    name = "latents" if op is Encode else "image"
    expected, found = (one.run(one.load(tiny_model), given)[0][name].astype(float) for one in (plain, fast))
    assert np.abs(found - expected).max() <= (1e-2 if op is Encode else 1)
    assert counters["stats"]["unique_graphs"] >= 1


def test_linear_layers_compute_in_int8(tiny_model: Path, exact: Pictures) -> None:
    pytest.importorskip("torchao")
    op, model = loaded(tiny_model, quantize="int8")
    pictures = made(op, model, rows())
    assert type(model.pipe.unet.mid_block.attentions[0].proj_in) is torch.nn.Conv2d
    assert (
        type(model.pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight) is not torch.nn.Parameter
    )
    assert 30 < psnr(pictures, exact) < 90
    assert np.array_equal(pictures, made(op, model, rows()[::-1])[::-1])
    assert np.array_equal(pictures[0], made(op, model, beside_others(rows()))[0])


def tiny_vae(folder: Path, latent_channels: int = 4) -> Path:
    torch.manual_seed(4)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
        latent_channels=latent_channels,
    ).save_pretrained(folder)
    return folder


def test_a_tiny_autoencoder_stands_in_for_the_models_own(tiny_model: Path, tmp_path: Path) -> None:
    folder = tiny_vae(tmp_path / "taesd")
    check_vae(folder, tiny_model)
    op = Txt2Img(model="x", save_intermediates=8)
    model = op.load(tiny_model, Adapters(vae=(folder, None)))
    batch = rows()
    outputs = op.run(model, batch)
    pipe = AutoPipelineForText2Image.from_pretrained(
        tiny_model, vae=AutoencoderTiny.from_pretrained(folder), use_safetensors=True
    )
    theirs = pipe(
        [one["prompt"] for one in batch],
        num_inference_steps=8,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(i) for i in range(3)],
        height=64,
        width=64,
    ).images
    for output, their in zip(outputs, theirs, strict=True):
        assert np.array_equal(output["image"], np.asarray(their))
        assert np.array_equal(output["intermediates"][-1][2], output["image"])
    repaint = Inpaint(model="x", preserve_unmasked=False)
    mask = np.zeros((64, 64), np.uint8)
    mask[:32] = 255
    given = row(image=picture(), mask_image=mask, strength=1.0)
    assert repaint.run(repaint.load(tiny_model, Adapters(vae=(folder, None))), [given])[0]["image"].any()


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"cuda_graphs": True}, "add compile: full"),
        ({"cuda_graphs": True, "compile": "regional"}, "add compile: full"),
        ({"deep_cache": 2, "compile": "full"}, "use compile: regional"),
        ({"deep_cache": 1}, "greater than or equal to 2"),
        ({"guidance_interval": [0.5, 0.5]}, "two shares in order, from 0 to 1"),
        ({"guidance_interval": [0.5, 1.2]}, "two shares in order, from 0 to 1"),
        ({"guidance_interval": [0, 1]}, "is all steps; leave it out"),
        ({"quantize": "int4"}, "'int8' or 'fp8'"),
        ({"vae_batch_size": 0}, "greater than or equal to 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(says: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Accelerate(**says)


def test_what_a_model_or_device_cannot_do_is_refused_in_a_line(tiny_model: Path, tmp_path: Path) -> None:
    models.save_sd3(tmp_path / "sd3")
    models.tiny_ldm_x4().save_pretrained(tmp_path / "ldm-x4")
    with pytest.raises(ValueError, match=r"accelerate\.deep_cache: SD3Transformer2DModel is no UNet2DConditionModel"):
        loaded(tmp_path / "sd3", deep_cache=2)
    with pytest.raises(ValueError, match=r"accelerate\.compile: SD3Transformer2DModel has no repeated blocks; use"):
        loaded(tmp_path / "sd3", compile="regional")
    with pytest.raises(ValueError, match=r"accelerate\.fuse_qkv: UNet2DModel does not know it"):
        Upscale(model="x", accelerate=Accelerate(fuse_qkv=True)).load(tmp_path / "ldm-x4")
    with pytest.raises(ValueError, match=r"accelerate\.cuda_graphs: the device is cpu"):
        loaded(tiny_model, compile="full", cuda_graphs=True)
    with pytest.raises(ValueError, match=r"accelerate\.quantize: fp8 needs|needs torchao; pip install"):
        loaded(tiny_model, quantize="fp8")
    with pytest.raises(ValidationError, match=r"upscale works by tiles; leave accelerate\.deep_cache out"):
        Upscale(model="x", accelerate=Accelerate(deep_cache=2))
