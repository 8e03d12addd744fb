# %% [markdown]
r"""
# Training: from data to weights

In this chapter you make the weights. Every network of this book began as random
numbers; here you see what turns them into text encoders, an autoencoder, a painter:
four losses and one loop.

After it you will be able to

- **write** the loss of each part: autoencoder, CLIP, T5, transformer;
- **make** batches that depend on nothing but the numbers of their samples;
- **train** a small text-to-image model in half a minute, and read its curves;
- **average** weights, and say what it is good for;
- **stop** a run anywhere and go on with exactly the same result;
- **recognise** overfitting and a wrong target, and know which curve shows them.
"""

# %% [markdown]
# ## Where we are
#
# The earlier chapters took their weights from the folder that ships with the package.
# This one explains where that folder comes from. It is the only chapter that needs the
# data set, Fashion-MNIST (34 MB). If the next cells find none, they download it once
# from the hub; without a network, let the environment variable `MINIDIFF_DATA` name a
# folder that holds its two parquet files, and start again.
#
# On a first reading you may go from here to *The transformer: the velocity* and on to
# *A real run*; the losses of the other parts wait.

# %% tags=["hide-input"]
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.data import rng
from minidiff.dit import MMDiT
from minidiff.flow_matching import interpolate, velocity_target
from minidiff.learning import parallel
from minidiff.learning.muon import Muon
from minidiff.learning.run import Run
from minidiff.learning.steps import (
    Monitor,
    check_batch,
    compiled,
    due,
    is_late,
    restore_state,
    save_state,
)
from minidiff.learning.towers import AnswerDecoder, ImageTower
from minidiff.text_encoders import CLIPTextEncoder, T5Encoder
from minidiff.vae import VAE

Batch = dict[str, Tensor]

# %% tags=["active-ipynb", "hide-input"]
# import copy
# import tempfile
# import time
# from dataclasses import replace
# from pathlib import Path
#
# import minidiff
# from minidiff import viz
# from minidiff.dit import MMDiTConfig
# from minidiff.flow_matching import euler, guide, sigma_schedule
# from minidiff.classroom import journey
# from minidiff.data.language import RANDOM, Dice, captions, say
# from minidiff.data.samples import ONE
# from minidiff.data.scenes import COLORS, MIDDLE, World
# from minidiff.data.told import ToldScenes
# from minidiff.classroom.exercises import check
# from minidiff.files.pictures import to_bytes
# from minidiff.judging.exam import share
# from minidiff.learning.run import read_log
# from minidiff.recipes.text_stages import by_color
#
# torch.set_num_threads(1)  # the quickest for small tensors
# viz.show_pipeline("training")

# %% [markdown]
# The prompt of our journey passes through unchanged: its context is what the
# transformer reads in every step of its training too.

# %% tags=["active-ipynb"]
# pipe = minidiff.load("tiny")
# print(journey.meets("context", pipe.encode_prompt(journey.PROMPT)[0]))

# %% [markdown]
# ## A picture of the data
#
# A garment of Fashion-MNIST is a grey picture of 28 × 28, an everyday thing a cut-out
# of an emoji font. We tint it, place it on a coloured ground and say in words what we
# did. That gives as many captioned scenes as we like. Of each kind one colour is kept
# out of training, so that one can later ask for something never seen: a green dress, a
# blue t-shirt.

# %% tags=["active-ipynb"]
# scenes = ToldScenes("train")
# shown = scenes.batch(torch.arange(8))
# images = shown.images
# viz.show_images(images, shown.captions, columns=4)

# %% [markdown]
# ## Samples have numbers
#
# A loop that draws from *one* random generator has a memory: its thousandth sample
# depends on the 999 before. Stop it, split it over two devices, change the batch size,
# and it learns from other data. So nothing here has such a memory. Sample $i$ is a
# function of the seed and of $i$: its scene, its noise, its level, whether its prompt
# is dropped. `minidiff.data.rng` hashes $i$ into random bits.

# %% tags=["active-ipynb"]
# alone = rng.normal(seed=0, indices=torch.tensor([5]), shape=(3,))
# among = rng.normal(seed=0, indices=torch.tensor([9, 2, 5]), shape=(3,))
# print("sample 5 alone and among others:", torch.equal(alone[0], among[2]))

# %% [markdown]
# ## Five things to learn
#
# | part | it sees | it must say | loss |
# |---|---|---|---|
# | tokenizers | captions | pieces that shorten them | none: counting, chapter 1 |
# | CLIP | pictures, captions | which belong together | cross-entropy over a batch |
# | T5 | a damaged caption | what is missing | cross-entropy over words |
# | VAE | a picture | the same picture | distance, and a little KL |
# | transformer | a noisy latent, a level, a prompt | the velocity | squared distance |
#
# They are learned in this order, because the transformer needs the others finished:
# its data are the VAE's latents, its prompts the encoders' output.
#
# One remark on precision. Products of matrices run in bfloat16 on a GPU: it is fast,
# and its two to three decimal digits are enough there. A loss adds many small numbers,
# where so few are not enough.


# %%
def precise(x: Tensor) -> Tensor:
    """``x`` in float32 at least: losses are not computed in bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# %% [markdown]
# ### The autoencoder: the same picture again
#
# The encoder gives a mean $\mu$ and a variance $s^2$ for each latent number;
# the decoder gets a sample $z = \mu + s\,\epsilon$ and answers with $\hat x$.
# With $e = \hat x - x$, the loss is
#
# $$\mathcal L = \overline{|e|} + 2\,\overline{e^2} + \tfrac12\,\overline{|\nabla e|}
# + w \cdot \tfrac12\,\overline{\mu^2 + s^2 - 1 - \ln s^2}$$
#
# where a bar is a mean over all numbers. The first two terms ask for the right colours.
# The third, with $\nabla$ the difference of neighbouring pixels, asks for the right
# edges: a blurred picture is off by little, but along outlines its error changes from
# one pixel to the next. The last is the Kullback–Leibler divergence to
# $\mathcal N(0, 1)$; its weight $w = 0.0005$ is small, just enough to keep the latents
# near one scale and to make them tolerate noise.


# %%
def gradient_difference(error: Tensor) -> Tensor:
    """Mean step between neighbouring pixels of ``error`` (B, C, H, W).

    Mathieu et al. 2016, equation 6, with exponent 1 and the sign kept.
    """
    return (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, e^logvar) ‖ N(0, 1)) per number; Kingma & Welling 2014, appendix B."""
    return (mean.square() + logvar.exp() - 1 - logvar).mean() / 2


def vae_loss(vae: VAE, batch: Batch, kl_weight: float = 5e-4) -> Tensor:
    """The loss above. ``batch``: images (B, 3, H, W) in [−1, 1], noise (B, C, h, w)."""
    posterior = vae.encode(batch["images"])
    mean, logvar = precise(posterior.mean), precise(posterior.logvar)
    z = mean + torch.exp(logvar / 2) * batch["noise"]
    error = precise(vae.decode(z)) - batch["images"]
    distance = error.abs().mean() + 2 * error.square().mean()
    edges = gradient_difference(error)
    return distance + edges / 2 + kl_weight * kl_divergence(mean, logvar)


# %% [markdown]
# What does each term notice? We damage a picture in three ways whose squared error is
# made equal, and look at the other terms, and at their sum in the loss. A blur is cheap
# in L1, since it is wrong at outlines only. The edge term charges for what changes from
# pixel to pixel: for a blur at its outlines, for noise everywhere, for a shift of all
# colours nothing.

