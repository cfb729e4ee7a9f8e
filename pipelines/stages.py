"""The stages that a job may list: an op each, the pool that runs it, and the way in for images where it takes them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from ldm_ops.decode import Decode
from ldm_ops.describe import PLAIN_UPSCALER, ModelFacts
from ldm_ops.embed import Embed
from ldm_ops.encode import Encode
from ldm_ops.img2img import Img2Img
from ldm_ops.inpaint import Inpaint
from ldm_ops.op import Op
from ldm_ops.sampling import ModelName
from ldm_ops.txt2img import Txt2Img
from ldm_ops.upscale import Upscale
from pipelines.alternatives import one_of
from pipelines.batch_size import BatchSize

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
    "control_image",
    "controlnet_conditioning_scale",
    "lora",
    "lora_scale",
]
ROW_PARAMETERS: tuple[str, ...] = get_args(RowParameter)
"""Columns of a table that may set a parameter of their row, in the order of `PlannedRow.values`."""

Resize = Literal["exact", "fit", "fill", "nearest_multiple"]
ImageDecoding = Literal["exact", "draft"]


class Range(BaseModel):
    """As many as fit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: int = Field(1, ge=1, le=100_000, description="fewer than these are refused")
    max: int = Field(ge=1, le=100_000, description="the most that are started")

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,126}$")]
LabelValue = Annotated[
    str, StringConstraints(pattern=r"^!?([A-Za-z0-9][A-Za-z0-9._-]{0,62}|in\([A-Za-z0-9._, -]{1,500}\))$")
]
Workers = Annotated[
    Annotated[int, Field(ge=1, le=100_000)] | Literal["auto"] | Range,
    one_of("a number from 1 to 100000, auto, or as many as fit, such as {min: 2, max: 8}"),
]


class Pool(BaseModel):
    """How a stage is spread over the cluster.

    Only `batch_size`, and on a CPU `num_threads`, can change the last bits of a picture: the plan freezes both.
    """

    batch_size: BatchSize = Field(
        8,
        description="rows of one device call: a number; auto measures what is fastest; {px: rows} where pictures of up "
        "to so many pixels take so many",
    )
    workers: Workers = Field(
        "auto",
        description="processes that hold the model; auto is one per GPU, or per CPU core where num_gpus is 0; {min, "
        "max} takes as many as fit",
    )
    num_gpus: float = Field(0, ge=0, le=64, description="GPUs of one worker; a fraction shares one")
    num_cpus: float | None = Field(None, gt=0, description="CPU share of one worker; fitted to the machine if left out")
    accelerator_type: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] | None = Field(
        None, description="GPUs that the workers need, by Ray's name: T4, L4, A100, H100, H200"
    )
    labels: dict[Label, LabelValue] = Field(
        default_factory=dict, description="labels that a node must have for the workers, as of `ray start --labels`"
    )
    num_threads: int = Field(
        1, ge=1, le=1024, description="torch threads of one worker; more workers beat more threads while memory lasts"
    )
    batch_timeout_s: float = Field(
        3600,
        gt=0,
        le=7 * 86400,
        description="seconds after which a worker that hangs in one device call is ended; a row that does it alone, "
        "too, fails with worker.timeout",
    )
    keep: bool = Field(False, description="of a stage that is not the last: write its pictures too")

    op_class: ClassVar[type[Op]]

    @model_validator(mode="after")
    def _gpus(self) -> Pool:
        if self.accelerator_type is not None and not self.num_gpus:
            raise ValueError("accelerator_type without num_gpus; give num_gpus, or leave it out")
        if self.num_gpus > 1 and self.num_gpus % 1:
            raise ValueError(f"num_gpus {self.num_gpus:g}: only less than one GPU can be shared; give a whole number")
        return self

    def bare(self) -> Op:
        """The op without its pool."""
        return self.op_class(**self.model_dump(include=set(self.op_class.model_fields)))


class Resized(BaseModel):
    """How an image of any size is brought to one that the op takes."""

    resize: Resize | None = Field(
        None,
        description="fill cuts to height × width, fit stays inside them, nearest_multiple keeps the image's own size "
        "as near as the model allows, exact refuses any other; fill where height and width are given, else "
        "nearest_multiple",
    )


class ImageInput(Resized):
    """How an image of any kind and size becomes what the op takes."""

    height: int | None = Field(None, ge=8, description="px; the image's own where left out")
    width: int | None = Field(None, ge=8, description="px; the image's own where left out")
    image_decoding: ImageDecoding = Field(
        "exact",
        description="draft lets a JPEG's decoder scale down by 2, 4 or 8 where the target is that much smaller: "
        "several times faster, and slightly other pixels",
    )


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


class Reference(BaseModel):
    """Weights in a folder of their own; a text alone is the `model`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelName = Field(description="builtin:NAME, a hub id such as org/name, a local folder, or s3://… of one")
    revision: str | None = Field(None, description="commit or tag of a hub model; needed there, and only there")
    variant: str | None = Field(None, description="weight file variant, such as fp16")


class FileReference(BaseModel):
    """Weights in one file; a text alone is the `model`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelName = Field(description="a safetensors file or a folder with one, local or s3://…, or a hub id")
    revision: str | None = Field(None, description="commit or tag of a hub model; needed there, and only there")
    weight_name: str | None = Field(
        None, description="of a hub model or a folder: the file; diffusers' own name if left out"
    )


