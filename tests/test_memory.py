"""Memory plans: the same pictures from less memory, and the memory counted."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import randomize, relative_error
from safetensors.torch import save_file

import minidiff
from benchmarks.memory_count import (
    STREAMED,
    control_net,
    denoising_peak,
    t5_peak,
    vae_peak,
)
from minidiff import control
from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.drawing import image_to_image
from minidiff.efficiency import Float8Linear, NF4Linear, quantize_nf4, restore_nf4
from minidiff.engine import memory, tiling
from minidiff.engine.adapters import load_lora
from minidiff.engine.loading import Given, blueprint, open_model
from minidiff.engine.memory import GIB, Call, Plan, choose, estimate
from minidiff.engine.tiling import Tiled
from minidiff.files import layout, weights
from minidiff.interface.checks import device_and_dtype
from minidiff.interface.request import Request
from minidiff.vae import VAE, Posterior, VAEConfig

PAGE = Path(__file__).parents[1] / "book" / "performance.md"
PAGE = PAGE.read_text(encoding="utf-8")
CALL = {
    "prompt": ["a red dress", "a green bag"],
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "output_type": "pt",
}


@pytest.fixture
def folder(small):
    return small


def rehearse(check, model, device="cpu", dtype=None, budget=None, **knobs):
    """As the command line does it: how what is checked fits."""
    wanted = memory.requested(budget, **knobs)
    given = Given(model, t5=wanted.t5 != "none")
    opened = open_model(given, *device_and_dtype(device, dtype), weights=False)
    fit = opened.fit(budget, check(opened.rehearsal(wanted)), **knobs)
    if fit.plan != wanted:
        check(opened.rehearsal(fit.plan))
    return fit


def asks(prompt="a red dress", **call):
    """What checks one request."""
    return lambda pipe: [pipe.check(Request(prompt, **call))]


def draw(folder, **settings):
    pipe = minidiff.load(folder, **settings)
    pipe.progress = False
    return pipe(**CALL), pipe


# The same pictures


@pytest.mark.parametrize(
    "knobs",
    [
        {"t5": "streamed"},
        {"clip": "streamed"},
        {"modulation": "streamed"},
        {"vae_slicing": True},
        {"t5": "streamed", "clip": "streamed", "modulation": "streamed"},
    ],
    ids=lambda k: "+".join(k),
)
def test_a_plan_changes_no_picture(folder, knobs):
    expected, _ = draw(folder)
    pictures, _ = draw(folder, **knobs)
    assert relative_error(pictures, expected) < 1e-6


@pytest.mark.slow
def test_streamed_positions_follow_the_size(folder):
    plain, pipe = minidiff.load(folder), minidiff.load(folder, modulation="streamed")
    for height, width in ((32, 48), (48, 32)):
        call = CALL | {"height": height, "width": width}
        assert relative_error(pipe(**call), plain(**call)) < 1e-6


def test_streamed_weights_are_not_on_the_device(folder):
    _, whole = draw(folder)
    _, pipe = draw(folder, t5="streamed", clip="streamed", modulation="streamed")
    kept = dict(pipe.transformer.named_parameters())
    assert not [name for name in kept if "adaLN" in name]
    assert len(kept) < len(dict(whole.transformer.named_parameters()))
    for encoder in pipe.text_encoders:
        largest = max(p.numel() for p in encoder.parameters())
        assert largest <= 12 * 48  # positions and norms; no matrix, no vocabulary
    pipe.transformer.to(torch.float64)
    layer = pipe.transformer.joint_blocks[0].x_block.adaLN_modulation[1]
    assert layer.stored[0].dtype == torch.float32  # still the file's


def test_fp8_weights_halve_bf16_and_stay_close(folder):
    expected, _ = draw(folder)
    pictures, pipe = draw(folder, fp8=True)
    linear = pipe.transformer.joint_blocks[0].x_block.attn.qkv
    assert isinstance(linear, Float8Linear) and linear.weight.element_size() == 1
    assert 1e-4 < relative_error(pictures, expected) < 0.15
    whole = weights.load_component(
        type(pipe.transformer), MMDiTConfig, folder / "transformer"
    )
    matrix = whole.joint_blocks[0].x_block.attn.qkv.weight
    restored = linear.weight.float() * linear.scale
    assert ((restored - matrix).abs() <= matrix.abs() / 16 + linear.scale / 512).all()


def test_nf4_stores_the_blocks_and_a_resident_t5(folder):
    expected, whole = draw(folder)
    pictures, pipe = draw(folder, nf4=True)
    assert 1e-3 < relative_error(pictures, expected) < 0.5
    assert pipe.settings["nf4"] is True
    layers = {
        "transformer": ("joint_blocks.0.x_block.attn.qkv", "final_layer.linear"),
        "t5": ("encoder.block.1.layer.1.DenseReluDense.wo", ""),
    }
    for (stored, kept), part, exact in zip(
        layers.values(),
        (pipe.transformer, pipe.text_encoders[2]),
        (whole.transformer, whole.text_encoders[2]),
        strict=True,
    ):
        layer, matrix = part.get_submodule(stored), exact.get_submodule(stored).weight
        assert isinstance(layer, NF4Linear) and torch.equal(
            layer.matrix(), restore_nf4(quantize_nf4(matrix.detach()))
        )
        assert not isinstance(part.get_submodule(kept), NF4Linear)
    _, streamed = draw(folder, nf4=True, t5="streamed")
    assert not any(
        isinstance(m, NF4Linear) for m in streamed.text_encoders[2].modules()
    )
    expected = draw(folder, nf4=True, fast=False)[0]
    assert relative_error(pictures, expected) < 1e-5


def test_four_bits_take_the_place_of_eight(calls):
    call = calls["large"]
    with pytest.raises(ValueError, match="fp8 and nf4 are True; expected one of them"):
        Plan(fp8=True, nf4=True)
    least = choose("8GB", call).fp8, choose("6GB", call, nf4=True)
    assert least[0] and least[1].nf4 and not least[1].fp8
    with pytest.raises(ValueError, match="memory is 3GB; this model needs about"):
        choose("3GB", call, nf4=True)
    saved = estimate(Plan(), call) - estimate(Plan(nf4=True), call)
    t5 = call.models["text_encoder_3"]
    kept = {"shared.weight", "relative", "layer_norm"}
    in_t5 = memory.weigh(t5, lambda n: not any(k in n for k in kept))
    blocks = saved / (2 - 17 / 32) - in_t5
    assert blocks == pytest.approx(
        memory.weigh(
            call.models["transformer"],
            lambda n: "joint_blocks" in n and "adaLN" not in n,
        ),
        rel=1e-3,
    )


def test_compiled_blocks_are_not_in_four_bits(folder):
    with pytest.raises(ValueError, match="compile and nf4 are True"):
        minidiff.load(folder, nf4=True, compile=True)


@pytest.mark.slow
def test_what_is_in_four_bits_is_not_saved(folder, tmp_path):
    pipe = minidiff.load(folder, nf4=True)
    with pytest.raises(ValueError, match="is stored in few bits, in its file, or"):
        pipe.save_pretrained(tmp_path)


def test_a_control_net_is_counted(calls, card):
    """Its weights in a budget; on the card, where they are already, its work alone."""
    net = control_net(MMDiTConfig.sd35_large(), 19)
    bare = calls["large"]
    call = replace(bare, nets=(net,))
    weights = sum(2 * x.numel() for x in net.parameters())
    assert call.attached == weights > 4e9
    assert estimate(Plan(), call) - estimate(Plan(), bare) >= weights
    assert memory.LADDER.index(choose("24GB", call)) > memory.LADDER.index(
        choose("24GB", bare)
    )
    batch = {"size": (4, 16, 128, 128)}
    plan, both = memory.LADDER[-1], [replace(c, **batch) for c in (bare, call)]
    more = memory.working(plan, both[1]) - memory.working(plan, both[0])
    said = 2 * 4 * 19 * 4096 * 2432 * 2  # guidance, pictures, blocks, patches, width
    assert said < more < 2.5 * said
    card((estimate(plan, both[0]) + more + memory.RESERVE) / 1e9 + 0.1)
    memory.check_device(plan, both[1], "cuda")
    card((estimate(plan, both[0]) + memory.RESERVE) / 1e9)
    with pytest.raises(ValueError, match="the card has"):
        memory.check_device(plan, both[1], "cuda")


def test_a_request_tells_of_its_control_nets(folder):
    pipe = minidiff.load(folder)
    net = control.begin_control(pipe.transformer)
    steer = [control.Control(torch.rand(3, 32, 32), net, s) for s in (0.5, 1.0)]
    request = pipe.check(Request("a bag", control=steer))
    models = {"transformer": pipe.transformer, "vae": pipe.vae}
    assert memory.asked_by(request, models, torch.float32).nets == (net,)
    pipe.plan, seen = Plan(), []
    object.__setattr__(pipe.plan, "check_room", lambda *given: seen.append(given))
    pipe.check(Request("a bag", control=steer))
    assert seen[0][-1] == tuple(steer)


def test_what_nets_say_needs_room(folder):
    pipe, size = minidiff.load(folder), (1, 16, 8, 8)
    models, net = {"transformer": pipe.transformer}, torch.nn.Identity()
    net.config = SimpleNamespace(num_layers=999)
    pipe.room = memory.working(Plan(), Call(models, size, 4, 8))
    Plan().check_room(pipe, size, 8, ())
    with pytest.raises(memory.NoRoom, match="memory has"):
        Plan().check_room(pipe, size, 8, [SimpleNamespace(net=net)])


def test_without_t5_its_rows_are_zeros(folder):
    _, pipe = draw(folder, t5="none")
    assert pipe.text_encoders[2] is None
    context, _ = pipe.encode_prompt("a red dress")
    assert not context[:, 12:].any() and context[:, :12].any()


# Tiles


@pytest.fixture(scope="module")
def autoencoders():
    diffusers = pytest.importorskip("diffusers")
    config = VAEConfig.tiny()
    ours = randomize(VAE(config))
    settings = layout.hub_config(config, "AutoencoderKL")
    settings.pop("_class_name")
    theirs = diffusers.AutoencoderKL(**settings)
    theirs.load_state_dict(
        weights.stored_tensors(ours.state_dict(), weights.vae_sources)
    )
    theirs.eval().enable_tiling()
    theirs.tile_latent_min_size, theirs.tile_sample_min_size = 8, 32
    return theirs, ours


@pytest.mark.parametrize("size", [(14, 14), (9, 20), (8, 8)])
def test_tiles_as_diffusers_blends_them(autoencoders, size):
    theirs, ours = autoencoders
    latents = torch.randn(1, 16, *size)
    with torch.no_grad():
        expected = theirs.decode(latents, return_dict=False)[0]
        tiles, other = (Tiled(ours, n).decode(latents) for n in (8, 12))
    assert relative_error(tiles, expected) < 1e-5
    if max(size) > 8:  # a mutant: other tiles
        assert relative_error(other, expected) > 1e-3


@pytest.mark.parametrize("size", [(56, 56), (36, 80), (32, 32)])
@torch.no_grad()
def test_pictures_are_encoded_in_the_tiles_of_diffusers(autoencoders, size):
    theirs, ours = autoencoders
    images = torch.randn(1, 3, *size)
    expected = theirs.encode(images).latent_dist
    whole = ours.encode(images)
    found = Tiled(ours, 8).encode(images)
    assert relative_error(found.mean, expected.mean) < 1e-5
    assert relative_error(found.logvar, expected.logvar) < 1e-5
    if max(size) > 32:
        assert relative_error(whole.mean, expected.mean) > 1e-3


@pytest.mark.parametrize("tile", range(8, 16))
def test_tiles_of_any_size_make_the_whole(monkeypatch, tile):
    def decode(_, z):
        return z[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3).clone()

    def encode(_, x):
        return Posterior(x[:, :, ::4, ::4].clone(), x[:, :, 1::4, 1::4].clone())

    monkeypatch.setattr(VAE, "decode", decode)
    monkeypatch.setattr(VAE, "encode", encode)
    latents, vae = torch.randn(1, 16, 16, 33), Tiled(VAE(VAEConfig.tiny()), tile)
    whole = decode(None, latents)
    assert relative_error(vae.decode(latents), whole) < 1e-6
    again = vae.encode(whole)
    for found in (again.mean, again.logvar):
        assert relative_error(found, latents[:, :3]) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("levels", [2, 4])
def test_tiles_know_the_factor(levels):
    sizes = {"layers_per_block": 1, "norm_num_groups": 4}
    vae = randomize(VAE(VAEConfig(block_out_channels=(8,) * levels, **sizes)))
    latents, factor = torch.randn(1, 16, 12, 9), vae.config.factor
    how = 8, 6, 8 * factor, 6 * factor
    expected = tiling.tiled(vae.decode, latents, *how)
    found = tiling.Tiled(vae, 8).decode(latents)
    assert found.shape[2:] == (12 * factor, 9 * factor)
    assert torch.equal(found, expected)


def test_slices_are_encoded_one_by_one(monkeypatch):
    vae, images, seen = VAE(VAEConfig.tiny()), torch.rand(3, 3, 16, 16), []
    expected, encode = vae.encode(images), VAE.encode
    monkeypatch.setattr(
        VAE, "encode", lambda self, x: seen.append(len(x)) or encode(self, x)
    )
    found = tiling.Tiled(vae, slicing=True).encode(images)
    assert seen == [1, 1, 1]
    assert relative_error(found.mean, expected.mean) < 1e-5
    assert relative_error(found.logvar, expected.logvar) < 1e-5


# Choosing a plan


@pytest.fixture(scope="module")
def calls():
    """A picture of 1024² with each of the models."""
    models = {name: blueprint(f"sd3.5-{name}") for name in ("medium", "large")}
    return {name: Call(parts, (1, 16, 128, 128)) for name, parts in models.items()}


@pytest.mark.parametrize("name", ["medium", "large"])
@pytest.mark.parametrize("budget", memory.BUDGETS)
def test_every_published_model_fits_every_card(calls, name, budget):
    plan = choose(budget, calls[name])
    assert estimate(plan, calls[name]) <= float(budget[:-2]) * 1e9
    assert choose("999GB", calls[name]) == Plan()


def test_more_memory_never_means_a_tighter_plan(calls):
    for call in calls.values():
        ranks = [memory.LADDER.index(choose(b, call)) for b in memory.BUDGETS]
        assert ranks == sorted(ranks, reverse=True)


def test_knobs_hold_whatever_the_budget(calls):
    plan = choose("24GB", calls["medium"], t5="none", vae_tile=32)
    assert plan.t5 == "none" and plan.vae_tile == 32
    assert choose(Plan(fp8=True), calls["medium"], clip="streamed") == Plan(
        fp8=True, clip="streamed"
    )


def test_the_plan_is_one_line(folder, capsys):
    draw(folder, memory="8GB")
    out = capsys.readouterr().out
    assert re.fullmatch(r"memory plan: .*; about \d+\.\d GiB for 1 × .* pixels\n", out)
    draw(folder)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": "lots"}, "memory is 'lots'; expected 8GB"),
        ({"memory": "0.5GB"}, "memory is 0.5GB; this model needs about"),
        ({"t5": "gone"}, "t5 is 'gone'; expected one of resident, streamed, none"),
        ({"vae_tile": 2}, "vae_tile is 2; expected a whole number, at least 8"),
        ({"vae_tile": "64"}, "vae_tile is '64'; expected a whole number, at least 8"),
        ({"vae_tile": 64.5}, "vae_tile is 64.5; expected a whole number, at least 8"),
        ({"fp8": "no"}, "fp8 is 'no'; expected True or False"),
        (
            {"nonsense": 1},
            "nonsense is no setting; expected dtype, .* t5, clip",
        ),
    ],
)
def test_bad_settings(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        minidiff.load(folder, **settings)


def test_mps_has_no_fp8(folder, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match="in fp8, which MPS does not have"):
        minidiff.load(folder, device="mps", fp8=True)


@pytest.fixture
def card(monkeypatch):
    """Let a card have so many GB free, before CUDA has taken its part."""

    def set_free(gigabytes):
        free = gigabytes * 1e9 - memory.RESERVE
        monkeypatch.setattr(memory, "free_memory", lambda *_: free)

    return set_free


@pytest.mark.parametrize("gigabytes", [8.3, 11.6, 15.7, 23.9])
def test_a_card_that_is_too_small_is_told_a_plan_that_fits(calls, card, gigabytes):
    card(gigabytes)
    left = f"{gigabytes - memory.RESERVE / 1e9:.1f}"
    with pytest.raises(ValueError, match=f"the card has {left}GB free and") as refused:
        memory.check_device(Plan(), calls["large"], "cuda")
    budget, named = re.search("memory='(.*)' fits: (.*)", str(refused.value)).groups()
    plan = choose(budget, calls["large"])
    assert str(plan) == named
    memory.check_device(plan, calls["large"], "cuda")


def test_more_pixels_take_more_memory(calls, card):
    """They are refused with the settings that would fit, where there are any."""
    plan, one = choose("12GB", calls["medium"]), calls["medium"].size
    card(12)
    four, many = (4, *one[1:]), (64, *one[1:])
    medium = calls["medium"]
    for size in (one, (1, 16, 96, 170)):
        memory.check_device(plan, replace(medium, size=size), "cuda")
    with pytest.raises(ValueError, match="this would fit: t5 streamed") as refused:
        memory.check_device(Plan(), replace(medium, size=four), "cuda")
    smaller = choose("12GB", replace(medium, size=four))
    assert str(refused.value).endswith(f": {smaller}") and smaller.vae_slicing
    memory.check_device(smaller, replace(medium, size=four), "cuda")
    with pytest.raises(ValueError, match="so many pixels at once needs about"):
        memory.check_device(Plan(), replace(medium, size=many), "cuda")


@pytest.mark.parametrize("knobs", [{}, {"t5": "streamed"}], ids=str)
def test_t5_that_is_stored_in_8_bits(folder, tmp_path, knobs):
    """Its values are those of the file, whether it stays or comes layer by layer."""
    stored = shutil.copytree(folder, tmp_path / "stored")
    encoder = minidiff.load(folder).text_encoders[2]
    weights.save_component(
        encoder, stored / "text_encoder_3", "T5EncoderModel", torch.float8_e4m3fn
    )
    for weight in encoder.parameters():
        weight.data = weight.to(torch.float8_e4m3fn).float()
    found = minidiff.load(stored, **knobs).text_encoders[2]
    ids = torch.arange(12).reshape(2, 6)
    assert relative_error(found(ids), encoder(ids)) < 1e-6


@pytest.mark.parametrize("knobs", [{"modulation": "streamed"}, {"fp8": True}], ids=str)
def test_a_planned_pipeline_is_not_saved(folder, tmp_path, knobs):
    """Its weights are not held in full; nothing is written."""
    pipe = minidiff.load(folder, **knobs)
    with pytest.raises(ValueError, match="transformer.* expected a pipeline loaded"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.glob("saved/*"))


def test_a_rehearsal_weighs_the_call(card):
    """Before weights are read: the tiny model on a card of 2 GB, 0.6 of it CUDA's."""
    card(2)

    rehearse(asks(), "tiny", "cuda")
    with pytest.raises(ValueError, match="so many pixels at once needs about"):
        rehearse(asks(num_images_per_prompt=10_000), "tiny", "cuda")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "how"), [(21, {"t5": "none"}), (99, {"budget": "6.9GB"})], ids=str
)
def test_what_was_rehearsed_is_what_is_loaded(calls, monkeypatch, card, size, how):
    """A picture of 1024² would not fit; loading does not ask for one."""
    card(size)
    parts = {n: SimpleNamespace(model=m) for n, m in calls["large"].models.items()}
    monkeypatch.setattr(memory, "place_part", lambda part, plan, *_: plan)
    monkeypatch.setattr(memory, "Tiled", lambda vae, *_: vae)
    with pytest.raises(ValueError, match="needs about"):
        rehearse(lambda _: (), "sd3.5-large", "cuda", **how)
    plan = rehearse(asks(height=512, width=512), "sd3.5-large", "cuda", **how).plan
    loaded = memory.load_parts(parts, plan, torch.device("cuda"), torch.bfloat16)
    assert set(loaded.values()) == {plan}
    card(3)
    with pytest.raises(ValueError, match="card has 2.4GB free; this model needs"):
        memory.load_parts(parts, plan, torch.device("cuda"), torch.bfloat16)


