"""What the pipeline shows: its progress, to people and to callbacks, and pictures."""

import secrets
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import BoundArguments, Signature, signature
from numbers import Integral, Real
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minidiff.interface import checks

if TYPE_CHECKING:
    pass


# callback(pipe, step, timestep, {"latents": …, "denoised": x̂₀}), as in diffusers
Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class Watch:
    """Follows a solver from ``latents`` along ``sigmas``: bar, callback, early end.

    Called by the solver after each step. As a context it swallows the StopIteration
    with which a callback ends the drawing; ``latents`` is then the step's state, or
    what the callback had put in its place in the tensors given to it.
    """

    def __init__(
        self, pipe: Any, latents: Tensor, sigmas: Tensor, callback: Callback | None
    ) -> None:
        from tqdm import tqdm

        self.pipe, self.callback = pipe, callback
        self.latents, self.tensors = latents, {"latents": latents}
        hidden = None if pipe.progress else True  # None: shown on a terminal alone
        label = pipe.progress if isinstance(pipe.progress, str) else None
        self.bar = tqdm(None, label, len(sigmas) - 1, leave=False, disable=hidden)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> bool:
        self.bar.close()
        ended = kind is not None and issubclass(kind, StopIteration)
        if ended:
            self.latents = self.tensors["latents"]
        return ended

    def __call__(
        self, step: int, sigma: Tensor, x: Tensor, x0_hat: Tensor
    ) -> Tensor | None:
        self.bar.update()
        if step == 0:
            checks.warn_of_overflow("the first step", x0_hat)
        if self.callback is None:
            return None
        self.tensors = {"latents": x, "denoised": x0_hat}
        changed = self.callback(self.pipe, step, 1000 * sigma, self.tensors) or {}
        return changed.get("latents")


# The settings that a picture carries

NO_SETTINGS = {"self", "pipe", "call", "latents", "output_type", "callback_on_step_end"}


def described(draw: Callable) -> Callable:
    """Let each PIL picture that ``draw(pipe, …)`` returns keep its settings, ``info``.

    ``minidiff.files.pictures.save_picture`` writes them into a file. A ``seed`` None is
    replaced here by a random one, so that the picture can name it.
    """
    arguments = signature(draw)

    @wraps(draw)
    def drawn(*args: Any, **named: Any) -> Any:
        bound = bind(arguments, args, named)
        for given in (bound.arguments, bound.arguments.get("call", {})):
            given |= {name: plain(value) for name, value in given.items()}
        if bound.arguments["seed"] is None:
            bound.arguments["seed"] = secrets.randbelow(2**32)
        checks.check_range("seed", bound.arguments["seed"], 0, 2**63)
        pictures = draw(*bound.args, **bound.kwargs)
        if isinstance(pictures, list):
            for i, picture in enumerate(pictures):
                picture.info |= settings(bound.args[0], bound.arguments, i)
                picture.info |= {"width": picture.width, "height": picture.height}
        return pictures

    return drawn


def bind(arguments: Signature, args: tuple, named: dict) -> BoundArguments:
    """The arguments of a call, usual ones too; TypeError names those there are."""
    try:
        bound = arguments.bind(*args, **named)
    except TypeError as error:
        own = ("self", "pipe", "call")
        known = ", ".join(name for name in arguments.parameters if name not in own)
        raise TypeError(f"{error}; expected {known}") from None
    bound.apply_defaults()
    return bound


def plain(value: Any) -> Any:
    """NumPy's numbers as Python's, all else as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def settings(pipe: Any, given: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Those of picture ``index`` of a call with the arguments ``given``."""
    given = {**given, **given.get("call", {})}
    if given.get("sigmas") is not None:
        given["num_inference_steps"] = len(given["sigmas"]) - 1
    row = index // given.pop("num_images_per_prompt")
    if guidance := given.pop("guidance", None):
        given |= guidance.settings
    usual = pipe.defaults._asdict() | {"max_sequence_length": pipe.max_sequence_length}
    given |= {k: v for k, v in usual.items() if given.get(k) is None}
    given["seed"] = given["seed"] + index if given.get("latents") is None else None
    own = {
        name: as_text(value, row)
        for name, value in given.items()
        if name not in NO_SETTINGS and value is not None
    }
    return pipe.settings | {"dtype": str(pipe.dtype).split(".")[1]} | own


def as_text(value: Any, row: int) -> Any:
    """Numbers and texts as they are; of a picture its file, of levels their list.

    Of one value for each prompt, that of ``row``.
    """
    if isinstance(value, list | tuple) and value:
        value = value[row]
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, Tensor) and value.ndim == 1:
        return ", ".join(f"{level:.6g}" for level in value.tolist())
    path = value if isinstance(value, PathLike) else getattr(value, "filename", "")
    return str(path) or "given"
