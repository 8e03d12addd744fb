"""The official single files: transformer and autoencoder in one, an encoder in each.

``sd3.5_large.safetensors`` holds the transformer's tensors under
``model.diffusion_model.`` and the autoencoder's under ``first_stage_model.``, with the
names that our models have. There is no config.json: sizes are read off the shapes. The
text encoders lie beside it or in ``text_encoders/``: ``clip_l``, ``clip_g``, ``t5xxl``.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

from minidiff.files import weights
from minidiff.files.disk import excerpt
from minidiff.files.layout import make_config
from minidiff.files.weights import Prepared, Source, TensorFile

Shapes = Mapping[str, tuple[int, ...]]

TRANSFORMER, VAE = "model.diffusion_model.", "first_stage_model."
# Other programs put copies of the text encoders in the file; ours are read from theirs.
IGNORED = ("text_encoders.", "cond_stage_model.", "conditioner.")
PROJECTION, IDENTITY = "text_projection.weight", Source((), "identity")
TEXT_ENCODERS = {
    "text_encoder": ("clip_l.safetensors",),
    "text_encoder_2": ("clip_g.safetensors",),
    "text_encoder_3": ("t5xxl_fp16.safetensors", "t5xxl_fp8_e4m3fn.safetensors"),
}


def under(shapes: Shapes, prefix: str) -> Shapes:
    """The tensors below ``prefix``, without it."""
    return {
        n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)
    }


def count(shapes: Shapes, pattern: str) -> int:
    """How many layers there are, one more than the largest number in ``pattern``."""
    found = (re.match(pattern.format(r"([0-9]{1,9})\."), name) for name in shapes)
    layers = max((int(match[1]) for match in found if match), default=-1) + 1
    if layers > len(shapes):
        raise ValueError(f"it numbers {layers} layers and has {len(shapes)} tensors")
    return layers


def shape_of(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read off; ValueError for another kind."""
    shape = shapes[name]
    if len(shape) != dimensions or 0 in shape:
        found = f"{name} has shape {excerpt(list(shape))}"
        raise ValueError(f"{found}; expected {dimensions} dimensions, none of them 0")
    return shape


# Sizes, as the keys of the hub's config.json


def transformer_sizes(shapes: Shapes) -> dict[str, Any]:
    """An MMDiT's sizes from the shapes of its tensors."""
    width, channels, patch, _ = shape_of(shapes, "x_embedder.proj.weight", 4)
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    head = shape_of(shapes, norm, 1)[0] if norm in shapes else 64
    layers = count(shapes, r"joint_blocks\.{}")
    dual = "joint_blocks.{}.x_block.attn2.qkv.weight"
    side = isqrt(shape_of(shapes, "pos_embed", 3)[1])
    return {
        "sample_size": min(128, side * patch),
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shape_of(shapes, "final_layer.linear.weight", 2)[0] // patch**2,
        "num_layers": layers,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shape_of(shapes, "context_embedder.weight", 2)[1],
        "pooled_projection_dim": shape_of(shapes, "y_embedder.mlp.0.weight", 2)[1],
        "pos_embed_max_size": side,
        "dual_attention_layers": tuple(
            i for i in range(layers) if dual.format(i) in shapes
        ),
        "qk_norm": "rms_norm" if norm in shapes else None,
    }


def vae_sizes(shapes: Shapes) -> dict[str, Any]:
    """An autoencoder's sizes; scale, shift and norm groups are SD3.5's."""
    levels = count(shapes, r"decoder\.up\.{}")
    convolution = "decoder.up.{}.block.0.conv1.weight"
    return {
        "latent_channels": shape_of(shapes, "decoder.conv_in.weight", 4)[1],
        "block_out_channels": tuple(
            shape_of(shapes, convolution.format(i), 4)[0] for i in range(levels)
        ),
        "layers_per_block": count(shapes, r"encoder\.down\.0\.block\.{}"),
    }


def clip_l_sizes(shapes: Shapes) -> dict[str, Any]:
    """CLIP-L's sizes: its activation is the approximate GELU.

    The official file has no projection; where another has one, it is not SD3's.
    """
    square = shape_of(shapes, "text_model.final_layer_norm.weight", 1) * 2
    return clip_sizes({**shapes, PROJECTION: square}) | {"hidden_act": "quick_gelu"}


def clip_sizes(shapes: Shapes) -> dict[str, Any]:
    """A CLIP text encoder's sizes: heads of 64 channels."""
    embeddings, layers = "text_model.embeddings.", "text_model.encoder.layers."
    vocabulary, width = shape_of(shapes, f"{embeddings}token_embedding.weight", 2)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape_of(shapes, f"{layers}0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": count(shapes, re.escape(layers) + "{}"),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": shape_of(
            shapes, f"{embeddings}position_embedding.weight", 2
        )[0],
        "hidden_act": "gelu",
        "projection_dim": shape_of(shapes, PROJECTION, 2)[0],
        "eos_token_id": 2,
    }


