"""Image to image (SDEdit, Meng et al. 2021, arXiv:2108.01073) with AutoPipelineForImage2Image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from ldm_ops.op import Row
from ldm_ops.pixels import from_uint8
from ldm_ops.sampling import Pipeline, Sampling


class Img2Img(Sampling):
    """Image + prompt → image of the same size.

    A row brings `image`, uint8 (H, W, 3) whose sides the model can take, and `strength` in (0, 1]: the share of the
    steps that is done, from the image with noise of that level. All images of a batch have one size.
    """

    reads: ClassVar[frozenset[str]] = Sampling.reads | {"image", "strength"}

    strength: float = Field(0.8, gt=0, le=1, description="how far from the image: share of the steps that is done")

    def _pipeline_class(self, folder: Path) -> Any:
        from diffusers import AutoPipelineForImage2Image

        return AutoPipelineForImage2Image

    def _inputs(self, model: Pipeline, rows: Sequence[Row]) -> dict[str, Any]:
        return {"image": from_uint8([row["image"] for row in rows]), "strength": rows[0]["strength"]}