@pytest.mark.slow
def test_a_rehearsal_weighs_what_its_plan_leaves_in_the_files(calls):
    how = {"dtype": torch.bfloat16, "budget": "12GB"}
    plan, room = rehearse(asks(), "sd3.5-large", **how)
    assert plan == choose("12GB", calls["large"]) != Plan()
    assert memory.working(plan, calls["large"]) <= room <= 12e9


@pytest.mark.slow
def test_a_rehearsal_tries_a_lora_on_its_plan(tmp_path):
    """The plan follows from the call: a LoRA is not fused into what it streams."""
    name = "transformer.transformer_blocks.0.norm1.linear.lora"
    width = MMDiTConfig.sd35_large().width
    pair = {"A": torch.zeros(2, width), "B": torch.zeros(6 * width, 2)}
    save_file({f"{name}_{k}.weight": v for k, v in pair.items()}, tmp_path / "a")

    def check(pipe):
        load_lora(pipe, tmp_path / "a", fused=True)
        return asks()(pipe)

    how = {"dtype": torch.bfloat16, "device": "cpu"}
    rehearse(check, "sd3.5-large", budget="99GB", **how)
    with pytest.raises(ValueError, match="a LoRA cannot be added to the weights"):
        rehearse(check, "sd3.5-large", budget="12GB", **how)


