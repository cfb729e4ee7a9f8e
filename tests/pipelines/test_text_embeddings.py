"""Embeddings as a user stores them, and as a training finds them again beside its latents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.utils.data import DataLoader

from pipelines.blocks import pack, with_results
from pipelines.embeddings_file import EmbeddingsHead
from pipelines.errors import JobError
from pipelines.job import Job, Sink
from pipelines.latents import LatentDataset
from pipelines.latents_file import LatentsHead
from pipelines.planner import check, plan
from pipelines.row_table import OWN_FIELDS
from pipelines.runner import run
from pipelines.sink import ShardWriter
from pipelines.storage import Store
from pipelines.text_embeddings import TextEmbeddings
from pipelines.verify import verify

CAPTIONS = ["a red circle", "a blue ring", "a large green star", "a star on a white background", "a pink cross"]
TABLE = [
    {"prompt": CAPTIONS[i % 5] if i % 7 else "", "id": str(i), "image": f"{i}.png", "note": f"n{i}"} for i in range(40)
]
HEAD = EmbeddingsHead("made-up", "0" * 16, "PixArtAlphaPipeline", "fp16", True, None)
LATENTS = LatentsHead("made-up", "0" * 16, "moments", "", (0, 0, 0), 0.18215, 0.0, 8)


def manifest(out: Path) -> list[dict[str, Any]]:
    """Every manifest row, by pyarrow alone."""
    return [row for path in sorted((out / "manifest").rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture
def make(tiny_model: Path) -> Callable[..., Job]:
    import yaml

    from pipelines.job import parse_job

    def job(out: Path, rows: list[dict[str, Any]] | None = None, /, **fields: Any) -> Job:
        stage = {"op": "embed", "model": str(tiny_model), "batch_size": 2, "workers": 1, **fields}
        source = {"rows": TABLE if rows is None else rows}
        return parse_job(yaml.safe_dump({"source": source, "stages": [stage], "sink": {"path": str(out)}}))

    return job


def write(out: Path, head: Any, results: dict[str, dict[str, Any]], captions: list[str], per_shard: int = 4) -> Path:
    """An output of the project's own sink, without Ray: `results` by key, in order, beside their captions."""
    writer = ShardWriter(Store(str(out)), "0" * 16, Sink(path=str(out)), "embeddings", "run", "made-up", "0" * 16, head)
    schema = pa.schema([*OWN_FIELDS, ("num_duplicates", pa.int32()), ("shard", pa.int32())])
    keys = list(results)
    for shard, first in enumerate(range(0, len(keys), per_shard)):
        mine = keys[first : first + per_shard]
        rows = [{"key": key, "prompt": captions[keys.index(key)], "shard": shard} for key in mine]
        writer(with_results(pa.Table.from_pylist(rows, schema=schema), [{"status": "ok", **results[k]} for k in mine]))
    return out


def made_up(out: Path, captions: list[str], head: EmbeddingsHead = HEAD, pooled: bool = True) -> dict[str, Any]:
    """Embeddings of 1 to 9 tokens under `out`; returns them by caption."""
    rng = np.random.default_rng(len(captions))
    values = {
        c: (rng.standard_normal((i % 9 + 1, 16)).astype(np.float16), rng.standard_normal(8).astype(np.float16))
        for i, c in enumerate(captions)
    }
    results = {
        hashlib.sha256(c.encode()).hexdigest()[:32]: {
            "embeds_data": pack(tokens),
            "pooled_data": pack(vector) if pooled else None,
        }
        for c, (tokens, vector) in values.items()
    }
    write(out, head, results, captions)
    return values


def latents_of(out: Path, captions: list[str]) -> Path:
    rng = np.random.default_rng(0)
    results = {
        f"{i:032x}": {
            "latents_data": pack(rng.standard_normal((8, 4, 4)).astype(np.float16)),
            "flipped": False,
            **dict.fromkeys(("original_height", "original_width"), 64),
            **dict.fromkeys(("crop_top", "crop_left"), 0),
        }
        for i in range(len(captions))
    }
    return write(out, LATENTS, results, captions, per_shard=16)


