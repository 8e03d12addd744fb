"""Do drawings keep to sketches, and still show what the words ask for?

    python benchmarks/sketches.py MODEL NET [-n 300] [--steps N] [--data DIR]
                                  [--sheet PNG]

A sketch is the edges of a test scene. Words that are its own describe that scene; other
words ask for the same things at the same places, in other colours on another ground.
Printed for both, without the net and at several strengths: the agreement of the edges
(with one pixel of reach), the agreement with another scene's sketch, and the share of
pictures that the judge finds right. The sheet shows the first ten of other words.
"""

import argparse
from pathlib import Path

import torch
from few_steps import BATCH, SHOWN, save_rows
from torch import Tensor

import minidiff
from minidiff.control import Control, canny, load_control
from minidiff.data.language import Meaning, captions
from minidiff.data.rng import fold_in, uniform
from minidiff.data.scenes import World, draw_attributes
from minidiff.judging.edges import agreement
from minidiff.judging.judge import EVALUATION_SEED, load_judge
from minidiff.judging.metrics import Comparison, generate

STRENGTHS = (0.0, 0.5, 1.0, 1.5)
COLUMNS = "words", "strength", "agreement", "with another", "right in %", "of base"
CHANGED = (*range(5, 9), *range(19, 31))  # the numbers that choose colours and grounds
Asked = tuple[list[str], list[Meaning]]


def ask(n: int, seed: int) -> tuple[Tensor, Asked, Asked]:
    """The numbers (n,) of scenes, their own words, and other words."""
    numbers = torch.arange(2 * n)
    u = uniform(seed, numbers, 33)
    own, changed = draw_attributes(u), u.clone()
    changed[:, CHANGED] = uniform(fold_in(seed, 3), numbers, 33)[:, CHANGED]
    other = draw_attributes(changed)
    alike = (own.kinds == other.kinds).all(1).nonzero()[:n, 0]
    both = (captions(a, fold_in(seed, 1), numbers) for a in (own, other))
    some = [tuple([x[i] for i in alike] for x in pair) for pair in both]
    return alike, *some


def drawings(
    compared: Comparison, texts: list[str], sketches: Tensor, **control: object
) -> Tensor:
    """Pictures (N, 3, H, W) in [−1, 1], each by its own sketch."""
    parts = []
    for i in torch.arange(len(texts)).split(BATCH):
        how = compared.options
        if control["strength"]:
            how = how | {"control": Control(sketches[i], **control)}
        words = texts[i[0] : i[-1] + 1]
        parts.append(generate(compared.pipe, words, i, compared.seed, **how))
    return torch.cat(parts)


def main() -> None:
    """Draw, measure, print line by line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("net")
    parser.add_argument("-n", type=int, default=300, help="sketches")
    parser.add_argument("--steps", type=int, help="of a drawing")
    parser.add_argument("--data", help="folder of Fashion-MNIST's parquet files")
    parser.add_argument("--sheet", type=Path)
    given, seed = parser.parse_args(), EVALUATION_SEED
    numbers, *asked = ask(given.n, seed)
    scenes = World("test", given.data, "cpu", seed)
    real = torch.cat([scenes.batch(i).images for i in numbers.split(128)])
    sketches, net = canny((real + 1) / 2), load_control(given.net)
    pipe = minidiff.load(given.model)
    pipe.progress = False
    steps, scale = pipe.defaults
    how = {"num_inference_steps": given.steps or steps, "guidance_scale": scale}
    compared = Comparison(pipe, load_judge(), given.n, seed, given.data, BATCH, **how)
    print(f"| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|")
    rows = {"sketch": 1 - 2 * sketches[:SHOWN].expand(-1, 3, -1, -1)}
    for words, (texts, meanings) in zip(("own", "other"), asked, strict=True):
        base = 0.0
        for strength in STRENGTHS:
            drawn = drawings(compared, texts, sketches, net=net, strength=strength)
            met = [
                agreement((drawn + 1) / 2, s).mean().item()
                for s in (sketches, sketches.roll(1, 0))
            ]
            right = sum(a["all"] for a in compared.answers(drawn, meanings)) / given.n
            base = base or right
            cells = words, strength, *(f"{m:.2f}" for m in met)
            cells += f"{100 * right:.1f}", f"{right / base:.2f}"
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            rows[f"strength {strength:g}"] = drawn[:SHOWN]
    if given.sheet:
        save_rows(rows, texts, given.sheet)


if __name__ == "__main__":
    main()
