"""Skip Layer Guidance: away from what the model draws when it leaves some blocks out.

SD3.5 Medium was published with it; the reference code and diffusers agree on

    v = guide(v₋, v₊, g) + s·(v₊ − v₊ without the blocks),

within a window of the steps. s·(…) moves the estimate x̂₀ = x − σ·v just as far, so
scales for x̂₀ and for v are one and the same.
"""

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minidiff.flow_matching import ClassifierFree, Guidance, Velocity, guide
from minidiff.interface.checks import check_number, warn


@dataclass(frozen=True)
class SkipLayer(Guidance):
    """Another guidance, moved away from the prompt's velocity without some blocks.

    ``layers`` are the blocks left out; of N steps those with start·N < i < stop·N
    count. The defaults are diffusers' for SD3.5 Medium (the reference code has 2.5).
    Where ``guidance`` is not classifier-free, it does nothing and says so.
    """

    guidance: Guidance
    layers: Sequence[int] = (7, 8, 9)
    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    def __post_init__(self) -> None:
        if not isinstance(self.guidance, Guidance):
            found = f"guidance is {self.guidance!r}"
            raise ValueError(f"{found}; expected an object such as ClassifierFree(4.5)")
        object.__setattr__(self, "layers", whole_numbers(self.layers))
        for name in ("scale", "start", "stop"):
            check_number(f"skip_layer_{name}", getattr(self, name))
        if not 0 <= self.start < self.stop <= 1:
            found = f"the window is {self.start} to {self.stop}"
            raise ValueError(f"{found}; expected 0 ≤ start < stop ≤ 1")

    @property
    def negative(self) -> bool:
        """As the guidance beneath."""
        return self.guidance.negative

    @property
    def settings(self) -> dict[str, Any]:
        """The guidance beneath, the blocks, the scale and the window."""
        own = {"skip_layers": ",".join(map(str, self.layers))}
        scale = {
            f"skip_layer_{n}": getattr(self, n) for n in ("scale", "start", "stop")
        }
        return self.guidance.settings | own | scale

    def check(self, pipe: Any) -> None:
        """Raise ValueError for blocks that the model lacks.

        Warns where the model is not meant for it.
        """
        blocks = pipe.transformer.config.num_layers
        if not self.layers or not all(0 <= layer < blocks for layer in self.layers):
            raise ValueError(
                f"skip layers are {list(self.layers)}; expected some of 0 to "
                f"{blocks - 1}, the blocks of this model"
            )
        if pipe.name != "sd3.5-medium":
            known = "Skip Layer Guidance was published for sd3.5-medium"
            warn(f"{known}; this is {pipe.name}")
        self.guidance.check(pipe)

    def __call__(self, velocity: Callable[..., Tensor], sigmas: Tensor) -> Velocity:
        inside = levels_between(sigmas, self.start, self.stop)
        if not isinstance(self.guidance, ClassifierFree):
            warn("Skip Layer Guidance does nothing without guidance")
        elif not inside:
            warn("Skip Layer Guidance does nothing in so few steps")
        else:
            return self.steered(velocity, self.guidance.scale, inside)
        return self.guidance(velocity, sigmas)

    def steered(
        self, velocity: Callable[..., Tensor], scale: float, inside: Collection[float]
    ) -> Velocity:
        """The guided velocity, at the levels ``inside`` moved away from the other."""

        def guided(x: Tensor, sigma: Tensor) -> Tensor:
            v_neg, v_pos = velocity(torch.cat([x, x]), sigma).chunk(2)  # 2 × (B, …)
            v = guide(v_neg, v_pos, scale)
            if sigma.item() not in inside:
                return v
            return v + self.scale * (v_pos - velocity(x, sigma, self.layers))

        return guided


def whole_numbers(layers: Any) -> tuple[int, ...]:
    """``layers`` as integers; ValueError for what is no list of them."""
    try:
        return tuple(map(operator.index, layers))
    except TypeError:
        known = "expected whole numbers: [7, 8, 9]"
        raise ValueError(f"skip layers are {layers!r}; {known}") from None


def levels_between(sigmas: Tensor, start: float, stop: float) -> set[float]:
    """The levels at which steps i with start·N < i < stop·N begin, of N + 1."""
    steps = len(sigmas) - 1
    inside = [i for i in range(steps) if start * steps < i < stop * steps]
    return set(sigmas[inside].tolist())
