"""Official single files: every manifest consumed, both layouts the same tensors."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import AUTOENCODER, TRANSFORMER, small_pipeline

import minidiff
from minidiff.dit import MMDiTConfig
from minidiff.engine.loading import PARTS
from minidiff.files import single_file, weights
from minidiff.sampling import DEFAULTS
from minidiff.text_encoders import CLIPTextConfig, T5Config
from minidiff.vae import VAEConfig

BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I32": 4}
SINGLE = [
    ("sd3.5_medium", "transformer", MMDiTConfig.sd35_medium()),
    ("sd3.5_medium", "vae", VAEConfig.sd35()),
    ("sd3.5_large", "transformer", MMDiTConfig.sd35_large()),
    ("sd3.5_large", "vae", VAEConfig.sd35()),
    ("clip_l", "text_encoder", CLIPTextConfig.clip_l()),
    ("clip_g", "text_encoder_2", CLIPTextConfig.clip_g()),
    ("t5xxl_fp16", "text_encoder_3", T5Config.t5_xxl()),
]
HUB = [
    ("sd3.5-medium.transformer", "transformer", "sd3.5-medium"),
    ("sd3.5-large.transformer", "transformer", "sd3.5-large"),
    ("sd3.5-large.transformer", "transformer", "sd3.5-large-turbo"),
    ("vae", "vae", "sd3.5-large"),
    ("text_encoder", "text_encoder", "sd3.5-large"),
    ("text_encoder_2", "text_encoder_2", "sd3.5-medium"),
    ("text_encoder_3", "text_encoder_3", "sd3.5-large"),
]


def manifest(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Names, dtypes and shapes of a published file."""
    lines = [ln.split("\t") for ln in file.read_text().splitlines() if ln[:1] != "#"]
    return {n: (d, [int(s) for s in shape.split("x")]) for n, d, shape, *_ in lines}


def hollow(file: Path, tensors: dict[str, tuple[str, list[int]]], dtype="") -> Path:
    """A file of the published names, shapes and size that takes no room on the disk."""
    header, offset = {}, 0
    for name, (kind, shape) in tensors.items():
        kind = dtype or kind
        end = offset + torch.Size(shape).numel() * BYTES[kind]
        entry = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
        header[name], offset = entry, end
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)
    return file


# Every tensor of every manifest


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part", "config"), SINGLE)
def test_single_manifests_are_consumed(shared, tmp_path, name, part, config):
    tensors = manifest(shared / "sd35/manifests/single" / f"{name}.tsv")
    file = hollow(tmp_path / f"{name}.safetensors", tensors)
    prepared = single_file.prepare_part(part, *PARTS[part], file)
    assert prepared.model.config == config
    used = {n for source in prepared.sources.values() for n in source.names}
    prefix = single_file.PARTS[part][0]
    stored = {n for n in tensors if n.startswith(prefix)}
    assert stored - used <= weights.UNUSED
    absent = [n for n, source in prepared.sources.items() if not source.names]
    assert absent == (["text_projection.weight"] if name == "clip_l" else [])


@pytest.mark.parametrize("name", ["sd3.5_medium", "sd3.5_large"])
def test_a_combined_file_holds_two_parts_and_nothing_else(shared, name):
    tensors = manifest(shared / "sd35/manifests/single" / f"{name}.tsv")
    known = (single_file.TRANSFORMER, single_file.VAE)
    assert all(n.startswith(known) for n in tensors)


def test_the_fp8_file_of_t5(shared, tmp_path):
    tensors = manifest(shared / "sd35/manifests/single/t5xxl_fp16.tsv")
    file = hollow(tmp_path / "t5xxl_fp8_e4m3fn.safetensors", tensors, "F8_E4M3")
    prepared = single_file.prepare_part(
        "text_encoder_3", *PARTS["text_encoder_3"], file
    )
    assert prepared.model.config == T5Config.t5_xxl()


@pytest.mark.parametrize(("name", "part", "repository"), HUB)
def test_hub_manifests_are_consumed(shared, tmp_path, name, part, repository):
    tensors = manifest(shared / "sd35/manifests/hf" / f"{name}.tsv")
    config = shared / "sd35/configs" / repository / part / "config.json"
    (tmp_path / "config.json").write_text(config.read_text())
    kind = "diffusion_pytorch_model" if part in ("transformer", "vae") else "model"
    hollow(tmp_path / f"{kind}.safetensors", tensors)
    prepared = weights.prepare_component(*PARTS[part], tmp_path)
    used = {n for source in prepared.sources.values() for n in source.names}
    assert tensors.keys() - used <= weights.UNUSED