@pytest.mark.slow
def test_settings_that_do_not_fit_are_named(calls, card):
    """With the plan that would fit without them, whoever set the limit."""
    call = calls["large"]
    fits = choose("12GB", call)
    reason = memory.shortage(12e9, call, t5="resident")
    assert reason.startswith("with t5 resident this model needs about 1")
    assert reason.endswith(f"; this would fit: {fits}")
    with pytest.raises(ValueError, match=re.escape(f"memory is 12GB; {reason}")):
        choose("12GB", calls["large"], t5="resident")
    card(12)
    with pytest.raises(ValueError, match=re.escape(f"card has 11.4GB free; {reason}")):
        memory.check_device(Plan(), calls["large"], "cuda", t5="resident")


def test_a_rehearsal_counts_the_pictures(monkeypatch):
    seen, plain = [], memory.estimate
    monkeypatch.setattr(
        memory, "estimate", lambda plan, call: seen.append(call) or plain(plan, call)
    )
    start = image_to_image.Start(torch.rand(2, 3, 32, 48))

    def check(pipe):
        return [start.check(pipe, Request(["a bag", "a coat"]))]

    rehearse(check, "tiny", "cpu", budget="8GB")
    assert {call.size for call in seen} == {(2, 16, 8, 12)}


@pytest.mark.slow
def test_a_call_from_python_is_weighed_too(folder, monkeypatch):
    """Against what the card has left beside the weights: here 1.1 GB, in float32."""
    plain, sliced = minidiff.load(folder), minidiff.load(folder, vae_slicing=True)
    where = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    monkeypatch.setattr(memory, "first_weight", lambda _: where)
    left = {"mem_get_info": (1e9, 9e9), "memory_reserved": 5e8, "memory_allocated": 4e8}
    for name, value in left.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    side = plain.transformer.config.sample_size
    at_once = int(1.1e9 / (2 * 2.5 * memory.GIB * side**2 / 128**2))
    plain.prepare_latents(at_once)
    sliced.prepare_latents(at_once + 1)
    with pytest.raises(
        ValueError, match=r"take about .* card has 1.1GB left: expected"
    ):
        plain("a red dress", num_images_per_prompt=at_once + 1)


