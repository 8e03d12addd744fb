# %% [markdown]
r"""
# Distillation: many steps into few

In this chapter you make a **student** that draws in few steps, down to a single one,
what its guided teacher draws in 28, and you measure what is lost on the way.

After it you will be able to

- **explain** why few steps fail, and **measure** it in the plane and on pictures;
- **distil** guidance and many small steps into one network that makes *jumps*;
- **tell** a network how far to jump without changing a single shape of its weights;
- **sharpen** what one jump draws, by matching distributions and by a discriminator;
- **weigh** what each method needs, and **break** the one you built.
"""

# %% [markdown]
# ## Where we are
#
# Part I ended with a pipeline that asks its transformer 56 times for a picture: 28
# steps, and in each of them twice, with the prompt and with the empty one. Nothing on
# the map gets another place in this chapter. One box gets other weights, and the solver
# a schedule of its own.

# %%
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.flow_matching import (
    Scheduler,
    Velocity,
    denoised,
    dpmpp_2m,
    expand,
    interpolate,
    shift_sigma,
)
from minidiff.interface.checks import check_range

# %%
Map = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, place, size: x there

# %% tags=["active-ipynb", "hide-input"]
# import time
#
# import minidiff
# from torch import nn
#
# from minidiff import viz
# from minidiff.classroom import journey
# from minidiff.classroom.exercises import check, seal
# from minidiff.classroom.journey import PROMPT, SEED
# from minidiff.dit import timestep_embedding
# from minidiff.flow_matching import euler, flow_matching_loss, guide

# %% tags=["active-ipynb", "hide-input"]
# _ = torch.set_grad_enabled(False)
# viz.show_pipeline("distillation")

# %% [markdown]
# What arrives is the noise of our seed, and beside it the network that is to be the
# teacher.

# %% tags=["active-ipynb"]
# pipe = minidiff.load("tiny")
# pipe.progress = False
# noise = pipe.prepare_latents(1, seed=SEED)
# print(journey.meets("noise", noise))

# %% [markdown]
# ## A picture in the plane
#
# We go back to chapter 6's two moons, 120 points whose perfect velocity can be written
# down, and to its prompt *upper moon* with guidance 2. The formula is chapter 6's, with
# a level of its own for each row.

# %% tags=["active-ipynb"]
# angle = torch.linspace(0, torch.pi, 60)
# moon = torch.stack([angle.cos(), angle.sin()], dim=-1)
# moons = torch.cat([moon, torch.tensor([1.0, 0.5]) - moon])
# moons = (moons - moons.mean(0)) / moons.std(0)
#
#
# def exact(points: Tensor) -> Velocity:
#     def velocity(x: Tensor, sigma: Tensor) -> Tensor:
#         sigma = sigma.reshape(-1, 1)  # one for all rows, or one for each
#         near = x @ points.T - (1 - sigma) * points.square().sum(1) / 2
#         weights = ((1 - sigma) * near / sigma**2).softmax(1)
#         return (x - weights @ points) / sigma
#
#     return velocity
#
#
# every, upper = exact(moons), exact(moons[:60])
# teacher = lambda x, sigma: guide(every(x, sigma), upper(x, sigma), 2.0)

# %% tags=["active-ipynb"]
# z = torch.randn(500, 2, generator=torch.Generator().manual_seed(SEED))
# track = [z[:60]]
# keep = lambda step, sigma, x, x0_hat: track.append(x)
# _ = euler(teacher, z[:60], torch.linspace(1, 0, 65), keep)
# true = euler(teacher, z, torch.linspace(1, 0, 257))
# panels = {"the paths": {"noise": z[:60], "drawn": track[-1]}}
# for name, steps in (("four steps", 4), ("one step", 1)):
#     drawn = euler(teacher, z, torch.linspace(1, 0, steps + 1))
#     panels[name] = {"true": true, "drawn": drawn}
# viz.show_points(panels, paths=torch.stack(track), limits=(-3.2, 3.2))

# %% [markdown]
# On the left, 60 travellers walk from noise to the moon in 64 small steps: all of them
# first head for one place, then they turn. In the middle and on the right 500
# travellers take 4 steps, and one. “True” are the ends of 256 small steps, from the
# same noise.
#
# Why do few steps fail? A step of Euler's method follows the direction at its beginning
# for the whole way. At $\sigma = 1$ the state is pure noise and says nothing of its
# origin, so the perfect direction leads from *every* place to one and the same: the
# mean of the data, which guidance has moved. One step therefore draws one point,
# whatever the noise. The field is not to blame, and a better trained network would do
# the same: the paths are bent, because averages bend them (chapter 6), and a straight
# step leaves a bent path. Here is by how much, as the root mean square of the distance
# from the true ends.

# %% tags=["active-ipynb"]
# def missed(drawn: Tensor) -> float:
#     return (drawn - true).square().sum(1).mean().sqrt().item()
#
#
# counts = (1, 2, 4, 8, 16, 28)
# small_steps = [missed(euler(teacher, z, torch.linspace(1, 0, n + 1))) for n in counts]
# for n, error in zip(counts, small_steps):
#     print(f"steps {n:2}: they miss the true ends by {error:.2f}")

# %% [markdown]
# ### The same on pictures
#
# The shipped model draws 24 prompts of one thing, in 28, 8, 4, 2 and 1 steps, guided as
# usual and always from the same noise. The judge of `minidiff evaluate` looks at every
# picture and says whether thing, colour, place and ground are what the prompt asks for.
# The brackets say where the share of very many prompts would lie, 19 times of 20.

# %% tags=["active-ipynb"]
# from minidiff.judging.exam import exam, share
#
# texts, grade = exam(24)
# start, drawn, right = pipe.prepare_latents(24, seed=SEED), {}, {}
# for n in (28, 8, 4, 2, 1):
#     how = {"latents": start, "num_inference_steps": n, "output_type": "pt"}
#     drawn[n] = pipe(texts, **how)
#     found = grade(2 * drawn[n] - 1)["all"]
#     right[n] = found.float().mean().item()
#     print(f"steps {n:2}: right {share(found)}")

# %% tags=["active-ipynb"]
# rows = torch.cat([x[:6] for x in drawn.values()])
# titles = [f"steps: {n}" if i == 0 else "" for n in drawn for i in range(6)]
# asked = "Columns: " + ", ".join(f"“{text}”" for text in texts[:6])
# viz.show_images(rows, titles, columns=6, low=0).captioned(asked)

# %% tags=["active-ipynb"]
# viz.show_curves({"": (list(right), [100 * x for x in right.values()])}, "steps",
#     "right answers in %", logx=True, markers=True)

# %% tags=["active-ipynb"]
# assert right[1] < right[28] / 2
# print("one step loses more than half of the right answers")