# Two layouts of the same weights


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """A hub folder, and single files with the encoders' folder beside them."""
    folder = tmp_path_factory.mktemp("layouts")
    pipe = small_pipeline(folder / "encoders")
    pipe.save_pretrained(folder / "hub")
    parts = {
        single_file.TRANSFORMER: pipe.transformer,
        single_file.VAE: pipe.vae,
    }
    save_file(
        {p + n: t for p, m in parts.items() for n, t in m.state_dict().items()},
        folder / "sd3.5_small.safetensors",
    )
    names = ("clip_l", "clip_g", "t5xxl_fp16")
    for name, encoder in zip(names, pipe.text_encoders, strict=True):
        state = dict(encoder.state_dict())
        if name == "clip_l":
            del state["text_projection.weight"]
        if name == "t5xxl_fp16":
            state["encoder.embed_tokens.weight"] = state["shared.weight"].clone()
        save_file(state, folder / "encoders" / f"{name}.safetensors")
    return folder


def models(pipe):
    return [*pipe.text_encoders, pipe.transformer, pipe.vae]


def test_both_layouts_give_the_same_tensors(layouts):
    hub = minidiff.load(layouts / "hub")
    file = layouts / "sd3.5_small.safetensors"
    single = minidiff.load(file, text_encoders=layouts / "encoders")
    for a, b in zip(models(hub), models(single), strict=True):
        first, second = a.state_dict(), b.state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[n], second[n]) for n in first)
    expected = asdict(TRANSFORMER) | {"sample_size": 24}  # the whole position table
    assert asdict(single.transformer.config) == expected
    assert asdict(single.vae.config) == asdict(AUTOENCODER)
    assert single.scheduler == hub.scheduler
    call = {"prompt": "a red dress", "num_inference_steps": 2, "output_type": "latent"}
    call |= {"height": 32, "width": 24}
    for pipe in (hub, single):
        pipe.progress = False
    assert torch.equal(hub(**call), single(**call))


def test_a_projection_in_clip_l_is_not_sd3s(layouts, tmp_path):
    """Files of others have OpenAI's: neither it nor the exact GELU is used."""
    given = layouts / "encoders" / "clip_l.safetensors"
    tensors = load_file(given)
    width = len(tensors["text_model.final_layer_norm.weight"])
    save_file(tensors | {"text_projection.weight": torch.ones(width, width)},
              tmp_path / given.name)  # fmt: skip
    part = PARTS["text_encoder"]
    plain, other = (
        single_file.prepare_part("text_encoder", *part, file)("cpu", torch.float32)
        for file in (given, tmp_path / given.name)
    )
    assert other.config == plain.config and other.config.hidden_act == "quick_gelu"
    assert torch.equal(other.text_projection.weight, torch.eye(width))


def test_the_encoders_may_be_a_hub_folder(layouts):
    file = layouts / "sd3.5_small.safetensors"
    pipe = minidiff.load(file, text_encoders=layouts / "hub")
    assert len(pipe.text_encoders[2].state_dict()) > 10


def test_a_plan_reads_single_files_too(layouts):
    file = layouts / "sd3.5_small.safetensors"
    encoders = {"text_encoders": layouts / "encoders"}
    plain = minidiff.load(file, **encoders)
    pipe = minidiff.load(file, **encoders, t5="streamed", modulation="streamed")
    call = {"prompt": "a red dress", "num_inference_steps": 2, "output_type": "latent"}
    plain.progress = pipe.progress = False
    assert torch.allclose(plain(**call), pipe(**call), rtol=1e-5, atol=1e-6)


# What is refused


def without(file, change, tmp_path):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, tmp_path / file.name)
    return tmp_path / file.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("first_stage_model.decoder.conv_in.bias"),
            "small.safetensors lacks 1 tensors: first_stage_model.decoder.conv_in.bias",
        ),
        (
            lambda t: t.pop("model.diffusion_model.x_embedder.proj.weight"),
            "is no transformer: it lacks model.diffusion_model.x_embedder.proj",
        ),
        (
            lambda t: t.update({"model.diffusion_model.more": torch.ones(1)}),
            "unexpected tensors: model.diffusion_model.more",
        ),
        (
            lambda t: t.update({"unet.conv": torch.ones(1)}),
            "neither a transformer's nor an autoencoder's, such as unet.conv",
        ),
        (
            lambda t: t.update(
                {"model.diffusion_model.t_embedder.mlp.0.bias": torch.ones(3)}
            ),
            r"t_embedder.mlp.0.bias has shape \[3\]; expected \[32\]",
        ),
    ],
)
def test_other_files_are_refused(layouts, tmp_path, change, message):
    file = without(layouts / "sd3.5_small.safetensors", change, tmp_path)
    with pytest.raises(ValueError, match=message):
        minidiff.load(file, text_encoders=layouts / "encoders")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("pos_embed", [3]), ("joint_blocks.0.x_block.attn.ln_q.weight", [0])],
)
def test_shapes_of_nothing_known_are_refused(layouts, tmp_path, name, shape):
    wrong = {f"model.diffusion_model.{name}": torch.ones(shape)}
    change = lambda tensors: tensors.update(wrong)  # noqa: E731
    file = without(layouts / "sd3.5_small.safetensors", change, tmp_path)
    with pytest.raises(ValueError, match="sd3.5_small.safetensors is no transformer"):
        minidiff.load(file, text_encoders=layouts / "encoders")


