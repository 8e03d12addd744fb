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


def brief(text: str, most: int = 1000) -> str:
    """``text`` on a line of its own, with … in what it quotes at length."""
    text = LONG.sub(lambda found: f"{found[0][:60]}…{found[0][-30:]}", text)
    return text if len(text) <= most else f"{text[: most - 250]}…{text[-249:]}"


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
