"""What is told on a terminal while work goes on. Nothing large is imported."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Control characters, ends of lines, changes of direction, halves of pairs
OBEYED = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """``text`` with what a terminal would obey, and ends of lines, as escapes."""
    return OBEYED.sub(lambda found: repr(found[0])[1:-1], str(text))


# Quotations, and what has no spaces, of over 100 characters
LONG = re.compile(r"(?<!\w)'[^']{99,}'(?!\w)|\"[^\"]{99,}\"|\S{101,}")
CLEAR = "\r\033[K"  # a terminal's line


def cut(text: str, most: int = 100) -> str:
    """``text`` with … in its middle where it has over ``most`` characters."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}…{text[1 - half :]}"


def brief(text: str) -> str:
    """What may be told in one line of a ``text`` that quotes at length."""
    return cut(LONG.sub(lambda found: cut(found[0]), text), 600)


def one_line(message: object) -> str:
    """``message`` with a space for each of its white spaces, long parts cut."""
    return brief(" ".join(str(message).split()))


def is_refused_memory(error: BaseException | None) -> bool:
    """Whether PyTorch got no memory on a CPU, as it says so on Linux and Windows."""
    words = "can't allocate memory", "not enough memory"
    return any(said in str(error) for said in words)


def tell(line: object) -> None:
    """Print one line on stderr."""
    cleared = CLEAR if sys.stderr.isatty() else ""
    print(f"{cleared}{printable(brief(str(line)))}", file=sys.stderr, flush=True)


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show ``text`` on the last line of a terminal until the end; else nothing."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"{CLEAR}{printable(brief(text))} …", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print(CLEAR, end="", file=sys.stderr, flush=True)


class Watch:
    """Follows a solver from ``latents`` along ``sigmas``: bar, callback, early end.

    Called by the solver after each step. As a context it swallows the StopIteration
    with which a callback ends the drawing; ``latents`` is then the step's state, or
    what the callback had put in its place in the tensors given to it. ``again`` draws
    once more, to find which layer of ``models`` went wrong first.
    """

    def __init__(
        self,
        pipe: Any,
        latents: "Tensor",
        sigmas: "Tensor",
        callback: Any,
        again: Callable[[], object],
        models: dict[str, Any],
    ) -> None:
        from tqdm import tqdm

        self.pipe, self.callback = pipe, callback
        self.again, self.models, self.warned = again, models, False
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
        self, step: int, sigma: "Tensor", x: "Tensor", x0_hat: "Tensor"
    ) -> "Tensor | None":
        from minidiff.interface import checks

        self.bar.update()
        if step == 0:  # told early; at each step a GPU would have to wait for it
            self.check("step 1", x0_hat)
        if self.callback is None:
            return None
        self.tensors = {"latents": x, "denoised": x0_hat}
        changed = self.callback(self.pipe, step, 1000 * sigma, self.tensors)
        self.tensors |= (changed := checks.check_changes(changed))
        if self.pipe._interrupt:
            raise StopIteration
        return changed.get("latents")

    def check(self, name: str, values: "Tensor") -> None:
        """Warn, once in a drawing, of numbers that are not finite."""
        from minidiff.interface import checks

        self.warned = self.warned or checks.warn_of_overflow(
            name, values, self.again, **self.models
        )
