"""What commands declare and ask alike: groups of options, the device, the version."""

from importlib.metadata import version
from typing import Annotated, Any, Literal

import typer

MODEL = (
    "tiny, tiny-turbo, sd3.5-medium, sd3.5-large, sd3.5-large-turbo, a hub id, a folder"
)


class Group:
    """The options of one panel of a command's help."""

    def __init__(self, panel: str) -> None:
        self.panel = panel

    def __call__(
        self,
        help: str,
        *names: str,
        usual: str | bool = True,
        needs: str = "",
        **how: Any,
    ) -> Any:
        """An option; ``usual`` says what holds without it, where no value does.

        ``needs``: the parameter without which it says nothing, and what that one is.
        """
        how |= {"show_default": usual, "rich_help_panel": self.panel}
        option: Any = typer.Option(*names, help=help, **how)
        option.names, option.needs = names, needs
        return option


def examples(*lines: str) -> str:
    """The end of a command's help: a paragraph a line."""
    return "\n\n".join(("[bold]Examples[/bold]", *lines))


WHO, OUT = Group("Model"), Group("Output")
Device = Annotated[
    str | None, WHO("cpu, cuda, cuda:1 or mps.", usual="cuda if there is one")
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    WHO(
        "float32, bfloat16 or float16.",
        usual="float32 on a CPU, else bfloat16",
        metavar="<str>",
    ),
]
Overwrite = Annotated[bool, OUT("Replace files that exist already.", "--overwrite")]


def show_version(asked: bool) -> None:
    """Print the version and leave."""
    if asked:
        print(f"minidiff {version('minidiff')}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version",
        help="Show the version and exit.",
        callback=show_version,
        is_eager=True,
    ),
]


def about(version: Version = False) -> None:
    """Stable Diffusion 3.5 from scratch: draw, train and measure."""


# What the commands ask first


def find_device(name: str | None) -> str:
    """A device that exists: the one named, or a GPU if there is one, or the CPU."""
    import torch

    from minidiff.interface.checks import find_target

    usual = "cuda" if torch.cuda.is_available() else "cpu"
    device = find_target(usual if name is None else name, None)[0]
    return "cpu" if device.type == "cpu" else str(device)
