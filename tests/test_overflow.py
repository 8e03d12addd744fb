"""Black pictures: the first layer that overflows is named, whatever form runs."""

import re
from pathlib import Path

import pytest
import torch

import minidiff
from minidiff.control import Control, begin_control
from minidiff.drawing.image_to_image import image_to_image
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
WHAT = {"transformer": "step 1", "vae": "the picture"}


def parts(pipe: Pipeline) -> dict:
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    encoders = dict(zip(names, pipe.text_encoders, strict=True))
    return encoders | {"transformer": pipe.transformer, "vae": pipe.vae}


def load(folder: Path, **how) -> Pipeline:
    pipe = minidiff.load(folder, **how)
    pipe.progress = False
    return pipe


def warnings_of(pipe: Pipeline, steps: int = 2, **call) -> list[str]:
    with pytest.warns(UserWarning) as told:
        pipe("a red dress", num_inference_steps=steps, guidance_scale=2.0, **call)
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


class Late(torch.nn.Module):
    """A layer that overflows from its third call on."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(x) * (1 if self.calls < 3 else torch.inf)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
def test_the_layer_of_a_later_step_is_named(small: Path, sampler: str) -> None:
    pipe = load(small, fast=False)
    mlp = pipe.transformer.joint_blocks[1].x_block.mlp
    mlp.fc2 = Late(mlp.fc2)
    told = warnings_of(pipe, 4, sampler=sampler)
    assert told[0].startswith("the drawing holds")
    assert "(first in transformer.joint_blocks.1.x_block.mlp.fc2: values" in told[0]
    assert len(told) == 2 and told[1].startswith("the picture")


@pytest.mark.parametrize(("start", "what"), [(0.0, "step 1"), (0.5, "the drawing")])
def test_the_layer_of_a_controlnet_is_named(
    small: Path, start: float, what: str
) -> None:
    pipe, side = load(small), 64
    net = begin_control(pipe.transformer)
    with torch.no_grad():
        net.transformer_blocks[0].mlp.fc1.weight.fill_(1e38)
    nets = begin_control(pipe.transformer), net
    lines = torch.rand(1, side, side)
    control = [Control(lines, one, start=start) for one in nets]
    line = warnings_of(pipe, 4, control=control, height=side, width=side)[0]
    assert line.startswith(f"{what} holds")
    assert "(first in control_1.transformer_blocks.0.mlp.fc1: values" in line


def test_the_layer_of_the_encoder_of_pictures_is_named(small: Path) -> None:
    pipe, side = load(small), 64
    control = Control(torch.rand(1, side, side), begin_control(pipe.transformer))
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.fill_(1e38)
    line = warnings_of(pipe, control=control, height=side, width=side)[0]
    where = r"\(first in vae.encoder.conv_in: values that are not finite\)"
    assert re.match(rf"the encoding of control's image holds .* {where}", line)
    with pytest.raises(ValueError, match=f"^the encoding of image holds .* {where}"):
        image_to_image(pipe, "a red dress", torch.rand(3, side, side))


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
