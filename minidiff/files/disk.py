"""What others wrote, read within bounds; what we write, written whole.

A reader sees the old bytes of a file or the new, never a part: a file grows in a hidden
folder beside the place that it will take. Its writer holds that folder locked: one that
nobody holds is what a kill left, and the next writer removes it. Nothing large is
imported here.
"""

import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cache
from hashlib import sha256
from itertools import count, islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minidiff.interface.limits import MOST_PICTURES

# Bytes: several times what real files have
LONGEST_CONFIG, LONGEST_TABLE, LONGEST_TEXT = 1_000_000, 10_000_000, 100_000_000
LONGEST_ECHO = 100  # characters of a file that an error repeats
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

if sys.platform != "win32":
    import fcntl
HIDDEN = ".minidiff-"


def excerpt(found: object, longest: int = LONGEST_ECHO) -> str:
    """What an error repeats of what was found: of a long text the beginning."""
    text = str(found)
    return text if len(text) <= longest else f"{text[:longest]}…"


def file_size(path: Path | str) -> int:
    """Bytes of an ordinary file; what is no file is refused before it is opened."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        what = "is a link to a file that is" if os.path.islink(path) else "is"
        raise FileNotFoundError(f"{path} {what} missing") from None
    except ValueError:  # a zero byte
        raise ValueError(f"{excerpt(repr(path))} is not a file's name") from None
    if kind := KINDS.get(stat.S_IFMT(found.st_mode)):
        raise ValueError(f"{path} is {kind}; expected a file")
    return found.st_size


def check_length(path: Path | str, limit: int) -> None:
    """Raise ValueError unless ``path`` is a file of at most ``limit`` bytes."""
    if (size := file_size(path)) > limit:
        raise ValueError(f"{path} has {size:,} bytes; expected at most {limit:,}")


def read_bytes(path: Path | str, limit: int) -> bytes:
    """The content of a file of at most ``limit`` bytes, which may grow meanwhile."""
    check_length(path, limit)
    try:
        with open(path, "rb") as file:
            found = file.read(limit + 1)
    except OSError as error:  # of which reading alone tells no name
        raise OSError(error.errno, error.strerror, str(path)) from None
    if len(found) > limit:
        raise ValueError(f"{path} has over {limit:,} bytes; expected no more")
    return found


def read_text(path: Path | str, limit: int = LONGEST_TEXT) -> str:
    """A text in UTF-8, with or without a byte order mark; ValueError for another."""
    try:
        text = read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text in UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path | str) -> Iterator[str]:
    """The lines of a text, one at a time: it may hold millions."""
    return (found[0] for found in re.finditer("(?m)^.*", read_text(path)))


def parse_json(text: str | bytes, name: object) -> dict[str, Any]:
    """The object that ``text`` is; ValueError naming ``name`` for anything else."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"{name} is not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds a {type(content).__name__}; expected an object")
    return content


def read_json(path: Path | str, limit: int = LONGEST_CONFIG) -> dict[str, Any]:
    """The object in a JSON file; raises FileNotFoundError or ValueError naming it."""
    return parse_json(read_text(path, limit), path)


def read_prompts(file: Path | str) -> list[str]:
    """The lines of a UTF-8 file that are not blank; ValueError for none or too many."""
    lines = filter(None, map(str.strip, read_lines(file)))
    prompts = list(islice(lines, MOST_PICTURES + 1))
    if not prompts:
        raise ValueError(f"{file} holds no prompt; expected one on each line")
    if len(prompts) > MOST_PICTURES:
        found = f"{file} holds over {MOST_PICTURES:,} prompts"
        raise ValueError(f"{found}; expected at most {MOST_PICTURES:,}")
    return prompts


# One file


def replacing(file: Path | str) -> AbstractContextManager[Path]:
    """Another name to write ``file`` under; at the end it takes its place in one step.

    A reader, and a model whose weights are still mapped from the old file, see the old
    bytes or the new, never a part. An error (a full disk, say; on Windows an old file
    that is still mapped) leaves the old: OSError.
    """
    return growing(Path(file), os.replace)


