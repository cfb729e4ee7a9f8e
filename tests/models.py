"""Real diffusers pipelines, small enough to load in a second; weights are random, and not zero."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMSuperResolutionPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from ldm_ops.builtin.words import write_tokenizer

WIDTH = 32


def tokenizer() -> CLIPTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return write_tokenizer(Path(folder))


def text_config(words: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def vae(**config: object) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        **config,
    )


def unet(**config: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        **{
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": WIDTH,
            **config,
        },
    )


def noise() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=False,
    )


def tiny_stable_diffusion(checker: StableDiffusionSafetyChecker | None = None) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    words = tokenizer()
    size = {"height": 32, "width": 32}
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(words)),
        tokenizer=words,
        unet=unet(),
        scheduler=noise(),
        safety_checker=checker,
        feature_extractor=CLIPImageProcessorPil(size=size, crop_size=size) if checker else None,
        requires_safety_checker=checker is not None,
    )


def tiny_sdxl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    words = tokenizer()
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(words)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(words)),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        scheduler=noise(),
    )


def tiny_sd3() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    words = tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.0609, scaling_factor=1.5),
        text_encoder=CLIPTextModelWithProjection(text_config(words)),
        tokenizer=words,
        text_encoder_2=CLIPTextModelWithProjection(text_config(words)),
        tokenizer_2=words,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def save_sd3(folder: Path) -> None:
    """SD3 without its T5: the empty places are named in the index, as in a folder that lacks it on purpose."""
    tiny_sd3().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    empty = {name: [None, None] for name in ("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor")}
    (folder / "model_index.json").write_text(json.dumps(index | empty))


def save_sdxl(folder: Path) -> None:
    tiny_sdxl().save_pretrained(folder)


def tiny_inpainting() -> StableDiffusionInpaintPipeline:
    """An inpainting model proper: its U-Net sees latents, mask and masked image."""
    pipe = tiny_stable_diffusion()
    torch.manual_seed(1)
    parts = {**pipe.components, "unet": unet(in_channels=9, out_channels=4)}
    return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def tiny_ldm_x4() -> LDMSuperResolutionPipeline:
    torch.manual_seed(0)
    return LDMSuperResolutionPipeline(
        vqvae=VQModel(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            latent_channels=3,
            num_vq_embeddings=64,
            norm_num_groups=4,
            mid_block_add_attention=False,
        ),
        unet=UNet2DModel(
            sample_size=16,
            in_channels=6,
            out_channels=3,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            block_out_channels=(16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            add_attention=False,
        ),
        scheduler=noise(),
    )


def tiny_sd_x4() -> StableDiffusionUpscalePipeline:
    torch.manual_seed(0)
    words = tokenizer()
    return StableDiffusionUpscalePipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.08333,
        ),
        text_encoder=CLIPTextModel(text_config(words)),
        tokenizer=words,
        unet=unet(in_channels=7, out_channels=4, num_class_embeds=1000),
        low_res_scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02),
        scheduler=noise(),
        max_noise_level=350,
    )


def safety_checker(flags: bool) -> StableDiffusionSafetyChecker:
    """A checker that flags every picture, or none: its thresholds say so."""
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 100},
        vision_config={**tower, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    checker = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        checker.concept_embeds.normal_()
        checker.concept_embeds_weights.fill_(-2.0 if flags else 2.0)
        checker.special_care_embeds_weights.fill_(2.0)
    return checker


def save_lora(pipe: DiffusionPipeline, folder: Path, seed: int, text: bool = False, rank: int = 4) -> Path:
    """A random LoRA for the U-Net or transformer of `pipe`, of its text encoder too where asked."""
    torch.manual_seed(seed)
    options = {"r": rank, "lora_alpha": 2 * rank, "init_lora_weights": False}
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    backbone = getattr(pipe, name)
    backbone.add_adapter(LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"], **options))
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(backbone)}
    if text:
        pipe.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], **options))
        layers["text_encoder_lora_layers"] = get_peft_model_state_dict(pipe.text_encoder)
    pipe.save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"


def save_controlnet(model: UNet2DConditionModel, folder: Path, seed: int = 0) -> Path:
    """A random ControlNet for a U-Net, its last layers too, which are zero in a new one."""
    torch.manual_seed(seed)
    controlnet = ControlNetModel.from_unet(model)
    for weight in controlnet.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.2)
    controlnet.save_pretrained(folder)
    return folder


def save_t2i_adapter(folder: Path, kind: str = "full_adapter", in_channels: int = 3, **config: object) -> Path:
    """A random T2I-Adapter for `tiny_attentive`, or with `full_adapter_xl` for `tiny_sdxl`."""
    torch.manual_seed(5)
    values = {"channels": [16, 32], "num_res_blocks": 1, "downscale_factor": 16 if kind.endswith("xl") else 8, **config}
    adapter = T2IAdapter(in_channels=in_channels, adapter_type=kind, **values)
    for weight in adapter.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    adapter.save_pretrained(folder)
    return folder


def tiny_attentive() -> StableDiffusionPipeline:
    """`tiny_stable_diffusion` whose first block has attention, as that of Stable Diffusion 1 and 2."""
    pipe = tiny_stable_diffusion()
    torch.manual_seed(2)
    attentive = unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
    )
    return StableDiffusionPipeline(**{**pipe.components, "unet": attentive}, requires_safety_checker=False)


def save_embedding(folder: Path, token: str, vectors: int = 1, seed: int = 0, width: int = WIDTH) -> Path:
    """A textual inversion in diffusers' layout."""
    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    save_file({token: torch.randn(vectors, width)}, folder / "learned_embeds.safetensors")
    return folder / "learned_embeds.safetensors"


def save_vae(folder: Path, seed: int = 9) -> Path:
    """Another autoencoder that fits the tiny models."""
    torch.manual_seed(seed)
    vae().save_pretrained(folder)
    return folder


def t5() -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A T5 whose tokens are words, with the words of the captions here."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    words |= {word: i for i, word in enumerate(["a", "red", "blue", "circle", "ring", "on", "background"], len(words))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = T5Config(vocab_size=len(words), d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return T5EncoderModel(config), PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def tiny_flux() -> FluxPipeline:
    """The text side alone: CLIP's pooled state and T5's tokens."""
    torch.manual_seed(0)
    words = tokenizer()
    encoder, pieces = t5()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=CLIPTextModel(text_config(words)),
        tokenizer=words,
        text_encoder_2=encoder,
        tokenizer_2=pieces,
        transformer=None,
    )


def tiny_pixart() -> PixArtAlphaPipeline:
    """The text side alone: T5's tokens under an attention mask."""
    torch.manual_seed(0)
    encoder, pieces = t5()
    return PixArtAlphaPipeline(
        tokenizer=pieces, text_encoder=encoder, vae=None, transformer=None, scheduler=DDIMScheduler()
    )


def whole_flux() -> FluxPipeline:
    """`tiny_flux` with a denoiser and an autoencoder."""
    text = tiny_flux()
    torch.manual_seed(3)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=[4, 4, 8],
    )
    parts = {**text.components, "transformer": transformer, "vae": vae(shift_factor=0.1, scaling_factor=0.4)}
    return FluxPipeline(**parts)


def whole_pixart() -> PixArtAlphaPipeline:
    """`tiny_pixart` with a denoiser and an autoencoder; it denoises at 256 px, its smallest."""
    text = tiny_pixart()
    torch.manual_seed(3)
    transformer = PixArtTransformer2DModel(
        sample_size=32,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
    )
    return PixArtAlphaPipeline(**{**text.components, "transformer": transformer, "vae": vae()})
