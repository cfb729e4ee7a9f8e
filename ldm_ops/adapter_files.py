"""What weights that go beside a model say of themselves, and whether they fit it: JSON and file headers, no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ldm_ops.describe import PICKLED

Shapes = dict[str, tuple[int, ...]]
"""Names and shapes of the tensors of a file."""

CONTROLLED = {
    "txt2img": ("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    "img2img": ("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    "inpaint": (
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionXLInpaintPipeline",
    ),
}
"""The pipelines that take a ControlNet, by op."""

T2I_PIPELINES = {
    "StableDiffusionPipeline": "StableDiffusionAdapterPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLAdapterPipeline",
}
"""What a model with a T2I-Adapter is loaded as; no auto class of diffusers knows (0.42)."""

VAES = ("AutoencoderKL", "AutoencoderTiny")
"""Autoencoders that can stand in for a model's own."""

_LORA = re.compile(
    r"^(?P<module>.+?)\.(?:lora_(?P<a>A|B|down|up)|(?:lora|lora_linear_layer)\.(?P<b>down|up))(?:\.default(?:_\d+)?)?\.weight$"
)
_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
_OF_TRANSFORMERS = (
    "transformer.",
    "lora_transformer_",
    "diffusion_model.",
    "lora_unet_double_blocks",
    "lora_unet_single_blocks",
)
_OF_UNETS = ("unet.", "lora_unet_down_blocks", "lora_unet_mid_block", "lora_unet_up_blocks", "lora_unet_input_blocks")


class Unfit(ValueError):
    """Weights that do not fit the model, or are not of the kind that is asked for."""


def refuse_pickle(name: str) -> None:
    """Raise Unfit unless `name` is that of a safetensors file."""
    if Path(name).suffix in PICKLED:
        raise Unfit(f"{name} is pickled, which can run code when loaded; convert it to safetensors")
    if not name.endswith(".safetensors"):
        raise Unfit(f"{name} is no safetensors file; give one that ends in .safetensors")


