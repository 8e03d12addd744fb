"""A sheet of a hundred prompts that a person might type, and what the judge says.

    python benchmarks/draw_prompts.py MODEL SHEET.png [--judge FOLDER] [--seed 0]

Each picture stands above its prompt; one that the judge finds wrong has a red frame.
"""

import argparse
import textwrap
from pathlib import Path

import torch
from matplotlib import pyplot as plt

import minidiff
from minidiff.files.disk import replacing
from minidiff.judging.free_prompts import read_free_prompts
from minidiff.judging.judge import EVALUATION_SEED, JUDGE, load_judge
from minidiff.judging.metrics import Comparison

PROMPTS = Path(__file__).with_name("prompts.jsonl")
COLUMNS = 10


def draw_sheet(
    pictures: torch.Tensor, texts: list[str], right: list[bool], file: Path
) -> None:
    """Write pictures (N, 3, H, W) in [0, 1], framed where they are wrong."""
    rows = -(-len(texts) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(1.5 * COLUMNS, 1.8 * rows))
    for ax, picture, text, fine in zip(axes.flat, pictures, texts, right, strict=False):
        ax.imshow(picture.permute(1, 2, 0).numpy())
        ax.set(xticks=[], yticks=[])
        ax.set_xlabel(textwrap.fill(text, 24), fontsize=7)
        for spine in ax.spines.values():
            spine.set(color="none" if fine else "red", linewidth=3)
    figure.tight_layout()
    with replacing(file) as part:
        figure.savefig(part, format=file.suffix[1:] or "png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("sheet", type=Path)
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument("--seed", type=int, default=EVALUATION_SEED)
    given = parser.parse_args()
    asked = read_free_prompts(PROMPTS)
    texts, meanings = [text for text, _ in asked], [meaning for _, meaning in asked]
    pipe, judge = minidiff.load(given.model), load_judge(given.judge)
    measured = Comparison(pipe, judge, len(texts), given.seed)
    pictures = measured.draw(texts)
    right = [found["all"] for found in measured.answers(pictures, meanings)]
    draw_sheet((pictures.clamp(-1, 1) + 1) / 2, texts, right, given.sheet)
    print(f"{sum(right)} of {len(right)} right: {given.sheet}")


if __name__ == "__main__":
    main()