def test_a_budget_holds_for_later_calls(folder):
    for budget in ("8GB", 8):
        pipe = minidiff.load(folder, memory=budget)
        assert 7.2e9 < pipe.room < 8e9 - memory.RESERVE
        one = Call({"transformer": pipe.transformer}, (1, 16, 8, 8), 4, 82)
        pipe.room = memory.working(Plan(), one)
        how = {"num_inference_steps": 40, "guidance_scale": 4.0}
        pipe.check(Request("a bag", **how))
        with pytest.raises(ValueError, match=r"take about .* memory has 0.0GB left"):
            pipe.check(Request("a bag", num_images_per_prompt=2, **how))


def test_an_interruption_leaves_no_other_sizes_crop(folder, monkeypatch):
    pipe = minidiff.load(folder, modulation="streamed")
    positions = pipe.transformer.positions
    positions(2, 4)
    with monkeypatch.context() as broken:
        broken.setattr(MMDiT, "positions", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            positions(4, 2)
    expected = MMDiT.positions(pipe.transformer, 4, 2)
    assert torch.equal(positions(4, 2), expected)


def test_a_card_that_no_plan_fits(calls, card):
    card(4.2)
    with pytest.raises(ValueError, match="card has 3.6GB free; this model needs about"):
        memory.check_device(Plan(), calls["large"], "cuda")


def test_wider_numbers_take_more_memory(calls, folder, monkeypatch):
    half, full = calls["large"], replace(calls["large"], width=4)
    plan = choose("24GB", full)
    assert estimate(plan, full) < 24e9
    assert memory.LADDER.index(plan) > memory.LADDER.index(choose("24GB", half))
    assert memory.working(Plan(), full) == 2 * memory.working(Plan(), half)
    seen = []
    monkeypatch.setattr(
        memory, "estimate", lambda _, call: seen.append(call.width) or 0.0
    )
    for dtype in (torch.float32, torch.bfloat16):
        minidiff.load(folder, memory="8GB", dtype=dtype)
    assert seen == sorted(seen, reverse=True) and set(seen) == {4, 2}


# What it comes to, counted on the meta device at full size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "plan", "most"),
    [
        (MMDiTConfig.sd35_medium(), STREAMED, 4),
        (MMDiTConfig.sd35_large(), STREAMED, 11.5),
        (MMDiTConfig.sd35_large(), replace(STREAMED, fp8=True), 6.5),
        (MMDiTConfig.sd35_large(), replace(STREAMED, nf4=True), 4),
    ],
    ids=["Medium", "Large", "Large, fp8", "Large, NF4"],
)
def test_counted_peak_of_a_denoising_call(calls, config, plan, most):
    peak = denoising_peak(config, plan)
    assert peak < most and f"| {peak:.2f} |" in PAGE
    call = calls["medium" if config.dual_attention_layers else "large"]
    assert peak < estimate(plan, call) / GIB


