"""Texts for each encoder, what is cut, stopping, previews, files and their settings."""

import logging
import os
import warnings
from pathlib import Path

import pytest
import torch
from helpers import randomize, relative_error
from PIL import Image
from pipelines import pair
from safetensors.torch import save_file
from test_sampling import LONG
from torch._inductor.exc import InvalidCxxCompiler

import minidiff
from minidiff import sampling
from minidiff.drawing.guidance import SkipLayer
from minidiff.drawing.image_to_image import image_to_image
from minidiff.drawing.previews import (
    Preview,
    fit_preview,
    show_previews,
    write_previews,
)
from minidiff.files.disk import read_prompts
from minidiff.files.pictures import read_settings, save_picture
from minidiff.files.weights import Prepared
from minidiff.flow_matching import ClassifierFree
from minidiff.interface import checks
from minidiff.interface.request import digest
from minidiff.lora import LowRank, save_lora
from minidiff.vae import VAE, Posterior, VAEConfig

CALL = {"num_inference_steps": 6, "guidance_scale": 4.0, "output_type": "latent"}
CALL |= {"max_sequence_length": 20}
BOUND = 1e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return *pair(folder), folder / "saved"


@pytest.fixture
def both(model):
    return model[:2]


# Texts for three encoders

TEXTS = [
    {"prompt": "a bag", "prompt_2": "a red dress", "prompt_3": "an orange coat"},
    {"prompt": ["a bag", "a coat"], "prompt_3": ["a dress", "blue"]}
    | {"negative_prompt": "pink", "negative_prompt_2": "green"},
    {"prompt": "a bag", "negative_prompt_3": "a red dress", "negative_prompt": "no"},
]


def compare(both, call):
    pipe, reference = both
    noise = pipe.prepare_latents(1 if isinstance(call["prompt"], str) else 2)
    # diffusers repeats a negative prompt that is one string, as we do
    expected = reference(**CALL | call, latents=noise).images
    return relative_error(pipe(**CALL | call, latents=noise), expected)


@pytest.mark.parametrize("call", TEXTS)
def test_three_texts_same_latents_as_diffusers(both, call):
    assert compare(both, call) <= BOUND


def test_parity_catches_texts_in_another_order(both, monkeypatch):
    plain = checks.for_encoders
    monkeypatch.setattr(checks, "for_encoders", lambda p: plain(p)[::-1])
    assert compare(both, TEXTS[0]) > 1e-4


