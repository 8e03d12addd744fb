"""What the commands share: kinds of options, and what is checked of them first."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

MODEL = "tiny, sd3.5-medium, sd3.5-large, sd3.5-large-turbo, a hub id, a folder"


def option(panel: str, help: str, *names: str, usual: str = "", **how: Any) -> Any:
    """An option in a ``panel`` of a command's help; a flag where it has no metavar.

    ``usual`` says what holds without it, where its default does not.
    """
    about = f"{help} [dim]\\[default: {usual}][/dim]" if usual else help
    how = {"metavar": ""} | how
    return typer.Option(*names, help=about, rich_help_panel=panel, **how)


def examples(*lines: str) -> str:
    """The end of a command's help: a paragraph a line."""
    return "\n\n".join(("[bold]Examples[/bold]", *lines))


DEVICE = "cpu, cuda, cuda:1 or mps."
Device = Annotated[
    str | None,
    option("Model", DEVICE, metavar="NAME", usual="cuda if there is one"),
]
Overwrite = Annotated[
    bool, option("Output", "Replace files that exist already.", "--overwrite")
]


def given(value: Any, default: Any) -> Any:
    """``value``, or ``default`` where it is None."""
    return default if value is None else value


def refuse(needed: str, there: object, **options: Any) -> None:
    """Raise ValueError where one of ``options`` is set, but not what it belongs to."""
    for name, value in options.items():
        if value is not None and not there:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is {value}, which needs {needed}")


def find_device(name: str | None) -> str:
    """A device that exists: the one named, or a GPU if there is one, or the CPU."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    found = {"cpu": True, "cuda": torch.cuda.is_available()}
    found["mps"] = torch.backends.mps.is_available()
    kind, _, number = name.partition(":")
    if not found.get(kind) or not (number or "0").isdecimal():
        usable = ", ".join(kind for kind, there in found.items() if there)
        raise ValueError(f"--device is {name!r}; expected one that is here: {usable}")
    if kind == "cuda" and int(number or 0) >= (cards := torch.cuda.device_count()):
        last = f"cuda:{cards - 1}"
        raise ValueError(f"--device is {name!r}; expected cuda:0 to {last}")
    return "cpu" if kind == "cpu" else name


def find_dtype(name: str | None) -> "torch.dtype | None":
    """torch's number of that name."""
    import torch

    known = ("float32", "bfloat16", "float16")
    if name not in (None, *known):
        raise ValueError(f"--dtype is {name!r}; expected one of {', '.join(known)}")
    return None if name is None else getattr(torch, name)