class LoraReference(FileReference):
    """A LoRA that rows can name."""

    scale: float = Field(1.0, ge=-10, le=10, description="multiplied with the row's lora_scale")


class EmbeddingReference(FileReference):
    """A textual inversion."""

    token: str | None = Field(None, description="what stands for it in prompts; the file's own, else its name")


def _as_mapping(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


AnyReference = Annotated[Reference, BeforeValidator(_as_mapping, json_schema_input_type=str | Reference)]
AnyLora = Annotated[LoraReference, BeforeValidator(_as_mapping, json_schema_input_type=str | LoraReference)]
AnyEmbedding = Annotated[
    EmbeddingReference, BeforeValidator(_as_mapping, json_schema_input_type=str | EmbeddingReference)
]
REFERENCES: dict[str, type[BaseModel]] = {
    "vae": Reference,
    "controlnet": Reference,
    "textual_inversion": EmbeddingReference,
    "loras": LoraReference,
}
"""What stands in the fields of a stage that name other weights than its model."""

LoraName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]


class Adapted(BaseModel):
    """What a stage can have beside its model."""

    vae: AnyReference | None = Field(None, description="an AutoencoderKL or AutoencoderTiny instead of the model's own")
    textual_inversion: list[AnyEmbedding] = Field(
        default_factory=list, description="embeddings of new tokens in prompts"
    )
    loras: dict[LoraName, AnyLora] = Field(
        default_factory=dict, description="LoRAs by the name that rows choose them by"
    )
    lora: str | None = Field(
        None, min_length=1, description="of rows that bring none: a name in loras, a safetensors file, 'a + b', or none"
    )
    lora_scale: float = Field(1.0, ge=-10, le=10, description="of rows that bring none")
    controlnet: AnyReference | None = Field(
        None, description="a ControlNetModel, or in txt2img a T2IAdapter; each row brings a control_image"
    )
    controlnet_conditioning_scale: float | None = Field(
        None,
        ge=0,
        le=10,
        description="weight of the ControlNet or T2IAdapter, of rows that bring none; 1.0 if left out",
    )

    @model_validator(mode="after")
    def _controlled(self) -> Adapted:
        if self.controlnet is None and self.controlnet_conditioning_scale is not None:
            raise ValueError("controlnet_conditioning_scale without a controlnet; give one, or leave it out")
        if "none" in self.loras:
            raise ValueError("loras.none: none is without a LoRA; choose another name")
        return self


class Txt2ImgStage(Pool, Adapted, Txt2Img, Resized, Background):
    """Prompt → image; `resize` and `background` are of its control image."""

    op: Literal["txt2img"]
    op_class: ClassVar[type[Op]] = Txt2Img

    @model_validator(mode="after")
    def _resizes_something(self) -> Txt2ImgStage:
        if self.resize is not None and self.controlnet is None:
            raise ValueError("resize is of control images, and there is no controlnet; leave it out")
        return self


class Img2ImgStage(Pool, Adapted, ImageInput, Background, Img2Img):
    """Image + prompt → image."""

    op: Literal["img2img"]
    op_class: ClassVar[type[Op]] = Img2Img


class InpaintStage(Pool, Adapted, ImageInput, Background, Inpaint):
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


def reads(stage: AnyStage) -> frozenset[str]:
    """The columns of a row that the op looks at."""
    control = isinstance(stage, Adapted) and stage.controlnet is not None
    return stage.reads | ({"control_image"} if control else frozenset())


def row_parameters(stage: AnyStage, facts: ModelFacts | None = None) -> frozenset[str]:
    """The columns that set a parameter of `stage`, where it is a job's first; `height` and `width` among them.

    With `facts` only those that its model takes notice of.
    """
    # Buckets make the sizes: then a table's own tell of the images that are there.
    bucketed = isinstance(stage, Buckets) and stage.resolution is not None
    own = {name for name in ("height", "width") if name in type(stage).model_fields and not bucketed}
    blind = {"negative_prompt", "guidance_scale"} if facts is not None and facts.pipeline == PLAIN_UPSCALER else set()
    # Latents keep their captions, which a training joins to their embeddings.
    captions = {"prompt"} if stage.op in ("encode", "decode") else set()
    adapters = {"lora", "lora_scale"} if isinstance(stage, Adapted) else set()
    if "control_image" in reads(stage):
        adapters.add("controlnet_conditioning_scale")
    return (reads(stage) & frozenset(ROW_PARAMETERS) - blind) | own | captions | adapters


def not_output(stage: AnyStage) -> set[str]:
    """Fields that change no picture, or by their spelling alone: weights are told by their content (see `adapters`)."""
    takes_image = not {"image", "control_image"}.isdisjoint(reads(stage))
    unused = set() if takes_image else {"resize", "background"}
    wanted = getattr(stage, "accelerate", None)
    if wanted is None or not wanted.asks_for_something:
        unused.add("accelerate")
    return {"model", "revision"} | set(Adapted.model_fields) | stage.run_only | unused


def output_settings(stage: AnyStage, first: bool) -> dict[str, Any]:
    """What, beside a row's own parameters and all weights, decides over the bits of the stage's pictures."""
    left_out = set(Pool.model_fields) | not_output(stage)
    if first:
        left_out |= row_parameters(stage) | {"num_images_per_prompt"}
    return stage.model_dump(mode="json", exclude=left_out)