def creating(file: Path | str) -> AbstractContextManager[Path]:
    """As ``replacing``, but FileExistsError where there is a ``file`` already."""
    if os.path.lexists(file):
        raise taken(file)
    return growing(Path(file), give_name)


def taken(file: Path | str) -> FileExistsError:
    """The error of a name that is not free."""
    return FileExistsError(f"{file} exists; expected a free name")


@contextmanager
def growing(file: Path, place: Callable[[Path, Path], None]) -> Iterator[Path]:
    """Where to write ``file``, until ``place`` puts it there, in the usual mode."""
    if file.exists():
        file_size(file)  # refuses what is no file
    try:
        with workshop(file.parent, secrets.token_hex(8)) as folder:
            part = folder / file.name
            part.touch()
            mode = (file if file.exists() else part).stat().st_mode
            yield part
            with part.open("rb+") as written:
                os.fsync(written.fileno())
            part.chmod(stat.S_IMODE(mode))  # safetensors' own is for one user alone
            place(part, file)
    except FileExistsError:
        raise taken(file) from None
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {file}: {reason}") from error


def give_name(part: Path, file: Path) -> None:
    """Call a whole file ``file``; FileExistsError where something has that name."""
    try:
        os.link(part, file)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        file.touch(exist_ok=False)
        os.replace(part, file)


def write_text(path: Path | str, text: str) -> None:
    """Write a text in UTF-8; ValueError for one that has half of a pair."""
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        found = f"the text for {path} has half of a pair at {error.start}"
        raise ValueError(f"{found}; expected characters of UTF-8") from None
    with replacing(path) as part:
        part.write_bytes(content)


def write_json(path: Path | str, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented and in UTF-8."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


# Names


def numbered(file: Path) -> Iterator[Path]:
    """picture.png, picture-1.png, picture-2.png, …"""
    yield file
    yield from (file.with_stem(f"{file.stem}-{i}") for i in count(1))


def check_output(file: Path, overwrite: bool = False) -> None:
    """Raise ValueError unless ``file`` is a free name, or may be replaced."""
    if file.is_symlink() and not file.exists():
        raise ValueError(f"{file} is a link to what is not there; expected a file")
    if file.exists():
        file_size(file)  # refuses what is no file
        if not overwrite:
            raise ValueError(f"{file} exists; expected a free name, or --overwrite")
    if not file.parent.is_dir():
        raise ValueError(f"{file} cannot be written: {file.parent} is not a folder")


@contextmanager
def reserved(file: Path, overwrite: bool = False) -> Iterator[None]:
    """Hold the name ``file``, before the work, against other runs.

    Raises ValueError where it cannot be written, or another run holds it; with
    ``overwrite`` several may.
    """
    check_output(file, overwrite)
    name = sha256(os.fsencode(file.name)).hexdigest()[:16]
    with ExitStack() as held:
        try:
            unique = secrets.token_hex(8) if overwrite else name
            held.enter_context(workshop(file.parent, unique))
        except FileExistsError:
            found = f"{file} is being written by another run"
            raise ValueError(f"{found}; expected a free name") from None
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"{file} cannot be written: {reason}") from None
        yield


# Hidden folders


@contextmanager
def workshop(parent: Path, name: str) -> Iterator[Path]:
    """A hidden folder in ``parent``, gone at the end, however that comes.

    Raises FileExistsError where another process holds the folder of that ``name``.
    """
    sweep(parent.resolve())
    folder = parent / f"{HIDDEN}{name}"
    held = claim(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def claim(folder: Path) -> int:
    """Make ``folder`` and lock it; the open file that holds the lock."""
    folder.mkdir(0o700)
    if sys.platform == "win32":  # where folders cannot be locked, and none is swept
        return os.open(os.devnull, os.O_RDONLY)
    with suppress(FileNotFoundError):
        held = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(held, fcntl.LOCK_EX)
        if os.path.samestat(os.fstat(held), folder.stat()):
            return held
    return claim(folder)  # it was swept before it was locked


@cache
def sweep(parent: Path) -> None:
    """Remove the hidden folders in ``parent`` that no process holds: a kill left them.

    Once a process is enough.
    """
    if sys.platform == "win32":
        return
    for left in parent.glob(f"{HIDDEN}*"):
        with suppress(OSError):
            held = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(held)
