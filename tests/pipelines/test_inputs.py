"""Images on their way in: every kind a folder may hold, good and bad."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import StorageError
from pipelines.inputs import MAX_PIXELS, BadImage, Loaded, Loader, decode
from tests.conftest import start_moto

RED, BLUE = (200, 30, 20), (10, 40, 220)


def loader(**fields: Any) -> Loader:
    defaults = {"takes": frozenset({"image"}), "resize": None, "multiple": 8, "background": "#ffffff"}
    return Loader(**{**defaults, "storage_options": {}, **fields})


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def halves(mode: str = "RGB", size: tuple[int, int] = (40, 24)) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def load(tmp_path: Path, data: bytes, name: str = "x.png", height: Any = None, width: Any = None, **fields: Any) -> Any:
    path = tmp_path / name
    path.write_bytes(data)
    return loader(**fields)([{"image": str(path), "height": height, "width": width, "image_version": None}])[0]


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_lossless_file_comes_in_exactly(tmp_path: Path, format: str) -> None:
    made = load(tmp_path, encoded(halves(), format, **({"lossless": True} if format == "WEBP" else {})))
    assert np.array_equal(made.image, np.asarray(halves()))


@pytest.mark.parametrize("format", ["JPEG", "AVIF"])
def test_a_lossy_file_comes_in_as_pillow_decodes_it(tmp_path: Path, format: str) -> None:
    data = encoded(halves(), format)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(load(tmp_path, data).image, expected)


def test_an_image_is_turned_upright_by_its_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    made = load(tmp_path, encoded(halves(), "JPEG", exif=exif, quality=100)).image
    assert made.shape == (40, 24, 3)
    assert np.abs(made[:10].astype(int) - RED).max() < 40
    assert np.abs(made[-10:].astype(int) - BLUE).max() < 40


def test_16_bit_grey_is_scaled_and_not_cut(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 8).reshape(8, 64).astype(np.uint16)
    made = load(tmp_path, encoded(Image.fromarray(ramp))).image
    assert made.shape == (8, 64, 3)
    assert np.array_equal(made[..., 0], np.round(ramp / 65535 * 255).astype(np.uint8))


def test_transparency_shows_the_stated_background(tmp_path: Path) -> None:
    image = halves("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    assert np.array_equal(load(tmp_path, encoded(image), background="#102030").image[0, 0], (16, 32, 48))
    grey = Image.new("LA", (8, 8), (100, 255))
    assert np.array_equal(load(tmp_path, encoded(grey)).image[0, 0], (100, 100, 100))
    palette = halves("RGB").quantize(4)
    data = encoded(palette, transparency=palette.getpixel((0, 0)))
    made = load(tmp_path, data, background="#00ff00").image
    assert np.array_equal(made[0, 0], (0, 255, 0))
    assert np.abs(made[0, -1].astype(int) - BLUE).max() < 12


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LAB"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = halves().quantize(4) if mode == "P" else halves("RGB" if mode == "LAB" else mode)
    format = "TIFF" if mode in ("CMYK", "LAB") else "PNG"
    made = load(tmp_path, encoded(image, format)).image
    assert made.shape == (24, 40, 3)
    assert made.dtype == np.uint8
    if mode in ("P", "CMYK"):
        assert np.abs(made[0, 0].astype(int) - RED).max() <= 8


def test_a_grey_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    made = load(tmp_path, encoded(halves("CMYK"), "JPEG", quality=100)).image
    assert np.abs(made[4, 4].astype(int) - RED).max() < 30


def png_claiming(width: int, height: int) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def animation(format: str) -> bytes:
    return encoded(halves(), format, save_all=True, append_images=[Image.new("RGB", (40, 24), BLUE)])


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.png": (lambda: b"", "image.broken"),
    "page.jpg": (lambda: b"<!doctype html><html>404</html>", "image.format"),
    "text.png": (lambda: b"just words " * 100, "image.format"),
    "zeros.png": (lambda: b"\0" * 5000, "image.format"),
    "random.jpg": (lambda: np.random.default_rng(0).bytes(4000), "image.format"),
    "cut.png": (lambda: encoded(Image.effect_noise((64, 64), 90))[:900], "image.broken"),
    "cut.jpg": (lambda: encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")[:900], "image.broken"),
    "cut.webp": (lambda: encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "WEBP")[:200], "image.broken"),
    "head.png": (lambda: encoded(halves())[:20], "image.broken"),
    "signature.png": (lambda: b"\x89PNG\r\n\x1a\n", "image.format"),
    "soi.jpg": (lambda: b"\xff\xd8\xff", "image.format"),
    "bomb.png": (lambda: png_claiming(60_000, 60_000), "image.too_large"),
    "wide.png": (lambda: png_claiming(2_000_000, 100), "image.too_large"),
    "poor.png": (lambda: png_claiming(4000, 4000), "image.broken"),
    "zero.png": (lambda: png_claiming(0, 0), "image.format"),
    "moving.gif": (lambda: animation("GIF"), "image.animated"),
    "moving.webp": (lambda: animation("WEBP"), "image.animated"),
    "moving.png": (lambda: animation("PNG"), "image.animated"),
    "pages.tiff": (lambda: animation("TIFF"), "image.animated"),
    "script.png": (lambda: encoded(halves(), "EPS"), "image.format"),
    "doc.png": (lambda: encoded(halves(), "PDF"), "image.format"),
    "icon.png": (lambda: encoded(halves(), "ICO"), "image.format"),
    "layers.png": (lambda: b"8BPS\0\1" + b"\0" * 60, "image.format"),
    "vector.png": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "image.format"),
    "jp2.png": (lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 60, "image.format"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_a_reason_and_never_an_exception(tmp_path: Path, name: str) -> None:
    make, kind = BAD[name]
    found = load(tmp_path, make(), name)
    assert isinstance(found, BadImage)
    assert found.kind == kind
    assert str(tmp_path / name) in str(found)
    assert len(str(found).splitlines()) == 1


def test_a_missing_file_a_folder_and_a_locked_store_are_reasons(tmp_path: Path) -> None:
    rows = [
        {"image": where, "height": None, "width": None, "image_version": None}
        for where in (f"{tmp_path}/none.png", str(tmp_path))
    ]
    missing, folder = loader()(rows)
    assert isinstance(missing, BadImage)
    assert missing.kind == "image.missing"
    assert isinstance(folder, BadImage)
    assert folder.kind == "image.unreadable"


def test_a_store_that_refuses_is_no_fault_of_the_row() -> None:
    server, url = start_moto(INITIAL_NO_AUTH_ACTION_COUNT="0")
    rows = [{"image": "s3://bkt/a.png", "height": None, "width": None, "image_version": None}]
    with pytest.raises(StorageError, match="the store refuses these credentials"):
        loader(storage_options={"endpoint_url": url})(rows)
    server.kill()
    server.wait()


def test_an_image_that_changed_since_the_plan_is_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(encoded(halves()))
    row = {"image": str(path), "height": None, "width": None}
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert isinstance(loader()([{**row, "image_version": sha256}])[0], Loaded)
    path.write_bytes(encoded(halves().rotate(90)))
    found = loader()([{**row, "image_version": sha256}])[0]
    assert isinstance(found, BadImage)
    assert found.kind == "image.changed"


def test_a_phones_jpeg_with_a_second_picture_comes_in(tmp_path: Path) -> None:
    data = encoded(halves(), "MPO", save_all=True, append_images=[halves("RGB")])
    made = load(tmp_path, data, "phone.jpg")
    assert made.image.shape == (24, 40, 3)


def test_an_image_that_would_grow_beyond_measure_is_a_reason(tmp_path: Path) -> None:
    found = load(tmp_path, encoded(Image.new("L", (9000, 1))), height=1024)
    assert isinstance(found, BadImage)
    assert "9000 × 1 would become 9216000 × 1024" in str(found)


def test_the_pixel_cap_is_checked_before_a_pixel_is_decoded() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    side = int(MAX_PIXELS**0.5) + 100
    with pytest.raises(BadImage, match=r"at most 128 Mi pixels"):
        decode(png_claiming(side, side), "#ffffff")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize(
    ("resize", "height", "width", "size", "expected"),
    [
        (None, None, None, (101, 61), (64, 104)),
        ("nearest_multiple", None, None, (101, 61), (64, 104)),
        ("nearest_multiple", 64, 64, (101, 61), (64, 104)),
        (None, 64, 48, (101, 61), (64, 48)),
        ("fill", 64, None, (100, 50), (64, 128)),
        ("fill", None, 64, (100, 50), (32, 64)),
        ("fit", 64, 64, (100, 50), (32, 64)),
        ("exact", None, None, (64, 48), (48, 64)),
        ("exact", 48, 64, (64, 48), (48, 64)),
        (None, None, None, (3, 3), (8, 8)),
    ],
)
def test_the_resize_policy_decides_over_the_size(
    tmp_path: Path, resize: Any, height: Any, width: Any, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    made = load(tmp_path, encoded(halves(size=size)), height=height, width=width, resize=resize)
    assert made.image.shape == (*expected, 3)


def test_fill_cuts_and_never_distorts(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 100), RED)
    image.paste(BLUE, (100, 0, 200, 100))
    made = load(tmp_path, encoded(image), height=64, width=64, resize="fill").image
    assert np.abs(made[:, 4:-4].astype(int) - BLUE).max() <= 2


@pytest.mark.parametrize(
    ("size", "height", "reason"), [((65, 48), None, "65 × 48, not multiples of 8"), ((64, 48), 64, "not 64 × 64")]
)
def test_exact_refuses_any_other_size(tmp_path: Path, size: tuple[int, int], height: Any, reason: str) -> None:
    found = load(tmp_path, encoded(halves(size=size)), height=height, width=height and 64, resize="exact")
    assert isinstance(found, BadImage)
    assert found.kind == "image.size"
    assert reason in str(found)


def mask_of(tmp_path: Path, mask: str, size: tuple[int, int] = (40, 24), **fields: Any) -> Any:
    (tmp_path / "i.png").write_bytes(encoded(halves(size=size)))
    row = {"image": str(tmp_path / "i.png"), "mask_image": mask, "height": None, "width": None, "image_version": None}
    return loader(takes=frozenset({"image", "mask_image"}), **fields)([row])[0]


def test_a_mask_is_a_box_or_a_file_of_the_same_size(tmp_path: Path) -> None:
    boxed = mask_of(tmp_path, "box:8,4,16,12").mask_image
    assert boxed.shape == (24, 40)
    assert (boxed[4:12, 8:16] == 255).all()
    assert boxed.astype(int).sum() == 255 * 64
    path = tmp_path / "m.png"
    Image.fromarray(boxed).save(path)
    assert np.array_equal(mask_of(tmp_path, str(path)).mask_image, boxed)


def test_a_mask_goes_the_way_of_its_image_and_stays_black_and_white(tmp_path: Path) -> None:
    made = mask_of(tmp_path, "box:0,0,41,33", size=(83, 67))
    assert made.mask_image.shape == made.image.shape[:2] == (64, 80)
    assert set(np.unique(made.mask_image)) == {0, 255}
    assert 0.2 < (made.mask_image == 255).mean() < 0.3


def test_a_mask_that_does_not_fit_is_a_reason(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "m.png")
    other = mask_of(tmp_path, str(tmp_path / "m.png"))
    assert isinstance(other, BadImage)
    assert (other.kind, "the mask: it is 8 × 8, its image 40 × 24" in str(other)) == ("mask.size", True)
    far = mask_of(tmp_path, "box:0,0,41,8")
    assert isinstance(far, BadImage)
    assert far.kind == "mask.size"
    (tmp_path / "m.png").write_bytes(b"nothing")
    broken = mask_of(tmp_path, str(tmp_path / "m.png"))
    assert isinstance(broken, BadImage)
    assert broken.kind == "mask.format"


def test_an_image_comes_from_object_storage(s3_options: dict[str, Any]) -> None:
    import fsspec

    fsspec.filesystem("s3", **s3_options).pipe_file("bkt/in/a.png", encoded(halves()))
    rows = [
        {"image": f"s3://bkt/in/{n}.png", "height": None, "width": None, "image_version": None} for n in ("a", "none")
    ]
    fine, missing = loader(storage_options=s3_options)(rows)
    assert np.array_equal(fine.image, np.asarray(halves()))
    assert isinstance(missing, BadImage)
    assert missing.kind == "image.missing"


def photo(size: tuple[int, int]) -> Image.Image:
    """Something smooth with edges, as photographs are."""
    y, x = np.mgrid[: size[1], : size[0]]
    waves = [np.sin(x / 37) * 60 + 128, np.cos(y / 53) * 60 + 128, ((x // 200 + y // 150) % 2) * 90 + 60]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_draft_is_nearly_the_exact_image_and_tells_the_same_geometry(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(photo((1200, 800)), "JPEG", quality=95, exif=exif)
    exact, draft = (load(tmp_path, data, height=96, width=160, decoding=d) for d in ("exact", "draft"))
    difference = np.abs(exact.image.astype(int) - draft.image.astype(int))
    assert 0 < difference.mean() < 2
    for name in ("original_height", "original_width", "crop_top", "crop_left"):
        assert getattr(exact, name) == getattr(draft, name)
    assert (draft.original_height, draft.original_width) == ((800, 1200) if orientation == 1 else (1200, 800))


def test_a_draft_changes_nothing_where_there_is_little_to_scale_or_no_jpeg(tmp_path: Path) -> None:
    for data, height in ((encoded(photo((240, 160)), "JPEG"), 96), (encoded(photo((800, 600))), 64)):
        exact, draft = (load(tmp_path, data, height=height, decoding=d) for d in ("exact", "draft"))
        assert np.array_equal(exact.image, draft.image)


def test_a_draft_keeps_its_mask_in_place(tmp_path: Path) -> None:
    (tmp_path / "i.jpg").write_bytes(encoded(photo((1200, 800)), "JPEG"))
    row = {"image": str(tmp_path / "i.jpg"), "mask_image": "box:600,0,1200,800", "height": 96, "width": 144}
    takes = frozenset({"image", "mask_image"})
    (made,) = loader(takes=takes, decoding="draft")([{**row, "image_version": None}])
    assert (made.mask_image[:, :72] == 0).all()
    assert (made.mask_image[:, 72:] == 255).all()


def test_a_loader_travels_between_processes(tmp_path: Path) -> None:
    import pickle

    made = loader()
    load(tmp_path, encoded(halves()))
    again = pickle.loads(pickle.dumps(made))
    assert again([{"image": str(tmp_path / "x.png"), "height": None, "width": None, "image_version": None}])[
        0
    ].image.shape == (24, 40, 3)
