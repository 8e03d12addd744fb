"""The small exam of the chapters: prompts, grades, intervals."""

import pytest
import torch

from minidiff.data.reader import read
from minidiff.data.samples import sample_scenes
from minidiff.judging.exam import exam, interval, share

KINDS = {"things", "colors", "places", "ground", "all"}


@pytest.mark.parametrize("two", [False, True])
def test_prompts_are_the_same_each_time_and_have_as_many_things(two):
    (texts, _), (again, _) = exam(12, two), exam(12, two)
    assert texts == again and len(set(texts)) == 12
    assert [len(read(text).groups) for text in texts] == [1 + two] * 12


def test_grades_are_those_of_the_pictures():
    """The shipped scenes answer other prompts; some ground is right by chance."""
    images, _ = sample_scenes()
    _, grade = exam(16)
    right = grade(images)
    assert right.keys() == KINDS and all(x.shape == (16,) for x in right.values())
    assert right["all"].sum() <= 1 and not right["ground"].all()


def test_intervals_are_wilsons():
    """Half of 100 by the formula; certain counts keep a width, and stay a share."""
    low, high = interval(torch.arange(100) % 2)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert interval(torch.zeros(30)) == pytest.approx((0, 0.1135), abs=1e-4)
    assert interval(torch.ones(30)) == pytest.approx((0.8865, 1), abs=1e-4)
    assert share(torch.arange(100) % 2) == " 50 % (40–60)"
    assert share(torch.zeros(30)) == "  0 % (0–11)"
