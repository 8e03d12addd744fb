"""At which noise levels does the garment's name matter? The loss with a wrong one.

    python benchmarks/garment_levels.py [--model tiny] [--data FOLDER] [-n 192]

Test scenes are noised to each level and shown to the transformer with their captions,
then with captions that name other garments. Printed: by how much the loss rises.
"""

import argparse

import torch
from torch import Tensor

import minidiff
from minidiff.data import rng
from minidiff.data.fashion_mnist import CLASSES
from minidiff.data.garments import Scenes, scene_captions
from minidiff.flow_matching import interpolate, velocity_target
from minidiff.judging.judge import EVALUATION_SEED

LEVELS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
BATCH = 32


def other_garments(garments: Tensor) -> Tensor:
    """A class in place of each (N, 2) that is another; −1, none, stays."""
    drawn = rng.uniform(0, torch.arange(len(garments)), 2) * (len(CLASSES) - 1)
    return torch.where(garments < 0, -1, (garments + 1 + drawn.long()) % len(CLASSES))


@torch.no_grad()
def losses(pipe: minidiff.Pipeline, x0: Tensor, texts: list[str]) -> Tensor:
    """Mean squared error of the velocity at each level (LEVELS,)."""
    context, pooled = pipe.encode_prompt(texts)
    noise, found = rng.normal(1, torch.arange(len(x0)), x0.shape[1:]), []
    for level in torch.tensor(LEVELS):
        x, target = interpolate(x0, noise, level), velocity_target(x0, noise)
        parts = (t.split(BATCH) for t in (x, context, pooled, target))
        errors = [
            (pipe.transformer(a, level.expand(len(a)), c, p) - t).square().mean()
            for a, c, p, t in zip(*parts, strict=True)
        ]
        found.append(torch.stack(errors).mean())
    return torch.stack(found)


@torch.no_grad()
def main() -> None:
    """Print a table for scenes with one garment and with two."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", help="folder of Fashion-MNIST's parquet files")
    parser.add_argument("-n", type=int, default=192, help=f"scenes, times {BATCH}")
    args = parser.parse_args()
    pipe = minidiff.load(args.model, fast=True)
    print("| sigma | " + " | ".join(map(str, LEVELS)) + " |")
    print("|---" * (len(LEVELS) + 1) + "|")
    for count, name in enumerate(("one garment", "two garments")):
        scenes = Scenes("test", args.data, "cpu", EVALUATION_SEED, float(count))
        batch = scenes.batch(torch.arange(args.n))
        x0 = pipe.vae.scale(pipe.vae.encode(batch.images).mode())
        is_said, plain = batch.attributes, torch.zeros(args.n, dtype=torch.long)
        wrong = is_said._replace(garments=other_garments(is_said.garments))
        right, other = (scene_captions(said, plain) for said in (is_said, wrong))
        rise = losses(pipe, x0, other) - losses(pipe, x0, right)
        print(f"| {name} | " + " | ".join(f"{x:.4f}" for x in rise.tolist()) + " |")


if __name__ == "__main__":
    main()