def test_every_distinct_caption_is_embedded_once_and_so_is_the_empty_one(
    ray_session: None, make: Callable[..., Job], tiny_model: Path, tmp_path: Path
) -> None:
    summary = run(make(tmp_path / "one"))
    assert (summary.exit_code, summary.totals.num_ok, summary.num_duplicates) == (0, 6, 34)
    rows = {row["prompt"]: row for row in manifest(tmp_path / "one")}
    assert sorted(rows) == sorted([*CAPTIONS, ""])
    for caption, row in rows.items():
        assert row["num_duplicates"] == sum(one["prompt"] == caption for one in TABLE) - 1
        assert (row["id"], row["seed"], row["format"], "note" in row) == (None, None, "embeddings", False)
        table = pq.read_table(tmp_path / "one" / row["uri"])
        stored = table.slice(row["embeddings_row"], 1).to_pylist()[0]
        assert (stored["key"], stored["prompt"], stored["num_tokens"]) == (row["key"], caption, 32)
        assert hashlib.sha256(stored["prompt_embeds"]).hexdigest() == row["sha256"]
        assert len(stored["prompt_embeds"]) == row["num_bytes"] == 32 * 32 * 2
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    found = TextEmbeddings(str(tmp_path / "one"))
    with torch.inference_mode():
        for caption in rows:
            # In the job's batches of two, or the last bits would be those of another batch size.
            wanted = pipe.encode_prompt([caption] * 2, "cpu", 1, False)[0][0].half()
            assert np.array_equal(found[caption][0], wanted.numpy())
    run(make(tmp_path / "two", TABLE[::-1], workers=2))
    again = {row["prompt"]: row["sha256"] for row in manifest(tmp_path / "two")}
    assert again == {caption: row["sha256"] for caption, row in rows.items()}
    files = [sorted(p.name for p in (tmp_path / out / "data").rglob("*.parquet")) for out in ("one", "two")]
    assert files[0] == files[1]
    assert verify(str(tmp_path / "one"), deep=True).faults == []
    broken = tmp_path / "one" / rows[CAPTIONS[0]]["uri"]
    table = pq.read_table(broken)
    pq.write_table(table.take(pa.array(range(len(table)))[::-1]), broken)
    assert verify(str(tmp_path / "one"), deep=True).num_faults > 0


def test_a_table_that_has_grown_embeds_only_its_new_captions(make: Callable[..., Job], tmp_path: Path) -> None:
    assert plan(make(tmp_path)).num_rows == 6
    more = plan(
        make(tmp_path, [*TABLE, {"prompt": "a new caption", "id": "40"}, {"prompt": "a red circle", "id": "41"}])
    )
    assert (more.num_known, more.num_rows) == (6, 7)
    assert more.new is not None
    assert more.new.num_rows == 1
    changed = plan(make(tmp_path, [{**row, "note": "x", "image": "y"} for row in TABLE]))
    assert (changed.new, changed.num_gone) == (None, 1)


def test_captions_come_out_of_a_table_that_has_them_and_may_be_missing_in_a_row(
    make: Callable[..., Job], tmp_path: Path
) -> None:
    planned = check(make(tmp_path, [{"prompt": "a"}, {"prompt": None}, {"prompt": ""}]))
    assert (planned.num_rows, planned.num_duplicates) == (2, 1)
    assert check(make(tmp_path, [{"prompt": "a"}])).num_rows == 2
    with pytest.raises(JobError, match="no column 'prompt'; the table has 'image'; name it with source.columns"):
        check(make(tmp_path, [{"image": "a.png"}]))


def test_the_captions_of_an_encode_jobs_output_can_be_its_source(make: Callable[..., Job], tmp_path: Path) -> None:
    latents = latents_of(tmp_path / "latents", ["a", "b", "a", "b", "c"])
    job = make(tmp_path / "text")
    source = job.source.model_copy(update={"rows": None, "path": str(latents), "format": "manifest"})
    planned = plan(job.model_copy(update={"source": source}))
    assert planned.table is not None
    assert sorted(planned.table["prompt"].to_pylist()) == ["", "a", "b", "c"]
    assert planned.num_duplicates == 2


