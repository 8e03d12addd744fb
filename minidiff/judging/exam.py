"""A small exam that a chapter can afford: some prompts, and the judge's answers."""

from collections.abc import Callable

import torch
from torch import Tensor

from minidiff.data.language import RANDOM, Dice, say, shown
from minidiff.data.rng import fold_in, uniform
from minidiff.data.samples import ONE, TWO
from minidiff.data.scenes import draw_attributes
from minidiff.judging.answers import follows
from minidiff.judging.judge import EVALUATION_SEED, find, load_judge

Grade = Callable[[Tensor], dict[str, Tensor]]


def exam(n: int, two: bool = False) -> tuple[list[str], Grade]:
    """``n`` prompts, of two things each or of one, and who grades their pictures.

    They name all that a scene shows but sizes, and of a thing not its own colours.
    The grade of pictures (n, 3, 64, 64) in [−1, 1] says by what is asked ("things",
    "colors", "places", "ground", "all") which of them, (n,), show it. The prompts are
    the same each time, and no training ever drew their scenes.
    """
    numbers, seed = torch.arange(n), EVALUATION_SEED
    scenes = draw_attributes(uniform(seed, numbers, 33), "", TWO if two else ONE)
    asked, dice = shown(scenes), uniform(fold_in(seed, 1), numbers, RANDOM).tolist()
    texts = [say(*pair) for pair in zip(asked, map(Dice, dice), strict=True)]
    judge = load_judge()

    def grade(images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            found = find(judge(images))
        rows = [follows(*pair) for pair in zip(found, asked, strict=True)]
        return {name: torch.tensor([r[name] for r in rows]) for name in rows[0]}

    return texts, grade


def interval(right: Tensor) -> tuple[float, float]:
    """Where the true share lies, 19 times of 20, if ``right`` (n,) was counted.

    Wilson 1927: it stays within 0 and 1, and has a width at 0 of n and at n of n.
    """
    n, share, z = len(right), right.double().mean().item(), 1.96
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    spread = z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5 / (1 + z**2 / n)
    return middle - spread, middle + spread


def share(right: Tensor) -> str:
    """The share of ``right`` (n,) in per cent, with its interval: " 91 % (85–95)"."""
    low, high = (round(100 * abs(end)) for end in interval(right))
    return f"{100 * right.double().mean():3.0f} % ({low}–{high})"
