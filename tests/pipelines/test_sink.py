"""A shard on its way into the output, in every layout and format, looked at by the libraries that will read it."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import pipelines
from pipelines.blocks import KEPT, pack, with_results
from pipelines.errors import JobError, NotWhole, OutputHeldByOther
from pipelines.generation_text import read as read_text
from pipelines.image_folder import write_metadata
from pipelines.images import encode
from pipelines.job import Job
from pipelines.loading import LoadShard, place
from pipelines.planner import check, plan
from pipelines.plans import read_plans, read_shard
from pipelines.row_table import LATER_FIELDS, OWN_FIELDS
from pipelines.runner import run, signer
from pipelines.signing import Signer
from pipelines.sink import ShardWriter
from pipelines.storage import Store
from pipelines.verify import verify
from tests.ldm_ops.rows import picture

MakeJob = Callable[..., Job]
ROWS = [
    {"prompt": "a réd circle", "id": "../x", "tag": "one", "file_name": "theirs"},
    {"prompt": "a blue star", "seed": 7, "tag": "two", "many": [{"a": 1.5}, {"a": float("nan")}]},
    {"prompt": "a star that fails", "tag": "three"},
]


def written(job: Job, rows: int = len(ROWS)) -> list[dict[str, Any]]:
    """Plan, take drawn pictures for what a model makes, and commit; the manifest, sorted by prompt."""
    planned = plan(job)
    store = Store(job.sink.path, job.sink.storage_options)
    assert planned.new is not None
    sign = Signer(job.sink.c2pa) if job.sink.c2pa else None
    for shard in planned.new.shards:
        table = read_shard(store, shard.file, shard.index)
        results = []
        for row in table.to_pylist():
            if "fails" in row["prompt"]:
                results.append({"status": "failed", "stage": "txt2img", "error_type": "x", "error_message": "y"})
            else:
                results.append({"status": "ok", "pixels": pack(pixels(row["prompt"]))})
        writer = ShardWriter(store, planned.new.plan_id, job.sink, job.layout, "run", "m", "r", sign=sign)
        writer(with_results(table, results))
    found = pipelines.read_manifest(job.sink.path, storage_options=job.sink.storage_options).to_pylist()
    assert len(found) == rows
    return sorted(found, key=lambda row: str(row["prompt"]))


def pixels(prompt: str) -> np.ndarray[Any, Any]:
    return picture(48, 64, seed=len(prompt))


@pytest.fixture
def sink_job(make_job: MakeJob, tmp_path: Path) -> Callable[..., Job]:
    def make(out: str = "out", **sink: Any) -> Job:
        return make_job(source={"rows": ROWS}, sink={"path": str(tmp_path / out), **sink}, batches_per_shard=8)

    return make


def test_webdataset_reads_a_tar_with_pictures_captions_and_parameters(
    sink_job: Callable[..., Job], tmp_path: Path
) -> None:
    import webdataset

    star, circle = (row for row in written(sink_job(layout="webdataset")) if row["status"] == "ok")
    [tar] = (tmp_path / "out" / "data").iterdir()
    assert tar.name == f"000000-{hashlib.sha256(tar.read_bytes()).hexdigest()[:12]}.tar"
    samples = {s["__key__"]: s for s in webdataset.WebDataset(str(tar), shardshuffle=False).decode("rgb8")}
    assert set(samples) == {star["key"], circle["key"]}
    for row in (star, circle):
        sample = samples[row["key"]]
        assert np.array_equal(sample["png"], pixels(row["prompt"]))
        assert sample["txt"] == row["prompt"]
        said = sample["json"]
        assert (said["seed"], said["prompt"], said["id"], said["tag"]) == tuple(
            row[name] for name in ("seed", "prompt", "id", "tag")
        )
        assert row["uri"] == f"data/{tar.name}#{row['key']}.png"
    assert not (tmp_path / "out" / "images").exists()


def test_a_part_that_is_damaged_while_rows_of_it_are_made_again_is_named(
    sink_job: Callable[..., Job], tmp_path: Path
) -> None:
    job = sink_job()
    rows = written(job)
    store = Store(job.sink.path)
    [one] = read_plans(store)
    [shard] = one.shards
    again = next(row["key"] for row in rows if row["status"] == "failed")
    loaded = LoadShard(store, None, "", {})(place(shard, frozenset([again])))
    results = [
        {"status": KEPT} if row["key"] != again else {"status": "ok", "pixels": pack(pixels("x")), "attempt": 2}
        for row in loaded.to_pylist()
    ]
    finished = with_results(read_shard(store, shard.file, shard.index), results)
    [part] = (tmp_path / "out" / "manifest").rglob("*.parquet")
    part.write_bytes(part.read_bytes()[:-9])
    cut = part.read_bytes()
    writer = ShardWriter(store, one.plan_id, job.sink, job.layout, "run", "m", "r")
    with pytest.raises(NotWhole, match=r"^manifest/.*parquet was damaged while rows of it .*; run `ldm-batch repair`$"):
        writer(finished)
    assert part.read_bytes() == cut


def test_a_picture_that_the_format_cannot_hold_costs_its_row_alone(
    sink_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = pixels
    long = {"a blue star": picture(8, 16_384, seed=1)}
    monkeypatch.setitem(globals(), "pixels", lambda prompt: long[prompt] if prompt in long else drawn(prompt))
    job = sink_job(format="webp")
    rows = written(job)
    assert [(row["status"], row["error_type"]) for row in rows] == [
        ("failed", "image.too_large"),
        ("ok", None),
        ("failed", "x"),
    ]
    assert [fault[:9] for fault in verify(job.sink.path).faults] == ["_SUCCESS:"]  # nobody counted
    assert rows[0]["error_message"] == "16384 px: webp holds at most 16383; use sink.format: png"


def test_a_tar_depends_on_nothing_but_its_pictures(sink_job: Callable[..., Job], tmp_path: Path) -> None:
    for out in ("one", "two"):
        written(sink_job(out, layout="webdataset"))
    names = [sorted(path.name for path in (tmp_path / out / "data").iterdir()) for out in ("one", "two")]
    assert names[0] == names[1]
    with tarfile.open(next((tmp_path / "one" / "data").iterdir())) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}


def test_datasets_opens_parquet_with_an_image_column(sink_job: Callable[..., Job], tmp_path: Path) -> None:
    import datasets

    rows = [row for row in written(sink_job(layout="parquet")) if row["status"] == "ok"]
    files = str(tmp_path / "out" / "data" / "*.parquet")
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(dataset.features["image"], datasets.Image)
    assert dataset.features["seed"].dtype == "int64"
    by_key = {sample["key"]: sample for sample in dataset}
    assert set(by_key) == {row["key"] for row in rows}
    for row in rows:
        sample = by_key[row["key"]]
        assert np.array_equal(np.asarray(sample["image"]), pixels(row["prompt"]))
        assert (sample["prompt"], sample["seed"], sample["tag"]) == (row["prompt"], row["seed"], row["tag"])
        file, _, number = row["uri"].partition("#")
        data = pq.read_table(tmp_path / "out" / file)["image"][int(number)].as_py()["bytes"]
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (row["sha256"], row["num_bytes"])


def test_datasets_opens_files_with_metadata_jsonl_as_an_image_folder(
    sink_job: Callable[..., Job], tmp_path: Path
) -> None:
    import datasets

    job = sink_job(metadata_jsonl=True, thumbnails=32)
    rows = [row for row in written(job) if row["status"] == "ok"]
    folder = tmp_path / "out" / "images"
    # Of an attempt that was never committed.
    (folder / "000000" / "orphan.png").write_bytes((tmp_path / "out" / rows[0]["uri"]).read_bytes())
    store = Store(job.sink.path)
    write_metadata(store)
    lines = (folder / "metadata.jsonl").read_bytes()
    cache = str(tmp_path / "cache")
    dataset = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=cache)
    by_prompt = {sample["prompt"]: sample for sample in dataset}
    assert (len(dataset), set(by_prompt)) == (2, {row["prompt"] for row in rows})
    for row in rows:
        assert np.array_equal(np.asarray(by_prompt[row["prompt"]]["image"]), pixels(row["prompt"]))
    assert by_prompt["a réd circle"]["input.file_name"] == "theirs"
    write_metadata(store)
    assert (folder / "metadata.jsonl").read_bytes() == lines
    grown = job.model_copy(update={"source": job.source.model_copy(update={"rows": [*ROWS, {"prompt": "new"}]})})
    plan(grown)
    assert not (folder / "metadata.jsonl").exists()


def test_thumbnails_are_small_jpegs_that_the_manifest_names(sink_job: Callable[..., Job], tmp_path: Path) -> None:
    for row in written(sink_job(thumbnails=32)):
        if row["status"] == "failed":
            assert row["thumbnail"] is None
            continue
        data = (tmp_path / "out" / row["thumbnail"]).read_bytes()
        assert row["thumbnail"].startswith(f"thumbnails/000000/{row['key']}-{hashlib.sha256(data).hexdigest()[:12]}")
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.size) == ("JPEG", (32, 24))


@pytest.mark.parametrize(
    ("format", "quality", "lossless"), [("jxl", None, True), ("webp", None, True), ("webp", 60, False)]
)
def test_formats_keep_every_pixel_where_they_say_so(
    sink_job: Callable[..., Job], tmp_path: Path, format: str, quality: int | None, lossless: bool
) -> None:
    import pillow_jxl  # noqa: F401 - the independent reader

    row = written(sink_job(format=format, quality=quality))[0]
    assert (row["format"], Path(row["uri"]).suffix) == (format, f".{format}")
    with Image.open(tmp_path / "out" / row["uri"]) as image:
        same = np.array_equal(np.asarray(image.convert("RGB")), pixels(row["prompt"]))
        assert f"Seed: {row['seed']}" in str(read_text(image))
    assert same == lossless


def read_png(data: bytes) -> tuple[np.ndarray[Any, Any], list[bytes]]:
    """An RGB image and the names of its chunks, by the letter of https://www.w3.org/TR/png-3/ and zlib alone."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, names, packed = 8, [], b""
    while at < len(data):
        length = int.from_bytes(data[at : at + 4])
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert int.from_bytes(data[at + 8 + length : at + 12 + length]) == zlib.crc32(name + body)
        names.append(name)
        if name == b"IHDR":
            width, height, *kind = struct.unpack(">IIBBBBB", body)
            assert kind == [8, 2, 0, 0, 0]
        packed += body if name == b"IDAT" else b""
        at += 12 + length
    lines = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + 3 * width)
    assert set(lines[:, 0]) <= {0, 2}, "a filter that this reader does not know"
    image = np.zeros((height, 3 * width), np.uint8)
    for y, line in enumerate(lines):
        image[y] = line[1:] + (image[y - 1] if line[0] == 2 else np.uint8(0))
    return image.reshape(height, width, 3), names


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (64, 48), (33, 512)])
@pytest.mark.parametrize("kind", ["noise", "smooth", "flat"])
def test_fpng_keeps_every_pixel_and_says_what_pillow_says(kind: str, height: int, width: int) -> None:
    image = {
        "noise": np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8),
        "smooth": picture(height, width),
        "flat": np.full((height, width, 3), 200, np.uint8),
    }[kind]
    for turned in (image, image.transpose(1, 0, 2)):
        for text in (None, "a circle\nSteps: 4, Seed: 7", "ein Kreis für 円\nSteps: 4, Seed: 7"):
            data = encode(turned, "png", text=text, png_encoder="fpng")
            assert data == encode(turned.copy(), "png", text=text, png_encoder="fpng")
            with (
                Image.open(io.BytesIO(data)) as ours,
                Image.open(io.BytesIO(encode(turned, "png", text=text))) as theirs,
            ):
                assert np.array_equal(np.asarray(ours), turned)
                assert (ours.mode, ours.info) == ("RGB", theirs.info)
                assert read_text(ours) == text
            read, names = read_png(data)
            assert np.array_equal(read, turned)
            assert (names[0], names[-2:]) == (b"IHDR", [b"IDAT", b"IEND"])


