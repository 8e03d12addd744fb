"""Distillation into few steps: what the stage ``turbo`` and ``--from`` share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidiff.data import rng
from minidiff.distillation import (
    PLACES,
    JumpScheduler,
    flow_map_loss,
    follow,
    paths,
)
from minidiff.dit import MMDiT
from minidiff.files.disk import write_json
from minidiff.files.layout import (
    INDEX,
    MODELS,
    TOKENIZERS,
    pipeline_index,
    save_scheduler,
)
from minidiff.files.pictures import save_sheet
from minidiff.files.weights import save_component
from minidiff.flow_matching import Scheduler, Velocity, euler, guide
from minidiff.learning import parallel
from minidiff.learning.run import cached, fingerprint
from minidiff.recipes.features import Features
from minidiff.training import Batch, TrainingConfig
from minidiff.vae import VAE

SIZES = 4  # of jumps: an eighth, a quarter, a half, all
STEPS = (4, 2, 1)  # in which validation draws
USES = 12  # samples that learn from one drawing


@dataclass(frozen=True)
class Teacher:
    """Who teaches, how strongly guided, and on which schedule.

    ``empty``: context (L, D) and pooled vector (P,) of the empty prompt. ``weights``: a
    fingerprint of them.
    """

    transformer: Callable[..., Tensor]
    empty: tuple[Tensor, Tensor]
    scale: float
    shift: float
    weights: str

    def guided(self, context: Tensor, pooled: Tensor) -> Velocity:
        """The velocity for texts (B, L, D), (B, P), with and without in one batch."""
        pairs = zip(self.empty, (context, pooled), strict=True)
        both = [torch.cat([x.to(y).expand_as(y), y]) for x, y in pairs]

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            time = sigma.expand(len(x)).repeat(2)  # () or (B,) → (2·B,)
            v = self.transformer(x.repeat(2, 1, 1, 1), time, *both)
            v_neg, v_pos = v.float().chunk(2)  # 2 × (B, …)
            return guide(v_neg, v_pos, self.scale)

        return velocity


def caption_row(features: Features, drawing: Tensor) -> Tensor:
    """Where in ``features`` the captions of drawings 0, 1, 2, … are.

    They follow the samples, each as often as it counts, again and again.
    """
    told = features.place[features.pool()]
    return told[drawing % len(told)]


def drawings(config: TrainingConfig) -> int:
    """How many of the teacher's a student learns from."""
    return -(-config.steps * config.batch_size // USES)


@torch.no_grad()
def draw_paths(
    teacher: Teacher,
    features: Features,
    config: TrainingConfig,
    seed: int,
    device: torch.device | str,
    cache: Path | None,
) -> Tensor:
    """The paths (n, 9, C, h, w) of the drawings that ``config`` needs, float16.

    ``cache``: a folder that keeps them, under a name for all that they depend on; of
    several processes each then draws a share.
    """
    n, shape = drawings(config), tuple(features.latents.shape[1:])
    how = teacher.weights, teacher.scale, teacher.shift, config.bfloat16, seed
    told = features.context, features.pooled, caption_row(features, torch.arange(n))
    name = fingerprint(*how, *told, config.batch_size)

    def draw(numbers: Tensor) -> Tensor:
        row = caption_row(features, numbers)
        text = (x[row].to(device).float() for x in (features.context, features.pooled))
        noise = rng.normal(seed, numbers.to(device), shape)
        with torch.autocast(noise.device.type, torch.bfloat16, config.bfloat16):
            return paths(teacher.guided(*text), noise, teacher.shift).half()

    def part(numbers: Tensor) -> Tensor:
        file = cache and cache / f"paths-{name}-{numbers[0]}.safetensors"
        make = lambda: {"paths": draw(numbers)}  # noqa: E731
        here = features.latents.device
        return cached(file, make, here, parallel.rank())["paths"]

    parts = torch.arange(n).split(config.batch_size)
    if cache:
        for numbers in parts[parallel.rank() :: parallel.size()]:
            part(numbers)
        parallel.wait()
    return torch.cat([part(numbers) for numbers in parts])


@dataclass(frozen=True)
class JumpBatches:
    """Batches of jumps along ``paths``, each a function of its samples' numbers alone.

    Sample i has the size 2^(i mod 4) / 8. ``order``: the samples' numbers → paths.
    """

    paths: Tensor
    features: Features
    order: Callable[[Tensor], Tensor]
    seed: int

    def __call__(self, indices: Tensor) -> Batch:
        f, numbers = self.features, indices.to(self.paths.device)
        count = PLACES >> numbers % SIZES
        u = rng.uniform(self.seed, numbers, 1)[:, 0]
        before = (u * count).floor().long()  # jumps of this size
        path = self.order(numbers)
        begin, end = (PLACES // count * k for k in (before, before + 1))
        row = caption_row(f, path)
        batch = {"x": self.paths[path, begin], "end": self.paths[path, end]}
        batch |= {"place": 1 - before / count, "size": 1 / count}
        batch |= {"context": f.context[row], "pooled": f.pooled[row]}
        return {name: x.to(indices.device).float() for name, x in batch.items()}


def jump_loss(student: MMDiT, batch: Batch, shift: float) -> Tensor:
    """The chapter's loss of a batch as ``JumpBatches`` makes it."""
    velocity = asked(student, batch["context"], batch["pooled"])
    way = batch["x"], batch["end"]
    return flow_map_loss(velocity, *way, batch["place"], batch["size"], shift)


def asked(student: MMDiT, context: Tensor, pooled: Tensor) -> Velocity:
    """The student's velocity for these texts."""
    return lambda x, time: student(x, time, context, pooled).float()


@dataclass(frozen=True)
class Comparison:
    """What a student draws, beside what its teacher drew from the same noise.

    ``text``: context (N, L, D) and pooled vectors (N, P) of captions; ``noise`` and
    ``wanted``, the teacher's latents in 28 guided steps, (N, C, h, w).
    """

    text: tuple[Tensor, Tensor]
    noise: Tensor
    wanted: Tensor
    vae: VAE
    shift: float

    @torch.no_grad()
    def look(self, student: MMDiT, file: Path) -> dict[str, Any]:
        """How far the student's latents are from the teacher's, relative, by steps.

        Both are drawn into ``file``: the teacher's above, then 4, 2 and 1 steps.
        """
        velocity = asked(student, *self.text)
        drawn = {n: follow(velocity, self.noise, n, self.shift) for n in STEPS}
        size = self.wanted.norm()
        found = {n: ((x - self.wanted).norm() / size).item() for n, x in drawn.items()}
        rows = torch.cat([x[:8] for x in (self.wanted, *drawn.values())])
        save_sheet(
            self.vae.decode(self.vae.unscale(rows)).clamp(-1, 1) / 2 + 0.5,
            len(self.wanted[:8]),
            file,
        )
        mean = sum(found.values()) / len(found)
        return {"validation": mean, **{f"steps_{n}": x for n, x in found.items()}}


@torch.no_grad()
def comparison(
    teacher: Teacher, held: Features, vae: VAE, seed: int, device: torch.device | str
) -> Comparison:
    """The teacher's drawings for 32 captions that are held out."""
    row = held.place[:32]
    context, pooled = (x[row].to(device).float() for x in (held.context, held.pooled))
    numbers = torch.arange(len(row), device=device)
    noise = rng.normal(seed, numbers, tuple(held.latents.shape[1:]))
    sigmas = Scheduler(teacher.shift).sigmas(28).to(device)
    wanted = euler(teacher.guided(context, pooled), noise, sigmas)
    return Comparison((context, pooled), noise, wanted, vae, teacher.shift)


def check_rows(config: TrainingConfig) -> None:
    """Raise ValueError for batches whose parts do not hold each size as often."""
    shares = config.accumulation * parallel.size()
    if config.batch_size % (SIZES * shares):
        found = f"a batch of {config.batch_size} samples in {shares} parts"
        raise ValueError(f"turbo has {found}; expected {SIZES} sizes of jumps in each")


def export_turbo(student: MMDiT, folder: Path, shift: float, base: str) -> None:
    """Write what makes a folder beside ``base`` a few-step model: float16 weights.

    All other parts it shares with ``base``.
    """
    if parallel.rank():
        return
    save_component(
        student, folder / "transformer", MODELS["transformer"], torch.float16
    )
    save_scheduler(JumpScheduler(shift), folder / "scheduler")
    index = pipeline_index((*MODELS, *TOKENIZERS)) | {"_base": base}
    write_json(folder / INDEX, index)
