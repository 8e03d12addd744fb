"""Recipes and options: what is read, changed, and refused before any work."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import relative_error
from PIL import Image
from torch import nn
from training_jobs import files, train

from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.files.weights import TINY
from minidiff.learning.run import RESULTS, check_other, lasting
from minidiff.learning.steps import check_batch
from minidiff.recipes import finetune, recipe, text_stages
from minidiff.recipes.features import place_in_pool
from minidiff.recipes.job import LENGTH
from minidiff.recipes.recipe import RECIPES, find_recipe
from minidiff.recipes.transformer_stage import (
    PlainAttention,
    SceneEncoder,
    plain_attention,
)
from minidiff.recipes.vae_stage import compilable
from minidiff.training import TrainingConfig
from minidiff.vae import Upsample


@pytest.mark.slow
def test_a_compiled_decoder_learns_in_bfloat16() -> None:
    """Also the layers in front of an upsampling: ``vae_stage.compilable``."""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        pytest.skip("no C++ compiler for torch.compile")
    behind = nn.GroupNorm(8, 16), nn.SiLU(), nn.Conv2d(16, 8, 3, padding=1)
    layers = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), Upsample(16), *behind)
    layers = compilable(layers).to(memory_format=torch.channels_last)
    latents = torch.randn(2, 4, 16, 16)

    def gradient(decode: Callable) -> torch.Tensor:
        layers.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = decode(latents).float().square().mean()
        loss.backward()
        return layers[0].weight.grad.clone()

    plain, compiled = gradient(layers), gradient(torch.compile(layers))
    assert (compiled - plain).norm() < 0.5 * plain.norm()


@pytest.mark.parametrize("stage", ["clip", "t5", "transformer"])
def test_a_stage_says_what_it_lacks(tmp_path: Path, stage: str) -> None:
    with pytest.raises(ValueError, match=f"--stage {stage} needs .*tokenizer, which"):
        train(stage, tmp_path / "new", recipe="trial")
    assert not (tmp_path / "new").exists()


def test_results_of_others_are_not_replaced(fashion: Path, tmp_path: Path) -> None:
    for name in RESULTS:
        output = tmp_path / f"in {name}"
        output.mkdir()
        (output / name).write_text("kept")
        with pytest.raises(ValueError, match="holds another training or model"):
            train("vae", output, fashion, recipe="trial")
        with pytest.raises(ValueError, match="holds another training or model"):
            check_other(output, "run", "runs")
        assert (output / name).read_text() == "kept"


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_plain_attention_has_the_same_gradients(kind: torch.dtype) -> None:
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    model = MMDiT(replace(MMDiTConfig.tiny(), **sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.2)
    c = model.config
    x, sigma = torch.randn(2, c.in_channels, 8, 8), torch.tensor([0.2, 0.7])
    context = torch.randn(2, 5, c.joint_attention_dim)
    pooled = torch.randn(2, c.pooled_projection_dim)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cpu", kind, enabled=kind != torch.float32):
            model(x, sigma, context, pooled).float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradient()
    assert plain_attention(model) is model
    assert type(model.joint_blocks[0].attention) is PlainAttention
    tolerance = 1e-5 if kind == torch.float32 else 2e-2
    assert relative_error(gradient(), expected) < tolerance


def test_a_file_changes_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text('{"transformer": {"steps": 7, "learning_rate": 1}, "shift": 3.0}')
    recipe = find_recipe(str(path))
    assert (recipe.transformer.steps, recipe.shift) == (7, 3.0)
    vae = replace(RECIPES["shipped"].vae, compile=False)
    assert replace(recipe.vae, bfloat16=True) == vae
    path.write_text('{"vae": {"step": 7}}')
    with pytest.raises(ValueError, match="vae sets 'step'; expected steps"):
        find_recipe(str(path))
    path.write_text('{"vae": {"steps": "many"}}')
    with pytest.raises(ValueError, match="steps is a str, expected int"):
        find_recipe(str(path))
    path.write_text('{"vae": {"steps": true}}')
    with pytest.raises(ValueError, match="steps is a bool, expected int"):
        find_recipe(str(path))
    with pytest.raises(ValueError, match="--recipe is 'fast'; expected shipped"):
        find_recipe("fast")


@pytest.mark.parametrize(
    "change, message",
    [
        ('{"pictures": 0}', "pictures is 0; expected above 0"),
        ('{"vae": {"save_every": 0}}', "save_every is 0; expected above 0"),
        ('{"vae": {"learning_rate": -1.0}}', "learning_rate is -1.0; expected above 0"),
        ('{"vae": {"learning_rate": 0.0}}', "learning_rate is 0.0; expected above 0"),
        (
            '{"vae": {"max_grad_norm": 0}}',
            "max_grad_norm is 0; expected above 0",
        ),
        ('{"shift": 0.0}', "shift is 0.0; expected above 0"),
        ('{"clip": {"muon": true}}', "clip: muon is for vae, transformer, turbo"),
        ('{"t5": {"ema_decay": 2.0}}', "ema_decay is 2.0; expected 0 to 1"),
        ('{"clip": {"learning_rate": NaN}}', "learning_rate is nan; expected above 0"),
        ('{"clip": {"beta2": 1.0}}', "beta2 is 1.0; expected 0 to 0.999999"),
        ('{"clip": {"beta2": 1}}', "beta2 is 1; expected 0 to 0.999999"),
    ],
)
def test_a_file_with_impossible_numbers(tmp_path: Path, change, message) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(change)
    with pytest.raises(ValueError, match=message):
        find_recipe(str(path))


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    cases = {("paint", None): "--stage is 'paint'", ("vae", 0): "steps is 0"}
    cases[("all", 5)] = "need a --stage"
    for (stage, steps), message in cases.items():
        with pytest.raises(ValueError, match=message):
            train(stage, tmp_path / "out", steps=steps)
    with pytest.raises(ValueError, match="cannot be cut into 3 equal parts"):
        check_batch(40, 16, 3)
    assert not (tmp_path / "out").exists()


def test_a_later_stage_is_checked_before_the_first(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text('{"transformer": {"accumulation": 5}}')
    with pytest.raises(ValueError, match="64 samples cannot be cut into 5 equal"):
        train("all", tmp_path / "out", recipe=str(file))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lacking", ["train", "test"])
def test_a_split_that_is_not_there(fashion: Path, tmp_path: Path, lacking: str) -> None:
    for file in fashion.rglob("*.parquet"):
        if not file.name.startswith(lacking):
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(FileNotFoundError, match=f"no {lacking}-00000-of-00001.parq"):
        train("all", tmp_path / "out", tmp_path, recipe="trial")


def test_encoded_scenes_are_named_after_all_that_made_them() -> None:
    layers = [nn.Linear(2, 2) for _ in range(2)]
    tables, gray = [torch.arange(6)], torch.arange(4).byte()

    def name(n: int = 8, seed: int = 0, share: float = 0.5) -> str:
        scenes = SimpleNamespace(content=(gray, "World", seed, share))
        models = SimpleNamespace(vae=layers[0], encoders=layers[1:], tables=tables)
        return SceneEncoder.file_name(models, scenes, n)

    names = [name(), name(n=9), name(seed=1), name(share=0.4)]
    assert name() == names[0]
    for changed in (layers[0].weight.data[0], layers[1].bias.data, tables[0], gray):
        changed += 1
        names.append(name())
    assert len({*names}) == 8


def test_a_file_is_no_folder_to_train_in(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for name in ("file", "file/below"):
        with pytest.raises((ValueError, OSError), match="is a file|cannot be written"):
            train("vae", tmp_path / name, recipe="trial")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("has", [False, True])
def test_only_a_processor_that_has_bfloat16_learns_in_it(has, monkeypatch) -> None:
    known = {"amx_bf16": False, "avx512_bf16": has}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    on_cpu, on_card = (find_recipe("shipped", cuda) for cuda in (False, True))
    assert on_cpu.transformer.bfloat16 == on_cpu.vae.bfloat16 == has
    assert on_card.transformer.bfloat16


def test_a_run_goes_on_where_numbers_are_longer() -> None:
    config = TrainingConfig(steps=2, batch_size=2, bfloat16=True)
    assert lasting(config) == lasting(replace(config, bfloat16=False))
    assert lasting(config) != lasting(replace(config, muon=True))


def test_a_file_decides_what_is_compiled_and_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does not name follows the device."""
    monkeypatch.setattr(recipe, "multiplies_bfloat16", lambda device: True)
    path = tmp_path / "recipe.json"
    path.write_text('{"vae": {"compile": true}, "t5": {"bfloat16": false}}')
    recipes = [find_recipe(str(path), cuda) for cuda in (False, True)]
    compiled = [[getattr(r, n).compile for n in ("vae", "t5")] for r in recipes]
    short = [[getattr(r, n).bfloat16 for n in ("clip", "t5", "vae")] for r in recipes]
    assert compiled == [[True, False], [True, True]]
    assert short == [[True, False, True], [False, False, True]]


