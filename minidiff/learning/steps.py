"""The bookkeeping of steps: when to log, save and look; losses, compilation, memory."""

import functools
import math
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from minidiff.interface.terminal import tell
from minidiff.learning import parallel
from minidiff.learning.run import Run, TrainingError, is_out_of_memory
from minidiff.learning.state import name_step

MOST_STEPS, MOST_SAMPLES = 10**9, 2**20  # in a run, and in a batch


class Schedule(Protocol):
    """What a training's configuration says of its steps."""

    @property
    def steps(self) -> int: ...
    @property
    def log_every(self) -> int: ...
    @property
    def save_every(self) -> int: ...
    @property
    def validate_every(self) -> int: ...


def check_batch(steps: int, batch_size: int, shares: int) -> None:
    """Raise ValueError for numbers of steps or samples that cannot be."""
    if steps < 1 or batch_size < 1 or shares < 1:
        raise ValueError(
            f"steps {steps}, batch size {batch_size}, parts {shares}: expected at "
            "least 1 of each"
        )
    if steps > MOST_STEPS or batch_size > MOST_SAMPLES:
        raise ValueError(
            f"steps {steps}, batch size {batch_size}: expected at most {MOST_STEPS:,} "
            f"and {MOST_SAMPLES:,}"
        )
    if batch_size % shares:
        raise ValueError(
            f"a batch of {batch_size} samples cannot be cut into {shares} equal parts "
            "(accumulation times processes)"
        )


def is_late(deadline: float | None, device: torch.device) -> bool:
    """Whether it is past ``deadline`` for any process, so that all stop at one step."""
    late = deadline is not None and time.time() > deadline
    if deadline is None or not parallel.active():
        return late
    return parallel.average(torch.tensor(float(late), device=device)).item() > 0


def due(config: Schedule, done: int, late: bool) -> tuple[bool, ...]:
    """Whether to log, to save and to validate after ``done`` steps.

    At the end all; at a deadline log and save.
    """
    every = config.log_every, config.save_every, config.validate_every
    end, stops = done == config.steps, (late, late, False)
    pairs = zip(every, stops, strict=True)
    return tuple(n > 0 and (end or stop or done % n == 0) for n, stop in pairs)


# Losses on their way to the log


class Monitor:
    """Losses on their way to the log: checked, averaged, shown with their speed.

    They stay on the device until ``flush``, so that no step waits for the last one.

    Args:
        steps, start: of the run, and how many of them are done.
        batch_size: samples a step.
        run: where to log; None only shows.
    """

    def __init__(
        self, steps: int, start: int, batch_size: int, run: Run | None = None
    ) -> None:
        self.steps, self.batch_size, self.run = steps, batch_size, run
        self.done = start
        self.waiting: list[Tensor] = []
        quiet = parallel.rank() > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=start, disable=quiet, unit="step")
        self.restart()

    def add(self, loss: Tensor) -> None:
        """Take the loss of the next step, a tensor without axes."""
        self.waiting.append(loss)

    def flush(self, **facts: float) -> None:
        """Log the mean of the losses that wait, with ``facts``.

        Raises TrainingError for one that is not finite, naming its step and samples.
        """
        losses = torch.stack(self.waiting).tolist()
        for step, loss in enumerate(losses, self.done):
            if not math.isfinite(loss):
                raise TrainingError(self._broken(step, loss))
        loss, self.waiting = sum(losses) / len(losses), []
        self.done += len(losses)
        speed = len(losses) * self.batch_size / (time.perf_counter() - self.since)
        self.bar.set_postfix(loss=f"{loss:.4f}", samples_per_s=f"{speed:.0f}")
        self.bar.update(len(losses))
        if self.done == self.steps:
            self.bar.close()  # shows the end and leaves its line
        self.log(loss=loss, samples_per_s=round(speed, 1), **facts)

    def log(self, **record: object) -> None:
        """Log ``record`` at the present step; what follows is timed from here."""
        if self.run:
            self.run.log({"step": self.done, **record})
        self.restart()

    def validate(self, look: Callable[[nn.Module], dict], ema: nn.Module) -> None:
        """Log what ``look`` finds; keep the weights with the lowest "validation"."""
        model = parallel.whole_model(ema)
        facts = look(model)
        self.log(**facts)
        if self.run and "validation" in facts:
            self.run.save_best(facts["validation"], model.state_dict())

    def restart(self) -> None:
        """Time what follows from here."""
        self.since = time.perf_counter()

    def _broken(self, step: int, loss: float) -> str:
        kept = self.run.last_good() if self.run else "nothing was saved"
        return f"the loss is {loss} at {name_step(step + 1, self.batch_size)}; {kept}"


# Faster, or with less memory

# For a CPU: GELU's tanh made of an exponential, twice as fast, and fused multiply-adds
INDUCTOR: dict[str, Any] = {
    "cpp.use_decompose_tanh": True,
    "cpp.enable_floating_point_contract_flag": "fast",
}


def compiled(module: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    """``module`` through torch.compile, or as it is where that fails (it says so)."""
    fast = torch.compile(module, options=INDUCTOR)

    def call(batch: dict[str, Tensor]) -> Tensor:
        nonlocal fast
        try:
            return fast(batch)
        except Exception as error:
            if fast is module or is_out_of_memory(error):
                raise
            tell(f"compilation failed, going on without: {error}")
            fast = module
            return module(batch)

    return call


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Let ``blocks`` keep their inputs only, and compute the rest again when gradients
    need it: less memory for a third more time (Chen et al. 2016)."""
    for block in blocks:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False
        )