# %% tags=["active-ipynb"]
# blur = F.avg_pool2d(F.pad(images, [2] * 4, mode="replicate"), 5, 1) - images
# damage = {"blur": blur, "noise": rng.normal(1, torch.arange(8), images.shape[1:])}
# damage["shift"] = torch.ones_like(images)
# damage = {k: 0.1 * e / e.square().mean().sqrt() for k, e in damage.items()}
# for name, e in damage.items():
#     l1, l2, edges = e.abs().mean(), e.square().mean(), gradient_difference(e)
#     total = f"in all {l1 + 2 * l2 + edges / 2:.3f}"
#     print(f"{name:6} L1 {l1:.3f}  L2 {l2:.3f}  edges {edges:.3f}  {total}")

# %% [markdown]
# Compare the sums. Of three errors of one size the blur is still the cheapest, edges
# and all, and that is what an autoencoder with such a loss does when it cannot be
# exact: it blurs. So SD3's has two losses more. A *perceptual* loss compares features
# of a network that was trained to tell pictures apart, and to it a blur is far away; an
# *adversarial* one is a second network, which learns to tell decoded pictures from real
# ones ([Rombach et al. 2022](https://arxiv.org/abs/2112.10752)).

# %% [markdown]
# ### CLIP: who belongs to whom
#
# CLIP's text encoders learn beside a network for pictures; here a small convolutional
# one, which is thrown away afterwards. Both give unit vectors, $t_i$ for caption $i$
# and $v_j$ for picture $j$. In a batch of $B$ pairs, the true picture of caption $i$
# must score highest among all $B$:
#
# $$\ell_i = -\sum_j y_{ij} \ln \frac{e^{\tau\, t_i \cdot v_j}}
# {\sum_k e^{\tau\, t_i \cdot v_k}}$$
#
# and likewise the true caption of each picture. The scale $\tau$, one over what others
# call the temperature, CLIP learns, and lets grow to 100. Ours stays where CLIP's
# begins, at 1/0.07, so that losses of two runs can be compared. Usually $y$ is the
# identity matrix. Our captions repeat: “a red dress on a blue background” and “a photo
# of a red dress on a blue background” are both right for one picture, and calling one
# of them wrong would teach CLIP to hear the words “a photo of”. So $y_{ij}$ is shared
# in equal parts by all that mean the same. First with loops:


# %%
def contrastive_loops(t: Tensor, v: Tensor, scale: float, meaning: Tensor) -> Tensor:
    """Mean loss of the captions (B, P) against the pictures (B, P), row by row."""
    total = torch.zeros(())
    for i in range(len(t)):
        same = [j for j in range(len(v)) if meaning[j] == meaning[i]]
        scores = torch.stack([scale * t[i] @ picture for picture in v])
        for j in same:
            total -= (scores[j] - scores.logsumexp(0)) / len(same) / len(t)
    return total


# %% [markdown]
# PyTorch's cross-entropy takes such shared targets as a matrix. On several devices, a
# device's B rows are compared with the N rows of all of them: `gather` collects these,
# and is the identity on one.


# %%
def contrastive_loss(
    text: Tensor, image: Tensor, scale: float, meaning: Tensor
) -> Tensor:
    """Which caption belongs to which picture; Radford et al. 2021, figure 3.

    ``text``, ``image`` (B, P); captions of one ``meaning`` (B,) say the same.
    """
    text, image = (F.normalize(precise(x), dim=-1) for x in (text, image))
    same = (meaning[:, None] == parallel.gather(meaning)).to(text.dtype)  # → (B, N)
    target = same / same.sum(1, keepdim=True)
    to_image = F.cross_entropy(scale * text @ parallel.gather(image).mT, target)
    to_text = F.cross_entropy(scale * image @ parallel.gather(text).mT, target)
    return (to_image + to_text) / 2


# %% tags=["active-ipynb"]
# text, image = rng.normal(2, torch.arange(12), (16,)).split(6)
# meaning = torch.tensor([0, 0, 1, 2, 1, 3])
# unit = F.normalize(text, dim=-1), F.normalize(image, dim=-1)
# slow = [contrastive_loops(*pair, 5, meaning) for pair in (unit, unit[::-1])]
# fast = contrastive_loss(text, image, 5, meaning)
# print("loops and cross-entropy agree:", torch.isclose(sum(slow) / 2, fast).item())

# %% [markdown]
# SD3.5's two CLIPs were trained apart, on other data. Ours share the tower for
# pictures. It and T5's decoder are ordinary networks: `minidiff.learning.towers`.
#
# Our pictures are few and small: a pen and a brush look much alike, and pictures alone
# may not tell CLIP their names apart. The transformer needs to know them apart. So each
# caption has to find another caption of its scene as well, among all of the batch.

# %%
SCALE = 1 / 0.07  # where CLIP's own begins


class CLIPTraining(nn.Module):
    """Both text encoders with the picture tower that they share while they learn."""

    def __init__(self, clip_l: CLIPTextEncoder, clip_g: CLIPTextEncoder) -> None:
        super().__init__()
        self.text = nn.ModuleList([clip_l, clip_g])
        self.tower = ImageTower()
        widths = [encoder.config.projection_dim for encoder in (clip_l, clip_g)]
        self.heads = nn.ModuleList(nn.Linear(self.tower.features, w) for w in widths)


def clip_loss(model: CLIPTraining, batch: Batch) -> Tensor:
    """Each encoder's loss against the pictures, and its captions' among themselves.

    ``batch``: images, ids_l and ids_g (B, 2, L) of two captions of each, meaning (B,).
    """
    features = model.tower(batch["images"])
    losses = []
    for i, ids in enumerate((batch["ids_l"], batch["ids_g"])):
        text, other = (model.text[i](caption)[1] for caption in ids.unbind(1))
        for partner in (model.heads[i](features), other):
            losses.append(contrastive_loss(text, partner, SCALE, batch["meaning"]))
    return torch.stack(losses).sum()


# %% [markdown]
# And a batch can be easy. Where it holds one red dress and nothing else that is red,
# the word “red” finds the picture, and nothing is learned about dresses. Every other
# batch of the shipped recipe therefore holds pictures of like colours, neighbours in an
# order by mean colour:

# %% tags=["active-ipynb"]
# pool = World("train").batch(torch.arange(1024)).images
# order = by_color(to_bytes(pool))
# batches = {"as they come": pool[:8], "of like colours": pool[order[512:520]]}
# for name, batch in batches.items():
#     apart = torch.pdist(batch.mean((2, 3))).median()
#     print(f"eight {name}: two mean colours are {apart:.2f} apart (median)")
# viz.show_images(torch.cat(list(batches.values())), columns=8)

# %% [markdown]
# In the lower row the ground tells nothing, and where a colour fits several pictures a
# caption has to find its own by the thing that it names. The recipe's batches hold 128,
# from 65,536 pictures.

# %% [markdown]
# ### T5: fill the gaps
#
# T5 never sees a picture. It reads a caption in which runs of words are hidden, each
# behind one *sentinel*, and a decoder must write what they hid. The decoder is small
# and is thrown away; what stays is an encoder that has to know which words go together.
#
# Hiding is pure bookkeeping: mark the tokens, put a sentinel where each run begins, and
# move what is kept to the front. `argsort` of a row of zeros and ones does the moving
# for a whole batch at once, if it is stable.


# %%
def compact(values: Tensor, keep: Tensor, pad: int, length: int) -> Tensor:
    """Move the kept ``values`` (B, N) of each row to its front: (B, length)."""
    order = (~keep).byte().argsort(dim=1, stable=True)
    return values.masked_fill(~keep, pad).gather(1, order)[:, :length]