def t5_sizes(shapes: Shapes) -> dict[str, Any]:
    """A T5 encoder's sizes."""
    first, dense = "encoder.block.0.layer.0.SelfAttention.", "layer.1.DenseReluDense."
    buckets, heads = shape_of(shapes, first + "relative_attention_bias.weight", 2)
    vocabulary, width = shape_of(shapes, "shared.weight", 2)
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shape_of(shapes, first + "q.weight", 2)[0] // heads,
        "d_ff": shape_of(shapes, f"encoder.block.0.{dense}wi_0.weight", 2)[0],
        "num_layers": count(shapes, r"encoder\.block\.{}"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def controlnet_sizes(shapes: Shapes) -> dict[str, Any]:
    """The sizes of a ControlNet of SD3.5 Large's: heads of 64 channels."""
    width, channels, patch, _ = shape_of(shapes, "pos_embed_input.proj.weight", 4)
    text = "time_text_embed.text_embedder.linear_1.weight"
    return {
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": count(shapes, r"transformer_blocks\.{}"),
        "attention_head_dim": 64,
        "num_attention_heads": width // 64,
        "pooled_projection_dim": shape_of(shapes, text, 2)[1],
    }


PARTS: dict[str, tuple[str, Callable[[Shapes], dict[str, Any]]]] = {
    "text_encoder": ("", clip_l_sizes),
    "text_encoder_2": ("", clip_sizes),
    "text_encoder_3": ("", t5_sizes),
    "transformer": (TRANSFORMER, transformer_sizes),
    "vae": (VAE, vae_sizes),
    "controlnet": ("", controlnet_sizes),
}
# In a ControlNet's file, and read by nobody: its patches are the transformer's
UNREAD = ("control_type", "pos_embed.proj.", "context_embedder.")


# Reading


def prepare_part(
    part: str, model_class: type, config_class: type, file: Path | TensorFile
) -> Prepared:
    """Check the tensors of one part of a pipeline in ``file``; nothing is read yet.

    Raises ValueError naming what is missing, unexpected, or of the wrong shape.
    """
    prefix, sizes = PARTS[part]
    file = file if isinstance(file, TensorFile) else weights.open_tensors(file)
    if part == "controlnet":
        kept = {n: e for n, e in file.entries.items() if not n.startswith(UNREAD)}
        file = replace(file, entries=kept)
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    check_known(file.path, shapes, prefix)
    source = f"{file.path} is no {part}"
    try:
        known = sizes(under(shapes, prefix))
        with weights.on_meta():
            model = model_class(make_config(config_class, known, "its shapes"))
    except KeyError as missing:
        raise ValueError(f"{source}: it lacks {prefix}{missing.args[0]}") from None
    except (ArithmeticError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source}: {error}") from None

    def rename(names: Iterable[str]) -> dict[str, Source]:
        if part == "controlnet":
            return weights.single_controlnet_sources(names)
        own = {name: Source((prefix + name,)) for name in names}
        return own | ({PROJECTION: IDENTITY} if part == "text_encoder" else {})

    return weights.prepare_weights(model, [file], rename, prefix)


def check_known(file: Path, shapes: Shapes, prefix: str) -> None:
    """Raise ValueError where a combined file holds tensors that no part knows."""
    known = (TRANSFORMER, VAE, *IGNORED)
    if prefix and (other := [n for n in shapes if not n.startswith(known)]):
        raise ValueError(
            f"{file} has {len(other)} tensors that are neither a transformer's nor an "
            f"autoencoder's, such as {excerpt(other[0])}; expected an SD3 single file"
        )


def find_text_encoders(folder: Path, t5: bool = True) -> dict[str, Path]:
    """The text encoders' single files in ``folder`` or its folder text_encoders/.

    T5 may be missing. Raises FileNotFoundError naming a CLIP file that is, and a file
    of T5's (where it is wanted) that has another name.
    """
    found, folders = {}, (folder, folder / "text_encoders")
    for part, names in TEXT_ENCODERS.items():
        files = [p / n for n in names for p in folders if (p / n).is_file()]
        if files and (t5 or part != "text_encoder_3"):
            found[part] = files[0]
        elif part != "text_encoder_3":
            raise FileNotFoundError(f"{folder} lacks {names[0]}")
        elif t5 and (other := [f for p in folders for f in p.glob("t5*.safetensors")]):
            known = f"expected {' or '.join(names)}, or t5='none'"
            raise FileNotFoundError(f"{other[0]} is not a name of T5's file; {known}")
    return found
