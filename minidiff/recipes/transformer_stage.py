"""The stage of the transformer: rectified flow on what frozen models have encoded."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from minidiff.attention import Heads, JointAttention
from minidiff.data import rng
from minidiff.dit import MMDiT
from minidiff.files.layout import ENCODERS
from minidiff.files.pictures import save_sheet
from minidiff.flow_matching import Scheduler, euler, guide
from minidiff.learning import parallel
from minidiff.learning.run import cached, fingerprint
from minidiff.learning.steps import recompute
from minidiff.recipes.features import (
    Features,
    FlowBatches,
    collect,
    encode_latents,
    place_in_pool,
    validation,
)
from minidiff.recipes.job import AnyScenes, Job, Lesson, export_index, export_part
from minidiff.recipes.text_stages import token_tables
from minidiff.recipes.vae_stage import chunk_size
from minidiff.text_encoders import assemble
from minidiff.training import Task, transformer_loss
from minidiff.vae import VAE

NAME = "transformer"  # of the part


class PlainAttention(JointAttention):
    """Joint attention in two products with a softmax between.

    In bfloat16 on a CPU that is the fastest to go back through: PyTorch's fused form is
    slow there, and its own plain form (``SDPBackend.MATH``) multiplies in float32. The
    scale stands before the products, where inductor does not take them for the fused
    form.
    """

    def forward(self, context: Heads, image: Heads) -> tuple[Tensor, Tensor]:
        pairs = zip(context, image, strict=True)
        q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in pairs)
        weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1).to(v.dtype)
        out = (weights @ v).transpose(1, 2).flatten(2)
        length = context.q.shape[1]
        return out[:, :length].contiguous(), out[:, length:].contiguous()


def plain_attention(model: MMDiT) -> MMDiT:
    """The same transformer, faster to train on a CPU."""
    for block in model.joint_blocks:
        block.attention = PlainAttention()  # neither holds weights
    return model


class SceneEncoder:
    """The frozen models of a job, and what they make of its scenes.

    ``tables`` are the captions' ids (``token_tables``).
    """

    def __init__(self, job: Job) -> None:
        self.job, self.tables = job, token_tables(job)
        self.vae: VAE = job.load_part("vae")
        self.encoders = [job.load_part(name) for name in ENCODERS]

    def features(self, scenes: AnyScenes, n: int, keep: bool) -> Features:
        """Of n scenes; ``keep`` uses the job's cache, if it has one."""
        kept = self.job.cache if keep else None
        path = kept and kept / self.file_name(scenes, n)
        made = cached(path, lambda: self.encode(scenes, n).tensors(), self.job.device)
        return Features(**made)

    def file_name(self, scenes: AnyScenes, n: int) -> str:
        """The file of these models' encodings of n scenes."""
        parts = (self.vae, *self.encoders)
        weights = [x for part in parts for x in part.state_dict().values()]
        made_of = (*weights, *self.tables, *scenes.content, n)
        return f"{fingerprint(*made_of)}.safetensors"

    def encode(self, scenes: AnyScenes, n: int) -> Features:
        """Latents, places, contexts and pooled vectors, float16."""
        device, half = scenes.device, torch.empty(0, dtype=torch.float16)
        half = half.to(device)
        captions = torch.empty(n, dtype=torch.long, device=device)

        def pictures() -> Iterator[Tensor]:
            for part in torch.arange(n, device=device).split(chunk_size(device)):
                batch = scenes.batch(part)
                captions[part] = batch.caption_ids
                yield batch.images

        latents = encode_latents(self.vae, pictures(), n, half, autocast=True)
        # the empty prompt, the last row of the tables, is encoded too, as row 0 here
        empty = torch.tensor([len(self.tables[0]) - 1], device=device)
        unique, place = captions.unique(return_inverse=True)
        return Features(latents, place + 1, *self.read(torch.cat([empty, unique])))

    @torch.no_grad()
    def read(self, rows: Tensor, chunk: int = 4096) -> tuple[Tensor, ...]:
        """float16 contexts (N, 2·L, D), pooled vectors (N, P) of captions ``rows``."""

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            for some in rows.split(chunk):
                ids = [table[some].long() for table in self.tables]
                clip_l, clip_g, t5 = map(lambda f, x: f(x), self.encoders, ids)
                context = assemble(clip_l[0], clip_g[0], t5).half()
                yield context, torch.cat([clip_l[1], clip_g[1]], -1).half()

        return collect(len(rows), parts())


