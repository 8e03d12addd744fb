"""LoRA files: the same pictures as diffusers and peft make of them."""

import copy
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from helpers import randomize, relative_error
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from small import AUTOENCODER
from test_dit import DUAL, SMALL, pair
from transformers import CLIPTextConfig as TheirConfig
from transformers import CLIPTextModelWithProjection

from minidiff import lora
from minidiff.dit import MMDiT
from minidiff.efficiency import Float8Linear, StreamedLinear, quantize
from minidiff.engine import adapters, memory
from minidiff.engine.fast import FastMMDiT
from minidiff.engine.loading import blueprint
from minidiff.files.lora_files import FILE, METADATA
from minidiff.files.weights import check_whole
from minidiff.interface.checks import check_dtypes
from minidiff.text_encoders import CLIPTextConfig, CLIPTextEncoder
from minidiff.vae import VAE

BOUND = 1e-5
CLIP = dict(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=12,
    hidden_act="gelu",
    layer_norm_eps=1e-5,
    projection_dim=8,
    eos_token_id=2,
)
# Attention, both kinds of fused qkv, a swapped modulation, the MLP and the embedders.
WIDE = [*lora.ATTENTION, "norm_out.linear", "linear_1", "net.2", "context_embedder"]
WIDE += ["norm1_context.linear"]


class Pipe(SimpleNamespace):
    """What of a pipeline a LoRA needs."""

    def __init__(self, **parts: object) -> None:
        super().__init__(
            **{"text_encoders": [], "settings": {}, "adapters": ()} | parts
        )


def inputs() -> tuple[torch.Tensor, ...]:
    x, sigma = torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.2])
    return x, sigma, torch.randn(2, 5, 20), torch.randn(2, 12)


def text_pair() -> tuple[CLIPTextEncoder, CLIPTextModelWithProjection]:
    theirs = randomize(CLIPTextModelWithProjection(TheirConfig(**CLIP)))
    ours = CLIPTextEncoder(CLIPTextConfig(**CLIP)).eval()
    names = ours.state_dict().keys()
    stored = theirs.state_dict()
    if not names <= stored.keys():
        stored = {f"text_model.{k}": v for k, v in stored.items()} | stored
    ours.load_state_dict({name: stored[name] for name in names})
    return ours, theirs


def adapt(model: torch.nn.Module, rank: int, alpha: float, names: list[str]) -> dict:
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names)
    inject_adapter_in_model(config, model)
    weights = {n: p for n, p in model.named_parameters() if "lora_" in n}
    for parameter in weights.values():
        torch.nn.init.normal_(parameter, std=0.2)
    return get_peft_model_state_dict(model)


def their_velocity(model: torch.nn.Module, x, sigma, context, pooled) -> torch.Tensor:
    return model(x, context, pooled, 1000 * sigma, return_dict=False)[0]


def metadata(model: torch.nn.Module) -> dict:
    config = model.peft_config["default"].to_dict()
    keep = ("r", "lora_alpha", "target_modules")
    return {
        k: sorted(v) if k == "target_modules" else v
        for k, v in config.items()
        if k in keep
    }


def adapted(folder: Path, medium: bool) -> SimpleNamespace:
    """A pair of models, ours bare and theirs adapted, and the file that says how."""
    ours, theirs = pair(DUAL if medium else SMALL)
    clip, their_clip = text_pair()
    x = inputs()
    ids = torch.randint(0, 50, (2, 12))
    bare = their_velocity(theirs, *x)
    layers = adapt(
        theirs, 3, 6 if medium else 3, WIDE if medium else list(lora.ATTENTION)
    )
    text = adapt(their_clip, 2, 2, ["q_proj", "out_proj"])
    notes = {"transformer_lora_adapter_metadata": metadata(theirs)} if medium else {}
    StableDiffusion3Pipeline.save_lora_weights(folder, layers, text, **notes)
    return SimpleNamespace(
        pipe=Pipe(transformer=ours, text_encoders=[clip]),
        inputs=x,
        ids=ids,
        bare=bare,
        velocity=their_velocity(theirs, *x).detach(),
        pooled=their_clip(ids).text_embeds.detach(),
        file=folder,
    )


