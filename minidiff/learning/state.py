"""All that a run needs to go on: weights, their average, the optimiser's moments."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minidiff.learning import parallel
from minidiff.learning.run import Run, TrainingError

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


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
    state = optimizer.state_dict()
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            kept = {
                key: tensors[f"{key}/{name}"] for key in moments(optimizer, parameter)
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
