"""Every style of LoRA file: the same weights as the formula, or as who made the style.

A line a style. The formulas are written a second time here, in float64.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import relative_error
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from safetensors.torch import load_file, save_file
from test_dit import SMALL, pair
from test_lora import Pipe, inputs, swap, text_pair, their_velocity
from torch import Tensor

from minidiff import lora
from minidiff.dit import MMDiT
from minidiff.engine import adapters
from minidiff.files.lora_files import METADATA, read_updates
from minidiff.files.weights import stored_tensors, transformer_sources
from minidiff.text_encoders import T5Config, T5Encoder

Tensors = dict[str, Tensor]
BOUND = 1e-5


# What a form stores, and what it adds to the weights (out, in)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.3


def plain(
    down: str, up: str, alpha: float | None = None, root: bool = False
) -> Callable:
    def form(weight: Tensor) -> tuple[Tensors, Tensor]:
        out, inputs = weight.shape
        a, b = numbers(3, inputs), numbers(out, 3)
        scale = (alpha or 3) / (3**0.5 if root else 3)
        change = torch.einsum("or,ri->oi", b.double(), a.double()) * scale
        stored = {f"{down}.weight": a, f"{up}.weight": b}
        if alpha and not root:  # else the file's notes say it
            stored["alpha"] = torch.tensor(alpha)
        return stored, change

    return form


def loha(weight: Tensor) -> tuple[Tensors, Tensor]:
    out, inputs = weight.shape
    parts = numbers(out, 2), numbers(2, inputs), numbers(out, 2), numbers(2, inputs)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    a, b, c, d = (x.double() for x in parts)
    change = torch.einsum("or,ri,os,si->oi", a, b, c, d) * 5 / 2
    return dict(zip(names, parts, strict=True)) | {"alpha": torch.tensor(5.0)}, change


def lokr(first: bool, second: bool) -> Callable:
    """``first``, ``second``: whether the matrix is in two factors."""

    def form(weight: Tensor) -> tuple[Tensors, Tensor]:
        out, inputs = weight.shape
        stored: Tensors = {"alpha": torch.tensor(6.0)}
        sizes = (
            ("lokr_w1", 4, 2, first, 3),
            ("lokr_w2", out // 4, inputs // 2, second, 2),
        )
        whole = []
        for name, rows, columns, factors, rank in sizes:
            a, b = numbers(rows, rank), numbers(rank, columns)
            whole.append(a.double() @ b.double() if factors else numbers(rows, columns))
            pair = {f"{name}_a": a, f"{name}_b": b}
            stored |= pair if factors else {name: whole[-1].float()}
        change = torch.einsum("ab,cd->acbd", *(x.double() for x in whole))
        scale = 6 / 2 if second else 6 / 3 if first else 1  # both whole: no rank
        return stored, change.reshape(out, inputs) * scale

    return form


def dora(name: str, axis: int, flat: bool = False) -> Callable:
    """With the lengths of rows (axis 1) or columns (axis 0)."""
    down_up = ("lora_A", "lora_B") if flat else ("lora_down", "lora_up")
    beneath = plain(*down_up, alpha=None if flat else 2.0)

    def form(weight: Tensor) -> tuple[Tensors, Tensor]:
        stored, change = beneath(weight)
        whole = weight.double() + change
        length = (whole**2).sum(axis, keepdim=True) ** 0.5
        wanted = length * (1 + 0.3 * torch.rand_like(length))
        kept = wanted.flatten() if flat else wanted
        return stored | {name: kept.float()}, whole / length * wanted - weight.double()

    return form


THEIRS = ("transformer_blocks.0.attn.to_k", "norm_out.linear")
THEIRS += ("transformer_blocks.1.norm1_context.linear", "context_embedder")
OURS = ("joint_blocks.0.x_block.attn.qkv", "final_layer.adaLN_modulation.1")
OURS += ("joint_blocks.1.context_block.adaLN_modulation.1", "context_embedder")
PEFT = plain("lora_A", "lora_B")
KOHYA = plain("lora_down", "lora_up", alpha=2.0)
OLD = plain("lora.down", "lora.up")
OLDEST = plain("lora_linear_layer.down", "lora_linear_layer.up")
RS = plain("lora_A", "lora_B", alpha=5.0, root=True)
RS_NOTES = {"transformer.use_rslora": True, "transformer.lora_alpha": 5}
STYLES = [
    # whose, how a key begins, layers, what stands for a dot, form
    ("diffusers", "transformer.", THEIRS, ".", PEFT),
    ("diffusers", "transformer.", THEIRS, ".", OLD),
    ("diffusers", "transformer.", THEIRS, ".", OLDEST),
    ("diffusers", "transformer.", THEIRS, ".", RS),
    (
        "diffusers",
        "transformer.",
        THEIRS,
        ".",
        plain("lora_A.default", "lora_B.default"),
    ),
    ("diffusers", "transformer.", THEIRS, ".", plain("lora_A", "lora_B", alpha=0.5)),
    ("diffusers", "transformer.", THEIRS, ".", dora("lora_magnitude_vector", 1, True)),
    ("kohya", "lora_unet_", OURS, "_", KOHYA),
    ("kohya", "lora_unet_", OURS, "_", plain("lora_down", "lora_up")),
    ("kohya", "lora_unet_", OURS, "_", loha),
    ("kohya", "lora_unet_", OURS, "_", lokr(True, True)),
    ("kohya", "lora_unet_", OURS, "_", lokr(False, True)),
    ("kohya", "lora_unet_", OURS, "_", lokr(True, False)),
    ("kohya", "lora_unet_", OURS, "_", lokr(False, False)),
    ("kohya", "lora_unet_", OURS, "_", dora("dora_scale", 1)),
    ("kohya", "lora_unet_", OURS, "_", dora("dora_scale", 0)),
    ("OneTrainer", "lora_transformer_", THEIRS, "_", KOHYA),
    ("OneTrainer", "lora_transformer_", THEIRS, "_", dora("dora_scale", 0)),
    ("LyCORIS", "lycoris_", THEIRS, "_", lokr(False, True)),
    ("ComfyUI", "diffusion_model.", OURS, ".", PEFT),
    ("ComfyUI", "diffusion_model.", OURS, ".", KOHYA),
    ("ComfyUI", "model.diffusion_model.", OURS, ".", PEFT),
    ("peft", "base_model.model.", THEIRS, ".", PEFT),
    ("peft", "base_model.model.", THEIRS, ".", loha),
    ("no prefix", "", THEIRS, ".", PEFT),
    ("no prefix", "", OURS, ".", KOHYA),
]


def in_their_form(model: MMDiT) -> Tensors:
    return stored_tensors(model.state_dict(), transformer_sources)


@pytest.mark.parametrize("row", STYLES, ids=lambda r: f"{r[0]} {r[4].__qualname__[:6]}")
@torch.no_grad()
def test_a_style_adds_what_its_formula_says(tmp_path: Path, row: tuple) -> None:
    style, prefix, layers, dot, form = row
    model, file = pair(SMALL)[0].eval(), tmp_path / "style.safetensors"
    state = in_their_form if layers is THEIRS else lambda m: m.state_dict()
    before = {k: t.clone() for k, t in state(model).items()}
    tensors, expected = {}, {}
    for layer in layers:
        stored, expected[layer] = form(before[f"{layer}.weight"])
        name = f"{prefix}{layer.replace('.', dot)}"
        tensors |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
    save_file(tensors, file, {METADATA: json.dumps(RS_NOTES)} if form is RS else None)
    assert {one.style for one in read_updates(file)} == {style}
    x, pipe = inputs(), Pipe(transformer=model)
    loaded = adapters.load_lora(pipe, file)
    beside = model(*x)
    loaded.fuse()
    assert relative_error(beside, model(*x)) < BOUND
    for key, weight in state(model).items():
        found = weight.double() - before[key].double()
        if (change := expected.get(key.removesuffix(".weight"))) is None:
            assert not found.any(), key
        else:
            assert relative_error(found, change) < BOUND, key


@pytest.mark.parametrize(
    "begins",
    [
        "lora_te1_",
        "lora_te_",
        "text_encoder.",
        "text_encoders.clip_l.transformer.",
        "clip_l.transformer.",
    ],
)
@torch.no_grad()
def test_encoders_have_their_beginnings(tmp_path: Path, begins: str) -> None:
    clip, file = text_pair()[0], tmp_path / "style.safetensors"
    layer = next(n for n in lora.targets(clip) if n.endswith("1.self_attn.v_proj"))
    weight = clip.get_submodule(layer).weight.clone()
    stored, change = KOHYA(weight)
    name = layer.replace(".", "_") if begins.endswith("_") else layer
    save_file({f"{begins}{name}.{key}": t for key, t in stored.items()}, file)
    models = {"transformer": MMDiT(SMALL), "text_encoder": clip}
    lora.fuse(lora.read_lora(file, models)["text_encoder"], clip)
    found = clip.get_submodule(layer).weight.double() - weight.double()
    assert relative_error(found, change) < BOUND


@pytest.mark.parametrize("small", [True, False], ids=["8 bits", "streamed"])
@torch.no_grad()
def test_dora_reads_weights_wherever_they_are(tmp_path: Path, small: bool) -> None:
    model, file = pair(SMALL)[0].eval(), tmp_path / "dora.safetensors"
    held, tensors = swap(copy.deepcopy(model), small), {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.copy_(held.get_submodule(name).matrix())
    for layer in OURS:
        stored, _ = dora("dora_scale", 1)(model.get_submodule(layer).weight)
        tensors |= {f"{layer}.{key}": tensor for key, tensor in stored.items()}
    save_file(tensors, file)
    x, pipes = inputs(), [Pipe(transformer=m) for m in (model, held)]
    before = held(*x)
    adapters.load_lora(pipes[0], file, fused=True)
    adapters.load_lora(pipes[1], file)
    assert relative_error(held(*x), model(*x)) < BOUND
    assert relative_error(before, model(*x)) > 0.01


# As who made the style


REFERENCES = {
    "rsLoRA": lambda names: LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=names
    ),
    "DoRA": lambda names: LoraConfig(
        r=3, lora_alpha=5, use_dora=True, target_modules=names
    ),
    "LoHa": lambda names: LoHaConfig(r=2, alpha=5, target_modules=names),
    "LoKr": lambda names: LoKrConfig(
        r=2, alpha=5, target_modules=names, decompose_factor=4
    ),
    "LoKr, both": lambda names: LoKrConfig(
        r=1, alpha=5, target_modules=names, decompose_both=True, decompose_factor=8
    ),
}


@torch.no_grad()
def from_peft(folder: Path, kind: str) -> SimpleNamespace:
    """Our model with a folder of peft's loaded; peft's velocity without it and with."""
    ours, theirs = pair(SMALL)
    x, names = inputs(), ["to_q", "to_add_out", "norm_out.linear", "net.2"]
    config = REFERENCES[kind](names)
    bare = their_velocity(theirs, *x)
    inject_adapter_in_model(config, theirs)
    for name, parameter in theirs.named_parameters():
        if "magnitude" in name:
            parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
        elif any(part in name for part in ("lora_", "hada_", "lokr_")):
            torch.nn.init.normal_(parameter, std=0.2)
    state = get_peft_model_state_dict(theirs)
    file = folder / "adapter_model.safetensors"
    save_file({f"base_model.model.{k}": t.contiguous() for k, t in state.items()}, file)
    notes = {k: v for k, v in config.to_dict().items() if not isinstance(v, set)}
    (folder / "adapter_config.json").write_text(json.dumps(notes, default=str))
    pipe, velocity = Pipe(transformer=ours), their_velocity(theirs, *x)
    loaded = adapters.load_lora(pipe, folder)
    return SimpleNamespace(
        pipe=pipe, loaded=loaded, inputs=x, bare=bare, velocity=velocity
    )


@torch.no_grad()
def peft_error(case: SimpleNamespace) -> float:
    return relative_error(case.pipe.transformer(*case.inputs), case.velocity)


@pytest.mark.parametrize("kind", REFERENCES)
def test_pefts_folder_is_read_as_peft_reads_it(tmp_path: Path, kind: str) -> None:
    case = from_peft(tmp_path, kind)
    assert relative_error(case.bare, case.velocity) > 0.01
    assert peft_error(case) <= BOUND
    case.loaded.remove()
    case.velocity = case.bare
    assert peft_error(case) <= BOUND


@torch.no_grad()
def test_diffusers_reads_its_old_keys_as_we_do(tmp_path: Path) -> None:
    (ours, theirs), x = pair(SMALL), inputs()
    stored = {}
    for layer in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_k"):
        tensors, _ = OLD(ours.joint_blocks[0].x_block.attn.proj.weight)
        stored |= {f"transformer.{layer}.{k}": t for k, t in tensors.items()}
    save_file(stored, tmp_path / "old.safetensors")
    adapters.load_lora(Pipe(transformer=ours), tmp_path / "old.safetensors")
    theirs.load_lora_adapter(dict(stored), prefix="transformer")
    assert relative_error(ours(*x), their_velocity(theirs, *x)) <= BOUND


@torch.no_grad()
def test_kohyas_keys_are_written_and_read(tmp_path: Path) -> None:
    """q, k and v become one update of their layer; a swap is one in both styles."""
    model, x = pair(SMALL)[0], inputs()
    names = ["to_q", "to_v", "add_k_proj", "norm_out.linear", "net.2"]
    updates = lora.add_lora(model, rank=2, alpha=3, names=names)
    for i, update in enumerate(updates.values()):
        torch.nn.init.normal_(update.up.weight, std=0.2)
        update.scale *= 1 + i % 2  # a layer's parts may differ
    clip = text_pair()[0]
    text = lora.add_lora(clip, rank=2, names=["q_proj"])
    t5 = T5Encoder(T5Config(20, 8, 4, 16, 2, 2))
    parts = {"transformer": updates, "text_encoder_2": text}
    parts["text_encoder_3"] = lora.add_lora(t5, rank=2, names=["SelfAttention.q"])
    models = {"transformer": model, "text_encoder_2": clip, "text_encoder_3": t5}
    lora.save_kohya(parts, models, tmp_path / "kohya.safetensors")
    expected = model(*x)
    for part in parts:
        lora.detach(parts[part].values(), models[part])
    keys = load_file(tmp_path / "kohya.safetensors").keys()
    assert "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight" in keys
    assert {key[:9] for key in keys} == {"lora_unet", "lora_te2_", "lora_te3_"}
    read = lora.read_lora(tmp_path / "kohya.safetensors", models)
    qkv = read["transformer"]["joint_blocks.0.x_block.attn.qkv"]
    assert qkv.down.out_features == 4 and (qkv.alpha, qkv.scale) == (6, 1.5)
    assert relative_error(model(*x), expected) > 1e-3
    lora.attach(read["transformer"], model)
    assert relative_error(model(*x), expected) <= BOUND


# What is refused, by its name


OURS_0 = "lora_unet_joint_blocks_0_x_block_attn_proj"
WIDTH = 32
REFUSALS: dict[str, tuple[Tensors, str]] = {
    "LoCon": ({"lora_mid.weight": numbers(2, 2, 3, 3)}, "a LoCon of convolutions"),
    "bias": ({"lora_B.bias": numbers(WIDTH)}, "lora_B.bias, a LoRA with biases"),
    "difference": ({"diff": numbers(WIDTH, WIDTH)}, "LyCORIS' full difference"),
    "OFT": ({"oft_blocks": numbers(4, 8, 8)}, "OFT, a rotation"),
    "Tucker": ({"lokr_t2": numbers(2, 2, 3, 3)}, "a LoKr of convolutions, in Tucker"),
    "GLoRA": ({"a1.weight": numbers(2, WIDTH)}, "GLoRA; expected LoRA, LoHa"),
    "unknown": (
        {"lora_C.weight": numbers(2, WIDTH)},
        "has .*lora_C.weight; expected LoRA",
    ),
    "half": ({"lora_down.weight": numbers(2, WIDTH)}, "it has down; expected all"),
    "half a LoHa": ({"hada_w1_a": numbers(WIDTH, 2)}, "it has hada_w1_a; expected all"),
    "alone": ({"alpha": torch.tensor(1.0)}, "it has none; expected all matrices"),
    "α": (
        {"lora_down.weight": numbers(2, WIDTH), "lora_up.weight": numbers(WIDTH, 2)}
        | {"alpha": numbers(2)},
        r"α of .* is \[.*\]; expected a number",
    ),
    "ranks": (
        {"lora_down.weight": numbers(2, WIDTH), "lora_up.weight": numbers(WIDTH, 3)},
        r"of shapes \[32, 3\] and \[2, 32\]; expected one rank",
    ),
    "products": (
        {"hada_w1_a": numbers(WIDTH, 2), "hada_w1_b": numbers(2, WIDTH)}
        | {"hada_w2_a": numbers(WIDTH, 2), "hada_w2_b": numbers(2, 9)},
        r"products of shape \[32, 32\] and \[32, 9\]; expected one shape",
    ),
    "size": (
        {"lora_down.weight": numbers(2, WIDTH), "lora_up.weight": numbers(9, 2)},
        r"kohya keys\) was made for another model: .* \[9, 32\]; expected \[32, 32\]",
    ),
    "magnitude": (
        {"lora_down.weight": numbers(2, WIDTH), "lora_up.weight": numbers(WIDTH, 2)}
        | {"dora_scale": numbers(9, 1)},
        r"dora_scale has shape \[9, 1\]; expected \[32\], \[32, 1\] or \[1, 32\]",
    ),
    "integers": (
        {"lora_down.weight": torch.ones(2, 2).int()},
        "lora_down.weight is I32; expected one of F64",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_no_such_update_is_refused_by_name(tmp_path: Path, name: str) -> None:
    stored, message = REFUSALS[name]
    file = tmp_path / "bad.safetensors"
    save_file({f"{OURS_0}.{key}": tensor for key, tensor in stored.items()}, file)
    with pytest.raises(ValueError, match=f"bad.safetensors.*{message}"):
        lora.read_lora(file, {"transformer": MMDiT(SMALL)})


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("lora_unet_single_blocks_0_linear1", "kohya keys. was made for another model"),
        ("x_embedder.proj", "updates transformer.x_embedder.proj, which is a Conv2d"),
        (
            "transformer.pos_embed.proj",
            "pos_embed.proj, which is a Conv2d; expected lin",
        ),
        ("lora_unet_x_embedder_proj", "x_embedder_proj, which is a Conv2d; expected"),
        ("lora_transformer_pos_embed_proj", "pos_embed_proj, which is a Conv2d; exp"),
        ("unet.mid_block.resnets.0.conv1", "diffusers U-Net keys. .* layer unet.mid_b"),
        (
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
            "updates text_encoder_3, a T5EncoderModel, which this pipeline leaves out",
        ),
    ],
)
def test_other_layers_are_refused_by_name(
    tmp_path: Path, layer: str, message: str
) -> None:
    a, b = numbers(2, WIDTH), numbers(WIDTH, 2)
    file = tmp_path / "bad.safetensors"
    save_file({f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}, file)
    with pytest.raises(ValueError, match=f"bad.safetensors.*{message}"):
        lora.read_lora(file, {"transformer": MMDiT(SMALL)})


def test_one_layer_under_two_names_is_refused(tmp_path: Path) -> None:
    a, b, stored = numbers(2, WIDTH), numbers(WIDTH, 2), {}
    name = "transformer_blocks.0.attn.to_q"
    for layer in (f"transformer.{name}", f"lycoris_{name.replace('.', '_')}"):
        stored |= {f"{layer}.lora_A.weight": a + 0, f"{layer}.lora_B.weight": b + 0}
    save_file(stored, tmp_path / "twice.safetensors")
    with pytest.raises(ValueError, match=f"updates transformer.{name} under two names"):
        lora.read_lora(tmp_path / "twice.safetensors", {"transformer": MMDiT(SMALL)})


# Several at once


@pytest.fixture
def several(tmp_path: Path) -> SimpleNamespace:
    """A model, two files for it, and what each changes of a velocity alone."""
    pipe = Pipe(transformer=pair(SMALL)[0].eval())
    pipe.adapters = adapters.Adapters(pipe)
    files = [tmp_path / f"{name}.safetensors" for name in ("ink", "night")]
    for file in files:
        stored = {}
        for layer in OURS[:2]:
            weight = pipe.transformer.get_submodule(layer).weight
            stored |= {f"{layer}.{k}": t for k, t in KOHYA(weight)[0].items()}
        save_file(stored, file)
    return SimpleNamespace(pipe=pipe, files=files, x=inputs())


def weights_of(several: SimpleNamespace) -> Tensor:
    """A layer's weights with all that acts on them."""
    layer = several.pipe.transformer.get_submodule(OURS[0])
    if not isinstance(layer, lora.AdaptedLinear):
        return layer.weight.detach().clone()
    whole = layer.layer.weight.clone()
    for beside in layer.updates:
        whole[beside.rows] += beside.weight * beside.update.matrix()
    return whole