@torch.no_grad()
def update_error(case: SimpleNamespace) -> float:
    """Of our velocity and pooled vector, once the file is loaded."""
    v, pooled = (
        case.pipe.transformer(*case.inputs),
        case.pipe.text_encoders[0](case.ids),
    )
    return max(relative_error(v, case.velocity), relative_error(pooled[1], case.pooled))


@pytest.fixture(params=["large, alpha = rank", "medium, alpha 6"])
def case(request, tmp_path: Path) -> SimpleNamespace:
    return adapted(tmp_path, request.param.startswith("medium"))


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_agrees_with_diffusers(case: SimpleNamespace, fused: bool) -> None:
    loaded = adapters.load_lora(case.pipe, case.file, fused=fused)
    assert relative_error(case.bare, case.velocity) > 0.01  # the update does something
    assert update_error(case) <= BOUND
    assert case.pipe.settings == {"lora": str(case.file), "lora_scale": 1.0}
    if fused:
        check_whole("transformer", case.pipe.transformer)
    else:
        with pytest.raises(ValueError, match="or beside its layer; expected"):
            check_whole("transformer", case.pipe.transformer)
        loaded.remove()
        check_whole("transformer", case.pipe.transformer)
        assert not case.pipe.settings
        assert relative_error(case.pipe.transformer(*case.inputs), case.bare) <= BOUND


