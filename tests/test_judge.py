import json
import shutil

import pytest
import torch

from minidiff.support.data import Scenes
from minidiff.support.judge import (
    JUDGE,
    Judge,
    JudgeConfig,
    accuracy,
    choose_windows,
    load_judge,
    scenes_seen,
    train_judge,
    windows,
    with_silhouette,
)

SMALL = JudgeConfig((16, 24, 32), (1, 1, 1), 48)


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


def test_training_learns_and_saves(fashion, tmp_path):
    lines = []
    measured = train_judge(
        fashion, tmp_path, steps=60, batch_size=32, config=SMALL, test_scenes=100,
        log=lines.append,
    )  # fmt: skip
    losses = [float(line.rsplit(" ", 1)[1]) for line in lines]
    assert losses[-1] < 0.8 * losses[0]
    assert measured["two garments, seen"]["background"] > 0.5
    assert json.loads((tmp_path / "config.json").read_text())["accuracy"] == measured
    judge = load_judge(tmp_path)
    assert not judge.training and judge.config == SMALL
    scenes = Scenes("test", fashion, seed=2, two_garments=0)
    assert accuracy(judge, scenes, 100) == measured["one garment, seen"]


def test_training_goes_on(fashion, tmp_path):
    given = {"batch_size": 8, "config": SMALL, "test_scenes": 10, "log": lambda _: None}
    train_judge(fashion, tmp_path / "a", steps=2, **given)
    train_judge(fashion, tmp_path / "b", steps=3, start=tmp_path / "a", **given)
    assert (
        scenes_seen(tmp_path / "b") == 40 and load_judge(tmp_path / "b").config == SMALL
    )


def test_no_judge(tmp_path):
    with pytest.raises(FileNotFoundError, match="train it with"):
        load_judge(tmp_path)


def test_a_judge_that_cannot_be_used_is_named(tmp_path):
    folder = shutil.copytree(JUDGE, tmp_path / "judge")
    file, config = folder / "model.safetensors", folder / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"features": 5}))
    with pytest.raises(ValueError, match=f"{file} is not of its config.json: size"):
        load_judge(folder)
    config.write_text("{")
    with pytest.raises(ValueError, match=f"{config} is not valid JSON"):
        load_judge(folder)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{file} is not a whole safetensors file"):
        load_judge(folder)


@pytest.mark.skipif(not (JUDGE / "config.json").exists(), reason="no judge ships yet")
def test_the_shipped_judge(fashion):
    assert sum(f.stat().st_size for f in JUDGE.iterdir()) <= 2 * 2**20
    claimed = json.loads((JUDGE / "config.json").read_text())["accuracy"]
    scenes = Scenes("test", fashion, seed=2, two_garments=0)
    found = accuracy(load_judge(), scenes, 500)["all"]
    assert abs(found - claimed["one garment, seen"]["all"]) < 0.05
    assert found > 0.75
