"""Where weights come from: folders, the hub's cache, object storage; which exact ones, and brought once per node."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from ldm_ops.embed import Embed
from ldm_ops.encode import Encode
from ldm_ops.txt2img import Txt2Img
from pipelines.errors import JobError, StorageError
from pipelines.weights import Weights, fetch, identify
from tests.faults.proxy import Faults

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache as a download leaves it, with one model at one commit and a tag."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(tiny_model, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_a_hub_model_is_its_commit_whatever_name_pins_it(hub_cache: Path, revision: str) -> None:
    weights, facts = identify("org/tiny", revision)
    assert (weights.revision, facts.pipeline) == (COMMIT, "StableDiffusionPipeline")
    assert fetch(weights) == hub_cache / "snapshots" / COMMIT
    assert weights.num_bytes > 10_000
    assert Txt2Img(model="org/tiny", revision=revision).load(fetch(weights)).pipe.unet


def test_a_hub_model_that_is_not_cached_offline_names_the_switches(hub_cache: Path) -> None:
    with pytest.raises(JobError, match=r"model org/tiny@v2: not to be had .* HF_TOKEN .* HF_HUB_OFFLINE=1"):
        identify("org/tiny", "v2")


def test_a_job_that_needs_some_parts_of_a_hub_model_asks_for_no_more(hub_cache: Path) -> None:
    snapshot = hub_cache / "snapshots" / COMMIT
    for part in ("unet", "vae"):
        (snapshot / part / "diffusion_pytorch_model.safetensors").unlink()
    weights, _ = identify("org/tiny", COMMIT, parts=Embed.parts)
    assert weights.num_bytes == (snapshot / "text_encoder" / "model.safetensors").stat().st_size
    assert Embed(model="org/tiny", revision=COMMIT).load(fetch(weights)).pipe.text_encoder
    for parts in (Encode.parts, ()):
        with pytest.raises(JobError, match=r"model org/tiny@.*: not to be had"):
            identify("org/tiny", COMMIT, parts=parts)


@pytest.mark.parametrize(
    ("op", "folders"), [(Embed, {"text_encoder"}), (Encode, {"vae"}), (Txt2Img, {"text_encoder", "vae", "unet"})]
)
def test_only_the_weights_that_an_op_loads_are_copied(
    tiny_model: Path,
    upload: Callable[[Path], str],
    s3_options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    op: type[Embed | Encode | Txt2Img],
    folders: set[str],
) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    weights, _ = identify(upload(tiny_model), None, storage_options=s3_options, parts=op.parts)
    folder = fetch(weights)
    files = list(folder.rglob("*.safetensors"))
    assert {path.parent.name for path in files} == folders
    assert weights.num_bytes == sum(path.stat().st_size for path in files)
    assert op(model="x").load(folder)
    whole = fetch(identify(upload(tiny_model), None, storage_options=s3_options)[0])
    # Once all is there, nothing is copied again.
    assert fetch(weights) == whole
    assert identify(str(tiny_model), None, parts=op.parts)[0].num_bytes == weights.num_bytes


def test_changed_weights_are_another_revision(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    same = identify(str(copy), None)[0].revision
    assert same == identify(str(tiny_model), None)[0].revision
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert identify(str(copy), None)[0].revision != same


@pytest.fixture
def upload(s3_options: dict[str, Any], tmp_path: Path) -> Callable[[Path], str]:
    def put(folder: Path) -> str:
        url = f"s3://bkt/models/{tmp_path.name}"
        fsspec.filesystem("s3", **s3_options).put(f"{folder}/", f"{url}/", recursive=True)
        return url

    return put


def test_a_model_on_object_storage_is_copied_once_however_many_ask(
    tiny_model: Path, upload: Callable[[Path], str], s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    faults = Faults(s3_endpoint)
    url = upload(tiny_model)
    weights, facts = identify(url, None, storage_options={"endpoint_url": faults.url})
    assert facts.default_height == 64
    assert not any(method == "GET" and path.endswith(".safetensors") for method, path in faults.seen)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: fetch(weights), range(4)))
    assert len(folders) == 1
    got = [
        path
        for method, path in faults.seen
        if method == "GET" and path.endswith("unet/diffusion_pytorch_model.safetensors")
    ]
    assert len(got) == 1
    original = tiny_model / "unet" / "diffusion_pytorch_model.safetensors"
    folder = folders.pop()
    assert (folder / "unet" / original.name).read_bytes() == original.read_bytes()
    assert Txt2Img(model=url).load(folder).pipe.unet
    faults.close()


def test_pickled_weights_on_object_storage_are_refused_unread(
    tiny_model: Path,
    upload: Callable[[Path], str],
    s3_options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(JobError, match="vae holds no safetensors"):
        identify(upload(folder), None, storage_options=s3_options)
    assert [path.stat().st_size for path in (tmp_path / "cache").rglob("*.bin")] == [0]


def test_an_empty_place_on_object_storage_says_so(s3_options: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="nothing there; give the folder that holds model_index.json"):
        identify("s3://bkt/models/none", None, storage_options=s3_options)


def test_a_folder_that_another_node_does_not_have_says_so() -> None:
    with pytest.raises(StorageError, match="is not on this node; use s3://… or a hub id"):
        fetch(Weights("x", "0", "folder", "/nowhere/at/all"))
