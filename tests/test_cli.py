"""The command line: pictures, names, and one line for what cannot be done."""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from helpers import randomize
from PIL import Image
from pipelines import load_tokenizers, reference_pipeline, save_tokenizers
from torch import nn

from minidiff.cli.options import find_device
from minidiff.dit import JointBlock
from minidiff.files.pictures import read_settings
from minidiff.files.weights import TINY, Prepared, short_hash
from minidiff.judging import metrics
from minidiff.lora import LowRank, save_lora
from minidiff.recipes.finetune import LoraConfig, PictureConfig
from minidiff.recipes.recipe import Recipe
from minidiff.sampling import Pipeline
from minidiff.training import TrainingConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model's folder, as diffusers saves it."""
    path = tmp_path_factory.mktemp("model")
    save_tokenizers(path / "parts")
    reference_pipeline(load_tokenizers(path / "parts")).save_pretrained(path / "saved")
    return path / "saved"


@pytest.mark.slow
def test_sample_takes_free_names(run, folder, tmp_path):
    arguments = ("sample", "a red dress", "--model", folder, "--steps", 2)
    for names in (["picture.png"], ["picture-1.png"]):
        assert run(*arguments) == (0, names[0] + "\n", "")
    code, out, _ = run(*arguments, "--num-images", 2)
    assert out.split() == ["picture-2.png", "picture-3.png"]
    pictures = [
        Image.open(tmp_path / f"picture{n}.png") for n in ("", "-1", "-2", "-3")
    ]
    assert all(p.size == (32, 32) for p in pictures)
    first, *others = (np.asarray(p).astype(int) for p in pictures)
    far = [abs(other - first).max() for other in others]
    assert max(far[:2]) <= 1 < far[2]  # in a batch of two it may be rounded otherwise


@pytest.mark.slow
def test_output_is_kept_unless_told(run, folder, tmp_path):
    (tmp_path / "a.png").write_text("kept")
    arguments = (
        "sample",
        "a bag",
        "--model",
        folder,
        "--steps",
        1,
        "--output",
        "a.png",
    )
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err == "minidiff: a.png exists; expected a free name, or --overwrite\n"
    assert (tmp_path / "a.png").read_text() == "kept"
    assert run(*arguments, "--overwrite")[0] == 0
    assert Image.open(tmp_path / "a.png").size == (32, 32)
    assert run(*arguments, "--num-images", 2)[1].split() == ["a-0.png", "a-1.png"]


@pytest.mark.slow
def test_options_reach_the_pipeline(run, folder, tmp_path):
    plain = ("sample", "a bag", "--model", folder, "--steps", 2, "--output")
    run(*plain, "plain.png")
    changes = {
        "sampler": "heun",
        "seed": 3,
        "guidance-scale": 1.5,
        "negative-prompt": "x",
        "height": 24,
        "width": 40,
    }
    reference = Image.open(tmp_path / "plain.png")
    for option, value in changes.items():
        assert run(*plain, f"{option}.png", f"--{option}", value)[0] == 0
        picture = Image.open(tmp_path / f"{option}.png")
        assert (picture.size, picture.tobytes()) != (
            reference.size,
            reference.tobytes(),
        )


