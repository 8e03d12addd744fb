"""The stage of control: a ControlNet for OUTPUT/model, on the edges of its scenes."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff.control import (
    VALUES,
    ControlNet,
    begin_control,
    canny,
    control_loss,
    controls_of,
    save_control,
)
from minidiff.dit import MMDiT
from minidiff.files.pictures import save_sheet
from minidiff.flow_matching import Scheduler, euler, guide
from minidiff.judging.edges import agreement
from minidiff.learning import parallel
from minidiff.learning.run import cached
from minidiff.recipes.features import (
    Features,
    FlowBatches,
    encode_latents,
    place_in_pool,
)
from minidiff.recipes.job import Job, Lesson
from minidiff.recipes.transformer_stage import (
    NAME,
    AnyScenes,
    SceneEncoder,
    plain_attention,
)
from minidiff.recipes.vae_stage import chunk_size
from minidiff.training import Batch, Task
from minidiff.vae import VAE

DROP = 0.5  # how often the empty prompt takes the caption's place: the sketch must do
SHOWN = 16  # held-out scenes that a validation draws
MOST = 2**15  # scenes to learn from: the shipped recipe comes to each four times


def scene_edges(scenes: AnyScenes, n: int) -> Iterator[Tensor]:
    """The edges (B, 1, H, W) of the first ``n`` scenes, part by part."""
    device = scenes.device
    for part in torch.arange(n, device=device).split(chunk_size(device)):
        yield canny((scenes.batch(part).images + 1) / 2)


def encode_edges(vae: VAE, scenes: AnyScenes, n: int) -> Tensor:
    """Scaled latents (n, C, h, w) of the scenes' edges, float16."""
    half = torch.empty(0, dtype=torch.float16, device=scenes.device)
    edges = (VALUES["edges"](e).expand(-1, 3, -1, -1) for e in scene_edges(scenes, n))
    return encode_latents(vae, edges, n, half, autocast=True)


@dataclass(frozen=True)
class ControlBatches:
    """Batches of rectified flow with each sample's condition."""

    flow: FlowBatches
    conditions: Tensor  # (n, C, h, w)

    def __call__(self, indices: Tensor) -> Batch:
        place = self.flow.order(indices.to(self.conditions.device))
        condition = self.conditions[place].to(indices.device).float()
        return self.flow(indices) | {"condition": condition}


@dataclass(frozen=True)
class Held:
    """Scenes that are not learned from: what a validation looks at."""

    fixed: Batch
    features: Features
    edges: Tensor  # (n, 1, H, W)

    @torch.no_grad()
    def loss(self, transformer: MMDiT, net: ControlNet, levels: int = 8) -> float:
        """The mean loss at evenly spaced levels."""
        losses = []
        for i in range(levels):
            sigma = torch.full_like(self.fixed["x0"][:, 0, 0, 0], (i + 0.5) / levels)
            batch = self.fixed | {"sigma": sigma}
            losses.append(control_loss(transformer, net, batch).item())
        return sum(losses) / levels

    @torch.no_grad()
    def draw(
        self, transformer: MMDiT, net: ControlNet, vae: VAE, scale: float
    ) -> Tensor:
        """The first captions (B, 3, H, W) in [0, 1], in 28 steps, by their edges."""
        n = min(SHOWN, len(self.features))
        f, noise = self.features, self.fixed["noise"][:n]
        rows = torch.cat([torch.zeros_like(f.place[:n]), f.place[:n]])
        context, pooled = f.context[rows].float(), f.pooled[rows].float()
        condition = self.fixed["condition"][:n].repeat(2, 1, 1, 1)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            asked = torch.cat([x, x]), sigma.expand(2 * n)
            said = controls_of(net, transformer, *asked, pooled, condition)
            v = transformer(*asked, context, pooled, controls=said)
            empty, full = v.chunk(2)
            return guide(empty, full, scale)

        x = euler(velocity, noise, Scheduler(shift=1.0).sigmas(28).to(noise.device))
        return (vae.decode(vae.unscale(x)) / 2 + 0.5).clamp(0, 1)


def hold(job: Job, encoder: SceneEncoder) -> Held:
    """Test scenes, encoded."""
    scenes, n = job.scenes(split="test"), job.recipe.held
    features = encoder.features(scenes, n, keep=False)
    fixed = features.fixed(job.seed_for("validation"))
    fixed["condition"] = encode_edges(encoder.vae, scenes, n).float()
    edges = torch.cat(list(scene_edges(scenes, min(SHOWN, n))))
    return Held(fixed, features, edges)


def control_lesson(job: Job) -> Lesson:
    """A ControlNet of half as many blocks as the transformer has, OUTPUT/control."""
    encoder, recipe = SceneEncoder(job), job.recipe
    scenes, n = job.scenes(), min(recipe.latents, MOST)
    features = encoder.features(scenes, n, keep=True)
    path = job.cache and job.cache / f"edges-{encoder.file_name(scenes, n)}"
    make = lambda: {"edges": encode_edges(encoder.vae, scenes, n)}  # noqa: E731
    conditions = cached(path, make, job.device)["edges"]
    transformer: MMDiT = job.load_part(NAME).requires_grad_(False)
    held, folder = hold(job, encoder), job.output / "grids"

    def validate(net: ControlNet) -> dict[str, object]:
        drawn = held.draw(transformer, net, encoder.vae, recipe.guidance)
        met = agreement(drawn, held.edges).mean().item()
        if not parallel.rank():
            step = job.run.step if job.run else 0
            sketches = held.edges.expand(-1, 3, -1, -1)
            sheet = torch.cat([sketches, drawn])
            save_sheet(sheet, len(drawn), folder / f"control-{step:06}.png")
        return {"validation": held.loss(transformer, net), "agreement": met}

    def export(net: ControlNet) -> None:
        if not parallel.rank():
            save_control(net, job.output / "control", torch.float16)

    if job.device == "cpu" and recipe.control.bfloat16:
        plain_attention(transformer)
    net = begin_control(transformer)
    order = functools.partial(place_in_pool, n=n)
    seeds = job.seed_for("noise"), job.seed_for("dropout")
    flow = FlowBatches(features, order, *seeds, DROP, shift=recipe.shift)
    loss = functools.partial(control_loss, transformer)
    return Lesson(Task(net, loss, ControlBatches(flow, conditions), validate), export)
