"""What is told on a terminal, and what PyTorch tells. Nothing large is imported."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Control characters, ends of lines, changes of direction, halves of pairs
OBEYED = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """``text`` with what a terminal would obey, and ends of lines, as escapes."""
    return OBEYED.sub(lambda found: repr(found[0])[1:-1], str(text))


# Quotations, and what has no spaces, of over 100 characters
LONG = re.compile(r"(?<!\w)'[^']{99,}'(?!\w)|\"[^\"]{99,}\"|\S{101,}")
CLEAR = "\r\033[K"  # a terminal's line


def cut(text: str, most: int = 100) -> str:
    """``text`` with … in its middle where it has over ``most`` characters."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}…{text[1 - half :]}"


def brief(text: str) -> str:
    """What may be told in one line of a ``text`` that quotes at length."""
    return cut(LONG.sub(lambda found: cut(found[0]), text), 600)


def one_line(message: object) -> str:
    """``message`` with a space for each of its white spaces, long parts cut."""
    return brief(" ".join(str(message).split()))


def is_refused_memory(error: BaseException | None) -> bool:
    """Whether PyTorch got no memory on a CPU, as it says so on Linux and Windows."""
    words = "can't allocate memory", "not enough memory"
    return any(said in str(error) for said in words)


def tell(line: object) -> None:
    """Print one line on stderr."""
    cleared = CLEAR if sys.stderr.isatty() else ""
    print(f"{cleared}{printable(brief(str(line)))}", file=sys.stderr, flush=True)


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show ``text`` on the last line of a terminal until the end; else nothing."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"{CLEAR}{printable(brief(text))} …", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print(CLEAR, end="", file=sys.stderr, flush=True)
