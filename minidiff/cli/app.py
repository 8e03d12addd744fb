"""The program: its commands, and how an error of one is told in a line."""

import inspect
import sys
import warnings
from importlib.metadata import version
from typing import Annotated, TextIO

import typer

from minidiff.cli import INTERRUPTED, download, evaluate, info, sample, train
from minidiff.interface.terminal import brief, cut, is_refused_memory, tell

app = typer.Typer(
    epilog='Begin with: [bold]minidiff sample "a red dress on a blue background"[/]',
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for module in (sample, train, evaluate, download, info):
    command = getattr(module, module.__name__.rpartition(".")[2])
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    unwrapped = "\n\n".join(" ".join(text.split()) for text in paragraphs)
    app.command(help=unwrapped, epilog=module.EXAMPLES)(command)


def show_version(asked: bool) -> None:
    """Print the version and leave."""
    if asked:
        print(f"minidiff {version('minidiff')}")
        raise typer.Exit


Version = typer.Option(
    "--version", help="Show the version and exit.", callback=show_version, metavar=""
)
Version.is_eager = True


@app.callback()
def program(version: Annotated[bool, Version] = False) -> None:
    """Stable Diffusion 3.5 from scratch: draw, train and measure."""


def run(arguments: list[str]) -> tuple[int, str]:
    """Run a command: its exit status and, where it failed, one line that says why."""
    told = set[str]()
    warnings.showwarning = lambda message, *_: tell_once(one_line(message), told)
    allow_all_names(sys.stdout)
    try:
        given = arguments or ["--help"]
        code = app(args=given, prog_name="minidiff", standalone_mode=False)
    except typer.Abort:
        return INTERRUPTED, ""
    except OSError as error:
        named = error.filename and error.strerror
        found = f"{cut(str(error.filename))}: {error.strerror}"
        return 2, one_line(found if named else error)
    except ValueError as error:
        return 2, one_line(error)
    except Exception as error:
        return 2, one_line(explain(error))
    return (code if isinstance(code, int) else 0), ""


def allow_all_names(stream: TextIO) -> None:
    """Let ``stream`` print what its encoding lacks, and names that are no text."""
    if hasattr(stream, "reconfigure"):
        whole = stream.encoding.lower() == "utf-8" and sys.platform != "win32"
        stream.reconfigure(errors="surrogateescape" if whole else "replace")


def explain(error: Exception) -> str:
    """What to tell of the option parser's errors and some of torch's; raises others."""
    if hasattr(error, "format_message"):  # the option parser's
        return error.format_message()
    less = "fewer or smaller pictures at once, or a smaller batch, need less"
    if type(error).__name__ == "OutOfMemoryError":  # of a GPU
        return f"{str(error).split('. ')[0]}; {less} (sample has --memory)"
    if isinstance(error, MemoryError) or is_refused_memory(error):
        return f"this machine's memory is full; {less}"
    found = f"{type(error).__name__} {error}"
    if "InvalidCxxCompiler" in found or "Compiler: cl is not found" in found:
        return "--compile needs a C++ compiler; expected g++, clang++ or cl in PATH"
    if "Failed to find C compiler" in found:  # Triton's, at its first kernel
        return "kernels for a GPU need a C compiler; expected gcc or clang in PATH"
    if "TritonMissing" in found:
        return "--compile needs Triton on a GPU; expected a PyTorch that comes with it"
    raise error


def tell_once(line: str, told: set[str]) -> None:
    """Tell a warning, unless a batch before has ``told`` the same."""
    if line not in told:
        tell(f"minidiff: {line}")
        told.add(line)


def one_line(message: object) -> str:
    """``message`` with a space for each of its white spaces, long parts cut."""
    return brief(" ".join(str(message).split()))
