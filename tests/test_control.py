"""Chapter 11: ControlNets against diffusers' and Stability's formula; their files."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import randomize, relative_error
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import minidiff
from minidiff.control import (
    VALUES,
    Control,
    ControlNet,
    ControlNetConfig,
    begin_control,
    canny,
    control_loss,
    controls_of,
    encode_weighted,
    load_control,
    save_control,
    split_weights,
    spread,
    window,
)
from minidiff.data.samples import sample_scenes
from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.files import weights
from minidiff.files.pictures import read_settings, to_pil
from minidiff.files.weights import controlnet_sources, single_controlnet_sources
from minidiff.judging.edges import agreement
from minidiff.sampling import Pipeline

BOUND = 1e-5
BLOCKS = MMDiTConfig(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    num_layers=6,
    attention_head_dim=64,
    num_attention_heads=1,
    joint_attention_dim=20,
    pooled_projection_dim=12,
    pos_embed_max_size=12,
    qk_norm="rms_norm",
)
SMALL = ControlNetConfig.of(BLOCKS, 3)


def net(kind: str = "edges", last: bool = False, seed: int = 5) -> ControlNet:
    return randomize(ControlNet(SMALL, kind, last), seed)


def given(batch: int = 2, size: tuple[int, int] = (8, 4)) -> dict[str, Tensor]:
    shape = batch, BLOCKS.in_channels, *size
    return {
        "latents": torch.randn(shape),
        "sigma": torch.rand(batch),
        "pooled": torch.randn(batch, BLOCKS.pooled_projection_dim),
        "condition": torch.randn(shape),
    }


# The net


@torch.no_grad()
def folder_error(folder: Path) -> float:
    """Of a net and its transformer's velocity, that we write and diffusers opens."""
    from diffusers import SD3ControlNetModel, SD3Transformer2DModel

    save_control(net(), folder / "net")
    transformer = randomize(MMDiT(BLOCKS))
    kind = "SD3Transformer2DModel"
    weights.save_component(transformer, folder / "transformer", kind)
    theirs = SD3ControlNetModel.from_pretrained(folder / "net")
    painter = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    ours, x, context = load_control(folder / "net"), given(), torch.randn(2, 5, 20)
    said = theirs(
        painter.pos_embed(x["latents"]),
        controlnet_cond=x["condition"],
        conditioning_scale=0.7,
        pooled_projections=x["pooled"],
        timestep=1000 * x["sigma"],
        return_dict=False,
    )[0]
    expected = painter(
        x["latents"], context, x["pooled"], 1000 * x["sigma"], said, return_dict=False
    )[0]
    controls = controls_of(ours, transformer, **x, strength=0.7)
    asked = x["latents"], x["sigma"], context, x["pooled"]
    found = transformer(*asked, controls=controls)
    assert relative_error(transformer(*asked), expected) > 0.01
    pairs = zip([*controls[::2], found], [*said, expected], strict=True)
    return max(relative_error(*pair) for pair in pairs)


def test_folder_agrees_with_diffusers(tmp_path: Path) -> None:
    assert folder_error(tmp_path) <= BOUND


def single(model: ControlNet, kind: int | None = 1) -> dict[str, Tensor]:
    """The tensors of an official single file, with those that nobody reads."""
    state = model.state_dict()
    sources = single_controlnet_sources(state)
    tensors = {sources[name].names[0]: x.clone() for name, x in state.items()}
    tensors["pos_embed.proj.weight"] = torch.ones(64, 4, 2, 2)
    tensors["context_embedder.bias"] = torch.ones(64)
    if kind is not None:
        tensors["control_type"] = torch.tensor([kind], dtype=torch.int32)
    return tensors