def swap(model: torch.nn.Module, small: bool) -> torch.nn.Module:
    """Store a model's linear layers in fp8, or read them anew at each call."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            stored = Float8Linear(quantize(layer.weight.detach()), layer.bias)
            memory.swap(model, name, stored if small else StreamedLinear(layer))
    return model


@torch.no_grad()
def test_streamed_layers_take_an_update_as_others_do(case: SimpleNamespace) -> None:
    swap(case.pipe.transformer, small=False)
    swap(case.pipe.text_encoders[0], small=False)
    loaded = adapters.load_lora(case.pipe, case.file)
    assert update_error(case) <= BOUND
    loaded.remove()
    assert relative_error(case.pipe.transformer(*case.inputs), case.bare) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("form", ["chapters'", "fast", "fast, fp8 products"])
@torch.no_grad()
def test_layers_in_8_bits_keep_theirs_beside_it(
    case: SimpleNamespace, form: str
) -> None:
    """The same as the update fused into the weights that the 8 bits stand for."""
    stored = swap(copy.deepcopy(case.pipe.transformer), small=True)
    for name, layer in case.pipe.transformer.named_modules():
        if isinstance(layer, torch.nn.Linear):
            rows = stored.get_submodule(name)
            layer.weight.copy_(rows.weight.float() * rows.scale)
    adapters.load_lora(case.pipe, case.file, fused=True)
    expected = case.pipe.transformer(*case.inputs)
    case.pipe.transformer = stored
    run = stored if form == "chapters'" else FastMMDiT.of(stored, "fp8" in form)
    bare = run(*case.inputs)
    adapters.load_lora(case.pipe, case.file)
    bound = 0.1 if "fp8" in form else BOUND  # the inputs are in 8 bits as well
    assert relative_error(run(*case.inputs), expected) <= bound
    assert relative_error(bare, expected) > 2 * bound


@pytest.mark.parametrize("small", [False, True])
def test_nothing_is_fused_into_weights_that_are_not_there(case, small: bool) -> None:
    swap(case.pipe.text_encoders[0], small)
    before = [p.clone() for p in case.pipe.transformer.parameters()]
    message = (
        "weights of .*: they are in 4 or 8 bits or stay in a file; expected an unf"
    )
    with pytest.raises(ValueError, match=message):
        adapters.load_lora(case.pipe, case.file, fused=True)
    after = case.pipe.transformer.parameters()
    assert all(map(torch.equal, after, before))


@pytest.mark.slow
def test_compiled_blocks_take_an_update_in_their_weights_only(case) -> None:
    """torch.compile does not look again at a block's layers, nor at another block's."""
    case.pipe.transformer.joint_blocks[1].compile()
    with pytest.raises(ValueError, match="transformer is compiled .* a fused LoRA or"):
        adapters.load_lora(case.pipe, case.file)
    adapters.load_lora(case.pipe, case.file, fused=True)


@torch.no_grad()
def test_a_wrong_scale_is_noticed(case: SimpleNamespace) -> None:
    adapters.load_lora(case.pipe, case.file, scale=1.01)
    v = case.pipe.transformer(*case.inputs)
    assert relative_error(v, case.velocity) > BOUND


@torch.no_grad()
def test_a_scale_of_zero_is_none(case: SimpleNamespace) -> None:
    adapters.load_lora(case.pipe, case.file, scale=0.0)
    assert relative_error(case.pipe.transformer(*case.inputs), case.bare) <= BOUND


@torch.no_grad()
def test_half_a_scale_is_half_an_update(case: SimpleNamespace) -> None:
    layers = case.pipe.text_encoders[0].text_model.encoder.layers
    layer, x = layers[0].self_attn, torch.randn(3, 16)
    bare, found = layer.q_proj(x), []
    for how in ({}, {"scale": 0.5}, {"scale": 0.5, "fused": True}):
        loaded = adapters.load_lora(case.pipe, case.file, **how)
        found.append(layer.q_proj(x) - bare)
        loaded.remove()
    for half in found[1:]:
        assert relative_error(half, found[0] / 2) < 1e-5


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_a_failure_half_way_leaves_no_layer_changed(case, monkeypatch, fused) -> None:
    """Or says that there are some: weights have no way back."""
    before, moved, move = case.pipe.transformer(*case.inputs), [], torch.nn.Module.to

    def full(module: torch.nn.Module, *where: object) -> torch.nn.Module:
        moved.append(module)
        if len(moved) == 9:
            raise torch.OutOfMemoryError
        return move(module, *where)

    monkeypatch.setattr(lora.LowRank, "to", full)
    with pytest.raises(torch.OutOfMemoryError) as failed:
        adapters.load_lora(case.pipe, case.file, fused=fused)
    notes = getattr(failed.value, "__notes__", [])
    assert any("load the model anew" in note for note in notes) == fused
    changed = relative_error(case.pipe.transformer(*case.inputs), before)
    assert (changed > 1e-3) == fused and not case.pipe.settings


def test_reading_a_file_draws_no_random_numbers(case: SimpleNamespace) -> None:
    state = torch.get_rng_state()
    adapters.load_lora(case.pipe, case.file)
    assert torch.equal(torch.get_rng_state(), state)


def names(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]


@pytest.mark.slow
def test_a_layer_stands_again_where_it_stood(case: SimpleNamespace, tmp_path) -> None:
    """When its last update is taken off, whatever the order."""
    models = adapters.components(case.pipe).values()
    before = [names(model) for model in models]
    other = tmp_path / "other.safetensors"
    other.write_bytes((case.file / FILE).read_bytes())
    first, second = (
        adapters.load_lora(case.pipe, case.file),
        adapters.load_lora(case.pipe, other),
    )
    for loaded in (first, second):
        assert all(lora.adapted_layers(model) for model in models)
        loaded.remove()
    assert [names(model) for model in models] == before and not case.pipe.adapters


@torch.no_grad()
def test_an_update_moves_and_is_copied_with_its_model(case: SimpleNamespace) -> None:
    """It is a part of the model, not something that hangs on it."""
    adapters.load_lora(case.pipe, case.file)
    model = case.pipe.transformer
    copied, before = copy.deepcopy(model).double(), model(*case.inputs)
    given = [x.double() for x in case.inputs]
    assert relative_error(copied(*given).float(), before) < BOUND
    for _, layer in lora.adapted_layers(model):
        for beside in layer.updates:
            beside.update.up.weight.zero_()
    assert relative_error(model(*case.inputs), case.bare) <= BOUND
    assert relative_error(copied(*given).float(), before) < BOUND


@torch.no_grad()
def test_an_update_may_be_more_exact_than_its_model(case: SimpleNamespace) -> None:
    adapters.load_lora(case.pipe, case.file)
    model = case.pipe.transformer.bfloat16()
    x, sigma, context, pooled = case.inputs
    given = x.bfloat16(), sigma, context.bfloat16(), pooled.bfloat16()
    before = model(*given)
    for _, layer in lora.adapted_layers(model):
        layer.updates.float()
    check_dtypes(model, VAE(AUTOENCODER).bfloat16())
    assert relative_error(model(*given), before) < 0.05
    with pytest.raises(ValueError, match="dtypes are mixed: transformer.x_embedder"):
        check_dtypes(model, VAE(AUTOENCODER))


def test_what_is_beside_a_layer_is_no_layer_to_adapt(case: SimpleNamespace) -> None:
    models = adapters.components(case.pipe)
    before = {part: list(lora.targets(model)) for part, model in models.items()}
    adapters.load_lora(case.pipe, case.file)
    for part, model in models.items():
        assert list(lora.targets(model)) == before[part]
        kinds = {type(target.layer) for target in lora.targets(model).values()}
        assert kinds == {torch.nn.Linear}


def test_8_bits_come_before_the_lora(case: SimpleNamespace) -> None:
    adapters.load_lora(case.pipe, case.file)
    with pytest.raises(ValueError, match="has a LoRA beside it; expected 8 bits first"):
        memory.to_float8(case.pipe.transformer)
    assert not any(isinstance(m, Float8Linear) for m in case.pipe.transformer.modules())


def test_one_file_twice_is_told(case: SimpleNamespace) -> None:
    first = adapters.load_lora(case.pipe, case.file)
    with pytest.warns(UserWarning, match="is on this pipeline already and is added"):
        adapters.load_lora(case.pipe, case.file / FILE, scale=0.5).remove()
    first.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters.load_lora(case.pipe, case.file)


@torch.no_grad()
def test_weights_of_16_bits_are_rounded_after_the_sum() -> None:
    model = pair(SMALL)[0].bfloat16()
    update = lora.LowRank(32, 32, 2)
    torch.nn.init.normal_(update.up.weight)
    layer = model.joint_blocks[0].x_block.attn.qkv
    exact = layer.weight[:32].float() + update.matrix()
    lora.fuse({LAYER.partition(".")[2]: update}, model)
    assert torch.equal(layer.weight[:32], exact.bfloat16())


@pytest.mark.slow
def test_two_files_are_both_on_record(case: SimpleNamespace, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes((case.file / FILE).read_bytes())
    first = adapters.load_lora(case.pipe, case.file)
    alone = dict(case.pipe.settings)
    second = adapters.load_lora(case.pipe, other, scale=0.5)
    both = {"lora": f"{case.file}, {other}", "lora_scale": "1.0, 0.5"}
    assert case.pipe.settings == both
    second.remove()
    assert case.pipe.settings == alone
    second = adapters.load_lora(case.pipe, other, scale=0.5, fused=True)
    for _ in range(2):  # once more has no effect
        first.remove()
        assert case.pipe.settings == {"lora": str(other), "lora_scale": 0.5}
    second.remove()  # it stays in the weights
    assert case.pipe.settings == {"lora": str(other), "lora_scale": 0.5}


@torch.no_grad()
def test_the_second_encoder_takes_a_file_too(tmp_path: Path) -> None:
    (first, _), (second, theirs) = text_pair(), text_pair()
    text = adapt(theirs, 2, 6, ["q_proj", "v_proj"])
    save = StableDiffusion3Pipeline.save_lora_weights
    save(
        tmp_path,
        None,
        None,
        text,
        text_encoder_2_lora_adapter_metadata=metadata(theirs),
    )
    parts = {"text_encoders": [first, second], "transformer": MMDiT(SMALL)}
    pipe = Pipe(**parts)
    ids = torch.randint(3, 50, (2, 12))
    ids[:, -1] = 2
    adapters.load_lora(pipe, tmp_path)
    expected = theirs(ids).text_embeds
    assert relative_error(second(ids)[1], expected) < BOUND


def saved_error(folder: Path) -> float:
    """Of a file that we write and diffusers reads."""
    ours, theirs = pair(SMALL)
    updates = lora.add_lora(ours, rank=2, alpha=3)
    for update in updates.values():
        torch.nn.init.normal_(update.up.weight, std=0.2)
    learning = [n for n, p in ours.named_parameters() if p.requires_grad]
    assert learning and all(".updates." in name for name in learning)
    lora.save_lora({"transformer": updates}, folder / FILE)
    state, notes = StableDiffusion3Pipeline.lora_state_dict(
        str(folder), return_lora_metadata=True
    )
    theirs.load_lora_adapter(state, prefix="transformer", metadata=notes)
    x = inputs()
    with torch.no_grad():
        return relative_error(ours(*x), their_velocity(theirs, *x))


def test_what_we_save_diffusers_loads(tmp_path: Path) -> None:
    assert saved_error(tmp_path) <= BOUND


@torch.no_grad()
def test_several_ranks_go_to_diffusers_and_back(tmp_path: Path) -> None:
    """With an α for each; the patterns name whole layers."""
    (ours, theirs), x = pair(SMALL), inputs()
    updates = lora.add_lora(ours, 2, 3, ["to_q"]) | lora.add_lora(ours, 4, 1, ["to_k"])
    for update in updates.values():
        torch.nn.init.normal_(update.up.weight, std=0.2)
    lora.save_lora({"transformer": updates}, tmp_path / FILE)
    state, notes = StableDiffusion3Pipeline.lora_state_dict(
        str(tmp_path), return_lora_metadata=True
    )
    how = {"prefix": "transformer", "adapter_name": "default"}
    theirs.load_lora_adapter(state, metadata=notes, **how)
    assert relative_error(their_velocity(theirs, *x), ours(*x)) <= BOUND
    again, layers = tmp_path / "again", get_peft_model_state_dict(theirs)
    notes = {
        "transformer_lora_adapter_metadata": theirs.peft_config["default"].to_dict()
    }
    StableDiffusion3Pipeline.save_lora_weights(again, layers, **notes)
    expected = {name: update.scale for name, update in updates.items()}
    for folder in (tmp_path, again):
        read = lora.read_lora(folder / FILE, {"transformer": ours})["transformer"]
        assert {name: update.scale for name, update in read.items()} == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern",
    [{"attn.to_q": 9, "to_v": 1}, {r"1\.attn\.to_q": 9, "no": 2, "to_q": 5}],
    ids=str,
)
@torch.no_grad()
def test_patterns_of_alpha_match_as_in_peft(tmp_path: Path, pattern: dict) -> None:
    """A pattern is the end of a layer's name; of several the first."""
    adapted, (ours, theirs), x = pair(SMALL)[1], pair(SMALL), inputs()
    layers = adapt(adapted, 3, 3, list(lora.ATTENTION))
    notes = metadata(adapted) | {"alpha_pattern": pattern}
    notes = {"transformer_lora_adapter_metadata": notes}
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, layers, **notes)
    state, notes = StableDiffusion3Pipeline.lora_state_dict(
        str(tmp_path), return_lora_metadata=True
    )
    theirs.load_lora_adapter(state, prefix="transformer", metadata=notes)
    pipe = Pipe(transformer=ours)
    adapters.load_lora(pipe, tmp_path)
    reference = their_velocity(theirs, *x)
    assert relative_error(ours(*x), reference) <= BOUND
    assert relative_error(their_velocity(adapted, *x), reference) > 1e-3


