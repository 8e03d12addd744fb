"""What makes a training run safe to kill: its folder, checkpoints, log and caches.

A run's folder holds ``run.json`` (what is trained, and how), ``log.jsonl`` (one JSON
object a line), ``step-N.safetensors`` (the last few checkpoints), ``best.safetensors``
and a lock that the operating system frees when the process ends, however it ends.
"""

import functools
import hashlib
import importlib.util
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint as again
from tqdm import tqdm

from minidiff.files.writing import replacing, sweep, write_text
from minidiff.interface.terminal import is_refused_memory, tell
from minidiff.learning import parallel

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


def lock(file: IO) -> None:
    """Lock ``file`` until it is closed.

    Raises BlockingIOError or PermissionError where another process has done so.
    """
    if sys.platform == "win32":
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class TrainingError(ValueError):
    """Training cannot go on; the message says where it stopped and what is kept."""


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: object) -> None:
    """``tensors`` as one safetensors file, atomically; ``metadata`` beside them."""
    tensors = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    notes = {key: json.dumps(value) for key, value in metadata.items()}
    with replacing(path) as part:
        save_file(tensors, part, notes)


def cached(
    path: Path | None,
    make: Callable[[], dict[str, Tensor]],
    device: str | torch.device,
) -> dict[str, Tensor]:
    """What ``make`` returns, on ``device``; kept in the file ``path``, if there is one.

    Of several processes the first writes.
    """
    if path and path.exists():
        made = load_tensors(path)[0]
    else:
        made = make()
        if path and parallel.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(path, made)
    return {name: x.to(device) for name, x in made.items()}


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors and the metadata that :func:`save_tensors` wrote.

    Raises ValueError for a file that is no whole safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), {k: json.loads(v) for k, v in metadata.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def check_folder(path: Path) -> None:
    """Make the folder ``path``; ValueError or OSError if nothing can be written in."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; expected a folder, or a free name")
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path} cannot be written into: {reason}") from None


RESULTS = ("model", "judge", "pytorch_lora_weights.safetensors")


def check_other(output: Path, own: str, other: str) -> None:
    """Raise ValueError where what stands in ``output`` is not this training's.

    ``own`` and ``other`` are the folders in which the two kinds of training keep runs.
    """
    foreign = any((output / name).exists() for name in RESULTS)
    if (output / other).exists() or (foreign and not (output / own).exists()):
        raise ValueError(
            f"{output} holds another training or model; expected a folder of its own"
        )


class Run:
    """A folder that holds one training run. A context manager: it holds the lock.

    Of several processes the first writes, and all read.

    Args:
        folder: made if missing.
        settings: what must be equal for the run to go on (JSON values); a folder begun
            with other settings raises ValueError and names the difference.
        keep: how many of the last checkpoints stay.

    ``step`` tells how many steps are done and logged, None before learning begins.
    """

    def __init__(self, folder: Path | str, settings: dict, keep: int = 2) -> None:
        self.folder, self.keep, self.step = Path(folder), keep, None
        self.settings = json.loads(json.dumps(settings))

    def __enter__(self) -> "Run":
        if parallel.rank() == 0:
            self._open()
        parallel.wait()
        return self

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / "lock", "a")
        try:
            lock(self._lock)
        except (BlockingIOError, PermissionError):
            self._lock.close()
            raise ValueError(
                f"another process trains in {self.folder}; expected a folder of its own"
            ) from None
        except OSError as error:  # some file systems have no locks
            tell(f"{self.folder} is not locked: {error}")
        try:
            self.check()
        except BaseException:
            self._lock.close()
            raise
        path = self.folder / "run.json"
        if not path.exists():
            write_text(path, json.dumps(self.settings, indent=1))
        sweep(self.folder.resolve())

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if parallel.rank() == 0:
            self._lock.close()
        if is_out_of_memory(error):
            what = "the model, its average, and what to learn from"
            less = "a smaller model, or fewer pictures or latents (in a new folder)"
            if self.step is not None:
                what = f"a batch of {self.settings.get('batch_size')}"
                less = "a smaller one (in a new folder)"
                if self.settings.get("stage", "transformer") == "transformer":
                    less += ", or --recompute"
            raise TrainingError(
                f"the memory does not hold {what}: expected {less}; {self.last_good()}"
            ) from error

    def check(self) -> None:
        """Raise ValueError where a run with other settings was begun.

        Only settings that both know are compared: older runs may lack some.
        """
        found = self._begun()
        for key in sorted(found.keys() & self.settings.keys()):
            old, new = found[key], self.settings[key]
            if old != new:
                raise ValueError(
                    f"{self.folder} holds a run with {key} = {old}, not {new}: choose "
                    "another folder, or the same settings to go on"
                )

    def _begun(self) -> dict:
        """The settings with which the run was begun, if it was."""
        path = self.folder / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def add(self, **settings: object) -> None:
        """More settings, which are known only now; checked like the first ones."""
        self.settings |= settings
        self.check()
        if parallel.rank() == 0:
            text = json.dumps(self._begun() | self.settings, indent=1)
            write_text(self.folder / "run.json", text)

    def checkpoints(self) -> list[Path]:
        """The numbered checkpoints, newest first; copies under other names are none."""
        paths = self.folder.glob("step-*.safetensors")
        numbered = (path for path in paths if path.stem[5:].isdecimal())
        return sorted(numbered, key=number, reverse=True)

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Checkpoint after ``step`` steps; older ones than the last ``keep`` go."""
        if parallel.rank():
            return
        try:
            save_tensors(self.folder / f"step-{step}.safetensors", tensors, step=step)
        except OSError as error:
            raise OSError(f"{error}; {self.last_good()}") from error
        for path in self.checkpoints()[self.keep :]:
            path.unlink()

    def restore(self) -> tuple[dict[str, Tensor], int] | None:
        """The newest checkpoint that is whole, and its step; None if there is none.

        Damaged ones that are newer go.
        """
        for path in self.checkpoints():
            try:
                tensors, metadata = load_tensors(path)
            except (ValueError, FileNotFoundError) as error:
                tell(f"{error}; it is left out")
                continue
            self._rewind(metadata["step"])
            return tensors, metadata["step"]
        self._rewind(0)
        return None

    def last_good(self) -> str:
        """The newest checkpoint's name, for messages."""
        paths = self.checkpoints()
        return (
            f"the last good checkpoint is {paths[0]}" if paths else "none was saved yet"
        )

    def save_best(self, score: float, tensors: dict[str, Tensor]) -> None:
        """Keep ``tensors`` as ``best.safetensors`` unless a lower score was kept.

        A score that is not finite is none.
        """
        path = self.folder / "best.safetensors"
        if parallel.rank() or not math.isfinite(score):
            return
        try:
            kept = load_tensors(path)[1]["score"]
        except (FileNotFoundError, ValueError):  # none yet, or damaged
            kept = math.inf
        if score < kept:
            save_tensors(path, tensors, score=score)

    def log(self, record: dict) -> None:
        """Append ``record`` to ``log.jsonl``, with the time of day."""
        self.step = record.get("step", self.step)
        if parallel.rank():
            return
        path = self.folder / "log.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps({**record, "time": round(time.time(), 2)}) + "\n")
        except OSError as error:
            reason = f"cannot write {path}: {error.strerror}"
            raise OSError(f"{reason}; {self.last_good()}") from error
        if board := tensorboard(self.folder):
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    board.add_scalar(name, value, record.get("step", 0))

    def _rewind(self, step: int) -> None:
        self.step = step
        if parallel.rank():
            return
        for later in (p for p in self.checkpoints() if number(p) > step):
            later.unlink()
        path = self.folder / "log.jsonl"
        kept = [line for line in read_log(path) if line.get("step", 0) <= step]
        if path.exists():
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_text(path, text)


def number(checkpoint: Path) -> int:
    """The step after which a run's checkpoint was saved."""
    return int(checkpoint.stem[5:])


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether PyTorch could not get memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or is_refused_memory(error)


def lasting(config: object) -> dict:
    """Of a configuration (a dataclass) what changes the weights, for a run's settings.

    How often is logged, saved and validated does not, nor does compilation much.
    """
    passing = ("compile", "log_every", "save_every", "validate_every")
    return {k: v for k, v in asdict(config).items() if k not in passing}


def is_late(deadline: float | None, device: torch.device) -> bool:
    """Whether it is past ``deadline`` for any process, so that all stop at one step."""
    late = deadline is not None and time.time() > deadline
    if deadline is None or not parallel.active():
        return late
    return parallel.average(torch.tensor(float(late), device=device)).item() > 0


def due(config: object, done: int, late: bool) -> tuple[bool, ...]:
    """Whether to log, to save and to validate after ``done`` steps.

    At the end all; at a deadline log and save.
    """
    every = config.log_every, config.save_every, config.validate_every
    end, stops = done == config.steps, (late, late, False)
    pairs = zip(every, stops, strict=True)
    return tuple(n > 0 and (end or stop or done % n == 0) for n, stop in pairs)


def checkpoint(
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


def restore(
    run: Run | None, model: nn.Module, ema: nn.Module, optimizer: Optimizer
) -> int:
    """Take back what the last :func:`checkpoint` saved; the steps that are done."""
    tensors, step = (run and run.restore()) or ({}, 0)
    first = next(model.parameters())
    if parallel.average(torch.tensor(float(step), device=first.device)) != step:
        raise TrainingError(f"not every process sees step {step} in {run.folder}")
    if not step:
        return 0
    check_fit(run.folder / f"step-{step}.safetensors", tensors, model)
    for part, module in (("model/", model), ("ema/", ema)):
        load_whole(module, {n: tensors[part + n] for n in module.state_dict()})
    state = optimizer.state_dict()
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if not parameter.requires_grad:
            continue
        kept = moments(tensors, name)
        if kept.keys() != wanted(optimizer, parameter):
            raise ValueError(
                f"{run.folder} was saved by another optimiser ({name}): choose another "
                "folder, or the same settings to go on"
            )
        state["state"][i] = {key: laid_like(x, parameter) for key, x in kept.items()}
    optimizer.load_state_dict(state)
    return step


def moments(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """What a checkpoint's optimiser remembered of the parameter ``name``."""
    keys = ("step", "exp_avg", "exp_avg_sq")
    return {k: tensors[f"{k}/{name}"] for k in keys if f"{k}/{name}" in tensors}


def wanted(optimizer: Optimizer, parameter: nn.Parameter) -> set[str]:
    """The keys of what an optimiser remembers; Muon has no second moment."""
    matrices = getattr(optimizer, "matrices", ())
    muon = any(parameter is x for x in matrices)
    return {"step", "exp_avg"} | (set() if muon else {"exp_avg_sq"})


def check_fit(path: Path, tensors: dict[str, Tensor], model: nn.Module) -> None:
    """Raise ValueError for a checkpoint whose model has other names or shapes."""
    found = {n: tuple(x.shape) for n, x in tensors.items() if n.startswith("model/")}
    own = {f"model/{n}": tuple(x.shape) for n, x in model.state_dict().items()}
    for key in sorted({*found, *own}):
        old, new = found.get(key, "missing"), own.get(key, "none")
        if old != new:
            raise ValueError(
                f"{path} is of another model: {key} is {old}, expected {new}"
            )


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


# For a CPU: GELU's tanh made of an exponential, twice as fast, and fused multiply-adds.
INDUCTOR = {
    "cpp.use_decompose_tanh": True,
    "cpp.enable_floating_point_contract_flag": "fast",
}


def compiled(module: nn.Module) -> Callable:
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


def check_batch(steps: int, batch_size: int, shares: int) -> None:
    """Raise ValueError for numbers of steps or samples that cannot be."""
    if steps < 1 or batch_size < 1 or shares < 1:
        raise ValueError(
            f"steps {steps}, batch size {batch_size}, parts {shares}: expected at "
            "least 1 of each"
        )
    if batch_size % shares:
        raise ValueError(
            f"a batch of {batch_size} samples cannot be cut into {shares} equal parts "
            "(accumulation times processes)"
        )


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
        self.done, self.waiting = start, []
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


@functools.cache
def tensorboard(folder: Path) -> Any:
    """A writer of TensorBoard's files in ``folder``; None where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Let ``blocks`` keep their inputs only, and compute the rest again when gradients
    need it: less memory for a third more time (Chen et al. 2016)."""
    for block in blocks:
        block.forward = functools.partial(again, block.forward, use_reentrant=False)


def read_log(path: Path | str) -> list[dict]:
    """The records of a JSON-lines log; a line cut off by a kill is left out."""
    records, path = [], Path(path)
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def fingerprint(*parts: object) -> str:
    """A short name for what made a file: tensors by their bytes, others by repr."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().contiguous().cpu().view(torch.uint8)
            part = memoryview(part.numpy())
        known = isinstance(part, bytes | memoryview)
        digest.update(part if known else repr(part).encode())
    return digest.hexdigest()[:16]
