"""Skip Layer Guidance: away from what the model draws when it leaves some blocks out.

SD3.5 Medium was published with it; the reference code and diffusers agree on

    v = guide(v₋, v₊, g) + s·(v₊ − v₊ without the blocks),

within a window of the steps. s·(…) moves the estimate x̂₀ = x − σ·v just as far, so
scales for x̂₀ and for v are one and the same.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from minidiff.flow_matching import Velocity, guide
from minidiff.interface.checks import warn
from minidiff.sampling import Pipeline


@contextmanager
def skip_layer_guidance(
    pipe: Pipeline,
    layers: Sequence[int] = (7, 8, 9),
    scale: float = 2.8,
    start: float = 0.01,
    stop: float = 0.2,
) -> Iterator[None]:
    """Within this context every guided picture of ``pipe`` also skips layers.

    ``layers`` are the blocks left out; of N steps those with start·N < i < stop·N
    count. The defaults are diffusers' for SD3.5 Medium (the reference code has 2.5).
    Raises ValueError for blocks that the model lacks; warns where the model is not
    meant for it.
    """
    check(pipe, layers, scale, start, stop)
    plain = pipe.velocity

    def velocity(
        context: Tensor, pooled: Tensor, sigmas: Tensor, guidance_scale: float
    ) -> Velocity:
        inside = window(sigmas, start, stop)
        if guidance_scale <= 1 or not len(inside):
            why = "without guidance" if guidance_scale <= 1 else "in so few steps"
            warn(f"Skip Layer Guidance does nothing {why}")
            return plain(context, pooled, sigmas, guidance_scale)
        both = plain(context, pooled, sigmas, 1.0)
        positive = context.chunk(2)[1], pooled.chunk(2)[1]
        skipped = plain(*positive, inside, 1.0, skip_layers=layers)
        levels = set(inside.tolist())

        def guided(x: Tensor, sigma: Tensor) -> Tensor:
            v_neg, v_pos = both(torch.cat([x, x]), sigma).chunk(2)
            v = guide(v_neg, v_pos, guidance_scale)
            if sigma.item() in levels:
                v = v + scale * (v_pos - skipped(x, sigma))
            return v

        return guided

    about = {"skip_layers": ",".join(map(str, layers)), "skip_layer_scale": scale}
    pipe.velocity = velocity
    pipe.settings = pipe.settings | about
    try:
        yield
    finally:
        del pipe.velocity
        kept = {k: v for k, v in pipe.settings.items() if k not in about}
        pipe.settings = kept


def window(sigmas: Tensor, start: float, stop: float) -> Tensor:
    """The levels (n,) at which steps i with start·N < i < stop·N begin."""
    steps = len(sigmas) - 1
    return sigmas[[i for i in range(steps) if start * steps < i < stop * steps]]


def check(
    pipe: Pipeline, layers: Sequence[int], scale: float, start: float, stop: float
) -> None:
    """Raise ValueError for what the model cannot skip; warn where it should not."""
    if "velocity" in vars(pipe):
        raise ValueError("Skip Layer Guidance is on already; expected one at a time")
    blocks = pipe.transformer.config.num_layers
    if not layers or not all(0 <= layer < blocks for layer in layers):
        raise ValueError(
            f"skip layers are {list(layers)}; expected some of 0 to {blocks - 1}, "
            "the blocks of this model"
        )
    if not math.isfinite(scale):
        raise ValueError(f"skip_layer_scale is {scale}; expected a finite number")
    if not 0 <= start < stop <= 1:
        raise ValueError(
            f"the window is {start} to {stop}; expected 0 ≤ start < stop ≤ 1"
        )
    if pipe.name != "sd3.5-medium":
        warnings.warn(
            f"Skip Layer Guidance was published for sd3.5-medium; this is {pipe.name}",
            stacklevel=4,
        )