def corrupt_spans(
    ids: Tensor, hidden: Tensor, sentinels: Tensor, pad: int, eos: int
) -> tuple[Tensor, Tensor]:
    """T5's span corruption; Raffel et al. 2020, section 3.1.4 and figure 2.

    Each run of ``hidden`` (B, L) tokens becomes one sentinel in the source (B, L); the
    target (B, L) lists every sentinel with the tokens that it stands for, then ``eos``
    (where T5 itself has one more sentinel).
    """
    first = hidden & ~F.pad(hidden, (1, 0))[:, :-1]  # the start of each run
    names = sentinels[(first.cumsum(1) - 1).clamp(min=0)]
    source = compact(names.where(first, ids), first | ~hidden, pad, ids.shape[1])
    pairs = torch.stack([names, ids], 2).flatten(1)  # (B, L) → (B, 2·L)
    keep = torch.stack([first, hidden], 2).flatten(1)
    end = torch.full_like(ids[:, :1], eos)
    pairs, keep = torch.cat([pairs, end], 1), F.pad(keep, (0, 1), value=True)
    return source, compact(pairs, keep, pad, ids.shape[1])


def choose_spans(u: Tensor, ids: Tensor, pad: int, longest: int = 3) -> Tensor:
    """A mask (B, L) of two random spans of 1 to ``longest`` tokens, from u (B, 4)."""
    n = (ids != pad).sum(1, keepdim=True) - 1  # the end token is never hidden
    start = (u[:, :2] * n).long()
    end = start + 1 + (u[:, 2:] * longest).long()
    place = torch.arange(ids.shape[1], device=ids.device)[:, None]
    inside = (place >= start[:, None]) & (place < end[:, None])
    return inside.any(-1) & (place[:, 0] < n)


# %% tags=["active-ipynb"]
# t5 = pipe.tokenizers[2]
# ids = t5(["a red dress left of a green bag on a white background"])
# sentinels = torch.tensor([t5.vocab[f"<extra_id_{i}>"] for i in range(3)])
# u = rng.uniform(4, torch.tensor([11]), 4)
# pair = corrupt_spans(ids, choose_spans(u, ids, 0), sentinels, 0, t5.eos_token_id)
# for name, row in zip(("caption", "source", "target"), (ids, *pair), strict=True):
#     print(f"{name}: " + " ".join(t5.tokens(row[0][row[0] != 0].tolist())))

# %% [markdown]
# Our captions are so regular that a hidden colour cannot be guessed from the rest: the
# colours are independent. Half of the samples therefore ask for something else: the
# same scene in the words of another template. To write “b below a” from “a above b” the
# encoder must carry every word across, with what it belongs to.


# %%
class T5Training(nn.Module):
    """T5's encoder with a small decoder that writes the answer while it learns.

    Called on ``source`` and ``answer`` (B, L): logits (B, L, V) of each next token.
    """

    def __init__(self, encoder: T5Encoder, length: int = 32) -> None:
        super().__init__()
        c = encoder.config
        self.encoder = encoder
        self.decoder = AnswerDecoder(c.vocab_size, c.d_model, c.num_heads, length)

    def forward(self, source: Tensor, answer: Tensor) -> Tensor:
        return self.decoder(answer, self.encoder(source))


def t5_loss(model: T5Training, batch: Batch) -> Tensor:
    """Cross-entropy of the target, given the source and the target so far.

    ``batch``: source, target (B, L); padding (id 0) starts the decoder and is not
    scored, as in T5. The mean is over samples, each the mean over its words.
    """
    target = batch["target"]
    answer = F.pad(target, (1, 0))[:, :-1]  # what has been written so far
    logits = precise(model(batch["source"], answer))
    loss = F.cross_entropy(logits.mT, target, ignore_index=0, reduction="none")
    return (loss.sum(1) / (target != 0).sum(1)).mean()


# %% [markdown]
# ### The transformer: the velocity
#
# [Chapter 6](06_flow_matching.ipynb) derived this loss. Take a latent $x_0$, noise
# $\epsilon$, a level $\sigma$; stand at $x_\sigma = (1-\sigma)\,x_0 + \sigma\,\epsilon$
# and ask for the direction of the straight path:
#
# $$\mathcal L = \overline{\left(v_\theta(x_\sigma, \sigma, \text{prompt}) -
# (\epsilon - x_0)\right)^2}$$


# %%
def transformer_loss(model: MMDiT, batch: Batch) -> Tensor:
    """Rectified flow; Esser et al. 2024, section 2.

    ``batch``: x0, noise (B, C, h, w), sigma (B,), context (B, L, D), pooled (B, P).
    """
    x0, noise, sigma = batch["x0"], batch["noise"], batch["sigma"]
    x = interpolate(x0, noise, sigma)
    v = model(x, sigma, batch["context"], batch["pooled"])
    return (precise(v) - velocity_target(x0, noise)).square().mean()


# %% [markdown]
# Levels are drawn so that their logit is normal: the middle more often than the ends.
# (A recipe may move them towards noise, by chapter 6's shift.) Here too each sample's
# level is a function of
# its number: its logit is a second normal number.


# %%
def noise_and_levels(
    indices: Tensor, shape: tuple[int, ...], seed: int
) -> tuple[Tensor, Tensor]:
    """Noise ``(B, *shape)`` and logit-normal levels (B,) of the samples ``indices``."""
    # fold_in: a second stream of numbers from the same seed
    logit = rng.normal(rng.fold_in(seed, 1), indices, (1,))[:, 0]
    return rng.normal(seed, indices, shape), logit.sigmoid()


# %% [markdown]
# Guidance ([chapter 6](06_flow_matching.ipynb)) compares the velocity with a prompt to
# the velocity without one, so the network must know both. In one of ten samples the
# prompt is replaced by the empty one, encoded: the very thing that guidance will ask
# with. Besides, each encoder is dropped now and then by itself, zeros in its place, so
# that zeros for the huge T5 are nothing new to the transformer; chapter 8 counts what
# is lost without it. SD3 does only the second, so often that all three are zeros in one
# of ten; yet its pipelines ask with the encoded empty text, which is no zero. We know
# of no measurement of what that mismatch costs. (<a
# href="../book/inside.html?open=bench&amp;switch=t5">Leave T5 out live</a>, of any
# prompt.)