# %% [markdown]
# In the pictures each row is one number of steps, each column one prompt with one
# noise. One step blurs: the handbag has lost its shape, and the grounds are no longer
# even. Two steps draw almost what one does, because this model's schedule spends its
# second step on the last thousandth of the way (chapter 6; with SD3.5's shift it is
# nine thousandths). From 28 steps down to 4 such brackets cannot tell a loss from none,
# and prompts of one thing are the easier ones. Of 300 scenes of all kinds ([how the
# shipped model was made](../book/training_log.md)) the teacher draws 77 % right in 28
# steps, 73 % in 8 and 55 % in 4.
#
# ## The mathematics
#
# Let the guided flow carry a traveller from $x$ at level $\sigma$ to the place
# $X_{\sigma\to\sigma'}(x)$ at a lower level $\sigma'$. This function of three things is
# called the **flow map** (Boffi et al. 2024). A solver follows it in small steps; a
# student shall know it. Three properties say all about it:
#
# $$X_{\sigma\to\sigma}(x) = x, \qquad
# \frac{\partial}{\partial\sigma'} X_{\sigma\to\sigma'}(x)\Big|_{\sigma'=\sigma}
# = v(x, \sigma), \qquad
# X_{\sigma\to\sigma''} = X_{\sigma'\to\sigma''} \circ X_{\sigma\to\sigma'}.$$
#
# To go nowhere changes nothing; a very short jump goes along the velocity, so that is
# where the teacher comes in; and a long jump is two short ones, one after the other.
# The last one is the lever. Write the jump as a straight step along a *mean* velocity
# $V$,
#
# $$X_{\sigma\to\sigma'}(x) = x + (\sigma' - \sigma)\, V(x, \sigma, \sigma'),$$
#
# and half-way between the two lies $\sigma_m$. Then $V$ over the whole way must be what
# two half jumps amount to:
#
# $$V(x, \sigma, \sigma') = \frac{x'' - x}{\sigma' - \sigma}, \qquad
# x' = X_{\sigma\to\sigma_m}(x), \quad x'' = X_{\sigma_m\to\sigma'}(x').$$
#
# The right side is a target for the left. If the halves are right, the whole becomes
# right: halves of the shortest jump are steps of the teacher, and each size of jump
# learns from the next smaller one (Frans et al. 2024 call such models *shortcut
# models*). No derivative of the network with respect to time is needed.
#
# **Guidance comes for nothing.** The velocity in the second property may be any; we
# take the guided one, $v_- + g\,(v_+ - v_-)$. The teacher is asked twice and the
# student learns the result, so it is asked once (Meng et al. 2023).
#
# | symbol | variable | meaning | shape in Tiny | in SD3.5 at 1024² |
# |---|---|---|---|---|
# | $u$ | `place` | where a jump begins: 1 is noise, 0 data | (B,) | the same |
# | $d$ | `size` | how long it is: 1, ½, ¼ or ⅛ | (B,) | the same |
# | $\sigma$ | `sigma` | the level at $u$: chapter 6's shift of it | (B,) | the same |
# | $V$ | `velocity` | mean velocity of a jump | (B, 16, 16, 16) | (B, 16, 128, 128) |
# | $N$ | `steps` | how many jumps make a drawing | 1 to 8 | the same |
#
# Jumps have the sizes 1, ½, ¼ and ⅛ and begin where whole jumps of their size end: a
# jump of ¼ at 1, ¾, ½ or ¼. So each is half of another, up to the one that is the whole
# way.
#
# ## Build it: telling a network how far
#
# A velocity network is told one number, the level. The student must be told two: where
# it is, and how far to go. A second input would need weights that the published
# architecture does not have, and no other program could open the result. But a jump
# begins at one of eight places and has one of four sizes, and one number can tell both.
# We name a jump by the place *an eighth of the way into it*:

# %%
AHEAD = 1 / 8  # of a jump: the time that tells it lies so far inside
PLACES = 8  # where jumps may begin


def told(place: Tensor, size: Tensor, shift: float = 1.0) -> Tensor:
    """The time (B,) that tells a network where a jump begins, and how long it is.

    ``place`` and ``size`` (B,): it begins at 1 − k·size for a whole number k, and size
    is 1, ½, ¼, … No two jumps have the same time.
    """
    return shift_sigma(place - AHEAD * size, shift)


# %% [markdown]
# Can two jumps have one name? A jump of size $1/N$ begins at $k/N$ for a whole number
# $k$, so that its name is
#
# $$\frac{k}{N} - \frac{1}{8N} = \frac{8k - 1}{8N} .$$
#
# The numerator is odd and $N$ a power of two: the fraction cannot be reduced, its
# denominator tells $N$, and then the numerator tells $k$. (The shift only stretches the
# axis.) All names lie between 0 and 1 and near the level itself, so a teacher that
# becomes a student is told something that it nearly understands.

# %% tags=["active-ipynb"]
# jumps = [(k / n, 1 / n) for n in (1, 2, 4, 8) for k in range(n, 0, -1)]
# place, size = torch.tensor(jumps).T  # (15, 2) → 2 × (15,)
# times = told(place, size)
# print("jumps:", len(times), " different names:", len(set(times.tolist())))
# print("the whole way:", times[0].item(), " its two halves:", times[1:3].tolist())

# %% [markdown]
# ### The naive target
#
# A student that is asked for one jump is shown where two half ones lead. One traveller
# at a time: halves of the smallest jump are the teacher's steps, all others the
# student's own.

# %% tags=["active-ipynb"]
# def target_loops(student: Velocity, x: Tensor, place: Tensor, size: Tensor) -> Tensor:
#     means = []
#     for i in range(len(x)):
#         state, u = x[i : i + 1], place[i : i + 1]  # (1, D), (1,)
#         for _ in range(2):
#             half = size[i] / 2
#             asked = u if size[i] == 1 / 8 else u - half / 8
#             v = (teacher if size[i] == 1 / 8 else student)(state, asked)
#             state, u = state - half * v, u - half
#         means.append((x[i : i + 1] - state) / size[i])
#     return torch.cat(means)  # B × (1, D) → (B, D)

# %% [markdown]
# ### The same in batches
#
# A step and a jump differ in what the network is told, and in nothing else. Levels
# enter through the shift, which is 1 in the plane and for Tiny, and 3 for SD3.5.


# %%
def length(place: Tensor, size: Tensor, shift: float = 1.0) -> Tensor:
    """How far (B,) a jump goes in σ; below zero, for it goes down."""
    return shift_sigma(place - size, shift) - shift_sigma(place, shift)


def euler_step(
    velocity: Velocity, x: Tensor, place: Tensor, size: Tensor, shift: float = 1.0
) -> Tensor:
    """``x`` (B, …) after one step of the teacher, who is told the level."""
    v = velocity(x, shift_sigma(place, shift))
    return x + expand(length(place, size, shift), x) * v


def jump(
    velocity: Velocity, x: Tensor, place: Tensor, size: Tensor, shift: float = 1.0
) -> Tensor:
    """``x`` (B, …) after one jump of the student, who is told the jump."""
    v = velocity(x, told(place, size, shift))
    return x + expand(length(place, size, shift), x) * v


