"""Pipelines with random tiny weights, in diffusers' classes and in ours."""

from pathlib import Path

import torch
from helpers import randomize

import minidiff
from minidiff.sampling import Pipeline
from minidiff.tokenizer import CLIPTokenizer, T5Tokenizer

TEXTS = [
    "a red dress on a blue background",
    "a photo of a green bag with a white background",
    "an orange coat left of a pink shirt on a black background",
]


def save_tokenizers(folder: Path, t5: bool = True) -> None:
    """Train small tokenizers and save them under the pipeline's names."""
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        tokenizer = CLIPTokenizer.train(TEXTS, 560, model_max_length=12, pad_token=pad)
        tokenizer.save_pretrained(folder / name)
    if t5:
        T5Tokenizer.train(TEXTS, 120, 8, model_max_length=20).save_pretrained(
            folder / "tokenizer_3"
        )


def load_tokenizers(folder: Path, t5: bool = True) -> dict:
    """transformers' tokenizers for what :func:`save_tokenizers` wrote."""
    from transformers import AutoTokenizer, CLIPTokenizer

    found = {
        name: CLIPTokenizer.from_pretrained(folder / name)
        for name in ("tokenizer", "tokenizer_2")
    }
    third = AutoTokenizer.from_pretrained(folder / "tokenizer_3") if t5 else None
    return found | {"tokenizer_3": third}


def reference_pipeline(
    tokenizers: dict, dual: tuple[int, ...] = (), t5: bool = True, shift: float = 3.0
):
    """diffusers' StableDiffusion3Pipeline with random tiny weights, float32."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
    )

    torch.manual_seed(0)
    clips = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizers[name]),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=3,
                num_attention_heads=2,
                max_position_embeddings=tokenizers[name].model_max_length,
                hidden_act=act,
                projection_dim=width,
                bos_token_id=0,
                eos_token_id=2,
            )
        )
        for name, width, act in (
            ("tokenizer", 16, "quick_gelu"),
            ("tokenizer_2", 24, "gelu"),
        )
    ]
    encoder = None
    if t5:
        encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizers["tokenizer_3"]) + 3,
                d_model=48,
                d_kv=8,
                d_ff=40,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
            )
        )
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=40,
        out_channels=16,
        pos_embed_max_size=12,
        dual_attention_layers=dual,
        qk_norm="rms_norm",
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for seed, part in enumerate([*clips, encoder, transformer, vae]):
        if part is not None:
            randomize(part, seed)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=clips[0],
        text_encoder_2=clips[1],
        text_encoder_3=encoder,
        **tokenizers,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pair(folder: Path):
    """Our pipeline and diffusers', of the same random tiny weights."""
    import minidiff

    save_tokenizers(folder / "parts")
    reference = reference_pipeline(load_tokenizers(folder / "parts"))
    reference.save_pretrained(folder / "saved")
    pipe = minidiff.load(folder / "saved")
    pipe.progress = False
    return pipe, reference


def halved(folder: Path) -> Pipeline:
    """The pipeline of a folder, with weights that half precision holds."""
    pipe = minidiff.load(folder, fast=False)
    pipe.progress = False
    for part in (*pipe.text_encoders, pipe.transformer, pipe.vae):
        for x in (*part.parameters(), *part.buffers()):
            x.data = x.data.half().float()
    return pipe