@pytest.mark.parametrize(
    "call, message",
    [
        ({"prompt": ["a", "b"], "prompt_2": ["c"]}, "prompt_2 has 1 texts; .* 2 texts"),
        ({"prompt": "a", "prompt_3": 3}, "prompt_3 is a int"),
        ({"prompt": "a", "negative_prompt": 5}, "negative_prompt is a int"),
        (
            {"prompt": "a", "negative_prompt_2": ["b", "c"]},
            "negative_prompt_2 has 2 texts",
        ),
    ],
)
def test_texts_that_do_not_fit(both, call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        both[0](**call)


# What is cut


def test_what_clip_cuts_is_named_as_by_diffusers(both, caplog):
    pipe, reference = both
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    reference.encode_prompt(LONG, LONG, LONG, max_sequence_length=20)
    logger.removeHandler(caplog.handler)
    with pytest.warns(UserWarning) as found:
        pipe.encode_prompt(LONG, 20)
    ours = [str(w.message) for w in found]
    assert len(ours) == 2 and ours[0].startswith("CLIP-L and CLIP-G read 12 tokens;")
    assert ours[1].startswith("T5 reads 20 tokens; not seen: ")
    cut = ours[0].split("not seen: ")[1].strip("'")
    theirs = [r.getMessage() for r in caplog.records if "CLIP can only" in r.message]
    assert len(theirs) == 2 and cut and all(cut in line for line in theirs)


def test_nothing_is_said_of_a_prompt_that_fits(both):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both[0].encode_prompt(["a red dress", ""])


# Stopping


def test_a_callback_stops_where_diffusers_does(both):
    pipe, reference = both
    noise = pipe.prepare_latents(1)
    call = CALL | {"prompt": "a bag", "latents": noise}

    def interrupt(caller, step, time, tensors):
        caller._interrupt = step == 2
        return tensors

    def stop(caller, step, time, tensors):
        seen.append(step)
        if step == 2:
            raise StopIteration

    seen: list[int] = []
    expected = reference(**call, callback_on_step_end=interrupt).images
    found = pipe(**call, callback_on_step_end=stop)
    assert seen == [0, 1, 2]
    assert relative_error(found, expected) <= BOUND
    assert relative_error(pipe(**call), expected) > 1e-2


def test_other_errors_of_a_callback_pass(both):
    def fail(*_):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        both[0]("a bag", **CALL, callback_on_step_end=fail)


# Numbers that break


def nan(x, *_, **__):
    """In place of the transformer: its output overflows."""
    return torch.full_like(x, float("nan"))


def test_overflow_is_said_before_the_picture_is_black(both, monkeypatch):
    pipe = both[0]
    plain = sampling.assemble
    monkeypatch.setattr(sampling, "assemble", lambda *p: plain(*p) * float("inf"))
    with pytest.warns(UserWarning, match="prompt's encoding holds infinite .*bfloat16"):
        pipe.encode_prompt("a bag")
    with pytest.warns(UserWarning, match="the picture holds infinite .*bfloat16"):
        pipe.decode(torch.full((1, 16, 4, 4), float("nan")))


def test_overflow_of_the_transformer_is_said_at_the_first_step(both, monkeypatch):
    def stop(*_):
        raise StopIteration

    monkeypatch.setattr(both[0].transformer, "forward", nan)
    call = CALL | {"callback_on_step_end": stop}
    with pytest.warns(UserWarning, match="step 1 holds infinite .*bfloat16"):
        both[0]("a bag", **call)


def test_what_a_missing_encoder_would_not_see_is_no_matter(model):
    """Without T5 a long prompt is not said to be too long for it."""
    pipe = minidiff.load(model[2], t5="none")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        pipe.encode_prompt(LONG, 4)
    assert not [w for w in found if "T5" in str(w.message)]


def test_mixed_dtypes(model):
    pipe = minidiff.load(model[2])
    pipe.vae.half()
    message = r"transformer\S+ is torch.float32 and vae\S+ is torch.float16; expected"
    with pytest.raises(ValueError, match=message):
        pipe("a bag")


# Previews


class LinearVAE(VAE):
    """An autoencoder whose latents say linearly what is in a patch."""

    def encode(self, images):
        small = torch.nn.functional.avg_pool2d(images, self.config.factor)
        mix = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
        latents = torch.einsum("kc,bchw->bkhw", mix, small)
        return Posterior(latents, torch.zeros_like(latents))


def test_the_fit_finds_the_colours_of_a_linear_autoencoder():
    vae = LinearVAE(VAEConfig.tiny())
    pictures = torch.rand(4, 3, 32, 32) * 2 - 1
    preview = fit_preview(vae, pictures)
    assert preview.matrix.shape == (3, 16) and preview.bias.shape == (3,)
    fresh = torch.rand(2, 3, 16, 24) * 2 - 1
    wanted = torch.nn.functional.avg_pool2d(fresh / 2 + 0.5, vae.config.factor)
    latents = vae.scale(vae.encode(fresh).mode())
    assert relative_error(preview(latents), wanted) <= BOUND
    assert (
        relative_error(preview._replace(bias=preview.bias + 0.1)(latents), wanted)
        > 0.01
    )


def test_each_step_is_shown(both):
    pipe, seen = both[0], []

    def show(step, pictures):
        seen.append((step, pictures[0].size))
        if step == 3:
            raise StopIteration

    follow = show_previews(fit_preview(pipe.vae), show)
    pipe("a bag", **CALL, callback_on_step_end=follow)
    assert seen == [(i, (8, 8)) for i in range(4)]


# Files


@pytest.mark.slow
def test_previews_show_the_estimate_within_range():
    eye, seen = Preview(torch.eye(3, 16), torch.zeros(3)), []
    state = {"latents": torch.zeros(1, 16, 4, 4)}
    state["denoised"] = torch.full((1, 16, 4, 4), 9.0)
    show_previews(eye, lambda step, pictures: seen.extend(pictures))(
        None, 0, None, state
    )
    assert seen[0].getpixel((0, 0)) == (255, 255, 255)
    low = Preview(-torch.eye(3, 16), torch.zeros(3))(state["denoised"])
    assert low.min() == low.max() == 0


def test_settings_survive_in_the_file(tmp_path):
    settings = {"prompt": "ein rotes Kleid, 東京 🙂\nzwei", "seed": 3, "lora": None}
    picture = Image.new("RGB", (8, 4))
    picture.info |= settings
    save_picture(picture, tmp_path / "a.png")
    found = read_settings(tmp_path / "a.png")
    assert found["prompt"] == settings["prompt"] and found["seed"] == "3"
    assert found["version"].startswith("minidiff ") and "lora" not in found
    with pytest.raises(FileExistsError):
        save_picture(Image.new("RGB", (8, 4)), tmp_path / "a.png")
    Image.new("RGB", (8, 4)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b.png carries no settings"):
        read_settings(tmp_path / "b.png")


SHOWN = {"num_inference_steps": 2, "height": 24, "width": 32}


def test_every_picture_carries_how_it_was_drawn(model, tmp_path):
    pipe = model[0]
    how = {"negative_prompt": ["x", ""], "num_images_per_prompt": 2, "seed": 5}
    pictures = pipe(("a bag", "a coat"), prompt_3="blue", **SHOWN, **how)
    for i, picture in enumerate(pictures):
        own = {"prompt": ["a bag", "a coat"][i // 2], "prompt_3": "blue", "seed": 5 + i}
        own |= {"negative_prompt": ["x", ""][i // 2], "sampler": "euler"}
        own |= {"model": str(model[2]), "dtype": "float32", "version": None}
        assert SHOWN.items() <= picture.info.items()
        assert {name: picture.info.get(name) for name in own} == own
        assert picture.info["guidance_scale"] == pipe.defaults.guidance_scale
    save_picture(pictures[3], tmp_path / "a.png")
    stored = read_settings(tmp_path / "a.png")
    version = {"version": stored["version"]}
    assert stored == {k: str(v) for k, v in pictures[3].info.items()} | version


def test_own_levels_are_counted_as_steps(model):
    levels = torch.tensor([1.0, 0.6, 0.3, 0.0])
    info = model[0]("a bag", sigmas=levels, height=24, width=32)[0].info
    assert (info["num_inference_steps"], info["sigmas"]) == (3, "1, 0.6, 0.3, 0")


def test_a_text_for_t5_needs_t5(model):
    pipe = minidiff.load(model[2], t5="none")
    for name in ("prompt_3", "negative_prompt_3"):
        with pytest.raises(ValueError, match=f"{name} is given; expected .* with T5"):
            pipe("a bag", **{name: "a coat"}, **SHOWN)


def test_a_negative_prompt_without_guidance_is_told(model):
    call = {"negative_prompt": ["", "a coat"], "guidance_scale": 1.0}
    with pytest.warns(UserWarning, match="negative_prompt does nothing without guid"):
        model[0](["a bag"] * 2, **call, **SHOWN)
    with pytest.warns(UserWarning, match="without guidance") as found:
        image_to_image(model[0], ["a bag"] * 2, torch.ones(3, 24, 32), **call)
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model[0](["a bag"] * 2, **call | {"negative_prompt": ["", ""]}, **SHOWN)


def test_a_random_seed_draws_the_same_again(both):
    first = both[0]("a bag", seed=None, **SHOWN)[0]
    again = both[0]("a bag", seed=first.info["seed"], **SHOWN)[0]
    assert first.tobytes() == again.tobytes()
    other = both[0]("a bag", seed=None, **SHOWN)[0]
    assert other.info["seed"] != first.info["seed"]


@pytest.mark.filterwarnings("ignore:Skip Layer Guidance was")
def test_pictures_over_pictures_carry_them_too(both, tmp_path):
    pipe = both[0]
    Image.new("RGB", (32, 24), "red").save(tmp_path / "in.png")
    mask = torch.ones(24, 32)
    call = {"strength": 0.5, "num_inference_steps": 2, "seed": 3, "sampler": "heun"}
    call |= {"num_images_per_prompt": 2}
    drawn = image_to_image(pipe, "a bag", tmp_path / "in.png", mask_image=mask, **call)
    own = {"prompt": "a bag", "image": str(tmp_path / "in.png"), "strength": 0.5}
    own |= {"mask_image": digest(mask), "seed": 4, "sampler": "heun"}
    own |= {"num_inference_steps": 2, "width": 32, "height": 24}
    own["guidance_scale"] = pipe.defaults.guidance_scale
    found = drawn[1].info
    assert own.items() <= found.items()
    assert "sigmas" not in found  # they follow from the strength
    guidance = SkipLayer(ClassifierFree(3.0), [1], 2.0, 0, 1)
    latents = pipe.prepare_latents(1, 24, 32)
    found = pipe("a bag", **SHOWN, latents=latents, guidance=guidance)[0].info
    assert (found["skip_layers"], found["skip_layer_scale"]) == ("1", 2.0)
    assert found["guidance_scale"] == 3.0 and "guidance" not in found
    assert "seed" not in found and "skip_layers" not in pipe.settings


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa bag\r\n\n  a 東京 coat \n".encode())
    assert read_prompts(file) == ["a bag", "a 東京 coat"]
    file.write_text("a bag\u2028on blue\x85\n", "utf-8")  # no ends of lines to us
    assert read_prompts(file) == ["a bag\u2028on blue"]
    for content, message in ((b" \n", "holds no prompt"), (b"\xff\xfe", "UTF-8")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_prompts(file)


# The command line


@pytest.fixture
def run(run, model):
    """On the small model, in two steps, unless told otherwise."""

    def call(*arguments):
        if arguments[0] == "sample":
            chosen = () if "--model" in arguments else ("--model", model[2])
            steps = () if "--steps" in arguments else ("--steps", 2)
            arguments += (*chosen, *steps)
        return run(*arguments)

    return call


def pixels(file):
    return Image.open(file).tobytes()


@pytest.mark.slow
def test_prompts_from_a_file_carry_their_settings(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a bag\na coat\na red dress\n")
    call = ("sample", "--prompts", "prompts.txt", "--batch-size", 2, "--seed", 5)
    code, out, err = run(*call, "--num-images", 2, "--output", "p.png")
    assert (code, err) == (0, "contact sheet: p-sheet.png\n")
    assert out.split() == [f"p-{i}.png" for i in range(6)]
    code, out, _ = run("info", "p-3.png")
    wanted = {"prompt": "a coat", "negative_prompt": "", "seed": "8", "width": "32"}
    wanted |= {"num_inference_steps": "2", "sampler": "euler", "height": "32"}
    shown = dict(line.split(": ", 1) for line in out.splitlines())
    assert code == 0 and wanted.items() <= shown.items()
    assert {"model", "guidance_scale", "version"} <= shown.keys()
    run("sample", "a coat", "--seed", 8, "--output", "alone.png")
    assert read_settings("alone.png") == read_settings("p-3.png")


@pytest.mark.slow
def test_every_option_changes_the_picture(run, tmp_path, model):
    update = randomize(LowRank(32, 32, 2))
    layers = {"transformer": {"transformer_blocks.0.attn.to_q": update}}
    save_lora(layers, tmp_path / "lora.safetensors")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "in.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "mask.png")
    assert run("sample", "a bag", "--output", "plain.png")[0] == 0
    begin = ["--image", "in.png"]
    options = {
        "texts": ["--prompt-2", "a coat"],
        "third": ["--prompt-3", "a coat"],
        "negative": ["--negative-prompt-3", "a coat"],
        "lora": ["--lora", "lora.safetensors"],
        "weak": ["--lora", "lora.safetensors", "--lora-scale", 0.5],
        "image": begin,
        "weakly": [*begin, "--strength", 0.5],
        "masked": [*begin, "--mask", "mask.png"],
    }
    seen = {pixels("plain.png")}
    for name, option in options.items():
        code, _, err = run("sample", "a bag", *option, "--output", f"{name}.png")
        assert (code, err) == (0, "")
        seen.add(pixels(f"{name}.png"))
    assert len(seen) == 1 + len(options)
    found = read_settings("weak.png")
    assert found["lora_scale"] == "0.5" and found["lora"] == "lora.safetensors"
    skip, seen = ["--skip-layers", "1,2"], set()
    for i, option in enumerate(([], skip, [*skip, "--skip-layer-scale", 1])):
        how = ("--steps", 8, "--output", f"s{i}.png", *option)  # one within the window
        code, _, err = run("sample", "a bag", *how)
        assert code == 0 and err.count("published for sd3.5-medium") == len(option[:1])
        seen.add(pixels(f"s{i}.png"))
    assert len(seen) == 3
    code, _, err = run("sample", "a bag", *skip, "--output", "s.png")
    assert code == 0 and "does nothing in so few steps" in err
    assert run("sample", "a bag", "--preview", "step.png", "--output", "p.png")[0] == 0
    assert Image.open("step.png").size == (32, 32)


@pytest.mark.slow
def test_a_name_that_is_taken_meanwhile_costs_no_picture(run, monkeypatch):
    """Two runs in one folder: the later picture goes to the next free name."""
    decode = sampling.Pipeline.decode

    def slow(pipe, latents):
        Path("picture.png").write_text("of the other run")
        return decode(pipe, latents)

    monkeypatch.setattr(sampling.Pipeline, "decode", slow)
    assert run("sample", "a bag")[:2] == (0, "picture-1.png\n")
    assert Path("picture.png").read_text() == "of the other run"


BAD = [
    ([], "expected a prompt, or --prompts with a file"),
    (["a", "--prompts", "p.txt"], "and not both"),
    (["--prompts", "p.txt"], "p.txt"),
    (["--prompts", "{texts}", "--batch-size", 0], "--batch-size is 0; expected a"),
    (["a", "--mask", "m.png"], "--mask is m.png, which needs --image"),
    (["a", "--image", "m.png"], "m.png"),
    (["a", "--skip-layers", "x"], "--skip-layers is 'x'; expected whole numbers"),
    (["a", "--skip-layers", "9"], "skip layers are [9]; expected some of 0 to 3"),
    (["a", "--lora", "none.safetensors"], "none.safetensors is missing"),
    (["a", "--lora", "{fits}", "--compile", "--fp8"], "they are in 4 or 8 bits or st"),
    (
        ["a", "--lora", "{norm}", "--compile", "--modulation", "streamed"],
        "a LoRA cannot be added to the weights of transformer_blocks.0.norm1_context",
    ),
    (["a", "--preview", "picture.png"], "--preview is picture.png, which a picture"),
    (["a", "--batch-size", 2], "--batch-size is 2, which needs --prompts"),
    (["a", "--lora-scale", 2], "--lora-scale is 2.0, which needs --lora"),
    (["a", "--skip-layer-scale", 2], "--skip-layer-scale is 2.0, which needs --skip"),
    (
        ["a", "--t5", "none", "--prompt-3", "b"],
        "--prompt-3 is given; expected a pipeline with T5, its reader",
    ),
    (["a", "--model", "sd3.5-large", "--sampler", "ddim"], "sampler is 'ddim'"),
    (["a", "--model", "sd3.5-medium", "--height", 33], "the nearest is 32"),
    (["a", "--model", "{missing}"], "sd3.5_large.safetensors is missing"),
    (["a", "--device", "cpu:x"], "device is 'cpu:x'; expected cpu, cuda"),
    (["a", "--preview", "no/p.png"], "no/p.png cannot be written"),
    (["a", "--preview", "p.jpg"], "--preview is p.jpg; expected a name that ends"),
    (["a", "--strength", 0.5], "--strength is 0.5, which needs --image"),
    (["a", "--image", "{large}", "--mask", "{small}"], "the mask is 32×32 pixels"),
    (["a", "--image", "{odd}"], "height is 30; expected a multiple of 8"),
    (["a", "--image", "{small}", "--strength", 2], "strength is 2.0; expected above 0"),
    (["a", "--lora", "{other}"], "was made for another model"),
]


@pytest.fixture(scope="module")
def given(tmp_path_factory, model):
    """Pictures of three sizes; LoRAs, of layers that the tiny model has and has not."""
    folder = tmp_path_factory.mktemp("given")
    files = {"large": 64, "small": 32, "odd": 30}
    for name, side in files.items():
        Image.new("RGB", (side, side)).save(folder / f"{name}.png")
    width = model[0].transformer.config.width
    block = "transformer_blocks.0"
    layers = {"other": ("some.layer", 8, 8)}
    layers["fits"] = (f"{block}.attn.to_q", width, width)
    layers["norm"] = (f"{block}.norm1_context.linear", width, 6 * width)
    paths = {name: folder / f"{name}.png" for name in files}
    for name, (layer, inputs, outputs) in layers.items():
        pair = {"A": torch.zeros(2, inputs), "B": torch.zeros(outputs, 2)}
        weights = {f"transformer.{layer}.lora_{k}.weight": w for k, w in pair.items()}
        paths[name] = folder / f"{name}.safetensors"
        save_file(weights, paths[name])
    (folder / "texts.txt").write_text("a bag")
    missing = folder / "sd3.5_large.safetensors"
    return paths | {"texts": folder / "texts.txt", "missing": missing}


@pytest.mark.slow
@pytest.mark.parametrize("arguments, message", BAD, ids=[m for _, m in BAD])
def test_bad_input_is_one_line(run, tmp_path, given, monkeypatch, arguments, message):
    """And told before the first weight is read."""
    monkeypatch.setattr(Prepared, "__call__", lambda *_: 1 / 0)
    arguments = [a.format(**given) if "{" in str(a) else a for a in arguments]
    code, out, err = run("sample", *arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert message in err and err.startswith("minidiff: ")
    assert list(tmp_path.iterdir()) == []


HOST = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
WINDOWS = "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."
CUDA = "CUDA out of memory. Tried to allocate 9 GiB. …"
TRITON = "Failed to find C compiler. Please specify via CC environment variable."


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError(CUDA), "CUDA out of memory; fewer or smaller pictures"),
        (RuntimeError(HOST), "this machine's memory is full; fewer or smaller"),
        (RuntimeError(WINDOWS), "this machine's memory is full; fewer or smaller"),
        (RuntimeError("Compiler: cl is not found."), "--compile needs a C++ compiler"),
        (type("TritonMissing", (Exception,), {})(), "--compile needs Triton on a GPU"),
        (MemoryError(), "this machine's memory is full; fewer or smaller"),
        (InvalidCxxCompiler(), "--compile needs a C++ compiler; expected g++"),
        (RuntimeError(TRITON), "kernels for a GPU need a C compiler; expected gcc"),
    ],
)
def test_what_the_machine_lacks_is_one_line(run, monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(sampling.Pipeline, "decode", fail)
    code, out, err = run("sample", "a bag")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"minidiff: {message}")


def test_other_errors_are_not_hidden(run, monkeypatch):
    monkeypatch.setattr(sampling.Pipeline, "decode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("sample", "a bag")


def test_what_a_terminal_would_obey_is_escaped(run, tmp_path):
    picture = Image.new("RGB", (8, 8))
    picture.info |= {"prompt": "a\x1b[2J\nseed: 5", "lora": "\udce9.safetensors"}
    save_picture(picture, tmp_path / "a.png")
    lines = run("info", "a.png")[1].splitlines()
    assert lines[:2] == [r"prompt: a\x1b[2J\nseed: 5", "lora: ?.safetensors"]
    code, _, err = run("info", "b\x1b[2J.png")
    assert code == 2 and r"b\x1b[2J.png is missing" in err


def test_a_preview_that_cannot_be_written_costs_no_picture(run, monkeypatch, capsys):
    def fail(*_):
        raise OSError("cannot write")

    monkeypatch.setattr(os, "replace", fail)
    pipe, step = minidiff.load("tiny"), {"denoised": torch.zeros(1, 16, 2, 2)}
    write_previews(Path("step.png"))(pipe, 0, None, step)
    assert "no preview of this step: cannot write step.png" in capsys.readouterr().err


def test_info_of_a_damaged_picture(run, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    code, _, err = run("info", "a.png")
    assert code == 2 and err.startswith("minidiff: a.png is not a picture that can")


def test_info_of_what_is_no_picture(run, tmp_path):
    (tmp_path / "a.png").write_text("x")
    code, _, err = run("info", "a.png")
    assert code == 2 and "a.png is not a picture" in err
    code, _, err = run("info", "b.png")
    assert code == 2 and "b.png is missing" in err


def test_a_picture_is_a_png(tmp_path):
    with pytest.raises(ValueError, match="a.jpg; expected a name that ends in .png"):
        save_picture(Image.new("RGB", (8, 4)), tmp_path / "a.jpg")


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_picture(Image.new("RGB", (8, 4)), tmp_path / "a.png")
    assert not [*tmp_path.iterdir()]
