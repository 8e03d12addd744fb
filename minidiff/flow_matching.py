# %% [markdown]
r"""
# Flow matching: from noise to data along a velocity

In this chapter you build the **flow**: the path that joins noise and pictures, the loss
that teaches a network its direction, and the solvers that walk it backwards.

After it you will be able to

- **mix** a picture with noise and **name** the velocity of the mixture;
- **derive** the loss, and **convert** between velocity, noise and DDPM's coordinates;
- **choose** the noise levels to train on and the levels to visit when drawing;
- **train** a network with it, and **compare** that with the perfect answer;
- **solve** the flow with Euler, Heun and DPM++ 2M, and **measure** their error;
- **steer** it with classifier-free guidance, and **break** it.
"""

# %% [markdown]
# ## Where we are
#
# Chapter 5 built a network that takes a noisy latent, a noise level and a text, and
# answers with a velocity. A velocity of what, and what do we do with it? This chapter
# answers both. It needs no new network: everything here works on any function
# `velocity(x, sigma)`. We try it first in the plane, where the right answer is known
# exactly, and then on the latents of the shipped model.
#
# On a first reading you may jump over *The same thing in DDPM's words*, *The theorem,
# checked* and *The score*; guidance needs the last of them, for its reason.

# %% tags=["hide-input"]
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from minidiff.interface.checks import check_number

Velocity = Callable[[Tensor, Tensor], Tensor]

# %% tags=["active-ipynb", "hide-input"]
# import minidiff
# from minidiff import viz
# from minidiff.classroom import journey
# from minidiff.classroom.exercises import check
# from minidiff.classroom.journey import PROMPT, SEED
# from minidiff.judging.exam import share
#
# _ = torch.set_grad_enabled(False)
# viz.show_pipeline("flow_matching")

# %% [markdown]
# What arrives: the noise of our seed, and the velocity that the network of chapter 5
# gives for it at the highest noise level. Both have the shape of a latent.

# %% tags=["active-ipynb"]
# pipe = minidiff.load("tiny")
# context, pooled = pipe.encode_prompt(PROMPT)
# noise = pipe.prepare_latents(1, seed=SEED)
# velocity = pipe.transformer(noise, torch.ones(1), context, pooled)
# print(journey.meets("noise", noise))
# print(journey.meets("velocity", velocity))

# %% [markdown]
# ## A picture in the plane
#
# Let the data be points in the plane: two moons, 120 points in all. Give every data
# point its own draw of noise and join the two by a straight line. That is all that
# rectified flow does to the data (papers call the way from data to noise the *forward
# process*): no chain of small steps, no formula to remember.

# %% tags=["active-ipynb"]
# angle = torch.linspace(0, torch.pi, 60)
# moon = torch.stack([angle.cos(), angle.sin()], dim=-1)
# moons = torch.cat([moon, torch.tensor([1.0, 0.5]) - moon])
# centre, size = moons.mean(0), moons.std(0)
# moons = (moons - centre) / size
# z = torch.randn(120, 2, generator=torch.Generator().manual_seed(SEED))
# lines = torch.stack([z, moons])
# viz.show_points({"noise": z, "data": moons}, paths=lines, limits=(-3.2, 3.2))

# %% [markdown]
# The lines cross. Where two of them cross at the same $\sigma$, two travellers stand at
# the same place at the same time and want to go in different directions. A function
# `velocity(x, sigma)` can give only one answer there. The network learns the *average*
# of the directions, and following the averages gives paths that never meet in this way.
# We shall see them below.
#
# Why may we follow the averages? Think of very many travellers as a fluid. How much of
# it flows through a small region at level $\sigma$ is its density there times the
# *mean* velocity there; the single directions do not enter. Travellers who all walk at
# the mean velocity carry the same flow. So at every $\sigma$ they are spread as on the
# straight lines, and at $\sigma = 0$ as the data are; only who ends where is different.
# We shall write this down as an equation, and check it.
#
# ## The mathematics
#
# Time is the noise level $\sigma$, from 0 (data) to 1 (noise). On the line from a
# picture $x_0$ to noise $\epsilon$ we are at
#
# $$x_\sigma = (1-\sigma)\, x_0 + \sigma\, \epsilon, \qquad
# \epsilon \sim \mathcal N(0, 1),$$
#
# and the velocity along the line does not depend on $\sigma$:
#
# $$v = \frac{dx_\sigma}{d\sigma} = \epsilon - x_0.$$
#
# Whoever knows $x_\sigma$ and $v$ knows both ends,
#
# $$\hat x_0 = x_\sigma - \sigma v, \qquad \hat\epsilon = x_\sigma + (1-\sigma)\, v,$$
#
# and divides by nothing. That is why the network predicts $v$: from a predicted noise
# the picture is $(x_\sigma - \sigma\hat\epsilon)/(1-\sigma)$, a division by zero at
# $\sigma = 1$, where drawing begins; from a predicted picture the noise fails at the
# other end.
#
# | symbol | variable | meaning | shape in Tiny | in SD3.5 at 1024² |
# |---|---|---|---|---|
# | $\sigma$ | `sigma` | noise level, 0 to 1 | () or (B,) | the same |
# | $x_0$ | `x0` | data: a scaled latent | (B, 16, 16, 16) | (B, 16, 128, 128) |
# | $\epsilon$ | `noise` | Gaussian noise | as $x_0$ | as $x_0$ |
# | $x_\sigma$ | `x` | the mixture | as $x_0$ | as $x_0$ |
# | $v$ | `v` | velocity, what the network predicts | as $x_0$ | as $x_0$ |
# | $\hat x_0$ | `x0_hat` | the data that $v$ points to | as $x_0$ | as $x_0$ |
# | $s$ | `shift` | moves levels towards 1 | 1.0 | 3.0 |
#
# ## Build it: the path
#
# A batch may have one noise level for all, or one for each picture. In the second case
# the levels need trailing axes before they can multiply the pictures.


# %%
def expand(sigma: Tensor | float, x: Tensor) -> Tensor | float:
    """``sigma``, a number or (B,), with enough axes to multiply ``x`` (B, …)."""
    if not isinstance(sigma, Tensor) or sigma.ndim == 0:
        return sigma
    return sigma.reshape(-1, *(1 for _ in x.shape[1:]))  # (B,) → (B, 1, 1, 1)


# %% [markdown]
# The mixture $x_\sigma = (1-\sigma)\,x_0 + \sigma\,\epsilon$ and its velocity
# $\epsilon - x_0$:


