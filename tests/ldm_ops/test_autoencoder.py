"""Encode and decode against diffusers' own autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from ldm_ops.decode import Decode
from ldm_ops.describe import describe
from ldm_ops.encode import Encode
from ldm_ops.op import RowRefused
from tests import models
from tests.ldm_ops.rows import picture


def rows(count: int = 3) -> list[dict[str, Any]]:
    return [{"image": picture(64, 48, i), "seed": 10 + i} for i in range(count)]


def posterior(folder: Path, pictures: list[Any]) -> Any:
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        return vae, vae.encode(images).latent_dist


@pytest.mark.parametrize("kind", ["moments", "mode", "sample"])
def test_latents_are_what_diffusers_encodes(tiny_model: Path, kind: Any) -> None:
    op = Encode(model="x", posterior=kind, store_dtype="fp32")
    made = np.stack([out["latents"] for out in op.run(op.load(tiny_model), rows())])
    vae, found = posterior(tiny_model, [row["image"] for row in rows()])
    if kind == "moments":
        expected = torch.cat([found.mean, found.logvar], 1)
    else:
        noise = torch.stack([torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(10 + i)) for i in range(3)])
        expected = (found.mean + (found.std * noise if kind == "sample" else 0)) * vae.config.scaling_factor
    assert np.abs(made - expected.numpy()).max() < 2e-6


def test_a_rows_latents_do_not_depend_on_its_neighbours(tiny_model: Path) -> None:
    op = Encode(model="x", posterior="sample", random_flip=True)
    model = op.load(tiny_model)
    forth, back = op.run(model, rows()), op.run(model, rows()[::-1])[::-1]
    for a, b in zip(forth, back, strict=True):
        assert np.array_equal(a["latents"], b["latents"])
        assert a["flipped"] == b["flipped"]


def test_a_flip_is_decided_by_the_seed_and_recorded(tiny_model: Path) -> None:
    op = Encode(model="x", random_flip=True, store_dtype="fp32")
    model = op.load(tiny_model)
    made = op.run(model, [{"image": picture(), "seed": seed} for seed in range(40)])
    flipped = [out["flipped"] for out in made]
    assert 8 < sum(flipped) < 32
    plain = Encode(model="x", store_dtype="fp32").run(model, [{"image": picture()[:, ::-1], "seed": 0}] * 40)
    i = flipped.index(True)
    assert np.array_equal(made[i]["latents"], plain[i]["latents"])


@pytest.mark.parametrize("kind", ["moments", "mode"])
def test_decoding_what_was_encoded_is_what_the_autoencoder_does_in_one_go(tiny_model: Path, kind: Any) -> None:
    encode = Encode(model="x", posterior=kind, store_dtype="fp32")
    decode = Decode(model="x")
    latents = encode.run(encode.load(tiny_model), rows())
    made = decode.run(decode.load(tiny_model), [{"latents": out["latents"]} for out in latents])
    vae, found = posterior(tiny_model, [row["image"] for row in rows()])
    with torch.inference_mode():
        expected = (vae.decode(found.mean).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    for out, image in zip(made, expected, strict=True):
        assert np.abs(out["image"].astype(int) - np.round(image * 255)).max() <= 1


def test_an_autoencoder_alone_is_a_model_too(tiny_model: Path, tmp_path: Path) -> None:
    AutoencoderKL.from_pretrained(tiny_model / "vae").save_pretrained(tmp_path)
    facts = describe(tmp_path)
    assert (facts.pipeline, facts.ops, facts.latent_factor) == ("AutoencoderKL", {"encode", "decode"}, 8)
    assert facts.latent_scale == pytest.approx(0.18215)
    op = Encode(model="x")
    alone, whole = (op.run(op.load(folder), rows()) for folder in (tmp_path, tiny_model))
    assert all(np.array_equal(a["latents"], b["latents"]) for a, b in zip(alone, whole, strict=True))


def test_scale_and_shift_of_newer_models_are_undone(tmp_path: Path) -> None:
    models.vae(scaling_factor=1.5, shift_factor=0.06).save_pretrained(tmp_path)
    encode, decode = Encode(model="x", posterior="mode", store_dtype="fp32"), Decode(model="x")
    latents = encode.run(encode.load(tmp_path), rows(1))[0]["latents"]
    vae = AutoencoderKL.from_pretrained(tmp_path)
    with torch.inference_mode():
        again = vae.decode(torch.from_numpy(latents)[None] / 1.5 + 0.06).sample
    expected = ((again[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255).round().numpy()
    made = decode.run(decode.load(tmp_path), [{"latents": latents}])[0]["image"]
    assert np.abs(made - expected).max() <= 1


def test_nan_and_overflow_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_model / "vae")
    with torch.no_grad():
        vae.quant_conv.weight.mul_(1e7)
    vae.save_pretrained(tmp_path)
    op = Encode(model="x")
    with pytest.raises(RowRefused, match="do not fit store_dtype; try fp32"):
        op.run(op.load(tmp_path), rows(1))


def test_latents_of_another_number_of_channels_are_refused(tiny_model: Path) -> None:
    op = Decode(model="x")
    with pytest.raises(RowRefused, match="16 channels; this autoencoder has 4, its moments 8"):
        op.run(op.load(tiny_model), [{"latents": np.zeros((16, 8, 8), np.float32)}])
