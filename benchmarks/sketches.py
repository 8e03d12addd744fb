"""Do drawings keep to sketches, and still show what the words ask for?

    python benchmarks/sketches.py MODEL NET [-n 150] [--strengths 0 1 2] [--data DIR]
                                  [--sheet SVG]

A sketch is the edges of a test scene. The first words are the scene's own, as
`minidiff evaluate` asks for all scenes. The other scenes show one item that is not in
the middle; their words name another ground, and another colour where they name one, and
say where the item is or do not. Printed for each, at each strength (0 is without the
net): the agreement of the edges (with one pixel of reach), the agreement with another
scene's sketch, and the share of pictures that the judge finds right. The sheet shows
the first six of the last words.
"""

import argparse
from pathlib import Path

import torch
from few_steps import BATCH, save_rows
from torch import Tensor

import minidiff
from minidiff.control import Control, ControlNet, canny, load_control
from minidiff.data.language import RANDOM, Dice, Meaning, say, shown
from minidiff.data.rng import fold_in, uniform
from minidiff.data.samples import ONE
from minidiff.data.scenes import MIDDLE, SHARES, World, draw_attributes
from minidiff.judging.edges import agreement
from minidiff.judging.judge import EVALUATION_SEED, load_judge
from minidiff.judging.metrics import ROWS, Comparison, generate, row_prompts

COLUMNS = "words", "strength", "agreement", "with another", "right in %", "of base"
CHANGED = (*range(5, 9), *range(19, 31))  # the numbers that choose colours and grounds
Asked = tuple[list[str], list[Meaning]]


def off_the_middle(n: int, seed: int) -> Tensor:
    """Numbers (n,) of scenes of one item that is not in the middle."""
    numbers = torch.arange(8 * n)
    place = draw_attributes(uniform(seed, numbers, 33), layouts=ONE).place
    return numbers[place != MIDDLE][:n]


def other_words(numbers: Tensor, seed: int, where: bool) -> Asked:
    """What such scenes would be called in other colours; without ``where`` not where
    the item is."""
    u = uniform(seed, numbers, 33)
    u[:, CHANGED] = uniform(fold_in(seed, 3), numbers, 33)[:, CHANGED]
    asked = shown(draw_attributes(u, layouts=ONE))
    if not where:
        asked = [meaning._replace(place="") for meaning in asked]
    dice = uniform(fold_in(seed, 1), numbers, RANDOM).tolist()
    return [say(m, Dice(d)) for m, d in zip(asked, dice, strict=True)], asked


def drawings(
    compared: Comparison, texts: list[str], sketches: Tensor, **control: object
) -> Tensor:
    """Pictures (N, 3, H, W) in [−1, 1], each by its own sketch."""
    parts = []
    for i in torch.arange(len(texts)).split(BATCH):
        steered = {"control": Control(sketches[i], **control)}
        how = steered if control["strength"] else {}
        words = texts[i[0] : i[-1] + 1]
        parts.append(generate(compared.pipe, words, i, compared.seed, **how))
    return torch.cat(parts)


def table(
    name: str, asked: tuple, compared: Comparison, net: ControlNet, strengths: list
) -> dict[str, Tensor]:
    """Print a line for each strength; the pictures of a sheet's rows."""
    layouts, numbers, (texts, meanings) = asked
    scenes = World("test", compared.folder, "cpu", compared.seed, layouts=layouts)
    real = torch.cat([scenes.batch(i).images for i in numbers.split(128)])
    sketches, base = canny((real + 1) / 2), 0.0
    rows = {"sketch": 2 * sketches.expand(-1, 3, -1, -1) - 1}
    for strength in strengths:
        drawn = drawings(compared, texts, sketches, net=net, strength=strength)
        pairs = (agreement((drawn + 1) / 2, s) for s in (sketches, sketches.roll(1, 0)))
        right = sum(found["all"] for found in compared.answers(drawn, meanings))
        base = base or right
        cells = name, f"{strength:g}", *(f"{met.mean():.2f}" for met in pairs)
        cells += f"{100 * right / len(texts):.1f}", f"{right / base:.2f}"
        print(f"| {' | '.join(cells)} |", flush=True)
        rows[f"strength {strength:g}"] = drawn
    return rows


def main() -> None:
    """Draw, measure, print line by line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("net")
    parser.add_argument("-n", type=int, default=150, help="sketches of each kind")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", help="folder of Fashion-MNIST's parquet files")
    parser.add_argument("--sheet", type=Path)
    given, seed = parser.parse_args(), EVALUATION_SEED
    net, pipe = load_control(given.net), minidiff.load(given.model)
    pipe.progress = False
    compared = Comparison(pipe, load_judge(), given.n, seed, given.data, BATCH)
    print(f"| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|")
    *own, first = row_prompts(ROWS["all scenes"], given.n, seed, given.data)
    off = off_the_middle(given.n, seed)
    asked = {
        "its own": (SHARES, first, own),
        "other, and where": (ONE, off, other_words(off, seed, where=True)),
        "other, not where": (ONE, off, other_words(off, seed, where=False)),
    }
    for name, each in asked.items():
        rows = table(name, each, compared, net, given.strengths)
    if given.sheet:
        save_rows(rows, each[2][0], given.sheet)


if __name__ == "__main__":
    main()
