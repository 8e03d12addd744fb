"""A transformer and a complete pipeline with small random weights, in our classes."""

from pathlib import Path

import torch
from helpers import randomize
from pipelines import save_tokenizers
from torch import Tensor

from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.flow_matching import Scheduler
from minidiff.sampling import Pipeline
from minidiff.text_encoders import CLIPTextConfig, CLIPTextEncoder, T5Config, T5Encoder
from minidiff.tokenizer import CLIPTokenizer, T5Tokenizer
from minidiff.vae import VAE, VAEConfig

TRANSFORMER = MMDiTConfig(
    sample_size=8,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=48,
    pooled_projection_dim=40,
    pos_embed_max_size=12,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)
AUTOENCODER = VAEConfig(block_out_channels=(32, 32, 64), layers_per_block=1)


def inputs(
    config: MMDiTConfig,
    batch: int = 2,
    height: int = 8,
    width: int = 12,
    length: int = 7,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents (B, C, H, W), levels (B,), context (B, L, D), pooled vectors (B, P)."""
    return (
        torch.randn(batch, config.in_channels, height, width),
        torch.linspace(0.2, 0.9, batch),
        torch.randn(batch, length, config.joint_attention_dim),
        torch.randn(batch, config.pooled_projection_dim),
    )


def transformer(config: MMDiTConfig = TRANSFORMER) -> MMDiT:
    """A transformer that does not learn."""
    return randomize(MMDiT(config)).requires_grad_(False)


def clip(tokenizer: CLIPTokenizer, width: int, act: str) -> CLIPTextConfig:
    length = tokenizer.model_max_length
    sizes = (tokenizer.vocab_size, width, 2 * width, 3, 1, length, act)
    return CLIPTextConfig(*sizes, projection_dim=width, eos_token_id=2)


def small_pipeline(folder: Path) -> Pipeline:
    """Random weights; CLIP-L's projection is the identity, as in the official files."""
    save_tokenizers(folder)
    first, second = (
        CLIPTokenizer.from_pretrained(folder / n) for n in ("tokenizer", "tokenizer_2")
    )
    third = T5Tokenizer.from_pretrained(folder / "tokenizer_3")
    t5 = T5Config(third.vocab_size + 3, 48, 8, 40, 2, 4)
    encoders = [
        CLIPTextEncoder(clip(first, 16, "quick_gelu")),
        CLIPTextEncoder(clip(second, 24, "gelu")),
        T5Encoder(t5),
    ]
    models = [*encoders, MMDiT(TRANSFORMER), VAE(AUTOENCODER)]
    for seed, model in enumerate(models):
        randomize(model, seed)
    with torch.no_grad():
        encoders[0].text_projection.weight.copy_(torch.eye(16))
    pipe = Pipeline([first, second, third], encoders, *models[3:], Scheduler(3.0))
    pipe.progress = False
    return pipe
