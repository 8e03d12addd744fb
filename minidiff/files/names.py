"""The table between the names of the official single files and the hub's layout.

The models carry the parameter names of the single files. A folder in the hub's
diffusers layout names the transformer's and the autoencoder's tensors otherwise;
:func:`transformer_sources` and :func:`vae_sources` are the one table between the two,
used for reading and for writing. Text encoders have one set of names in both layouts.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """The stored tensors that make one of ours, and how.

    ``how``: "copy"; "stack" (their rows, one below the other); "swap" (the halves of
    the rows change places); "conv" (a matrix that we hold as a 1×1 convolution);
    "identity" (an identity matrix that is not stored).
    """

    names: tuple[str, ...]
    how: str = "copy"


def transformer_sources(names: Iterable[str]) -> dict[str, Source]:
    """Where diffusers' SD3Transformer2DModel keeps each of MMDiT's tensors ``names``.

    diffusers stores the last layer's and the last context block's modulation as
    (scale, shift); the official files, and we, as (shift, scale).
    """
    names = list(names)
    blocks = [int(m[1]) for n in names if (m := re.match(r"joint_blocks\.(\d+)\.", n))]
    last = f"joint_blocks.{max(blocks, default=0)}.context_block.adaLN_modulation"
    return {name: _transformer_source(name, last) for name in names}


def _transformer_source(name: str, last: str) -> Source:
    parts = re.findall(r"^(?:joint_blocks\.(\d+)\.)?(.*?)(\.weight|\.bias)?$", name)
    block, inner, end = parts[0]
    prefix = f"transformer_blocks.{block}." if block else ""
    stored = (BLOCK if block else TRANSFORMER).get(inner, inner).split()
    swap = name.startswith((last, "final_layer.adaLN_modulation"))
    how = "stack" if len(stored) > 1 else "swap" if swap else "copy"
    return Source(tuple(prefix + s + end for s in stored), how)


def vae_sources(names: Iterable[str]) -> dict[str, Source]:
    """Where diffusers' AutoencoderKL keeps each of the VAE's tensors ``names``.

    diffusers counts the decoder's levels from the latents, the official files, and
    we, from the pixels; it holds the attention's 1×1 convolutions as matrices.
    """
    names = list(names)
    levels = [int(m[1]) for n in names if (m := re.match(r"decoder\.up\.(\d+)\.", n))]
    return {name: _vae_source(name, max(levels, default=0)) for name in names}


def _vae_source(name: str, top: int) -> Source:
    stored = re.sub(r"\bup\.(\d+)", lambda m: f"up_blocks.{top - int(m[1])}", name)
    stored = re.sub(r"\bdown\.(\d+)", r"down_blocks.\1", stored)
    stored = re.sub(r"\bblock\.(\d+)", r"resnets.\1", stored)
    for ours, theirs in VAE.items():
        stored = re.sub(rf"\b{re.escape(ours)}\b", theirs, stored)
    conv = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
    return Source((stored,), "conv" if conv else "copy")


def same_names(names: Iterable[str]) -> dict[str, Source]:
    return {name: Source((name,)) for name in names}


TRANSFORMER = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
BLOCK = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
VAE = {
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    "mid.attn_1.q": "mid_block.attentions.0.to_q",
    "mid.attn_1.k": "mid_block.attentions.0.to_k",
    "mid.attn_1.v": "mid_block.attentions.0.to_v",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
    "nin_shortcut": "conv_shortcut",
    "downsample.conv": "downsamplers.0.conv",
    "upsample.conv": "upsamplers.0.conv",
    "norm_out": "conv_norm_out",
}


Rename = Callable[[Iterable[str]], dict[str, Source]]
RENAMES: dict[str, Rename] = {
    "SD3Transformer2DModel": transformer_sources,
    "AutoencoderKL": vae_sources,
}