def test_embed_stands_alone_and_needs_text_encoders(make: Callable[..., Job], tiny_model: Path, tmp_path: Path) -> None:
    import yaml

    from pipelines.job import parse_job

    stages = [{"op": op, "model": str(tiny_model)} for op in ("embed", "encode")]
    for order in (stages, stages[::-1]):
        with pytest.raises(JobError, match="embed makes no image and takes none; give it a job of its own"):
            parse_job(yaml.safe_dump({"source": {"rows": ["a"]}, "stages": order, "sink": {"path": "x"}}))
    with pytest.raises(JobError, match="is a AutoencoderKL, for decode, encode; embed takes another kind of model"):
        check(make(tmp_path, model=str(tiny_model / "vae")))
    with pytest.raises(JobError, match="is a StableDiffusionPipeline, without a T5; leave it out"):
        check(make(tmp_path, max_sequence_length=77))


def test_a_batch_joins_latents_to_the_embeddings_of_their_captions(tmp_path: Path) -> None:
    captions = [f"caption {i % 9}" for i in range(40)]
    latents = latents_of(tmp_path / "latents", captions)
    values = made_up(tmp_path / "text", [*sorted(set(captions)), ""])
    dataset = LatentDataset(str(latents), 4, text_embeddings=str(tmp_path / "text"))
    batches = list(dataset)
    assert sum(len(batch["key"]) for batch in batches) == 40
    for batch in batches:
        longest = max(len(values[prompt][0]) for prompt in batch["prompt"])
        assert batch["prompt_embeds"].shape == (4, longest, 16)
        for i, prompt in enumerate(batch["prompt"]):
            assert prompt == captions[int(batch["key"][i], 16)]
            tokens, pooled = values[prompt]
            assert batch["prompt_attention_mask"][i].tolist() == [j < len(tokens) for j in range(longest)]
            assert np.array_equal(batch["prompt_embeds"][i][: len(tokens)].numpy(), tokens)
            assert not batch["prompt_embeds"][i][len(tokens) :].any()
            assert np.array_equal(batch["pooled_prompt_embeds"][i].numpy(), pooled)
    for ways in ({"num_workers": 2}, {"num_threads": 3}):
        workers = ways.pop("num_workers", 0)
        other = LatentDataset(str(latents), 4, text_embeddings=str(tmp_path / "text"), shuffle=False, **ways)
        seen = {
            key: (batch["latents"][i], batch["prompt_embeds"][i].sum())
            for batch in DataLoader(other, batch_size=None, num_workers=workers)
            for i, key in enumerate(batch["key"])
        }
        assert len(seen) == 40


def test_captions_are_dropped_at_reading_by_seed_epoch_and_row_alone(tmp_path: Path) -> None:
    captions = [f"caption {i}" for i in range(400)]
    latents = latents_of(tmp_path / "latents", captions)
    values = made_up(tmp_path / "text", [*captions, ""])

    def dropped(epoch: int, workers: int = 0, **options: Any) -> set[str]:
        dataset = LatentDataset(
            str(latents), 4, text_embeddings=str(tmp_path / "text"), caption_dropout=0.25, **options
        )
        dataset.set_epoch(epoch)
        found = set()
        for batch in DataLoader(dataset, batch_size=None, num_workers=workers):
            for i, prompt in enumerate(batch["prompt"]):
                size = len(values[prompt][0])
                assert np.array_equal(batch["prompt_embeds"][i][:size].numpy(), values[prompt][0])
                if prompt == "":
                    found.add(batch["key"][i])
                else:
                    assert prompt == captions[int(batch["key"][i], 16)]
        return found

    first = dropped(0)
    assert 70 <= len(first) <= 130
    assert first == dropped(0, workers=2) == dropped(0, shuffle=False) == dropped(0, num_threads=2)
    assert len({frozenset(drawn) for drawn in (first, dropped(1), dropped(0, seed=5))}) == 3


