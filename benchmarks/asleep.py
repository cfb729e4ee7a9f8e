"""A stage whose device only waits: what is left of a run's time is what its data plane costs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.pictures import natural
from ldm_ops.adapters import NO_ADAPTERS, Adapters
from ldm_ops.encode import Encode
from ldm_ops.op import Row
from ldm_ops.txt2img import Txt2Img


class Asleep(Txt2Img):
    """`seconds` a device batch, then a picture per row, all different. `notes` gets a line a batch: begin, end, pid."""

    seconds: float
    notes: str

    def load(self, folder: Path, adapters: Adapters = NO_ADAPTERS) -> Any:
        return None

    def run(self, model: Any, rows: Sequence[Row]) -> list[dict[str, Any]]:
        begin = time.time()
        made = [{"image": photo(row["height"], row["seed"]), "nsfw": None, "intermediates": []} for row in rows]
        wait(begin, self.seconds, self.notes)
        return made


class EncodeAsleep(Encode):
    """The same, with the latents of an image."""

    seconds: float
    notes: str

    def load(self, folder: Path) -> Any:
        return None

    def run(self, model: Any, rows: Sequence[Row]) -> list[dict[str, Any]]:
        begin = time.time()
        made = []
        for row in rows:
            height, width = row["image"].shape[:2]
            latents = np.full((8, height // 8, width // 8), row["image"][0, 0, 0] / 255, np.float16)
            made.append({"latents": latents, "flipped": False})
        wait(begin, self.seconds, self.notes)
        return made


def wait(begin: float, seconds: float, notes: str) -> None:
    """Sleep until a device batch that began then is over, and note it."""
    time.sleep(max(0.0, begin + seconds - time.time()))
    line = f"{begin:.6f} {time.time():.6f} {os.getpid()}\n"
    # One write, and the end of the file moves with it: lines of several processes do not mix.
    descriptor = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)


@cache
def scene(side: int) -> NDArray[np.uint8]:
    """Twice as wide and high as the pictures that are cut from it."""
    return natural(2 * side, 0)


def photo(side: int, number: int) -> NDArray[np.uint8]:
    """A square cut of the scene; `number` says which, of side² ones."""
    top, left = divmod(number % (side * side), side)
    return np.ascontiguousarray(scene(side)[top : top + side, left : left + side])
