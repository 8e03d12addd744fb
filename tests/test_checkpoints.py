"""Files, names and errors of checkpoints; both directions of the diffusers layout."""

import json
import pickle
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from helpers import randomize
from safetensors.torch import load_file, save_file
from torch import nn

from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.files import disk, layout, weights
from minidiff.text_encoders import CLIPTextConfig, CLIPTextEncoder, T5Config, T5Encoder
from minidiff.vae import VAE, VAEConfig

MMDIT = MMDiTConfig(
    sample_size=8,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    pos_embed_max_size=6,
    dual_attention_layers=(0, 1),
    qk_norm="rms_norm",
)
SMALL_VAE = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
CLIP = CLIPTextConfig(50, 16, 24, 2, 2, 12, "gelu", 1e-5, 10, eos_token_id=2)
T5 = T5Config(50, 24, 8, 32, 2, 3)
COMPONENTS = {
    "SD3Transformer2DModel": (MMDiT, MMDIT),
    "AutoencoderKL": (VAE, SMALL_VAE),
    "CLIPTextModelWithProjection": (CLIPTextEncoder, CLIP),
    "T5EncoderModel": (T5Encoder, T5),
}


def saved(folder, class_name, dtype=None):
    model_class, config = COMPONENTS[class_name]
    model = randomize(model_class(config))
    weights.save_component(model, folder, class_name, dtype)
    return model


def load(folder, class_name, **kwargs):
    model_class, config = COMPONENTS[class_name]
    return weights.load_component(model_class, type(config), folder, **kwargs)


def their_class(class_name):
    module = pytest.importorskip(
        "diffusers" if class_name in weights.RENAMES else "transformers"
    )
    return getattr(module, class_name)


# Round trips


@pytest.mark.parametrize("class_name", COMPONENTS)
def test_saved_and_loaded_is_the_same(tmp_path, class_name):
    model = saved(tmp_path, class_name)
    loaded = load(tmp_path, class_name)
    assert loaded.config == model.config
    assert not loaded.training
    before, after = model.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("class_name", COMPONENTS)
def test_the_reference_loads_what_we_save_and_we_what_it_saves(tmp_path, class_name):
    model = saved(tmp_path / "ours", class_name)
    theirs, info = their_class(class_name).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs.save_pretrained(tmp_path / "theirs")
    back = load(tmp_path / "theirs", class_name).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back[name], tensor), name


def test_shards_are_found_by_their_index(tmp_path):
    model = saved(tmp_path / "ours", "SD3Transformer2DModel")
    theirs = their_class("SD3Transformer2DModel").from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(weights.weight_files(tmp_path / "shards")) > 2
    loaded = load(tmp_path / "shards", "SD3Transformer2DModel").state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in model.state_dict().items())
    next(iter(weights.weight_files(tmp_path / "shards"))).unlink()
    with pytest.raises(FileNotFoundError, match="00001-of"):
        load(tmp_path / "shards", "SD3Transformer2DModel")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/x.safetensors"])
def test_shards_lie_beside_their_index(tmp_path, name):
    index = tmp_path / f"{weights.WEIGHTS[1]}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="index.json names .*; expected files beside"):
        weights.weight_files(tmp_path)


@pytest.mark.parametrize("listed", ['"T5EncoderModel"', '["T5EncoderModel"]'])
def test_architectures_of_any_kind_name_the_class(tmp_path, listed):
    (tmp_path / "config.json").write_text(f'{{"architectures": {listed}}}')
    assert layout.component_class(tmp_path) == "T5EncoderModel"
    (tmp_path / "config.json").write_text('{"architectures": 5}')
    assert layout.component_class(tmp_path) == "5"  # of no component


def test_a_header_that_would_fill_the_memory_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "LONGEST_HEADER", 50)
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="a.safetensors is not a whole safetensors"):
        weights.open_tensors(file)


def test_dtype_and_device(tmp_path):
    model = saved(tmp_path, "AutoencoderKL", torch.float16)
    stored = load_file(tmp_path / weights.WEIGHTS[0])
    assert {t.dtype for t in stored.values()} == {torch.float16}
    assert {p.dtype for p in load(tmp_path, "AutoencoderKL").parameters()} == {
        torch.float32
    }
    as_stored = load(tmp_path, "AutoencoderKL", dtype=None)
    for name, tensor in model.state_dict().items():
        assert torch.equal(as_stored.state_dict()[name], tensor.half()), name
    meta = load(tmp_path, "AutoencoderKL", device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {
        ("meta", torch.bfloat16)
    }


def test_weights_in_their_own_dtype_stay_in_the_map(tmp_path):
    saved(tmp_path, "CLIPTextModelWithProjection")
    maps = Path("/proc/self/maps")
    maps = maps.read_text() if maps.exists() else ""
    if not maps:
        pytest.skip("needs /proc/self/maps")
    model = load(tmp_path, "CLIPTextModelWithProjection")
    ranges = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in open("/proc/self/maps")
        if str(tmp_path) in line
    ]
    for name, tensor in model.state_dict().items():
        assert any(a <= tensor.data_ptr() < b for a, b in ranges), name