BAD = [
    (["--steps", 0], "--steps is 0; expected a whole number, 1 to 1000"),
    (["--steps", "many"], "Invalid value for '--steps': "),
    (["--height", 33], "--height is 33; expected a multiple of 8"),
    (["--width", 104], "--width is 104; expected a multiple of 8 up to 96"),
    (
        ["--sampler", "ddim"],
        "--sampler is 'ddim'; expected one of euler, heun",
    ),
    (["--num-images", 0], "--num-images is 0; expected a whole number, 1 to 100000"),
    (["--model", "sd4"], "--model is 'sd4'; expected tiny, tiny-turbo, sd3.5-medium"),
    (["--model", ""], "model is ''; expected tiny"),
    (["--device", "tpu"], "--device is 'tpu'; expected cpu, cuda"),
    (
        ["--output", "no/where.png"],
        "no/where.png cannot be written: no is not a folder",
    ),
    (["--output", "."], "expected a name that ends in .png"),
    (["--output", "a.jpg"], "--output is a.jpg; expected a name that ends in .png"),
    (["--colour", "red"], "No such option: --colour"),
    (["--width", 0], "width is 0; expected a multiple of 8 up to 96"),
    (["--memory", "lots"], "memory is 'lots'; expected 8GB, 12GB, 16GB, 24GB"),
    (["--memory", "0.5GB"], "memory is 0.5GB; this model needs about"),
    (["--negative-prompt", "bad \udcff"], "--negative-prompt is not a text in UTF-8"),
    (["--t5", "gone"], "t5 is 'gone'; expected one of resident, streamed, none"),
    (["--clip", "none"], "clip is 'none'; expected one of resident, streamed"),
    (["--vae-tile", 2], "--vae-tile is 2; expected a whole number, at least 8"),
    (["--dtype", "int8"], "'int8' is not one of 'float32', 'bfloat16'"),
    (["--text-encoders", "."], "--text-encoders is '.', but"),
    (["--model", "sd3.5-large", "--memory", "lots"], "memory is 'lots'; expected"),
]


