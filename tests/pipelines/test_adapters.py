"""Jobs whose stages have LoRAs, textual inversions, another autoencoder or a ControlNet."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    T2IAdapter,
)
from PIL import Image

from ldm_ops.adapters import Adapters
from ldm_ops.img2img import Img2Img
from pipelines.blocks import with_results
from pipelines.equipment import plan_adapters
from pipelines.errors import JobError, LdmError
from pipelines.job import Job, parse_job
from pipelines.loading import image_loader
from pipelines.planner import check, plan
from pipelines.plans import read_shard
from pipelines.runner import run
from pipelines.storage import Store
from pipelines.weights import identify
from pipelines.worker import Place, Worker
from tests import models
from tests.ldm_ops.rows import picture
from tests.pipelines import reader

Make = Callable[..., Job]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for i in range(3):
        Image.fromarray(picture(48, 64, i)).save(folder / f"map{i}.png")
    return {
        "ink": models.save_lora(models.tiny_stable_diffusion(), folder / "ink", 1),
        "pen": models.save_lora(models.tiny_stable_diffusion(), folder / "pen", 2, text=True),
        "xl": models.save_lora(models.tiny_sdxl(), folder / "xl", 3),
        "vae": models.save_vae(folder / "vae"),
        "controlnet": models.save_controlnet(models.tiny_stable_diffusion().unet, folder / "controlnet"),
        "t2i": models.save_t2i_adapter(folder / "t2i"),
        "t2i_xl": models.save_t2i_adapter(folder / "t2i_xl", "full_adapter_xl"),
        "token": models.save_embedding(folder / "token", "<blob>"),
        "maps": folder,
    }


def keys(job: Job) -> list[str]:
    table = check(job).table
    assert table is not None
    return sorted(table["key"].to_pylist())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pixels(out: Path, row: dict[str, Any]) -> Any:
    return np.asarray(Image.open(out / row["uri"]))


@pytest.mark.usefixtures("ray_session")
def test_rows_choose_their_loras_and_get_what_diffusers_gives_under_any_number_of_workers(
    make_job: Make, tiny_model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    choices = ["none", "ink", "ink + pen", "", str(files["pen"])]
    rows = [
        {"prompt": "a red circle", "seed": i, "lora": choices[i % 5], **({"lora_scale": 0.5} if i == 6 else {})}
        for i in range(10)
    ]
    stage = {"loras": {"ink": str(files["ink"]), "pen": {"model": str(files["pen"].parent), "scale": 0.25}}}
    stage |= {"lora": "pen", "guidance_scale": 3.0}
    assert run(make_job(stage, str(tmp_path / "one"), source={"rows": rows})).exit_code == 0
    shuffled = {"rows": random.Random(1).sample(rows, len(rows))}
    job = make_job({**stage, "workers": 2}, str(tmp_path / "two"), source=shuffled, batches_per_shard=1)
    assert run(job).exit_code == 0
    found = {row["seed"]: row for row in reader.rows(tmp_path / "one")}
    assert {row["seed"]: row["sha256"] for row in reader.rows(tmp_path / "two")} == {
        seed: row["sha256"] for seed, row in found.items()
    }
    untouched, pipe = (AutoPipelineForText2Image.from_pretrained(tiny_model, use_safetensors=True) for _ in range(2))
    for name in ("ink", "pen"):
        pipe.load_lora_weights(files[name].parent, weight_name=files[name].name, adapter_name=name)
    sha = {name: sha256(files[name]) for name in ("ink", "pen")}
    for seed, row in found.items():
        scale = 0.5 if seed == 6 else 1.0
        wanted = [{}, {"ink": scale}, {"ink": 1.0, "pen": 0.25}, {"pen": 0.25}, {"pen": 1.0}][seed % 5]
        said = [None, "ink", "ink + pen", "pen", str(files["pen"])][seed % 5]
        assert (row["lora"], row["lora_scale"]) == (said, scale if said else None)
        assert row["lora_revision"] == (" + ".join(sha[name] for name in wanted) or None)
        listed = [(one["kind"], one["revision"], one["scale"]) for one in row["stages"][0]["adapters"]]
        assert listed == [("lora", sha[name], one) for name, one in wanted.items()]
        if wanted:
            pipe.set_adapters(list(wanted), list(wanted.values()))
        image = (pipe if wanted else untouched)(
            ["a red circle"] * 2,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(seed) for _ in range(2)],
        ).images[0]
        assert np.array_equal(pixels(tmp_path / "one", row), np.asarray(image)), seed


@pytest.mark.usefixtures("ray_session")
def test_a_map_controls_its_row_as_in_diffusers(
    make_job: Make, tiny_model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    table = files["maps"] / "rows.csv"
    table.write_text(
        "seed,control_image,controlnet_conditioning_scale\n0,map0.png,\n1,map1.png,0.5\n2,missing.png,\n3,map2.png,\n"
    )
    source = {"path": str(table), "on_bad_row": "fail"}
    stage = {"controlnet": str(files["controlnet"]), "prompt": "a red ring", "guidance_scale": 3.0}
    summary = run(make_job({**stage, "batch_size": 1}, str(tmp_path / "out"), source=source))
    assert (summary.totals.num_ok, summary.totals.num_failed) == (3, 1)
    found = {row["seed"]: row for row in reader.rows(tmp_path / "out") if row["status"] == "ok"}
    net = ControlNetModel.from_pretrained(files["controlnet"])
    pipe = StableDiffusionControlNetPipeline.from_pretrained(tiny_model, controlnet=net, use_safetensors=True)
    for seed, (name, scale) in {0: ("map0.png", 1.0), 1: ("map1.png", 0.5), 3: ("map2.png", 1.0)}.items():
        row = found[seed]
        assert row["control_image"] == str(files["maps"] / name)
        assert (row["controlnet_conditioning_scale"], row["height"], row["width"]) == (scale, 48, 64)
        assert [one["kind"] for one in row["stages"][0]["adapters"]] == ["controlnet"]
        image = pipe(
            "a red ring",
            image=Image.open(files["maps"] / name),
            num_inference_steps=2,
            guidance_scale=3.0,
            controlnet_conditioning_scale=scale,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        assert np.array_equal(pixels(tmp_path / "out", row), np.asarray(image))


@pytest.mark.usefixtures("ray_session")
def test_a_chain_has_adapters_of_its_own_in_each_stage(
    tiny_model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    common = {"model": str(tiny_model), "num_inference_steps": 4, "batch_size": 2, "workers": 1, "strength": 0.5}
    first = {**common, "op": "img2img", "controlnet": str(files["controlnet"]), "keep": True}
    second = {**common, "op": "img2img", "prompt": "a ring", "vae": str(files["vae"]), "guidance_scale": 3.0}
    first["textual_inversion"] = [str(files["token"])]
    second |= {"lora": str(files["pen"]), "lora_scale": 0.5}
    maps, lora = [str(files["maps"] / f"map{i}.png") for i in range(2)], str(files["ink"])
    rows = [
        {"id": str(i), "prompt": "a <blob>", "image": maps[i], "control_image": maps[1 - i], "lora": lora}
        for i in range(2)
    ]
    job = {"source": {"rows": rows}, "stages": [first, second], "sink": {"path": str(tmp_path)}}
    assert run(Job.model_validate(job)).exit_code == 0
    op = Img2Img(model="x", num_inference_steps=4)
    model = op.load(tiny_model, Adapters(vae=(files["vae"], None)))
    for row in reader.rows(tmp_path):
        before, after = row["stages"]
        kinds = [[(one["kind"], one["scale"]) for one in stage["adapters"]] for stage in (before, after)]
        assert kinds[0] == [("controlnet", 1.0), ("textual_inversion", None), ("lora", 1.0)]
        assert kinds[1] == [("vae", None), ("lora", 0.5)]
        assert row["lora"] == lora
        again = {"prompt": "a ring", "negative_prompt": "", "image": pixels(tmp_path, before), "seed": after["seed"]}
        again |= {name: after[name] for name in ("num_inference_steps", "guidance_scale", "scheduler", "strength")}
        made = op.run(model, [{**again, "loras": [(files["pen"], 0.5)]}] * 2)
        assert np.array_equal(made[0]["image"], pixels(tmp_path, row))


def test_an_adapter_is_part_of_the_key_by_its_content_and_one_that_is_not_used_is_not(
    make_job: Make, files: dict[str, Path], tmp_path: Path
) -> None:
    plain = keys(make_job())
    copy = tmp_path / "copy.safetensors"
    shutil.copy(files["ink"], copy)
    assert keys(make_job({"loras": {"ink": str(files["ink"])}, "lora": "none"})) == plain
    assert keys(make_job({"lora": "none", "lora_scale": 0.3})) == plain
    none = {"rows": [{"prompt": "a red circle", "lora": "none"}, {"prompt": "b", "lora": str(copy)}]}
    assert plain[0] in keys(make_job({"lora": str(copy)}, source=none))
    used = keys(make_job({"lora": str(files["ink"])}))
    assert used == keys(make_job({"loras": {"a": str(copy)}, "lora": "a"}))
    assert used == keys(make_job({"lora": "none"}, source={"rows": [{"prompt": "a red circle", "lora": str(copy)}]}))
    token, vae, net = (str(files[name]) for name in ("token", "vae", "controlnet"))
    control = {"rows": [{"prompt": "a red circle", "control_image": str(files["maps"] / "map0.png")}]}
    others = [
        used,
        keys(make_job({"lora": str(files["ink"]), "lora_scale": 0.5})),
        keys(make_job({"loras": {"a": {"model": str(copy), "scale": 0.25}}, "lora": "a"})),
        keys(make_job({"lora": str(files["pen"])})),
        keys(make_job({"textual_inversion": [token]})),
        keys(make_job({"textual_inversion": [{"model": token, "token": "<other>"}]})),
        keys(make_job({"vae": vae})),
        keys(make_job({"controlnet": net}, source=control)),
        keys(make_job({"controlnet": net, "controlnet_conditioning_scale": 0.5}, source=control)),
        keys(make_job({"controlnet": net, "controlnet_conditioning_scale": 0}, source=control)),
        keys(make_job({"controlnet": net, "resize": "exact"}, source=control)),
    ]
    assert others[2] == keys(
        make_job({"loras": {"a": {"model": str(copy), "scale": 0.5}}, "lora": "a", "lora_scale": 0.5})
    )
    assert len({*map(tuple, others), tuple(plain)}) == len(others) + 1
    copy.write_bytes(files["pen"].read_bytes())
    assert keys(make_job({"lora": str(copy)})) == others[3]


def test_a_sweep_over_loras_keeps_the_seed_of_the_row(make_job: Make, files: dict[str, Path]) -> None:
    axes = {"lora": ["none", "ink"], "lora_scale": [0.5, 1.0]}
    job = make_job({"loras": {"ink": str(files["ink"])}}, source={"rows": ["a red circle"], "matrix": axes})
    table = check(job).table
    assert table is not None
    assert len(set(table["seed"].to_pylist())) == 1
    # Without a LoRA its scale changes nothing.
    chosen = list(zip(table["lora"].to_pylist(), table["lora_scale"].to_pylist(), strict=True))
    assert sorted(chosen, key=str) == [("ink", 0.5), ("ink", 1.0), (None, None)]


def test_rows_of_one_lora_share_their_batches(make_job: Make, files: dict[str, Path]) -> None:
    rows = [{"prompt": f"a red circle {i}", "lora": ["none", str(files["ink"])][i % 2]} for i in range(8)]
    planned = check(make_job({"batch_size": 4}, source={"rows": rows}))
    assert planned.table is not None
    batches: dict[int, set[str | None]] = {}
    for batch, lora in zip(planned.table["batch"].to_pylist(), planned.table["lora"].to_pylist(), strict=True):
        batches.setdefault(batch, set()).add(lora)
    assert sorted(map(list, batches.values()), key=str) == [[str(files["ink"])], [None]]


def test_other_adapters_on_the_same_output_are_another_job(
    make_job: Make, files: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy.safetensors"
    shutil.copy(files["ink"], copy)
    plan(make_job({"lora": str(copy)}))
    shutil.copy(files["pen"], copy)
    with pytest.raises(LdmError, match=r"holds another job \(stages.0.adapters.lora"):
        plan(make_job({"lora": str(copy)}))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"lora": "ink"}, "stages.0.lora: lora 'ink' is no name under loras (none are named) and no file"),
        ({"lora": "./no.safetensors"}, "no.safetensors' is not there"),
        ({"lora": "a.ckpt"}, "pickled"),
        ({"loras": {"a": "{maps}/map0.png"}}, "no safetensors file"),
        ({"loras": {"a": "{xl}"}}, "stages.0.loras.a: {xl} is for another model"),
        ({"loras": {"a": "{vae}"}}, "holds no LoRA"),
        ({"loras": {"a": "org/name"}}, "needs `revision:`"),
        ({"loras": {"a": {"model": "{ink}", "revision": "v1"}}}, "is no hub id"),
        ({"loras": {"a b": "{ink}"}}, "stages.0.loras.a b"),
        (
            {"loras": {"a": {"model": "{ink}", "weight": 2}}},
            "stages.0.loras.a.weight: unknown field; did you mean weight_n",
        ),
        ({"lora": "https://example.org/a.safetensors"}, "is behind https"),
        ({"loras": {"a": {"model": "{ink}", "weight_name": "b"}}}, "leave weight_name out"),
        ({"loras": {"none": "{ink}"}}, "choose another name"),
        ({"vae": "{controlnet}"}, "stages.0.vae: {controlnet} is a ControlNetModel"),
        ({"vae": "org/name"}, "stages.0.vae: model org/name: a hub model needs `revision:`"),
        ({"textual_inversion": ["{ink}"]}, "stages.0.textual_inversion.0: {ink} holds"),
        ({"textual_inversion": ["{token}", "{token}"]}, "each needs one of its own"),
        ({"textual_inversion": ["x.bin"]}, "pickled"),
        ({"controlnet": "{vae}"}, "a ControlNetModel or a T2IAdapter is needed"),
        ({"controlnet": "{controlnet}"}, "no column 'control_image'"),
        ({"controlnet": "{t2i}"}, "stages.0.controlnet: {t2i} is for another model: adapter_type is full_adapter,"),
        (
            {"controlnet": "{t2i_xl}", "save_intermediates": 1},
            "is a T2IAdapter, whose pipelines show no step; leave save_intermediates out",
        ),
        ({"op": "img2img", "controlnet": "{t2i_xl}"}, "is a T2IAdapter, which img2img does not take"),
        ({"controlnet_conditioning_scale": 0.5}, "without a controlnet"),
        ({"resize": "fit"}, "there is no controlnet"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    make_job: Make, files: dict[str, Path], stage: dict[str, Any], message: str
) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(one) for name, one in value.items()}
        if isinstance(value, list):
            return [filled(one) for one in value]
        return value.format(**files) if isinstance(value, str) else value

    with pytest.raises(JobError) as caught:
        check(make_job(filled(stage)))
    assert message.format(**files) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("ray_session")
def test_a_t2i_adapter_stands_where_a_controlnet_does(make_job: Make, files: dict[str, Path], tmp_path: Path) -> None:
    models.save_sdxl(tmp_path / "xl")
    table = files["maps"] / "t2i.csv"
    table.write_text("seed,control_image,controlnet_conditioning_scale\n0,map0.png,\n1,map1.png,0.5\n")
    stage = {"model": str(tmp_path / "xl"), "controlnet": str(files["t2i_xl"]), "prompt": "a red ring"}
    summary = run(make_job({**stage, "guidance_scale": 3.0}, source={"path": str(table)}))
    assert summary.exit_code == 0
    adapter = T2IAdapter.from_pretrained(files["t2i_xl"])
    pipe = StableDiffusionXLAdapterPipeline.from_pretrained(tmp_path / "xl", adapter=adapter, use_safetensors=True)
    for row in reader.rows(tmp_path / "out"):
        image = pipe(
            ["a red ring"] * 2,
            image=[Image.open(row["control_image"])] * 2,
            num_inference_steps=2,
            guidance_scale=3.0,
            adapter_conditioning_scale={0: 1.0, 1: 0.5}[row["seed"]],
            generator=[torch.Generator().manual_seed(row["seed"]) for _ in range(2)],
            height=row["height"],
            width=row["width"],
        ).images[0]
        assert np.array_equal(pixels(tmp_path / "out", row), np.asarray(image))
        assert [one["kind"] for one in row["stages"][0]["adapters"]] == ["controlnet"]
    with pytest.raises(JobError, match="height 40 is not a multiple of 16; use 32 or 48"):
        check(make_job({**stage, "height": 40}, source={"path": str(table)}))


def test_a_control_image_without_a_controlnet_is_refused(make_job: Make) -> None:
    with pytest.raises(JobError, match="no controlnet would see them"):
        check(make_job(source={"rows": [{"prompt": "x", "control_image": "a.png"}]}))


def test_a_controlnet_in_a_later_stage_is_refused(tiny_model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    later = {"op": "img2img", "model": str(tiny_model), "controlnet": str(files["controlnet"])}
    with pytest.raises(JobError, match=r"stages\.1\.controlnet: a control image comes with a row"):
        parse_job(
            repr(
                {
                    "source": {"rows": ["x"]},
                    "stages": [{"op": "txt2img", "model": str(tiny_model)}, later],
                    "sink": {"path": str(tmp_path)},
                }
            )
        )


@pytest.mark.parametrize("name", ["lora", "vae", "controlnet", "textual_inversion"])
def test_upscaling_takes_no_adapter(name: str, tmp_path: Path) -> None:
    stage = {"op": "upscale", "model": "x", name: "y"}
    with pytest.raises(JobError, match=f"stages.0.{name}: unknown field"):
        parse_job(repr({"source": {"rows": ["x"]}, "stages": [stage], "sink": {"path": str(tmp_path)}}))


def test_a_row_whose_lora_cannot_be_used_is_a_wrong_row(make_job: Make, files: dict[str, Path]) -> None:
    rows = [{"prompt": "a", "lora": str(files["ink"])}, {"prompt": "b", "lora": str(files["xl"])}]
    rows += [{"prompt": "c", "lora": "pickled.bin"}, {"prompt": "d", "lora": "a + a"}]
    planned = check(make_job(source={"rows": rows, "on_bad_row": "fail"}))
    assert planned.num_wrong == 3
    assert all(words in problem for words, problem in zip(("channels", "pickled", "a"), planned.problems, strict=True))


def test_a_lora_that_changes_under_a_plan_costs_its_rows_and_no_others(
    make_job: Make, files: dict[str, Path], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.safetensors"
    shutil.copy(files["ink"], mine)
    rows = [{"prompt": "a red circle", "id": "styled", "lora": str(mine)}, {"prompt": "a red circle", "id": "plain"}]
    job = make_job(source={"rows": rows}, batches_per_shard=2)
    planned = plan(job)
    store = Store(job.sink.path)
    place = Place(job.stage, 0, True, None, planned.adapters[0])
    worker = Worker(place, job.stage.bare(), planned.models[0][0])

    def made() -> dict[str, tuple[str, str | None]]:
        shard = planned.plans[0].shards[0]
        loaded = with_results(read_shard(store, shard.file, shard.index), [{}, {}])
        return {row["id"]: (row["status"], row["error_type"]) for row in worker(loaded).to_pylist()}

    assert made() == {"styled": ("ok", None), "plain": ("ok", None)}
    shutil.copy(files["pen"], mine)
    assert made() == {"styled": ("failed", "lora.changed"), "plain": ("ok", None)}
    mine.unlink()
    assert made() == {"styled": ("failed", "lora.changed"), "plain": ("ok", None)}


def test_an_earlier_plan_is_not_finished_with_other_adapters(
    make_job: Make, files: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "vae"
    shutil.copytree(files["vae"], folder)
    job = make_job({"vae": str(folder)})
    earlier = plan(job)
    models.save_vae(folder, seed=5)
    now = plan(job, extend=True)
    assert len(now.plans) == 2
    assert plan_adapters(now.plans[1], job, now.adapters, now.models, {}) == now.adapters
    with pytest.raises(JobError, match=r"^stages.0.vae_revision: changed since plan \w+ was made"):
        plan_adapters(earlier.plans[0], job, now.adapters, now.models, {})
    models_then = earlier.adapters[0].vae
    assert models_then is not None
    assert models_then.revision != (now.adapters[0].vae or models_then).revision


def test_a_folder_of_maps_is_a_row_each(make_job: Make, files: dict[str, Path]) -> None:
    source = {"path": f"{files['maps']}/*.png", "columns": {"control_image": "image"}}
    table = check(make_job({"controlnet": str(files["controlnet"]), "prompt": "x"}, source=source)).table
    assert table is not None
    assert sorted(table["control_image"].to_pylist()) == [str(files["maps"] / f"map{i}.png") for i in range(3)]
    assert table["height"].null_count == 3


def test_control_images_come_in_as_images_do(tiny_model: Path, files: dict[str, Path], make_job: Make) -> None:
    def load(row: dict[str, Any], **fields: Any) -> Any:
        job = make_job({"controlnet": str(files["controlnet"]), **fields}, source={"rows": ["x"]})
        _, facts = identify(str(tiny_model), None)
        loader = image_loader(job.stage, facts, job.source)
        assert loader is not None
        nothing = {"image": None, "mask_image": None, "image_version": None, "height": None, "width": None}
        return loader([{**nothing, **row}])[0]

    wide = str(files["maps"] / "map0.png")
    assert load({"control_image": wide}).control_image.shape == (48, 64, 3)
    assert load({"control_image": wide, "height": 32, "width": 32}).control_image.shape == (32, 32, 3)
    square = {"control_image": wide, "height": 64, "width": 64}
    assert load(square, resize="exact").kind == "image.size"
    beside = load({"image": wide, "height": 64, "width": 64, "control_image": wide}, op="img2img")
    assert beside.image.shape == beside.control_image.shape == (64, 64, 3)
    missing = load({"image": wide, "control_image": "/no/such.png"}, op="img2img")
    assert missing.kind == "control_image.missing"
    assert "/no/such.png" in str(missing)


def test_a_lora_on_object_storage_is_fetched_once_and_is_its_content(
    make_job: Make,
    files: dict[str, Path],
    s3_options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    remote = fsspec.filesystem("s3", **s3_options)
    remote.pipe_file("s3://bkt/loras/ink.safetensors", files["ink"].read_bytes())
    source = {"rows": ["a red circle"], "storage_options": s3_options}
    for model in ("s3://bkt/loras/ink.safetensors", {"model": "s3://bkt/loras", "weight_name": "ink.safetensors"}):
        job = make_job({"loras": {"ink": model}, "lora": "ink"}, source=source)
        assert keys(job) == keys(make_job({"lora": str(files["ink"])}))
    assert keys(make_job({"lora": "s3://bkt/loras/ink.safetensors"}, source=source)) == keys(job)
    cached = [path for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert [path.stem for path in cached] == [sha256(files["ink"])]


def test_a_lora_of_a_hub_is_its_commit_there_and_its_content_in_the_key(
    make_job: Make, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--org--ink" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    shutil.copy(files["ink"], snapshot / "mine.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    lora = {"model": "org/ink", "revision": commit, "weight_name": "mine.safetensors"}
    assert keys(make_job({"loras": {"a": lora}, "lora": "a"})) == keys(make_job({"lora": str(files["ink"])}))


def test_without_peft_a_lora_is_refused_with_what_to_install(
    make_job: Make, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.adapters.find_spec", lambda name: None)
    check(make_job({"vae": str(files["vae"])}))
    with pytest.raises(JobError, match=r"pip install 'ldm-batch\[lora\]'"):
        check(make_job({"lora": str(files["ink"])}))
