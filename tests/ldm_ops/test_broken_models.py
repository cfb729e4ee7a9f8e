"""A model that gives NaN or nothing at all: no op makes a picture, latents or an embedding of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm_ops.decode import Decode
from ldm_ops.embed import Embed
from ldm_ops.encode import Encode
from ldm_ops.img2img import Img2Img
from ldm_ops.inpaint import Inpaint
from ldm_ops.op import Op, RowRefused
from ldm_ops.txt2img import Txt2Img
from ldm_ops.upscale import Upscale
from tests import models
from tests.ldm_ops.rows import picture, row

LEFT = np.repeat(np.repeat(np.uint8([[255, 0]]), 64, 0), 32, 1)
"""A mask over the left half of 64 × 64."""

WHITE = np.full((64, 64, 3), 255, np.uint8)
BROUGHT: dict[str, dict[str, Any]] = {
    "txt2img": {"height": 64, "width": 64},
    "img2img": {"strength": 1.0},
    "inpaint": {"strength": 1.0, "mask_image": LEFT},
    "upscale-ldm": {},
    "upscale-sd": {},
}
OPS: dict[str, Op] = {
    "txt2img": Txt2Img(model="x"),
    "img2img": Img2Img(model="x"),
    "inpaint": Inpaint(model="x", preserve_unmasked=False),
    "upscale-ldm": Upscale(model="x"),
    "upscale-sd": Upscale(model="x"),
}


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("upscalers")
    models.tiny_ldm_x4().save_pretrained(root / "ldm")
    models.tiny_sd_x4().save_pretrained(root / "sd")
    return {"upscale-ldm": root / "ldm", "upscale-sd": root / "sd"}


def loaded(name: str, folders: dict[str, Path], tiny_model: Path) -> Any:
    return OPS[name].load(folders.get(name, tiny_model))


def run(name: str, model: Any, image: Any) -> Any:
    rows = [row(num_inference_steps=2, image=image, **BROUGHT[name])] * 2
    return OPS[name].run(model, rows)[0]["image"]


def kind(name: str, model: Any, image: Any) -> str:
    with pytest.raises(RowRefused) as caught:
        run(name, model, image)
    return caught.value.kind


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_nan_is_never_a_picture(name: str, part: str, folders: dict[str, Path], tiny_model: Path) -> None:
    model = loaded(name, folders, tiny_model)
    broken = model.pipe.unet.conv_in if part == "unet" else vae(model).decoder.conv_in
    with torch.no_grad():
        broken.weight.fill_(torch.nan)
    assert kind(name, model, None if name == "txt2img" else picture()) == "model.nan"


@pytest.mark.parametrize(("op", "row"), [(Encode, {"image": picture()}), (Decode, {"latents": np.ones((4, 8, 8))})])
def test_nan_is_never_latents_nor_a_picture_of_them(op: Any, row: dict[str, Any], tiny_model: Path) -> None:
    model = op(model="x").load(tiny_model)
    with torch.no_grad():
        for part in (model.vae.encoder, model.vae.decoder):
            part.conv_in.weight.fill_(torch.nan)
    with pytest.raises(RowRefused) as caught:
        op(model="x").run(model, [{**row, "seed": 1}])
    assert caught.value.kind == "model.nan"


def test_nan_is_never_an_embedding(poisoned_model: Path) -> None:
    op = Embed(model="x")
    model = op.load(poisoned_model)
    assert len(op.run(model, [{"prompt": "a red star"}])) == 1
    with pytest.raises(RowRefused) as caught:
        op.run(model, [{"prompt": "a red star"}, {"prompt": "a red ring"}])
    assert caught.value.kind == "model.nan"


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("level", [0, 255])
def test_a_picture_of_one_colour_is_refused_where_the_row_brings_none(
    name: str, level: int, folders: dict[str, Path], tiny_model: Path
) -> None:
    model = loaded(name, folders, tiny_model)
    paint(vae(model), level)
    assert kind(name, model, None if name == "txt2img" else picture()) == "model.blank"
    if name != "txt2img":
        assert (run(name, model, WHITE) == level).all()


def test_what_stood_before_a_plain_background_may_be_painted_out(tiny_model: Path) -> None:
    model = OPS["inpaint"].load(tiny_model)
    paint(vae(model), 255)
    stands = np.where(LEFT[..., None] > 0, picture(), WHITE)
    assert (run("inpaint", model, stands) == 255).all()


def test_latents_of_a_black_image_may_be_black_again(tiny_model: Path) -> None:
    op = Decode(model="x")
    model = op.load(tiny_model)
    paint(model.vae, 0)
    assert not op.run(model, [{"latents": np.ones((4, 8, 8))}])[0]["image"].any()


def vae(model: Any) -> Any:
    return model.pipe.vqvae if hasattr(model.pipe, "vqvae") else model.pipe.vae


def paint(autoencoder: Any, level: int) -> None:
    """Let a decoder overflow to one end of its range, whatever it is given."""
    with torch.no_grad():
        autoencoder.decoder.conv_out.weight.zero_()
        autoencoder.decoder.conv_out.bias.fill_(10.0 if level else -10.0)