def test_a_job_says_who_encodes_its_png_files(sink_job: Callable[..., Job], tmp_path: Path) -> None:
    for row in written(sink_job(png_encoder="fpng")):
        if row["status"] == "ok":
            data = (tmp_path / "out" / row["uri"]).read_bytes()
            assert (hashlib.sha256(data).hexdigest(), len(data)) == (row["sha256"], row["num_bytes"])
            image, names = read_png(data)
            assert np.array_equal(image, pixels(row["prompt"]))
            # By which fpng knows its own.
            assert b"fdEC" in names
    with pytest.raises(OutputHeldByOther, match="sink.png_encoder 'fpng', now None"):
        plan(sink_job())


@pytest.mark.parametrize("format", ["webp", "jpeg"])
def test_a_lower_quality_is_smaller(sink_job: Callable[..., Job], format: str) -> None:
    sizes = [
        written(sink_job(str(quality), format=format, quality=quality, embed_metadata="none"))[0]["num_bytes"]
        for quality in (95, 30)
    ]
    assert sizes[1] < 0.7 * sizes[0]


def test_what_needs_a_package_that_is_missing_is_refused_with_the_extra_that_has_it(
    sink_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("pillow_jxl", "c2pa", "fpng") else find(name)
    )
    with pytest.raises(
        JobError, match=r"png_encoder: fpng needs the package fpng; pip install 'ldm-batch\[fast\]', or"
    ):
        check(sink_job(png_encoder="fpng"))
    with pytest.raises(JobError, match=r"jxl needs the package pillow-jxl-plugin; pip install 'ldm-batch\[jxl\]'"):
        check(sink_job(format="jxl"))
    with pytest.raises(JobError, match=r"sink.c2pa needs the package c2pa-python; pip install 'ldm-batch\[c2pa\]'"):
        check(sink_job(c2pa={"certificate": "a.pem", "private_key": "b.pem"}))