# %%
def drop_encoders(
    context: Tensor, pooled: Tensor, keep: Tensor, widths: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Zeros in place of the encoders whose ``keep`` (B, 3) is False.

    ``context`` (B, 2·L, D): L rows of both CLIPs side by side, L of T5. ``widths``: of
    CLIP-L and CLIP-G. Esser et al. 2024, appendix B.3.
    """
    clip, t5 = context.chunk(2, dim=1)  # (B, 2·L, D) → 2 × (B, L, D)
    channel = torch.arange(max(clip.shape[-1], pooled.shape[-1]), device=clip.device)
    side = (channel >= widths[0]).long()  # whose channel: 0 for L, 1 for G
    clip = clip * keep[:, side[: clip.shape[-1]]][:, None]
    context = torch.cat([clip, t5 * keep[:, 2, None, None]], dim=1)
    return context, pooled * keep[:, side[: pooled.shape[-1]]]


# %% [markdown]
# How far has it come? The training loss cannot tell: it jumps with the levels that a
# batch happened to get, because the loss differs much between levels. So we validate
# on fixed scenes, with fixed noise, on a fixed grid of levels.


# %%
@torch.no_grad()
def loss_by_level(model: MMDiT, batch: Batch, levels: int = 8) -> list[float]:
    """The loss on a fixed ``batch`` at evenly spaced levels, in the grid's middles."""
    losses = []
    for i in range(levels):
        sigma = torch.full_like(batch["x0"][:, 0, 0, 0], (i + 0.5) / levels)
        losses.append(transformer_loss(model, batch | {"sigma": sigma}).item())
    return losses


# %% [markdown]
# ## Every loss takes a few steps
#
# Before a long run, two questions to any loss, which cost seconds and find most slips.
# *Can the network learn one batch by heart?* If not, something is broken. And *does it
# do better than one that sees nothing?* Such a network has a best answer too, the
# baseline: for CLIP a guess among the batch, for T5 the words' frequencies, for the
# autoencoder the mean picture, for the transformer the mean velocity, each of the same
# batch. Each loss now takes 8 steps on one batch, with fresh networks of the shipped
# sizes.

# %% tags=["active-ipynb"]
# at, numbers = torch.arange(100, 104), torch.arange(4)
# batch, meanings = scenes.batch(at), scenes.describe(at)[1]
# dice = rng.uniform(5, at, RANDOM).tolist()
# again = [say(m, Dice(u)) for m, u in zip(meanings, dice)]  # the scenes, told anew
# ids = [tokenize(batch.captions) for tokenize in pipe.tokenizers]
# twice = [torch.stack([t(batch.captions), t(again)], 1) for t in pipe.tokenizers[:2]]
# spans = choose_spans(rng.uniform(4, numbers, 4), ids[2], 0)
# source, target = corrupt_spans(ids[2], spans, sentinels, 0, t5.eos_token_id)
# texts, x0 = pipe.encode_prompt(batch.captions), batch.images
# with torch.no_grad():
#     latents = pipe.vae.scale(pipe.vae.encode(x0).mode())
# noise, sigma = noise_and_levels(numbers, latents.shape[1:], seed=3)
# batches = {
#     "autoencoder": {"images": x0, "noise": rng.normal(1, numbers, latents.shape[1:])},
#     "CLIP": {"images": x0, "ids_l": twice[0], "ids_g": twice[1],
#         "meaning": numbers},
#     "T5": {"source": source, "target": target},
#     "transformer": {"x0": latents, "noise": noise, "sigma": sigma,
#         "context": texts[0], "pooled": texts[1]},
# }

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# shipped = pipe.vae, *pipe.text_encoders, pipe.transformer
# vae, clip_l, clip_g, reader, transformer = (type(m)(m.config) for m in shipped)
# parts = {
#     "autoencoder": (vae, vae_loss),
#     "CLIP": (CLIPTraining(clip_l, clip_g), clip_loss),
#     "T5": (T5Training(reader), t5_loss),
#     "transformer": (transformer, transformer_loss),
# }
#
# mean = x0 - x0.mean(0)
# counts = target[target != 0].bincount()
# chance = counts[counts > 0] / counts.sum()
# distance = mean.abs().mean() + 2 * mean.square().mean()
# baselines = [distance + gradient_difference(mean) / 2, 4 * math.log(4)]
# velocity = noise - latents
# spread = (velocity - velocity.mean(0)).square().mean()
# baselines += [-(chance * chance.log()).sum(), spread]

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for (name, (part, loss)), baseline in zip(parts.items(), baselines, strict=True):
#     optimizer, seen = torch.optim.AdamW(part.parameters(), 2e-3), []
#     for _ in range(8):
#         seen.append(loss(part.train(), batches[name]))
#         seen[-1].backward()
#         optimizer.step()
#         optimizer.zero_grad()
#     print(f"{name:12} first {seen[0]:6.3f}  after 8 steps {seen[-1]:6.3f}"
#         f"  sees nothing {baseline:6.3f}")

# %% [markdown]
# In each row the second number should be below the third, or on its way there: what the
# network has learned of this batch, no guess could know. The transformer begins by
# answering zero, and pays the mean square of the velocity; the others begin as their
# random weights would have it.

# %% [markdown]
# ## One loop for all
#
# The loop in its smallest form is five lines, here for a toy that learns $y = x^2$ from
# 8 normal numbers to 8 numbers, with a learning rate that climbs in a straight line.
# Everything after it makes the same five lines quick, safe and general. (A network that
# sees nothing does best with 1, and pays $\mathbb E\,(x^2 - 1)^2 = 2$.)

# %% tags=["active-ipynb"]
# def toy_batch(indices):
#     x = rng.normal(5, indices, (8,))
#     return {"x": x, "y": x**2}
#
# def toy_loss(model, batch):
#     return (model(batch["x"]) - batch["y"]).square().mean()
#
# def toy_model():
#     torch.manual_seed(0)
#     return nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 8))


# %% tags=["active-ipynb"]
# plain = toy_model()
# optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.99))
# for step in range(60):
#     optimizer.param_groups[0]["lr"] = 1e-2 * (step + 1) / 60
#     toy_loss(plain, toy_batch(torch.arange(32 * step, 32 * step + 32))).backward()
#     optimizer.step()
#     optimizer.zero_grad()
# print(f"loss {toy_loss(plain, toy_batch(torch.arange(1000))).item():.2f}")

# %% [markdown]
# First, what is learned and how long. The batch may depend on the samples' numbers
# only, and the loss must be a mean over samples.


# %%
@dataclass
class Task:
    """Something to learn: a model, its loss, and batches that indices determine.

    ``batch(indices)`` must depend on the samples' numbers alone, and ``loss`` be a mean
    over samples: then a run can be stopped, resumed and split over devices.
    """

    model: nn.Module
    loss: Callable[[Any, Batch], Tensor]
    batch: Callable[[Tensor], Batch]
    validate: Callable[[Any], dict[str, Any]] | None = None


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
    plateau: float = 0.0
    drop: float = 1.0
    muon: bool = False
    accumulation: int = 1
    bfloat16: bool = False
    compile: bool = False
    sharded: bool = False
    log_every: int = 50
    save_every: int = 1000
    validate_every: int = 0


# %% [markdown]
# The learning rate climbs while Adam's averages are still young, then falls along half
# a cosine, so that the noise of the steps dies out at the end. With a `plateau` it
# stays at its peak for that share of the steps first, and goes on with the share `drop`
# of it.
#
# `muon` chooses another optimiser for the matrices inside transformer and autoencoder
# (of a convolution: a row for each output channel). The singular value decomposition
# writes a matrix, here the running mean of a gradient, as $USV^T$: $U$ and $V$ hold
# directions, the diagonal of $S$ the singular values, a few large, most small. Adam
# scales each number by itself, and so still follows mostly the large ones. Muon steps
# along $UV^T$, found by five rounds of matrix products, about equally far in all
# directions (`minidiff.learning.muon`). But not in the layers that make the
# conditioning $c$ of chapter 5 and the modulations: those learn by Adam, at a rate of
# at most 0.0005. With Muon and a rate of 0.01 they once drove $c$ so far below zero
# that SiLU let nothing of it through, and no gradient back
# ([what we got wrong](../book/wrong.md)).


# %%
def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then half a cosine to zero; Loshchilov & Hutter 2017, eq. 5.

    It begins to fall after ``plateau``, a share of the steps, and at once to the share
    ``drop``.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    start = max(config.warmup_steps, config.plateau * config.steps)
    done = max(0, step - start) / max(1, config.steps - start)
    left = config.drop if step >= start else 1.0
    return left * config.learning_rate * (1 + math.cos(math.pi * done)) / 2


# %% [markdown]
# Second, the average. The weights $\theta$ tremble around where they are going. Their
# exponential moving average
#
# $$\bar\theta \leftarrow d\,\bar\theta + (1-d)\,\theta$$
#
# trembles less, and pictures are drawn with $\bar\theta$. A long memory ($d = 0.999$
# remembers about 1,000 steps) is a burden in the beginning, when it remembers random
# weights. So $d$ starts small: at step $k$ it is at most $(1 + k)/(10 + k)$.


# %%
@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights towards the model's; a young average moves faster."""
    decay = min(decay, (1 + step) / (10 + step))
    old, new = ([parallel.local(p) for p in m.parameters()] for m in (ema, model))
    torch._foreach_lerp_(old, new, 1 - decay)  # all tensors in one call


# %% [markdown]
# Third, the step. A gradient longer than `max_grad_norm` is shortened to it. The batch
# comes in parts: `accumulation` parts one after the other where memory is short, and
# one part for each process where there are several devices. Because the loss is a mean
# and the samples have numbers, the parts together give the gradient of the whole batch.


# %%
class Objective(nn.Module):
    """A loss as a module's forward: what compilers and many-device engines wrap."""

    def __init__(self, task: Task, bfloat16: bool) -> None:
        super().__init__()
        self.model, self.loss, self.short = task.model, task.loss, bfloat16

    def forward(self, batch: Batch) -> Tensor:
        kind = next(iter(batch.values())).device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.short):
            return self.loss(self.model, batch)