# %% [markdown]
# Where should a jump end? Two half ones say it. The half-way map is an argument: steps
# of the teacher serve the smallest jumps, jumps of the student all others. No gradients
# pass: the long jump learns from the short ones, not the other way round.


# %%
def two_halves(half: Map, x: Tensor, place: Tensor, size: Tensor) -> Tensor:
    """Where two half jumps lead from ``x`` (B, …) at ``place`` (B,)."""
    with torch.no_grad():
        return half(half(x, place, size / 2), place - size / 2, size / 2)


# %% [markdown]
# The loss compares mean velocities, so that long jumps do not outweigh short ones:
#
# $$\mathcal L = \mathbb E\,\Bigl\lVert V_\theta(x, u, d) - \frac{x'' - x}{\sigma' -
# \sigma} \Bigr\rVert^2$$


# %%
def flow_map_loss(
    velocity: Velocity,
    x: Tensor,
    end: Tensor,
    place: Tensor,
    size: Tensor,
    shift: float = 1.0,
) -> Tensor:
    """Mean squared error of jumps from ``x`` (B, …) that shall lead to ``end``.

    ``place`` and ``size`` (B,) say where they begin and how long they are. A scalar.
    """
    mean = (end - x) / expand(length(place, size, shift), x)
    return (velocity(x, told(place, size, shift)).float() - mean).square().mean()


# %% [markdown]
# In the plane the student is a small network of the point and of the time, written as
# 32 cosines and 32 sines by chapter 5's function.

# %% tags=["active-ipynb"]
# class Net(nn.Module):
#     """Points (B, 2) or more numbers, and a time: ``outputs`` numbers (B, …)."""
#
#     def __init__(self, inputs: int = 2, outputs: int = 2, width: int = 128) -> None:
#         super().__init__()
#         sizes = [inputs + 64, width, width, width]
#         layers = [nn.Sequential(nn.Linear(*n), nn.SiLU()) for n in pairwise(sizes)]
#         self.layers = nn.Sequential(*layers, nn.Linear(width, outputs))
#
#     def forward(self, x: Tensor, time: Tensor) -> Tensor:
#         features = timestep_embedding(1000 * time.expand(len(x)), 64)
#         return self.layers(torch.cat([x, features], 1))

# %% tags=["active-ipynb"]
# def some_jumps(i: int, rows: int = 256, sizes=(8, 4, 2, 1)) -> tuple[Tensor, ...]:
#     """States on the way from data to noise, where jumps of each size begin."""
#     g = torch.Generator().manual_seed(i)
#     n = torch.tensor(sizes).repeat_interleave(rows // len(sizes))  # (B,)
#     place = ((torch.rand(rows, generator=g) * n).floor() + 1) / n
#     x0 = moons[torch.randint(60, (rows,), generator=g)]
#     z = torch.randn(rows, 2, generator=g)
#     return interpolate(x0, z, place), place, 1 / n

# %% tags=["active-ipynb"]
# def plane_loss(student: Velocity, teacher: Velocity, jumps: tuple) -> Tensor:
#     """The smallest size learns from the teacher, the other three from the student."""
#     first, rest = zip(*(x.tensor_split([len(x) // 4]) for x in jumps))
#     small = two_halves(lambda *at: euler_step(teacher, *at), *first)
#     large = two_halves(lambda *at: jump(student, *at), *rest)
#     x, *at = jumps
#     return flow_map_loss(student, x, torch.cat([small, large]), *at)
#
#
# torch.manual_seed(SEED)
# student, batch = Net(), some_jumps(0)
# means = target_loops(student, *batch)
# loops = (student(batch[0], told(*batch[1:])) - means).square().mean()
# agree = torch.isclose(loops, plane_loss(student, teacher, batch), rtol=1e-4)
# print("loops and batches agree:", agree.item())

# %% tags=["active-ipynb"]
# def learn(net: nn.Module, steps: int, loss, rate: float = 4e-3) -> nn.Module:
#     optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99))
#     for i in range(steps):
#         warm, left = min(1, 10 * (i + 1) / steps), 1 - i / steps
#         optimizer.param_groups[0]["lr"] = rate * warm * left
#         with torch.enable_grad():
#             loss(i).backward()
#         optimizer.step()
#         optimizer.zero_grad()
#     return net
#
#
# torch.set_num_threads(1)  # the quickest for small tensors
# _ = learn(student, 800, lambda i: plane_loss(student, teacher, some_jumps(i)))

# %% [markdown]
# ### How many jumps are a drawing?
#
# The jumps need not be of one size. Any number of steps up to eight can be put
# together: take the largest power of two in it, and halve the first jumps until the
# number is right. The first are halved because there, near noise, the picture is
# decided. Three steps are ¼, ¼ and ½.


# %%
def grid(steps: int) -> Tensor:
    """The places (steps + 1,) that a drawing visits, from 1 down to 0.

    Jumps are as equal as powers of ½ can be; the first ones are the shorter.
    """
    coarse = 1 << (steps.bit_length() - 1)  # the largest power of two among the steps
    sizes = torch.full((steps,), 1 / coarse)
    sizes[: 2 * (steps - coarse)] /= 2
    return torch.cat([torch.ones(1), 1 - sizes.cumsum(0)])