@pytest.mark.parametrize(
    ("sink", "message"),
    [
        ({"layout": "latents"}, "layout: latents does not fit txt2img; use files, webdataset or parquet, or leave it"),
        (
            {"layout": "tar"},
            "sink.layout: input should be 'auto', 'files', 'webdataset', 'parquet', 'latents' or 'embeddings'",
        ),
        ({"quality": 90}, "quality: png is lossless; leave it out, or use format jpeg or webp"),
        ({"latents_format": "safetensors"}, "sink.latents_format: txt2img makes no latents; leave it out"),
        ({"layout": "parquet", "metadata_jsonl": True}, "sink.metadata_jsonl: parquet holds it all; leave it out"),
        ({"thumbnails": 4}, "sink.thumbnails: input should be greater than or equal to 16"),
        ({"c2pa": {"certificate": "x.pem"}}, "sink.c2pa.private_key: missing; it is needed"),
        ({"c2pa": True}, "sink.c2pa: expected a mapping of fields; got bool"),
        (
            {"c2pa": {"certificate": "x", "private_key": "y", "key": "z"}},
            "sink.c2pa.key: unknown field; one of certificate, private_key, algorithm",
        ),
    ],
)
def test_settings_that_cannot_work_say_what_is_allowed(
    sink_job: Callable[..., Job], sink: dict[str, Any], message: str
) -> None:
    with pytest.raises(JobError, match=message):
        sink_job(**sink)