class Learner:
    """The state of a run: the weights, their average, the optimiser's moments."""

    def __init__(self, task: Task, config: TrainingConfig, device: str) -> None:
        self.task, self.config, self.device = task, config, torch.device(device)
        self.shares = config.accumulation * parallel.size()
        check_batch(config.steps, config.batch_size, self.shares)
        self.model = task.model.to(self.device).train()
        self.ema = parallel.replica(self.model, config.sharded)
        objective = parallel.wrap(Objective(task, config.bfloat16), config.sharded)
        self.objective = compiled(objective) if config.compile else objective
        settings: dict[str, Any] = {"betas": (0.9, config.beta2)}
        settings |= {"weight_decay": config.weight_decay, "fused": not config.sharded}
        # AdamW: a running mean of each number's gradient over the root of that of its
        # square; and in every step the weights shrink a little (the W)
        kind = Muon if config.muon else torch.optim.AdamW
        self.optimizer = kind(self.model.named_parameters(), **settings)

    def samples(self, step: int, part: int) -> Tensor:
        """The numbers of the samples that this process sees in a part of a step."""
        size = self.config.batch_size // self.shares
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
        self.optimizer.param_groups[0]["lr"] = learning_rate(step, c)
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_ema(self.ema, self.model, c.ema_decay, step)
        return parallel.average(torch.stack(losses).mean())


# %% [markdown]
# Last, the run: log, validate, save, and go on from what was saved. A checkpoint holds
# the weights, their average, what the optimiser remembers of past gradients, and the
# number of steps. It needs no state of a random generator, because there is none. It is
# written beside the old one and takes its name when it is complete, so that a run
# killed while saving still has the one before; a checksum tells a damaged one, and then
# too the one before is taken. (`minidiff.learning.run` does the files.)


# %%
def fit(
    task: Task,
    config: TrainingConfig,
    run: Run | None = None,
    device: str = "cpu",
    deadline: float | None = None,
) -> nn.Module:
    """Train from the run's last checkpoint, if it has one; return the averaged model.

    At ``deadline`` (seconds since the epoch) the state is saved and TimeoutError
    raised: the process ends, the schedule does not change. TrainingError stops a run
    whose loss is not a number.
    """
    learner = Learner(task, config, device)
    start = restore_state(run, learner.model, learner.ema, learner.optimizer)
    monitor = Monitor(config.steps, start, config.batch_size, run)
    for step in range(start, config.steps):
        monitor.add(learner.step(step))
        done, late = step + 1, is_late(deadline, learner.device)
        logs, saves, validates = due(config, done, late)
        if logs or saves or validates:
            monitor.flush(lr=learning_rate(step, config))
        if task.validate and validates:  # first, or a kill between would lose it
            monitor.validate(task.validate, learner.ema)
        if run and saves:
            save_state(run, done, learner.model, learner.ema, learner.optimizer)
            monitor.restart()
        if late and done < config.steps:
            raise TimeoutError(f"stopped after step {done} of {config.steps}")
    return parallel.whole_model(learner.ema)


# %% [markdown]
# With a warm-up that never ends, no clipping and no average, `fit` is the plain loop,
# up to rounding.

# %% tags=["active-ipynb"]
# fitted = toy_model()
# never = TrainingConfig(60, 32, 1e-2, 60, max_grad_norm=1e9, ema_decay=0.0)
# fit(Task(fitted, toy_loss, toy_batch), never)
# pairs = zip(plain.parameters(), fitted.parameters())
# print("fit is the plain loop:", all(torch.allclose(*p, atol=1e-6) for p in pairs))

# %% [markdown]
# ## A real run
#
# Now a text-to-image model, from nothing, while you wait. To fit into half a minute on
# a laptop's CPU it paints 16 × 16 pixels instead of latents, one garment in the
# middle, with a transformer of two blocks, and of a prompt it reads CLIP's 32 vectors
# alone. Everything else is the real thing: MMDiT, the shipped CLIPs, the loss above,
# dropped prompts, the loop.

# %% tags=["active-ipynb"]
# def small_scenes(split: str, n: int) -> tuple[Tensor, list[str]]:
#     seed = ("train", "test").index(split)  # so that tests are other scenes, too
#     world = World(split, seed=seed, layouts=ONE, garments=1.0)
#     shown = world.attributes(torch.arange(30 * n))
#     large = (shown.place == MIDDLE) & (shown.sizes[:, 0] > 0)
#     numbers = large.nonzero()[:n, 0]
#     texts = captions(world.attributes(numbers), 0, numbers)[0]
#     return world.batch(numbers).images, texts
#
# def encode(texts: str | list[str]) -> tuple[Tensor, Tensor]:
#     context, pooled = pipe.encode_prompt(texts)  # (B, 64, 192) and (B, 160)
#     return context[:, :32], pooled  # without T5's half
#
# def small_set(split: str, n: int) -> Batch:
#     images, texts = small_scenes(split, n)
#     context, pooled = encode(texts)
#     x0 = F.avg_pool2d(images, 4)  # → (B, 3, H/4, W/4)
#     return {"x0": x0, "context": context, "pooled": pooled}
#
# train_set, test_set = small_set("train", 512), small_set("test", 16)
# empty = encode("")

# %% tags=["active-ipynb"]
# def flow_batch(indices: Tensor, source: Batch, dropped: float = 0.1) -> Batch:
#     place = indices % len(source["x0"])
#     noise, sigma = noise_and_levels(indices, (3, 16, 16), seed=6)
#     told = (rng.uniform(7, indices, 1) >= dropped)[:, :, None]  # (B, 1, 1)
#     context = torch.where(told, source["context"][place], empty[0])
#     pooled = torch.where(told[:, 0], source["pooled"][place], empty[1])
#     known = {"x0": source["x0"][place], "context": context, "pooled": pooled}
#     return known | {"noise": noise, "sigma": sigma}

# %% tags=["active-ipynb"]
# def small_model() -> MMDiT:
#     torch.manual_seed(0)
#     heads = {"attention_head_dim": 32, "num_attention_heads": 2, "num_layers": 2}
#     pixels = {"in_channels": 3, "out_channels": 3, "pos_embed_max_size": 8}
#     return MMDiT(replace(MMDiTConfig.tiny(), sample_size=16, **heads, **pixels))
#
# fixed = test_set | {"noise": rng.normal(8, torch.arange(16), (3, 16, 16))}

# %% [markdown]
# Before the first step the network answers zero, by its initialisation (chapter 5). Its
# loss is then the mean square of $\epsilon - x_0$, which is $1 + \overline{x_0^2}$: 1
# from the noise, the rest from the pictures. Checking this costs one line and finds
# many mistakes.

# %% tags=["active-ipynb"]
# expected = 1 + test_set["x0"].square().mean()
# found = sum(loss_by_level(small_model(), fixed)) / 8
# print("the first loss is what it must be:", abs(found / expected - 1).item() < 0.03)

