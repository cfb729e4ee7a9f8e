"""The stages that a job may list: an op each, the pool that runs it, and the way in for images where it takes them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, Field, model_validator

from ldm_ops.decode import Decode
from ldm_ops.embed import Embed
from ldm_ops.encode import Encode
from ldm_ops.img2img import Img2Img
from ldm_ops.inpaint import Inpaint
from ldm_ops.op import Op
from ldm_ops.txt2img import Txt2Img
from ldm_ops.upscale import Upscale

RowParameter = Literal[
    "prompt",
    "negative_prompt",
    "seed",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "scheduler",
    "strength",
    "image",
    "mask_image",
    "latents",
]
ROW_PARAMETERS: tuple[str, ...] = get_args(RowParameter)
"""Columns of a table that may set a parameter of their row, in the order of `PlannedRow.values`."""

Resize = Literal["exact", "fit", "fill", "nearest_multiple"]


class Pool(BaseModel):
    """How a stage is spread over the cluster.

    Only `batch_size`, and on a CPU `num_threads`, can change the last bits of a picture: the plan freezes both.
    """

    batch_size: int = Field(8, ge=1, le=4096, description="rows of one device call")
    workers: Annotated[int, Field(ge=1, le=100_000)] | Literal["auto"] = Field(
        "auto", description="processes that hold the model; auto is one per GPU, or per CPU core where num_gpus is 0"
    )
    num_gpus: float = Field(0, ge=0, le=64, description="GPUs of one worker; a fraction shares one")
    num_cpus: float | None = Field(None, gt=0, description="CPU share of one worker; fitted to the machine if left out")
    num_threads: int = Field(
        1, ge=1, le=1024, description="torch threads of one worker; more workers beat more threads while memory lasts"
    )
    keep: bool = Field(False, description="of a stage that is not the last: write its pictures too")

    op_class: ClassVar[type[Op]]

    def bare(self) -> Op:
        """The op without its pool."""
        return self.op_class(**self.model_dump(include=set(self.op_class.model_fields)))


class ImageInput(BaseModel):
    """How an image of any kind and size becomes what the op takes."""

    resize: Resize | None = Field(
        None,
        description="fill cuts to height × width, fit stays inside them, nearest_multiple keeps the image's own size "
        "as near as the model allows, exact refuses any other; fill where height and width are given, else "
        "nearest_multiple",
    )
    height: int | None = Field(None, ge=8, description="px; the image's own where left out")
    width: int | None = Field(None, ge=8, description="px; the image's own where left out")


class Buckets(ImageInput):
    """How images of any shape become a few shapes of about the same area, as trainings on SDXL and later do."""

    resolution: int | None = Field(
        None, ge=16, le=16384, description="px; every image gets the bucket of at most resolution² nearest to its shape"
    )
    bucket_multiple: int = Field(64, ge=8, le=1024, description="sides of buckets are multiples of it")
    max_aspect_ratio: float = Field(2.0, ge=1, le=16, description="of a bucket's longer side to its shorter")

    @model_validator(mode="after")
    def _one_policy(self) -> Buckets:
        if self.resolution is not None and (self.height or self.width or self.resize):
            raise ValueError("resolution makes buckets; leave height, width and resize out")
        if self.resolution is not None and self.resolution < self.bucket_multiple:
            raise ValueError(f"resolution {self.resolution} is less than bucket_multiple {self.bucket_multiple}")
        return self


class Background(BaseModel):
    """What shows through transparent pixels."""

    background: Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")] = Field(
        "#ffffff", description="colour behind transparent pixels, #rrggbb"
    )


class Txt2ImgStage(Pool, Txt2Img):
    """Prompt → image."""

    op: Literal["txt2img"]
    op_class: ClassVar[type[Op]] = Txt2Img


class Img2ImgStage(Pool, ImageInput, Background, Img2Img):
    """Image + prompt → image."""

    op: Literal["img2img"]
    op_class: ClassVar[type[Op]] = Img2Img


class InpaintStage(Pool, ImageInput, Background, Inpaint):
    """Image + mask + prompt → image."""

    op: Literal["inpaint"]
    op_class: ClassVar[type[Op]] = Inpaint


class UpscaleStage(Pool, Background, Upscale):
    """Image → image, four times as wide and high."""

    op: Literal["upscale"]
    op_class: ClassVar[type[Op]] = Upscale


class EncodeStage(Pool, Buckets, Background, Encode):
    """Image → latents."""

    op: Literal["encode"]
    op_class: ClassVar[type[Op]] = Encode


class DecodeStage(Pool, Decode):
    """Latents → image."""

    op: Literal["decode"]
    op_class: ClassVar[type[Op]] = Decode


class EmbedStage(Pool, Embed):
    """Caption → text embedding."""

    op: Literal["embed"]
    op_class: ClassVar[type[Op]] = Embed


AnyStage = Txt2ImgStage | Img2ImgStage | InpaintStage | UpscaleStage | EncodeStage | DecodeStage | EmbedStage
Stage = Annotated[AnyStage, Field(discriminator="op")]
STAGES: dict[str, type[AnyStage]] = {
    "txt2img": Txt2ImgStage,
    "img2img": Img2ImgStage,
    "inpaint": InpaintStage,
    "upscale": UpscaleStage,
    "encode": EncodeStage,
    "decode": DecodeStage,
    "embed": EmbedStage,
}
SCALES = {"upscale": 4}
"""How much larger a stage's picture is than its image, per side."""


def row_parameters(stage: AnyStage) -> frozenset[str]:
    """The columns that set a parameter of `stage`, where it is a job's first; `height` and `width` among them."""
    own = {name for name in ("height", "width") if name in type(stage).model_fields}
    # Latents keep their captions, which a training joins to their embeddings.
    captions = {"prompt"} if stage.op in ("encode", "decode") else set()
    return (stage.reads & frozenset(ROW_PARAMETERS)) | own | captions


def output_settings(stage: AnyStage, first: bool) -> dict[str, Any]:
    """What, beside a row's own parameters and the weights, decides over the bits of the stage's pictures."""
    left_out = set(Pool.model_fields) | stage.run_only | {"model", "revision"}
    if first:
        left_out |= row_parameters(stage) | {"num_images_per_prompt"}
    return stage.model_dump(mode="json", exclude=left_out)