def test_without_t5_its_files_may_be_damaged(layouts, tmp_path):
    encoders = shutil.copytree(layouts / "encoders", tmp_path / "encoders")
    (encoders / "t5xxl_fp16.safetensors").write_bytes(b"half a download")
    file = layouts / "sd3.5_small.safetensors"
    assert (
        minidiff.load(file, text_encoders=encoders, t5="none").text_encoders[2] is None
    )
    (encoders / "clip_l.safetensors").write_bytes(
        (layouts / "encoders" / "clip_g.safetensors").read_bytes()[:-8]
    )
    with pytest.raises(ValueError, match="clip_l.safetensors is not a whole"):
        minidiff.load(file, text_encoders=encoders, t5="none")


def test_a_truncated_file_is_named(layouts, tmp_path):
    file = tmp_path / "sd3.5_small.safetensors"
    content = (layouts / file.name).read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="sd3.5_small.safetensors is not a whole"):
        minidiff.load(file, text_encoders=layouts / "encoders")


def test_a_turbo_file_is_drawn_as_one(layouts, tmp_path):
    file = tmp_path / "sd3.5_large_turbo.safetensors"
    shutil.copy(layouts / "sd3.5_small.safetensors", file)
    pipe = minidiff.load(file, text_encoders=layouts / "encoders")
    assert pipe.defaults == DEFAULTS["sd3.5-large-turbo"]
    assert (pipe.defaults.num_inference_steps, pipe.defaults.guidance_scale) == (4, 1)


def test_copies_of_the_encoders_in_the_file_do_not_matter(layouts, tmp_path):
    file = tmp_path / "sd3.5_small.safetensors"
    extra = {"text_encoders.clip_l.a": torch.zeros(1), "conditioner.b": torch.zeros(1)}
    save_file(load_file(layouts / file.name) | extra, file)
    call = {"text_encoders": layouts / "encoders"}
    pairs = zip(
        models(minidiff.load(file, **call)),
        models(minidiff.load(layouts / file.name, **call)),
        strict=True,
    )
    for ours, known in pairs:
        assert ours.state_dict().keys() == known.state_dict().keys()
        for name, x in known.state_dict().items():
            assert torch.equal(ours.state_dict()[name], x)


def test_t5_under_another_name_is_told(layouts, tmp_path):
    folder = shutil.copytree(layouts / "encoders", tmp_path / "copy")
    (file,) = folder.rglob("t5xxl*.safetensors")
    other = file.rename(file.with_name("t5xxl.safetensors"))
    call = {"text_encoders": folder}
    with pytest.raises(FileNotFoundError, match=f"{other} is not a name of T5's file"):
        minidiff.load(layouts / "sd3.5_small.safetensors", **call)
    pipe = minidiff.load(layouts / "sd3.5_small.safetensors", t5="none", **call)
    assert pipe.text_encoders[2] is None


@pytest.mark.parametrize("encoders", ["encoders", "hub"])
def test_t5_without_its_tokenizer_is_told_before_loading(layouts, tmp_path, encoders):
    folder = shutil.copytree(layouts / encoders, tmp_path / "copy")
    shutil.rmtree(folder / "tokenizer_3")
    call = {"text_encoders": folder}
    with pytest.raises(FileNotFoundError, match="copy has T5 and no tokenizer_3; exp"):
        minidiff.load(layouts / "sd3.5_small.safetensors", **call)
    pipe = minidiff.load(layouts / "sd3.5_small.safetensors", t5="none", **call)
    assert pipe.text_encoders[2] is None


def test_a_missing_encoder_is_named(layouts, tmp_path):
    file = layouts / "sd3.5_small.safetensors"
    with pytest.raises(FileNotFoundError, match="lacks clip_l.safetensors"):
        minidiff.load(file, text_encoders=tmp_path)
    with pytest.raises(ValueError, match="text encoders are not read from it; exp"):
        minidiff.load(file)
