"""The bookkeeping of steps: what is due, losses, state, compilation, memory."""

import functools
import math
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from minidiff.interface.checks import check_range
from minidiff.interface.terminal import tell
from minidiff.learning import parallel
from minidiff.learning.run import Run, TrainingError, is_out_of_memory

MOMENTS = ("step", "exp_avg", "exp_avg_sq")

MOST_STEPS, MOST_SAMPLES = 10**9, 2**20  # in a run, and in a batch


# All that a run needs to go on: weights, their average, the optimiser's moments


def save_state(
    run: Run, step: int, model: nn.Module, ema: nn.Module, optimizer: Optimizer
) -> None:
    """Save all that a run needs to go on after ``step`` steps.

    Raises TrainingError, and saves nothing, where a weight is not a finite number.
    """
    tensors = {f"model/{n}": p for n, p in model.state_dict().items()}
    tensors |= {f"ema/{n}": p for n, p in ema.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value
    for name, x in tensors.items():
        x = parallel.whole(x)
        if not x.isfinite().all():
            place = name_step(step, run.settings.get("batch_size", 0))
            found = f"{name} is not finite after {place}"
            raise TrainingError(f"{found}; {run.last_good()}")
        if parallel.rank() == 0:  # one by one: a device may not hold all of them whole
            tensors[name] = x.cpu()
    run.save(step, tensors)


def name_step(step: int, batch_size: int) -> str:
    """A step, counted from 1, and its samples (unless ``batch_size`` is 0: unknown)."""
    last = step * batch_size - 1
    samples = f" (samples {last + 1 - batch_size} to {last})" if batch_size else ""
    return f"step {step}{samples}"


def restore_state(
    run: Run | None, model: nn.Module, ema: nn.Module, optimizer: Optimizer
) -> int:
    """Take back what the last :func:`save_state` saved; the steps that are done."""
    tensors, step = (run and run.restore()) or ({}, 0)
    check_together(run, step, next(model.parameters()).device)
    if not run or not step:
        return 0
    check_fit(run, step, tensors, model, optimizer)
    for part, module in (("model/", model), ("ema/", ema)):
        load_whole(module, {n: tensors[part + n] for n in module.state_dict()})
    state, names = optimizer.state_dict(), {x: n for n, x in model.named_parameters()}
    ordered = (x for group in optimizer.param_groups for x in group["params"])
    for i, parameter in enumerate(ordered):
        if parameter.requires_grad:
            kept = {
                key: tensors[f"{key}/{names[parameter]}"]
                for key in moments(optimizer, parameter)
            }
            state["state"][i] = {k: laid_like(x, parameter) for k, x in kept.items()}
    optimizer.load_state_dict(state)
    return step


def check_together(run: Run | None, step: int, device: torch.device) -> None:
    """Raise TrainingError unless all processes begin after the same ``step``."""
    if parallel.average(torch.tensor(float(step), device=device)) != step:
        folder = run and run.folder
        raise TrainingError(f"not every process sees step {step} in {folder}")


def moments(optimizer: Optimizer, parameter: nn.Parameter) -> tuple[str, ...]:
    """The keys of what an optimiser remembers; Muon has no second moment."""
    matrices = getattr(optimizer, "matrices", ())
    muon = any(parameter is x for x in matrices)
    return MOMENTS[:2] if muon else MOMENTS


def check_fit(
    run: Run,
    step: int,
    tensors: dict[str, Tensor],
    model: nn.Module,
    optimizer: Optimizer,
) -> None:
    """Raise ValueError for a checkpoint that has other names or shapes.

    That is of another model, or of another optimiser.
    """
    found = {name: tuple(x.shape) for name, x in tensors.items()}
    own = expected_shapes(model, optimizer)
    for key in sorted({*found, *own}, key=lambda k: (not k.startswith("model/"), k)):
        old, new = found.get(key, "missing"), own.get(key, "none")
        if old == new:
            continue
        if key.startswith(("model/", "ema/")):
            path = run.folder / f"step-{step}.safetensors"
            raise ValueError(
                f"{path} is of another model: {key} is {old}, expected {new}"
            )
        raise ValueError(
            f"{run.folder} was saved by another optimiser ({key} is {old}, expected "
            f"{new}): choose another folder, or the same settings to go on"
        )


def expected_shapes(
    model: nn.Module, optimizer: Optimizer
) -> dict[str, tuple[int, ...]]:
    """The name and the shape of each tensor of a run's state."""
    state = model.state_dict().items()
    shapes = {
        f"{part}/{n}": tuple(x.shape) for part in ("model", "ema") for n, x in state
    }
    for name, x in model.named_parameters():
        for key in moments(optimizer, x) if x.requires_grad else ():
            shapes[f"{key}/{name}"] = () if key == "step" else tuple(x.shape)
    return shapes


def laid_like(x: Tensor, parameter: Tensor) -> Tensor:
    """``x``, if it has axes, sharded and ordered in memory as ``parameter`` is.

    The fused optimiser walks through weight and moments as they lie in memory: those of
    a weight in channels_last must lie so too.
    """
    if x.ndim == 0:
        return x.clone()  # not mapped: the checkpoint may be deleted
    with torch.no_grad():
        return torch.empty_like(parameter).copy_(parallel.shard_like(x, parameter))


def load_whole(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load whole tensors into a module whose own may be sharded."""
    own = module.state_dict()
    module.load_state_dict(
        {n: parallel.shard_like(x, own[n]) for n, x in tensors.items()}
    )


# When to log, save and look


def check_batch(steps: int, batch_size: int, shares: int) -> None:
    """Raise ValueError for numbers of steps or samples that cannot be."""
    check_range("steps", steps, 1, MOST_STEPS)
    check_range("batch_size", batch_size, 1, MOST_SAMPLES)
    check_range("accumulation", shares, 1)
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


def due(config: Any, done: int, late: bool) -> tuple[bool, ...]:
    """Whether a training's ``config`` logs, saves and validates after ``done`` steps.

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
                kept = self.run.last_good() if self.run else "nothing was saved"
                place = name_step(step + 1, self.batch_size)
                raise TrainingError(f"the loss is {loss} at {place}; {kept}")
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


# Faster, or with less memory

# For a CPU: GELU's tanh made of an exponential, twice as fast, and fused multiply-adds
INDUCTOR: dict[str, Any] = {
    "cpp.use_decompose_tanh": True,
    "cpp.enable_floating_point_contract_flag": "fast",
}
BFLOAT16 = "amx_bf16", "avx512_bf16", "bf16"  # a processor's instructions for it


def multiplies_bfloat16(device: torch.device | str) -> bool:
    """Whether products in bfloat16 are the faster ones on ``device``.

    A processor without instructions for them takes longer than in float32.
    """
    known = torch.cpu.get_capabilities()
    return torch.device(device).type != "cpu" or any(known.get(x) for x in BFLOAT16)


def compiled(module: nn.Module) -> Callable[..., Tensor]:
    """``module`` through torch.compile, or as it is where that fails (it says so)."""
    fast = torch.compile(module, options=INDUCTOR)

    def call(*given: Any) -> Tensor:
        nonlocal fast
        try:
            return fast(*given)
        except Exception as error:
            if fast is module or is_out_of_memory(error):
                raise
            tell(f"compilation failed, going on without: {error}")
            fast = module
            return module(*given)

    return call


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Let ``blocks`` keep their inputs only, and compute the rest again when gradients
    need it: less memory for a third more time (Chen et al. 2016)."""
    for block in blocks:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False
        )