# %% tags=["active-ipynb"]
# def learn(source: Batch, steps: int, loss=transformer_loss, dropped=0.1) -> tuple:
#     model, album = small_model(), {}
#     grid = {"trained": model}
#
#     def validate(ema: nn.Module) -> dict:
#         grid["average"] = ema
#         album[20 * (len(album) + 1)] = copy.deepcopy(ema)
#         return {k: sum(loss_by_level(m, fixed)) / 8 for k, m in grid.items()}
#
#     config = TrainingConfig(
#         steps, 32, 4e-3, 20, ema_decay=0.95, log_every=10, validate_every=20
#     )
#     task = Task(model, loss, lambda i: flow_batch(i, source, dropped), validate)
#     with tempfile.TemporaryDirectory() as folder, Run(folder, {}) as run:
#         fit(task, config, run)
#         return album, read_log(Path(folder) / "log.jsonl")

# %% tags=["active-ipynb", "nbval-ignore-output"]
# album, log = learn(train_set, 200)
# model = album[200]
#
# def points(log: list, key: str) -> tuple:
#     return tuple(zip(*[(r["step"], r[key]) for r in log if key in r], strict=True))
#
# names = {"loss": "training", "trained": "validation"}
# names["average"] = "validation of the average"
# curves = {name: points(log, key) for key, name in names.items()}
# viz.show_curves(curves, "step", "loss", logy=True).captioned(
#     "200 steps: the loss of the model's batches, and that of fixed scenes at "
#     "fixed levels.")

# %% [markdown]
# Both losses fall fast, then slowly. (Which is lower means little: validation visits
# all levels alike, training mostly the middle ones, whose loss is lower.) What the
# average is worth, the numbers tell:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# print("step   trained   average")
# for row in (r for r in log if r["step"] in (20, 40, 80, 120, 200)):
#     if "average" in row:
#         print(f"{row['step']:4}   {row['trained']:7.3f}   {row['average']:7.3f}")

# %% [markdown]
# At step 80 the average is ahead: while the rate is high the weights tremble. At step
# 40 it is not, for it also lags behind weights that still move fast. As the rate falls
# to zero they stop trembling by themselves, and the two columns meet. So says this one
# run: an average is a remedy for noise, and at the end of such a schedule little is
# left.

# %% [markdown]
# And what has it learned? Eight prompts, twenty steps, guidance 3, drawn with the
# average of several moments. The pictures are what 16 × 16 pixels and half a minute
# allow. The last column but one asks for a blue t-shirt, a pair that is not in its data
# at all.

# %% tags=["active-ipynb"]
# wanted = "red dress,blue;yellow bag,black;white coat,green;purple bag,white;"
# wanted += "pink dress,gray;green shirt,red;blue t-shirt,yellow;red ankle boot,purple"
# wanted = [pair.split(",") for pair in wanted.split(";")]
# PROMPTS = [f"a {garment} on a {ground} background" for garment, ground in wanted]
# context, pooled = encode(PROMPTS)
# both = torch.cat([empty[0].expand_as(context), context])
# pooled = torch.cat([empty[1].expand_as(pooled), pooled])

# %% tags=["active-ipynb"]
# @torch.no_grad()
# def draw(model: MMDiT) -> Tensor:
#     def velocity(x: Tensor, sigma: Tensor) -> Tensor:
#         v = model(torch.cat([x, x]), sigma.expand(16), both, pooled)
#         return guide(*v.chunk(2), 3.0)
#
#     noise = rng.normal(9, torch.arange(8), (3, 16, 16))
#     return euler(velocity, noise, sigma_schedule(20, shift=1.0)).clamp(-1, 1)
#
# def show_album(album: dict):
#     moments = (20, 40, 60, 120, 200)
#     rows = [draw(album[step]) for step in moments if step in album]
#     titles = [" on ".join(w) for w in wanted]
#     return viz.show_images(torch.cat(rows), titles, columns=8)
#
# show_album(album).captioned("Rows: after 20, 40, 60, 120 and 200 steps.")

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def nearest(color: Tensor, names: dict) -> list[str]:
#     """The names of the nearest of some colours (R, G, B), for each row."""
#     table = torch.tensor(list(names.values())) / 127.5 - 1
#     return [list(names)[i] for i in torch.cdist(color, table).argmin(1)]
#
# pictures = draw(model)
# corners = pictures[:, :, ::15, ::15].mean((2, 3))  # (B, 3, H, W) → (B, 3)
# brightest = pictures[:, :, 5:11, 5:11].flatten(2).quantile(0.8, dim=2)  # → (B, 3)
# grounds, tints = nearest(corners, COLORS), nearest(brightest, COLORS)
# right = [g == w[1] for g, w in zip(grounds, wanted)], [
#     t == w[0].split()[0] for t, w in zip(tints, wanted)]
# for what, rows in zip(("grounds", "tints"), map(torch.tensor, right)):
#     print(f"{what} as asked: {rows.sum()} of {len(rows)}, {share(rows)}")
# print("garments taken for:", ", ".join(tints))

# %% [markdown]
# A ground is right if its named colour is the nearest to the picture's corners, a tint
# if it is the nearest to the bright part of the middle. Look for the wrong ones in the
# last row. With eight pictures the interval is wide: half a minute shows *that* the
# model learns to read, and little of how well.

# %% [markdown]
# ## Predict, then break it
#
# **Sixteen pictures.** The same model, but with 16 scenes to learn from, each seen 120
# times in 60 steps. Which curve will tell you, the training loss or the validation
# loss? And in which direction?

# %% tags=["active-ipynb", "hide-output", "nbval-ignore-output"]
# few = {name: values[:16] for name, values in train_set.items()}
# few_log = learn(few, 60)[1]
# runs = {"512 scenes": [r for r in log if r["step"] <= 60], "16 scenes": few_log}
# names = {"loss": "training", "average": "validation"}
# pairs = [(n, k) for n in runs for k in names]
# curves = {f"{n}, {names[k]}": points(runs[n], k) for n, k in pairs}
# viz.show_curves(curves, "step", "loss", logy=True)

# %% [markdown]
# Judged by its training loss, the model of 16 scenes is the better one. Only scenes
# that it has never seen give it away. A gap between a model's two curves that grows far
# beyond the other model's is overfitting; a training loss alone says nothing about it.
# But is it all learned by heart? Another reason is mixed in: the 16 captions hold only
# part of the words.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# told, asked = small_scenes("train", 16)[1], small_scenes("test", 16)[1]
# heard = {word for text in told for word in text.split()}
# unheard = torch.tensor([bool(set(text.split()) - heard) for text in asked])
# ends = [[r["average"] for r in rows if r["step"] == 60 and "average" in r][0]
#     for rows in (log, few_log)]
# print(f"unseen scenes at step 60: {ends[0]:.3f} of 512 scenes, {ends[1]:.3f} of 16")
# print(f"captions with a word that the 16 lack: {unheard.sum()} of {len(unheard)}")

# %% [markdown]
# **A wrong sign.** Now the target is $\epsilon + x_0$ instead of $\epsilon - x_0$, a
# typical slip. Before you look: will the training loss show it? Will the validation
# loss, which is computed with the right target?

# %% tags=["active-ipynb", "hide-output", "nbval-ignore-output"]
# def wrong_loss(model: MMDiT, batch: Batch) -> Tensor:
#     x = interpolate(batch["x0"], batch["noise"], batch["sigma"])
#     v = model(x, batch["sigma"], batch["context"], batch["pooled"])
#     return (v - (batch["noise"] + batch["x0"])).square().mean()
#
# wrong_album, wrong_log = learn(train_set, 60, wrong_loss)
# runs = {"right": [r for r in log if r["step"] <= 60], "wrong": wrong_log}
# kinds = {"loss": "training", "average": "validation"}
# curves = {f"{kinds[k]}, {n}": points(runs[n], k) for k in kinds for n in runs}
# viz.show_curves(curves, "step", "loss", logy=True).captioned(
#     "Training: each run's own loss. Validation: the right loss for both.")

