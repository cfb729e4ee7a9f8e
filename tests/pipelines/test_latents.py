"""Latents as a user stores them, and as a training reads them back."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

import pipelines
from ldm_ops.decode import Decode
from ldm_ops.encode import Encode
from pipelines import latents_file
from pipelines.blocks import GEOMETRY
from pipelines.errors import JobError
from pipelines.latents import LatentDataset, _taken
from pipelines.latents_file import LatentsHead, NotLatents, mapped, open_safetensors, read_latents, write_latents
from pipelines.loading import LoadShard, place
from pipelines.manifest import SCHEMA
from pipelines.planner import check, plan
from pipelines.runner import run
from pipelines.storage import Store
from pipelines.verify import Decoded, verify
from pipelines.weights import digest_folder
from tests import models
from tests.ldm_ops.rows import picture
from tests.pipelines import reader
from tests.pipelines.test_stages import job

SIZES = [(64, 64), (96, 64), (64, 96), (130, 40)]


def encode(model: Path, **fields: Any) -> dict[str, Any]:
    stage = {"op": "encode", "model": str(model), "resolution": 64, "bucket_multiple": 16, "batch_size": 4, **fields}
    return stage


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("photos")
    rows = []
    for i in range(22):
        Image.fromarray(picture(*SIZES[i % 4], seed=i)).save(folder / f"{i}.png")
        rows.append({"image": str(folder / f"{i}.png"), "prompt": f"caption {i % 5}", "id": str(i)})
    return rows


@pytest.fixture(scope="module")
def encoded(
    ray_session: None, tiny_model: Path, photos: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("latents")
    assert run(encode_job(out, photos, encode(tiny_model))).exit_code == 0
    return out


def encode_job(out: Path, rows: list[dict[str, Any]], *stages: dict[str, Any], **fields: Any) -> Any:
    import yaml

    from pipelines.job import parse_job

    data = {"source": {"rows": rows}, "stages": list(stages), "sink": {"path": str(out)}} | fields
    return parse_job(yaml.safe_dump(data))


def stored(out: Path) -> dict[str, dict[str, Any]]:
    """id → manifest row with its `data`, read by pyarrow and numpy alone."""
    parts = [pq.read_table(path) for path in sorted((out / "manifest").rglob("*.parquet"))]
    rows = [row for part in parts for row in part.to_pylist()]
    files = {row["uri"]: pq.read_table(out / row["uri"])["latents"].to_pylist() for row in rows if row["uri"]}
    return {row["id"]: {**row, "data": files[row["uri"]][row["latents_row"]] if row["uri"] else None} for row in rows}


def test_every_image_is_stored_once_in_its_bucket_with_its_caption_and_geometry(
    encoded: Path, photos: list[dict[str, Any]]
) -> None:
    found = stored(encoded)
    assert sorted(found, key=int) == [row["id"] for row in photos]
    for row in photos:
        mine = found[row["id"]]
        assert hashlib.sha256(mine["data"]).hexdigest() == mine["sha256"]
        assert (len(mine["data"]), mine["num_bytes"], mine["format"]) == (
            mine["num_bytes"],
            mine["num_bytes"],
            "latents",
        )
        height, width = SIZES[int(row["id"]) % 4]
        assert (mine["original_height"], mine["original_width"], mine["prompt"]) == (height, width, row["prompt"])
    shapes = [found[str(i)]["latents_shape"] for i in range(4)]
    assert shapes == [[8, 8, 8], [8, 10, 6], [8, 6, 10], [8, 10, 6]]
    # 130 × 40 scaled to a width of 48 is 156 high, of which the middle 80 stay.
    assert (found["3"]["crop_top"], found["3"]["crop_left"]) == (38, 0)


def test_what_went_through_files_decodes_as_it_does_in_one_process(
    encoded: Path, tiny_model: Path, photos: list[dict[str, Any]], tmp_path: Path
) -> None:
    source = {"path": str(encoded), "format": "manifest"}
    run(job(tmp_path, source, {"op": "decode", "model": str(tiny_model)}))
    made = {row["id"]: row for row in reader.rows(tmp_path)}
    encoder, decoder = Encode(model="x"), Decode(model="x")
    mine = np.asarray(Image.open(photos[0]["image"]))
    # In the batches of the jobs, or the last bits would be those of another batch size.
    latents = encoder.run(encoder.load(tiny_model), [{"image": mine, "seed": 0}] * 4)[0]["latents"]
    expected = decoder.run(decoder.load(tiny_model), [{"latents": latents}] * 2)[0]["image"]
    with Image.open(tmp_path / made["0"]["uri"]) as image:
        assert np.array_equal(np.asarray(image), expected)
    assert len(made) == 22
    # What an encode job's output offers other stages is no column of its table.
    assert pipelines.read_manifest(tmp_path).column_names == SCHEMA.names


def test_a_chain_keeps_the_intermediates_of_the_stage_before_encode(
    ray_session: None, tiny_model: Path, tmp_path: Path
) -> None:
    first = {"op": "txt2img", "model": str(tiny_model), "num_inference_steps": 4, "save_intermediates": 2}
    last = {"op": "encode", "model": str(tiny_model)}
    run(encode_job(tmp_path, [{"prompt": "a red circle"}], *({**one, "batch_size": 1} for one in (first, last))))
    [row] = pipelines.read_manifest(tmp_path).to_pylist()
    assert [(one["step"], one["kind"]) for one in row["intermediates"]] == [
        (step, kind) for step in (2, 4) for kind in ("latents", "preview")
    ]
    for one in row["intermediates"]:
        assert hashlib.sha256((tmp_path / one["uri"]).read_bytes()).hexdigest() == one["sha256"]


def test_encoding_gives_the_same_bytes_under_two_workers_and_in_any_order(
    encoded: Path, tiny_model: Path, photos: list[dict[str, Any]], tmp_path: Path
) -> None:
    run(encode_job(tmp_path, photos[::-1], encode(tiny_model, workers=2)))
    shas = [{name: row["sha256"] for name, row in stored(out).items()} for out in (encoded, tmp_path)]
    assert shas[0] == shas[1]


@pytest.fixture(scope="module")
def safetensors(
    ray_session: None, tiny_model: Path, photos: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("safetensors")
    sink = {"path": str(out), "latents_format": "safetensors"}
    assert run(encode_job(out, photos, encode(tiny_model, workers=2), sink=sink)).exit_code == 0
    return out


def test_safetensors_hold_what_parquet_does_beside_the_encoders_identity(encoded: Path, safetensors: Path) -> None:
    from safetensors import safe_open

    by_key = {row["key"]: row for row in stored(encoded).values()}
    found = {}
    for path in sorted((safetensors / "data").rglob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            latents = file.get_tensor("latents")
            about = json.loads(file.metadata()["ldm_batch_latents"])
        assert about["head"]["encoder_revision"] == next(iter(by_key.values()))["model_revision"]
        assert tuple(about["head"]["shape"]) == latents.shape[1:]
        rows = about["rows"]
        for i, key in enumerate(rows["key"]):
            assert latents[i].tobytes() == by_key[key]["data"]
            for name in ("id", "prompt", "original_height", "original_width", "crop_top", "crop_left", "flipped"):
                assert rows[name][i] == by_key[key][name]
            found[key] = (f"data/{path.parent.name}/{path.name}", i)
    parts = [pq.read_table(path).to_pylist() for path in (safetensors / "manifest").rglob("*.parquet")]
    told = {row["key"]: (row["uri"], row["latents_row"]) for part in parts for row in part}
    assert found == told
    assert set(told) == set(by_key)


def test_batches_are_the_same_whatever_the_format(encoded: Path, safetensors: Path, s3_options: dict[str, Any]) -> None:
    import fsspec

    fsspec.filesystem("s3", **s3_options).put(str(safetensors), "bkt/safetensors", recursive=True)
    others = [
        LatentDataset(str(safetensors), batch_size=2, seed=3),
        LatentDataset("s3://bkt/safetensors", batch_size=2, seed=3, storage_options=s3_options),
    ]
    for other in others:
        parquet = LatentDataset(str(encoded), batch_size=2, seed=3)
        for workers in (0, 2):
            loaders = [DataLoader(dataset, batch_size=None, num_workers=workers) for dataset in (parquet, other)]
            for a, b in zip(*loaders, strict=True):
                assert (a["key"], a["prompt"]) == (b["key"], b["prompt"])
                for name in ("latents", "original_size", "crop_top_left", "target_size", "flipped"):
                    assert torch.equal(a[name], b[name])


def test_groups_of_safetensors_are_read_one_by_one() -> None:
    head = LatentsHead("m", "r", "mode", "float32", (1, 2, 2), 1.0, 0.0, 8)
    rows = [{"key": f"k{i}", "id": None, "prompt": f"p{i % 3}", "flipped": i % 2 == 0} for i in range(600)]
    geometry = ("original_height", "original_width", "crop_top", "crop_left")
    rows = [row | dict.fromkeys(geometry, i) for i, row in enumerate(rows)]
    latents = [np.full((1, 2, 2), i, np.float32) for i in range(600)]
    files = {format: write_latents(format, head, rows, latents) for format in ("parquet", "safetensors")}
    parquet = pq.ParquetFile(pa.BufferReader(files["parquet"]))
    mine = open_safetensors(pa.BufferReader(files["safetensors"]))
    assert mine.num_row_groups == parquet.num_row_groups == 3
    for i in range(3):
        columns = ["latents", "key", "flipped", "crop_top"]
        assert mine.read_row_group(i, columns).equals(parquet.read_row_group(i, columns))
        assert mine.metadata.row_group(i).num_rows == parquet.metadata.row_group(i).num_rows
    data = files["safetensors"]
    for broken in (b"", data[:5], data[:100], data[:-1], b"\xff" * 16, b"<html>" + data):
        with pytest.raises(NotLatents):
            read_latents(broken)
    assert files["safetensors"] == write_latents("safetensors", head, rows, latents)


def test_latents_in_safetensors_are_loaded_for_decoding_as_those_in_parquet_are(
    encoded: Path, safetensors: Path, tiny_model: Path, tmp_path: Path
) -> None:
    loaded = []
    for out in (encoded, safetensors):
        source = {"path": str(out), "format": "manifest"}
        decode = job(tmp_path / out.name, source, {"op": "decode", "model": str(tiny_model)})
        planned = plan(decode).new
        assert planned is not None
        load = LoadShard(Store(decode.sink.path), None, digest_folder(tiny_model), {})
        rows = [row for shard in planned.shards for row in load(place(shard)).to_pylist()]
        loaded.append({row["id"]: row["latents_data"] for row in rows})
    assert loaded[0] == loaded[1]
    assert len(loaded[0]) == 22
    assert None not in loaded[0].values()


def test_safetensors_are_the_same_files_after_a_resume_by_another_number_of_workers(
    safetensors: Path, tiny_model: Path, photos: list[dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(safetensors, out)
    for part in sorted((out / "manifest").rglob("*.parquet"))[::2]:
        for uri in {row["uri"] for row in pq.read_table(part).to_pylist()}:
            (out / uri).unlink()
        part.unlink()
    sink = {"path": str(out), "latents_format": "safetensors"}
    assert run(encode_job(out, photos, encode(tiny_model, workers=1), sink=sink)).num_new_rows > 0

    def files(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}

    assert files(out) == files(safetensors)


def test_verify_reads_latents_back_and_decodes_some(
    encoded: Path, safetensors: Path, photos: list[dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    reports = [verify(str(out), deep=True, decode=5, seed=1) for out in (encoded, safetensors)]
    assert [report.faults for report in reports] == [[], []]
    assert reports[0].decoded == reports[1].decoded
    decoded = reports[0].decoded
    assert decoded is not None
    assert (decoded.num_rows, decoded.num_compared) == (5, 5)
    everything = verify(str(encoded), deep=True, decode=100).decoded
    assert everything is not None
    ratios = []
    decoder = Decode(model="x")
    vae = decoder.load(tiny_model)
    found = stored(encoded)
    for row in photos:
        mine = found[row["id"]]
        latents = np.frombuffer(mine["data"], np.float16).reshape(mine["latents_shape"])
        made = decoder.run(vae, [{"latents": latents}])[0]["image"]
        with Image.open(row["image"]) as image:
            cut = np.asarray(ImageOps.fit(image, made.shape[1::-1], Image.Resampling.LANCZOS))
        ratios.append(10 * np.log10(255**2 / np.mean((made.astype(float) - cut.astype(float)) ** 2)))
    assert everything.num_compared == 22
    assert everything.psnr_db_min == pytest.approx(min(ratios))
    assert everything.psnr_db_mean == pytest.approx(np.mean(ratios))
    broken = tmp_path / "broken"
    shutil.copytree(safetensors, broken)
    path = next((broken / "data").rglob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert verify(str(broken), deep=True).faults == [
        f"{path.relative_to(broken)}: {len(data)} bytes, not what its name says; it was cut off or changed"
    ]


def seen(batches: Any) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def test_an_epoch_gives_every_row_once_in_batches_of_one_shape(encoded: Path) -> None:
    dataset = LatentDataset(str(encoded), batch_size=1, seed=3)
    batches = list(dataset)
    assert len(batches) == len(dataset) == 22
    assert Counter(seen(batches)) == Counter(row["key"] for row in stored(encoded).values())
    larger = list(LatentDataset(str(encoded), batch_size=2, seed=3))
    assert all(batch["latents"].shape[0] == len(batch["prompt"]) == 2 for batch in larger)
    by_key = {row["key"]: row for row in stored(encoded).values()}
    for batch in larger:
        _, high, wide = by_key[batch["key"][0]]["latents_shape"]
        assert batch["latents"].shape[1:] == (4, high, wide)
        assert batch["target_size"].tolist() == [[8 * high, 8 * wide]] * 2
        for i, key in enumerate(batch["key"]):
            row = by_key[key]
            assert batch["prompt"][i] == row["prompt"]
            assert batch["original_size"][i].tolist() == [row["original_height"], row["original_width"]]
            assert batch["crop_top_left"][i].tolist() == [row["crop_top"], row["crop_left"]]


def test_latents_are_a_sample_of_the_moments_scaled_for_a_denoiser(encoded: Path) -> None:
    raw = {batch["key"][0]: batch["latents"][0] for batch in LatentDataset(str(encoded), raw=True)}
    by_key = {row["key"]: row for row in stored(encoded).values()}
    draws: dict[str, list[Any]] = {key: [] for key in raw}
    dataset = LatentDataset(str(encoded))
    for _ in range(60):
        for batch in dataset:
            draws[batch["key"][0]].append(batch["latents"][0])
    for key, moments in raw.items():
        assert moments.numpy().tobytes() == by_key[key]["data"]
        mean, logvar = moments.float().chunk(2)
        many = torch.stack(draws[key])
        std = (logvar / 2).exp() * 0.18215
        assert ((many.mean(0) - mean * 0.18215).abs() < 6 * std / 60**0.5).all()
        assert (many.std(0) / std).mean() == pytest.approx(1, abs=0.05)


def test_the_order_is_a_matter_of_seed_and_epoch(encoded: Path) -> None:
    def order(seed: int, epoch: int, shuffle: bool = True) -> list[str]:
        dataset = LatentDataset(str(encoded), seed=seed, shuffle=shuffle)
        dataset.set_epoch(epoch)
        return seen(dataset)

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    assert order(1, 0, shuffle=False) == order(2, 1, shuffle=False)
    first, second = (batch["latents"] for batch in list(LatentDataset(str(encoded), seed=1))[:2])
    again = next(iter(LatentDataset(str(encoded), seed=1)))["latents"]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_ranks_and_workers_share_the_rows_and_none_gets_more(encoded: Path, workers: int) -> None:
    ranks = []
    for rank in range(3):
        dataset = LatentDataset(str(encoded), seed=5, rank=rank, world_size=3)
        loader = DataLoader(dataset, batch_size=None, num_workers=workers)
        ranks.append(seen(loader))
        assert len(ranks[-1]) == len(dataset)
    counts = Counter(key for rank in ranks for key in rank)
    assert max(counts.values()) == 1
    assert len({len(rank) for rank in ranks}) == 1
    # 6, 11 and 5 rows in three shapes, none of which need be a multiple of three.
    assert len(counts) == 18


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 5, 9])
def test_a_training_goes_on_in_the_middle_of_an_epoch(encoded: Path, workers: int, taken: int) -> None:
    def fresh() -> tuple[LatentDataset, Any]:
        dataset = LatentDataset(str(encoded), batch_size=2, seed=9)
        return dataset, DataLoader(dataset, batch_size=None, num_workers=workers)

    dataset, loader = fresh()
    whole = [(batch["key"], batch["latents"]) for batch in loader]
    dataset, loader = fresh()
    batches = iter(loader)
    for _ in range(taken):
        next(batches)
    state = dataset.state_dict(taken if workers else None)
    assert state == {"epoch": 0, "num_batches": taken}
    dataset, loader = fresh()
    dataset.load_state_dict(state)
    rest = [(batch["key"], batch["latents"]) for batch in loader]
    assert [keys for keys, _ in rest] == [keys for keys, _ in whole[taken:]]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(rest, whole[taken:], strict=True))


@pytest.mark.parametrize("persistent", [False, True])
def test_every_pass_is_another_epoch_with_workers_too(encoded: Path, persistent: bool) -> None:
    def passes(workers: int) -> list[Any]:
        dataset = LatentDataset(str(encoded), batch_size=2, seed=4)
        loader = DataLoader(
            dataset, batch_size=None, num_workers=workers, persistent_workers=persistent and workers > 0
        )
        made = [[(batch["key"], batch["latents"]) for batch in loader] for _ in range(2)]
        dataset.set_epoch(1)
        return [*made, [(batch["key"], batch["latents"]) for batch in loader]]

    for workers in (0, 1, 2):
        first, second, again = passes(workers)
        assert [keys for keys, _ in first] != [keys for keys, _ in second]
        assert [keys for keys, _ in second] == [keys for keys, _ in again]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(second, again, strict=True))


def test_after_a_resume_the_next_epoch_is_whole(encoded: Path) -> None:
    dataset = LatentDataset(str(encoded), batch_size=2, seed=4)
    loader = DataLoader(dataset, batch_size=None, num_workers=1)
    dataset.load_state_dict({"epoch": 3, "num_batches": len(dataset) - 2})
    assert [len(list(loader)) for _ in range(3)] == [2, len(dataset), len(dataset)]
    assert dataset.state_dict(2 + len(dataset) + 1) == {"epoch": 5, "num_batches": 1}


def test_batches_come_from_workers_in_turn_while_they_last() -> None:
    for lengths in ([3, 1, 2], [0, 4], [5], [2, 2, 2]):
        queues = [[i] * length for i, length in enumerate(lengths)]
        order = []
        while any(queues):
            order += [queue.pop() for queue in queues if queue]
        for n in range(len(order)):
            assert _taken(n, lengths) == ([order[:n].count(i) for i in range(len(lengths))], order[n])
        assert _taken(len(order), lengths) == (lengths, 0)


def test_latents_are_read_from_object_storage(encoded: Path, s3_options: dict[str, Any]) -> None:
    import fsspec

    fsspec.filesystem("s3", **s3_options).put(str(encoded), "bkt/latents", recursive=True)
    for workers in (0, 2):
        remote = LatentDataset("s3://bkt/latents", batch_size=2, seed=3, storage_options=s3_options)
        local = LatentDataset(str(encoded), batch_size=2, seed=3)
        both = [DataLoader(dataset, batch_size=None, num_workers=workers) for dataset in (remote, local)]
        for a, b in zip(*both, strict=True):
            assert a["key"] == b["key"]
            assert torch.equal(a["latents"], b["latents"])


def test_pages_that_are_mapped_hold_what_pyarrow_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = LatentsHead("made-up", "0" * 16, "moments", "float16", (8, 32, 32), 0.18215, 0.0, 8)
    rng = np.random.default_rng(0)
    latents = [rng.standard_normal(head.shape).astype(np.float16) for _ in range(600)]
    rows = [
        {"key": f"{i}", "id": None, "prompt": "a", "flipped": False, **dict.fromkeys(GEOMETRY, 0)} for i in range(600)
    ]
    (tmp_path / "x.parquet").write_bytes(write_latents("parquet", head, rows, latents))
    with pq.ParquetFile(tmp_path / "x.parquet") as file:
        assert file.num_row_groups == 3
        for i in range(file.num_row_groups):
            found = mapped(tmp_path / "x.parquet", file, i, head)
            assert found is not None
            assert [row.tobytes() for row in found] == file.read_row_group(i, ["latents"])["latents"].to_pylist()
        monkeypatch.setattr(latents_file, "WHOLE_PAGES", b"as an older version wrote it")
        assert mapped(tmp_path / "x.parquet", file, 0, head) is None


def test_latents_of_several_encoders_do_not_mix(
    encoded: Path, photos: list[dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    torch.manual_seed(5)
    models.vae().save_pretrained(other)
    both = tmp_path / "both"
    shutil.copytree(encoded, both)
    run(encode_job(tmp_path / "second", photos[:4], encode(other)))
    for folder in ("data", "manifest"):
        shutil.copytree(tmp_path / "second" / folder, both / folder, dirs_exist_ok=True)
    with pytest.raises(JobError, match="latents of several encoders do not mix"):
        LatentDataset(str(both))
    run(
        job(
            tmp_path / "decoded",
            {"path": str(encoded), "format": "manifest"},
            {"op": "decode", "model": str(other)},
        )
    )
    found = pipelines.read_manifest(str(tmp_path / "decoded")).to_pylist()
    assert {(row["status"], row["error_type"]) for row in found} == {("failed", "latents.encoder")}


def test_batches_larger_than_every_bucket_are_refused_with_the_numbers(encoded: Path) -> None:
    for world_size, message in (
        (1, r"batch_size 64 × world_size 1 is more than the 11 rows of the largest bucket \(48×80 px\).*at most 11"),
        (4, "world_size 4 is more than the 11 rows .*, so an epoch would have no batch; use at most 2"),
        (12, "12 ranks are too many"),
    ):
        with pytest.raises(JobError, match=message):
            LatentDataset(str(encoded), batch_size=64, world_size=world_size)


def test_an_output_without_latents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="holds no latents; give the output of an encode job"):
        LatentDataset(str(tmp_path))
    with pytest.raises(JobError, match="rank 2 of world_size 2; 0 to 1"):
        LatentDataset(str(tmp_path), rank=2, world_size=2)
    with pytest.raises(JobError, match="batch_size 0; 1 or more"):
        LatentDataset(str(tmp_path), batch_size=0)


def test_a_chain_records_the_cut_that_its_latents_show(tiny_model: Path, tmp_path: Path) -> None:
    stages = [{"op": "txt2img", "model": str(tiny_model), "num_inference_steps": 2, "height": 64, "width": 96}]
    run(encode_job(tmp_path, [{"prompt": "a", "id": "a"}], *stages, encode(tiny_model, max_aspect_ratio=1)))
    found = stored(tmp_path)["a"]
    assert [found[name] for name in ("original_height", "original_width", "crop_top", "crop_left")] == [64, 96, 0, 16]
    # There is nothing to compare these with: what the first stage made was never written.
    report = verify(str(tmp_path), deep=True, decode=3)
    assert (report.faults, report.decoded) == ([], Decoded(num_rows=1))


def test_decoding_with_another_model_than_encoded_is_refused(
    tiny_model: Path, poisoned_model: Path, photos: list[dict[str, Any]]
) -> None:
    with pytest.raises(JobError, match="is not the model that stages.0 encodes with; give the same"):
        check(encode_job(Path("x"), photos, encode(tiny_model), {"op": "decode", "model": str(poisoned_model)}))


def test_a_resolution_without_buckets_is_refused(tiny_model: Path, photos: list[dict[str, Any]]) -> None:
    with pytest.raises(JobError, match="no bucket of multiples of 64 has so few pixels"):
        check(
            encode_job(Path("x"), photos, encode(tiny_model, resolution=100, bucket_multiple=64, max_aspect_ratio=1.0))
        )


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["encode", "img2img"], "stages.1: img2img cannot follow encode; decode takes latents, all else images"),
        (["img2img", "decode"], "stages.1: decode cannot follow img2img"),
    ],
)
def test_latents_and_images_do_not_mix_in_a_chain(stages: list[str], message: str, tiny_model: Path) -> None:
    with pytest.raises(JobError, match=message):
        encode_job(Path("x"), [{"image": "x"}], *({"op": op, "model": str(tiny_model)} for op in stages))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resize": "fit"}, "resolution makes buckets; leave height, width and resize out"),
        ({"resolution": 24, "bucket_multiple": 64}, "resolution 24 is less than bucket_multiple 64"),
        ({"posterior": "mean"}, "posterior: input should be 'moments', 'sample' or 'mode'"),
        ({"keep": True}, "stages.0.keep: latents on the way are not kept"),
    ],
)
def test_wrong_settings_say_what_is_allowed(fields: dict[str, Any], message: str, tiny_model: Path) -> None:
    with pytest.raises(JobError, match=message):
        encode_job(Path("x"), [{"image": "x"}], encode(tiny_model, **fields))


def test_latents_have_a_layout_of_their_own(tiny_model: Path, photos: list[dict[str, Any]]) -> None:
    with pytest.raises(JobError, match="sink.layout: files does not fit encode; use latents, or leave it out"):
        encode_job(Path("x"), photos, encode(tiny_model), sink={"path": "x", "layout": "files"})


def test_a_decode_job_needs_the_output_of_an_encode_job(tiny_model: Path) -> None:
    with pytest.raises(JobError, match="set source.format: manifest"):
        check(encode_job(Path("x"), [{"latents": "a#0"}], {"op": "decode", "model": str(tiny_model)}))