LAYER = "transformer.transformer_blocks.0.attn.to_q"
ALPHA = "transformer.lora_alpha"
PATTERN = "transformer.alpha_pattern"
GOOD = [(2, 32), (32, 2)]
ENDLESS = "(.|.)+[A-Z]"  # twice the time for each letter of a name


@pytest.mark.parametrize(
    ("shapes", "notes", "message"),
    [
        ([], None, "holds no LoRA: it has no tensors"),
        (
            [(0, 32), (32, 0)],
            None,
            "lora_A.weight has shape .0, 32.; expected a matrix",
        ),
        ([(2, 32), (32, 2, 1, 1)], None, "lora_B.weight has shape .32, 2, 1, 1.; exp"),
        (GOOD, "{", "metadata is '{'; expected a JSON object"),
        (GOOD, "[]", "metadata is '..'; expected a JSON object"),
        (GOOD, {ALPHA: "x"}, "to_q is 'x'; expected a number"),
        (GOOD, {ALPHA: float("nan")}, "to_q is nan; expected a number"),
        (GOOD, {PATTERN: [1]}, "alpha_pattern is .1.; expected layers"),
        (GOOD, {PATTERN: {"(": 1}}, "alpha_pattern has '.'; expected the name"),
        (GOOD, {PATTERN: {ENDLESS: 1}}, "alpha_pattern has .*; expected the name"),
        (GOOD, {PATTERN: {"a{99999999999}": 1}}, "alpha_pattern has .*; expected"),
        (GOOD, {PATTERN: {"(" * 10_000: 1}}, "alpha_pattern has .*…; expected"),
        (GOOD, {ALPHA: 10**400}, "to_q is 10*…; expected a number"),
        (GOOD, '{"a":' * 100_000, "metadata is .*; expected a JSON object"),
        (GOOD, {PATTERN: None}, ""),
        (GOOD, {"transformer.use_rslora": False, "transformer.use_dora": False}, ""),
        ([(2, 32), (32, 3)], None, r"shapes .32, 3. and .2, 32.; expected one rank"),
    ],
)
def test_malformed_files_are_named(tmp_path, shapes, notes, message) -> None:
    file, pairs = tmp_path / "bad.safetensors", zip("AB", shapes, strict=False)
    tensors = {f"{LAYER}.lora_{k}.weight": torch.zeros(s) for k, s in pairs}
    text = notes if isinstance(notes, str) else json.dumps(notes)
    save_file(tensors, file, {METADATA: text} if notes else None)
    models = {"transformer": pair(SMALL)[0]}
    if not message:
        assert lora.read_lora(file, models)
        return
    with pytest.raises(ValueError, match=f"bad.safetensors.*{message}"):
        lora.read_lora(file, models)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    head = {
        f"{LAYER}.lora_{k}.weight": {"dtype": "F32", "shape": s, "data_offsets": [0, 8]}
        for k, s in zip("AB", GOOD, strict=True)
    }
    text, file = json.dumps(head).encode(), tmp_path / "bad.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match="bad.safetensors is not a whole"):
        lora.read_lora(file, {"transformer": pair(SMALL)[0]})