def stability(model: dict[str, Tensor], x: Tensor, c: Tensor) -> list[Tensor]:
    """The published formula, on tokens (B, N, 64) and c (B, 64), tensor by tensor."""
    said = []
    for i in range(3):
        own = {
            name.removeprefix(f"transformer_blocks.{i}."): value
            for name, value in model.items()
        }

        def linear(name: str, x: Tensor, own: dict = own) -> Tensor:
            return F.linear(x, own[f"{name}.weight"], own[f"{name}.bias"])

        m = linear("adaLN_modulation.1", F.silu(c))[:, None].chunk(6, dim=-1)
        normed = F.layer_norm(x, (64,), eps=1e-6) * (1 + m[1]) + m[0]
        q, k, v = linear("attn.qkv", normed).chunk(3, dim=-1)
        weight = (q @ k.mT / 8).softmax(-1)  # one head of 64
        x = x + m[2] * linear("attn.proj", weight @ v)
        normed = F.layer_norm(x, (64,), eps=1e-6) * (1 + m[4]) + m[3]
        inner = F.gelu(linear("mlp.fc1", normed), approximate="tanh")
        x = x + m[5] * linear("mlp.fc2", inner)
        out = f"controlnet_blocks.{i}"
        said.append(F.linear(x, model[f"{out}.weight"], model[f"{out}.bias"]))
    return said