def test_what_changes_a_picture_changes_its_key_and_where_it_lies_does_not(sink_job: Callable[..., Job]) -> None:
    def keys(**sink: Any) -> tuple[str, ...]:
        table = check(sink_job(**sink)).table
        assert table is not None
        return tuple(sorted(table["key"].to_pylist()))

    pictures: list[dict[str, Any]] = [
        {},
        {"format": "webp"},
        {"format": "webp", "quality": 80},
        {"format": "jpeg", "quality": 90},
        {"format": "jpeg"},
        {"png_encoder": "fpng"},
    ]
    assert len({keys(**one) for one in pictures}) == len(pictures)
    assert keys(format="jpeg", quality=95) == keys(format="jpeg")
    same: list[dict[str, Any]] = [
        {"layout": "webdataset"},
        {"layout": "parquet"},
        {"thumbnails": 32},
        {"metadata_jsonl": True},
    ]
    assert {keys(**one) for one in same} == {keys()}


def test_an_output_has_one_layout(sink_job: Callable[..., Job], tmp_path: Path) -> None:
    plan(sink_job(layout="webdataset"))
    for extend in (False, True):
        with pytest.raises(OutputHeldByOther, match="holds sink.layout 'webdataset', now 'files'; an output has one"):
            plan(sink_job(), extend=extend)
    plan(sink_job(layout="webdataset", format="webp"), extend=True)


