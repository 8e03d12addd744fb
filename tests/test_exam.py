"""The small exam of the chapters: prompts, grades, intervals."""

import re

import pytest
import torch

from minidiff.data.garments import CLASSES, sample_scenes
from minidiff.judging import exam as module
from minidiff.judging.exam import exam, interval, share, world_exam
from minidiff.judging.witness import Witness

KINDS = {"things", "colors", "places", "ground", "all"}


@pytest.mark.parametrize("two", [False, True])
def test_prompts_are_the_same_each_time_and_have_as_many_things(two):
    (texts, _), (again, _) = exam(12, two), exam(12, two)
    assert texts == again and len(set(texts)) == 12
    named = re.compile("|".join(rf"(?<!-)\b{name}\b" for name in CLASSES))
    one = [len(named.findall(text)) == 1 for text in texts]
    assert not any(one) if two else all(one)


def test_grades_are_those_of_the_pictures():
    """The shipped scenes answer other prompts; some ground is right by chance."""
    images, _ = sample_scenes()
    _, grade = exam(16)
    right = grade(images)
    assert right.keys() >= KINDS and all(x.shape == (16,) for x in right.values())
    assert right["all"].sum() == 0 and not right["ground"].all()


def test_the_world_has_its_own_exam(monkeypatch):
    monkeypatch.setattr(module, "load_witness", lambda folder: Witness().eval())
    texts, grade = world_exam(16, two=True)
    assert texts == world_exam(16, two=True)[0] != world_exam(16)[0]
    right = grade(sample_scenes()[0])
    assert right.keys() == KINDS and not right["all"].any()


def test_intervals_are_wilsons():
    """Half of 100 by the formula; certain counts keep a width, and stay a share."""
    low, high = interval(torch.arange(100) % 2)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert interval(torch.zeros(30)) == pytest.approx((0, 0.1135), abs=1e-4)
    assert interval(torch.ones(30)) == pytest.approx((0.8865, 1), abs=1e-4)
    assert share(torch.arange(100) % 2) == " 50 % (40–60)"
    assert share(torch.zeros(30)) == "  0 % (0–11)"