@torch.no_grad()
def single_file_error(folder: Path) -> float:
    """It counts behind the last block too, where the folder's form does not."""
    tensors = single(net(), kind=2)
    save_file(tensors, folder / "depth.safetensors")
    ours, transformer, x = (
        load_control(folder / "depth.safetensors"),
        randomize(MMDiT(BLOCKS)),
        given(),
    )
    assert (ours.kind, ours.last, ours.config) == ("depth", True, SMALL)
    tokens = transformer.x_embedder(x["latents"]) + transformer.positions(4, 2)
    condition = F.conv2d(
        x["condition"],
        tensors["pos_embed_input.proj.weight"],
        tensors["pos_embed_input.proj.bias"],
        stride=2,
    )
    tokens = tokens + condition.flatten(2).mT
    phase = 1000 * x["sigma"][:, None] * 10_000 ** -(torch.arange(128) / 128)
    c = torch.zeros(2, 64)
    for name, value in (
        ("timestep_embedder", torch.cat([phase.cos(), phase.sin()], -1)),
        ("text_embedder", x["pooled"]),
    ):
        for k in (1, 2):
            layer = f"time_text_embed.{name}.linear_{k}"
            w, b = tensors[f"{layer}.weight"], tensors[f"{layer}.bias"]
            value = F.linear(F.silu(value) if k == 2 else value, w, b)
        c = c + value
    expected = stability(tensors, tokens, c)
    found = controls_of(ours, transformer, **x)
    assert len(found) == 6
    asked = x["latents"], x["sigma"], torch.randn(2, 5, 20), x["pooled"]
    whole = transformer(*asked, controls=found)
    assert relative_error(transformer(*asked, controls=found[:5]), whole) > 1e-3
    return max(relative_error(u, expected[i // 2]) for i, u in enumerate(found))


def test_single_file_agrees_with_the_published_formula(tmp_path: Path) -> None:
    assert single_file_error(tmp_path) <= BOUND


@pytest.mark.parametrize("folder", ["hf", "single"])
def test_large_matches_the_published_files(shared: Path, folder: str) -> None:
    """Every name and every shape, on the meta device."""
    name = "sd3.5-large-controlnet" if folder == "hf" else "sd3.5_large_controlnet"
    path = shared / "sd35" / "manifests" / folder / f"{name}.tsv"
    rows = [r.split("\t") for r in path.read_text().splitlines() if r[:1] != "#"]
    wanted = {name: [int(n) for n in shape.split("x")] for name, _, shape in rows}
    with weights.on_meta():
        state = ControlNet(ControlNetConfig.sd35_large()).state_dict()
    sources = controlnet_sources if folder == "hf" else single_controlnet_sources
    found = {}
    for ours, source in sources(state).items():
        rows_of = len(state[ours]) // len(source.names)
        for stored in source.names:
            found[stored] = [rows_of, *state[ours].shape[1:]]
    unread = ("pos_embed.", "context_embedder.", "control_type")
    assert found == {n: s for n, s in wanted.items() if not n.startswith(unread)}
    assert folder == "single" or found == wanted
    assert sum(x.numel() for x in state.values()) == 2_153_518_976


def test_large_is_read_off_its_configuration_and_its_shapes(shared: Path) -> None:
    from minidiff.files.layout import read_config
    from minidiff.files.single_file import controlnet_sizes

    folder = shared / "sd35" / "configs" / "sd3.5-large-controlnet"
    large = ControlNetConfig.sd35_large()
    assert read_config(ControlNetConfig, folder) == large
    with weights.on_meta():
        state = ControlNet(large).state_dict()
    sources = single_controlnet_sources(state)
    shapes = {sources[n].names[0]: tuple(x.shape) for n, x in state.items()}
    assert ControlNetConfig(**controlnet_sizes(shapes)) == large


def test_spread_takes_each_as_often() -> None:
    said = [torch.tensor(i) for i in range(19)]
    assert [int(u) for u in spread(said, 38, last=True)] == [i // 2 for i in range(38)]
    assert len(spread(said, 38)) == 37


@torch.no_grad()
def test_a_net_that_has_not_learned_changes_nothing() -> None:
    transformer = randomize(MMDiT(BLOCKS))
    fresh, x = begin_control(transformer), given()
    assert all(not u.any() for u in controls_of(fresh, transformer, **x))
    for k, block in enumerate(fresh.transformer_blocks):
        image = transformer.joint_blocks[2 * k].x_block
        assert torch.equal(block.mlp.fc1.weight, image.mlp.fc1.weight)
    assert torch.equal(
        fresh.y_embedder.mlp[0].weight, transformer.y_embedder.mlp[0].weight
    )


def test_gradients_reach_the_net_and_only_the_net() -> None:
    transformer = randomize(MMDiT(BLOCKS)).requires_grad_(False)
    own, x = begin_control(transformer, 3), given()
    batch = {"x0": x.pop("latents"), "context": torch.randn(2, 5, 20), **x}
    batch["noise"] = torch.randn_like(batch["x0"])
    control_loss(transformer, own, batch).backward()
    assert all(layer.weight.grad.any() for layer in own.controlnet_blocks[:2])
    assert not own.pos_embed_input.proj.weight.grad.any()  # zeros stand behind it
    assert all(p.grad is None for p in transformer.parameters())


# Files


def test_kinds_are_found(tmp_path: Path) -> None:
    save_control(net("blur"), tmp_path / "own")
    assert load_control(tmp_path / "own").kind == "blur"
    config = tmp_path / "own" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({k: v for k, v in content.items() if k != "_kind"}))
    asks = "own does not say what its conditions show; expected kind='blur' or 'canny'"
    with pytest.raises(ValueError, match=asks):
        load_control(tmp_path / "own")
    assert load_control(tmp_path / "own", kind="depth").kind == "depth"
    with pytest.raises(ValueError, match="kind is 'lines'; expected one of blur"):
        load_control(tmp_path / "own", kind="lines")


CANNY = "stable-diffusion-3.5-large-controlnet-canny"
PLACES = [
    (CANNY, "canny"),
    (f"stabilityai/{CANNY}", "canny"),
    (f"models--stabilityai--{CANNY}/snapshots/0", "canny"),
    ("sd3.5_large_controlnet_depth.safetensors", "depth"),
    ("large-controlnet-canny", None),
    (f"{CANNY}/mine", None),
    ("my-depth.safetensors", None),
]


@pytest.mark.parametrize(("place", "kind"), PLACES)
def test_a_kind_is_known_by_the_whole_published_name(
    tmp_path: Path, place: str, kind: str | None
) -> None:
    path = tmp_path / place
    if place.endswith(".safetensors"):
        tensors = {k: v for k, v in single(net()).items() if k != "control_type"}
        save_file(tensors, path)
    else:
        save_control(net(), path)
        content = json.loads((path / "config.json").read_text())
        del content["_kind"]
        (path / "config.json").write_text(json.dumps(content))
    if kind is None:
        with pytest.raises(ValueError, match="does not say what its conditions show"):
            load_control(path)
    else:
        assert load_control(path).kind == kind


@pytest.mark.parametrize(
    "change, message",
    [
        ({"joint_attention_dim": 4096}, "joint_attention_dim is 4096; expected None"),
        ({"use_pos_embed": True}, "use_pos_embed is True; expected False, as in SD3.5"),
        ({"extra_conditioning_channels": 1}, "extra_conditioning_channels is 1; expe"),
        ({"num_layers": 2}, "unexpected tensors: controlnet_blocks.2.bias"),
        ({"num_layers": "2"}, "num_layers is '2'; expected int"),
    ],
)
def test_folders_that_cannot_be_used(
    tmp_path: Path, change: dict, message: str
) -> None:
    save_control(net(), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_control(tmp_path)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"control_type": torch.tensor([7])}, "control_type is 7; expected 0, 1 or 2"),
        ({"pos_embed_input.proj.weight": None}, "it lacks pos_embed_input.proj.weight"),
        ({"extra": torch.ones(1)}, "unexpected tensors: extra"),
        (
            {"controlnet_blocks.2.bias": torch.ones(3)},
            r"controlnet_blocks.2.bias has shape \[3\]; expected \[64\]",
        ),
    ],
)
def test_single_files_that_cannot_be_used(
    tmp_path: Path, changed: dict, message: str
) -> None:
    tensors = {k: v for k, v in (single(net()) | changed).items() if v is not None}
    save_file(tensors, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=message):
        load_control(tmp_path / "net.safetensors")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is missing; expected tiny-e"):
        load_control(tmp_path / "nowhere")


