"""Distillation into few steps: what the stage ``turbo`` and ``--from`` share."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidiff.data import rng
from minidiff.distillation import (
    JumpScheduler,
    euler_step,
    flow_map_loss,
    follow,
    jump,
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
from minidiff.flow_matching import (
    Scheduler,
    Velocity,
    euler,
    guide,
    interpolate,
    shift_sigma,
)
from minidiff.learning import parallel
from minidiff.lora import LowRank
from minidiff.recipes.features import Features, FlowBatches
from minidiff.training import Batch, TrainingConfig
from minidiff.vae import VAE

JUMPS = 8  # of the smallest size in a drawing
SIZES = 4  # of jumps: an eighth, a quarter, a half, all
STEPS = (4, 2, 1)  # in which validation draws


@dataclass(frozen=True)
class JumpBatches(FlowBatches):
    """Batches of jumps: sample i has the size 2^(i mod 4) / 8, at any place of it."""

    def levels(self, indices: Tensor) -> Batch:
        """The samples' noise (B, C, h, w), and place and size of their jumps (B,)."""
        shape = tuple(self.features.latents.shape[1:])
        noise = rng.normal(self.noise_seed, indices, shape)
        count = JUMPS >> indices % SIZES
        u = rng.uniform(self.noise_seed + 1, indices, 1)[:, 0]
        return {
            "noise": noise,
            "place": ((u * count).floor() + 1) / count,
            "size": 1 / count,
        }


@dataclass(frozen=True)
class Distillation:
    """Who teaches whom, how strongly guided, and on which schedule.

    ``empty``: context (L, D) and pooled vector (P,) of the empty prompt. Within
    ``as_teacher()`` the ``teacher`` answers as it was: with LoRA it is the student too.
    """

    teacher: MMDiT
    empty: tuple[Tensor, Tensor]
    scale: float
    shift: float
    as_teacher: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)

    def guided(self, context: Tensor, pooled: Tensor) -> Velocity:
        """The teacher's velocity, with the prompts and without in one batch."""
        pairs = zip(self.empty, (context, pooled), strict=True)
        both = [torch.cat([x.to(y).expand_as(y), y]) for x, y in pairs]

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            time = sigma.expand(len(x)).repeat(2)  # (B,) → (2·B,)
            with self.as_teacher():
                v = self.teacher(x.repeat(2, 1, 1, 1), time, *both)
            v_neg, v_pos = v.float().chunk(2)  # 2 × (B, …)
            return guide(v_neg, v_pos, self.scale)

        return velocity

    def loss(self, student: MMDiT, batch: Batch) -> Tensor:
        """Each jump against two half ones; half of the smallest is the teacher's.

        The smallest, which alone tie the student to its teacher, weigh as much as all
        others together.

        ``batch``: x0, noise (B, C, h, w), place, size (B,) as ``JumpBatches`` orders
        them, context (B, L, D), pooled (B, P).
        """
        rows = {k: x.unflatten(0, (-1, SIZES)) for k, x in batch.items()}
        small = {k: x[:, 0] for k, x in rows.items()}
        large = {k: x[:, 1:].flatten(0, 1) for k, x in rows.items()}
        text = small["context"], small["pooled"]
        step = partial(euler_step, self.guided(*text), shift=self.shift)
        half = partial(jump, asked(student, large), shift=self.shift)
        return (self.part(student, small, step) + self.part(student, large, half)) / 2

    def part(self, student: MMDiT, batch: Batch, half: Any) -> Tensor:
        """The loss of jumps whose halves are all gone alike."""
        place, size = batch["place"], batch["size"]
        x = interpolate(batch["x0"], batch["noise"], shift_sigma(place, self.shift))
        velocity = asked(student, batch)
        return flow_map_loss(velocity, half, x, place, size, self.shift)


def asked(student: MMDiT, batch: Batch) -> Velocity:
    """The student's velocity for the texts of ``batch``."""
    text = batch["context"], batch["pooled"]
    return lambda x, time: student(x, time, *text).float()


@contextmanager
def without(updates: dict[str, LowRank]) -> Iterator[None]:
    """Let corrections rest: the layers answer as they did before any was learned."""
    scales = {name: update.scale for name, update in updates.items()}
    try:
        for update in updates.values():
            update.scale = 0.0
        yield
    finally:
        for name, update in updates.items():
            update.scale = scales[name]


@dataclass(frozen=True)
class Comparison:
    """What student and teacher draw from the same noise, for held-out captions."""

    distillation: Distillation
    held: Features
    vae: VAE
    seed: int
    device: torch.device | str

    @property
    def text(self) -> tuple[Tensor, Tensor]:
        """Context and pooled vectors of the captions."""
        row = self.held.place[:32]
        both = self.held.context[row], self.held.pooled[row]
        return both[0].to(self.device).float(), both[1].to(self.device).float()

    @property
    def noise(self) -> Tensor:
        """Noise (N, C, h, w), the same each time."""
        shape, n = tuple(self.held.latents.shape[1:]), len(self.held.place[:32])
        return rng.normal(self.seed, torch.arange(n, device=self.device), shape)

    @cached_property
    def wanted(self) -> Tensor:
        """What the teacher draws in 28 guided steps: latents."""
        sigmas = Scheduler(self.distillation.shift).sigmas(28).to(self.device)
        return euler(self.distillation.guided(*self.text), self.noise, sigmas)

    @torch.no_grad()
    def look(self, student: MMDiT, file: Path) -> dict[str, Any]:
        """How far the student's latents are from the teacher's, relative, by steps.

        Both are drawn into ``file``: the teacher's above, then 4, 2 and 1 steps.
        """
        context, pooled = self.text
        velocity = asked(student, {"context": context, "pooled": pooled})
        shift = self.distillation.shift
        drawn = {n: follow(velocity, self.noise, n, shift) for n in STEPS}
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
    save_scheduler(JumpScheduler(shift, jumps=JUMPS), folder / "scheduler")
    index = pipeline_index((*MODELS, *TOKENIZERS)) | {"_base": base}
    write_json(folder / INDEX, index)
