"""What a model folder says of itself, and which folders are never loaded."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest

from ldm_ops.describe import NotAModel, describe
from ldm_ops.schedulers import scheduler_name
from tests import models


def test_sizes_and_scheduler_come_from_the_configs(tiny_model: Path) -> None:
    facts = describe(tiny_model)
    assert (facts.default_height, facts.default_width, facts.size_multiple) == (64, 64, 8)
    assert facts.scheduler == "ddim"
    assert not facts.flow_matching


def test_a_transformer_needs_sizes_of_twice_the_latent_factor(tmp_path: Path) -> None:
    models.save_sd3(tmp_path)
    facts = describe(tmp_path)
    assert (facts.size_multiple, facts.flow_matching) == (16, True)


def test_pickled_weights_are_refused_and_never_run(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    witness = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(witness)!r}, 'w')",))

    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(NotAModel, match="unet holds no safetensors"):
        describe(folder)
    from ldm_ops.txt2img import Txt2Img

    with pytest.raises(OSError, match="safetensors"):
        Txt2Img(model="x").load(folder)
    assert not witness.exists()


def test_code_and_custom_pipelines_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "custom"
    shutil.copytree(tiny_model, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": ["my_pipeline", "Mine"]}))
    with pytest.raises(NotAModel, match="custom pipelines are not allowed"):
        describe(folder)
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["my_unet", "Mine"]}))
    (folder / "unet" / "my_unet.py").write_text("raise SystemExit")
    with pytest.raises(NotAModel, match=r"runs code from the folder itself \(my_unet.py"):
        describe(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "has no model_index.json"),
        (lambda f: (f / "model_index.json").write_text("{"), "not valid JSON"),
        (lambda f: shutil.rmtree(f / "vae"), "names vae, but there is no such folder"),
    ],
)
def test_a_folder_that_is_not_whole_says_what_is_missing(
    tiny_model: Path, tmp_path: Path, damage: object, message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    damage(folder)  # type: ignore[operator]
    with pytest.raises(NotAModel, match=message):
        describe(folder)


@pytest.mark.parametrize(
    ("typed", "name"),
    [("Euler a", "euler_a"), ("DPM++ 2M Karras", "dpm++_2m_karras"), ("DDIMScheduler", "ddim"), ("UniPC", "unipc")],
)
def test_schedulers_go_by_the_names_that_people_type(typed: str, name: str) -> None:
    assert scheduler_name(typed) == name


def test_an_unknown_scheduler_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown scheduler 'unipcc'; did you mean unipc"):
        scheduler_name("unipcc")