@torch.no_grad()
def conditioning(model: MMDiT, pooled: Tensor) -> float:
    """Root mean square of SiLU(c) in the middle of the levels, for pooled texts (B, P).

    All that blocks know of the noise level and the pooled text: near zero it is dead,
    while the loss may fall on.
    """
    half = torch.full((len(pooled),), 0.5, device=pooled.device)
    return F.silu(model.conditioning(half, pooled)).square().mean().sqrt().item()


def transformer_lesson(job: Job) -> Lesson:
    """The MMDiT, by rectified flow on latents and captions that are encoded once."""
    recipe, encoder = job.recipe, SceneEncoder(job)
    features = encoder.features(job.scenes(), recipe.latents, keep=True)
    held = encoder.features(job.scenes(split="test"), recipe.held, keep=False)
    fixed = held.fixed(job.seed_for("validation"))
    batch = flow_batches(job, features, encoder)
    draw = functools.partial(save_grid, held=held, vae=encoder.vae)
    grids = job.output / "grids"

    def validate(model: MMDiT) -> dict:
        found = validation(model, fixed, job.device, len(held))
        found["conditioning"] = conditioning(model, fixed["pooled"].to(job.device))
        step = job.run.step if job.run else 0
        draw(model, file=grids / f"{step:06}.png")
        if recipe.told:  # what each stretch of the run bought can be measured later
            export_part(replace(job, output=job.output / f"at/{step}"), model, NAME)
        return found

    def export(model: MMDiT) -> None:
        export_part(job, model, NAME)
        export_index(job)
        draw(model, file=job.output / "grid.png")

    return Lesson(
        Task(begin_transformer(job), transformer_loss, batch, validate), export
    )


def flow_batches(job: Job, features: Features, encoder: SceneEncoder) -> FlowBatches:
    """The transformer's batches, as the recipe and the job's seed say."""
    clip_l, clip_g, _ = encoder.encoders
    return FlowBatches(
        features,
        functools.partial(place_in_pool, n=len(features)),
        noise_seed=job.seed_for("noise"),
        drop_seed=job.seed_for("dropout"),
        drop_encoder=0.05,
        widths=(clip_l.config.hidden_size, clip_g.config.hidden_size),
        shift=job.recipe.shift,
    )


def begin_transformer(job: Job) -> MMDiT:
    """The MMDiT that learns, in the form that is the fastest here."""
    model = job.begin_part(NAME)
    if job.device == "cpu" and job.recipe.transformer.bfloat16:
        plain_attention(model)
    if job.recompute:
        recompute(model.joint_blocks)
    return model


@torch.no_grad()
def save_grid(
    model: MMDiT, held: Features, vae: VAE, file: Path, scale: float = 4.0
) -> None:
    """Thirty-two held-out captions drawn in 28 steps, as one picture."""
    if parallel.rank():
        return
    columns = min(8, len(held))
    n = min(32, len(held) // columns * columns)
    device = held.latents.device
    row = torch.cat([held.place[:n], torch.zeros(n, dtype=torch.long, device=device)])
    context, pooled = held.context[row].float(), held.pooled[row].float()
    noise = rng.normal(0, torch.arange(n, device=device), held.latents.shape[1:])

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        v = model(torch.cat([x, x]), sigma.expand(2 * n), context, pooled)
        positive, negative = v.chunk(2)
        return guide(negative, positive, scale)

    x = euler(velocity, noise, Scheduler(shift=1.0).sigmas(28).to(device))
    images = vae.decode(vae.unscale(x)).clamp(-1, 1)
    save_sheet((images + 1) / 2, columns, file)
