"""What is told on a terminal, and what PyTorch tells. Nothing large is imported."""

import re
import sys

# Control characters, ends of lines, changes of direction, halves of pairs
OBEYED = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """``text`` with what a terminal would obey, and ends of lines, as escapes."""
    return OBEYED.sub(lambda found: repr(found[0])[1:-1], str(text))


def is_refused_memory(error: BaseException | None) -> bool:
    """Whether PyTorch got no memory on a CPU, as it says so on Linux and Windows."""
    words = "can't allocate memory", "not enough memory"
    return any(said in str(error) for said in words)


def tell(line: object) -> None:
    """Print one line on stderr."""
    print(printable(line), file=sys.stderr, flush=True)
