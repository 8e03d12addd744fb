# %% [markdown]
r"""
# Training: from data to weights
"""

# %%
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.dit import MMDiT
from minidiff.flow_matching import interpolate, velocity_target
from minidiff.support import parallel
from minidiff.support.trainer import (
    Monitor,
    Run,
    check_batch,
    checkpoint,
    compiled,
    restore,
)
from minidiff.text_encoders import CLIPTextEncoder, T5Encoder
from minidiff.vae import VAE

Batch = dict[str, Tensor]


def precise(x: Tensor) -> Tensor:
    """``x`` in float32 at least: losses are not computed in bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# %% [markdown]
# ## The autoencoder's loss


# %%
def gradient_difference(a: Tensor, b: Tensor) -> Tensor:
    """Mean difference of neighbouring-pixel steps of two pictures (B, C, H, W).

    Mathieu et al. 2016, equation 6, with exponent 1: it asks for the same edges.
    """
    d = a - b
    return (d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()) / 2


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, e^logvar) ‖ N(0, 1)) per number; Kingma & Welling 2014, appendix B."""
    return (mean.square() + logvar.exp() - 1 - logvar).mean() / 2


def vae_loss(vae: VAE, batch: Batch, kl_weight: float = 5e-4) -> Tensor:
    """L1, L2 and edges of the reconstruction, and a small pull towards N(0, 1).

    ``batch``: images (B, 3, H, W) in [−1, 1], noise (B, C, h, w).
    """
    posterior = vae.encode(batch["images"])
    mean, logvar = precise(posterior.mean), precise(posterior.logvar)
    z = mean + torch.exp(0.5 * logvar) * batch["noise"]
    error = precise(vae.decode(z)) - batch["images"]
    edges = gradient_difference(error, torch.zeros_like(error))
    reconstruction = error.abs().mean() + 2 * error.square().mean() + 0.5 * edges
    return reconstruction + kl_weight * kl_divergence(mean, logvar)


# %% [markdown]
# ## CLIP's loss