@pytest.mark.slow
def test_counted_peak_with_a_control_net(calls):
    large = MMDiTConfig.sd35_large()
    peak = denoising_peak(large, Plan(), 19)
    assert f"| {peak:.2f} |" in PAGE
    call = replace(calls["large"], nets=(control_net(large, 19),))
    assert peak < estimate(replace(Plan(), t5="streamed", clip="streamed"), call) / GIB


@pytest.mark.parametrize(
    ("work", "side"), [("encode", 128), ("decode", 128), ("decode", 64)]
)
def test_counted_peak_of_the_autoencoder(calls, work, side):
    """It is below what a plan sets aside; decoding, which takes more, above half."""
    call = replace(calls["medium"], size=(1, 16, side, side))
    room = memory.working(Plan(), call) / GIB
    weights = memory.weigh(call.models["vae"]) * 2 / GIB
    least = room / 2 if work == "decode" else room / 4
    peak = vae_peak(work, side)
    assert least < peak - weights < room and f"{peak:.2f} GiB" in PAGE


@pytest.mark.slow
def test_counted_peak_of_streamed_t5():
    streamed, resident = map(t5_peak, ("streamed", "resident"))
    assert streamed < 2 < resident
    small = t5_peak("resident", True)
    line = (
        f"{resident:.2f} GiB\nresident, {small:.2f} GiB with `nf4` and {streamed:.2f}"
    )
    assert f"{line} GiB streamed" in PAGE


