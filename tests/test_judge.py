import json
import shutil
from dataclasses import replace

import pytest
import torch

from minidiff.data.garments import Scenes
from minidiff.judging.judge import (
    JUDGE,
    Judge,
    accuracy,
    choose_windows,
    judge_loss,
    load_judge,
    windows,
    with_silhouette,
)
from minidiff.learning.run import read_log
from minidiff.recipes.job import Job
from minidiff.recipes.recipe import RECIPES
from minidiff.recipes.train import STAGES, run_stages
from minidiff.training import TrainingConfig


def test_shapes_and_size():
    judge = Judge().eval()
    assert sum(p.numel() for p in judge.parameters()) <= 1_000_000
    images = torch.randn(2, 3, 64, 64)
    shapes = [tuple(x.shape) for x in judge(images)]
    assert shapes == [(2, 3), (2, 2, 10), (2, 2, 8), (2, 8)]
    assert judge.read(images)[0].shape == (2, 192)


def test_silhouette_knows_no_colour():
    """The same garment in other colours, of the same distance to the background."""
    image = -torch.ones(1, 3, 64, 64)
    image[:, 0, 20:40, 20:40] = 0.5
    extra = with_silhouette(image)[:, 3:]
    assert torch.equal(extra, with_silhouette(image.roll(1, 1))[:, 3:])
    assert extra[0, 0, 30, 30] == 1.5 and extra[0, 0, 0, 0] == 0


def test_windows_are_where_garments_lie(fashion):
    """Each garment's opacity is largest in its own window of the map."""
    batch = Scenes("test", fashion, two_garments=1).batch(torch.arange(50))
    maps = torch.nn.functional.avg_pool2d(batch.masks, 8)  # (B, 2, 8, 8)
    inside = windows(maps).unflatten(2, (2, 16)).mean(3)  # (B, 5, 2)
    own = torch.stack([batch.attributes.layout * 2 - 1] * 2, 1) + torch.arange(2)
    assert (inside[:, 1:].argmax(1) + 1 == own).all()


def test_layout_chooses_the_windows():
    x = torch.randn(3, 5, 7)
    chosen = choose_windows(x, torch.eye(3))
    for row, numbers in enumerate([(0, 0), (1, 2), (3, 4)]):
        assert torch.equal(chosen[row], x[row, list(numbers)])


@pytest.mark.slow
def test_training_learns_and_saves(fashion, tmp_path):
    config = TrainingConfig(
        60, 32, 2e-3, 10, ema_decay=0.9, log_every=10, save_every=20, validate_every=60
    )
    recipe = replace(RECIPES["trial"], judge=config, held=8)
    judge = [s for s in STAGES if s.name == "judge"]
    run_stages(Job(tmp_path, recipe, str(fashion)), judge)
    log = read_log(tmp_path / "runs" / "judge" / "log.jsonl")
    losses = [record["loss"] for record in log if "loss" in record]
    assert losses[-1] < 0.8 * losses[0]
    assert 0 <= log[-1]["one garment"] <= 1
    saved = json.loads((tmp_path / "judge" / "config.json").read_text())
    found = saved["accuracy"]["two garments, seen"]["background"]
    assert found > 0.3  # one in 8 by chance
    assert saved["seen"] == 60 * 32 and saved["test_scenes"] == 160
    judge = load_judge(tmp_path / "judge")
    assert not judge.training
    scenes = Scenes("test", fashion, seed=2, two_garments=0)
    assert accuracy(judge, scenes, 160) == saved["accuracy"]["one garment, seen"]


@pytest.mark.slow
def test_the_loss_is_a_mean_over_scenes(fashion):
    """Of halves with unlike numbers of garments too, so that devices can share."""
    torch.manual_seed(0)
    scene, judge = Scenes("train", fashion).batch(torch.arange(12)), Judge().double()
    whole = {"images": scene.images.double()} | scene.attributes._asdict()
    parts = [{k: v[i : i + 6] for k, v in whole.items()} for i in (0, 6)]
    counts = {int((part["garments"] >= 0).sum()) for part in parts}
    assert len(counts) == 2
    losses = [judge_loss(judge, part).item() for part in parts]
    assert judge_loss(judge, whole).item() == pytest.approx(sum(losses) / 2, rel=1e-12)


def test_no_judge(tmp_path):
    with pytest.raises(FileNotFoundError, match="train it with"):
        load_judge(tmp_path)


def test_a_judge_that_cannot_be_used_is_named(tmp_path):
    folder = shutil.copytree(JUDGE, tmp_path / "judge")
    file, config = folder / "model.safetensors", folder / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"features": 5}))
    with pytest.raises(ValueError, match=f"{file}: .* has shape .*; expected"):
        load_judge(folder)
    config.write_text("{")
    with pytest.raises(ValueError, match=f"{config} is not valid JSON"):
        load_judge(folder)
    config.write_text(json.dumps(values))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{file} is not a whole safetensors file"):
        load_judge(folder)


@pytest.mark.slow
def test_the_shipped_judge(fashion):
    assert sum(f.stat().st_size for f in JUDGE.iterdir()) <= 2 * 2**20
    claimed = json.loads((JUDGE / "config.json").read_text())["accuracy"]
    scenes = Scenes("test", fashion, seed=2, two_garments=0)
    found = accuracy(load_judge(), scenes, 500)["all"]
    assert claimed["one garment, seen"]["all"] >= 0.9
    assert abs(found - claimed["one garment, seen"]["all"]) < 0.05
    assert found > 0.87