def test_another_kind_of_training_loses_nothing(tmp_path: Path) -> None:
    """Stages and fine-tuning both write a model: not into one folder."""
    model = shutil.copytree(TINY, tmp_path / "out" / "model")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a")
    before = files(model)

    def tune() -> None:
        config = TrainingConfig(1, 1)
        finetune.finetune("tiny", tmp_path / "pictures", tmp_path / "out", config)

    def from_nothing() -> None:
        train("all", tmp_path / "out", recipe="trial")

    for action, own, other in ((tune, "run", "runs"), (from_nothing, "runs", "run")):
        with pytest.raises(ValueError, match="out holds another training or model"):
            action()
        (tmp_path / "out" / own).mkdir()
        check_other(tmp_path / "out", own, other)
        (tmp_path / "out" / own).rmdir()
        (tmp_path / "out" / other).mkdir()
        with pytest.raises(ValueError, match="out holds another training or model"):
            action()
        (tmp_path / "out" / other).rmdir()
    assert files(model) == before


@pytest.mark.parametrize("n", [1, 12, 1000, 2**14])
def test_each_sample_comes_once_an_epoch(n: int) -> None:
    for start in (0, n, 7 * n):
        places = place_in_pool(torch.arange(start, start + n), n)
        assert torch.equal(places.sort().values, torch.arange(n))


def test_captions_of_full_length_are_not_cut(capsys: pytest.CaptureFixture) -> None:
    class Words:
        def encode(self, text: str) -> list[str]:
            return text.split()

        def __call__(self, texts: list[str]) -> torch.Tensor:
            return torch.zeros(len(texts), LENGTH)

    full, long = "a " * LENGTH, "a " * (LENGTH + 1)
    text_stages.encode_all(Words(), [full])
    assert capsys.readouterr().out == ""
    text_stages.encode_all(Words(), [full, long])
    assert "1 of 2 captions are cut" in capsys.readouterr().out
