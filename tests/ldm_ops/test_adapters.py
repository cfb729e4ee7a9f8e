"""LoRAs, textual inversions, other autoencoders and ControlNets against diffusers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline, T2IAdapter
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm_ops.adapter_files import Unfit, check_controlnet, check_embedding, check_lora, check_vae, read_shapes
from ldm_ops.adapters import Adapters
from ldm_ops.img2img import Img2Img
from ldm_ops.inpaint import Inpaint
from ldm_ops.op import RowRefused
from ldm_ops.txt2img import Txt2Img
from tests import models
from tests.ldm_ops.rows import picture, row

SIZE = {"height": 64, "width": 64}


@pytest.fixture(scope="module")
def files(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRAs, one of them for the text encoder too, an autoencoder, a ControlNet and a textual inversion."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "ink": models.save_lora(models.tiny_stable_diffusion(), folder / "ink", 1),
        "pen": models.save_lora(models.tiny_stable_diffusion(), folder / "pen", 2, text=True),
        "vae": models.save_vae(folder / "vae"),
        "controlnet": models.save_controlnet(models.tiny_stable_diffusion().unet, folder / "controlnet"),
        "token": models.save_embedding(folder / "token", "<blob>", vectors=2),
    }


def plain(folder: Path, name: str = "StableDiffusionPipeline", **parts: Any) -> DiffusionPipeline:
    pipe = getattr(diffusers, name).from_pretrained(folder, use_safetensors=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_hand(pipe: DiffusionPipeline, prompts: list[str], seeds: list[int], **arguments: Any) -> list[Any]:
    """What diffusers makes of the same prompts under the same seeds."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    common = {"num_inference_steps": 4, "guidance_scale": 3.0, "generator": generators}
    return [np.asarray(image) for image in pipe(prompts, **common, **arguments).images]


def same(made: list[dict[str, Any]], expected: list[Any]) -> bool:
    return all(np.array_equal(one["image"], other) for one, other in zip(made, expected, strict=True))


def prompts(*seeds: int, **values: Any) -> list[dict[str, Any]]:
    return [row(seed=seed, **SIZE, **values) for seed in seeds]


def test_a_lora_gives_what_diffusers_gives_and_afterwards_the_model_is_what_it_was(
    tiny_model: Path, files: dict[str, Path]
) -> None:
    op = Txt2Img(model="x")
    model = op.load(tiny_model)
    texts = [row()["prompt"]] * 2
    without = by_hand(plain(tiny_model), texts, [3, 4], **SIZE)
    expected = {}
    for loras in ((("ink", 1.0),), (("ink", 0.5),), (("pen", 1.0),), (("ink", 0.7), ("pen", -0.3))):
        pipe = plain(tiny_model)
        for name, _ in loras:
            pipe.load_lora_weights(files[name].parent, weight_name=files[name].name, adapter_name=name)
        pipe.set_adapters([name for name, _ in loras], [scale for _, scale in loras])
        expected[loras] = by_hand(pipe, texts, [3, 4], **SIZE)
    pictures = [without, *expected.values()]
    assert len({p[0].tobytes() for p in pictures}) == len(pictures)
    for loras, wanted in [*expected.items(), *reversed(expected.items())]:
        held = [(files[name], scale) for name, scale in loras]
        assert same(op.run(model, prompts(3, 4, loras=held)), wanted)
        assert same(op.run(model, prompts(3, 4)), without)
    assert not [name for name, _ in model.pipe.unet.named_modules() if "lora" in name]


