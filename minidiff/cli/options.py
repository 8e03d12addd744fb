"""What commands declare and ask alike: groups of options, the device, the version."""

import functools
from collections.abc import Callable
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


def checked(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, refusing options without those that they need.

    What an error says of a parameter, it says of the option: "--steps is 0; …".
    """
    options = options_of(command)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, (spelled, needs) in options.items():
            needed, _, about = needs.partition(", ")
            if needs and is_set(given[name]) and not given[needed]:
                found = f"{spelled} is {given[name]}, which needs {options[needed][0]}"
                raise ValueError(found + (about and f", {about}"))
        try:
            command(**given)
        except ValueError as error:
            name, said, rest = str(error).partition(" is ")
            if name not in options or not is_set(given[name]):
                raise
            raise ValueError(f"{options[name][0]}{said}{rest}") from error

    return run


def options_of(command: Callable[..., None]) -> dict[str, tuple[str, str]]:
    """How each parameter that is an option is spelled, and what it needs."""
    found = {}
    for name, hint in command.__annotations__.items():
        for option in getattr(hint, "__metadata__", ()):
            if hasattr(option, "needs"):
                usual = f"--{name.replace('_', '-')}"
                long = [n for n in option.names if n.startswith("--")]
                found[name] = (*long, usual)[0], option.needs
    return found


def is_set(value: object) -> bool:
    """Whether an option was given: a flag that was not is False."""
    return value is not None and value is not False


def find_device(name: str | None) -> str:
    """A device that exists: the one named, or a GPU if there is one, or the CPU."""
    import torch

    from minidiff.interface.checks import find_target

    usual = "cuda" if torch.cuda.is_available() else "cpu"
    device = find_target(usual if name is None else name, None)[0]
    return "cpu" if device.type == "cpu" else str(device)