def test_saving_over_the_mapped_file_keeps_the_model(tmp_path):
    saved(tmp_path, "T5EncoderModel")
    model = load(tmp_path, "T5EncoderModel")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    weights.save_component(model, tmp_path, "T5EncoderModel", torch.float16)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    file = tmp_path / "latest"
    with disk.replacing(file) as first, disk.replacing(file) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]


def test_a_full_disk_keeps_what_was_there(tmp_path):
    resource = pytest.importorskip("resource", reason="needs limits of POSIX")
    saved(tmp_path, "T5EncoderModel")
    file = tmp_path / weights.WEIGHTS[1]
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"cannot write {file}: .*too large"):
            saved(tmp_path, "T5EncoderModel", torch.float16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert not [*tmp_path.glob(".*")]


# Names


@pytest.mark.parametrize(
    "manifest, prefix, sources",
    [
        ("large.transformer", "model.diffusion_model.", weights.transformer_sources),
        ("medium.transformer", "model.diffusion_model.", weights.transformer_sources),
        ("vae", "first_stage_model.", weights.vae_sources),
    ],
)
def test_every_name_of_the_official_files(shared, manifest, prefix, sources):
    operations = {"copy": "copy", "squeeze_1x1": "conv", "swap_halves": "swap"}
    expected = {}
    table = shared / "sd35" / "manifests" / f"keymap.{manifest}.tsv"
    for line in table.read_text().splitlines()[1:]:
        ours, theirs, operation = line.split("\t")
        parts, _ = expected.get(ours.removeprefix(prefix), ((), ""))
        how = operations.get(operation, "stack")
        expected[ours.removeprefix(prefix)] = ((*parts, theirs), how)
    found = {name: (s.names, s.how) for name, s in sources(expected).items()}
    assert found == {n: (tuple(parts), how) for n, (parts, how) in expected.items()}


def test_half_swap_is_seen(tmp_path, monkeypatch):
    """The mutant that forgets to swap halves gives other numbers."""
    model = saved(tmp_path, "SD3Transformer2DModel")
    straight = lambda stored: {  # noqa: E731
        n: replace(s, how="copy" if s.how == "swap" else s.how)
        for n, s in weights.transformer_sources(stored).items()
    }
    monkeypatch.setitem(weights.RENAMES, "SD3Transformer2DModel", straight)
    loaded = load(tmp_path, "SD3Transformer2DModel").state_dict()
    wrong = {n for n, t in model.state_dict().items() if not torch.equal(t, loaded[n])}
    assert wrong == {
        f"{layer}.adaLN_modulation.1.{kind}"
        for layer in ("final_layer", "joint_blocks.2.context_block")
        for kind in ("weight", "bias")
    }


# Configurations


SIZES = ('"3"', "null", "1.5")
SCALES = ("NaN", "1e999", f"1{'0' * 400}")
PARTS = ("4", '["a"]')


def test_read_config(tmp_path):
    @dataclass(frozen=True)
    class Small:
        size: int
        parts: tuple[int, ...] = ()
        scale: float = 1.0
        num_layers: int = 1

    file = tmp_path / "config.json"
    file.write_text('{"size": 3, "parts": [1, 2], "other": null}')
    assert layout.read_config(Small, tmp_path) == Small(3, (1, 2))
    assert layout.read_config(Small, file) == Small(3, (1, 2))
    for text, message in (
        *((f'{{"size": {x}}}', "size is .*; expected int") for x in SIZES),
        *((f'{{"size": 1, "scale": {x}}}', "scale is .*; expected -3") for x in SCALES),
        *((f'{{"size": 1, "parts": {x}}}', "parts is .*; expected tu") for x in PARTS),
        (
            '{"size": 1, "num_layers": 1001}',
            "num_layers is 1001; expected 1 to 128",
        ),
        ('{"size": 0}', "size is 0; expected 1 to"),
        ('{"other": 1}', "lacks size"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "expected an object"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"config.json.* {message}"):
            layout.read_config(Small, tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        layout.read_config(Small, tmp_path)


BAD = {
    "qk_norm 'layer'": ("SD3Transformer2DModel", {"qk_norm": "layer"}),
    "num_attention_heads is 0; expected": (
        "SD3Transformer2DModel",
        {"num_attention_heads": 0},
    ),
    "3 norm groups do not divide": ("AutoencoderKL", {"norm_num_groups": 3}),
    "scaling_factor is 'x'; expected float": ("AutoencoderKL", {"scaling_factor": "x"}),
    "hidden_act 'relu'": ("CLIPTextModelWithProjection", {"hidden_act": "relu"}),
    "scaling_factor is 0; expected another": ("AutoencoderKL", {"scaling_factor": 0}),
    "num_heads is None; expected int": ("T5EncoderModel", {"num_heads": None}),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_value_names_the_file(tmp_path, message):
    class_name, changes = BAD[message]
    saved(tmp_path, class_name)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=f"config.json: .*{message}"):
            load(tmp_path, class_name, device=device)


# Files that cannot be used


@pytest.fixture
def vae_folder(tmp_path):
    saved(tmp_path, "AutoencoderKL")
    return tmp_path


def edit(folder, change):
    tensors = load_file(folder / weights.WEIGHTS[0])
    change(tensors)
    save_file(tensors, folder / weights.WEIGHTS[0], metadata={"format": "pt"})


def test_missing_weights(vae_folder):
    (vae_folder / weights.WEIGHTS[0]).unlink()
    with pytest.raises(FileNotFoundError, match="no weights in .*expected diffusion"):
        load(vae_folder, "AutoencoderKL")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_weights(vae_folder, kept):
    file = vae_folder / weights.WEIGHTS[0]
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.*bytes"):
        load(vae_folder, "AutoencoderKL")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1]",
        b'{"a": "b"}',
        b'{"a": {"shape": [1]}}',
        b'{"a": {"shape": ["x"], "data_offsets": [0, 8]}}',
        b'{"a": {"shape": [1], "data_offsets": [0, "8"]}}',
        b'{"a":' * 100_000,
    ],
    ids=lambda header: header[:50].decode(),
)
def test_weights_that_are_something_else(vae_folder, header):
    file = vae_folder / weights.WEIGHTS[0]
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=f"{file} is not a whole safetensors file"):
        load(vae_folder, "AutoencoderKL")