def test_a_scale_changes_without_loading_the_file_again(
    tiny_model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    op = Txt2Img(model="x")
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(files["ink"].read_bytes())
    model = op.load(tiny_model)
    first = op.run(model, prompts(3, loras=[(copy, 0.5)]))
    copy.unlink()
    op.run(model, prompts(3, loras=[(copy, 2.0)]))
    assert same(op.run(model, prompts(3, loras=[(copy, 0.5)])), [first[0]["image"]])


def test_a_lora_that_memory_is_too_short_for_leaves_the_model_as_it_was_and_can_be_tried_again(
    tiny_model: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    op = Txt2Img(model="x")
    model = op.load(tiny_model)
    without = op.run(model, prompts(3))[0]["image"]
    styled = op.run(op.load(tiny_model), prompts(3, loras=[(files["ink"], 1.0)]))[0]["image"]
    load = model.pipe.load_lora_weights

    def without_room(*arguments: Any, **options: Any) -> None:
        # The last of its layers finds none.
        load(*arguments, **options)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(model.pipe, "load_lora_weights", without_room)
    with pytest.raises(RuntimeError, match="allocate memory") as caught:
        op.run(model, prompts(3, loras=[(files["ink"], 1.0)]))
    assert op.is_out_of_memory(caught.value)
    assert not [name for name, _ in model.pipe.unet.named_modules() if "lora" in name]
    assert same(op.run(model, prompts(3)), [without])
    monkeypatch.undo()
    assert same(op.run(model, prompts(3, loras=[(files["ink"], 1.0)])), [styled])


@pytest.mark.parametrize("save", [models.save_sdxl, models.save_sd3])
def test_other_families_take_loras(save: Any, tmp_path: Path) -> None:
    save(tmp_path / "model")
    pipe = models.tiny_sd3() if save is models.save_sd3 else models.tiny_sdxl()
    lora = models.save_lora(pipe, tmp_path / "lora", 1)
    check_lora(read_shapes(lora), tmp_path / "model")
    op = Txt2Img(model="x")
    model = op.load(tmp_path / "model")
    scheduler = "flow_euler" if save is models.save_sd3 else "ddim"
    rows = prompts(1, scheduler=scheduler)
    without = op.run(model, rows)[0]["image"]
    styled = op.run(model, prompts(1, scheduler=scheduler, loras=[(lora, 1.0)]))[0]["image"]
    assert not np.array_equal(without, styled)
    assert same(op.run(model, rows), [without])


def test_a_lora_of_another_model_is_refused_by_its_header_and_where_that_is_not_seen_by_its_row(
    tiny_model: Path, tmp_path: Path, files: dict[str, Path]
) -> None:
    of_sdxl = models.save_lora(models.tiny_sdxl(), tmp_path / "xl", 1)
    of_sd3 = models.save_lora(models.tiny_sd3(), tmp_path / "sd3", 1)
    for lora, why in ((of_sdxl, "64 channels, StableDiffusionPipeline has 32"), (of_sd3, "made for a transformer")):
        with pytest.raises(Unfit, match=why):
            check_lora(read_shapes(lora), tiny_model)
    models.save_sd3(tmp_path / "model")
    with pytest.raises(Unfit, match="made for a U-Net"):
        check_lora(read_shapes(files["ink"]), tmp_path / "model")
    op = Txt2Img(model="x")
    model = op.load(tiny_model)
    without = op.run(model, prompts(3))[0]["image"]
    for lora, which in ((of_sdxl, "size mismatch for down_blocks"), (of_sd3, "nothing in it is for this model")):
        with pytest.raises(RowRefused, match=f"does not fit StableDiffusionPipeline: .*{which}"):
            op.run(model, prompts(3, loras=[(lora, 1.0)]))
        assert same(op.run(model, prompts(3)), [without])


def test_what_is_no_lora_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(Unfit, match="holds no LoRA"):
        check_lora(read_shapes(tmp_path / "a.safetensors"), tiny_model)
    with pytest.raises(Unfit, match="no whole safetensors file"):
        read_shapes(tmp_path / "b.safetensors")


def test_a_lora_in_the_names_of_other_trainers_is_told_apart_too(
    tiny_model: Path, tmp_path: Path, files: dict[str, Path]
) -> None:
    def renamed(path: Path) -> Path:
        out = tmp_path / f"{path.parent.name}.safetensors"
        names = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}
        tensors = {}
        for name, tensor in load_file(path).items():
            module, ending = next((name.removesuffix(old), new) for old, new in names.items() if name.endswith(old))
            tensors[f"lora_unet_{module.removeprefix('unet.').replace('.', '_')}{ending}"] = tensor
        save_file(tensors, out)
        return out

    fits = renamed(files["ink"])
    check_lora(read_shapes(fits), tiny_model)
    op = Txt2Img(model="x")
    model = op.load(tiny_model)
    assert not same(op.run(model, prompts(3, loras=[(fits, 1.0)])), [op.run(model, prompts(3))[0]["image"]])
    with pytest.raises(Unfit, match="for another model"):
        check_lora(read_shapes(renamed(models.save_lora(models.tiny_sdxl(), tmp_path / "xl", 1))), tiny_model)


def test_a_textual_inversion_gives_what_diffusers_gives(tiny_model: Path, files: dict[str, Path]) -> None:
    assert check_embedding(read_shapes(files["token"]), tiny_model, "learned_embeds", None) == "<blob>"
    assert check_embedding(read_shapes(files["token"]), tiny_model, "learned_embeds", "<mine>") == "<mine>"
    op = Txt2Img(model="x")
    model = op.load(tiny_model, Adapters(textual_inversion=(("<blob>", files["token"]),)))
    pipe = plain(tiny_model)
    texts = ["a red <blob>", "a red circle"]
    before = by_hand(pipe, texts, [3, 4], **SIZE)
    pipe.load_textual_inversion(files["token"].parent, weight_name=files["token"].name)
    rows = [row(text, seed=seed, **SIZE) for text, seed in zip(texts, (3, 4), strict=True)]
    made = op.run(model, rows)
    assert same(made, by_hand(pipe, texts, [3, 4], **SIZE))
    assert not np.array_equal(made[0]["image"], before[0])
    assert np.array_equal(made[1]["image"], before[1])


def test_the_words_of_a_textual_inversion_count_in_long_prompts(tiny_model: Path, tmp_path: Path) -> None:
    wide = models.save_embedding(tmp_path / "wide", "<wide>", vectors=40)
    model = Txt2Img(model="x").load(tiny_model, Adapters(textual_inversion=(("<wide>", wide),)))
    made = Txt2Img(model="x").run(model, [row("a <wide>", **SIZE), row("a circle", **SIZE)])
    assert [one["prompt_truncated"] for one in made] == [True, False]


def test_sdxl_takes_a_textual_inversion_for_both_its_text_encoders(tmp_path: Path, files: dict[str, Path]) -> None:
    models.save_sdxl(tmp_path / "model")
    both = tmp_path / "mine.safetensors"
    save_file({"clip_l": torch.randn(1, models.WIDTH), "clip_g": torch.randn(1, models.WIDTH)}, both)
    assert check_embedding(read_shapes(both), tmp_path / "model", "mine", None) == "mine"
    op = Txt2Img(model="x")
    model = op.load(tmp_path / "model", Adapters(textual_inversion=(("<mine>", both),)))
    pipe = plain(tmp_path / "model", "StableDiffusionXLPipeline")
    tensors = load_file(both)
    pipe.load_textual_inversion(
        tensors["clip_l"], token="<mine>", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer
    )
    pipe.load_textual_inversion(
        tensors["clip_g"], token="<mine>", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
    )
    assert same(op.run(model, [row("a <mine>", seed=3, **SIZE)]), by_hand(pipe, ["a <mine>"], [3], **SIZE))
    with pytest.raises(Unfit, match="clip_l and clip_g"):
        check_embedding(read_shapes(files["token"]), tmp_path / "model", "x", None)


def test_embeddings_that_do_not_fit_are_refused(tiny_model: Path, tmp_path: Path, files: dict[str, Path]) -> None:
    wide = models.save_embedding(tmp_path / "wide", "<wide>", width=48)
    with pytest.raises(Unfit, match="of width 48, the text encoder .* of 32"):
        check_embedding(read_shapes(wide), tiny_model, "x", None)
    with pytest.raises(Unfit, match="a word of the tokenizer already"):
        check_embedding(read_shapes(files["token"]), tiny_model, "x", "red</w>")
    models.save_sd3(tmp_path / "sd3")
    with pytest.raises(Unfit, match="not with StableDiffusion3Pipeline"):
        check_embedding(read_shapes(files["token"]), tmp_path / "sd3", "x", None)


def test_another_autoencoder_gives_what_diffusers_gives(tiny_model: Path, files: dict[str, Path]) -> None:
    check_vae(files["vae"], tiny_model)
    op = Txt2Img(model="x")
    made = op.run(op.load(tiny_model, Adapters(vae=(files["vae"], None))), prompts(3, 4))
    pipe = plain(tiny_model, vae=AutoencoderKL.from_pretrained(files["vae"]))
    texts = [row()["prompt"]] * 2
    assert same(made, by_hand(pipe, texts, [3, 4], **SIZE))
    assert not same(made, by_hand(plain(tiny_model), texts, [3, 4], **SIZE))


def test_an_autoencoder_of_other_latents_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    AutoencoderKL(latent_channels=8, norm_num_groups=4, block_out_channels=(8,)).save_pretrained(tmp_path / "eight")
    with pytest.raises(Unfit, match="8 latent channels, the model's own 4"):
        check_vae(tmp_path / "eight", tiny_model)
    AutoencoderKL(latent_channels=4, norm_num_groups=4, block_out_channels=(8,)).save_pretrained(tmp_path / "four")
    with pytest.raises(Unfit, match="1 pixels a latent, the model's own 8"):
        check_vae(tmp_path / "four", tiny_model)
    models.tiny_ldm_x4().save_pretrained(tmp_path / "vq")
    with pytest.raises(Unfit, match="must be AutoencoderKL"):
        check_vae(tmp_path / "vq", tiny_model)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_controlnet_gives_what_diffusers_gives_in_every_op(
    family: str, tiny_model: Path, tmp_path: Path, files: dict[str, Path]
) -> None:
    folder, controlnet, prefix = tiny_model, files["controlnet"], "StableDiffusion"
    if family == "sdxl":
        folder, prefix = tmp_path / "xl", "StableDiffusionXL"
        models.save_sdxl(folder)
        controlnet = models.save_controlnet(models.tiny_sdxl().unet, tmp_path / "controlnet")
    maps = [picture(seed=8), picture(seed=9)]
    shown = [Image.fromarray(one) for one in maps]
    images = [picture(seed=1), picture(seed=2)]
    control = [
        {"control_image": m, "controlnet_conditioning_scale": 0.8, "image": p}
        for m, p in zip(maps, images, strict=True)
    ]
    texts = [row()["prompt"]] * 2
    net = ControlNetModel.from_pretrained(controlnet)
    adapters = Adapters(controlnet=(controlnet, None))

    check_controlnet(controlnet, folder, "txt2img")
    op: Any = Txt2Img(model="x")
    pipe = plain(folder, f"{prefix}ControlNetPipeline", controlnet=net)
    expected = by_hand(pipe, texts, [3, 4], image=shown, controlnet_conditioning_scale=0.8)
    rows = [row(seed=s, **{**c, "image": None}) for s, c in zip((3, 4), control, strict=True)]
    model = op.load(folder, adapters)
    assert same(op.run(model, rows), expected)
    assert np.array_equal(op.run(model, rows[::-1])[1]["image"], expected[0])
    assert not same(op.run(model, [{**r, "controlnet_conditioning_scale": 0.0} for r in rows]), expected)

    check_controlnet(controlnet, folder, "img2img")
    op = Img2Img(model="x")
    pipe = plain(folder, f"{prefix}ControlNetImg2ImgPipeline", controlnet=net)
    expected = by_hand(
        pipe,
        texts,
        [3, 4],
        image=[Image.fromarray(p) for p in images],
        control_image=shown,
        controlnet_conditioning_scale=0.8,
        strength=0.5,
    )
    rows = [row(seed=s, strength=0.5, **c) for s, c in zip((3, 4), control, strict=True)]
    assert same(op.run(op.load(folder, adapters), rows), expected)

    check_controlnet(controlnet, folder, "inpaint")
    op = Inpaint(model="x", preserve_unmasked=False)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    pipe = plain(folder, f"{prefix}ControlNetInpaintPipeline", controlnet=net)
    expected = by_hand(
        pipe,
        texts,
        [3, 4],
        image=[Image.fromarray(p) for p in images],
        mask_image=[Image.fromarray(mask)] * 2,
        control_image=shown,
        controlnet_conditioning_scale=0.8,
        strength=0.5,
        **SIZE,
    )
    rows = [row(seed=s, strength=0.5, mask_image=mask, **c) for s, c in zip((3, 4), control, strict=True)]
    assert same(op.run(op.load(folder, adapters), rows), expected)


@pytest.mark.parametrize(
    ("family", "kind", "channels"),
    [("sd", "full_adapter", 3), ("sd", "light_adapter", 1), ("sdxl", "full_adapter_xl", 3)],
)
def test_a_t2i_adapter_gives_what_diffusers_gives(family: str, kind: str, channels: int, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (models.tiny_attentive() if family == "sd" else models.tiny_sdxl()).save_pretrained(folder)
    place = models.save_t2i_adapter(tmp_path / "adapter", kind, channels)
    check_controlnet(place, folder, "txt2img")
    maps = [picture(seed=8), picture(seed=9)]
    shown = [Image.fromarray(one).convert("L" if channels == 1 else "RGB") for one in maps]
    name = "StableDiffusionAdapterPipeline" if family == "sd" else "StableDiffusionXLAdapterPipeline"
    pipe = plain(folder, name, adapter=T2IAdapter.from_pretrained(place))
    expected = by_hand(pipe, [row()["prompt"]] * 2, [3, 4], image=shown, adapter_conditioning_scale=0.8, **SIZE)

    op = Txt2Img(model="x")
    model = op.load(folder, Adapters(controlnet=(place, None)))
    control = [{"control_image": one, "controlnet_conditioning_scale": 0.8} for one in maps]
    rows = [row(seed=seed, **one) for seed, one in zip((3, 4), control, strict=True)]
    assert same(op.run(model, rows), expected)
    assert np.array_equal(op.run(model, rows[::-1])[1]["image"], expected[0])
    assert not same(op.run(model, [{**r, "controlnet_conditioning_scale": 0.0} for r in rows]), expected)
    negative = [{**r, "negative_prompt": "a star"} for r in rows]
    assert not same(op.run(model, negative), expected)


def test_a_t2i_adapter_of_another_model_or_for_another_op_is_refused(
    tiny_model: Path, tmp_path: Path, files: dict[str, Path]
) -> None:
    models.tiny_attentive().save_pretrained(tmp_path / "sd")
    models.tiny_sd3().save_pretrained(tmp_path / "sd3")
    adapter = models.save_t2i_adapter(tmp_path / "adapter")
    with pytest.raises(Unfit, match="is a T2IAdapter, which img2img does not take"):
        check_controlnet(adapter, tmp_path / "sd", "img2img")
    with pytest.raises(Unfit, match="the model is a StableDiffusion3Pipeline"):
        check_controlnet(adapter, tmp_path / "sd3", "txt2img")
    with pytest.raises(Unfit, match="adapter_type is full_adapter, the model's U-Net begins with a DownBlock2D"):
        check_controlnet(adapter, tiny_model, "txt2img")
    wide = models.save_t2i_adapter(tmp_path / "wide", channels=[32, 64])
    with pytest.raises(Unfit, match=r"channels is \[32, 64\], the model's U-Net has \[16, 32\]"):
        check_controlnet(wide, tmp_path / "sd", "txt2img")


def test_an_inpainting_model_takes_a_controlnet(tmp_path: Path, files: dict[str, Path]) -> None:
    models.tiny_inpainting().save_pretrained(tmp_path)
    check_controlnet(files["controlnet"], tmp_path, "inpaint")
    with pytest.raises(Unfit, match="txt2img with a ControlNet takes"):
        check_controlnet(files["controlnet"], tmp_path, "txt2img")
    op = Inpaint(model="x")
    mask = np.full((64, 64), 255, np.uint8)
    rows = [
        row(seed=3, strength=1.0, image=picture(), mask_image=mask, control_image=m, controlnet_conditioning_scale=1.0)
        for m in (picture(seed=8), picture(seed=9))
    ]
    made = op.run(op.load(tmp_path, Adapters(controlnet=(files["controlnet"], None))), rows)
    assert not np.array_equal(made[0]["image"], made[1]["image"])


def test_a_controlnet_of_another_model_is_refused(tiny_model: Path, tmp_path: Path, files: dict[str, Path]) -> None:
    models.save_sdxl(tmp_path / "xl")
    models.save_sd3(tmp_path / "sd3")
    with pytest.raises(Unfit, match="cross_attention_dim is 32, the model's U-Net has 64"):
        check_controlnet(files["controlnet"], tmp_path / "xl", "txt2img")
    with pytest.raises(Unfit, match="the model is a StableDiffusion3Pipeline"):
        check_controlnet(files["controlnet"], tmp_path / "sd3", "txt2img")
    with pytest.raises(Unfit, match="a ControlNetModel or a T2IAdapter is needed"):
        check_controlnet(files["vae"], tiny_model, "txt2img")
