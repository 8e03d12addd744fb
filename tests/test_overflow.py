"""Black pictures: the first layer that overflows is named, whatever form runs."""

from pathlib import Path

import pytest
import torch

import minidiff
from minidiff.interface.checks import first_overflow
from minidiff.sampling import Pipeline

LAYERS = [
    ("text_encoder", "text_model.encoder.layers.1.mlp.fc1"),
    ("text_encoder_3", "encoder.block.0.layer.1.DenseReluDense.wo"),
    ("transformer", "context_embedder"),
    ("transformer", "joint_blocks.1.x_block.mlp.fc2"),
    ("transformer", "joint_blocks.0.x_block.attn2.proj"),
    ("transformer", "joint_blocks.2.x_block.adaLN_modulation.1"),
    ("transformer", "final_layer.linear"),
    ("vae", "decoder.mid.block_1.conv2"),
    ("vae", "decoder.up.0.block.1.conv1"),
]
WHAT = {"transformer": "the first step", "vae": "the picture"}


def parts(pipe: Pipeline) -> dict:
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    encoders = dict(zip(names, pipe.text_encoders, strict=True))
    return encoders | {"transformer": pipe.transformer, "vae": pipe.vae}


def load(folder: Path, **how) -> Pipeline:
    pipe = minidiff.load(folder, **how)
    pipe.progress = False
    return pipe


def warnings_of(pipe: Pipeline) -> list[str]:
    with pytest.warns(UserWarning) as told:
        pipe("a red dress", num_inference_steps=2, guidance_scale=2.0)
    return [str(w.message) for w in told if "infinite" in str(w.message)]


@pytest.mark.parametrize("how", [{}, {"fast": True}], ids=["plain", "fast"])
@pytest.mark.parametrize(("part", "layer"), LAYERS, ids=[n for _, n in LAYERS])
def test_the_layer_is_named(small: Path, part: str, layer: str, how: dict) -> None:
    pipe = load(small, **how)
    with torch.no_grad():
        parts(pipe)[part].get_submodule(layer).weight.fill_(1e38)
    line = warnings_of(pipe)[0]
    assert f"(first in {part}.{layer}: values that are not finite)" in line
    assert line.startswith(WHAT.get(part, "the prompt's encoding"))
    hooks = [m._forward_hooks for p in parts(pipe).values() for m in p.modules()]
    assert not any(hooks)


def test_float16_is_told_with_its_largest_number(small: Path) -> None:
    pipe = load(small, dtype=torch.float16)
    layer = pipe.transformer.joint_blocks[1].context_block.mlp.fc1
    with torch.no_grad():
        layer.weight.fill_(60000)
    name = "transformer.joint_blocks.1.context_block.mlp.fc1"
    line = warnings_of(pipe)[0]
    assert f"(first in {name}: values beyond float16's 65504)" in line
    assert "load with dtype=torch.bfloat16" in line


def test_a_damaged_weight_is_told_as_such(small: Path) -> None:
    pipe = load(small)
    with torch.no_grad():
        pipe.transformer.joint_blocks[2].x_block.attn.ln_k.weight[3] = torch.nan
    name = "transformer.joint_blocks.2.x_block.attn.ln_k"
    assert f"(first in {name}: weights that are not finite)" in warnings_of(pipe)[0]


def test_where_no_layer_is_to_blame_none_is_named(small: Path) -> None:
    pipe = load(small)
    with pytest.warns(UserWarning, match="so the picture will be black;"):
        pipe.decode(torch.full((1, 16, 4, 4), torch.inf))
    assert not first_overflow(lambda: None, {"vae": pipe.vae, "text_encoder_3": None})