def read_shapes(path: Path) -> Shapes:
    """The header of a safetensors file.

    Raises:
        Unfit: it is none, whatever its name says.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise Unfit(f"{path.name} is no whole safetensors file ({error})") from None


def check_lora(shapes: Shapes, model: Path) -> None:
    """Whether a LoRA (Hu et al. 2021, arXiv:2106.09685) fits the model in `model`, as far as headers tell.

    Raises:
        Unfit: no LoRA, one of another architecture, or of other sizes.
    """
    if not any("lora" in name.lower() for name in shapes):
        first = next(iter(shapes), "none")
        raise Unfit(f"holds no LoRA, its first tensor is {first}; LoHa, LoKr and whole models are none")
    pipeline = _config(model / "model_index.json").get("_class_name")
    is_unet = (model / "unet").is_dir()
    other = _OF_TRANSFORMERS if is_unet else _OF_UNETS
    if any(name.startswith(other) for name in shapes):
        made_for, has = ("a transformer", "a U-Net") if is_unet else ("a U-Net", "a transformer")
        raise Unfit(f"is made for {made_for}, the model ({pipeline}) has {has}")
    weights = {part: _weights(model / part) for part in _PARTS}
    joined = {f"lora_unet_{name.replace('.', '_')}": shape for name, shape in weights["unet"].items()}
    text_width = _config(model / "unet" / "config.json").get("cross_attention_dim")
    for name, shape in shapes.items():
        match = _LORA.match(name)
        if match is None or len(shape) < 2:
            continue
        module, is_down = match["module"], (match["a"] or match["b"]) in ("A", "down")
        part, _, inner = module.partition(".")
        inner = inner.removeprefix("text_model.")
        wanted = joined.get(module)
        if weights.get(part):
            wanted = weights[part].get(inner)
            if wanted is None:
                raise Unfit(f"changes {module}, which the model ({pipeline}) does not have")
        at = 1 if is_down else 0
        size = wanted[at] if wanted is not None else shape[at]
        if is_down and re.search(r"attn2[._]to_[kv]$", module) and isinstance(text_width, int):
            size = text_width
        if shape[at] != size:
            raise Unfit(f"is for another model: {name} has {shape[at]} channels, {pipeline} has {size} there")


def check_embedding(shapes: Shapes, model: Path, stem: str, token: str | None) -> str:
    """The token of a textual inversion (Gal et al. 2022, arXiv:2208.01618); `stem` where neither file nor job names it.

    Raises:
        Unfit: none, one for other text encoders, or a token that the tokenizer knows already.
    """
    pipeline = str(_config(model / "model_index.json").get("_class_name"))
    if not (model / "unet").is_dir() or not pipeline.startswith("StableDiffusion"):
        raise Unfit(f"textual inversion goes with Stable Diffusion 1, 2 and XL, not with {pipeline}")
    widths = [
        _config(model / part / "config.json").get("hidden_size")
        for part in ("text_encoder", "text_encoder_2")
        if (model / part).is_dir()
    ]
    names = ["clip_l", "clip_g"] if len(widths) == 2 else list(shapes)
    if len(widths) == 2 and set(shapes) != {"clip_l", "clip_g"}:
        raise Unfit(
            f"holds {', '.join(list(shapes)[:3])}; {pipeline} needs clip_l and clip_g, one for each text encoder"
        )
    if len(names) != 1 and len(widths) == 1:
        raise Unfit(f"holds {len(names)} tensors; a textual inversion for {pipeline} holds one")
    for name, width in zip(names, widths, strict=True):
        if shapes[name][-1] != width or len(shapes[name]) > 2:
            raise Unfit(f"{name} is of width {shapes[name][-1]}, the text encoder of {pipeline} of {width}")
    token = token or (stem if names[0] in ("clip_l", "emb_params", "*") else names[0])
    if token in _words(model / "tokenizer"):
        raise Unfit(f"its token {token!r} is a word of the tokenizer already; give another with token:")
    return token


def check_vae(folder: Path, model: Path) -> None:
    """Whether an autoencoder, FOLDER/vae or FOLDER itself, can stand in for the model's own.

    Raises:
        Unfit: no AutoencoderKL or AutoencoderTiny, or one with other latents.
    """
    own, other = (_config(vae_folder(place) / "config.json") for place in (model, folder))
    for config, whose, known in ((other, "is", VAES), (own, "cannot stand in for", VAES[:1])):
        if config.get("_class_name") not in known:
            found = config.get("_class_name", "folder without an autoencoder")
            raise Unfit(f"{whose} a {found}; the model's own must be AutoencoderKL, the other that or AutoencoderTiny")
    if not any(vae_folder(folder).glob("*.safetensors")):
        raise Unfit("holds no *.safetensors; save it with save_pretrained(safe_serialization=True)")
    for what, ours, theirs in (
        ("latent channels", own.get("latent_channels", 4), other.get("latent_channels", 4)),
        ("pixels a latent", _factor(own), _factor(other)),
    ):
        if ours != theirs:
            raise Unfit(f"is for another model: it has {theirs} {what}, the model's own {ours}")


def check_controlnet(folder: Path, model: Path, op: str) -> None:
    """Whether a ControlNet (Zhang et al. 2023, arXiv:2302.05543) or T2I-Adapter (Mou et al. 2023, arXiv:2302.08453)
    fits the model.

    Raises:
        Unfit: neither of them, one for another model, or a model whose `op` takes none.
    """
    config = _config(folder / "config.json")
    found = config.get("_class_name", "folder without a config.json")
    if found not in ("ControlNetModel", "T2IAdapter"):
        raise Unfit(f"is a {found}; a ControlNetModel or a T2IAdapter is needed")
    if not any(folder.glob("*.safetensors")):
        raise Unfit("holds no *.safetensors; save it with save_pretrained(safe_serialization=True)")
    pipeline = str(_config(model / "model_index.json").get("_class_name"))
    if found == "T2IAdapter":
        _check_t2i_adapter(config, pipeline, _config(model / "unet" / "config.json"), op)
        return
    if pipeline not in CONTROLLED[op]:
        raise Unfit(f"{op} with a ControlNet takes {' or '.join(CONTROLLED[op])}; the model is a {pipeline}")
    unet = _config(model / "unet" / "config.json")
    for name in ("cross_attention_dim", "block_out_channels", "addition_embed_type"):
        if config.get(name) != unet.get(name):
            raise Unfit(f"is for another model: {name} is {config.get(name)}, the model's U-Net has {unet.get(name)}")


def _check_t2i_adapter(config: dict[str, Any], pipeline: str, unet: dict[str, Any], op: str) -> None:
    if op != "txt2img":
        raise Unfit(f"is a T2IAdapter, which {op} does not take; use a ControlNetModel")
    if pipeline not in T2I_PIPELINES:
        raise Unfit(f"txt2img with a T2IAdapter takes {' or '.join(T2I_PIPELINES)}; the model is a {pipeline}")
    # What it gives is added at half the resolution where the first block has no attention, as in Stable Diffusion XL.
    kind, first = config.get("adapter_type"), (unet.get("down_block_types") or [None])[0]
    if (kind == "full_adapter_xl") != (first == "DownBlock2D"):
        raise Unfit(f"is for another model: adapter_type is {kind}, the model's U-Net begins with a {first}")
    channels, blocks = (list(value or ()) for value in (config.get("channels"), unet.get("block_out_channels")))
    if not channels or any(ours != theirs for ours, theirs in zip(channels, blocks, strict=False)):
        raise Unfit(f"is for another model: channels is {channels}, the model's U-Net has {blocks}")


def t2i_pipeline(model: Path) -> str:
    """The class of diffusers that loads `model` beside a T2I-Adapter."""
    return T2I_PIPELINES[_config(model / "model_index.json")["_class_name"]]


def is_t2i_adapter(folder: Path) -> bool:
    """Whether what `check_controlnet` has let through is a T2I-Adapter."""
    return bool(_config(folder / "config.json").get("_class_name") == "T2IAdapter")


def control_multiple(folder: Path) -> int:
    """What height and width must be a multiple of beside the model's own multiple."""
    # The pixels that its first layer folds into one place, which for XL are more than a latent's.
    return int(_config(folder / "config.json").get("downscale_factor") or 8) if is_t2i_adapter(folder) else 1