# %% tags=["active-ipynb", "hide-output", "nbval-ignore-output"]
# levels = (torch.arange(8) + 0.5) / 8
# by_level = {"right": loss_by_level(album[60], fixed)}
# by_level["wrong"] = loss_by_level(wrong_album[60], fixed)
# with torch.no_grad():
#     batches = [fixed | {"sigma": sigma.expand(16)} for sigma in levels]
#     own = [wrong_loss(wrong_album[60], batch).item() for batch in batches]
# by_level["wrong, by its own loss"] = own
# curves = {name: (levels, losses) for name, losses in by_level.items()}
# viz.show_curves(curves, "noise level σ", "loss", markers=True).captioned(
#     "After 60 steps, at eight levels on fixed scenes.")

# %% tags=["active-ipynb", "hide-output", "nbval-ignore-output"]
# show_album(wrong_album).captioned("The wrong sign after 20, 40 and 60 steps.")

# %% [markdown]
# The wrong run's own loss is the *lower* one. Its task is easier: at $\sigma =
# \tfrac12$ the target $\epsilon + x_0$ is exactly $2 x_\sigma$, which the network is
# given. A training loss tells how well a task is learned, not whether it is the right
# one. Two things do tell. A validation that is written down separately, with the right
# target, hardly moves. And the drawings. Who knew the wrong target perfectly would end,
# one step from noise $\epsilon$, at $\epsilon - (\epsilon + x_0) = -x_0$, the opposite
# of the picture. After 60 steps this network knows little of $x_0$ at $\sigma = 1$, and
# all its grounds are near grey. Neither is what was asked. Validate by other code than
# you train by, and draw early.

# %% [markdown]
# ## Stop anywhere
#
# A deadline stops the toy in the middle of its run. Starting the same command again
# finishes it. The result is compared, bit for bit, with a run that was never stopped.

# %% tags=["active-ipynb"]
# def toy_run(folder: str, deadline: float | None = None) -> dict:
#     with Run(folder, {"steps": 60}) as run:
#         task = Task(toy_model(), toy_loss, toy_batch)
#         return fit(task, TrainingConfig(60, 32), run, "cpu", deadline).state_dict()
#
# with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
#     whole = toy_run(one)
#     try:
#         toy_run(other, deadline=time.time() + 0.005)
#     except TimeoutError:
#         print("stopped before the end")
#     resumed = toy_run(other)
# print("bit for bit the same:", all(torch.equal(whole[k], resumed[k]) for k in whole))

# %% [markdown]
# The tests do it less politely: they send SIGKILL at twenty random moments, and at
# chosen ones in the middle of a save.
#
# ## Parity
#
# The pieces of this chapter that exist elsewhere, next to ours: diffusers' moving
# average and its KL divergence, and the loss of transformers' CLIP. (A test compares
# the schedule too.)

# %% tags=["active-ipynb"]
# from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
# from diffusers.training_utils import EMAModel
# from transformers.models.clip.modeling_clip import image_text_contrastive_loss
#
# moving, ours = toy_model(), toy_model()
# theirs = EMAModel(moving.parameters(), decay=0.9)
# theirs.step(moving.parameters())  # its first step copies
# for step in range(20):
#     moving.load_state_dict({k: 1.1 * v for k, v in moving.state_dict().items()})
#     theirs.step(moving.parameters())
#     update_ema(ours, moving, 0.9, step + 1)
# pairs = zip(ours.parameters(), theirs.shadow_params, strict=True)
# errors = {"average": max(((a - b).norm() / b.norm()).item() for a, b in pairs)}

# %% tags=["active-ipynb"]
# moments = rng.normal(3, torch.arange(4), (8, 6, 6))
# kl = DiagonalGaussianDistribution(moments).kl().mean() / (4 * 6 * 6)
# errors["KL"] = (kl_divergence(*moments.chunk(2, 1)) / kl - 1).abs().item()
# fast = contrastive_loss(text, image, 5, torch.arange(6))
# reference = image_text_contrastive_loss(5 * unit[0] @ unit[1].mT)
# errors["CLIP"] = (fast / reference - 1).abs().item()
# for name, error in errors.items():
#     assert error <= 1e-5, (name, error)
#     print(f"{name} differs by at most 1e-5")

# %% [markdown]
# ## What production code does differently
#
# - **Encode once.** The frozen encoders give the same answer for the same scene every
#   time. `minidiff train` encodes all its scenes and captions before the transformer's
#   first step and keeps them on the device; its step is then a gather, not an encoder.
# - **Compile, and never wait.** A compiled step fuses norms, modulations and gates into
#   their neighbours. `Monitor` fetches losses fifty at a time: reading a number makes
#   the CPU wait for the GPU.
# - **Many devices.** Under `torchrun` each process takes its share of every batch;
#   `DistributedDataParallel` averages the gradients while they are still being
#   computed. Two processes give the weights of one up to rounding, for every loss of
#   this chapter: a test compares them in float64. With `sharded` each keeps its part of
#   weights, average and moments between steps (FSDP2).
# - **Better data.** SD3's pictures were filtered and deduplicated, and half of its
#   captions written by a vision model; the authors measure that such captions help
#   ([Esser et al. 2024](https://arxiv.org/abs/2403.03206), section 5.2.2). At the end
#   it was tuned to human preferences.
# - **Stages of resolution.** Most of the training happens at 256², where a picture has
#   256 patches and not 4,096; the last stages are short and large, with rectangles
#   among the squares. Medium's model card lists 256, 512, 768, 1024 and 1440, and
#   random crops of a larger table of positions (chapter 5). With each stage the shift
#   grows.
# - **Memory.** A number of the model costs far more in training than in use: weight and
#   gradient in 16 bits, a copy, two moments and an average in 32. Before any
#   activation:

# %% tags=["active-ipynb"]
# for name in ("tiny", "sd35_medium", "sd35_large"):
#     with torch.device("meta"):
#         n = sum(p.numel() for p in MMDiT(getattr(MMDiTConfig, name)()).parameters())
#     print(f"{name:12} {n:13,} numbers: {2 * n / 1e9:7.3f} GB to draw, "
#         f"{(2 + 2 + 4 * 4) * n / 1e9:7.3f} GB to train")

# %% [markdown]
# Large does not fit on a card of 80 or 141 GB so. Sharded over 8 (`sharded` above),
# each keeps an eighth; Muon keeps one moment instead of two; LoRA (chapter 10) trains a
# few thousandths of the numbers and keeps the rest in 16 bits or fewer.
#
# To train the small model yourself, in a terminal: `minidiff train --output my-model`.
# Stop it when you like; the same line goes on. [How the shipped model was
# made](../book/training_log.md) tells what that takes. To teach a model your own
# pictures, each with its caption in a `.txt` beside it:
# `minidiff train --from tiny --lora --data my-pictures --output my-style`.

# %% [markdown]
# ## Exercises
#
# **7.1 Predict.** After how many steps does a moving average with decay $d = 0.999$
# give an old weight half of its first influence? Round to a whole number.

# %% tags=["active-ipynb", "exercise"]
# def half_life() -> int:
#     raise NotImplementedError  # steps

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_7_1() -> None:
#     left = 0.999 ** half_life()
#     assert abs(left - 0.5) < 3e-4, f"after so many steps {left:.4f} of it is left"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def half_life() -> int:
#     return round(math.log(0.5) / math.log(0.999))  # the influence after n steps is dⁿ
#
# exercise_7_1()
# print(half_life(), "steps, about 0.69 / (1 − d)")

# %% [markdown]
# **7.2 Code.** Write `uniform_levels`, which gives each sample a level that is uniform
# in [0, 1), as a function of the seed and of its number. The same seed may also make
# the samples' noise, by `rng.normal(seed, indices, shape)`: level and noise must not
# know of one another. (`rng.uniform(seed, indices, n)` gives n uniform numbers for
# each.)

