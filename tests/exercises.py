"""What a chapter's check says of an answer, right or wrong."""

import contextlib
import io
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def cells(stem: str) -> list[nbformat.NotebookNode]:
    cells = nbformat.read(NOTEBOOKS / f"{stem}.ipynb", 4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


class Desk:
    """A chapter's exercises, each in a fresh copy of what its cells know.

    ``module`` is the chapter; ``known`` are the names that demonstration cells define
    and the checks use.
    """

    def __init__(self, stem: str, module: ModuleType, known: dict[str, Any]) -> None:
        self.cells, self.known = cells(stem), vars(module) | known

    def source(self, number: str, tag: str) -> str:
        """The code of exercise "4_2": its "check" or its "solution"."""
        name = f"exercise_{number}"
        found = [
            c.source
            for c in self.cells
            if tag in c.metadata.get("tags", []) and name in c.source
        ]
        assert len(found) == 1, f"{name} has {len(found)} cells {tag}"
        return found[0]

    def hand_in(self, number: str, answer: str) -> str:
        """What the check prints of an answer: "passed" or "not yet (…)"."""
        names = dict(self.known)
        exec(answer, names)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(self.source(number, "check"), names)
        return printed.getvalue().partition(": ")[2].strip()

    def refuse(self, number: str, answer: str) -> None:
        """The check must refuse an answer for what it says, not because it crashes.

        What the answer leaves out of the solution stays as it is there.
        """
        names = self.known | {"check": lambda test: test}
        exec(f"{self.solution(number)}\n\n{answer}", names)
        exec(self.source(number, "check"), names)
        with pytest.raises(AssertionError):
            names[f"exercise_{number}"]()

    def solution(self, number: str) -> str:
        """The solution as an answer, without the lines that run the check."""
        text = self.source(number, "solution")
        return re.split(rf"^exercise_{number}\(\)", text, flags=re.M)[0]
