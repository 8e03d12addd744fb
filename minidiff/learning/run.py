"""A training run's folder: what is trained, its log, its checkpoints, its lock.

It holds ``run.json`` (what is trained, and how), ``log.jsonl`` (one JSON object a
line), ``step-N.safetensors`` (the last few checkpoints, with a checksum),
``best.safetensors`` and a lock that the operating system frees when the process ends,
however it ends.
"""

import functools
import hashlib
import importlib.util
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minidiff.files.disk import (
    LONGEST_TEXT,
    check_length,
    excerpt,
    parse_json,
    read_bytes,
    read_json,
    replacing,
    sweep,
    write_text,
)
from minidiff.files.weights import open_tensors
from minidiff.interface.terminal import is_refused_memory, tell
from minidiff.learning import parallel

Tensors = dict[str, Tensor]

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RESULTS = ("model", "judge", "pytorch_lora_weights.safetensors")


# Tensors in a file with a checksum, and names made of what made them


def fingerprint(*parts: object) -> str:
    """A short name for what made a file: tensors by their bytes, others by repr."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            content = part.detach().contiguous().cpu().flatten().view(torch.uint8)
            digest.update(content.numpy().data)
        else:
            digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return digest.hexdigest()[:16]


def checksum(tensors: Tensors, metadata: dict[str, object]) -> str:
    """A fingerprint of names, dtypes, shapes and bytes, and of what stands beside."""
    shapes = [(k, x.dtype, tuple(x.shape)) for k, x in sorted(tensors.items())]
    about = sorted(metadata.items()), shapes
    return fingerprint(about, *(tensors[name] for name in sorted(tensors)))


def save_tensors(path: Path, tensors: Tensors, **metadata: object) -> None:
    """``tensors`` as one safetensors file, atomically; ``metadata`` beside them."""
    tensors = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    about = metadata | {"checksum": checksum(tensors, metadata)}
    with replacing(path) as part:
        save_file(tensors, part, {"about": json.dumps(about)})


def load_tensors(path: Path) -> tuple[Tensors, dict[str, object]]:
    """The tensors and the metadata that :func:`save_tensors` wrote.

    Raises ValueError for a file that is not whole, or not what was written.
    """
    file = open_tensors(path)
    tensors, notes = {name: file.read(name) for name in file.entries}, file.metadata
    metadata = parse_json(notes.get("about", "{}"), f"what {path} says")
    if metadata.pop("checksum", None) != checksum(tensors, metadata):
        raise ValueError(f"{path} is damaged: it has not the checksum of its tensors")
    return tensors, metadata


def cached(
    path: Path | None,
    make: Callable[[], Tensors],
    device: str | torch.device,
    writer: int = 0,
) -> Tensors:
    """What ``make`` returns, on ``device``; kept in the file ``path``, if there is one.

    Of several processes ``writer`` writes. A damaged file is made again.
    """
    made = None
    if path and path.exists():
        try:
            made = load_tensors(path)[0]
        except ValueError as error:
            tell(f"{error}; it is made again")
    if made is None:
        made = make()
        if path and parallel.rank() == writer:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(path, made)
    return {name: x.to(device) for name, x in made.items()}


class TrainingError(ValueError):
    """Training cannot go on; the message says where it stopped and what is kept."""


# Before a run


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


def check_other(output: Path, own: str, other: str) -> None:
    """Raise ValueError where what stands in ``output`` is not this training's.

    ``own`` and ``other`` are the folders in which the two kinds of training keep runs.
    """
    foreign = any((output / name).exists() for name in RESULTS)
    if (output / other).exists() or (foreign and not (output / own).exists()):
        raise ValueError(
            f"{output} holds another training or model; expected a folder of its own"
        )


def lasting(config: "DataclassInstance") -> dict[str, Any]:
    """Of a configuration what changes the weights, for a run's settings.

    How often is logged, saved and validated does not; compilation and shorter numbers,
    which follow the machine, do not much.
    """
    passing = ("compile", "bfloat16", "log_every", "save_every", "validate_every")
    return {k: v for k, v in asdict(config).items() if k not in passing}


# The run


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

    def __init__(
        self, folder: Path | str, settings: dict[str, Any], keep: int = 2
    ) -> None:
        self.folder, self.keep = Path(folder), keep
        self.step: int | None = None
        self.settings = json.loads(json.dumps(settings))
        self.file, self.log_file = self.folder / "run.json", self.folder / "log.jsonl"

    def __enter__(self) -> "Run":
        if parallel.rank() == 0:
            self._open()
        parallel.wait()
        return self

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = take_lock(self.folder / "lock")
        try:
            self.check()
            if not self.file.exists():
                self._write(self.settings)
        except BaseException:
            self._lock.close()
            raise
        sweep(self.folder.resolve())

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if parallel.rank() == 0:
            self._lock.close()
        if is_out_of_memory(error):
            raise TrainingError(self._too_large()) from error

    def _too_large(self) -> str:
        what = "the model, its average, and what to learn from"
        less = "a smaller model, or fewer pictures or latents (in a new folder)"
        if self.step is not None:
            what = f"a batch of {self.settings.get('batch_size')}"
            less = "a smaller one (in a new folder)"
            if self.settings.get("stage", "transformer") == "transformer":
                less += ", or --recompute"
        return f"the memory does not hold {what}: expected {less}; {self.last_good()}"

    # What is trained

    def check(self) -> None:
        """Raise ValueError where a run with other settings was begun.

        Only settings that both know are compared: older runs may lack some.
        """
        found = self._begun()
        for key in sorted(found.keys() & self.settings.keys()):
            old, new = found[key], self.settings[key]
            if old != new:
                raise ValueError(
                    f"{self.folder} holds a run with {key} = {excerpt(old)}, not {new}:"
                    " choose another folder, or the same settings to go on"
                )

    def add(self, **settings: object) -> None:
        """More settings, which are known only now; checked like the first ones."""
        self.settings |= settings
        self.check()
        if parallel.rank() == 0:
            self._write(self._begun() | self.settings)

    def _begun(self) -> dict[str, Any]:
        """The settings with which the run was begun, if it was."""
        return read_json(self.file) if self.file.exists() else {}

    def _write(self, settings: dict[str, Any]) -> None:
        write_text(self.file, json.dumps(settings, indent=1))

    # Checkpoints

    def checkpoints(self) -> list[Path]:
        """The numbered checkpoints, newest first; copies under other names are none."""
        paths = self.folder.glob("step-*.safetensors")
        numbered = (p for p in paths if p.stem[5:].isdecimal() and p.is_file())
        return sorted(numbered, key=step_of, reverse=True)

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
                if metadata.get("step") != step_of(path):
                    raise ValueError(f"{path} is of another step: {metadata}")
            except (ValueError, FileNotFoundError) as error:
                tell(f"{error}; it is left out")
                continue
            self._rewind(step_of(path))
            return tensors, step_of(path)
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
            kept = load_tensors(path)[1].get("score")
        except (FileNotFoundError, ValueError):  # none yet, or damaged
            kept = None
        if not isinstance(kept, int | float) or score < kept:
            save_tensors(path, tensors, score=score)

    def _rewind(self, step: int) -> None:
        """Forget what came after ``step``."""
        self.step = step
        if parallel.rank():
            return
        for later in (p for p in self.checkpoints() if step_of(p) > step):
            later.unlink()
        if self.log_file.exists():
            kept = [r for r in read_log(self.log_file) if r.get("step", 0) <= step]
            write_text(self.log_file, "".join(json.dumps(r) + "\n" for r in kept))

    # The log

    def log(self, record: dict[str, Any]) -> None:
        """Append ``record`` to ``log.jsonl``, with the time of day."""
        self.step = record.get("step", self.step)
        if parallel.rank():
            return
        try:
            with self.log_file.open("a") as file:
                file.write(json.dumps({**record, "time": round(time.time(), 2)}) + "\n")
        except OSError as error:
            reason = f"cannot write {self.log_file}: {error.strerror}"
            raise OSError(f"{reason}; {self.last_good()}") from error
        if board := tensorboard(self.folder):
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    board.add_scalar(name, value, record.get("step", 0))


def take_lock(path: Path) -> IO[str]:
    """Open and lock ``path`` until it is closed; ValueError where another has done so.

    Where the file system has no locks, a line says so.
    """
    if path.exists():
        check_length(path, LONGEST_TEXT)  # a pipe would wait for its reader
    file = path.open("a")
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(
            f"another process trains in {path.parent}; expected a folder of its own"
        ) from None
    except OSError as error:
        tell(f"{path.parent} is not locked: {error}")
    return file


def step_of(checkpoint: Path) -> int:
    """The step after which a run's checkpoint was saved."""
    return int(checkpoint.stem[5:])


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether PyTorch could not get memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or is_refused_memory(error)


@functools.cache
def tensorboard(folder: Path) -> Any:
    """A writer of TensorBoard's files in ``folder``; None where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)


def read_log(path: Path | str) -> list[dict[str, Any]]:
    """The records of a JSON-lines log; what a kill or damage left of one is left out.

    Raises ValueError for what is no file.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = map(parse_record, read_bytes(path, LONGEST_TEXT).splitlines())
    return [record for record in records if record is not None]


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record in a line of a log; None for a line that holds none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = isinstance(record, dict) and isinstance(record.get("step", 0), int)
    return record if known else None
