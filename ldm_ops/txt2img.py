"""Text to image with any pipeline that diffusers' AutoPipelineForText2Image loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from ldm_ops.op import Row
from ldm_ops.sampling import Pipeline, Sampling


class Txt2Img(Sampling):
    """Prompt → image."""

    reads: ClassVar[frozenset[str]] = Sampling.reads | {"height", "width"}

    height: int | None = Field(None, ge=8, description="px; the model's own size where left out")
    width: int | None = Field(None, ge=8, description="px; the model's own size where left out")

    def _pipeline_class(self, folder: Path) -> Any:
        from diffusers import AutoPipelineForText2Image

        return AutoPipelineForText2Image

    def _inputs(self, model: Pipeline, rows: Sequence[Row]) -> dict[str, Any]:
        if model.controlled:
            # The control image came in at the size that the picture is to have.
            height, width = rows[0]["control_image"].shape[:2]
            return {"height": height, "width": width}
        return {"height": rows[0]["height"], "width": rows[0]["width"]}