@torch.no_grad()
def test_updates_in_half_precision_are_added_too(tmp_path: Path) -> None:
    ours, x = pair(SMALL)[0], inputs()
    pipe = Pipe(transformer=ours)
    file, before = tmp_path / "half.safetensors", ours(*x)
    a, b = (torch.randn(shape).half() for shape in GOOD)
    save_file({f"{LAYER}.lora_A.weight": a, f"{LAYER}.lora_B.weight": b}, file)
    half = adapters.load_lora(pipe, file)
    found = ours(*x)
    assert relative_error(found, before) > 1e-3
    half.remove()
    wide = {f"{LAYER}.lora_A.weight": a.float(), f"{LAYER}.lora_B.weight": b.float()}
    save_file(wide, tmp_path / "wide.safetensors")
    adapters.load_lora(pipe, tmp_path / "wide.safetensors")
    assert relative_error(ours(*x), found) < 1e-6


def test_a_model_without_the_usual_layers_is_told() -> None:
    with pytest.raises(
        ValueError, match="no layer is called to_q, .*end in fc1, fc2, .*q_proj"
    ):
        lora.add_lora(text_pair()[0], rank=2)


@torch.no_grad()
def test_new_updates_change_nothing_yet() -> None:
    ours, x = pair(SMALL)[0], inputs()
    before = ours(*x)
    lora.add_lora(ours, rank=4)
    assert torch.equal(ours(*x), before)