def test_no_tensors_at_all(vae_folder):
    file = vae_folder / weights.WEIGHTS[0]
    file.write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=f"{file} holds no tensors; expected"):
        load(vae_folder, "AutoencoderKL")
    index = vae_folder / f"{weights.WEIGHTS[0]}.index.json"
    file.unlink()
    for content in ("{}", '{"weight_map": [1]}'):
        index.write_text(content)
        with pytest.raises(ValueError, match=f"{index} names no files"):
            load(vae_folder, "AutoencoderKL")


@pytest.mark.parametrize("suffix", weights.PICKLED)
def test_pickled_weights_are_refused_unopened(vae_folder, suffix):
    (vae_folder / weights.WEIGHTS[0]).unlink()
    file = vae_folder / f"diffusion_pytorch_model{suffix}"
    file.write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match="pickled checkpoint.*expected a .safetensors"):
        load(vae_folder, "AutoencoderKL")
    with pytest.raises(ValueError, match="pickled checkpoint"):
        weights.prepare_weights(nn.Linear(1, 1), [file])


def test_wrong_shape(vae_folder):
    def change(tensors):
        tensors["decoder.conv_in.bias"] = torch.zeros(7)

    edit(vae_folder, change)
    with pytest.raises(
        ValueError, match=r"conv_in.bias has shape \[7\]; expected \[16"
    ):
        load(vae_folder, "AutoencoderKL")


def test_lacking_and_unexpected_names(vae_folder):
    edit(vae_folder, lambda tensors: tensors.pop("decoder.conv_in.bias"))
    with pytest.raises(ValueError, match="lacks 1 tensors: decoder.conv_in.bias"):
        load(vae_folder, "AutoencoderKL")
    saved(vae_folder, "AutoencoderKL")
    edit(vae_folder, lambda tensors: tensors.update(quant_conv=torch.zeros(2)))
    with pytest.raises(ValueError, match="1 unexpected tensors: quant_conv"):
        load(vae_folder, "AutoencoderKL")


def test_known_leftovers_are_ignored(tmp_path):
    model = saved(tmp_path, "T5EncoderModel")
    tensors = load_file(tmp_path / weights.WEIGHTS[1])
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, tmp_path / weights.WEIGHTS[1])
    loaded = load(tmp_path, "T5EncoderModel").state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in model.state_dict().items())


def test_weights_have_a_short_name(tmp_path, monkeypatch):
    """The beginning of their SHA-256: computed, or the name in the hub's cache."""
    file, content = tmp_path / "model.safetensors", b"some weights"
    file.write_bytes(content)
    digest = sha256(content).hexdigest()
    assert weights.short_hash(file) == digest[:12]
    monkeypatch.setattr(weights, "HASHED", 3)
    assert weights.short_hash(file) is None
    blob, link = tmp_path / ("ab" * 32), tmp_path / "link.safetensors"
    blob.write_bytes(content)
    link.symlink_to(blob)
    assert weights.short_hash(link) == ("ab" * 32)[:12]
