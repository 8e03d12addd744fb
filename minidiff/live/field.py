"""Trains the small network of the plane: ``python -m minidiff.live.field``.

It learns the two moons of chapter 6, under three prompts: upper, lower, none.
"""

import functools
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from minidiff.files.disk import write_text
from minidiff.flow_matching import flow_matching_loss

FILE = Path(__file__).with_name("field.js")
START = "minidiff.field = "
PROMPTS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])  # upper, lower, none
WAVES = torch.pi * torch.tensor([1.0, 2.0, 4.0, 8.0])


def two_moons(count: int) -> Tensor:
    """Two half circles of ``count`` points each (2, count, 2), upper and lower; over
    both every axis has mean 0 and deviation 1."""
    angle = torch.linspace(0, torch.pi, count)
    moon = torch.stack([angle.cos(), angle.sin()], dim=-1)
    both = torch.cat([moon, torch.tensor([1.0, 0.5]) - moon])
    return ((both - both.mean(0)) / both.std(0)).unflatten(0, (2, count))


class Field(nn.Module):
    """Velocity (N, 2) of points (N, 2) at levels (N,) for prompts (N, 2)."""

    def __init__(self, width: int = 64) -> None:
        inputs = 2 + 2 * len(WAVES) + PROMPTS.shape[1]
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)),
        )

    def forward(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        waves = sigma[:, None] * WAVES  # (N,) → (N, 4)
        return self.layers(torch.cat([x, waves.sin(), waves.cos(), prompt], dim=-1))


def train_field(steps: int = 4000, count: int = 256) -> Field:
    """A network that has learned the moons, every third point without its prompt."""
    torch.manual_seed(0)
    field, moons = Field(), two_moons(60)
    optimizer = torch.optim.Adam(field.parameters(), lr=3e-3)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        which, place = torch.randint(2, (count,)), torch.randint(60, (count,))
        prompt = PROMPTS[torch.where(torch.rand(count) < 1 / 3, 2, which)]
        told = functools.partial(field, prompt=prompt)
        given = moons[which, place], torch.randn(count, 2), torch.rand(count)
        loss = flow_matching_loss(told, *given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        slower.step()
    return field


def numbers(x: Tensor) -> list[float]:
    """Flat, with five decimals."""
    return [round(value, 5) for value in x.flatten().tolist()]


def save_field(field: Field, file: Path = FILE) -> None:
    """As a script: for each layer its weight (out, in) and its bias (out,)."""
    layers = [
        {name: numbers(p) for name, p in layer.named_parameters()}
        for layer in field.layers
        if isinstance(layer, nn.Linear)
    ]
    write_text(file, f"{START}{json.dumps(layers, separators=(',', ':'))};\n")


def load_field(file: Path = FILE) -> Field:
    """The network in the script."""
    layers = json.loads(file.read_text("utf-8")[len(START) : -2])
    field, values = Field(), [v for layer in layers for v in layer.values()]
    for parameter, numbers in zip(field.parameters(), values, strict=True):
        parameter.data = torch.tensor(numbers).view_as(parameter)
    return field


if __name__ == "__main__":
    save_field(train_field())
