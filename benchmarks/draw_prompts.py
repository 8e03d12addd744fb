"""A sheet of a hundred prompts that a person might type, and what the judge says.

    python benchmarks/draw_prompts.py MODEL SHEET.svg [--judge FOLDER] [--seed 0]

A cross stands before the prompt of a picture that the judge finds wrong.
"""

import argparse
from pathlib import Path

import minidiff
from minidiff import viz
from minidiff.files.disk import write_text
from minidiff.judging.free_prompts import read_free_prompts
from minidiff.judging.judge import EVALUATION_SEED, JUDGE, load_judge
from minidiff.judging.metrics import Comparison

PROMPTS = Path(__file__).with_name("prompts.jsonl")
COLUMNS = 7


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
    titles = [
        text if fine else f"✗ {text}" for text, fine in zip(texts, right, strict=True)
    ]
    sheet = viz.show_images(pictures.clamp(-1, 1), titles, COLUMNS)
    write_text(given.sheet, sheet.svg())
    print(f"{sum(right)} of {len(right)} right: {given.sheet}")


if __name__ == "__main__":
    main()
