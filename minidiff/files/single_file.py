"""The official single files: transformer and autoencoder in one, an encoder in each.

``sd3.5_large.safetensors`` holds the transformer's tensors under
``model.diffusion_model.`` and the autoencoder's under ``first_stage_model.``, with the
names that our models have. There is no config.json: sizes are read off the shapes. The
text encoders lie beside it or in ``text_encoders/``: ``clip_l``, ``clip_g``, ``t5xxl``.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch

from minidiff.files import weights
from minidiff.files.names import Source
from minidiff.files.weights import Prepared

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
    numbers = [int(m[1]) for name in shapes if (m := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


# Sizes, as the keys of the hub's config.json


def transformer_sizes(shapes: Shapes) -> dict[str, Any]:
    """An MMDiT's sizes from the shapes of its tensors."""
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    norm = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head = norm[0] if norm else 64
    layers = count(shapes, r"joint_blocks\.(\d+)\.")
    dual = "joint_blocks.{}.x_block.attn2.qkv.weight"
    side = isqrt(shapes["pos_embed"][1])
    return {
        "sample_size": min(128, side * patch),
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "num_layers": layers,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": side,
        "dual_attention_layers": tuple(
            i for i in range(layers) if dual.format(i) in shapes
        ),
        "qk_norm": "rms_norm" if norm else None,
    }


def vae_sizes(shapes: Shapes) -> dict[str, Any]:
    """An autoencoder's sizes; scale, shift and norm groups are SD3.5's."""
    levels = count(shapes, r"decoder\.up\.(\d+)\.")
    convolution = "decoder.up.{}.block.0.conv1.weight"
    return {
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": tuple(
            shapes[convolution.format(i)][0] for i in range(levels)
        ),
        "layers_per_block": count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
    }


def clip_l_sizes(shapes: Shapes) -> dict[str, Any]:
    """CLIP-L's sizes: its activation is the approximate GELU.

    The official file has no projection; where another has one, it is not SD3's.
    """
    square = shapes["text_model.final_layer_norm.weight"] * 2
    return clip_sizes({**shapes, PROJECTION: square}) | {"hidden_act": "quick_gelu"}


def clip_sizes(shapes: Shapes) -> dict[str, Any]:
    """A CLIP text encoder's sizes: heads of 64 channels."""
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": shapes[
            "text_model.embeddings.position_embedding.weight"
        ][0],
        "hidden_act": "gelu",
        "projection_dim": shapes[PROJECTION][0],
        "eos_token_id": 2,
    }


def t5_sizes(shapes: Shapes) -> dict[str, Any]:
    """A T5 encoder's sizes."""
    first = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = shapes[first + "relative_attention_bias.weight"]
    vocabulary, width = shapes["shared.weight"]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes[first + "q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": count(shapes, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


PARTS: dict[str, tuple[str, Callable[[Shapes], dict[str, Any]]]] = {
    "text_encoder": ("", clip_l_sizes),
    "text_encoder_2": ("", clip_sizes),
    "text_encoder_3": ("", t5_sizes),
    "transformer": (TRANSFORMER, transformer_sizes),
    "vae": (VAE, vae_sizes),
}


# Reading


def prepare_part(
    part: str, model_class: type, config_class: type, file: Path
) -> Prepared:
    """Check the tensors of one part of a pipeline in ``file``; nothing is read yet.

    Raises ValueError naming what is missing, unexpected, or of the wrong shape.
    """
    prefix, sizes = PARTS[part]
    shapes = weights.read_header(file)
    check_known(file, shapes, prefix)
    try:
        config = config_class(**sizes(under(shapes, prefix)))
        with torch.device("meta"):
            model = model_class(config)
    except KeyError as missing:
        raise ValueError(
            f"{file} is no {part}: it lacks {prefix}{missing.args[0]}"
        ) from None
    except (IndexError, ArithmeticError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file} is no {part}: {error}") from None

    def rename(names: Iterable[str]) -> dict[str, Source]:
        own = {name: Source((prefix + name,)) for name in names}
        return own | ({PROJECTION: IDENTITY} if part == "text_encoder" else {})

    return weights.prepare_weights(model, [file], rename, prefix)


def check_known(file: Path, shapes: Shapes, prefix: str) -> None:
    """Raise ValueError where a combined file holds tensors that no part knows."""
    known = (TRANSFORMER, VAE, *IGNORED)
    if prefix and (other := [n for n in shapes if not n.startswith(known)]):
        raise ValueError(
            f"{file} has {len(other)} tensors that are neither a transformer's nor an "
            f"autoencoder's, such as {other[0]}; expected an SD3 single file"
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