@torch.no_grad()
def test_adapters_are_weighed_switched_and_taken_out(several: SimpleNamespace) -> None:
    pipe, run = several.pipe, lambda: several.pipe.transformer(*several.x)
    bare, whole = run(), weights_of(several)
    ink = pipe.adapters.load(several.files[0])
    alone, first = run(), weights_of(several) - whole
    night = pipe.adapters.load(several.files[1], weight=0.5, name="dark")
    second = weights_of(several) - whole - first
    assert list(pipe.adapters) == ["ink", "dark"] and pipe.adapters["dark"] is night
    assert pipe.settings["lora_scale"] == "1.0, 0.5"
    ink.weight, night.weight = 0.25, -1.0
    assert relative_error(weights_of(several) - whole, first / 4 - 2 * second) < BOUND
    ink.weight, night.enabled = 1.0, False
    assert torch.equal(run(), alone)
    assert pipe.settings == {"lora": str(several.files[0]), "lora_scale": 1.0}
    night.enabled = True
    assert pipe.settings["lora_scale"] == "1.0, -1.0"
    ink.remove()
    assert list(pipe.adapters) == ["dark"]
    assert relative_error(weights_of(several) - whole, -2 * second) < BOUND
    night.remove()
    assert torch.equal(run(), bare) and not pipe.adapters and not pipe.settings


