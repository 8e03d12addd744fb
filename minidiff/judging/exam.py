"""A small exam that a chapter can afford: some prompts, and the judge's answers."""

from collections.abc import Callable

import torch
from torch import Tensor

from minidiff.data import garments, language, scenes
from minidiff.data.rng import fold_in, uniform
from minidiff.files.disk import read_json
from minidiff.judging.judge import EVALUATION_SEED, JUDGE, load_judge, score
from minidiff.judging.witness import find, follows, load_witness

Grade = Callable[[Tensor], dict[str, Tensor]]
NAMES = {"garments": "things", "layout": "places", "background": "ground"}
ONE, TWO = (1.0, 0.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0, 0.0)


def exam(n: int, two: bool = False) -> tuple[list[str], Grade]:
    """``n`` prompts, of two things each or of one, and who grades their pictures.

    The grade of pictures (n, 3, 64, 64) in [−1, 1] says by what is asked ("things",
    "colors", "places", "ground", "all") which of them, (n,), show it. The prompts are
    the same each time, and no training ever drew their scenes.
    """
    if read_json(JUDGE / "config.json").get("scenes") == "world":
        return world_exam(n, two)
    texts, wanted = garments.prompts(n, "two" if two else "one", seed=EVALUATION_SEED)
    judge = load_judge()

    def grade(images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            right = score(judge(images), wanted)
        return {NAMES.get(name, name): x for name, x in right.items()}

    return texts, grade


def world_exam(n: int, two: bool = False) -> tuple[list[str], Grade]:
    """The same for the world of garments and everyday things."""
    numbers = torch.arange(n)
    how = "", TWO if two else ONE, scenes.GARMENT_SHARE, scenes.shipped_things()
    drawn = scenes.draw_attributes(uniform(EVALUATION_SEED, numbers, 33), *how)
    texts, asked = language.captions(drawn, fold_in(EVALUATION_SEED, 1), numbers)
    judge = load_witness(JUDGE)

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