def test_what_is_no_file_is_called_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "net")
    with pytest.raises(ValueError, match="net is a pipe; expected a file"):
        load_control(tmp_path / "net")


# Conditions


def test_values_are_the_published_ones() -> None:
    grey = torch.tensor([0.0, 0.5, 1.0])
    assert VALUES["blur"](grey).tolist() == VALUES["depth"](grey).tolist() == [-1, 0, 1]
    assert VALUES["canny"](grey).tolist() == [0.5, 64.25, 128]


def test_canny_draws_what_opencv_draws() -> None:
    """OpenCV 5's Canny(picture, 100, 200): a box, a slope, and what is too weak."""
    picture = torch.zeros(1, 3, 10, 20)
    picture[..., 2:8, 2:8] = 0.8
    for i in range(6):
        picture[..., 2 + i, 11 : 17 - i // 2] = 0.35 + 0.12 * i
    picture[..., 3:7, 18:] = 0.12
    edges = canny(picture)[0, 0]
    assert ["".join(".#"[int(v)] for v in row) for row in edges] == [
        "....................",
        "...####.............",
        "..#....#...######...",
        ".#.....#...#....#...",
        ".#.....#...#....#...",
        ".#.....#...###.#....",
        ".#.....#...#...#....",
        "..######...#..#.....",
        "............##......",
        "....................",
    ]


def test_canny_joins_what_hangs_together() -> None:
    """A weak edge stays where it touches a strong one, however far it goes on."""
    picture = torch.zeros(1, 3, 8, 40)
    picture[..., 4:, :] = torch.linspace(0.3, 0.11, 40)  # its edge fades to the right
    steps = canny(picture, 100, 200).sum().item(), canny(picture, 200, 200).sum().item()
    assert steps[0] > 1.5 * steps[1] > 0


def test_agreement_is_intersection_over_union() -> None:
    picture = torch.zeros(1, 3, 20, 20)
    picture[..., 5:15, 5:15] = 1
    own = canny(picture)
    right, far = own.roll(1, -1), own.roll(4, -1)
    plain = (own * right).sum() / (own + right).clamp(max=1).sum()
    assert agreement(picture, right, 0).item() == pytest.approx(plain.item())
    assert agreement(picture, own).item() == agreement(picture, right).item() == 1
    assert agreement(picture, far).item() < 0.5
    nothing = torch.zeros_like(own)
    assert agreement(picture, nothing).item() == 0
    assert agreement(torch.zeros_like(picture), nothing).item() == 1


# In a pipeline


def begin(small: Path) -> tuple[Pipeline, ControlNet]:
    """A pipeline of a folder, and a net for it."""
    pipe = minidiff.load(small)
    pipe.progress = False
    config = ControlNetConfig.of(pipe.transformer.config, 2)
    return pipe, randomize(ControlNet(config), 9)


@pytest.fixture(scope="module")
def steered(small: Path) -> tuple[Pipeline, ControlNet]:
    return begin(small)


def draw(pipe: Pipeline, **call: object) -> Tensor:
    call = {"num_inference_steps": 4, "guidance_scale": 3.0} | call
    return pipe("a red dress", output_type="latent", **call)


def sketch(pipe: Pipeline, rows: int = 1) -> Tensor:
    side = pipe.vae.config.factor * pipe.transformer.config.sample_size
    return torch.rand(rows, 1, side, side).round()


def drawing_error(folder: Path, small: Path, steered: tuple) -> float:
    """Guided, two nets at once, each with its strength, start and end."""
    import diffusers
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Drawn

    pipe, first = steered
    second = randomize(ControlNet(first.config, "blur"), 11)
    nets = []
    for name, one in (("first", first), ("second", second)):
        save_control(one, folder / name)
        nets.append(diffusers.SD3ControlNetModel.from_pretrained(folder / name))
    parts = diffusers.StableDiffusion3Pipeline.from_pretrained(small).components
    theirs = diffusers.StableDiffusion3ControlNetPipeline(
        **{
            k: v
            for k, v in parts.items()
            if "image_enc" not in k and "feature" not in k
        },
        controlnet=diffusers.SD3MultiControlNetModel(nets),
    )
    theirs.set_progress_bar_config(disable=True)
    pictures = [to_pil(sketch(pipe).expand(-1, 3, -1, -1))[0] for _ in range(2)]
    noise = pipe.prepare_latents(1)
    how = {"num_inference_steps": 8, "guidance_scale": 3.0, "latents": noise}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drawn, "sample", Drawn.mode)
        expected = theirs(
            "a red dress",
            control_image=pictures,
            controlnet_conditioning_scale=[0.8, 0.5],
            control_guidance_start=[0.0, 0.25],
            control_guidance_end=[0.5, 1.0],
            max_sequence_length=20,
            output_type="latent",
            **how,
        ).images
    control = [
        Control(pictures[0], first, 0.8, 0.0, 0.5),
        Control(pictures[1], second, 0.5, 0.25, 1.0),
    ]
    assert relative_error(draw(pipe, control=control[0], **how), expected) > 1e-3
    return relative_error(draw(pipe, control=control, **how), expected)