def test_threads_give_the_same_batches_and_go_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    latents = latents_of(tmp_path / "latents", [str(i) for i in range(50)])
    plain = [(batch["key"], batch["latents"]) for batch in LatentDataset(str(latents), 3, seed=4)]
    dataset = LatentDataset(str(latents), 3, seed=4, num_threads=2)
    batches = iter(dataset)
    begun = [next(batches) for _ in range(7)]
    state = dataset.state_dict()
    assert state == {"epoch": 0, "num_batches": 7}
    batches.close()  # type: ignore[attr-defined]
    resumed = LatentDataset(str(latents), 3, seed=4, num_threads=2)
    resumed.load_state_dict(state)
    made = [(batch["key"], batch["latents"]) for batch in [*begun, *resumed]]
    assert [keys for keys, _ in made] == [keys for keys, _ in plain]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(made, plain, strict=True))


def test_embeddings_in_bf16_keep_their_bits(tmp_path: Path) -> None:
    values = {c: torch.randn(3, 16, generator=torch.Generator().manual_seed(i)).bfloat16() for i, c in enumerate("ab")}
    results = {f"{i}": {"embeds_data": pack(v.view(torch.uint16).numpy())} for i, v in enumerate(values.values())}
    write(tmp_path / "text", replace(HEAD, dtype="bf16", masked=False), results, list(values))
    batch = next(
        iter(LatentDataset(str(latents_of(tmp_path / "l", ["a", "b"])), 2, text_embeddings=str(tmp_path / "text")))
    )
    assert batch["prompt_embeds"].dtype == torch.bfloat16
    assert "pooled_prompt_embeds" not in batch
    for i, prompt in enumerate(batch["prompt"]):
        assert torch.equal(batch["prompt_embeds"][i], values[prompt])


def test_what_cannot_be_joined_is_refused(tmp_path: Path) -> None:
    latents = latents_of(tmp_path / "latents", ["a", "b", "c"])
    made_up(tmp_path / "some", ["b"])

    def join(folder: Any, **options: Any) -> LatentDataset:
        return LatentDataset(str(latents), text_embeddings=str(folder), **options)

    with pytest.raises(JobError, match="has no embedding of 'a' and 1 others; run its embed job on the same captions"):
        join(tmp_path / "some")
    with pytest.raises(JobError, match="holds no text embeddings; give the output of an embed job"):
        join(latents)
    made_up(tmp_path / "all", ["a", "b", "c"])
    assert len(join(tmp_path / "all")) == 3
    with pytest.raises(JobError, match="has no embedding of ''"):
        join(tmp_path / "all", caption_dropout=0.1)
    with pytest.raises(JobError, match="caption_dropout 1.5; 0 to 1"):
        join(tmp_path / "all", caption_dropout=1.5)


def test_embeddings_of_several_encoders_do_not_mix(tmp_path: Path) -> None:
    made_up(tmp_path, ["a", "b", "c", "d"])
    other = replace(HEAD, encoder_revision="1" * 16)
    writer = ShardWriter(
        Store(str(tmp_path)), "1" * 16, Sink(path=str(tmp_path)), "embeddings", "run", "x", "1" * 16, other
    )
    schema = pa.schema([*OWN_FIELDS, ("num_duplicates", pa.int32()), ("shard", pa.int32())])
    rows = pa.Table.from_pylist([{"key": "x", "prompt": "e", "shard": 0}], schema=schema)
    writer(
        with_results(
            rows,
            [
                {
                    "status": "ok",
                    "embeds_data": pack(np.zeros((2, 16), np.float16)),
                    "pooled_data": pack(np.zeros(8, np.float16)),
                }
            ],
        )
    )
    with pytest.raises(JobError, match="embeddings of several encoders do not mix"):
        TextEmbeddings(str(tmp_path))


def test_embeddings_are_read_from_object_storage_and_with_a_bounded_memory(
    tmp_path: Path, s3_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    import pipelines.text_embeddings

    captions = [f"caption {i}" for i in range(30)]
    values = made_up(tmp_path, captions)
    fsspec.filesystem("s3", **s3_options).put(str(tmp_path), "bkt/text", recursive=True)
    monkeypatch.setattr(pipelines.text_embeddings, "CACHE_BYTES", 1000)
    found = TextEmbeddings("s3://bkt/text", s3_options)
    for caption in captions[::-1] + captions:
        assert np.array_equal(found[caption][0], values[caption][0])
        assert found._cached_bytes <= 1000