def test_another_model_is_refused(case: SimpleNamespace) -> None:
    small = MMDiT(SMALL.__class__.tiny())
    parts = {"transformer": small, "text_encoders": case.pipe.text_encoders}
    pipe = Pipe(**parts)
    with pytest.raises(
        ValueError, match="another model: it updates transformer.*expected"
    ):
        adapters.load_lora(pipe, case.file)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("transformer.transformer_blocks.9.attn.to_q", "another model: .* no linear"),
        ("transformer.proj_out.lora_C", "has transformer.proj_out.lora_C; expected"),
    ],
)
def test_other_kinds_of_update_are_refused(case, tmp_path, changed, message) -> None:
    tensors = load_file(case.file / FILE)
    if changed.endswith("to_q"):
        tensors |= {f"{changed}.lora_{k}.weight": torch.ones(1, 1) for k in "AB"}
    else:
        tensors[changed] = torch.ones(1)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=message):
        adapters.load_lora(case.pipe, tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("part", "file", "ends"),
    [
        ("transformer", "sd3.5-medium", [f".attn.{name}" for name in lora.ATTENTION]),
        (
            "text_encoder",
            "text_encoder",
            [f".{x}_proj" for x in ("q", "k", "v", "out")],
        ),
    ],
)
def test_official_names_are_those_of_the_manifest(shared, part, file, ends) -> None:
    path = shared / f"sd35/manifests/lora/{file}.rank4.tsv"
    lines = path.read_text().splitlines()
    names = {line.split("\t")[0] for line in lines if line[0] != "#"}
    model = blueprint("sd3.5-medium")[part]
    chosen = [name for name in lora.targets(model) if name.endswith(tuple(ends))]
    assert {f"{part}.{n}.lora_{k}.weight" for n in chosen for k in "AB"} == names


@pytest.mark.parametrize("scale", ["nan", "1e+30", "-65505.0"])
def test_a_scale_that_no_layer_can_take_is_refused(
    case: SimpleNamespace, scale: str
) -> None:
    line = f"lora_scale is {scale}; expected a finite number, -65504 to 65504"
    with pytest.raises(ValueError) as refused:
        adapters.load_lora(case.pipe, case.file, scale=float(scale))
    assert str(refused.value) == line


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_scale_overflows_in_no_dtype(dtype: torch.dtype) -> None:
    out = torch.zeros(1, 2, dtype=dtype)
    found = out.index_add(-1, torch.arange(2), out + 1, alpha=adapters.LARGEST)
    assert found.isfinite().all()


def test_unknown_layers_to_adapt_are_refused() -> None:
    with pytest.raises(ValueError, match="no layer is called conv1"):
        lora.add_lora(pair(SMALL)[0], 2, names=["conv1"])
