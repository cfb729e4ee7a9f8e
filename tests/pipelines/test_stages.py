"""Runs whose rows bring images, and chains of stages, on a real local Ray."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipelines.errors import JobError, LdmError
from pipelines.inputs import BadImage
from pipelines.job import Job, parse_job
from pipelines.loading import image_loader
from pipelines.planner import check, plan
from pipelines.runner import run
from pipelines.weights import identify
from tests import models
from tests.ldm_ops.rows import picture
from tests.pipelines import reader

pytestmark = pytest.mark.usefixtures("ray_session")

SIZES = [(64, 64), (64, 64), (72, 40), (64, 64), (40, 72), (72, 40)]


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-x4"
    models.tiny_ldm_x4().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six pictures of three sizes, two of them in a folder below, and things that are no pictures."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "below").mkdir()
    for i, (height, width) in enumerate(SIZES):
        name = f"below/{i}.jpg" if i < 2 else f"{i}.png"
        Image.fromarray(picture(height, width, i)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def job(out: Path, source: dict[str, Any], *stages: dict[str, Any], **fields: Any) -> Job:
    common = {"batch_size": 2, "workers": 1}
    steps = {"num_inference_steps": 4}
    listed = [common | (steps if stage["op"] != "decode" else {}) | stage for stage in stages]
    data = {"source": source, "stages": listed, "sink": {"path": str(out)}, **fields}
    return parse_job(yaml.safe_dump(data))


def img2img(model: Path, **fields: Any) -> dict[str, Any]:
    return {"op": "img2img", "model": str(model), "prompt": "a red circle", "strength": 0.5, **fields}


def test_a_folder_of_images_becomes_a_row_per_image_of_its_own_size(
    tiny_model: Path, photos: Path, tmp_path: Path
) -> None:
    summary = run(job(tmp_path, {"path": str(photos)}, img2img(tiny_model)))
    found = {row["id"]: row for row in reader.rows(tmp_path)}
    assert summary.exit_code == 0
    assert sorted(found) == ["2.png", "3.png", "4.png", "5.png", "below/0.jpg", "below/1.jpg"]
    for name, row in found.items():
        assert row["image"] == str(photos / name)
        height, width = SIZES[int(Path(name).stem)]
        assert (row["height"], row["width"], row["strength"], row["batch_size"]) == (height, width, 0.5, 2)
        assert [(s["op"], s["status"], s["strength"]) for s in row["stages"]] == [("img2img", "ok", 0.5)]


def test_images_give_the_same_bytes_under_two_workers_in_any_order_and_after_a_loss(
    tiny_model: Path, photos: Path, tmp_path: Path
) -> None:
    rows = [
        {"image": str(p), "prompt": f"a blue star {i}", "strength": 0.5 + 0.25 * (i % 2)}
        for i, p in enumerate(sorted(photos.rglob("*.*g")))
    ]
    run(job(tmp_path / "one", {"rows": rows}, img2img(tiny_model)))
    expected = reader.contents(tmp_path / "one")
    run(job(tmp_path / "two", {"rows": random.Random(1).sample(rows, 6)}, img2img(tiny_model, workers=2)))
    assert reader.contents(tmp_path / "two") == expected
    for part in sorted((tmp_path / "two" / "manifest").rglob("*.parquet"))[1:]:
        part.unlink()
    assert run(job(tmp_path / "two", {"rows": rows}, img2img(tiny_model))).exit_code == 0
    assert reader.contents(tmp_path / "two") == expected


def test_a_changed_image_is_a_new_row_and_an_unchanged_one_is_not(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        Image.fromarray(picture()).save(folder / f"{name}.png")
    listed = job(tmp_path / "listed", {"path": f"{folder}/*.png"}, img2img(tiny_model))
    table = job(tmp_path / "table", {"rows": [{"image": f"{folder}/{n}.png"} for n in "ab"]}, img2img(tiny_model))
    assert [plan(one).num_known for one in (listed, table)] == [0, 0]
    os.utime(folder / "a.png", (1, 1))
    assert [plan(one).num_known for one in (listed, table)] == [2, 1]
    Image.fromarray(picture(seed=5)).save(folder / "b.png")
    assert plan(table).num_known == 1
    with pytest.raises(JobError, match=r"id 'b.png' is in .*, made from other content: .* --extend to keep both"):
        plan(listed)
    assert plan(listed, extend=True).num_known == 1


def test_what_makes_a_model_faster_is_part_of_its_rows_key_and_nothing_of_it_is_not(
    tiny_model: Path, tmp_path: Path
) -> None:
    source = {"rows": ["a red circle", "a blue star"]}
    stage = {"op": "txt2img", "model": str(tiny_model), "num_inference_steps": 2, "guidance_scale": 3, "batch_size": 2}
    keys = []
    for own in (
        {},
        {"accelerate": None},
        {"accelerate": {}},
        {"accelerate": {"compile": None, "channels_last": None}},
        {"accelerate": {"channels_last": False}},
        {"accelerate": {"deep_cache": 2}},
        {"accelerate": {"deep_cache": 3}},
        {"accelerate": {"guidance_interval": [0.5, 1]}},
        {"accelerate": {"vae_batch_size": 1}},
    ):
        planned = check(job(tmp_path / "out", source, {**stage, **own}))
        assert planned.table is not None
        keys.append(tuple(planned.table["key"].to_pylist()))
    assert len(set(keys[:4])) == 1
    assert len(set(keys[3:])) == 6


def test_a_job_that_is_made_faster_resumes_and_its_record_is_a_job(tiny_model: Path, tmp_path: Path) -> None:
    accelerate = {"deep_cache": 2, "guidance_interval": [0, 0.5], "channels_last": True}
    stage = {"op": "txt2img", "model": str(tiny_model), "num_inference_steps": 4, "accelerate": accelerate}
    made = run(job(tmp_path, {"rows": ["a red circle", "a blue star"]}, stage))
    assert made.exit_code == 0
    recorded = parse_job((tmp_path / "_ldm" / "job.yaml").read_text())
    assert recorded.stages[0].model_dump(include={"accelerate"}, exclude_defaults=True)["accelerate"] == {
        **accelerate,
        "guidance_interval": (0.0, 0.5),
    }
    assert plan(recorded).new is None


def test_how_a_jpeg_is_decoded_is_part_of_its_rows_key(tiny_model: Path, photos: Path, tmp_path: Path) -> None:
    keys = []
    for decoding in ("exact", "draft"):
        stage = img2img(tiny_model, image_decoding=decoding, height=64)
        planned = check(job(tmp_path / "out", {"path": f"{photos}/below"}, stage))
        assert planned.table is not None
        keys.append(set(planned.table["key"].to_pylist()))
    assert not keys[0] & keys[1]
    with pytest.raises(JobError, match=r"stages.1.image_decoding: only the first stage decodes files; leave it out"):
        job(tmp_path, {"rows": ["x"]}, {"op": "txt2img", "model": str(tiny_model)}, stage)


@pytest.mark.parametrize("source", ["out/images", "out/images/*.png", "out/data/*.tar", "out"])
def test_a_job_does_not_take_what_it_writes(tiny_model: Path, tmp_path: Path, source: str) -> None:
    picked = job(tmp_path / "out", {"path": str(tmp_path / source)}, img2img(tiny_model))
    with pytest.raises(JobError, match="choose another"):
        check(picked)


def test_a_mask_that_changed_since_the_plan_is_a_dead_letter(tiny_model: Path, tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 32))
    mask.save(tmp_path / "mask.png")
    rows = [{"image": f"{tmp_path}/a.png", "mask_image": f"{tmp_path}/mask.png", "prompt": "x"}]
    stage = {"op": "inpaint", "model": str(tiny_model)}
    one = job(tmp_path / "out", {"rows": rows}, stage)
    table = plan(one).table
    assert table is not None
    _, facts = identify(str(tiny_model), None)
    loader = image_loader(one.stage, facts, one.source)
    assert loader is not None
    assert not isinstance(loader(table.to_pylist())[0], BadImage)
    mask.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "mask.png")
    changed = loader(table.to_pylist())[0]
    assert isinstance(changed, BadImage)
    assert changed.kind == "mask.changed"


def test_the_same_images_elsewhere_are_the_same_rows(tiny_model: Path, tmp_path: Path) -> None:
    keys = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        Image.fromarray(picture()).save(tmp_path / place / "a.png")
        (tmp_path / place / "t.csv").write_text("image\na.png\n")
        planned = plan(job(tmp_path / place / "out", {"path": str(tmp_path / place / "t.csv")}, img2img(tiny_model)))
        assert planned.table is not None
        keys.append([planned.table[name].to_pylist() for name in ("key", "seed")])
    assert keys[0] == keys[1]


def test_tables_whose_images_have_one_name_and_other_content_are_other_rows(tiny_model: Path, tmp_path: Path) -> None:
    for i, place in enumerate(("here", "there")):
        (tmp_path / place).mkdir()
        # Same size in bytes, same names, same times.
        Image.fromarray(picture(seed=i)).save(tmp_path / place / "a.bmp")
        os.utime(tmp_path / place / "a.bmp", (1, 1))
        (tmp_path / place / "t.csv").write_text("image\na.bmp\n")
    assert check(job(tmp_path / "out", {"path": f"{tmp_path}/*/t.csv"}, img2img(tiny_model))).num_rows == 2
    both = [str(tmp_path / place) for place in ("here", "there")]
    listed = check(job(tmp_path / "out", {"path": both}, img2img(tiny_model)))
    assert (listed.num_rows, listed.num_duplicates) == (2, 0)


def test_images_that_cannot_be_used_are_dead_letters_and_their_neighbours_are_made(
    tiny_model: Path, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "page.jpg").write_text("<html>")
    (folder / "cut.png").write_bytes((photos / "3.png").read_bytes()[:200])
    (folder / "empty.webp").touch()
    (folder / "fine.png").write_bytes((photos / "3.png").read_bytes())
    summary = run(job(tmp_path / "out", {"path": str(folder)}, img2img(tiny_model)))
    found = {row["id"]: row for row in reader.rows(tmp_path / "out")}
    assert summary.exit_code == 3
    assert {name: (row["status"], row["stage"], row["error_type"]) for name, row in found.items()} == {
        "page.jpg": ("failed", "load", "image.format"),
        "cut.png": ("failed", "load", "image.broken"),
        "empty.webp": ("failed", "load", "image.broken"),
        "fine.png": ("ok", "img2img", None),
    }


def test_a_mask_column_and_a_box_repaint_only_what_they_mark(tiny_model: Path, photos: Path, tmp_path: Path) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 8:40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    rows = [
        {"image": str(photos / "3.png"), "mask": where, "prompt": "a red circle", "seed": 3}
        for where in (str(tmp_path / "mask.png"), [8, 8, 40, 40], "8,8,40,40")
    ]
    source = {"rows": rows, "columns": {"mask_image": "mask"}}
    run(job(tmp_path / "out", source, {"op": "inpaint", "model": str(tiny_model)}))
    found = reader.rows(tmp_path / "out")
    # The two spellings of the box are one row.
    assert sorted(row["num_duplicates"] for row in found) == [0, 1]
    assert len({row["sha256"] for row in found}) == 1
    with Image.open(tmp_path / "out" / found[0]["uri"]) as image:
        made = np.asarray(image)
    original = np.asarray(Image.open(photos / "3.png"))
    assert np.array_equal(made[mask == 0], original[mask == 0])
    assert not np.array_equal(made[mask == 255], original[mask == 255])


def test_an_upscaler_makes_every_image_four_times_larger(upscaler: Path, photos: Path, tmp_path: Path) -> None:
    run(job(tmp_path, {"path": str(photos)}, {"op": "upscale", "model": str(upscaler), "tile_px": 32}))
    found = reader.rows(tmp_path)
    assert len(found) == 6
    for row in found:
        height, width = SIZES[int(Path(row["id"]).stem)]
        assert (row["height"], row["width"]) == (4 * height, 4 * width)


def test_a_chain_makes_every_stage_in_one_run_and_keeps_what_it_is_told_to(
    tiny_model: Path, upscaler: Path, tmp_path: Path
) -> None:
    stages = [
        {"op": "txt2img", "model": str(tiny_model), "keep": True},
        {"op": "img2img", "model": str(tiny_model), "strength": 0.5, "batch_size": 3},
        {"op": "upscale", "model": str(upscaler), "num_inference_steps": 2},
    ]
    source = {"rows": [{"prompt": f"a red circle {i}", "seed": i} for i in range(5)]}
    one = run(job(tmp_path / "out", source, *stages))
    found = reader.rows(tmp_path / "out")
    assert (one.exit_code, len(found)) == (0, 5)
    for row in found:
        assert (row["height"], row["width"], row["stage"], row["model"]) == (256, 256, "upscale", str(tiny_model))
        first, second, third = row["stages"]
        assert [s["op"] for s in row["stages"]] == ["txt2img", "img2img", "upscale"]
        assert (first["seed"], first["batch_size"], second["batch_size"]) == (row["seed"], 2, 3)
        assert len({first["seed"], second["seed"], third["seed"]}) == 3
        assert third["num_inference_steps"] == 2
        assert [s["uri"] is not None for s in row["stages"]] == [True, False, False]
        with Image.open(tmp_path / "out" / first["uri"]) as image:
            assert image.size == (64, 64)
    again = job(tmp_path / "again", source, *({**s, "workers": "auto"} for s in stages))
    run(again)
    assert reader.contents(tmp_path / "again") == reader.contents(tmp_path / "out")


def test_a_row_that_fails_in_the_middle_of_a_chain_names_its_stage(
    tiny_model: Path, poisoned_model: Path, tmp_path: Path
) -> None:
    stages = [
        {"op": "txt2img", "model": str(tiny_model)},
        {"op": "img2img", "model": str(poisoned_model), "strength": 0.5},
    ]
    rows = ["a red ring", "a red star", "a blue star"]
    assert run(job(tmp_path, {"rows": rows}, *stages)).exit_code == 3
    found = {row["prompt"]: row for row in reader.rows(tmp_path)}
    assert {p: (r["status"], r["stage"], r["error_type"]) for p, r in found.items()} == {
        "a red ring": ("failed", "img2img", "model.nan"),
        "a red star": ("ok", "img2img", None),
        "a blue star": ("ok", "img2img", None),
    }
    assert [s["status"] for s in found["a red ring"]["stages"]] == ["ok", "failed"]


def test_pools_of_a_chain_that_do_not_fit_are_refused_with_the_numbers(tiny_model: Path, tmp_path: Path) -> None:
    stages = [{"op": "txt2img", "model": str(tiny_model), "num_cpus": 1}, img2img(tiny_model, num_cpus=1)]
    with pytest.raises(
        JobError, match=r"stages.0: 1 workers × 1 CPUs and stages.1: 1 workers × 1 CPUs do not fit beside 0.5 .* has 2;"
    ):
        run(job(tmp_path, {"rows": ["a"]}, *stages))


@pytest.mark.parametrize(
    ("source", "stage", "message"),
    [
        ({"rows": ["a"]}, {}, "rows: no column 'image'; the table has 'prompt'"),
        ({"rows": [{"image": "x.png"}]}, {"prompt": None}, "no column 'prompt'; .* or give stages.0.prompt"),
        ({"rows": [{"image": "none.png"}]}, {}, r"row 1: image 'none.png' is not there; looked for /"),
        ({"rows": [{"image": "."}]}, {}, "row 1: image '.' is no file"),
        (
            {"rows": [{"image": "https://x/y.png"}]},
            {},
            "asked only where the job names it: source.allow_hosts: .*; or copy",
        ),
        ({"rows": [{"image": "HTTP://127.0.0.1/y.png"}]}, {}, "asked only where the job names it"),
        ({"rows": [{"image": "webhdfs://x/y.png"}]}, {}, "is behind webhdfs, which is not fetched"),
        ({"rows": [{"image": "s3:///x.png"}]}, {}, "names no object; bucket and key are needed"),
        ({"rows": [{"image": "a\nb.png"}]}, {}, "holds a line break or NUL; rename the file"),
        ({"rows": [{"image": "IMAGE", "mask_image": "1.5,0,5,5"}]}, {"op": "inpaint"}, "is no box: four whole numbers"),
        ({"rows": [{"image": 7}]}, {}, "image is a int; expected a path or URL"),
        ({"rows": [{"image": "IMAGE", "strength": 0}]}, {}, "strength 0 would leave the image as it is"),
        ({"rows": [{"image": "IMAGE", "strength": 1.5}]}, {}, "strength 1.5 is out of range; 0 to 1"),
        ({"rows": [{"image": "IMAGE"}]}, {"strength": 0.1}, "strength 0.1 of 4 steps leaves none to do; use at least"),
        ({"rows": [{"image": "IMAGE"}]}, {"strength": 0}, "stages.0.strength: input should be greater than 0; got 0"),
        ({"rows": [{"image": "IMAGE", "height": 50}]}, {}, "height 50 is not a multiple of 8; use 48 or 56"),
        ({"rows": [{"image": "IMAGE"}], "matrix": {"seed": [1], "strength": [2]}}, {}, "matrix.strength: strength 2"),
        ({"path": "EMPTY"}, {}, "no image there"),
        ({"path": "s3-less://x/"}, {}, "use a path, s3://… or another fsspec URL"),
        (
            {"rows": [{"image": "IMAGE", "mask_image": [8, 8, 4, 9]}]},
            {"op": "inpaint"},
            "is an empty box; left < right and top < bottom",
        ),
        ({"rows": [{"image": "IMAGE"}]}, {"op": "inpaint"}, "no column 'mask_image'"),
        (
            {"rows": [{"image": "IMAGE", "mask_image": "gone.png"}]},
            {"op": "inpaint"},
            "mask_image 'gone.png' is not there",
        ),
        (
            {"rows": [{"image": "IMAGE"}]},
            {"op": "upscale"},
            "is a StableDiffusionPipeline, for decode, embed, encode, .*; upscale takes another kind of model",
        ),
        ({"rows": ["a"], "matrix": {"strength": [0.5]}}, {"op": "txt2img"}, "matrix.strength: txt2img takes no"),
    ],
)
def test_a_mistake_about_images_is_one_line(
    source: dict[str, Any], stage: dict[str, Any], message: str, tiny_model: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    text = yaml.safe_dump(source).replace("IMAGE", str(photos / "3.png")).replace("EMPTY", str(tmp_path / "empty"))
    fields = img2img(tiny_model, **stage)
    if fields["op"] in ("txt2img", "upscale", "inpaint"):
        del fields["strength"]
    with pytest.raises(LdmError, match=message) as caught:
        check(job(tmp_path / "out", yaml.safe_load(text), fields))
    assert "\nmend them" in str(caught.value) or len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["txt2img", "txt2img"], "stages.1: txt2img takes no image; it can only be the first stage"),
        (["txt2img", "inpaint"], "stages.1: inpaint takes a mask, which only a row can bring"),
    ],
)
def test_a_chain_that_cannot_work_is_refused(stages: list[str], message: str, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=message):
        job(tmp_path, {"rows": ["a"]}, *({"op": op, "model": str(tiny_model)} for op in stages))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": 0.01}, "stages.1.strength: strength 0.01 of 4 steps leaves none to do"),
        ({"num_images_per_prompt": 2}, "stages.1.num_images_per_prompt: only the first stage multiplies rows"),
        ({"height": 50}, "stages.1.height: height 50 is not a multiple of 8"),
        ({"scheduler": "flow_euler"}, "stages.1.scheduler: scheduler flow_euler does not fit"),
    ],
)
def test_a_later_stage_is_checked_as_the_first_is(
    fields: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(JobError, match=message):
        check(
            job(tmp_path, {"rows": ["a"]}, {"op": "txt2img", "model": str(tiny_model)}, img2img(tiny_model, **fields))
        )


def test_a_sampler_that_would_spoil_the_small_image_is_refused(upscaler: Path, photos: Path, tmp_path: Path) -> None:
    stage = {"op": "upscale", "model": str(upscaler), "scheduler": "euler"}
    with pytest.raises(JobError, match="scheduler euler does not fit LDMSuperResolutionPipeline; use ddim"):
        check(job(tmp_path, {"path": str(photos)}, stage))


def test_keep_belongs_to_a_stage_before_the_last(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="stages.0.keep: the last stage's pictures are always written"):
        job(tmp_path, {"rows": ["a"]}, {"op": "txt2img", "model": str(tiny_model), "keep": True})


def test_a_model_that_is_an_upscaler_makes_no_pictures_from_text(upscaler: Path, tmp_path: Path) -> None:
    with pytest.raises(
        JobError, match="is a LDMSuperResolutionPipeline, for upscale; txt2img takes another kind of model"
    ):
        check(job(tmp_path, {"rows": ["a"]}, {"op": "txt2img", "model": str(upscaler)}))


def test_images_on_object_storage_are_listed_and_read(
    tiny_model: Path, photos: Path, tmp_path: Path, s3_options: dict[str, Any]
) -> None:
    import fsspec

    s3 = fsspec.filesystem("s3", **s3_options)
    for name in ("3.png", "below/0.jpg"):
        s3.pipe_file(f"bkt/photos/{name}", (photos / name).read_bytes())
    for path in ("s3://bkt/photos/", "s3://bkt/photos", "s3://bkt/photos/**/*.[pj][np]g"):
        listed = job(tmp_path / "out", {"path": path, "storage_options": s3_options}, img2img(tiny_model))
        planned = plan(listed, extend=True)
        # However it is listed, it is the same.
        assert planned.num_rows == 2
    assert run(listed).exit_code == 0
    found = {row["id"]: row for row in reader.rows(tmp_path / "out")}
    assert sorted(found) == ["3.png", "below/0.jpg"]
    assert found["3.png"]["image"] == "s3://bkt/photos/3.png"
    rows = [{"image": "s3://bkt/photos/3.png"}]
    table = job(tmp_path / "table", {"rows": rows, "storage_options": s3_options}, img2img(tiny_model))
    assert [plan(table).num_known for _ in range(2)] == [0, 1]
    s3.pipe_file("bkt/photos/3.png", (photos / "4.png").read_bytes())
    assert plan(table).num_known == 0
    for path, message in (("s3://bkt/**.png", "Invalid pattern"), ("s3://bkt/nothing/", "nothing there")):
        with pytest.raises(LdmError, match=message):
            check(job(tmp_path, {"path": path, "storage_options": s3_options}, img2img(tiny_model)))


def test_pictures_that_say_how_they_were_made_are_made_again_to_the_byte(tiny_model: Path, tmp_path: Path) -> None:
    stage = {"op": "txt2img", "model": str(tiny_model)}
    rows = [{"prompt": f"a red circle, {i}", "negative_prompt": "blue", "guidance_scale": 3 + i} for i in range(3)]
    run(job(tmp_path / "first", {"rows": rows}, stage))
    again = {"path": str(tmp_path / "first" / "images"), "format": "parameters"}
    run(job(tmp_path / "again", again, {**stage, "num_inference_steps": 9, "guidance_scale": 1}))
    shas = [{row["sha256"] for row in reader.rows(tmp_path / out)} for out in ("first", "again")]
    assert shas[0] == shas[1]
    Image.fromarray(picture()).save(tmp_path / "first" / "images" / "mute.png")
    with pytest.raises(JobError, match=r"images/mute.png: the picture does not say how it was made"):
        check(job(tmp_path / "again", again, stage))


def test_an_earlier_runs_pictures_are_a_source_its_failures_are_not(
    poisoned_model: Path, upscaler: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": p, "tag": p[-4:]} for p in ("a red ring", "a red star", "a blue star")]
    run(job(tmp_path / "first", {"rows": rows}, {"op": "txt2img", "model": str(poisoned_model)}))
    source = {"path": str(tmp_path / "first"), "format": "manifest"}
    run(job(tmp_path / "large", source, {"op": "upscale", "model": str(upscaler)}))
    first = {row["key"]: row for row in reader.rows(tmp_path / "first")}
    large = reader.rows(tmp_path / "large")
    assert sorted(row["tag"] for row in large) == ["star", "star"]
    for row in large:
        assert row["image"] == str(tmp_path / "first" / first[row["id"]]["uri"])
        assert (row["width"], row["prompt"]) == (256, first[row["id"]]["prompt"])
    (tmp_path / "empty").mkdir()
    for path, message in (("empty", "no picture of an earlier run there"), ("nowhere", "no such folder; give the out")):
        wrong = {**source, "path": str(tmp_path / path)}
        with pytest.raises(LdmError, match=message):
            check(job(tmp_path / "x", wrong, {"op": "upscale", "model": str(upscaler)}))