@pytest.mark.slow
def test_pipeline_agrees_with_diffusers(
    tmp_path: Path, small: Path, steered: tuple
) -> None:
    assert drawing_error(tmp_path, small, steered) <= BOUND


def test_window_counts_as_diffusers() -> None:
    sigmas = torch.linspace(1, 0, 11)
    for start, end in ((0.0, 1.0), (0.25, 0.75), (0.3, 0.31), (0.0, 0.05)):
        kept = [not (i / 10 < start or (i + 1) / 10 > end) for i in range(10)]
        assert window(sigmas, start, end) == set(sigmas[:-1][kept].tolist())


def test_strength_zero_and_a_window_without_steps_change_nothing(
    steered: tuple,
) -> None:
    pipe, one = steered
    plain, picture = draw(pipe), sketch(pipe)
    assert torch.equal(draw(pipe, control=Control(picture, one, 0.0)), plain)
    assert torch.equal(draw(pipe, control=Control(picture, one, 1.0, 0, 0.1)), plain)
    assert not torch.allclose(draw(pipe, control=Control(picture, one)), plain)


def test_each_drawing_has_its_own_sketch(steered: tuple) -> None:
    pipe, one = steered
    pictures = sketch(pipe, 2)
    noise = pipe.prepare_latents(2)
    both = draw(
        pipe, control=Control(pictures, one), latents=noise, num_images_per_prompt=2
    )
    for i in range(2):
        control = Control(pictures[i], one)
        alone = draw(pipe, control=control, latents=noise[i : i + 1])
        assert relative_error(both[i : i + 1], alone) <= BOUND