def is_tiny_vae(folder: Path) -> bool:
    """Whether an autoencoder that `check_vae` has let through is a small one, with latents of its own scale."""
    return bool(_config(folder / "config.json").get("_class_name") == "AutoencoderTiny")


def vae_folder(folder: Path) -> Path:
    """Where a folder's autoencoder is: beside the other parts of a pipeline, or alone."""
    return folder / "vae" if (folder / "vae").is_dir() else folder


def _words(tokenizer: Path) -> set[str]:
    """All that a tokenizer knows, as its files of either kind say."""
    whole = _config(tokenizer / "tokenizer.json")
    added = {one.get("content") for one in whole.get("added_tokens") or ()}
    return {*_config(tokenizer / "vocab.json"), *((whole.get("model") or {}).get("vocab") or ()), *added}


def _factor(config: dict[str, Any]) -> int:
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels") or [0] * 4
    return int(2 ** (len(blocks) - 1))


def _config(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise Unfit(f"{path} is not valid JSON ({error})") from None
    return value if isinstance(value, dict) else {}


def _weights(folder: Path) -> Shapes:
    """Shapes of the modules of one part of a model; empty where its weights are not on this machine."""
    found: Shapes = {}
    for path in folder.glob("*.safetensors"):
        # A part that has still to be fetched is stood in for by an empty file.
        if path.stat().st_size:
            found |= read_shapes(path)
    return {
        name.removesuffix(".weight").removeprefix("text_model."): shape
        for name, shape in found.items()
        if name.endswith(".weight")
    }