@torch.no_grad()
def test_what_acts_is_fused(several: SimpleNamespace) -> None:
    pipe, whole = several.pipe, weights_of(several)
    ink, night = (pipe.adapters.load(file) for file in several.files)
    ink.weight, night.enabled = 0.5, False
    expected = pipe.transformer(*several.x)
    for one in (ink, night):
        one.fuse()
    assert not lora.adapted_layers(pipe.transformer)
    assert relative_error(pipe.transformer(*several.x), expected) < BOUND
    assert relative_error(weights_of(several), whole) > 1e-3
    assert pipe.settings == {"lora": str(several.files[0]), "lora_scale": 0.5}
    with pytest.raises(ValueError, match="ink is fused or taken out; exp"):
        ink.weight = 1.0


def test_names_are_one_for_each(several: SimpleNamespace) -> None:
    known = several.pipe.adapters
    known.load(several.files[0])
    with pytest.warns(UserWarning, match="is on this pipeline already"):
        assert known.load(several.files[0]).name == "ink-1"
    with pytest.raises(ValueError, match="name is 'ink', which is on this pipeline"):
        known.load(several.files[1], name="ink")
    with pytest.raises(ValueError, match="lora_scale is nan; expected a finite number"):
        known["ink"].weight = float("nan")
    with pytest.raises(ValueError, match="lora_scale is 1e.308; .*, -65504 to 65504"):
        known["ink"].weight = 1e308


@torch.no_grad()
def test_a_copy_has_adapters_of_its_own(several: SimpleNamespace) -> None:
    first, run = several.pipe, lambda pipe: pipe.transformer(*several.x)
    first.adapters.load(several.files[0])
    before, noted = run(first), dict(first.settings)
    pipe = copy.deepcopy(first)
    pipe.adapters["ink"].weight = 0.25
    assert pipe.settings["lora_scale"] == 0.25 and first.settings == noted
    assert torch.equal(run(first), before) and not torch.equal(run(pipe), before)
    several.pipe, first = pipe, None  # the copy alone is left
    pipe.adapters.load(several.files[1])
    pipe.adapters["ink"].remove()
    assert list(pipe.adapters) == ["night"]


def test_a_pipeline_with_adapters_is_freed_when_let_go() -> None:
    import weakref

    import minidiff

    pipe = minidiff.load("tiny")
    gone = weakref.ref(pipe)
    del pipe
    assert gone() is None
