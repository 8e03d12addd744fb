"""Model folders from the hub, through huggingface_hub; imported only when needed."""

import hashlib
import re
import time
from pathlib import Path

from minidiff.files.published import named
from minidiff.files.weights import read_header

COMPONENTS = ("scheduler", "text_encoder*", "tokenizer*", "transformer", "vae")
KINDS = ("*.json", "*.txt", "*.model", "*.safetensors")
# fp16 copies of the text encoders, and the single files' folder of them
LEFT_OUT = ["*.fp16*", "text_encoders/*"]


def download(
    name: str, t5: bool = True, check_all: bool = False, weights: bool = True
) -> Path:
    """The local folder of a hub repository or alias, downloaded where it is not yet.

    Only the files of the diffusers layout are fetched, those of a published model at
    its pinned revision; T5's weights only if ``t5``, and none without ``weights``. A
    broken connection is taken up again where it broke; after an interruption only the
    files that are missing are fetched. What was fetched is verified, with ``check_all``
    what was here before too. Raises OSError saying what is needed where the hub cannot
    be reached or refuses.
    """
    began = time.time()
    from huggingface_hub import errors, snapshot_download

    repository, revision = name, None
    if known := named(name):
        name, repository, revision = known.name, known.repository, known.revision
    kinds = KINDS if weights else ["*.json"]
    wanted = [f"{part}/{kind}" for part in COMPONENTS for kind in kinds]
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=["model_index.json", *wanted],
            ignore_patterns=LEFT_OUT if t5 else [*LEFT_OUT, "text_encoder_3/*"],
        )
    except errors.GatedRepoError:
        raise PermissionError(f"{repository} is gated: {needs(repository)}") from None
    except errors.RepositoryNotFoundError:
        what = f"{name} is not on this machine, and not on the hub or not for you"
        raise FileNotFoundError(f"{what}: {needs(repository)}") from None
    except (OSError, errors.HfHubHTTPError) as error:
        if getattr(error, "errno", None):  # of this machine: no room, not permitted, …
            what = f"{repository} cannot be kept: {error.strerror}"
            raise OSError(f"{what} ({error.filename or 'the cache'})") from None
        reason = type(error).__name__
        what = f"{name} is not on this machine and cannot be fetched ({reason})"
        raise ConnectionError(f"{what}: {needs(repository)}") from None
    except Exception as error:  # httpx's or its successor's; Xet raises RuntimeError
        if not type(error).__module__.startswith("httpx") and (
            type(error) is not RuntimeError
        ):
            raise
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ConnectionError(
            f"the download of {repository} was interrupted ({reason}); asked for "
            "again, it fetches the files that are missing"
        ) from None
    verify(Path(folder), 0 if check_all else began)
    return Path(folder)


def verify(folder: Path, since: float = 0) -> None:
    """Raise ValueError naming the first weights' file in ``folder`` that is damaged.

    The size must be what the file's header says, and the SHA-256 what the hub
    published: its cache names each file after it, where a file system has links. A file
    with another one is deleted. Files that were written before ``since`` (seconds since
    the epoch) are left out.
    """
    for file in sorted(folder.glob("*/*.safetensors")):
        stored = file.resolve()
        if stored.stat().st_mtime < since:
            continue
        if not re.fullmatch("[0-9a-f]{64}", stored.name):
            read_header(file)  # not from the hub's cache: at least its size
            continue
        with stored.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != stored.name:
            raise ValueError(
                f"{file} is damaged: its SHA-256 begins with {found[:10]}, the hub's "
                f"with {stored.name[:10]}; {discarded(stored)}; download it again"
            )


def discarded(file: Path) -> str:
    """Delete ``file``, which the next download would trust; what there is to tell."""
    try:
        file.unlink()
    except OSError:  # a cache that is read-only, or shared
        return f"delete {file}"
    return "it was deleted"


def needs(repository: str) -> str:
    """What it takes to download a gated repository, in one line."""
    return (
        f"it needs a network, the licence accepted at https://huggingface.co/{repository}"
        " and a token of that account with the right to read gated repositories "
        "(`hf auth login`, or HF_TOKEN in the environment)"
    )