@pytest.mark.slow
@pytest.mark.parametrize("arguments, message", BAD, ids=[m for _, m in BAD])
def test_bad_input_is_one_line_and_status_2(
    run, folder, tmp_path, monkeypatch, arguments, message
):
    """And told before the first weight is read."""
    monkeypatch.setattr(Prepared, "__call__", lambda *_: 1 / 0)
    model = [] if "--model" in arguments else ["--model", folder]
    code, out, err = run("sample", "a bag", *model, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("minidiff: ")
    assert message in err
    assert list(tmp_path.iterdir()) == []


SETTINGS = {
    "memory": (["--memory", "8GB"], {"memory": "8GB"}),
    "knobs": (
        ["--clip", "streamed", "--modulation", "streamed", "--vae-slicing"],
        {"clip": "streamed", "modulation": "streamed", "vae_slicing": "True"},
    ),
    "fast": (["--fast"], {"fast": "True"}),
    "fp8": (["--fp8", "--fast"], {"fp8": "True", "fast": "True"}),
    "tiles": (["--memory", "8GB", "--no-fp8", "--vae-tile", 8], {"vae_tile": "8"}),
    "dtype": (["--dtype", "bfloat16"], {"dtype": "bfloat16"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_load(run, folder, tmp_path, name):
    options, wanted = SETTINGS[name]
    call = ("sample", "a bag", "--model", folder, "--steps", 1, "--width", 48)
    call += tuple(options)
    code, out, err = run(*call, "--output", "a.png")
    assert (code, out) == (0, "a.png\n")  # the plan is told on stderr
    planned = bool(wanted.keys() - {"dtype", "fast"})
    assert err.count("memory plan: ") == err.count("\n") == planned
    if name == "knobs":
        assert "clip streamed, modulation streamed, vae_slicing True" in err
    found = read_settings("a.png")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert wanted.items() <= found.items() and found["weights"] == short_hash(file)
    run(*call[: -len(options)], "--output", "plain.png")
    plain, drawn = Image.open("plain.png").tobytes(), Image.open("a.png").tobytes()
    assert name == "fast" or (plain == drawn) == (name in ("memory", "knobs"))


@pytest.mark.slow
def test_without_t5_its_weights_need_not_be_there(run, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "text_encoder_3")
    call = ("sample", "a bag", "--model", copy, "--steps", 1)
    code, _, err = run(*call)
    assert code == 2 and "text_encoder_3" in err and err.count("\n") == 1
    assert run(*call, "--t5", "none")[:2] == (0, "picture.png\n")


@pytest.mark.slow
def test_compile_compiles_the_blocks(run, folder, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda m, **_: compiled.append(m))
    run("sample", "a bag", "--model", folder, "--steps", 1, "--compile")
    assert {type(block) for block in compiled} == {JointBlock}


@pytest.mark.slow
def test_lora_beside_weights_that_are_not_held_in_full(run, folder, tmp_path):
    update = randomize(LowRank(32, 32, 2))
    layers = {"transformer": {"transformer_blocks.0.attn.to_q": update}}
    save_lora(layers, tmp_path / "lora.safetensors")
    call = ("sample", "a bag", "--model", folder, "--steps", 1, "--fp8", "--output")
    assert run(*call, "without.png")[0] == 0
    assert run(*call, "with.png", "--lora", "lora.safetensors")[0] == 0
    bare, adapted = Image.open("without.png"), Image.open("with.png")
    assert bare.tobytes() != adapted.tobytes()
    assert read_settings("with.png")["lora"] == "lora.safetensors"


def test_a_single_file_needs_its_encoders(run, tmp_path):
    (tmp_path / "sd3.5_medium.safetensors").write_bytes(b"x")
    code, _, err = run("sample", "a bag", "--model", "sd3.5_medium.safetensors")
    assert code == 2 and "encoders are not read from it; expected text_encoders=" in err


def test_a_folder_that_cannot_be_written(run, folder, monkeypatch):
    if not os.path.isdir("/proc"):
        pytest.skip("needs /proc")
    code, _, err = run("sample", "a", "--model", folder, "--output", "/proc/a.png")
    assert code == 2 and err.startswith("minidiff: /proc/a.png cannot be written: ")


def test_damaged_models(run, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    call = ("sample", "a", "--model", copy)
    weights.write_bytes(whole[:-1])
    code, _, err = run(*call)
    assert code == 2 and f"not a whole safetensors file ({len(whole) - 1} bytes)" in err
    weights.rename(weights.with_suffix(".ckpt"))
    code, _, err = run(*call)
    assert code == 2 and "pickled checkpoint" in err and err.count("\n") == 1
    weights.with_suffix(".ckpt").unlink()
    code, _, err = run(*call)
    assert code == 2 and "no weights in" in err and err.count("\n") == 1


def vocabulary_of(folder, size):
    """Give the last piece of CLIP-L's vocabulary the id ``size``."""
    file = folder / "tokenizer" / "vocab.json"
    vocab = json.loads(file.read_text())
    file.write_text(json.dumps(vocab | {"one more": size}))


def setting(folder, file, name, value):
    """Change one entry of a JSON file."""
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | {name: value}))


SHIFT = ("scheduler/scheduler_config.json", "shift")
LENGTH = ("tokenizer/tokenizer_config.json", "model_max_length")
MISFITS = {
    "CLIP-L's tokenizer has ids from 0 to 1536": lambda f: vocabulary_of(f, 1536),
    "CLIP-L's tokenizer writes 77 ids": lambda f: setting(f, *LENGTH, 77),
    "model_max_length is 'long'": lambda f: setting(f, *LENGTH, "long"),
    "CLIP-L looks for the end token 5": lambda f: setting(
        f, "text_encoder/config.json", "eos_token_id", 5
    ),
    "shift is 'x'; expected float": lambda f: setting(f, *SHIFT, "x"),
    "shift is 0; expected 0.001 to 1000": lambda f: setting(f, *SHIFT, 0),
    "vae/config.json is missing": lambda f: shutil.rmtree(f / "vae"),
    "names no vae": lambda f: setting(f, "model_index.json", "vae", None),
    "merges.txt is not a text": lambda f: (f / "tokenizer/merges.txt").write_bytes(
        b"\xff"
    ),
}


@pytest.mark.parametrize("message", MISFITS)
def test_files_that_do_not_fit(run, tmp_path, monkeypatch, message):
    """They are refused before a weight is read."""
    copy = shutil.copytree(TINY, tmp_path / "copy")
    MISFITS[message](copy)
    monkeypatch.setattr(Prepared, "__call__", None)
    code, out, err = run("sample", "a bag", "--model", copy)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


TOKENS = "tokenizer/tokenizer_config.json"
WHOLE = "tokenizer_3/tokenizer.json"


def negative_id(folder):
    """The vocabulary with an id that no table has."""
    vocab = json.loads((folder / "tokenizer/vocab.json").read_text())
    return json.dumps(vocab | {next(iter(vocab)): -1})


@pytest.mark.parametrize(
    "change",
    [
        lambda f: setting(f, TOKENS, "added_tokens_decoder", []),
        lambda f: setting(
            f, TOKENS, "added_tokens_decoder", {"9": {"content": "a", "single_word": 1}}
        ),
        lambda f: (f / "tokenizer/tokenizer.json").write_text('{"model": []}'),
        lambda f: (f / "tokenizer/tokenizer.json").write_text(
            '{"model": {"vocab": {"a": 0}, "merges": 5}}'
        ),
        lambda f: (f / "tokenizer/tokenizer.json").write_text(
            '{"model": {"vocab": {"a": 0}, "merges": [["a", ["b"]]]}}'
        ),
        lambda f: (f / "tokenizer/vocab.json").write_text('{"a": "0"}'),
        lambda f: setting(f, TOKENS, "model_max_length", -math.inf),
        lambda f: setting(f, "tokenizer_3/tokenizer_config.json", "extra_ids", 10**9),
        lambda f: (f / "tokenizer/vocab.json").write_text(negative_id(f)),
        lambda f: setting(f, WHOLE, "normalizer", [1]),
        lambda f: setting(f, WHOLE, "model", {"type": "Unigram", "vocab": []}),
        lambda f: setting(
            f, WHOLE, "model", {"type": "Unigram", "vocab": [["a", 0], ["a", 0]]}
        ),
    ],
)
def test_tokenizers_of_another_shape_are_one_line(run, tmp_path, change):
    copy = shutil.copytree(TINY, tmp_path / "copy")
    change(copy)
    code, out, err = run("sample", "a bag", "--model", copy, "--steps", 1)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "tokenizer" in err.replace(str(copy), "")


@pytest.mark.slow
def test_a_length_may_be_written_with_a_point(run, tmp_path):
    copy = shutil.copytree(TINY, tmp_path / "copy")
    setting(copy, TOKENS, "model_max_length", 32.0)
    assert run("sample", "a bag", "--model", copy, "--steps", 1)[0] == 0


def test_info_of_a_folder_without_a_model(run, tmp_path):
    code, out, err = run("info", tmp_path)
    assert (code, out) == (2, "")
    assert err == f"minidiff: {tmp_path}/model_index.json is missing\n"


def test_no_arguments_and_help(run):
    assert run() == run("--help") and run()[0] == 0 and run()[1].count("\n") > 5
    code, out, err = run("sample")
    assert code == 2 and "prompt" in err.lower() and err.count("\n") == 1
    code, out, err = run("paint")
    assert code == 2 and "paint" in err and err.count("\n") == 1


def test_help_lists_the_whole_configuration(run):
    code, out, _ = run("train", "--help")
    listed = re.search(r"and control: (.*?)\. Of all: (.*?)\.", " ".join(out.split()))
    of_stage, of_all = (text.split(", ") for text in listed.groups())
    stages = "clip, t5, vae, judge, transformer, turbo, matching, control".split(", ")
    assert code == 0 and of_stage == [f.name for f in fields(TrainingConfig)]
    assert sorted([*stages, *of_all]) == sorted(f.name for f in fields(Recipe))


UNFIT = [
    (["-n", 1], "-n is 1; expected a whole number, 2 to 100000"),
    (["--steps", 0], "--steps is 0; expected a whole number, 1 to 1000"),
    (["--guidance-scale", "nan"], "--guidance-scale is nan; expected a finite number"),
    (["--model", "sd3.5-medium"], "the model draws 1024 × 1024 pixels, scenes have"),
]


@pytest.mark.slow
@pytest.mark.parametrize("arguments, message", UNFIT, ids=[m for _, m in UNFIT])
def test_an_evaluation_that_cannot_be(run, monkeypatch, arguments, message):
    """It is told before the first weight is read."""
    monkeypatch.setattr(Prepared, "__call__", lambda *_: 1 / 0)
    code, out, err = run("evaluate", *arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.slow
def test_an_evaluation_from_the_command_line(run, fashion, tmp_path, monkeypatch):
    monkeypatch.delenv("MINIDIFF_DATA", raising=False)  # --data is enough
    how = ("-n", 2, "--steps", 1, "--guidance-scale", 2, "--seed", 7, "--data", fashion)
    code, out, err = run("evaluate", *how, "--output", "found.json", "--device", "cpu")
    assert code == 0, err
    found = json.loads((tmp_path / "found.json").read_text())
    assert out == metrics.format_table(found) + "\n"
    named = {"n": 2, "seed": 7, "num_inference_steps": 1, "guidance_scale": 2}
    assert named.items() <= found.items()
    assert found["rows"].keys() == metrics.ROWS.keys()
    assert found["frechet"]["n"] == 2 and "T5 color" in found["attention"]


@pytest.mark.parametrize("kind", ["train.train_stages", "turbo.finetune_pictures"])
def test_options_of_training_arrive(run, folder, tmp_path, monkeypatch, kind):
    name, function = kind.split(".")
    module, given = importlib.import_module(f"minidiff.recipes.{name}"), []
    monkeypatch.setattr(module, function, given.append)
    common = {"steps": 5, "batch_size": 3, "compile": True}
    options = ["--steps", 5, "--batch-size", 3, "--compile", "--no-crop", "--recompute"]
    if name == "train":
        options += ["--stage", "vae", "--seed", 4, "--recipe", "trial", "--data", "d"]
        own = {"stage": "vae", "seed": 4, "recipe": "trial", "data": Path("d")}
        own |= {"crop": False}
    else:
        options += ["--from", "tiny", "--data", "d", "--learning-rate", 0.5, "--lora"]
        options += ["--rank", 2, "--alpha", 6, "--targets", "to_q"]
        own = {"model": "tiny", "pictures": Path("d"), "learning_rate": 0.5}
        options += ["--fp8", "--encoders", "--accumulation", 3, "--buckets"]
        options += ["--trigger", "ink,", "--prior", "a bag", "--prior-pictures", 7]
        options += ["--prompt", "a", "--prompt", "b"]
        own |= {"lora": LoraConfig(2, 6, ("to_q",), True, True), "accumulation": 3}
        own |= {"how": PictureConfig(False, True, "ink,", "a bag", 7, ("a", "b"))}
    run("train", "--output", "out", "--device", "cpu", *options)
    expected = {**common, **own, "recompute": True, "output": Path("out")}
    assert expected.items() <= vars(given[0]).items()


def test_a_file_that_is_not_there_is_named(run):
    code, out, err = run("sample", "--prompts", "none.txt")
    assert (code, out) == (2, "")
    assert err == "minidiff: none.txt is missing\n"


@pytest.mark.slow
def test_info_and_sample_know_a_model_by_the_same_name(run, folder, tmp_path):
    """The one that its folder remembers; not that of a folder around it."""
    copy = shutil.copytree(folder, tmp_path / "turbo" / "copy")
    for origin, steps in ((None, 28), ("a/sd3.5-large-turbo", 4)):
        setting(copy, "model_index.json", "_name_or_path", origin)
        assert f"{steps} steps" in run("info", copy)[1]
        name = run("sample", "a bag", "--model", copy)[1].strip()
        found = read_settings(name)
        assert found["num_inference_steps"] == str(steps)
    assert found["model"] == f"{copy} (a/sd3.5-large-turbo)"


def test_the_first_cpu_is_the_cpu():
    assert find_device("cpu:0") == "cpu"


@pytest.mark.slow
def test_info(run, folder):
    code, out, _ = run("info", folder)
    assert code == 0 and "32×32 pixels" in out
    code, out, _ = run("info", "sd3.5-medium")
    assert "2,243,171,520" in out and "4,762,310,656" in out and "83,819,683" in out
    assert out.endswith("1024×1024 pixels, 40 steps, guidance 4.5\n")
    assert run("info", "sd3.5-large")[1].endswith("28 steps, guidance 3.5\n")
    code, out, _ = run("info", "sd3.5-large-turbo")
    assert "8,056,627,520" in out and "4 steps, guidance 1.0" in out


@pytest.mark.slow
@pytest.mark.parametrize("command", [["download"], ["sample", "a bag", "--model"]])
def test_no_network(tmp_path, command):
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret"}
    env["HF_HUB_CACHE"] = str(tmp_path / "hub")
    run = subprocess.run(
        [sys.executable, "-m", "minidiff", *command, "sd3.5-large"],
        env=os.environ | env,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1
    assert "https://huggingface.co/stabilityai/stable-diffusion-3.5-large" in run.stderr
    for word in ("network", "licence", "token", "hf auth login", "HF_TOKEN"):
        assert word in run.stderr
    assert "hf_secret" not in run.stderr


def test_download_wants_a_model(run):
    code, _, err = run("download", "sd4")
    assert code == 2 and "expected sd3.5-medium" in err


def imported(statement):
    code = f"import sys; {statement}; print(*sorted(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


@pytest.mark.slow
def test_load_imports_little_beside_torch():
    """What `import minidiff; minidiff.load` adds to `import torch`."""
    extra = imported("import minidiff; minidiff.load") - imported("import torch")
    packages = {name.split(".")[0] for name in extra}
    heavy = {"huggingface_hub", "matplotlib", "PIL", "tqdm", "typer", "transformers"}
    assert not packages & (heavy | {"diffusers", "pyarrow", "rich", "numpy.ma"})
    assert len(extra) < 80, sorted(extra)


def test_the_command_line_starts_without_torch():
    heavy = {"torch", "numpy", "PIL", "rich", "safetensors"}
    assert not imported("import minidiff.cli; minidiff.cli.program()") & heavy


COMMANDS = ["sample", "train", "evaluate", "download", "info", "compare", "doctor"]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_the_terminal(run, monkeypatch, command, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", width)
    code, out, err = run(*command.split(), "--help")
    assert (code, err) == (0, "") and "\x1b" not in out and "<list" not in out
    assert max(map(len, out.splitlines())) <= width
    assert out.count("minidiff " + command) >= (3 if command else 1)


def test_help_is_in_groups(run):
    """Each option once, and only --help among those without one."""
    _, out, _ = run("sample", "--help")
    groups = re.split(r"╭─ (.*?) ─+╮", out)[1:]
    found = dict(zip(groups[::2], groups[1::2], strict=True))
    names = [*("Arguments", "Options", "What to draw", "How many, how large")]
    names += [*("How to draw", "From a picture", "By a sketch", "Model", "Memory")]
    names += ["Speed", "Output"]
    assert list(found) == names
    assert re.findall("--[a-z0-9-]+", found["Options"]) == ["--help"]
    listed = re.findall(r"│ +(--[a-z0-9-]+)", out)
    assert len(listed) == len(set(listed)) > 30


def test_the_version(run):
    code, out, err = run("--version")
    assert (code, err) == (0, "") and re.fullmatch(r"minidiff \d+\.\d+\.\d+\n", out)


def test_an_interruption_is_told(run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "decode", interrupt)
    code, out, err = run("sample", "a bag", "--steps", 1)
    assert (code, out) == (130, "") and err.endswith("minidiff: interrupted\n")


def test_no_file_is_lost(run, tmp_path):
    for name, call in (
        ("step.png", ("sample", "a", "--preview")),
        ("found.json", ("evaluate", "--output")),
    ):
        (tmp_path / name).write_text("kept")
        code, _, err = run(*call, name)
        assert code == 2 and f"{name} exists" in err
        assert (tmp_path / name).read_text() == "kept"


def test_a_judge_that_is_not_there(run, tmp_path):
    assert "no judge in" in run("evaluate", "--judge", tmp_path)[2]


@pytest.mark.slow
def test_a_folder_goes_before_a_published_name(run, tmp_path):
    shutil.copytree(TINY, tmp_path / "sd3.5-medium")
    assert "64×64 pixels" in run("info", "sd3.5-medium")[1]
    assert run("sample", "a bag", "--model", "sd3.5-medium", "--steps", 1)[0] == 0


def test_one_lora_at_a_time(run):
    code, _, err = run("sample", "a bag", "--lora", "a", "--lora", "b")
    assert code == 2 and "--lora is given more than once; expected one file" in err