# %%
class ImageTower(nn.Module):
    """A small convolutional network: pictures (B, 3, 64, 64) → features (B, F)."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 128)) -> None:
        super().__init__()
        layers, inputs = [], 3
        for width in widths:
            layers += [nn.Conv2d(inputs, width, 3, stride=2, padding=1)]
            layers += [nn.GroupNorm(8, width), nn.SiLU()]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.features = widths[-1] * (64 // 2 ** len(widths)) ** 2

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)  # (B, 3, 64, 64) → (B, 128, 4, 4) → (B, F)


class CLIPTraining(nn.Module):
    """Both text encoders with the picture tower that they share while they learn."""

    def __init__(self, clip_l: CLIPTextEncoder, clip_g: CLIPTextEncoder) -> None:
        super().__init__()
        self.text = nn.ModuleList([clip_l, clip_g])
        self.tower = ImageTower()
        widths = [encoder.config.projection_dim for encoder in self.text]
        self.heads = nn.ModuleList(nn.Linear(self.tower.features, w) for w in widths)
        self.log_scale = nn.Parameter(torch.full((2,), math.log(1 / 0.07)))


def contrastive_loss(
    text: Tensor, image: Tensor, scale: Tensor, meaning: Tensor
) -> Tensor:
    """Which caption belongs to which picture; Radford et al. 2021, figure 3.

    ``text``, ``image`` (B, P); captions of one ``meaning`` (B,) say the same, so that
    each picture has all of them as its positives, in equal parts. On many devices a
    row is compared with the rows of all of them, N.
    """
    text, image = (F.normalize(precise(x), dim=-1) for x in (text, image))
    same = (meaning[:, None] == parallel.gather(meaning)).to(text.dtype)  # → (B, N)
    target = same / same.sum(1, keepdim=True)
    to_image = F.cross_entropy(scale * text @ parallel.gather(image).mT, target)
    to_text = F.cross_entropy(scale * image @ parallel.gather(text).mT, target)
    return (to_image + to_text) / 2


def clip_loss(model: CLIPTraining, batch: Batch) -> Tensor:
    """Sum of both encoders' losses.

    ``batch``: images, ids_l and ids_g (B, L), meaning (B,).
    """
    features = model.tower(batch["images"])
    scales, loss = model.log_scale.exp().clamp(max=100), 0.0
    ids = batch["ids_l"], batch["ids_g"]
    for i, encoder, head, scale in zip(
        ids, model.text, model.heads, scales, strict=True
    ):
        pooled = encoder(i)[1]
        loss += contrastive_loss(pooled, head(features), scale, batch["meaning"])
    return loss


# %% [markdown]
# ## T5's loss


# %%
def compact(values: Tensor, keep: Tensor, pad: int, length: int) -> Tensor:
    """Move the kept ``values`` (B, N) of each row to its front: (B, length)."""
    order = (~keep).byte().argsort(dim=1, stable=True)
    return values.masked_fill(~keep, pad).gather(1, order)[:, :length]


def choose_spans(u: Tensor, ids: Tensor, pad: int, longest: int = 3) -> Tensor:
    """A mask (B, L) of two random spans of 1 to ``longest`` tokens, from u (B, 4)."""
    n = (ids != pad).sum(1, keepdim=True) - 1  # the end token is never hidden
    start = (u[:, :2] * n).long()  # (B, 2)
    end = start + 1 + (u[:, 2:] * longest).long()
    place = torch.arange(ids.shape[1], device=ids.device)[:, None]  # (L, 1)
    inside = (place >= start[:, None]) & (place < end[:, None])  # → (B, L, 2)
    return inside.any(-1) & (place[:, 0] < n)


def corrupt_spans(
    ids: Tensor, hidden: Tensor, sentinels: Tensor, pad: int, eos: int
) -> tuple[Tensor, Tensor]:
    """T5's span corruption: Raffel et al. 2020, section 3.1.4 and figure 2.

    Each run of ``hidden`` (B, L) tokens becomes one sentinel in the source (B, L); the
    target (B, L) lists every sentinel with the tokens that it stands for, then ``eos``.
    """
    first = hidden & ~F.pad(hidden, (1, 0))[:, :-1]  # (B, L): the start of each run
    names = sentinels[(first.cumsum(1) - 1).clamp(min=0)]
    source = compact(names.where(first, ids), first | ~hidden, pad, ids.shape[1])
    pairs = torch.stack([names, ids], 2).flatten(1)  # (B, L, 2) → (B, 2·L)
    keep = torch.stack([first, hidden], 2).flatten(1)
    end = torch.full_like(ids[:, :1], eos)
    pairs, keep = torch.cat([pairs, end], 1), F.pad(keep, (0, 1), value=True)
    return source, compact(pairs, keep, pad, ids.shape[1])


class T5Training(nn.Module):
    """T5's encoder with a small decoder that writes the answer while it learns."""

    def __init__(self, encoder: T5Encoder, layers: int = 2, length: int = 32) -> None:
        super().__init__()
        c = encoder.config
        self.encoder = encoder
        self.embed = nn.Embedding(c.vocab_size, c.d_model)
        self.positions = nn.Parameter(torch.randn(length, c.d_model) * 0.1)
        layer = nn.TransformerDecoderLayer(
            c.d_model,
            c.num_heads,
            2 * c.d_model,
            0.0,
            batch_first=True,
            norm_first=True,
        )
        self.decoder = nn.TransformerDecoder(layer, layers, nn.LayerNorm(c.d_model))
        self.head = nn.Linear(c.d_model, c.vocab_size)

    def forward(self, source: Tensor, answer: Tensor) -> Tensor:
        """Logits (B, L, V) of each next token: ``source``, ``answer`` (B, L)."""
        n = answer.shape[1]
        ahead = torch.ones(n, n, dtype=torch.bool, device=answer.device).triu(1)
        x = self.embed(answer) + self.positions[:n]
        x = self.decoder(x, self.encoder(source), ahead, tgt_is_causal=True)
        return self.head(x)


def t5_loss(model: T5Training, batch: Batch) -> Tensor:
    """Cross-entropy of the target, given the source and the target so far.

    ``batch``: source, target (B, L); padding (id 0) starts the decoder and is not
    scored, as in T5.
    """
    target = batch["target"]
    answer = F.pad(target, (1, 0))[:, :-1]  # shifted by one, (B, L)
    logits = precise(model(batch["source"], answer))
    loss = F.cross_entropy(logits.mT, target, ignore_index=0, reduction="none")
    return (loss.sum(1) / (target != 0).sum(1)).mean()  # (B, L) → (B,) → ()


# %% [markdown]
# ## The transformer's loss


# %%
def transformer_loss(model: MMDiT, batch: Batch) -> Tensor:
    """Rectified flow; Esser et al. 2024, equation 5 in velocity form.

    ``batch``: x0, noise (B, C, h, w), sigma (B,), context (B, L, D), pooled (B, P).
    """
    x0, noise, sigma = batch["x0"], batch["noise"], batch["sigma"]
    x = interpolate(x0, noise, sigma)
    v = model(x, sigma, batch["context"], batch["pooled"])
    return (precise(v) - velocity_target(x0, noise)).square().mean()