def test_pictures_say_what_steered_them(tmp_path: Path, steered: tuple) -> None:
    pipe, one = steered
    file = tmp_path / "sketch.png"
    to_pil(sketch(pipe).expand(-1, 3, -1, -1))[0].resize((30, 20)).save(file)
    control = Control(file, one, 0.5)
    picture = pipe("a dress", num_inference_steps=1, control=control)[0]
    assert picture.info["control"] == f"edges {file}, strength 0.5, 0 to 1"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"strength": float("nan")}, "control_strength is nan; expected a finite"),
        ({"start": 0.5, "end": 0.5}, "acts from 0.5 to 0.5; expected 0 ≤ start < end"),
        ({"end": 1.5}, "acts from 0.0 to 1.5; expected"),
        ({"net": "canny"}, "net is a str; expected a ControlNet, as load_control"),
        ({"image": 3}, "image is a int; expected a PIL picture, a file or a tensor"),
        ({"image": torch.ones(1, 32, 32).cfloat()}, "image is a tensor of .*complex64"),
    ],
)
def test_controls_that_cannot_be(steered: tuple, change: dict, message: str) -> None:
    pipe, one = steered
    with pytest.raises((ValueError, TypeError), match=message):
        Control(**({"image": sketch(pipe), "net": one} | change))


@pytest.mark.parametrize(
    "image, message",
    [
        (torch.rand(1, 1, 8, 8), r"shape \(1, 1, 8, 8\); expected \(B, 1 or 3, 32, 32"),
        (torch.rand(2, 32, 32), r"shape \(2, 32, 32\); expected"),
        (torch.rand(3, 1, 32, 32), "has 3 pictures; expected 1 or 1"),
        (2 * torch.ones(1, 32, 32), "has values from 2 to 2; expected 0 to 1"),
    ],
)
def test_sketches_that_do_not_fit(steered: tuple, image: Tensor, message: str) -> None:
    pipe, one = steered
    with pytest.raises(ValueError, match=message):
        draw(pipe, control=Control(image, one))


def test_nets_that_do_not_fit(steered: tuple) -> None:
    pipe, one = steered
    for change, message in (
        (
            {"pooled_projection_dim": 7},
            "pooled_projection_dim is 7; this model needs 40",
        ),
        ({"num_layers": 4}, "the ControlNet has 4 blocks; expected at most 3"),
    ):
        other = ControlNet(replace(one.config, **change))
        with pytest.raises(ValueError, match=message):
            draw(pipe, control=Control(sketch(pipe), other))
    with pytest.raises(TypeError, match="control is a str; expected a Control, or a l"):
        draw(pipe, control="canny")


def test_the_net_that_ships() -> None:
    """Drawings keep to sketches in other colours than those that they come from."""
    pipe, shipped = minidiff.load("tiny"), load_control("tiny-edges")
    assert (shipped.kind, shipped.last) == ("edges", False)
    sketches = canny((sample_scenes()[0][:6] + 1) / 2)
    things = "dress feather sandal t-shirt whale target".split()
    words = [f"a green {thing} on pink" for thing in things]
    how = {"seed": 0, "num_inference_steps": 8, "output_type": "pt"}
    alone = agreement(pipe(words, **how), sketches).mean()
    steered = pipe(words, control=Control(sketches, shipped, 2.0), **how)
    assert agreement(steered, sketches).mean() > max(0.6, 2 * alone)


