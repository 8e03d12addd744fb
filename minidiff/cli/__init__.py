"""The command line, one file a command. Imported alone it imports next to nothing.

So Ctrl-C is answered from the first moment, while typer and PyTorch are still on their
way.
"""

import atexit
import functools
import inspect
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, TextIO

INTERRUPTED = 130  # 128 and SIGINT's number, as shells count
COMMANDS = (
    *("sample", "train", "evaluate", "download", "export", "info", "compare"),
    "doctor",
)


def main() -> None:
    """Run a command; a bad input is one line on stderr and exit status 2."""
    interruption = Interruption()
    try:
        code, line = run_program(sys.argv[1:])
    except BaseException as error:
        if not (interruption.came or isinstance(error, KeyboardInterrupt)):
            raise
        code, line = INTERRUPTED, ""
    finally:
        interruption.end()
    if interruption.came or code == INTERRUPTED:
        code, line = INTERRUPTED, "interrupted"
    if line:
        from minidiff.interface.terminal import tell

        tell(f"minidiff: {line}")
    sys.exit(code)


class Interruption:
    """Ctrl-C as KeyboardInterrupt until ``end``; then it is ignored, for all is done.

    A library may swallow the error, so it comes again each second.
    """

    def __init__(self) -> None:
        self.came = False
        self.before = signal.getsignal(signal.SIGINT)
        self.again = hasattr(signal, "setitimer")  # not on Windows
        if self.before is signal.default_int_handler:  # else Ctrl-C is not for us
            signal.signal(signal.SIGINT, self)
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)

    def __call__(self, number: int, frame: object) -> None:
        self.came = True
        if self.again:
            signal.signal(signal.SIGALRM, self)
            signal.setitimer(signal.ITIMER_REAL, 1)
        raise KeyboardInterrupt

    def end(self) -> None:
        """Leave Ctrl-C to whoever had it before."""
        if self.came and self.again:
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, self.before)


# The program, and how an error of a command is told in a line


def program() -> Any:
    """The commands, each with its docstring as its help."""
    from importlib import import_module

    import typer

    options = import_module("minidiff.cli.options")
    app = typer.Typer(
        epilog='Begin with: [bold]minidiff sample "a red dress on blue"[/bold]',
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    for name in COMMANDS:
        module = import_module(f"minidiff.cli.{name}")
        command = getattr(module, name)
        paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
        unwrapped = "\n\n".join(" ".join(text.split()) for text in paragraphs)
        how = {"help": unwrapped, "epilog": module.EXAMPLES}
        app.command(name, **how)(checked(command))
    app.callback()(options.about)
    return app


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


def run_program(arguments: list[str]) -> tuple[int, str]:
    """Run a command: its exit status and, where it failed, one line that says why."""
    from typer import Abort

    from minidiff.interface.terminal import cut, one_line, tell

    told = set[str]()

    def tell_once(message: object, *_: Any, **__: Any) -> None:  # each batch may warn
        if (line := one_line(message)) not in told:
            told.add(line)
            tell(f"minidiff: {line}")

    warnings.showwarning = tell_once
    allow_all_names(sys.stdout)
    try:
        given = arguments or ["--help"]
        code = program()(args=given, prog_name="minidiff", standalone_mode=False)
    except Abort:
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


# What PyTorch says, and what to tell of it
KNOWN = {
    "InvalidCxxCompiler": "--compile needs a C++ compiler; expected g++, clang++ or cl",
    "Compiler: cl is not found": "--compile needs a C++ compiler; expected cl in PATH",
    "Failed to find C compiler": "kernels for a GPU need a C compiler; expected gcc",
    "TritonMissing": "--compile needs Triton on a GPU; expected a PyTorch with it",
}


def explain(error: Exception) -> str:
    """What to tell of the option parser's errors and some of torch's; raises others."""
    from minidiff.interface.terminal import is_refused_memory

    if hasattr(error, "format_message"):  # the option parser's
        return error.format_message()
    less = "fewer or smaller pictures at once, or a smaller batch, need less"
    if type(error).__name__ == "OutOfMemoryError":  # of a GPU
        return f"{str(error).split('. ')[0]}; {less} (sample has --memory)"
    if isinstance(error, MemoryError) or is_refused_memory(error):
        return f"this machine's memory is full; {less}"
    found = f"{type(error).__name__} {error}"
    for said, line in KNOWN.items():
        if said in found:
            return line
    raise error
