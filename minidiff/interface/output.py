"""What the pipeline shows: its progress, to people and to callbacks, and pictures."""

from typing import Any

from torch import Tensor

from minidiff.interface import checks
from minidiff.interface.request import Callback, Request, as_text


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
        if self.pipe._interrupt:
            self.tensors |= changed
            raise StopIteration
        return changed.get("latents")


def noted(
    pictures: list[Any], about: dict[str, Any], request: Request, **more: Any
) -> list[Any]:
    """PIL pictures of a checked request, each with its settings as its ``info``.

    ``about`` is said of all. ``minidiff.files.pictures.save_picture`` writes them into
    a file.
    """
    for i, picture in enumerate(pictures):
        own = {name: as_text(value, i) for name, value in more.items()}
        size = {"width": picture.width, "height": picture.height}
        picture.info = about | request.settings(i) | own | size
    return pictures
