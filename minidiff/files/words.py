"""The words that a small model has seen in training: ``words.txt`` in its folder."""

import re
from collections.abc import Iterable
from pathlib import Path

from minidiff.files.reading import LONGEST_TABLE, read_text
from minidiff.files.weights import TINY
from minidiff.files.writing import write_text

FILE = "words.txt"


def words_of(text: str) -> list[str]:
    """The words of ``text`` in lower case, in order; hyphens part them."""
    return re.findall(r"\w+", text.lower())


def write_words(folder: Path, texts: Iterable[str]) -> None:
    """Write every word of ``texts`` once, a line each, in order of the alphabet."""
    words = sorted({word for text in texts for word in words_of(text)})
    write_text(folder / FILE, "\n".join(words) + "\n")


def seen(model: Path | str) -> frozenset[str]:
    """The words that a model, "tiny" or its folder, has seen; none if it says none."""
    path = (TINY if str(model) == "tiny" else Path(model)) / FILE
    return (
        frozenset(words_of(read_text(path, LONGEST_TABLE)))
        if path.is_file()
        else frozenset()
    )


def unseen(texts: Iterable[str], words: frozenset[str]) -> list[str]:
    """The words of ``texts`` that are not among ``words``, each once, in order."""
    return list(dict.fromkeys(w for t in texts for w in words_of(t) if w not in words))


def warning(texts: Iterable[str], words: frozenset[str]) -> str:
    """One line that names what the model has not seen; "" for nothing."""
    missing = unseen(texts, words) if words else []
    shown = ", ".join(missing[:8]) + (", …" if len(missing) > 8 else "")
    return f"the small model has not seen: {shown}" if missing else ""