# %% tags=["active-ipynb", "exercise"]
# def uniform_levels(indices: Tensor, seed: int) -> Tensor:
#     """Levels (B,) of the samples ``indices`` (B,)."""
#     raise NotImplementedError  # your code

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_7_2() -> None:
#     levels = uniform_levels(torch.arange(4000), 0)
#     assert levels.shape == (4000,), f"(4000,), not {tuple(levels.shape)}"
#     even = torch.linspace(0, 1, 4000)
#     assert (levels.sort().values - even).abs().max() < 0.05, "[0, 1) is not filled"
#     other = uniform_levels(torch.arange(4000), 1)
#     assert not torch.equal(other, levels), "another seed should give other levels"
#     again = uniform_levels(torch.tensor([7, 3]), 0)
#     assert torch.equal(again, levels[[7, 3]]), "a level depends on its number only"
#     numbers = torch.arange(4000)
#     order = torch.corrcoef(torch.stack([levels, numbers / 4000]))[0, 1]
#     assert order.abs() < 0.1, "the levels follow the numbers' order"
#     noise = rng.normal(0, numbers, (64,))
#     noise = torch.cat([noise, (noise.square() - 1) / 2**0.5], 1)  # (4000, 128)
#     near = noise[levels.argsort()].view(20, 200, 128)  # rows of levels that are near
#     assert near.mean(1).abs().max() < 6 / 200**0.5, "level and noise are related"

# %% tags=["active-ipynb", "solution", "hide-cell"]
# def uniform_levels(indices: Tensor, seed: int) -> Tensor:
#     return rng.uniform(rng.fold_in(seed, 1), indices, 1)[:, 0]  # a second stream
#
# exercise_7_2()

# %% [markdown]
# **7.3 Code.** Many trainers keep the rate constant and let it fall only at the end,
# because then nobody has to know the length of the run in advance. Write it: warm-up as
# before, constant until the last `cooldown` steps, then a straight line to zero at
# `config.steps`.

# %% tags=["active-ipynb", "exercise"]
# def with_cooldown(step: int, config: TrainingConfig, cooldown: int) -> float:
#     """The learning rate at ``step``."""
#     raise NotImplementedError  # your code

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_7_3() -> None:
#     for peak, cooldown in ((2.0, 20), (3.0, 40)):
#         c = TrainingConfig(100, 1, peak, warmup_steps=10)
#         rates = [with_cooldown(step, c, cooldown) for step in range(101)]
#         rates = torch.tensor(rates)
#         middle, end = rates[10 : 101 - cooldown], rates[100 - cooldown :]
#         steps = rates[:10].diff()
#         assert abs(rates[0] - peak / 10) < 1e-6, "a step has its share"
#         assert (steps - peak / 10).abs().max() < 1e-5, "warm-up is a straight line"
#         assert (middle - peak).abs().max() < 1e-6, "constant in the middle"
#         assert end[-1].abs() < 1e-6, "zero at the end"
#         line = (end.diff() + peak / cooldown).abs().max()
#         assert line < 1e-5, "the end is a straight line, as long as `cooldown`"

# %% tags=["active-ipynb", "solution", "hide-cell"]
# def with_cooldown(step: int, config: TrainingConfig, cooldown: int) -> float:
#     warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
#     left = (config.steps - step) / cooldown  # above 1 until the last steps
#     return config.learning_rate * min(warm, left)
#
# exercise_7_3()

# %% [markdown]
# **7.4 Predict,** then try on the toy: does `accumulation=4` change the weights after a
# run? Would it change CLIP's?

# %% tags=["active-ipynb", "hide-cell"]
# def weights(parts: int) -> Tensor:
#     config = TrainingConfig(60, 32, 1e-2, 60, accumulation=parts)
#     return nn.utils.parameters_to_vector(
#         fit(Task(toy_model(), toy_loss, toy_batch), config).parameters())
#
# once, text_side = weights(1).detach(), rng.normal(2, torch.arange(32), (16,))
# gap = (weights(4) - once).norm() / once.norm()
# print("the toy's weights differ by less than 1e-4:", (gap < 1e-4).item())
# image_side = text_side + rng.normal(3, torch.arange(32), (16,))
# for n in (32, 8):
#     pairs = zip(text_side.split(n), image_side.split(n))
#     losses = torch.stack(
#         [contrastive_loss(*pair, 5, torch.arange(n)) for pair in pairs])
#     print(f"CLIP's loss of 32 pairs in parts of {n}: {losses.mean():.2f}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# The toy's weights change by rounding only: a mean of four means is the mean. CLIP's
# loss is a mean over rows too, but each row is compared with its own part, so that a
# quarter has a quarter of the wrong pictures to tell apart: another, easier loss. On
# several devices the rows are gathered, and nothing changes.
#
# </details>
#
# **7.5 Explore.** Train the small model for 60 steps with prompts dropped never
# (`dropped=0.0`). What does the network then answer to the empty prompt, and what does
# guidance do to the pictures?

# %% tags=["active-ipynb", "hide-cell", "nbval-ignore-output"]
# never, _ = learn(train_set, 60, dropped=0.0)
# blank = {"context": empty[0].expand(16, -1, -1), "pooled": empty[1].expand(16, -1)}
# drawn = []
# for name, found in (("dropped in a tenth", album[60]), ("never dropped", never[60])):
#     loss = sum(loss_by_level(found, fixed | blank)) / 8
#     drawn.append(draw(found))
#     extreme = (drawn[-1].abs() >= 1).float().mean()
#     print(f"{name:18} loss with the empty prompt {loss:.2f}, values at their limit "
#         f"{100 * extreme:.0f} %")
# viz.show_images(torch.cat(drawn), 2 * [" on ".join(w) for w in wanted],
#     columns=8).captioned("Above dropped in a tenth, below never.")

# %% [markdown]
# <details><summary>Answer</summary>
#
# Never dropped, the empty prompt is a text that the network was not taught. Its answer
# $v_-$ is no nonsense (zero would cost more than 1), but nothing made it the average
# over all prompts, and guidance takes the difference from it three times. In this one
# run more values reach their limits.
#
# </details>

# %% [markdown]
# ## Summary
#
# You **wrote** four losses, and saw what the terms of one notice. You **made** batches
# from nothing but numbers. You **trained** a text-to-image model in half a minute and
# read from its curves that validation needs fixed levels. You **averaged** weights, and
# saw what that is worth at which rate. You **stopped** a run and finished it to the
# same bit. You **recognised** overfitting by the gap between two curves, and a wrong
# target by a validation of its own and by drawings. The next chapter puts all the parts
# together and draws.

# %% tags=["active-ipynb"]
# print(journey.meets("context", pipe.encode_prompt(journey.PROMPT)[0]))

# %% [markdown]
# ## Further reading
#
# - Esser et al. 2024, [Scaling Rectified Flow
#   Transformers](https://arxiv.org/abs/2403.03206): how SD3 was trained, section 5 and
#   appendix B.
# - Radford et al. 2021, [Learning Transferable Visual
#   Models](https://arxiv.org/abs/2103.00020), and Raffel et al. 2020, [Exploring the
#   Limits of Transfer Learning](https://arxiv.org/abs/1910.10683): CLIP and T5.
# - Karras et al. 2024, [Analyzing and Improving the Training Dynamics of Diffusion
#   Models](https://arxiv.org/abs/2312.02696): averages of weights, chosen afterwards.
# - Loshchilov and Hutter 2019, [Decoupled Weight Decay
#   Regularization](https://arxiv.org/abs/1711.05101): AdamW. Jordan et al. 2024,
#   [Muon](https://kellerjordan.github.io/posts/muon/), and Liu et al. 2025, [Muon is
#   Scalable for LLM Training](https://arxiv.org/abs/2502.16982).
