"""Bring a row's images in: fetch, decode under limits, turn upright, make RGB, fit to the size that the op takes.

Runs on the CPU before the model's worker. What is wrong with an image is its row's failure, with a kind to group by.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from pipelines.references import split
from pipelines.stages import Resize
from pipelines.storage import Store, is_local

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
"""What is decoded. Not EPS or PSD and the like, whatever a file's name says: their decoders are too mighty."""

Pixels = NDArray[np.uint8]

MAX_BYTES = 256 << 20
MAX_PIXELS = 128 << 20
MAX_SIDE = 16384
FETCHES = 4


class BadImage(ValueError):
    """An image that cannot be used; `kind` becomes the manifest's error_type."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Loaded:
    """What one row brought along: `image` and `control_image` uint8 (H, W, 3), `mask_image` uint8 (H, W), all of one
    size, and how the image was cut; a control image that comes alone was cut in its place.

    `crop_top` and `crop_left` are the corner of what is left, in pixels of the image already scaled (what SDXL calls
    `crops_coords_top_left`); the original size is the upright file's.
    """

    image: Pixels | None
    mask_image: Pixels | None
    original_height: int
    original_width: int
    crop_top: int
    crop_left: int
    control_image: Pixels | None = None


@dataclass
class Loader:
    """How a stage's images come in: the resize policy, what sides must be multiples of, what shines through.

    `buckets` are the (width, height) to choose from, where there is a choice.
    """

    takes: frozenset[str]
    resize: Resize | None
    multiple: int
    background: str
    storage_options: dict[str, Any]
    buckets: tuple[tuple[int, int], ...] = ()
    stores: dict[str, Store] = field(default_factory=dict)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[Loaded | BadImage]:
        """For each row what it brought along, or what is wrong with it."""
        with ThreadPoolExecutor(FETCHES) as pool:
            return list(pool.map(self._one, rows))

    def _one(self, row: Mapping[str, Any]) -> Loaded | BadImage:
        main = "image" if "image" in self.takes else "control_image"
        try:
            data = self.fetch(row[main])
            if is_local(row[main]) and row["image_version"] not in (None, hashlib.sha256(data).hexdigest()):
                raise BadImage("image.changed", "the image is another than when the plan was made; run again")
            image = decode(data, self.background)
            mask = self._mask(row["mask_image"], image.size) if "mask_image" in self.takes else None
            loaded = self._cut(image, mask, row["height"], row["width"])
            if main == "control_image":
                return replace(loaded, image=None, control_image=loaded.image)
            if "control_image" in self.takes and loaded.image is not None:
                height, width = loaded.image.shape[:2]
                return replace(loaded, control_image=self._control(row["control_image"], (width, height)))
            return loaded
        except BadImage as error:
            where = str(row[main])
            return error if where in str(error) else BadImage(error.kind, f"{where}: {error}")

    def fit(self, pixels: Pixels, height: int | None, width: int | None) -> Loaded:
        """A picture of the stage before, brought to what this one takes.

        Raises:
            BadImage: the policy is `exact`, and it is not.
        """
        return self._cut(Image.fromarray(pixels), None, height, width)

    def _cut(self, image: Image.Image, mask: Image.Image | None, height: int | None, width: int | None) -> Loaded:
        policy = self.resize or ("fill" if height or width else "nearest_multiple")
        target = self._target(image.size, policy, height, width)
        if max(target) > MAX_SIDE or target[0] * target[1] > MAX_PIXELS:
            raise BadImage(
                "image.size", f"{image.width} × {image.height} would become {target[0]} × {target[1]}; set other sizes"
            )
        cuts = bool(self.buckets) or policy == "fill"
        scale = max(target[0] / image.width, target[1] / image.height)
        return Loaded(
            image=np.asarray(_resized(image, target, cuts, Image.Resampling.LANCZOS)),
            # A mask keeps its two values.
            mask_image=None if mask is None else np.asarray(_resized(mask, target, cuts, Image.Resampling.NEAREST)),
            original_height=image.height,
            original_width=image.width,
            crop_top=round((image.height * scale - target[1]) / 2) if cuts else 0,
            crop_left=round((image.width * scale - target[0]) / 2) if cuts else 0,
        )

    def fetch(self, where: str) -> bytes:
        """The bytes of one image.

        Raises:
            BadImage: it is not there, no file, or too large.
            StorageError: the store does not answer or refuses; that is no fault of the row.
        """
        root, name = split(where)
        too_large = BadImage("image.too_large", f"{where}: more than {MAX_BYTES >> 20} MiB; make it smaller")
        data: bytes | None
        if is_local(where):
            path = Path(root) / name
            try:
                if path.stat().st_size > MAX_BYTES:
                    raise too_large
                data = path.read_bytes()
            except FileNotFoundError:
                data = None
            except (IsADirectoryError, PermissionError) as error:
                raise BadImage("image.unreadable", f"{where}: {error.strerror}") from None
        else:
            data = self.stores.setdefault(root, Store(root, self.storage_options)).read(name)
        if data is None:
            raise BadImage("image.missing", f"{where}: no such image")
        if len(data) > MAX_BYTES:
            raise too_large
        if not data:
            raise BadImage("image.broken", f"{where}: an empty file")
        return data

    def _mask(self, where: str, size: tuple[int, int]) -> Image.Image:
        if where.startswith("box:"):
            left, top, right, bottom = (int(n) for n in where.removeprefix("box:").split(","))
            if right > size[0] or bottom > size[1]:
                raise BadImage("mask.size", f"box {where[4:]} reaches beyond the image of {size[0]} × {size[1]}")
            mask = Image.new("L", size, 0)
            mask.paste(255, (left, top, right, bottom))
            return mask
        try:
            mask = decode(self.fetch(where), "#000000").convert("L")
        except BadImage as error:
            raise BadImage(error.kind.replace("image.", "mask."), f"mask: {error}") from None
        if mask.size != size:
            raise BadImage(
                "mask.size",
                f"the mask is {mask.size[0]} × {mask.size[1]}, its image {size[0]} × {size[1]}; make them equal",
            )
        return mask

    def _control(self, where: str, size: tuple[int, int]) -> Pixels:
        """A control image as large as the image that it goes with."""
        try:
            control = decode(self.fetch(where), self.background)
        except BadImage as error:
            raise BadImage(error.kind.replace("image.", "control_image."), f"control image {where}: {error}") from None
        return np.asarray(_resized(control, size, True, Image.Resampling.LANCZOS))

    def _target(self, size: tuple[int, int], policy: Resize, height: int | None, width: int | None) -> tuple[int, int]:
        """(width, height) that an image is brought to."""
        if self.buckets:
            shape = math.log(size[0] / size[1])
            return min(self.buckets, key=lambda b: (abs(math.log(b[0] / b[1]) - shape), -b[0] * b[1]))
        m = self.multiple

        def near(value: float) -> int:
            return max(m, round(value / m) * m)

        if m == 1 and not (height or width):
            return size
        if policy == "exact":
            wanted = (width or size[0], height or size[1])
            if size != wanted or wanted[0] % m or wanted[1] % m:
                needs = f"{wanted[0]} × {wanted[1]}" if (width or height) else f"multiples of {m}"
                raise BadImage("image.size", f"{size[0]} × {size[1]}, not {needs}; resize: exact allows no other")
            return wanted
        if policy == "nearest_multiple" or not (height or width):
            return near(size[0]), near(size[1])
        # Where one side is given, the other follows the image's own proportions.
        wide = width or size[0] * (height or 0) / size[1]
        high = height or size[1] * (width or 0) / size[0]
        if policy == "fit":
            scale = min(wide / size[0], high / size[1])
            return near(size[0] * scale), near(size[1] * scale)
        return near(wide), near(high)


def _resized(image: Image.Image, target: tuple[int, int], cuts: bool, resample: Image.Resampling) -> Image.Image:
    if image.size == target:
        return image
    return ImageOps.fit(image, target, resample) if cuts else image.resize(target, resample)


def bucket_sizes(resolution: int, multiple: int, max_aspect_ratio: float) -> tuple[tuple[int, int], ...]:
    """Every (width, height) of multiples with at most resolution² pixels: per width the largest height that fits."""
    found = set()
    for width in range(multiple, int(resolution * max_aspect_ratio) + 1, multiple):
        height = resolution * resolution // width // multiple * multiple
        if height and max(width / height, height / width) <= max_aspect_ratio:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


def decode(data: bytes, background: str) -> Image.Image:
    """Bytes → an upright RGB image; every mode is converted on purpose.

    Raises:
        BadImage: not an image of FORMATS, cut off, animated, or with more than MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            # Pillow's own cap only warns at first; ours is checked before a pixel is decoded.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BadImage(
                        "image.too_large", f"{width} × {height} pixels; at most {MAX_PIXELS >> 20} Mi pixels"
                    )
                frames = getattr(image, "n_frames", 1)
                # Many phones append a second picture to a JPEG (MPO); the first is the one that counts.
                if frames > 1 and image.format not in ("JPEG", "MPO"):
                    raise BadImage("image.animated", f"{frames} frames; give a single image")
                image.load()
                return to_rgb(ImageOps.exif_transpose(image), background)
    except UnidentifiedImageError:
        raise BadImage("image.format", f"not an image that can be read; one of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise BadImage("image.too_large", str(error)) from None
    except BadImage:
        raise
    except Exception as error:  # noqa: BLE001 - each of Pillow's decoders raises what it likes on broken data
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadImage("image.broken", f"cannot be decoded ({text})") from None


def to_rgb(image: Image.Image, background: str) -> Image.Image:
    """Any mode of Pillow → RGB: 16 bits scaled to 8, palettes looked up, alpha laid over `background` (#rrggbb)."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image).astype(np.float64)
        # 16-bit grey, which Pillow opens as I;16 or as I; F has no agreed range, so its own is taken.
        top = 65535.0 if image.mode != "F" else max(1.0, float(np.nan_to_num(values).max()))
        grey = np.round(np.clip(np.nan_to_num(values) / top, 0, 1) * 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    has_alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if not has_alpha:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    ground = Image.new("RGBA", rgba.size, (*ImageColor.getrgb(background)[:3], 255))
    return Image.alpha_composite(ground, rgba).convert("RGB")