# The command line


def test_sample_takes_a_control(
    run: Callable, tmp_path: Path, small: Path, steered: tuple
) -> None:
    pipe, one = steered
    save_control(one, tmp_path / "net")
    file = tmp_path / "sketch.png"
    to_pil(sketch(pipe).expand(-1, 3, -1, -1))[0].save(file)
    how = ["--model", small, "--steps", 2, "--device", "cpu", "--output", "drawn.png"]
    control = ["--control", tmp_path / "net", "--control-image", file]
    status, out, err = run("sample", "a dress", *how, *control, "--control-end", 0.5)
    assert (status, out) == (0, "drawn.png\n"), err
    told = read_settings(tmp_path / "drawn.png")
    assert told["control"] == f"edges {file}, strength 1, 0 to 0.5"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--control", "net"], "--control is net, which needs --control-image, the p"),
        (
            ["--control-image", "a.png"],
            "--control-image is a.png, which needs --control",
        ),
        (["--control-end", "0.5"], "--control-end is 0.5, which needs --control"),
        (
            ["--control", "net", "--control-image", "a.png"],
            "net is missing; expected tiny-edges, or a ControlNet's file or folder",
        ),
    ],
)
def test_sample_refuses_half_a_control(
    run: Callable, options: list[str], message: str
) -> None:
    status, _, err = run("sample", "a dress", *options)
    assert status == 2 and message in err


# The weight of a word


def test_weights_are_split_off() -> None:
    for red, weight in {
        "(red:1.3)": 1.3,
        "(red:.5)": 0.5,
        "(red : 1.5 )": 1.5,
        "(red:-1.)": -1,
    }.items():
        pieces = [("a ", 1.0), ("red", weight), (" dress", 1.0)]
        assert split_weights(f"a {red} dress") == pieces
    assert split_weights("(blue bag:0)(a: b:2)") == [("blue bag", 0.0), ("a: b", 2.0)]


@pytest.mark.parametrize(
    "prompt", ["a (b) (c", "a (red) dress: 2", "(:3) at 9:30, (:3)", "a) 16:9)"]
)
def test_parentheses_without_a_weight_are_words(prompt: str) -> None:
    assert split_weights(prompt) == [(prompt, 1.0)]


@pytest.mark.parametrize("prompt", ["((red:1.2):1.3) dress", "(a (b) c:2) (c"])
def test_weights_around_parentheses_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="weighs parentheses; expected words"):
        split_weights(prompt)


def test_each_encoder_weighs_its_own_tokens(steered: tuple) -> None:
    """A weight of 1 changes nothing; of 0, a word's rows are the empty prompt's."""
    pipe, _ = steered
    empty, plain = pipe.encode_prompt(["", "a red dress"])[0]
    found, pooled = encode_weighted(pipe, "a (red:1.0) dress")
    assert torch.equal(found[0], plain)
    assert relative_error(pooled, pipe.encode_prompt("a red dress")[1]) < 1e-6
    found, _ = encode_weighted(pipe, "a (red:0) dress")
    clips = [pipe.tokenizers[i].encode(t) for i in (0, 1) for t in ("a", "a red")]
    for i, columns in ((0, slice(0, 16)), (1, slice(16, 40))):
        rows = slice(len(clips[2 * i]) - 1, len(clips[2 * i + 1]) - 1)
        assert relative_error(found[0, rows, columns], empty[rows, columns]) < 1e-6
        assert torch.equal(found[0, rows.stop, columns], plain[rows.stop, columns])
    t5, length = pipe.tokenizers[2], pipe.tokenizers[0].model_max_length
    first, last = (length + len(t5.encode(t)) - 1 for t in ("a", "a red"))
    assert relative_error(found[0, first:last], empty[first:last]) < 1e-6
    changed = (found[0] != plain).any(-1).nonzero().flatten().tolist()
    assert {*range(first, last)} <= {*changed}
    assert all(row < length or first <= row < last for row in changed)