def drop_encoders(
    context: Tensor, pooled: Tensor, keep: Tensor, widths: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Zeros in place of the encoders whose ``keep`` (B, 3) is False.

    ``context`` (B, 2·L, D): L rows of both CLIPs side by side, L of T5. ``widths``: of
    CLIP-L and CLIP-G. A pipeline without T5 puts zeros there too.
    """
    clip, t5 = context.chunk(2, dim=1)  # (B, 2·L, D) → 2 × (B, L, D)
    channel = torch.arange(clip.shape[-1], device=clip.device)
    side = (channel >= widths[0]).long()  # (D,): whose channel
    clip = clip * keep[:, side][:, None]  # (B, L, D)
    context = torch.cat([clip, t5 * keep[:, 2, None, None]], dim=1)
    side = side.new_zeros(pooled.shape[-1])
    side[widths[0] :] = 1
    return context, pooled * keep[:, side]


# %% [markdown]
# ## One loop for all


# %%
@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast to learn. Schedules count steps, never seconds."""

    steps: int
    batch_size: int
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    beta2: float = 0.99
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    accumulation: int = 1
    bfloat16: bool = False
    compile: bool = False
    log_every: int = 50
    save_every: int = 1000
    validate_every: int = 0

    def __post_init__(self) -> None:
        check_batch(self.steps, self.batch_size, self.accumulation * parallel.size())


@dataclass
class Task:
    """Something to learn: a model, its loss, and batches that indices determine.

    ``batch(indices)`` must depend on the samples' numbers alone, and ``loss`` be a mean
    over samples: then a run can be stopped, resumed and split over devices.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]
    batch: Callable[[Tensor], Batch]
    validate: Callable[[nn.Module], dict] | None = None


# %%
def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then half a cosine to zero; Loshchilov & Hutter 2017, eq. 5."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


# %%
@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights towards the model's; a young average moves faster."""
    decay = min(decay, (1 + step) / (10 + step))
    averaged, current = list(ema.parameters()), list(model.parameters())
    torch._foreach_lerp_(averaged, current, 1 - decay)  # all tensors in one call


# %%
class Objective(nn.Module):
    """A loss as a module's forward: what compilers and many-device engines wrap."""

    def __init__(self, task: Task, bfloat16: bool) -> None:
        super().__init__()
        self.model, self.loss, self.bfloat16 = task.model, task.loss, bfloat16

    def forward(self, batch: Batch) -> Tensor:
        kind = next(iter(batch.values())).device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.bfloat16):
            return self.loss(self.model, batch)


# %%
class Learner:
    """The state of a run: the weights, their average, the optimiser's moments."""

    def __init__(self, task: Task, config: TrainingConfig, device: str) -> None:
        self.task, self.config, self.device = task, config, torch.device(device)
        self.model = task.model.to(self.device).train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.objective = parallel.wrap(Objective(task, config.bfloat16))
        if config.compile:
            self.objective = compiled(self.objective)

    def samples(self, step: int, part: int) -> Tensor:
        """The numbers of the samples that this process sees in a part of a step."""
        shares = self.config.accumulation * parallel.size()
        size = self.config.batch_size // shares
        share = part * parallel.size() + parallel.rank()
        first = step * self.config.batch_size + share * size
        return torch.arange(first, first + size, device=self.device)

    def step(self, step: int) -> Tensor:
        """One step of the optimiser; the mean loss of its samples."""
        c, losses = self.config, []
        for part in range(c.accumulation):
            loss = self.objective(self.task.batch(self.samples(step, part)))
            (loss / c.accumulation).backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), c.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, c)
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_ema(self.ema, self.model, c.ema_decay, step)
        return parallel.average(torch.stack(losses).mean())


# %%
def fit(
    task: Task,
    config: TrainingConfig,
    run: Run | None = None,
    device: str = "cpu",
    deadline: float = math.inf,
) -> nn.Module:
    """Train from the run's last checkpoint, if it has one; return the averaged model.

    At ``deadline`` (seconds since the epoch) the state is saved and TimeoutError
    raised: the process ends, the schedule does not change. TrainingError stops a run
    whose loss is not a number.
    """
    learner = Learner(task, config, device)
    start = restore(run, learner.model, learner.ema, learner.optimizer)
    monitor = Monitor(config.steps, start, config.batch_size, run)
    for step in range(start, config.steps):
        monitor.add(learner.step(step))
        done, late = step + 1, time.time() > deadline
        last = done == config.steps or late
        if last or done % config.log_every == 0 or done % config.save_every == 0:
            monitor.flush(lr=learning_rate(step, config))
        if task.validate and config.validate_every:
            if last or done % config.validate_every == 0:
                monitor.log(**task.validate(learner.ema))
        if run and (last or done % config.save_every == 0):
            checkpoint(run, done, learner.model, learner.ema, learner.optimizer)
            monitor.restart()
        if late and done < config.steps:
            raise TimeoutError(f"stopped after step {done} of {config.steps}")
    return learner.ema