@pytest.mark.slow
def test_the_work_of_denoising_is_counted_with_guidance(calls):
    """The peak beyond the weights lies between half of what is set aside and that."""
    call, plan = calls["medium"], replace(STREAMED, vae_tile=8, vae_slicing=True)
    set_aside = memory.working(plan, call) / GIB
    weights = estimate(plan, call) - memory.working(plan, call)
    weights = (weights - 2 * memory.weigh(call.models["vae"])) / GIB
    peak = denoising_peak(MMDiTConfig.sd35_medium(), plan) - weights
    assert set_aside / 2 < peak < set_aside


def test_modulations_of_many_small_pictures_are_counted(calls):
    call = replace(calls["large"], size=(64, 16, 2, 2))
    model = call.models["transformer"]
    with torch.device("meta"), torch.no_grad():
        ahead = model.modulations(torch.empty(29, 1), torch.empty(128, 2048))
    held = sum(x.numel() for x in (ahead.final, *sum(ahead.blocks, ())))
    assert 4 * held > memory.working(Plan(vae_slicing=True), call) > 2 * held


@pytest.mark.slow
@pytest.mark.parametrize("name, levels", [("medium", 82), ("large", 58), ("turbo", 5)])
def test_levels_of_usual_pictures(calls, name, levels):
    """Those of each model's own steps, twice with guidance; the most are assumed."""
    model = f"sd3.5-{name}" if name != "turbo" else "sd3.5-large-turbo"
    opened = open_model(Given(model), *device_and_dtype("cpu", None), weights=False)
    request = opened.rehearsal().check(Request("a bag"))
    assert request.levels == levels <= calls["medium"].levels == 82


def test_what_a_plan_leaves_in_the_file_never_meets_the_device(folder):
    prepared = weights.prepare_component(MMDiT, MMDiTConfig, folder / "transformer")
    plan = Plan(modulation="streamed")
    model = memory.place_part(prepared, plan, torch.device("meta"), torch.bfloat16)
    block = model.joint_blocks[0].x_block
    assert block.adaLN_modulation[1].stored[0].device.type == "cpu"
    assert block.mlp.fc1.weight.device.type == "meta"


@pytest.mark.slow
def test_every_level_with_modulations_is_counted(monkeypatch, card):
    """Of the steps that are asked for, twice with guidance."""
    seen = []
    monkeypatch.setattr(
        memory, "estimate", lambda _, call: seen.append(call.levels) or 0.0
    )
    for steps, scale in ((100, 4.0), (10, 1.0), (None, None)):
        how = {"num_inference_steps": steps, "guidance_scale": scale}
        rehearse(asks(**how), "tiny", budget="8GB")
    assert list(dict.fromkeys(seen)) == [202, 11, 58]