def test_the_json_of_a_tar_is_valid_whatever_passes_through(make_job: MakeJob, tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    row = {"prompt": "a", "far": float("inf"), "deep": {"a": [{"b": float("-inf")}, {"b": 1.5}]}}
    written(make_job(source={"rows": [row]}, sink={"path": str(tmp_path / "out"), "layout": "webdataset"}), 1)
    [path] = (tmp_path / "out" / "data").iterdir()
    with tarfile.open(path) as tar:
        [member] = [m for m in tar if m.name.endswith(".json")]
        file = tar.extractfile(member)
        assert file is not None
        said = json.loads(file.read(), parse_constant=refuse)
    assert (said["far"], said["deep"]) == (None, {"a": [{"b": None}, {"b": 1.5}]})


def test_sizes_in_a_parquet_file_with_pictures_tell_of_these_and_order_none(
    sink_job: Callable[..., Job], make_job: MakeJob, tmp_path: Path
) -> None:
    written(sink_job(layout="parquet"))
    source: dict[str, Any] = {"path": f"{tmp_path}/out/data/*.parquet"}
    for columns, sizes in (({}, (None, None)), ({"width": "input.width", "height": "input.height"}, (64, 48))):
        again = make_job(source=source | {"columns": columns}, stage={"op": "img2img"}, sink=str(tmp_path / "again"))
        table = check(again).table
        assert table is not None
        for row in table.to_pylist():
            assert (row["width"], row["height"]) == sizes
            assert columns or (row["input.width"], row["input.height"]) == (64, 48)


@pytest.mark.parametrize("sink", [{"layout": "webdataset"}, {"layout": "parquet"}, {"format": "jxl"}, {}])
def test_the_captions_of_an_output_are_a_source_wherever_its_pictures_lie(
    sink_job: Callable[..., Job], make_job: MakeJob, tmp_path: Path, sink: dict[str, Any]
) -> None:
    written(sink_job(**sink))
    source = {"path": str(tmp_path / "out"), "format": "manifest"}
    for op, prompts in (("txt2img", {"a réd circle", "a blue star"}), ("embed", {"a réd circle", "a blue star", ""})):
        model = make_job().stage.model
        stages = [{"op": op, "model": model}]
        job = Job.model_validate({"source": source, "stages": stages, "sink": {"path": str(tmp_path / "again")}})
        table = check(job).table
        assert table is not None
        assert set(table["prompt"].to_pylist()) == prompts
        # The rows' own columns pass through a picture's job, and nothing that nobody asked for.
        own = {"tag", "many", "file_name"} if op == "txt2img" else set()
        assert set(table.column_names) - {f.name for f in OWN_FIELDS} - set(LATER_FIELDS) == own


@pytest.mark.parametrize(
    ("sink", "reason"),
    [
        (
            {"layout": "webdataset"},
            "lies in one file with others, .*; read these files themselves, with source.path: .*/out/data/[*].tar and "
            "source.format: webdataset",
        ),
        ({"layout": "parquet"}, "lies in one file .*/out/data/[*].parquet and source.format: parquet"),
        ({"format": "jxl"}, "is JPEG XL, .*; convert its pictures, or make them again with sink.format: png"),
    ],
)
def test_pictures_that_are_no_source_are_refused_in_one_line(
    sink_job: Callable[..., Job], make_job: MakeJob, tmp_path: Path, sink: dict[str, Any], reason: str
) -> None:
    written(sink_job(**sink))
    source = {"path": str(tmp_path / "out"), "format": "manifest"}
    stage = {"op": "img2img", "strength": 0.5, "prompt": "a"}
    with pytest.raises(JobError, match=reason):
        check(make_job(source=source, stage=stage, sink=str(tmp_path / "again")))


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A certificate for signing and its key, by an authority of our own, as C2PA asks for them."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    folder = tmp_path_factory.mktemp("credentials")

    def certificate(name: str, key: Any, issuer: Any, issuer_key: Any, is_authority: bool) -> x509.Certificate:
        subject = x509.Name(
            [x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test")]
        )
        now = datetime.now(UTC)
        usage = dict.fromkeys(
            (
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.subject if issuer else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=not is_authority, key_cert_sign=is_authority, crl_sign=is_authority, **usage
                ),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        )
        if not is_authority:
            builder = builder.add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
            )
        return builder.sign(issuer_key, hashes.SHA256())

    top_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    top = certificate("authority", top_key, None, top_key, True)
    mine = certificate("signer", key, top, top_key, False)
    pem = serialization.Encoding.PEM
    (folder / "certificate.pem").write_bytes(mine.public_bytes(pem) + top.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return {"certificate": str(folder / "certificate.pem"), "private_key": str(folder / "key.pem")}


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "jxl"])
def test_signed_pictures_say_by_whom_and_that_a_model_made_them(
    sink_job: Callable[..., Job], tmp_path: Path, credentials: dict[str, str], format: str
) -> None:
    import c2pa

    row = written(sink_job(c2pa=credentials, format=format))[0]
    path = tmp_path / "out" / row["uri"]
    with c2pa.Reader(f"image/{format}", io.BytesIO(path.read_bytes())) as reader:
        said = json.loads(reader.json())
    manifest = said["manifests"][said["active_manifest"]]
    assert manifest["signature_info"]["issuer"] == "Test"
    assert "trainedAlgorithmicMedia" in json.dumps(manifest["assertions"])
    # By default c2pa puts a picture of 1024 px into each, whatever its size.
    assert "thumbnail" not in manifest
    failures = said["validation_results"]["activeManifest"]["failure"]
    assert {failure["code"] for failure in failures} <= {"signingCredential.untrusted"}
    assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
    everything = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert b"PRIVATE KEY" not in everything
    assert credentials["private_key"].encode() not in everything