# %%
def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """The point at noise level ``sigma`` on the line from ``x0`` to ``noise``.

    ``x0`` and ``noise`` (B, …), ``sigma`` a number or (B,) in [0, 1]. Liu et al. 2023
    (Flow Straight and Fast), equation 1; Esser et al. 2024, equation 13.
    """
    sigma = expand(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """The velocity dx/dσ of the path, the same at every σ: what the network learns."""
    return noise - x0


# %% [markdown]
# Backwards, from a point and a velocity to the two ends of the line:


# %%
def denoised(x: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    """The data x̂₀ that velocity ``v`` at ``x`` and level ``sigma`` points back to."""
    return x - expand(sigma, x) * v


def predicted_noise(x: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    """The estimate of the noise that velocity ``v`` at ``x`` points forward to."""
    return x + (1 - expand(sigma, x)) * v


# %% tags=["active-ipynb"]
# from minidiff.data.samples import sample_scenes
#
# images, captions = sample_scenes()
# levels = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0])
# scene = images[:1].expand(8, -1, -1, -1)
# static = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(SEED))
# viz.show_trajectory({"x": interpolate(scene, static, levels)}, levels)

# %% [markdown]
# This is a real scene, mixed with noise pixel by pixel, only for the eye: the model
# mixes latents. Notice how late it disappears. At $\sigma = 0.6$ there is more noise
# than picture in every pixel, and the garment is still plain to see, because the eye
# averages over many pixels. We shall need this observation.
#
# ### The same thing in DDPM's words
#
# Older models (DDPM, the denoising diffusion probabilistic models, and with them Stable
# Diffusion 1 and 2) mix with other weights,
# $\sqrt{\bar\alpha}\,x_0 + \sqrt{1-\bar\alpha}\,\epsilon$, chosen so that the variance
# stays constant, and most of their networks predict $\epsilon$, the noise. (Stable
# Diffusion 2 at 768² predicts $\sqrt{\bar\alpha}\,\epsilon - \sqrt{1-\bar\alpha}\,x_0$,
# which is also called $v$ and is not ours.) Divide our mixture by
# $\sqrt{(1-\sigma)^2 + \sigma^2}$ and it is of that form, with
#
# $$\bar\alpha = \frac{(1-\sigma)^2}{(1-\sigma)^2 + \sigma^2}.$$


# %%
def alpha_bar(sigma: Tensor | float) -> Tensor | float:
    """DDPM's ᾱ at the same signal-to-noise ratio: (1−σ)² / ((1−σ)² + σ²)."""
    return (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)


def to_variance_preserving(x: Tensor, sigma: Tensor | float) -> Tensor:
    """``x`` of the straight path, rescaled to DDPM's √ᾱ x₀ + √(1−ᾱ) ε."""
    sigma = expand(sigma, x)
    return x / ((1 - sigma) ** 2 + sigma**2) ** 0.5


# %% [markdown]
# So a velocity model is a noise model in other coordinates, and a step of the one is a
# step of the other. DDIM, the deterministic sampler of the older models, rebuilds the
# mixture at the next level from $\hat x_0$ and $\hat\epsilon$. Compare it with one
# straight step along the velocity, from 0.8 to 0.5:

# %% tags=["active-ipynb"]
# x = interpolate(images[:1], static, 0.8)
# v = 0.3 * x.roll(1, -1) + 0.1  # any prediction will do
# straight = to_variance_preserving(x + (0.5 - 0.8) * v, 0.5)
# bar = alpha_bar(0.5)
# ddim = bar**0.5 * denoised(x, v, 0.8) + (1 - bar) ** 0.5 * predicted_noise(x, v, 0.8)
# print("a straight step is a DDIM step:", torch.allclose(straight, ddim, atol=1e-5))

# %% [markdown]
# ## The loss
#
# Draw data, draw noise, draw a level; ask the network for the velocity at the mixture;
# compare with $\epsilon - x_0$:
#
# $$L = \mathbb E_{x_0, \epsilon, \sigma}\, \lVert v_\theta(x_\sigma, \sigma) -
# (\epsilon - x_0) \rVert^2 .$$
#
# In code the mean over all numbers stands for the square of the norm.


# %%
def flow_matching_loss(
    velocity: Velocity, x0: Tensor, noise: Tensor, sigma: Tensor
) -> Tensor:
    """Mean squared error of ``velocity(x, sigma)`` on the straight path; a scalar.

    ``x0`` and ``noise`` (B, …), ``sigma`` (B,) in [0, 1]. Lipman et al. 2023 (Flow
    Matching for Generative Modeling), equation 9.
    """
    v = velocity(interpolate(x0, noise, sigma), sigma)
    return (v.float() - velocity_target(x0, noise)).square().mean()


# %% [markdown]
# Which function makes this loss smallest? Squared error is minimised by the mean: the
# best velocity at $(x, \sigma)$ is the average of $\epsilon - x_0$ over all lines that
# pass there. On every such line $\epsilon = (x - (1-\sigma) x_0)/\sigma$, therefore
# $\epsilon - x_0 = (x - x_0)/\sigma$, and in the average only $x_0$ is unknown:
#
# $$v^*(x, \sigma) = \mathbb E[\epsilon - x_0 \mid x]
# = \frac{x - \mathbb E[x_0 \mid x]}{\sigma}.$$
#
# For a finite data set the expectation is a sum. Point $i$ is the origin of $x$ with a
# probability proportional to the Gaussian density
# $\exp(-\lVert x - (1-\sigma)x_i\rVert^2 / 2\sigma^2)$: a softmax. So in the plane
# we can write down the perfect network.


# %%
def exact_velocity(points: Tensor) -> Velocity:
    """The velocity of least loss for a data set ``points`` (M, D), for x (N, D)."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        distance = torch.cdist(x, (1 - sigma) * points)  # (N, D) → (N, M)
        weights = (-(distance**2) / (2 * sigma**2)).softmax(-1)
        return (x - weights @ points) / sigma  # (N, M) · (M, D) → (N, D)

    return velocity


# %% tags=["active-ipynb"]
# perfect = exact_velocity(moons)
# many = moons.repeat(500, 1)
# mixed = torch.randn(many.shape, generator=torch.Generator().manual_seed(1))
# for level in (0.9, 0.5, 0.1):
#     sigma = torch.tensor(level)
#     loss = flow_matching_loss(perfect, many, mixed, sigma)
#     print(f"sigma {level}: the smallest possible loss is {loss:.1f}")

# %% [markdown]
# The smallest loss is not zero, and no training can make it so: it is the spread of the
# directions that cross at a point. Do not judge a flow model by the size of its loss;
# only differences mean something.
#
# Here is the perfect field. The dots are the data times $1-\sigma$, where a point's
# noise has its centre at this level. An arrow shows the direction in which $\sigma$
# *falls*, which is the way we shall walk; how fast, says its colour. At $\sigma = 0.9$
# all arrows aim at the middle of the data: from almost pure noise the best guess is the
# mean. At 0.5 the field begins to choose a moon. At 0.15 each arrow aims at the nearest
# data, and the faster the farther away it begins: no noise of this level leads
# there.

# %% tags=["active-ipynb"]
# side = torch.linspace(-3, 3, 13)
# grid = torch.cartesian_prod(side, side)
# fields = {}
# for level in (0.9, 0.5, 0.15):
#     arrows = -perfect(grid, torch.tensor(level))
#     fields[f"σ = {level}"] = ((1 - level) * moons, grid, arrows)
# viz.show_fields(fields)

# %% [markdown]
# Read `exact_velocity` once more: scores, a softmax, a weighted mean. It is the
# attention of chapter 4, with $x$ as query and the data as keys and values:
#
# $$-\frac{\lVert x - (1-\sigma)x_i\rVert^2}{2\sigma^2} = \frac{1-\sigma}{\sigma^2}\,
# x \cdot x_i - \frac{(1-\sigma)^2}{2\sigma^2}\lVert x_i\rVert^2 + \text{const},$$
#
# a dot product and a number for each key. Statisticians know it as *kernel regression*.
# It also tells what the perfect network does: it keeps all of its data, and looks them
# up.
#
# ### The theorem, checked
#
# Now the paragraph on fluids as an equation. Let $p_\sigma$ be the density of the
# travellers at level $\sigma$. Averages may be followed because $v^*$ satisfies the
# *continuity equation*
#
# $$\frac{\partial p_\sigma}{\partial \sigma} + \nabla \cdot (p_\sigma\, v^*) = 0:$$
#
# what a place gains is what flows in. The proof takes three steps. Take any smooth
# function $f$ of the place. Along the lines, $\frac{d}{d\sigma}\,\mathbb E f(x_\sigma)
# = \mathbb E\,[\nabla f(x_\sigma) \cdot (\epsilon - x_0)]$. Once $x_\sigma$ is known,
# only the mean of $\epsilon - x_0$ counts, which is $v^*$; so the right side is $\int
# p_\sigma\, \nabla f \cdot v^* dx = -\int f\, \nabla \cdot (p_\sigma v^*)\, dx$. And as
# this holds for any $f$, the equation holds at every place.
#
# Here $p_\sigma$ is a mean of 120 Gaussians, so that both terms can be computed. What
# is left of their sum, as a share of the first? Beside it, the same for a velocity that
# is no average of the lines: from everywhere straight to the mean of the data.

# %% tags=["active-ipynb"]
# points, h = moons.double(), 1e-4
# places = torch.cartesian_prod(*[torch.linspace(-2, 2, 41).double()] * 2)
#
# def density(x: Tensor, sigma: float) -> Tensor:
#     square = torch.cdist(x, (1 - sigma) * points) ** 2  # (N, 2) → (N, 120)
#     return (-square / (2 * sigma**2)).exp().mean(-1) / (2 * torch.pi * sigma**2)
#
# def left_over(velocity, sigma: float) -> float:
#     def flow(x: Tensor) -> Tensor:
#         return density(x, sigma)[:, None] * velocity(x, sigma)
#
#     change = (density(places, sigma + h) - density(places, sigma - h)) / (2 * h)
#     x, y = h * torch.eye(2).double()
#     out = (flow(places + x) - flow(places - x))[:, 0]
#     out = (out + (flow(places + y) - flow(places - y))[:, 1]) / (2 * h)
#     return ((change + out).norm() / change.norm()).item()

# %% tags=["active-ipynb"]
# to_mean = lambda x, sigma: (x - points.mean(0)) / sigma
# for level in (0.8, 0.5, 0.3):
#     ours, other = (left_over(v, level) for v in (exact_velocity(points), to_mean))
#     assert ours < 1e-4, ours
#     print(f"sigma {level}: less than 0.0001; towards the mean {other:.2f}")

# %% [markdown]
# ### The score
#
# Much of the literature speaks of another field, the *score*: the slope of the
# logarithm of the density, $s_\sigma(x) = \nabla_x \ln p_\sigma(x)$. It points to where
# points are denser. Differentiate one of the Gaussians and it is multiplied by $-(x -
# (1-\sigma)x_i)/\sigma^2$, which is $-\epsilon/\sigma$ on its line. Averaged over the
# lines,
#
# $$s_\sigma(x) = -\frac{\mathbb E[\epsilon \mid x]}{\sigma}, \qquad
# v^*(x, \sigma) = -\frac{x + \sigma\, s_\sigma(x)}{1 - \sigma};$$
#
# the second, because $v = (\epsilon - x)/(1-\sigma)$ on every line. Who knows the
# velocity knows the best estimate of the noise and the score, and the other way round.
# Noise models, score models and flow models are one thing in three coordinates.


# %%
def score(x: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    """The slope ∇ ln p of the density at ``x`` and ``sigma`` > 0, from velocity ``v``.

    Vincent 2011 (A connection between score matching and denoising autoencoders).
    """
    return -predicted_noise(x, v, sigma) / expand(sigma, x)


# %% tags=["active-ipynb"]
# v = exact_velocity(points)(places, 0.5)
# with torch.enable_grad():
#     x = places.clone().requires_grad_()
#     (slope,) = torch.autograd.grad(density(x, 0.5).log().sum(), x)
# print("the score is the slope of ln p:", torch.allclose(score(places, v, 0.5), slope))

# %% [markdown]
# ### A network that has to learn it
#
# A network keeps no list of its data. So let a small one find the field, by nothing but
# our loss: four linear layers, 3,000 steps. Like every network of this kind it is told
# the level in a few waves.

# %% tags=["active-ipynb"]
# torch.manual_seed(SEED)
# widths = [(10, 128), (128, 128), (128, 128), (128, 2)]
# layers = [torch.nn.Linear(*pair) for pair in widths]
#
# def learned(x: Tensor, sigma: Tensor) -> Tensor:
#     level = sigma.expand(len(x))[:, None] * torch.pi  # () or (N,) → (N, 1)
#     waves = level * torch.tensor([1.0, 2.0, 4.0, 8.0])  # (N, 4)
#     h = torch.cat([x, waves.sin(), waves.cos()], dim=-1)  # (N, 10)
#     for layer in layers[:-1]:
#         h = torch.nn.functional.silu(layer(h))
#     return layers[-1](h)

# %% tags=["active-ipynb"]
# optimizer = torch.optim.Adam(torch.nn.ModuleList(layers).parameters(), lr=3e-3)
# slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3000)
# dice, losses = torch.Generator().manual_seed(SEED), []
# with torch.enable_grad():
#     for step in range(3000):
#         chosen = moons[torch.randint(120, (256,), generator=dice)]
#         drop = torch.randn(256, 2, generator=dice)
#         sigma = torch.rand(256, generator=dice)  # uniform levels
#         loss = flow_matching_loss(learned, chosen, drop, sigma)
#         losses.append(loss.detach())
#         loss.backward()
#         optimizer.step()
#         optimizer.zero_grad()
#         slower.step()

# %% tags=["active-ipynb"]
# def average_loss(field) -> Tensor:
#     levels = (torch.arange(50) + 0.5) / 50
#     given = field, many[:12_000], mixed[:12_000]
#     return torch.stack([flow_matching_loss(*given, sigma) for sigma in levels]).mean()
#
# floor, reached = average_loss(perfect), average_loss(learned)
# smooth = torch.stack(losses).unflatten(0, (-1, 50)).mean(1)  # (3000,) → (60,)
# steps = torch.arange(25, 3000, 50)
# curves = {"training": (steps, smooth), "exact": (steps, floor.expand(60))}
# viz.show_curves(curves, "step", "loss").captioned(
#     "The loss of the small network, each point a mean over 50 steps, and the floor: "
#     "the loss of the perfect field, the mean of 50 levels.")

# %% tags=["active-ipynb", "nbval-ignore-output"]
# print(f"loss over 50 levels: perfect {floor:.3f}, learned {reached:.3f}")

# %% [markdown]
# The floor is not zero, and the curve comes to rest a little above it. Is that little
# gap a failure? We shall draw with both fields, and see what it does.

# %% [markdown]
# ## Which noise levels to train on
#
# Drawing $\sigma$ uniformly spends equal effort everywhere. But at the two ends there
# is little to learn: near 1 the answer is the noise less the mean of the data (with a
# caption: of its pictures, and that must be learned, as we shall see), near 0 the
# picture is already there. SD3 draws levels whose *logit* $\ln\frac{\sigma}{1-\sigma}$
# is normal, which puts most of them in the middle. In the comparison of the SD3 paper
# (section 5.1) this choice, with mean 0 and standard deviation 1, did best overall.
# With mean $m$ and standard deviation $d$ (`mean`, `std`) the density of such levels is
#
# $$p(\sigma) = \frac{1}{d \sqrt{2\pi}} \cdot \frac{1}{\sigma(1-\sigma)} \cdot
# \exp\Bigl(-\frac{(\operatorname{logit}\sigma - m)^2}{2 d^2}\Bigr),$$
#
# where $1/(\sigma(1-\sigma))$ is the derivative of the logit.


# %%
def sample_sigmas_uniform(
    n: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """``n`` noise levels (n,), uniform in [0, 1)."""
    return torch.rand(n, generator=generator, device=device)


def sample_sigmas_logit_normal(
    n: int,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """``n`` noise levels (n,) whose logit is normal; Esser et al. 2024, section 3.1."""
    return (mean + std * torch.randn(n, generator=generator, device=device)).sigmoid()


def logit_normal_density(sigma: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Density of :func:`sample_sigmas_logit_normal`; Esser et al. 2024, equation 19."""
    z = (sigma.logit() - mean) / std
    return (-(z**2) / 2).exp() / (std * (2 * torch.pi) ** 0.5 * sigma * (1 - sigma))


# %% tags=["active-ipynb"]
# x0 = pipe.vae.scale(pipe.vae.encode(images[:8]).mode())
# texts = pipe.encode_prompt(captions[:8])
# drown = torch.randn(x0.shape, generator=torch.Generator().manual_seed(SEED))
# network = lambda x, sigma: pipe.transformer(x, sigma, *texts)
# levels = torch.linspace(0.02, 0.98, 17)
# losses = [flow_matching_loss(network, x0, drown, s.expand(8)) for s in levels]

# %% tags=["active-ipynb"]
# curves = {"loss of the shipped model": (levels, torch.stack(losses)),
#     "logit-normal density": (levels, logit_normal_density(levels))}
# viz.show_curves(curves, xlabel="noise level σ", markers=True)

# %% [markdown]
# These are scenes that the model has not seen, and its loss rises towards both ends.
# Near 1 hardly more is known of the scene than its caption, and what is unknown cannot
# be predicted. Near 0 it is the noise that is unknown: so little of it is left in $x$
# that it cannot be told from texture, and an answer without it costs its variance, 1
# (at the lowest level the model, which saw few such levels, does still worse). The
# logit-normal density deliberately does not follow the loss: an error in the velocity
# moves $\hat x_0$ by $\sigma$ times as much, so that errors at faint noise are cheap.
# But this density is not the last word. Chapter 5 measured that the caption counts most
# at high noise; above 0.8 this density has fewer than one sample in ten. A recipe may
# therefore move it towards noise, by the shift of the next section ([how the shipped
# model was made](../book/training_log.md)).
#
# ### Shift: larger pictures need more noise
#
# Remember the garment that was plain to see at $\sigma = 0.6$. Averaging $s \times s$
# pixels divides the noise by $s$ and leaves the picture. So on a picture with $s$ times
# the side, the same $\sigma$ destroys less. To destroy equally much, the odds
# $\sigma / (1-\sigma)$ must be multiplied by $s$:
#
# $$\sigma' = \frac{s\,\sigma}{1 + (s-1)\,\sigma}.$$


# %%
def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Noise levels moved towards 1 by ``shift``; Esser et al. 2024, equation 23."""
    return shift * sigma / (1 + (shift - 1) * sigma)


# %% tags=["active-ipynb"]
# pool = torch.nn.functional.avg_pool2d
# large, small = images[:1], pool(images[:1], 4)
# sigma = torch.tensor(0.6)
# calm = shift_sigma(sigma, 1 / 4)
# noises = [static, static[..., :16, :16]]
# mixes = [pool(interpolate(large, noises[0], sigma), 4) / (1 - sigma)]
# mixes += [interpolate(small, noises[1], s) / (1 - s) for s in (sigma, calm)]

# %% tags=["active-ipynb"]
# titles = ["64², σ 0.60, averaged", "16², σ 0.60", f"16², σ {calm:.2f}"]
# pictures = torch.cat(mixes).clamp(-1, 1)
# viz.show_images(pictures, titles, columns=3)

# %% [markdown]
# All three are divided by $1 - \sigma$, to full contrast. The first had the noise level
# of the second, and is as clear as the third, whose odds are a quarter. From 256² to
# 1024² this rule would ask for $s = 4$. Esser et al. showed people pictures: all shifts
# above 1.5 were liked better than none, with little between them, so that SD3 trains
# and draws at 1024² with $s = 3$ (section 5.3.2). The tiny model, at 64², draws with
# $s = 1$, no shift at all. (What to train on and what to visit are two choices.)
#
# ## Which noise levels to visit
#
# A drawing in $N$ steps visits $N + 1$ levels from 1 down to 0. SD3.5's list has a
# quirk that must be kept, because diffusers and the reference code both draw with it:
# the shift is applied twice at the low end. The lowest training level is 1/1000. The
# even spacing runs from 1 down to that level *shifted*, and the result is shifted
# again.


# %%
def sigma_schedule(
    steps: int, shift: float = 3.0, num_train_timesteps: int = 1000
) -> Tensor:
    """The noise levels of a drawing in ``steps`` steps, (steps + 1,), from 1 down to 0.

    Evenly spaced from 1 to the shifted lowest training level, then shifted again: the
    published models are drawn with this double shift. Raises ValueError for steps < 1
    and for shift ≤ 0.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    if shift <= 0:
        raise ValueError(f"shift is {shift}; expected a positive number")
    lowest = shift_sigma(torch.tensor(1 / num_train_timesteps), shift).item()
    even = torch.linspace(1, lowest, steps, dtype=torch.float64)
    shifted = shift_sigma(even, shift).float()
    return torch.cat([shifted, torch.zeros(1)])  # (steps,) → (steps + 1,)


# %% tags=["active-ipynb"]
# lowest = 3 * 0.001 / (1 + 2 * 0.001)
# even = [1 + (lowest - 1) * i / 3 for i in range(4)]
# by_hand = [3 * t / (1 + 2 * t) for t in even] + [0]
# print("by hand:", [round(sigma, 4) for sigma in by_hand])
# print("the same:", torch.allclose(torch.tensor(by_hand), sigma_schedule(4)))
# print("shifted once, the last level would be", round(lowest, 4))

# %% tags=["active-ipynb"]
# curves = {f"shift {shift}": sigma_schedule(28, shift) for shift in (1.0, 3.0, 6.0)}
# viz.show_curves(curves, xlabel="step", ylabel="noise level σ")

# %% [markdown]
# With shift 3 half of the steps are spent above $\sigma = 0.75$. A folder on the hub
# fixes its schedule by two numbers:


# %%
@dataclass(frozen=True)
class Scheduler:
    """The two numbers of the hub's scheduler_config.json that fix a schedule.

    ``solvers``: those that can follow it. ``usual``: the steps and guidance that this
    schedule itself asks for; None where they are the model's.
    """

    shift: float = 3.0
    num_train_timesteps: int = 1000
    solvers: ClassVar[tuple[str, ...]] = ("euler", "heun", "dpmpp_2m")

    @property
    def usual(self) -> tuple[int, float] | None:
        return None

    def sigmas(self, steps: int) -> Tensor:
        """:func:`sigma_schedule` with this shift, (steps + 1,)."""
        return sigma_schedule(steps, self.shift, self.num_train_timesteps)

    def told(self, sigmas: Tensor) -> Tensor:
        """What the network is told at ``sigmas`` (S + 1,): here the levels themselves.

        The network of chapter 9 is told how far it is to go, too.
        """
        return sigmas


# %% [markdown]
# ## Solvers
#
# To draw, start from noise at $\sigma = 1$ and solve $dx/d\sigma = v(x, \sigma)$ down
# to $\sigma = 0$. The naive way: one traveller at a time, and from each level a
# straight line to the next.


# %%
def euler_loops(velocity: Velocity, x: Tensor, sigmas: Tensor) -> Tensor:
    """Euler's method, one row of ``x`` (N, D) at a time."""
    rows = []
    for row in x.split(1):  # N × (1, D)
        for i in range(len(sigmas) - 1):
            v = velocity(row, sigmas[i])
            row = row + (sigmas[i + 1] - sigmas[i]) * v
        rows.append(row)
    return torch.cat(rows)  # N × (1, D) → (N, D)


# %% [markdown]
# Rows do not meet, so the inner loop can move all of them at once, and that is all the
# vectorising there is. The function that the package exports adds one thing: after
# every step a callback may look at the state, or replace it. Progress bars, previews
# and inpainting are such callbacks.

# %%
Callback = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]


def end_step(
    callback: Callback | None, step: int, sigma: Tensor, x: Tensor, x0_hat: Tensor
) -> Tensor:
    """``x``, or what ``callback(step, sigma, x, x0_hat)`` puts in its place."""
    replaced = callback(step, sigma, x, x0_hat) if callback else None
    return x if replaced is None else replaced


# %%
def euler(
    velocity: Velocity, x: Tensor, sigmas: Tensor, callback: Callback | None = None
) -> Tensor:
    """Follow ``velocity`` from ``x`` (B, …) at ``sigmas[0]`` to the last; order 1.

    ``velocity(x, sigma)`` takes sigma as a tensor without axes. ``callback(step, sigma,
    x, x0_hat)`` is called after each step with the level the step left, the new state
    and the step's estimate of the data; a tensor that it returns replaces the state.
    """
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        v = velocity(x, sigma)
        x0_hat = denoised(x, v, sigma)
        x = end_step(callback, step, sigma, x + (sigma_next - sigma) * v, x0_hat)
    return x


# %% tags=["active-ipynb"]
# sigmas = sigma_schedule(32, shift=1.0)
# one_by_one = euler_loops(perfect, z, sigmas)
# at_once = z
# for i in range(32):
#     v = perfect(at_once, sigmas[i])
#     at_once = at_once + (sigmas[i + 1] - sigmas[i]) * v
# track = [z]
# drawn = euler(perfect, z, sigmas, lambda step, sigma, x, x0_hat: track.append(x))

# %% tags=["active-ipynb"]
# print("loops and batch agree:", torch.allclose(one_by_one, at_once, atol=1e-4))
# print("batch and euler agree:", torch.allclose(at_once, drawn, atol=1e-4))
# points = {"noise": z, "drawn": drawn}
# viz.show_points(points, paths=torch.stack(track), limits=(-3.2, 3.2))

# %% [markdown]
# The same noise and the same data as in the first figure, and now no two travellers are
# ever at the same place at the same $\sigma$. All of them first head for the middle;
# then they part. The paths are bent, though each line was straight, because averages
# bend them. That is why one step is not enough, and why better solvers exist. (Liu et
# al. train once more, on pairs of noise and what the flow made of it: this *reflow*
# straightens the paths. SD3 does without it.)
#
# ### Memory, and a picture that nobody drew
#
# Now let both fields, the perfect and the learned, carry 2,000 points of fresh noise.
# How many arrive within 0.005 of a point of the data? For scale the same share of 2,000
# points drawn truly from the moons, by the formula that made the data.

# %% tags=["active-ipynb"]
# def draw_moons(turns: Tensor) -> Tensor:
#     """Points of both moons, at places ``turns`` (2, N) in [0, 1): (2·N, 2)."""
#     angle = torch.pi * turns
#     upper, lower = torch.stack([angle.cos(), angle.sin()], dim=-1)
#     return (torch.cat([upper, torch.tensor([1.0, 0.5]) - lower]) - centre) / size
#
# dice = torch.Generator().manual_seed(7)
# fresh = torch.randn(2000, 2, generator=dice)
# turns = torch.rand(2, 1000, generator=dice)
# fine = sigma_schedule(64, shift=1.0)
# ends = {"exact": euler(perfect, fresh, fine), "learned": euler(learned, fresh, fine)}
# panels = {name: {"drawn": x[:800], "data": moons} for name, x in ends.items()}
# viz.show_points(panels, limits=(-2.2, 2.2)).captioned(
#     "800 of 2,000 points of noise after 64 steps along each field; the 120 of data.")

# %% tags=["active-ipynb", "nbval-ignore-output"]
# shares = {"exact field": ends["exact"], "learned field": ends["learned"]}
# print(f"near a point of the data {'within 0.005':>15} {'within 0.1':>15}")
# for name, x in (shares | {"drawn from the moons": draw_moons(turns)}).items():
#     close = torch.cdist(x, moons).amin(1)
#     print(f"{name:24} {share(close < 0.005):>15} {share(close < 0.1):>15}")

# %% [markdown]
# Each line counts 2,000 points, and the brackets are where the true share lies 19 times
# of 20. The perfect field *memorises*: it has nothing to give but its data. The learned
# one draws points that nobody gave it. Most lie near the moons, but hardly on them: of
# points truly drawn there, many more come so close to one of the data. It did not know
# that the moons are thin. It cannot follow every jump of the perfect field near $\sigma
# = 0$ and smooths them over, and that is all of its art. A flow model makes new
# pictures because it does *not* reach the least loss. That alone does not make them
# good ones, as the points between the moons show. Chapter 7 gives a network so few
# pictures that it begins to learn them by heart.
#
# ### Two better solvers
#
# Euler follows a bent path by straight pieces, each along the velocity at its
# beginning. Two other solvers find a better direction for the same piece.
#
# **Heun** looks ahead: it makes the Euler step, asks for the velocity at the far end,
# and walks along the mean of the two. Its error falls with the *square* of the step:
# Heun has *order* 2, Euler order 1. The price is two calls a step. A step to
# $\sigma = 0$ stays Euler's, because the network was not trained to say anything there.


# %%
def heun(
    velocity: Velocity, x: Tensor, sigmas: Tensor, callback: Callback | None = None
) -> Tensor:
    """As :func:`euler`, of order 2 with two calls a step (one for a step to σ = 0).

    Karras et al. 2022 (EDM), algorithm 1.
    """
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        v = velocity(x, sigma)
        x0_hat = denoised(x, v, sigma)
        if sigma_next > 0:
            ahead = velocity(x + (sigma_next - sigma) * v, sigma_next)
            v = (v + ahead) / 2
        x = end_step(callback, step, sigma, x + (sigma_next - sigma) * v, x0_hat)
    return x


# %% [markdown]
# **DPM++ 2M** (of DPM-Solver++, a solver for diffusion probabilistic models; second
# order, multistep) is the default of the reference code. It asks once a step and still
# has order 2, because it remembers. Write the flow as $dx/d\sigma = (x - \hat
# x_0)/\sigma$. If $\hat x_0$ were constant, $x - \hat x_0$ would shrink in proportion
# to $\sigma$, and one step would be exact however long:
#
# $$x' = \frac{\sigma'}{\sigma}\,x + \Bigl(1 - \frac{\sigma'}{\sigma}\Bigr)\hat x_0,$$
#
# which is Euler's step, written differently. But $\hat x_0$ changes on the way. As in
# the midpoint rule, its value half-way serves better than that at the beginning, and
# gives order 2. Let it change linearly in $-\ln\sigma$, a time in which this step is
# $h = \ln(\sigma/\sigma')$ long and the one before, with its estimate $\hat x_{0,-}$,
# was $h_-$ long. The line through both estimates is half-way at
# $\hat x_0 + \frac{h}{2 h_-}(\hat x_0 - \hat x_{0,-})$. The first step has no memory,
# and the last goes to $\sigma' = 0$, where $h$ is infinite: both are plain Euler steps.


# %%
def dpmpp_2m(
    velocity: Velocity, x: Tensor, sigmas: Tensor, callback: Callback | None = None
) -> Tensor:
    """As :func:`euler`, of order 2 with one call a step: the last estimate is reused.

    Lu et al. 2022 (DPM-Solver++), algorithm 2, in the logarithm of σ as the reference
    code of SD3.5 has it. ``sigmas`` must fall.
    """
    past: tuple[Tensor, Tensor] | None = None  # the last estimate, and its step
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0_hat = denoised(x, velocity(x, sigma), sigma)
        h, x0 = (sigma / sigma_next).log(), x0_hat
        if past is not None and sigma_next > 0:
            last, h_last = past
            x0 = x0_hat + h / (2 * h_last) * (x0_hat - last)
        shrink = sigma_next / sigma
        x = end_step(callback, step, sigma, shrink * x + (1 - shrink) * x0, x0_hat)
        past = x0_hat, h
    return x


# %% [markdown]
# ### Error over steps
#
# In the plane first. The measure is the distance from a very fine solution, and what we
# count is calls: a step of Heun costs two. We stop at $\sigma = 0.3$: close to the data
# the perfect field of a finite set jumps from point to point, which says nothing about
# solvers.

# %% tags=["active-ipynb"]
# def errors(velocity, x, schedules: list[Tensor], exact: Tensor) -> dict:
#     def counted(x: Tensor, sigma: Tensor) -> Tensor:
#         calls.append(sigma)
#         return velocity(x, sigma)
#
#     curves = {}
#     for solve in (euler, heun, dpmpp_2m):
#         counts, sizes = [], []
#         for sigmas in schedules:
#             calls = []
#             sizes.append((solve(counted, x, sigmas) - exact).norm() / exact.norm())
#             counts.append(len(calls))
#         curves[solve.__name__] = (counts, torch.stack(sizes))
#     return curves

# %% tags=["active-ipynb"]
# levels = [torch.linspace(1, 0.3, n + 1).double() for n in (4, 8, 16, 32, 64)]
# precise, start = exact_velocity(moons.double()), z.double()
# exact = heun(precise, start, torch.linspace(1, 0.3, 1001).double())
# plane = errors(precise, start, levels, exact)
# axes = {"xlabel": "calls of the velocity", "ylabel": "relative error"}
# viz.show_curves(plane, **axes, logx=True, logy=True, markers=True)

# %% tags=["active-ipynb"]
# for name, (calls, error) in plane.items():
#     order = torch.log2(error[-2] / error[-1])
#     print(f"{name:9} halving the step divides the error by {2**order.item():.1f}")

# %% [markdown]
# Euler's error falls in proportion to the step, that of the other two with its square.
# Now the same on latents, with the shipped model as the velocity, and with two lists of
# levels: the published one, and an even one without the small last level 0.001. The
# fine solution is Heun in 120 even steps. Write down what you expect of DPM++ 2M: as in
# the plane?

# %% tags=["active-ipynb"]
# def model(x: Tensor, sigma: Tensor) -> Tensor:
#     return pipe.transformer(x, sigma.expand(len(x)), context, pooled)
#
# even = lambda n, shift=1.0: torch.linspace(1, 0, n + 1)
# lists, counts = {"published": sigma_schedule, "even": even}, (8, 16, 32)
# exact = heun(model, noise, even(120))
# latent = {name: errors(model, noise, [f(n, shift=1.0) for n in counts], exact)
#     for name, f in lists.items()}

# %% tags=["active-ipynb", "hide-output", "nbval-ignore-output"]
# for name, curves in latent.items():
#     print(f"{name} levels, {counts} steps")
#     for solver, (calls, error) in curves.items():
#         halved = [f"÷{a / b:.1f}" for a, b in pairwise(error.tolist())]
#         print(f"  {solver:9}", [f"{e:.3f}" for e in error.tolist()], *halved)

# %% tags=["active-ipynb", "hide-output"]
# curves = {f"{solver}, {name}": curve for name, found in latent.items()
#     for solver, curve in found.items()}
# viz.show_curves(curves, **axes, logx=True, logy=True, markers=True).captioned(
#     "Error of the drawn latent against calls of the network: three solvers on the "
#     "published levels (solid) and on even ones (dashed). Lower is better; steeper is "
#     "a higher order.")

# %% [markdown]
# Twice the steps divide the error by 2 where the order is 1, by 4 where it is 2, once
# the steps are small. Here they are not small yet: some of Heun's numbers lie below 4
# and some above it. Compare DPM++ 2M on the two lists: on the published one it is
# behind Euler at each number of steps, on the even one ahead. The published one ends
# abruptly: its last step but one falls to 0.001, a way in $\ln\sigma$ several times as
# long as the one before, and the line through the last two estimates is drawn across
# all of it. Twice the steps take only about $\ln 2$ off that way. The even list has no
# such step. (This is one drawing; chapter 8 compares over several prompts.) In practice
# one takes as many steps as change the picture to the eye, long before the error is
# small.
#
# ## Guidance
#
# Large models, drawn as they are, follow their prompt only loosely; ours follows it
# rather well (chapter 4 drew most of its prompts rightly without guidance).
# *Classifier-free guidance* asks twice, with the prompt and with an empty (or negative)
# one, and exaggerates the difference:
#
# $$v = v_- + g\,(v_+ - v_-).$$
#
# With $g = 1$ the empty prompt cancels out, and there is no need to ask it. With $g =
# 0$ the prompt cancels out: what is drawn is any picture at all. (For `guidance_scale`
# the pipelines read every $g \le 1$ as “no guidance”, which is $g = 1$ here.)
#
# Why does this follow the prompt? By Bayes' rule, $p(x \mid \text{prompt})$ is
# proportional to $p(x)\, p(\text{prompt} \mid x)$: the scores of both sides differ by
# $\nabla_x \ln p_\sigma(\text{prompt} \mid x)$. In a velocity a score has the factor
# $-\sigma/(1-\sigma)$, so that
#
# $$v_+ - v_- =
# -\frac{\sigma}{1-\sigma}\, \nabla_x \ln p_\sigma(\text{prompt} \mid x).$$
#
# Walking against $v$, each step also climbs the probability that a classifier would
# give to the prompt, and $g$ multiplies this part. No classifier is trained, hence the
# name; but the network must have met the empty prompt, which is why training leaves
# some captions out (chapter 7). For $g > 1$ the sum is not the velocity that belongs to
# $p(x)\, p(\text{prompt} \mid x)^g$: that density, mixed with noise, would need another
# field.


# %%
def guide(v_neg: Tensor, v_pos: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: ``scale`` times the way from ``v_neg`` to ``v_pos``.

    Ho and Salimans 2022, equation 6, with ``scale`` = 1 + w.
    """
    return v_neg + scale * (v_pos - v_neg)


# %% [markdown]
# A solver follows one velocity and does not ask how it came about. So guidance is an
# object that is called with the network's velocity and returns the guided one. Chapter
# 8's pipeline takes any such object; another kind of guidance is another class, and
# neither the solvers nor the network change. Both prompts go through the network in one
# batch: the state is doubled, and the answer cut in two.


# %%
class Guidance:
    """Makes of the network's velocity the one that a solver follows.

    Where ``negative`` is set, the network is asked with the negative prompts too: a
    state of 2·B rows is theirs and then the prompts', one of B rows the prompts' alone.
    """

    @property
    def negative(self) -> bool:
        """Whether negative prompts are asked."""
        return False

    @property
    def settings(self) -> dict[str, Any]:
        """What a picture notes of it."""
        return {"guidance_scale": 1.0}

    def check(self, pipe: Any) -> None:
        """Raise ValueError where a pipeline cannot be guided so."""

    def __call__(self, velocity: Callable[..., Tensor], sigmas: Tensor) -> Velocity:
        """The velocity of x (B, …) at each of the levels ``sigmas`` (S + 1,)."""
        raise NotImplementedError


# %%
class NoGuidance(Guidance):
    """The prompt's own velocity; negative prompts are not asked."""

    def __call__(self, velocity: Callable[..., Tensor], sigmas: Tensor) -> Velocity:
        return velocity


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """:func:`guide` with ``scale``, both prompts in one batch.

    Raises ValueError for a scale that is no finite number.
    """

    scale: float

    def __post_init__(self) -> None:
        check_number("guidance_scale", self.scale)

    @property
    def negative(self) -> bool:
        return True

    @property
    def settings(self) -> dict[str, Any]:
        return {"guidance_scale": self.scale}

    def __call__(self, velocity: Callable[..., Tensor], sigmas: Tensor) -> Velocity:
        def guided(x: Tensor, sigma: Tensor) -> Tensor:
            v_neg, v_pos = velocity(torch.cat([x, x]), sigma).chunk(2)  # 2 × (B, …)
            return guide(v_neg, v_pos, self.scale)

        return guided


# %% [markdown]
# In the plane the “prompt” is *upper moon*: the perfect velocity for its 60 points. The
# empty prompt is the velocity for all 120. At one place, both arrows, and two guided
# ones (again pointing where $\sigma$ falls):

# %% tags=["active-ipynb"]
# upper = exact_velocity(moons[:60])
# place, sigma = torch.tensor([[-1.8, -0.2]]), torch.tensor(0.7)
# v_neg, v_pos = perfect(place, sigma), upper(place, sigma)
# arrows = {"empty": -v_neg[0], "prompt": -v_pos[0]}
# arrows |= {f"guided, {g}": -guide(v_neg, v_pos, g)[0] for g in (2.0, 3.0)}
# seen = 0.3 * moons  # where the data lie on the way, at this level
# viz.show_vectors(place[0], arrows, {"upper": seen[:60], "lower": seen[60:]})

# %% [markdown]
# The tips of the four arrows lie on one line. The guided ones lie beyond the prompt's,
# on the side away from the empty prompt's. What does that do to a whole drawing?

# %% tags=["active-ipynb"]
# panels = {}
# for g in (0.0, 1.0, 2.0, 6.0):
#     guided = lambda x, sigma: guide(perfect(x, sigma), upper(x, sigma), g)
#     drawn = euler(guided, z, sigma_schedule(64, shift=1.0))
#     panels[f"guidance {g:g}"] = {"data": moons, "drawn": drawn}
# viz.show_points(panels, limits=(-3.2, 3.2))

# %% [markdown]
# With $g = 0$ the points cover both moons, with $g = 1$ the upper one. As $g$ grows
# they leave the part that lies near the other moon and gather where the prompt is least
# in doubt. Here guidance buys clarity and pays with variety (chapter 8 looks for both
# in pictures); and it costs a second pass. *Guidance distillation* saves that: a
# student is told $g$ beside $\sigma$, and learns to answer with the guided velocity at
# once ([Meng et al. 2023](https://arxiv.org/abs/2210.03142); chapter 9 distils steps
# and guidance). (<a href="../book/inside.html#a-flow-in-the-plane">Move the sliders</a>
# of this field: solver, steps, shift, guidance.)
#
# ## Look at it
#
# The shipped model, guided: both prompts in one batch, Euler, the model's own defaults.
# These few lines are the heart of chapter 8, and their result is what we hand on.

# %% tags=["active-ipynb"]
# both = pipe.encode_prompt(["", PROMPT])
# sigmas = pipe.scheduler.sigmas(pipe.defaults.num_inference_steps)
#
# def answers(x: Tensor, sigma: Tensor) -> Tensor:
#     return pipe.transformer(x, sigma.expand(len(x)), *both)
#
# guided = ClassifierFree(pipe.defaults.guidance_scale)(answers, sigmas)

# %% tags=["active-ipynb"]
# track = []
# keep = lambda step, sigma, x, x0_hat: track.append((sigma, x, x0_hat))
# latents = euler(guided, noise, sigmas, keep)
# sigmas, states, guesses = map(torch.stack, zip(*track))
# rows = {"x": states[:, 0], "x̂₀": guesses[:, 0]}
# viz.show_trajectory(rows | {"x̂₀ decoded": pipe.decode(guesses[:, 0]) * 2 - 1}, sigmas)

# %% [markdown]
# The state $x$ begins as noise, and the picture comes through it only by degrees.
# $\hat x_0$, the place that the velocity points back to, is a picture from the first
# step: blurred, its contrast exaggerated by guidance. Then it sharpens. (The first two
# rows show three directions of a latent's sixteen channels as red, green and blue. The
# $\sigma$ above is the level before a step; $x$ is the state after it.)
#
# ## Predict, then break it
#
# **One.** Take a single step from $\sigma = 1$ straight to 0. In the plane, where do
# all points land? And what does the shipped model draw? Decide before you look.

# %% tags=["active-ipynb", "hide-output"]
# one = torch.tensor([1.0, 0.0])
# landed = euler(perfect, z, one)
# print("spread of 120 points after one step:", round(landed.std(0).max().item(), 4))
# jump = pipe.decode(torch.cat([euler(guided, noise, one), latents])) * 2 - 1
# viz.show_images(jump, ["one step", "all steps"])

# %% [markdown]
# All of them land on one point, the mean of the data. At $\sigma = 1$ the state is pure
# noise and says nothing about its origin, so the best guess is the same for all. The
# model does the same as far as it can: one step gives the average picture *of this
# prompt*, pushed by guidance away from the average of all pictures. (Distilled models
# such as Large Turbo are trained so that few steps suffice: chapter 9.)
#
# **Two.** Turn the sign: give the solver $-v$. Where do the points go?

# %% tags=["active-ipynb", "hide-output"]
# wrong = euler(lambda x, sigma: -perfect(x, sigma), z, sigma_schedule(64, 1.0)[:-1])
# print("largest coordinate at the start:", round(z.abs().max().item(), 1))
# print("at the end it is more than 100:", (wrong.abs().max() > 100).item())

# %% [markdown]
# They flee. The velocity points towards noise; walking down in $\sigma$ we go against
# it, and the factor $\sigma' - \sigma < 0$ in the step is what turns us round.
# Papers and codebases disagree about this sign and about the direction of time: when
# you port a sampler, check these two first.
#
# ## Parity
#
# The reference is diffusers' two flow-matching schedulers, driven with the shipped
# model on the journey's noise.

# %% tags=["active-ipynb", "hide-input"]
# import diffusers
#
# def reference(scheduler, x: Tensor) -> Tensor:
#     for t in scheduler.timesteps:
#         x = scheduler.step(model(x, t / 1000), t, x).prev_sample
#     return x

# %% tags=["active-ipynb"]
# for name, solve in (("Euler", euler), ("Heun", heun)):
#     scheduler = getattr(diffusers, f"FlowMatch{name}DiscreteScheduler")(shift=3.0)
#     scheduler.set_timesteps(8)
#     theirs, ours = reference(scheduler, noise), solve(model, noise, sigma_schedule(8))
#     error = (ours - theirs).norm() / theirs.norm()
#     assert error < 1e-5, error
#     print(f"{name}: relative error below 1e-5 after 8 steps with shift 3")

# %% [markdown]
# DPM++ 2M has no counterpart in diffusers: its multistep solver takes
# $\ln\frac{1-\sigma}{\sigma}$ as time where the reference code of SD3.5 takes
# $-\ln\sigma$. The package's tests compare ours with the reference's formula, written a
# second time.
#
# ## What production code does differently
#
# - **Solvers as classes with state.** A scheduler object in diffusers remembers where
#   it is, so that one pipeline can take any of them. A function over one velocity call
#   is easier to read and to test, and our pipelines need no more.
# - **Precision.** diffusers keeps the state between steps in the model's precision,
#   bfloat16, and computes each step in float32. Our pipeline keeps the state in float32
#   throughout; it is small.
# - **Guidance in one batch or two.** One batch of two is faster; two calls need less
#   memory. Some pipelines guide only some of the steps, in the middle, where
#   [Kynkäänniemi et al. 2024](https://arxiv.org/abs/2404.07724) find that it helps.
# - **Resolution-dependent shift.** Newer models compute the shift from the number of
#   patches (“dynamic shifting”). SD3.5's is fixed at 3.
#
# ## Exercises
#
# **6.1 Predict.** You want the level at which data and noise have equal weight to
# become 0.9. Which shift does that? Find it with odds, without the formula.

# %% tags=["active-ipynb", "exercise"]
# def needed() -> float:
#     raise NotImplementedError  # the shift that moves σ = ½ to 0.9

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_6_1() -> None:
#     level = shift_sigma(torch.tensor(0.5), needed())
#     assert abs(level - 0.9) < 1e-6, f"this shift moves it to {level:.3f}"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def needed() -> float:
#     return (0.9 / 0.1) / (0.5 / 0.5)  # the odds to reach over the odds to leave
#
# exercise_6_1()
# print("a picture with so many times the side needs it:", needed())

# %% [markdown]
# **6.2 Code.** The *midpoint* method goes half a step with Euler, asks for the velocity
# there, and makes the whole step with it. Write it. Its order is 2. (The check
# follows $dx/d\sigma = \sigma x$ from $x = 1$ at $\sigma = 1$ down to $\sigma = 0$; the
# exact end is $e^{-1/2}$, and one single step gives ¾.)

# %% tags=["active-ipynb", "exercise"]
# def midpoint(velocity: Velocity, x: Tensor, sigmas: Tensor) -> Tensor:
#     """From sigmas[0] to sigmas[-1] by the midpoint method."""
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_6_2() -> None:
#     grow, one = lambda x, sigma: sigma * x, torch.ones(1).double()
#     levels = [torch.linspace(1, 0, n + 1).double() ** 2 for n in (20, 40)]  # uneven
#     coarse, fine = (midpoint(grow, 1 * one, s) - torch.exp(-one / 2) for s in levels)
#     assert midpoint(grow, one, levels[0][::20]) == 0.75, "not one step by midpoint"
#     assert coarse.abs() < 0.01, "in uneven steps it does not arrive at e^(−1/2)"
#     assert 3.5 < coarse / fine < 4.5, "half the step should leave a quarter"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def midpoint(velocity: Velocity, x: Tensor, sigmas: Tensor) -> Tensor:
#     for sigma, sigma_next in pairwise(sigmas):
#         half = (sigma_next - sigma) / 2
#         between = x + half * velocity(x, sigma)
#         x = x + 2 * half * velocity(between, sigma + half)
#     return x
#
# exercise_6_2()
# # Over a short step the velocity changes nearly evenly, so that its value half-way is
# # its mean; only the curvature is left as error.

# %% [markdown]
# **6.3 Code.** Go *up* again: from a state at level $\sigma$ make one at a higher level
# $\sigma'$, with fresh noise. The data must then have weight $1-\sigma'$ and all noise
# together the standard deviation $\sigma'$. (Variances of independent noises add.)

# %% tags=["active-ipynb", "exercise"]
# def renoise(x: Tensor, fresh: Tensor, sigma: float, higher: float) -> Tensor:
#     """The state ``x`` of level ``sigma``, taken up to the level ``higher``."""
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_6_3() -> None:
#     data, old, fresh = torch.full((3, 200_000), 5.0), *torch.randn(2, 3, 200_000)
#     x = renoise(interpolate(data, old, 0.4), fresh, 0.4, 0.7)
#     assert abs(x.mean() - 0.3 * 5) < 0.01, "the data should have weight 1 − 0.7"
#     assert abs(x.std() - 0.7) < 0.01, "all noise together should have deviation 0.7"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def renoise(x: Tensor, fresh: Tensor, sigma: float, higher: float) -> Tensor:
#     keep = (1 - higher) / (1 - sigma)
#     return keep * x + (higher**2 - (keep * sigma) ** 2) ** 0.5 * fresh
#
# exercise_6_3()
# # keep brings the data to 1 − σ′ and the old noise to keep·σ; fresh noise adds the
# # variance that is missing to σ′².

# %% [markdown]
# **6.4 Explore.** Draw the journey's prompt with `dpmpp_2m` in 4, 6 and 10 steps and
# compare with Euler (`solve(guided, noise, pipe.scheduler.sigmas(n))`). From how many
# steps on can you not tell them apart? And which is nearer to a drawing in many steps?

# %% tags=["active-ipynb", "hide-cell", "nbval-ignore-output"]
# draw = lambda solve, n: pipe.decode(solve(guided, noise, pipe.scheduler.sigmas(n)))
# far, rows = draw(heun, 60), {}
# for n in (4, 6, 10):
#     rows[n] = a, b = draw(euler, n), draw(dpmpp_2m, n)
#     gaps = [(x - y).abs().mean().item() for x, y in ((a, b), (a, far), (b, far))]
#     apart, *fine = (f"{gap:.3f}" for gap in gaps)
#     print(f"{n:2} steps: apart {apart}; from 60 steps of Heun: Euler {fine[0]}, "
#         f"DPM++ 2M {fine[1]}")
# pictures = [x[0] for pair in rows.values() for x in pair]
# titles = [f"{name}, {n}" for n in rows for name in ("Euler", "DPM++ 2M")]
# viz.show_images(torch.stack(pictures), titles, columns=6, low=0)

# %% [markdown]
# <details><summary>Answer</summary>
#
# The numbers are mean differences of pixels between 0 and 1; two hundredths are hard to
# see. At four steps DPM++ 2M fails, at six one still sees which is which, and at ten
# the two are hard to tell apart. In no line is DPM++ 2M the nearer to the drawing in
# many steps. With few steps the last step but one is many times as long in $\ln\sigma$
# as the one before, and the line through two estimates is drawn too far. More steps
# shorten it, though slowly, and it begins lower, where estimates differ less.
#
# </details>
#
# ## Summary
#
# You **mixed** pictures with noise along a straight line and **named** its velocity.
# You **derived** the loss and the function that makes it smallest, **trained** a
# network with it and **compared** what the two draw: memory here, new points there. You
# **converted** velocities into noise, scores and DDIM steps. You **chose** levels to
# train on, moved them by a shift, and rebuilt the published schedule with its quirk.
# You **solved** the flow with three solvers and **measured** their orders, **steered**
# it with guidance, and **broke** it with one step and with a sign.
#
# What goes on to chapter 8: the finished latent of our prompt. Chapter 7 first shows
# where the weights came from.

# %% tags=["active-ipynb"]
# print(journey.meets("latents", latents))
# print(latents[0, 0, :2, :4].numpy().round(2))

# %% [markdown]
# ## Further reading
#
# - Liu, Gong and Liu 2023, [Flow straight and fast](https://arxiv.org/abs/2209.03003):
#   rectified flow, why the averages may be followed, and how to straighten the paths.
# - Lipman et al. 2023, [Flow matching for generative
#   modeling](https://arxiv.org/abs/2210.02747): the loss and why it works.
# - Esser et al. 2024, [Scaling rectified flow
#   transformers](https://arxiv.org/abs/2403.03206): sections 2, 3, 5.1, and 5.3.2 for
#   the shift.
# - Karras et al. 2022, [Elucidating the design space of diffusion-based generative
#   models](https://arxiv.org/abs/2206.00364): solvers and schedules, compared.
# - Lu et al. 2022, [DPM-Solver++](https://arxiv.org/abs/2211.01095): the solver with a
#   memory.
# - Ho and Salimans 2022, [Classifier-free diffusion
#   guidance](https://arxiv.org/abs/2207.12598).
# - The older models: Ho et al. 2020, [DDPM](https://arxiv.org/abs/2006.11239); Song et
#   al. 2021, [DDIM](https://arxiv.org/abs/2010.02502); Salimans and Ho 2022,
#   [Progressive distillation](https://arxiv.org/abs/2202.00512), for the other $v$.
