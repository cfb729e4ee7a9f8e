"""Bring a row's images in: fetch, decode under limits, turn upright, make RGB, fit to the size that the op takes.

Runs on the CPU before the model's worker. What is wrong with an image is its row's failure, with a kind to group by.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from pipelines.parquet_images import read_cells
from pipelines.pieces import MAX_BYTES, Bytes, Cell, piece
from pipelines.references import WEB, split
from pipelines.stages import ImageDecoding, Resize
from pipelines.storage import Store, is_local
from pipelines.web import NotFetched, fetch_url

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
"""What is decoded. Not EPS or PSD and the like, whatever a file's name says: their decoders are too mighty."""

Pixels = NDArray[np.uint8]

ORIENTATION = 0x0112
MAX_PIXELS = 128 << 20
MAX_SIDE = 16384
FETCHES = 4
GROUPS_HELD = 4
IMAGES = ("image", "mask_image", "control_image")
_SHA256 = re.compile(r"[0-9a-f]{64}")


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

    `buckets` are the (width, height) to choose from, where there is a choice; `allow_hosts` the web servers that may
    be asked.
    """

    takes: frozenset[str]
    resize: Resize | None
    multiple: int
    background: str
    storage_options: dict[str, Any]
    buckets: tuple[tuple[int, int], ...] = ()
    decoding: ImageDecoding = "exact"
    allow_hosts: tuple[str, ...] = ()
    stores: dict[str, Store] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[Loaded | BadImage]:
        """For each row what it brought along, or what is wrong with it."""
        cells = _Cells(self, (row[name] for row in rows for name in IMAGES if row.get(name)))
        room = _Room(MAX_PIXELS)
        with ThreadPoolExecutor(FETCHES) as pool:
            return list(pool.map(lambda row: self._one(row, cells, room), rows))

    def _one(self, row: Mapping[str, Any], cells: _Cells, room: _Room) -> Loaded | BadImage:
        main = "image" if "image" in self.takes else "control_image"
        height, width = row["height"], row["width"]
        try:
            versions = self._versions(row)
            data = self._same(row[main], versions.get(main), cells)
            with ExitStack() as stack:

                def opened(size: tuple[int, int]) -> tuple[int, int] | None:
                    stack.enter_context(room.of(size[0] * size[1]))
                    return self._scaled(size, height, width) if self.decoding == "draft" else None

                image, size = decode(data, self.background, opened)
                mask = None
                if "mask_image" in self.takes:
                    mask = self._mask(row["mask_image"], versions.get("mask_image"), size, cells)
                loaded = self._cut(image, size, mask, height, width)
            if main == "control_image":
                return replace(loaded, image=None, control_image=loaded.image)
            if "control_image" in self.takes and loaded.image is not None:
                shape = (loaded.image.shape[1], loaded.image.shape[0])
                version = versions.get("control_image")
                control = self._control(row["control_image"], version, shape, cells, room)
                return replace(loaded, control_image=control)
            return loaded
        except BadImage as error:
            where = str(row[main])
            return error if where in str(error) else BadImage(error.kind, f"{where}: {error}")

    def fit(self, pixels: Pixels, height: int | None, width: int | None) -> Loaded:
        """A picture of the stage before, brought to what this one takes.

        Raises:
            BadImage: the policy is `exact`, and it is not.
        """
        image = Image.fromarray(pixels)
        return self._cut(image, image.size, None, height, width)

    def _cut(
        self,
        image: Image.Image,
        size: tuple[int, int],
        mask: Image.Image | None,
        height: int | None,
        width: int | None,
    ) -> Loaded:
        # `size` is the file's own; a draft is smaller.
        target, cuts = self._target(size, height, width)
        if max(target) > MAX_SIDE or target[0] * target[1] > MAX_PIXELS:
            raise BadImage(
                "image.size", f"{size[0]} × {size[1]} would become {target[0]} × {target[1]}; set other sizes"
            )
        scale = max(target[0] / size[0], target[1] / size[1])
        return Loaded(
            image=np.asarray(_resized(image, target, cuts, Image.Resampling.LANCZOS)),
            # A mask keeps its two values.
            mask_image=None if mask is None else np.asarray(_resized(mask, target, cuts, Image.Resampling.NEAREST)),
            original_height=size[1],
            original_width=size[0],
            crop_top=round((size[1] * scale - target[1]) / 2) if cuts else 0,
            crop_left=round((size[0] * scale - target[0]) / 2) if cuts else 0,
        )

    def _scaled(self, size: tuple[int, int], height: int | None, width: int | None) -> tuple[int, int]:
        """The size that an image has just before it is cut: a draft must not be smaller."""
        target, _ = self._target(size, height, width)
        scale = max(target[0] / size[0], target[1] / size[1])
        return math.ceil(size[0] * scale), math.ceil(size[1] * scale)

    def _versions(self, row: Mapping[str, Any]) -> dict[str, str]:
        """What lay at each place when the plan was made; see `Resolver`."""
        names = [name for name in ("image", "mask_image", "control_image") if name in self.takes]
        # A plan of an older version knows the first one's alone.
        return dict(zip(names, (row["image_version"] or "").split("\n"), strict=False))

    def _same(self, where: str, version: str | None, cells: _Cells) -> bytes:
        data = self.fetch(where, cells)
        self._refuse_changed(where, version, data)
        return data

    def _refuse_changed(self, where: str, version: str | None, data: bytes) -> None:
        part = piece(where)
        if not version:
            return
        if _SHA256.fullmatch(version):
            changed = version != hashlib.sha256(data).hexdigest()
        else:
            # Where a tar has been replaced, other bytes lie at this place; the picture would be another one's.
            changed = isinstance(part, Bytes) and self._mark(part.file) not in version
        if changed:
            raise BadImage("image.changed", "the image is another than when the plan was made; run again")

    def _mark(self, where: str) -> str:
        if where not in self.marks:
            store, name = self._store(where)
            self.marks[where] = f"{where} {store.version(name)}"
        return self.marks[where]

    def _store(self, where: str) -> tuple[Store, str]:
        root, name = split(where)
        return self.stores.setdefault(root, Store(root, self.storage_options, reached=True)), name

    def fetch(self, where: str, cells: _Cells | None = None) -> bytes:
        """The bytes of one image.

        Raises:
            BadImage: it is not there, no file, or too large.
            StorageError: the store does not answer or refuses; that is no fault of the row.
        """
        too_large = BadImage("image.too_large", f"{where}: more than {MAX_BYTES >> 20} MiB; make it smaller")
        part = piece(where)
        data: bytes | None
        try:
            if isinstance(part, Cell):
                data = (cells or _Cells(self, [where])).read(part)
            elif isinstance(part, Bytes):
                if part.end - part.start > MAX_BYTES:
                    raise too_large
                if is_local(part.file):
                    with Path(part.file.removeprefix("file://")).open("rb") as file:
                        file.seek(part.start)
                        data = file.read(part.end - part.start)
                else:
                    store, name = self._store(part.file)
                    data = store.read(name, part.start, part.end)
                if data is not None and len(data) < part.end - part.start:
                    raise BadImage("image.broken", f"{where}: the file ends before; is the copy whole?")
            elif where.startswith(WEB):
                data = fetch_url(where, self.allow_hosts, MAX_BYTES)
            elif is_local(where):
                path = Path(where.removeprefix("file://"))
                if path.stat().st_size > MAX_BYTES:
                    raise too_large
                data = path.read_bytes()
            else:
                store, name = self._store(where)
                data = store.read(name)
        except NotFetched as error:
            raise BadImage(error.kind, f"{where}: {error}") from None
        except FileNotFoundError:
            data = None
        except (IsADirectoryError, PermissionError) as error:
            raise BadImage("image.unreadable", f"{where}: {error.strerror}") from None
        if data is None:
            raise BadImage("image.missing", f"{where}: no such image")
        if len(data) > MAX_BYTES:
            raise too_large
        if not data:
            raise BadImage("image.broken", f"{where}: an empty file")
        return data

    def _mask(self, where: str, version: str | None, size: tuple[int, int], cells: _Cells) -> Image.Image:
        if where.startswith("box:"):
            left, top, right, bottom = (int(n) for n in where.removeprefix("box:").split(","))
            if right > size[0] or bottom > size[1]:
                raise BadImage("mask.size", f"box {where[4:]} reaches beyond the image of {size[0]} × {size[1]}")
            mask = Image.new("L", size, 0)
            mask.paste(255, (left, top, right, bottom))
            return mask

        def opened(found: tuple[int, int]) -> None:
            if found != size:
                raise BadImage(
                    "mask.size", f"it is {found[0]} × {found[1]}, its image {size[0]} × {size[1]}; make them equal"
                )

        try:
            return decode(self._same(where, version, cells), "#000000", opened)[0].convert("L")
        except BadImage as error:
            raise BadImage(error.kind.replace("image.", "mask."), f"the mask: {error}") from None

    def _control(self, where: str, version: str | None, size: tuple[int, int], cells: _Cells, room: _Room) -> Pixels:
        """A control image as large as the image that it goes with."""
        try:
            with ExitStack() as stack:
                control, _ = decode(
                    self._same(where, version, cells),
                    self.background,
                    lambda found: stack.enter_context(room.of(found[0] * found[1])),
                )
                return np.asarray(_resized(control, size, True, Image.Resampling.LANCZOS))
        except BadImage as error:
            raise BadImage(error.kind.replace("image.", "control_image."), f"control image {where}: {error}") from None

    def _target(self, size: tuple[int, int], height: int | None, width: int | None) -> tuple[tuple[int, int], bool]:
        """(width, height) that an image is brought to, and whether it is cut to their shape."""
        if self.buckets:
            shape = math.log(size[0] / size[1])
            return min(self.buckets, key=lambda b: (abs(math.log(b[0] / b[1]) - shape), -b[0] * b[1])), True
        policy = self.resize or ("fill" if height or width else "nearest_multiple")
        return self._by_policy(size, policy, height, width), policy == "fill"

    def _by_policy(
        self, size: tuple[int, int], policy: Resize, height: int | None, width: int | None
    ) -> tuple[int, int]:
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


class _Room:
    """Room for so many pixels at a time: small images come in side by side, the largest alone."""

    def __init__(self, pixels: int) -> None:
        self.left = pixels
        self.changed = threading.Condition()

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: self.left >= pixels)
            self.left -= pixels
        try:
            yield
        finally:
            with self.changed:
                self.left += pixels
                self.changed.notify_all()


class _Cells:
    """Pictures in Parquet files: what the rows of one shard want of a row group is read in one go."""

    def __init__(self, loader: Loader, places: Iterable[str]) -> None:
        self.loader = loader
        self.wanted: dict[tuple[str, int, str], set[int]] = {}
        for place in places:
            if isinstance(part := piece(place), Cell):
                self.wanted.setdefault((part.file, part.row_group, part.column), set()).add(part.row)
        self.held: dict[tuple[str, int, str], dict[int, bytes]] = {}
        self.lock = threading.Lock()

    def read(self, cell: Cell) -> bytes | None:
        """The bytes of one cell, None where there is none."""
        group = (cell.file, cell.row_group, cell.column)
        with self.lock:
            if group not in self.held:
                while len(self.held) >= GROUPS_HELD:
                    self.held.pop(next(iter(self.held)))
                self.held[group] = self._read(*group)
            return self.held[group].get(cell.row)

    def _read(self, file: str, row_group: int, column: str) -> dict[int, bytes]:
        def read(opened: Any) -> dict[int, bytes] | BadImage:
            try:
                return read_cells(opened, row_group, column, self.wanted[file, row_group, column])
            except (pa.ArrowException, OSError) as error:
                # Arrow says by a bare OSError that a page is damaged; a store's and a disk's have a number or a name.
                if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                    raise
                reason = (str(error).splitlines() or [""])[0]
                return BadImage("image.broken", f"{file}: not a whole Parquet file ({reason})")

        if is_local(file):
            found = read(file.removeprefix("file://"))
        else:
            store, name = self.loader._store(file)
            found = store.read_with(name, read) or {}
        if isinstance(found, BadImage):
            raise found
        return found


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


def decode(
    data: bytes, background: str, opened: Callable[[tuple[int, int]], tuple[int, int] | None] = lambda size: None
) -> tuple[Image.Image, tuple[int, int]]:
    """Bytes → an upright RGB image and the upright file's (width, height); every mode is converted on purpose.

    `opened` hears that size before a pixel is decoded, and may answer which one is enough: a JPEG then comes out of its
    decoder at the nearest of 1/1, 1/2, 1/4 and 1/8 that is no smaller, by its DCT coefficients (`Image.draft`), and
    everything else as it is.

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
                if image.format in ("JPEG", "MPO") and not _has_end(data):
                    raise BadImage("image.broken", "cut off, without the mark at a JPEG's end; is the copy whole?")
                frames = getattr(image, "n_frames", 1)
                # Many phones append a second picture to a JPEG (MPO); the first is the one that counts.
                if frames > 1 and image.format not in ("JPEG", "MPO"):
                    raise BadImage("image.animated", f"{frames} frames; give a single image")
                # The last four of EXIF's eight orientations lie on their side.
                turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
                upright = (height, width) if turned else (width, height)
                enough = opened(upright)
                if enough is not None:
                    image.draft(image.mode, enough[::-1] if turned else enough)
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return to_rgb(image, background), upright
    except UnidentifiedImageError:
        raise BadImage("image.format", f"not an image that can be read; one of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise BadImage("image.too_large", str(error)) from None
    except BadImage:
        raise
    except Exception as error:  # noqa: BLE001 - each of Pillow's decoders raises what it likes on broken data
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadImage("image.broken", f"cannot be decoded ({text})") from None


def _has_end(data: bytes) -> bool:
    """Whether a JPEG's data end as they should. Where zeros fill what is missing, as in a download that was given its
    size at once, its decoder makes grey of them and says nothing."""
    at = 2
    # Over the segments before the data: they may hold a small picture with an end of its own.
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        at += 1 if data[at + 1 : at + 2] == b"\xff" else 2 + length
    return data.find(b"\xff\xd9", at) >= 0


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
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    ground = Image.new("RGBA", rgba.size, (*ImageColor.getrgb(background)[:3], 255))
    return Image.alpha_composite(ground, rgba).convert("RGB")