def test_signing_is_part_of_the_key_and_tried_by_check(
    sink_job: Callable[..., Job], tmp_path: Path, credentials: dict[str, str]
) -> None:
    plain, signed = (check(sink_job(c2pa=c2pa)).table for c2pa in (None, credentials))
    assert plain is not None
    assert signed is not None
    assert set(plain["key"].to_pylist()).isdisjoint(signed["key"].to_pylist())
    with pytest.raises(JobError, match=r"sink.c2pa.private_key: /.*/gone.pem cannot be read \(No such file"):
        check(sink_job(c2pa=credentials | {"private_key": "gone.pem"}))
    with pytest.raises(JobError, match=r"cannot sign \(.+\); give a certificate"):
        check(sink_job(c2pa=credentials | {"private_key": credentials["certificate"]}))


def test_certificate_and_key_lie_where_the_job_was_read(
    sink_job: Callable[..., Job], tmp_path: Path, credentials: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(credentials["certificate"]).parent)
    job = sink_job(c2pa={"certificate": "certificate.pem", "private_key": "./key.pem"})
    # As a worker does.
    monkeypatch.chdir(tmp_path)
    assert written(job)[0]["status"] == "ok"


def test_a_run_signs_and_tells_imagefolder_once_all_is_done(
    ray_session: None, sink_job: Callable[..., Job], tmp_path: Path, credentials: dict[str, str]
) -> None:
    import c2pa

    job = sink_job(c2pa=credentials, metadata_jsonl=True)
    [planned] = plan(job).plans
    with pytest.raises(JobError, match=r"the pictures of plan \w+ are signed; give certificate and private_key"):
        signer(sink_job(), planned)
    run(job)
    folder = tmp_path / "out" / "images"
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in sorted(lines, key=lambda line: line["prompt"])] == sorted(
        row["prompt"] for row in ROWS
    )
    assert [line["file_name"] for line in lines] == sorted(line["file_name"] for line in lines)
    for line in lines:
        with c2pa.Reader("image/png", io.BytesIO((folder / line["file_name"]).read_bytes())) as reader:
            assert reader.get_validation_state() != "Invalid"
    assert verify(str(tmp_path / "out"), deep=True).faults == []
