"""A guided teacher and its few-step students, on the same prompts and the same noise.

    python benchmarks/few_steps.py TEACHER STUDENT... [-n 500] [--data DIR]
                                   [--sheet SVG]

Printed for each number of steps, the teacher's own first: the share of scenes that the
judge finds right, the Fréchet distance from training scenes in the judge's features
(the last line has that of real test scenes), the diversity as a share of the teacher's,
how far the pictures lie from the teacher's, as the root mean square over pixels whose
range is 1, the same for the first 64 prompts and what the teacher draws there from
another noise, and how sharp they are: the mean square of the grey picture's Laplacian.
The sheet shows the first six prompts.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import minidiff
from minidiff import viz
from minidiff.files.disk import write_text
from minidiff.judging.diversity import MOST, feature_spread, features_by_prompt
from minidiff.judging.judge import EVALUATION_SEED, load_judge
from minidiff.judging.metrics import ROWS, Comparison, row_prompts, row_scenes
from minidiff.sampling import Pipeline

ROW, BATCH, SHOWN = "all scenes", 20, 6
FEW = (8, 4, 2, 1)
MEASURES = "right in %", "Fréchet", "diversity", "distance", "another", "Laplacian"
COLUMNS = "model", "steps", "calls", *MEASURES


def runs(teacher: str, students: list[str]) -> Iterator[tuple[str, Pipeline, dict]]:
    """Who draws, and how; the teacher in its usual way first."""
    for name in (teacher, *students):
        pipe = minidiff.load(name)
        pipe.progress = False
        steps, scale = pipe.defaults
        for n in (steps, *FEW) if name == teacher else FEW:
            yield name, pipe, {"num_inference_steps": n, "guidance_scale": scale}


def save_rows(rows: dict[str, Tensor], texts: list[str], file: Path) -> None:
    """Write an SVG: a row for each name, of pictures (N, 3, H, W) in [−1, 1]."""
    shown = torch.cat([pictures[:SHOWN].clamp(-1, 1) for pictures in rows.values()])
    titles = [name if i == 0 else "" for name in rows for i in range(SHOWN)]
    write_text(file, viz.show_images(shown, titles, columns=SHOWN).svg())
    print("columns of the sheet:", ", ".join(f"“{text}”" for text in texts[:SHOWN]))


def measured(compared: Comparison, asked: tuple, real: Tensor) -> tuple[Tensor, list]:
    """Pictures of the prompts, and right answers, Fréchet distances and spread."""
    texts, meanings, _ = asked
    drawn = compared.draw(texts)
    right = sum(found["all"] for found in compared.answers(drawn, meanings))
    far = compared.distances({"model": drawn, "real": real})
    common = compared.judge.features, texts[:MOST], compared.seed, BATCH
    spread = features_by_prompt(compared.pipe, *common, **compared.options)
    return drawn, [right / len(texts), far, feature_spread(spread)]


def apart(drawn: Tensor, others: Tensor) -> str:
    """How far (N, 3, H, W) lie from as many ``others`` or fewer, all in [−1, 1]."""
    return f"{(drawn[: len(others)] - others).square().mean().sqrt().item() / 2:.3f}"


def sharpness(images: Tensor) -> str:
    """Mean square of the Laplacian of (N, 3, H, W) in [−1, 1], as grey of range 1."""
    kernel = images.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    grey = images.mean(1, keepdim=True) / 2
    return f"{F.conv2d(grey, kernel).square().mean().item():.4f}"


def main() -> None:
    """Draw, measure, print line by line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("teacher")
    parser.add_argument("student", nargs="+")
    parser.add_argument("-n", type=int, default=500, help="prompts")
    parser.add_argument("--data", help="folder of Fashion-MNIST's parquet files")
    parser.add_argument("--sheet", type=Path)
    given, judge, seed = parser.parse_args(), load_judge(), EVALUATION_SEED
    asked = texts, _, numbers = row_prompts(ROWS[ROW], given.n, seed, given.data)
    scenes = row_scenes(ROWS[ROW], "test", given.data, "cpu", seed)
    real = torch.cat([scenes.batch(i).images for i in numbers.split(128)])
    print(f"| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|")
    rows, usual, another = {}, 0.0, real
    for name, pipe, how in runs(given.teacher, given.student):
        known = judge, given.n, seed, given.data, BATCH
        drawn, found = measured(Comparison(pipe, *known, **how), asked, real)
        right, far, spread = found
        steps, scale = how.values()
        rows[f"{name}, {steps} step{'s' * (steps > 1)}"] = drawn
        if len(rows) == 1:
            usual = spread
            another = Comparison(pipe, judge, MOST, seed + 1, **how).draw(texts[:MOST])
        cells = name, steps, steps * (1 + (scale > 1)), f"{100 * right:.1f}"
        cells += far["model"], f"{spread / usual:.2f}"
        cells += apart(drawn, next(iter(rows.values()))), apart(drawn, another)
        cells += (sharpness(drawn),)
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    found = f"Fréchet {far['floor']}, Laplacian {sharpness(real)}"
    print(f"\n{given.n} prompts, seed {seed}; real test scenes: {found}.")
    if given.sheet:
        save_rows(rows, texts, given.sheet)


if __name__ == "__main__":
    main()
