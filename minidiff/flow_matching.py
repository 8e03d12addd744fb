# %% [markdown]
r"""
# Flow matching: the path, the loss, the solvers
"""

# %%
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]


# %% [markdown]
# ## The straight path


# %%
def expand(sigma: Tensor | float, x: Tensor) -> Tensor | float:
    """``sigma``, a number or (B,), with enough axes to multiply ``x`` (B, …)."""
    if not isinstance(sigma, Tensor) or sigma.ndim == 0:
        return sigma
    return sigma.reshape(-1, *(1 for _ in x.shape[1:]))  # (B,) → (B, 1, 1, 1)


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


# %%
def denoised(x: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    """The data x̂₀ that velocity ``v`` at ``x`` and level ``sigma`` points back to."""
    return x - expand(sigma, x) * v


def predicted_noise(x: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    """The noise ε̂ that velocity ``v`` at ``x`` points forward to."""
    return x + (1 - expand(sigma, x)) * v


# %%
def alpha_bar(sigma: Tensor | float) -> Tensor | float:
    """DDPM's ᾱ at the same signal-to-noise ratio: (1−σ)² / ((1−σ)² + σ²)."""
    return (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)


def to_variance_preserving(x: Tensor, sigma: Tensor | float) -> Tensor:
    """``x`` of the straight path, rescaled to DDPM's √ᾱ x₀ + √(1−ᾱ) ε."""
    sigma = expand(sigma, x)
    return x / ((1 - sigma) ** 2 + sigma**2) ** 0.5


# %% [markdown]
# ## The loss


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
# ## Which noise levels to train on


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


# %%
def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Noise levels moved towards 1 by ``shift``; Esser et al. 2024, equation 23."""
    return shift * sigma / (1 + (shift - 1) * sigma)


# %% [markdown]
# ## The published schedule


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


# %%
@dataclass(frozen=True)
class Scheduler:
    """The two numbers of the hub's scheduler_config.json that fix a schedule."""

    shift: float = 3.0
    num_train_timesteps: int = 1000

    def sigmas(self, steps: int) -> Tensor:
        """:func:`sigma_schedule` with this shift, (steps + 1,)."""
        return sigma_schedule(steps, self.shift, self.num_train_timesteps)


# %% [markdown]
# ## Solvers

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


# %%
def dpmpp_2m(
    velocity: Velocity, x: Tensor, sigmas: Tensor, callback: Callback | None = None
) -> Tensor:
    """As :func:`euler`, of order 2 with one call a step: the last estimate is reused.

    Lu et al. 2022 (DPM-Solver++), algorithm 2, in the logarithm of σ as the reference
    code of SD3.5 has it. ``sigmas`` must fall.
    """
    last, h_last = None, None
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0_hat = denoised(x, velocity(x, sigma), sigma)
        h, x0 = (sigma / sigma_next).log(), x0_hat
        if last is not None and sigma_next > 0:
            x0 = x0_hat + h / (2 * h_last) * (x0_hat - last)
        shrink = sigma_next / sigma
        x = end_step(callback, step, sigma, shrink * x + (1 - shrink) * x0, x0_hat)
        last, h_last = x0_hat, h
    return x


# %% [markdown]
# ## Guidance


# %%
def guide(v_neg: Tensor, v_pos: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: ``scale`` times the way from ``v_neg`` to ``v_pos``.

    Ho and Salimans 2022, equation 6, with ``scale`` = 1 + w.
    """
    return v_neg + scale * (v_pos - v_neg)