# %%
def follow(velocity: Velocity, x: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """Data drawn from noise ``x`` (B, …) in so many jumps."""
    for place, after in pairwise(grid(steps).to(x.device)):
        every = x.new_ones(len(x))
        x = jump(velocity, x, place * every, (place - after) * every, shift)
    return x


# %% tags=["active-ipynb"]
# for steps in (1, 3, 4, 6):
#     print(steps, "steps visit", grid(steps).tolist())

# %% tags=["active-ipynb"]
# panels = {}
# for name, n in (("one jump", 1), ("two jumps", 2), ("four jumps", 4)):
#     panels[name] = {"true": true, "drawn": follow(student, z, n)}
# viz.show_points(panels, limits=(-3.2, 3.2))

# %% tags=["active-ipynb"]
# jumped = [missed(follow(student, z, n)) for n in counts[:4]]
# curves = {"steps of the teacher": (counts, small_steps)}
# curves |= {"jumps of the student": (counts[:4], jumped)}
# viz.show_curves(curves, "steps", "distance from the true ends", True, True, True)

# %% tags=["active-ipynb"]
# assert jumped[0] < small_steps[0] / 4 and max(jumped) < small_steps[2]
# assert jumped[-1] > jumped[0] / 2
# print("one jump lands at less than a quarter of the distance of one step,")
# print("and any number of jumps nearer than four steps of the teacher")

# %% [markdown]
# The first figure shows where one jump errs: a few points lie beside the moon, where
# two neighbouring noises belong to two different places on it. Read the second from the
# left. One jump of the student replaces about eight steps of the teacher, sixteen calls
# of the field with guidance. But its curve falls slowly: eight jumps still miss by more
# than half of what one does. The teacher's error is that of its solver, and dies with
# the step. The student's is what it has not learned.
#
# ## On latents: the schedule as an object
#
# Nothing above knows that points have two coordinates. A pipeline needs one thing:
# where chapter 6's scheduler has levels, the student's has levels *and names*, which
# are what the transformer is told.


# %%
@dataclass(frozen=True)
class JumpScheduler(Scheduler):
    """The schedule of a distilled model: jumps of sizes 1, ½, … down to 1/``jumps``.

    Raises ValueError for ``jumps`` that are no power of two.
    """

    jumps: int = PLACES
    solvers: ClassVar[tuple[str, ...]] = ("euler",)

    def __post_init__(self) -> None:
        if self.jumps < 1 or self.jumps & (self.jumps - 1):
            raise ValueError(f"jumps is {self.jumps}; expected a power of two")

    @property
    def usual(self) -> tuple[int, float]:
        """Four steps, or fewer, without guidance: the network has learned it."""
        return min(4, self.jumps), 1.0

    def sigmas(self, steps: int) -> Tensor:
        """The levels (steps + 1,) of a drawing; ValueError for more than ``jumps``."""
        check_range("num_inference_steps", steps, 1, self.jumps)
        return shift_sigma(grid(steps), self.shift)

    def told(self, sigmas: Tensor) -> Tensor:
        """The times (S + 1,) of the jumps between ``sigmas``; the last is not asked."""
        places = shift_sigma(sigmas, 1 / self.shift)
        times = told(places[:-1], -places.diff(), self.shift)
        return torch.cat([times, sigmas[-1:]])


# %% [markdown]
# The pipeline asks its scheduler what the network is told, how many steps are usual and
# which solvers make sense. Heun would ask for a velocity at the far end of a jump,
# where the name of another jump stands. So a distilled model is known by its scheduler
# and not by its name: `scheduler_config.json` has one line more, `"_jumps": 8`.
# (diffusers passes over settings that begin with an underscore.)

# %% tags=["active-ipynb"]
# scheduler = JumpScheduler(shift=1.0)
# sigmas = scheduler.sigmas(4)
# print("levels:", sigmas.tolist())
# print("told:  ", scheduler.told(sigmas)[:-1].tolist())
# try:
#     scheduler.sigmas(9)
# except ValueError as error:
#     print(error)

# %% [markdown]
# ### Whose states?
#
# Halves have a weak side: where do the jumps begin that are taught? We made the states
# as chapter 6 does, by mixing data and noise. An unguided flow passes through just such
# mixtures. A guided one does not, for guidance leads its travellers elsewhere. Besides,
# each size imitates what the next smaller one has learned so far, its errors included.
#
# There is a dearer way and a surer one. Let the teacher draw, keep the places that its
# drawings pass, and every jump between two of them is an example: it begins where jumps
# begin, and its end is known without any half. One drawing holds eight jumps of ⅛, four
# of ¼, two of ½ and one that is all of it. This is how early one-step models were
# taught (Luhman and Luhman 2021), there with the last of the 15 jumps alone.


# %%
def paths(velocity: Velocity, noise: Tensor, shift: float = 1.0) -> Tensor:
    """The states (B, 9, …) that drawings from ``noise`` (B, …) pass, 1, ⅞, … 0.

    Two steps of DPM-Solver++ in each eighth.
    """
    states = [noise]
    keep = lambda step, sigma, x, x0_hat: states.append(x)  # noqa: E731
    places = torch.linspace(1, 0, 2 * PLACES + 1, device=noise.device)
    dpmpp_2m(velocity, noise, shift_sigma(places, shift), keep)
    return torch.stack(states[::2], 1)


# %% [markdown]
# In the plane both kinds of examples are cheap. A second student learns from 2,000
# drawings, for as many steps as the first:

# %% tags=["active-ipynb"]
# g = torch.Generator().manual_seed(SEED)
# walked = paths(teacher, torch.randn(2000, 2, generator=g))
#
#
# def walked_jumps(i: int, rows: int = 256) -> tuple[Tensor, ...]:
#     """Begin, end, place and size of jumps between places that drawings pass."""
#     g = torch.Generator().manual_seed(i)
#     n = torch.tensor((8, 4, 2, 1)).repeat_interleave(rows // 4)
#     before = (torch.rand(rows, generator=g) * n).floor()  # jumps of this size
#     which, at = torch.randint(2000, (rows,), generator=g), (8 * before / n).long()
#     return walked[which, at], walked[which, at + 8 // n], 1 - before / n, 1 / n
#
#
# torch.manual_seed(SEED)
# walker = Net()
# _ = learn(walker, 800, lambda i: flow_map_loss(walker, *walked_jumps(i)))
# followed = [missed(follow(walker, z, n)) for n in counts[:4]]
# bars = {f"{n}": {"halves": a, "paths": b}
#     for n, a, b in zip(counts, jumped, followed)}
# viz.show_bars(bars, "distance from the true ends, by jumps")

# %% tags=["active-ipynb"]
# assert all(b < 0.75 * a for a, b in zip(jumped, followed))
# print("paths: less than three quarters of the error, at each number of jumps")

# %% [markdown]
# What does the loss say of the shipped transformer? The teacher draws for eight of its
# prompts, guided; the student begins as a copy of it.

# %% tags=["active-ipynb"]
# import copy
#
# from minidiff.data.samples import sample_scenes
#
# captions = sample_scenes()[1][:8]
# positive, empty = pipe.encode_prompt(captions), pipe.encode_prompt([""] * 8)
# both = [torch.cat(pair) for pair in zip(empty, positive)]
# scale, own = pipe.defaults.guidance_scale, copy.deepcopy(pipe.transformer)
#
#
# def guided(x: Tensor, sigma: Tensor) -> Tensor:
#     v = own(x.repeat(2, 1, 1, 1), sigma.expand(16), *both)  # (B, …) → (2·B, …)
#     return guide(*v.chunk(2), scale)
#
#
# walked = paths(guided, pipe.prepare_latents(8, seed=SEED))
# print("states:", tuple(walked.shape))

# %% tags=["active-ipynb"]
# learner = lambda x, time: pipe.transformer(x, time, *positive)
#
#
# def latent_loss(i: int, n: int) -> Tensor:
#     """The loss of jumps of size 1/n, one in each of the eight drawings."""
#     before = torch.randint(n, (8,), generator=torch.Generator().manual_seed(i))
#     at, row = before * (8 // n), torch.arange(8)
#     size = torch.full((8,), 1 / n)
#     x, end = walked[row, at], walked[row, at + 8 // n]
#     return flow_map_loss(learner, x, end, 1 - before * size, size)
#
#
# sizes = {"⅛": 8, "¼": 4, "½": 2, "1": 1}
# before = {name: latent_loss(99, n).item() for name, n in sizes.items()}

# %% tags=["active-ipynb"]
# def all_sizes(i: int) -> Tensor:
#     return sum(latent_loss(4 * i + k, n) for k, n in enumerate(sizes.values())) / 4
#
#
# pipe.transformer.requires_grad_(True)
# _ = learn(pipe.transformer, 10, all_sizes, rate=6e-5)
# pipe.transformer.requires_grad_(False)
# after = {name: latent_loss(99, n).item() for name, n in sizes.items()}
# columns = {name: {"before": before[name], "after": after[name]} for name in sizes}
# viz.show_bars(columns, "loss of jumps of this size")

# %% tags=["active-ipynb"]
# assert sum(after.values()) < sum(before.values())
# print("ten steps on eight drawings lower the loss over all sizes")

# %% [markdown]
# No size begins at zero, not even the smallest. A copy of the teacher answers with the
# velocity where a jump begins, but the path bends before the jump ends, most of all
# near noise. It also answers without guidance, and it does not know the names of the
# jumps. (Guidance and the true level alone would not help it: they leave the smallest
# jump about where it is, and a whole way in one guided step misses by more.) Each bar
# is of eight jumps with places drawn by lot, so compare a bar with its neighbour and
# not with other sizes.
#
# ### The student that ships
#
# Ten steps are a glimpse. `minidiff train --stage turbo` does the same for more than a
# thousand: its teacher draws first, one drawing for every 12 samples, and then the
# student learns with Muon and averaged weights; every batch holds each size of jump
# equally often. Every few hundred steps it draws new noise in 28 steps of the teacher
# and in 4, 2 and 1 jumps of the student. No picture of the world is needed, only its
# captions. `--from` distils another model of the family for your own captions, in full
# or by LoRA.
#
# Why not use each drawing more often, dear as it is? We did at first, with an earlier
# teacher. From step 500 to 1,000, when each of 3,200 drawings had served 20 samples
# instead of 10, the loss fell from 0.074 to 0.059, and what the student drew of *new*
# noise moved away from what its teacher drew, from 0.44 to 0.49 of its length. It
# learned the drawings by heart: which noise becomes which layout is known only where
# there are many. With 8,000 drawings, each for 12 samples, that distance was 0.34 after
# 500 steps and 0.35 after 1,500.
#
# Such a student comes with the package, sharpened by what the next section derives. Its
# folder holds a transformer and a schedule; all else it reads from its teacher's. Here
# are the prompts and the noise from the beginning of the chapter, and the same judge.

# %% tags=["active-ipynb"]
# turbo = minidiff.load("tiny-turbo")
# turbo.progress = False
# print("usual steps and guidance:", *turbo.defaults)
# few = {}
# for n in (8, 4, 2, 1):
#     how = {"latents": start, "num_inference_steps": n, "output_type": "pt"}
#     few[n] = turbo(texts, **how)
#     found = grade(2 * few[n] - 1)["all"]
#     print(f"jumps {n}: right {share(found)}")

# %% tags=["active-ipynb"]
# rows = {f"{n} steps": drawn[n] for n in (28, 4)}
# rows |= {f"{n} jumps": few[n] for n in (4, 2)} | {"1 jump": few[1]}
# titles = [name if i == 0 else "" for name in rows for i in range(6)]
# shown = torch.cat([x[:6] for x in rows.values()])
# viz.show_images(shown, titles, columns=6, low=0).captioned(asked)

# %% [markdown]
# And how far from the picture that the teacher draws in 28 steps of the same noise? The
# root mean square over all pixels, whose range is 1:

# %% tags=["active-ipynb"]
# off = lambda x: (x - drawn[28]).square().mean().sqrt().item()
# both = {"steps of the teacher": drawn, "jumps of the student": few}
# curves = {k: (counts[:4], [off(x[n]) for n in counts[:4]]) for k, x in both.items()}
# viz.show_curves(curves, "steps", "distance from 28 steps", logx=True, markers=True)

# %% tags=["active-ipynb"]
# assert off(few[1]) < off(drawn[1]) and off(few[2]) < off(drawn[2])
# assert off(few[8]) > off(few[1]) / 2
# print("one and two jumps land nearer than as many steps of the teacher,")
# print("and eight jumps at more than half of the distance of one")

# %% [markdown]
# The first two rows are the teacher's. Below them the student draws nearly what its
# teacher drew, in the last row with a single call of the network for 56. What goes
# first are edges and small parts. And as in the plane its curve is nearly flat. What is
# left is what the student has not learned, or what the next section's sharpening has
# moved, and more jumps do not help. Eight steps of the teacher, sixteen calls, land
# nearer.
#
# These 24 prompts are easy in two ways: they name one thing, and they say where it
# stands and on what ground. The page [how the shipped model was
# made](../book/training_log.md) counts 300 of all kinds, with Fréchet distance,
# diversity and what it cost. There four jumps draw 75 % right and one jump 53 %, a
# difference that nothing here shows. Two of three of those prompts leave the place or
# the ground open, and the student ends about four times as far from its teacher as
# here, in one jump and in eight, even further than the teacher's own blurred single
# step. What words leave open it often chooses otherwise, and why, the next section
# says.

# %% [markdown]
# ## Sharpen it: match the distributions
#
# A student that is trained by squared error hesitates. Where two neighbouring noises
# lead to two different pictures, the jump that errs least lands between them. In the
# plane that is a point beside the moon; in a picture it is a blur. The flow map asks
# for *this* noise to land on *that* point. A weaker wish is often enough: that the
# points drawn **be distributed** as the teacher's are.
#
# Suppose we knew, at every level, the perfect velocity of the points that the student
# draws, as we know the teacher's. At a noisy place $x$ both point back to data: the
# teacher to $\hat x_0$, the other, $v_\text{fake}$, to $\hat x_0^\text{fake}$. Where
# the student draws too much, its own estimate leans there more than the teacher's does.
# The difference is the way out:
#
# $$\nabla_{x_0} D \;\propto\; \hat x_0^\text{fake}(x_\sigma) - \hat x_0(x_\sigma),
# \qquad x_\sigma = (1 - \sigma)\, x_0 + \sigma\,\epsilon .$$
#
# It is the gradient of the Kullback–Leibler divergence $D$ of the two distributions,
# averaged over levels, where level $\sigma$ counts $\sigma^2 / (1 - \sigma)^2$ (the
# scores differ by $(1 - \sigma) / \sigma^2$ times what the estimates do). The code also
# divides by how far off the picture is. This is **distribution matching distillation**,
# DMD.


# %%
def distribution_matching_loss(
    drawn: Tensor, teacher: Velocity, fake: Velocity, noise: Tensor, sigma: Tensor
) -> Tensor:
    """A scalar whose gradient moves ``drawn`` (B, …) from what the student draws
    towards what the teacher does.

    ``noise`` (B, …) and ``sigma`` (B,) make of it a place where both are asked;
    ``fake`` is the velocity of the student's own pictures. Yin et al. 2024 (DMD),
    equations 7 and 8.
    """
    with torch.no_grad():
        x = interpolate(drawn, noise, sigma)
        true = denoised(x, teacher(x, sigma), sigma)
        own = denoised(x, fake(x, sigma), sigma)
        scale = (drawn - true).abs().flatten(1).mean(1)
        better = drawn + (true - own) / expand(scale, drawn)
    return (drawn - better).square().mean() / 2


# %% [markdown]
# To see what it asks, we take the network away and let *points* learn: 300 of them,
# drawn in three steps of the teacher without guidance, so badly. The fake velocity is
# the work of a second small network which learns, by chapter 6's loss, from whatever
# the points are at the moment. That is DMD2's way: several steps for the fake network
# (its authors take five, we three), then one for the points.

# %% tags=["active-ipynb"]
# goal = euler(upper, z, torch.linspace(1, 0, 257))
# coarse = euler(upper, z[:300], torch.linspace(1, 0, 4))
#
#
# def noisy(g: torch.Generator) -> tuple[Tensor, Tensor]:
#     return torch.randn(300, 2, generator=g), 0.05 + 0.7 * torch.rand(300, generator=g)
#
#
# def apart(x: Tensor) -> tuple[float, float]:
#     """How far the drawn lie from the teacher's points, and these from the drawn."""
#     distance = torch.cdist(x, goal)  # (N, 2), (M, 2) → (N, M)
#     return distance.min(1).values.mean().item(), distance.min(0).values.mean().item()

# %% tags=["active-ipynb"]
# def take_turns(rounds: int, tutor, teach, mover, move) -> None:
#     """In each round three steps of ``tutor`` on ``teach()``, one of ``mover``."""
#     rates = [one.param_groups[0]["lr"] for one in (tutor, mover)]
#     for i in range(rounds):
#         for one, rate in zip((tutor, mover), rates):
#             one.param_groups[0]["lr"] = rate * (1 - i / rounds)
#         for one, loss in [(tutor, teach)] * 3 + [(mover, move)]:
#             one.zero_grad()
#             with torch.enable_grad():
#                 loss().backward()
#             one.step()

# %% tags=["active-ipynb"]
# g, fake = torch.Generator().manual_seed(1), Net(width=64)
# points = nn.Parameter(coarse.clone())
# tell = lambda: flow_matching_loss(fake, points.detach(), *noisy(g))
# match = lambda: 300 * distribution_matching_loss(points, upper, fake, *noisy(g))
# _ = learn(fake, 200, lambda i: tell(), rate=3e-3)
# tutor = torch.optim.AdamW(fake.parameters(), lr=3e-3)
# take_turns(100, tutor, tell, torch.optim.Adam([points], lr=0.02), match)
# matched = points.detach()

# %% [markdown]
# **Adversarial distillation** asks a judge instead. A *discriminator* scores noised
# points: those of the teacher above 1, those of the student below −1. The student
# learns to raise its score. Latent adversarial distillation (LADD), by which SD3-Turbo
# was made, lets the discriminator read features of the teacher itself, at the level of
# the noise, so that it need not learn to see. In the plane the teacher's only feature
# is where it points, $\hat x_0$: the discriminator gets the noisy point and this.


# %%
def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The hinge: scores of ``real`` above 1, of ``fake`` below −1 cost nothing."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


# %% tags=["active-ipynb"]
# def scores(x: Tensor, g: torch.Generator) -> Tensor:
#     fresh, sigma = noisy(g)
#     x = interpolate(x, fresh, sigma)
#     points_to = denoised(x, upper(x, sigma), sigma)
#     return critic(torch.cat([x, points_to], 1), sigma)  # 2 × (B, 2) → (B, 4)
#
#
# def judge_points() -> Tensor:
#     real = goal[torch.randint(500, (300,), generator=g)]
#     return discriminator_loss(scores(real, g), scores(points.detach(), g))

# %% tags=["active-ipynb"]
# critic, points = Net(4, 1, width=64), nn.Parameter(coarse.clone())
# tutor = torch.optim.AdamW(critic.parameters(), lr=4e-3, betas=(0.5, 0.99))
# mover = torch.optim.Adam([points], lr=0.02, betas=(0.5, 0.99))
# take_turns(150, tutor, judge_points, mover, lambda: -scores(points, g).sum())
# judged = points.detach()

# %% tags=["active-ipynb"]
# found = {"three steps": coarse, "matched (DMD)": matched, "judged (LADD)": judged}
# viz.show_points({k: {"teacher": goal, "drawn": x} for k, x in found.items()},
#     limits=(-3.2, 3.2))

# %% tags=["active-ipynb"]
# bars = {k: dict(zip(("drawn to teacher", "teacher to drawn"), apart(x)))
#     for k, x in found.items()}
# viz.show_bars(bars, "mean distance to the nearest")

# %% tags=["active-ipynb"]
# first, second, third = (apart(x) for x in found.values())
# assert second[0] < first[0] and second[1] < first[1] and third[1] < first[1]
# print("matching lowers both distances, the critic at least the second")

# %% [markdown]
# The two bars ask two questions. *Drawn to teacher* is quality: is what is drawn
# possible at all? *Teacher to drawn* is coverage: is all that is possible drawn? A
# method that draws one perfect point a thousand times is perfect in the first and bad
# in the second. That is the danger of both methods: nothing in their losses ties a
# point to its noise. (Here it did not come to that: the second bars fall as well.) The
# divergence of DMD punishes a point where the teacher has none, and hardly misses a
# part of the moon that nobody draws; a discriminator sees single points and no crowd. A
# student of the flow map alone is taught a place for every noise. For pictures
# `minidiff evaluate` asks both questions. Right answers are quality. The diversity,
# with `--beside`, is coverage: the spread of the judge's features over the seeds of a
# prompt, as a share of the teacher's. The Fréchet distance feels both.
#
# ### On the small model
#
# `minidiff train --stage matching` sharpens the student of jumps so. In a step it draws
# 32 pictures, in one, two or four jumps, and the gradient above passes through all of
# them. The teacher is asked with guidance, though the derivation knows none: guided
# estimates are in general not those of the noised points of any distribution. The fake
# velocity begins as a copy of the teacher's network. It does not take turns with the
# student but learns in the same step, from two fresh noises of each picture; in the
# first eighth of the steps it learns alone, so that it knows the student before it is
# asked. No drawing of the teacher's is needed. For the student that ships it was 320
# steps, 40 of them the fake velocity's alone. Before and after, on the 300 prompts of
# [its page](../book/training_log.md), by the same measures:
#
# | student | jumps | right in % | Fréchet | diversity |
# |---|---|---|---|---|
# | of jumps alone | 4 | 74.0 | 201.8 | 1.06 |
# | | 2 | 65.3 | 214.2 | 1.12 |
# | | 1 | 53.0 | 265.0 | 1.18 |
# | matched too | 4 | 74.7 | 193.6 | 0.93 |
# | | 2 | 68.3 | 201.1 | 0.94 |
# | | 1 | 53.3 | 256.3 | 1.12 |
# | its teacher, 28 steps | | 76.7 | 207.6 | 1.00 |
#
# What it buys is sharpness: each Fréchet distance falls, in two jumps from above the
# teacher's to below it. It overshoots: in two jumps or more the student's pictures are
# sharper than real scenes, by the last column of the table on that page. It hardly buys
# right answers: most was gained in two jumps, and these 3 points may be chance. A blur
# that becomes one thing or the other is not always the right one, and in one jump three
# in ten of the teacher's right answers stay lost. That page also tells of two longer
# runs, which did not bring them back.
#
# The price is paid twice. The drawings of one prompt spread less. (A diversity above 1
# is no gain in itself, for blurs spread too: one blurred step of the teacher has 1.09.)
# And the tie to the noise is loosened: on 32 held-out captions the student of jumps
# ended at 0.35 of the latents' length from what the teacher drew of the same noise, and
# matched at 0.68. It is not cut: by pixels, in four jumps, the drawings lie at 0.179
# from what the teacher draws of their own noise, and at 0.237 from what it draws of
# another.
#
# ## Beside it: other ways
#
# | method | what it learns | it needs |
# |---|---|---|
# | Progressive distillation | one step = two of the last student | one student each |
# | Consistency models | all places of a path have one end | a slowly moving copy |
# | sCM | the same, with infinitely small steps | a JVP, care |
# | Shortcut models | one jump = two half ones | nothing, or a teacher |
# | Paths, as here | every jump of the teacher's drawings | the drawings, beforehand |
# | MeanFlow | the mean velocity's own equation | a JVP |
# | DMD2 | the teacher's distribution | a fake-score network |
# | LADD | to please a discriminator | the teacher's features |
#
# | method | its authors report |
# |---|---|
# | Consistency models (Song et al. 2023) | FID 6.20 in one step, ImageNet 64² |
# | sCM (Lu and Song 2024) | FID 1.88 in two steps, ImageNet 512² |
# | Shortcut models (Frans et al. 2024) | one network for 1 to 128 steps |
# | MeanFlow (Geng et al. 2025) | FID 3.43 in one step, ImageNet 256², no teacher |
# | DMD2 (Yin et al. 2024) | FID 1.28 in one step, ImageNet 64² |
# | LADD (Sauer et al. 2024) | SD3-Turbo: four steps without guidance |
#
# FID is the Fréchet distance in the features of Inception; data sets differ, so compare
# only within one. JVP, the Jacobian-vector product, is a derivative of the network
# along a direction, computed beside its value: fused attention kernels do not offer it,
# and this is why this chapter goes in halves and along drawings. A consistency model
# always jumps to the end; to take two steps it must put noise back between them. A flow
# map can stop anywhere.
#
# ## Predict, then break it
#
# **One.** Teach the student without guidance ($g = 1$). Does it fail? What will its
# moon look like, beside the guided one?

# %% tags=["active-ipynb", "hide-output"]
# torch.manual_seed(SEED)
# plain = Net()
# _ = learn(plain, 800, lambda i: plane_loss(plain, upper, some_jumps(i)))
# sets = {"guided teacher": student, "no guidance": plain}
# panels = {k: {"data": moons[:60], "drawn": follow(s, z, 1)} for k, s in sets.items()}
# viz.show_points(panels, limits=(-3.2, 3.2))

# %% [markdown]
# It does not fail: it learns another map. It draws both ends of the moon, where the
# guided one leaves out the end that lies near the other moon (chapter 6). It also draws
# more points beside the moon: without guidance more neighbours have to part, and a
# smooth network leaves some of them between. On pictures such a student follows its
# prompt as loosely as the teacher does without guidance. And the choice is made for
# good: what was $g$ is now in the weights.
#
# **Two.** Give the student jumps of one size only, the whole way, and let it learn from
# its own halves. How large is the loss of a network that has learned nothing yet?

# %% tags=["active-ipynb", "hide-output"]
# torch.manual_seed(SEED)
# alone = Net()
# x, *at = some_jumps(0, sizes=(1,))
# end = two_halves(lambda *at: jump(alone, *at), x, *at)
# nothing = flow_map_loss(alone, x, end, *at).item()
# error = missed(follow(alone, z, 1))
# print("its loss is below 0.0001:", nothing < 1e-4)
# print("it misses more than one step did:", error > small_steps[0])

# %% [markdown]
# As good as zero. A fresh network answers almost nothing, so that its points stand
# still; and of standing still it is true that one jump is two half jumps. The loss
# finds nothing to correct. Trained on, such a network may go anywhere, for nothing
# calls it back. Where halves teach, only the smallest jump ties a student to its
# teacher, and the tie reaches the longest through every size between. Drawings, as the
# small model's student had them, tie each size by itself.
#
# **Three.** Ask the student for sixteen jumps. Their names were never told.

# %% tags=["active-ipynb", "hide-output"]
# sixteen = missed(follow(student, z, 16))
# print("sixteen jumps miss by more than eight:", sixteen > jumped[3])
# print("one step in sixteen is", told(torch.ones(1), torch.ones(1) / 16).item())

# %% [markdown]
# In the plane the network is smooth in the time, so that it answers a name between two
# that it knows with something between: not absurd, and not the flow. A pipeline refuses
# instead, as the scheduler above did. More steps would hardly help, anyway: the curve
# falls slowly.
#
# ## Parity
#
# diffusers has no notion of a jump. But its transformer is told a time, its scheduler
# has levels, and the two may be given apart. So its own classes draw the same picture
# with the student's weights; here in three jumps.

# %% tags=["active-ipynb"]
# import logging
# import tempfile
#
# logging.disable(logging.WARNING)
# import diffusers
#
# with tempfile.TemporaryDirectory() as folder:
#     turbo.save_pretrained(folder)
#     read = lambda kind, name: kind.from_pretrained(f"{folder}/{name}")
#     transformer = read(diffusers.SD3Transformer2DModel, "transformer")
#     theirs = read(diffusers.FlowMatchEulerDiscreteScheduler, "scheduler")

# %% tags=["active-ipynb"]
# sigmas = turbo.scheduler.sigmas(3)
# names = 1000 * turbo.scheduler.told(sigmas)[:-1]
# theirs.set_timesteps(sigmas=sigmas[:-1].tolist(), timesteps=names.tolist())
# context, pooled = turbo.encode_prompt(PROMPT)
# x = noise
# for time in theirs.timesteps:
#     v = transformer(x, context, pooled, time[None], return_dict=False)[0]
#     x = theirs.step(v, time, x, return_dict=False)[0]
# ours = turbo(PROMPT, num_inference_steps=3, latents=noise, output_type="latent")
# error = ((ours - x) / x.norm()).norm().item()
# assert error < 1e-5, error
# print("relative error of the latents below 1e-5")

# %% [markdown]
# What is lost: diffusers' *pipeline* asks its scheduler for levels alone, so it takes
# the two lines above to draw there; without them it would tell the network levels, and
# no level is the name of the jump that begins there (0.875 is even the name of another
# one, of the whole way). And a network that can be told fifteen things has forgotten
# the rest: other solvers and free schedules are gone.
#
# ## What production code does differently
#
# - **Everything at once.** The strongest few-step models add losses: a flow map or a
#   consistency loss to keep variety, a discriminator or DMD to sharpen. Ours takes one
#   after the other, so that nothing holds the variety while the second one sharpens.
# - **Data.** Large models are often distilled on pictures that the teacher drew itself,
#   as ours is: the data it was trained on are not at hand, and need not follow the
#   prompt as well.
# - **A second input.** Models that are born with jumps embed the size in layers of
#   their own. Ours keeps the published architecture and pays with a fixed list of
#   jumps.
# - **LoRA.** Distilling only small corrections of the weights needs a fraction of the
#   memory and gives a file that can be taken off again (chapter 10).
# - **Weights of the loss.** sCM and others learn how strongly each level counts. Ours
#   is fixed: every size counts alike.
#
# ## Exercises
#
# **9.1 Predict.** How many times is a transformer asked about one sample for four
# pictures of one prompt, by the guided teacher in 28 steps, and by the student in two
# jumps?

# %% tags=["active-ipynb", "exercise"]
# def asked() -> tuple[int, int]:
#     raise NotImplementedError  # teacher, student

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_9_1() -> None:
#     teacher_asks, student_asks = asked()
#     assert seal(teacher_asks) == "84a5092e", "pictures, steps, and prompts of a step"
#     assert seal(student_asks) == "2c624232", "pictures × jumps, and one prompt"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def asked() -> tuple[int, int]:
#     return 4 * 28 * 2, 4 * 2  # guidance asks twice a step, a jump once
#
#
# exercise_9_1()

# %% [markdown]
# **9.2 Code.** Read a name: from the time that the network is told, without shift, find
# the jump. (Double the time until eight times it is a whole number that is odd.)

# %% tags=["active-ipynb", "exercise"]
# def jump_of(time: float) -> tuple[float, float]:
#     """Place and size of the jump that ``time`` is the name of."""
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_9_2() -> None:
#     for place, size in jumps:
#         time = told(torch.tensor(place), torch.tensor(size)).item()
#         assert jump_of(time) == (place, size), f"{time} is the jump {place, size}"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def jump_of(time: float) -> tuple[float, float]:
#     n = 1
#     while 8 * n * time % 2 != 1:
#         n *= 2
#     return time + 1 / (8 * n), 1 / n
#
#
# exercise_9_2()

# %% [markdown]
# **9.3 Code.** A *consistency model* knows only jumps to the end, from any place. Write
# its drawing in several steps: jump to the data, put fresh noise back up to the next
# place, jump again. `end(x, place)` is the jump to the data.

# %% tags=["active-ipynb", "exercise"]
# def to_and_fro(end, x: Tensor, places: Tensor, fresh: list[Tensor]) -> Tensor:
#     """Data, by jumps from each of ``places`` (S,); ``fresh`` is the noise between."""
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_9_3() -> None:
#     seen, fresh = [], list(torch.randn(2, 5, 2))
#     end = lambda x, place: seen.append((x, place)) or x / 2
#     places = torch.tensor([1.0, 0.6, 0.3])
#     x = to_and_fro(end, torch.ones(5, 2), places, fresh)
#     assert len(seen) == 3, "one jump from each place"
#     again = 0.4 * 0.5 * torch.ones(5, 2) + 0.6 * fresh[0]
#     assert torch.allclose(seen[1][0], again), "chapter 6's mixture, at the next place"
#     third = 0.7 * seen[1][0] / 2 + 0.3 * fresh[1]
#     assert torch.allclose(seen[2][0], third), "from the last data, with new noise"
#     begun = torch.tensor([torch.as_tensor(place).flatten()[0] for _, place in seen])
#     assert torch.equal(begun, places), "tell `end` where it begins"
#     assert torch.equal(x, seen[2][0] / 2), "no noise after the last jump"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def to_and_fro(end, x: Tensor, places: Tensor, fresh: list[Tensor]) -> Tensor:
#     x = end(x, places[0])
#     for place, z in zip(places[1:], fresh):
#         x = end(interpolate(x, z, place), place)
#     return x
#
#
# exercise_9_3()

# %% [markdown]
# **9.4 Explore.** Train the student of the plane for 100, 300 and 900 steps, and draw
# with 1, 2, 4 and 8 jumps each time. Does one number of jumps profit more from the
# longer training than the others, and why?

# %% tags=["active-ipynb", "hide-cell", "nbval-ignore-output"]
# for steps in (100, 300, 900):
#     torch.manual_seed(SEED)
#     net = Net()
#     _ = learn(net, steps, lambda i: plane_loss(net, teacher, some_jumps(i)))
#     found = [f"{missed(follow(net, z, n)):.2f}" for n in counts[:4]]
#     print(f"{steps:4} steps of training, 1, 2, 4 and 8 jumps miss by", *found)
# # Compare the columns: in this run they fall together. A long jump is taught by halves
# # that the same network makes, so it cannot be right while they are wrong. And what is
# # hard to learn stays in all of them: the map tears the plane where neighbours part,
# # and a smooth network joins the two sides by a bridge.

# %% [markdown]
# ## Summary
#
# You **measured** why few steps fail: bent paths, followed straight. You **distilled**
# a guided flow into a map whose long jumps are two short ones, without a derivative of
# the network, and **told** it place and size of a jump by one number, so that the
# published architecture holds it. You **drew** with any number of jumps from one to
# eight. You **sharpened** points by matching distributions and by a discriminator,
# **weighed** what they cost in variety, and **broke** the student by taking away its
# tie to the teacher.
#
# What goes on: the noise of our seed and a pipeline that needs one call for it.

# %% tags=["active-ipynb"]
# print(journey.meets("noise", noise))
# print("one jump asks once:", tuple(turbo(PROMPT, num_inference_steps=1,
#     output_type="latent").shape))

# %% [markdown]
# ## Further reading
#
# - Boffi, Albergo and Vanden-Eijnden 2024, [Flow map
#   matching](https://arxiv.org/abs/2406.07507): the map, its three properties, and ways
#   to learn it.
# - Frans et al. 2024, [One step diffusion via shortcut
#   models](https://arxiv.org/abs/2410.12557): one jump equals two half ones.
# - Meng et al. 2023, [On distillation of guided diffusion
#   models](https://arxiv.org/abs/2210.03142).
# - Luhman and Luhman 2021, [Knowledge distillation in iterative generative
#   models](https://arxiv.org/abs/2101.02388): one step from noise to what the teacher
#   draws.
# - Salimans and Ho 2022, [Progressive distillation](https://arxiv.org/abs/2202.00512).
# - Song et al. 2023, [Consistency models](https://arxiv.org/abs/2303.01469); Lu and
#   Song 2024, [sCM](https://arxiv.org/abs/2410.11081); Geng et al. 2025,
#   [MeanFlow](https://arxiv.org/abs/2505.13447).
# - Yin et al. 2024, [DMD](https://arxiv.org/abs/2311.18828) and
#   [DMD2](https://arxiv.org/abs/2405.14867).
# - Sauer et al. 2024, [LADD](https://arxiv.org/abs/2403.12015): how SD3-Turbo was made.
