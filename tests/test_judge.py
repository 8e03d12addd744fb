import json

import pytest
import torch

from minidiff.support.data import Scenes
from minidiff.support.judge import (
    JUDGE,
    Judge,
    JudgeConfig,
    accuracy,
    load_judge,
    train_judge,
)

SMALL = JudgeConfig((16, 24, 32), (1, 1, 1), 48)


def test_shapes_and_size():
    judge = Judge().eval()
    assert sum(p.numel() for p in judge.parameters()) <= 1_000_000
    images = torch.randn(2, 3, 64, 64)
    shapes = [tuple(x.shape) for x in judge(images)]
    assert shapes == [(2, 3), (2, 2, 10), (2, 2, 8), (2, 8)]
    assert judge.features(images).shape == (2, 192)


def test_judge_tells_left_from_right_and_above_from_below():
    judge, images = Judge().eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        feature, *others = (
            judge.features(x) for x in (images, images.flip(3), images.flip(2))
        )
    assert all((feature - other).norm() > 0.01 * feature.norm() for other in others)


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


def test_no_judge(tmp_path):
    with pytest.raises(FileNotFoundError, match="train it with"):
        load_judge(tmp_path)


@pytest.mark.skipif(not (JUDGE / "config.json").exists(), reason="no judge ships yet")
def test_the_shipped_judge(fashion):
    assert sum(f.stat().st_size for f in JUDGE.iterdir()) <= 2 * 2**20
    claimed = json.loads((JUDGE / "config.json").read_text())["accuracy"]
    scenes = Scenes("test", fashion, seed=2, two_garments=0)
    found = accuracy(load_judge(), scenes, 500)["all"]
    assert found > 0.87
    assert claimed["one garment, seen"]["all"] >= 0.9
