"""Fold in JupyterLab what a chapter's page folds: answers, and what is to be predicted.

    python -m minidiff.classroom.folding     # after a sync: the modules hold tags alone

The book reads a cell's tags; JupyterLab reads metadata of its own, which only the
notebooks have.
"""

import json
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
FOLDS: dict[str, tuple[str, ...]] = {
    "hide-output": ("outputs_hidden",),
    "hide-cell": ("outputs_hidden", "source_hidden"),
}


def folds(cell: dict[str, Any]) -> dict[str, bool]:
    """What JupyterLab is to fold of a cell, as its tags say."""
    tags = cell["metadata"].get("tags", [])
    return {name: True for tag in tags for name in FOLDS.get(tag, ())}


def fold(notebook: dict[str, Any]) -> None:
    """Write into a notebook's cells what JupyterLab is to fold."""
    for cell in notebook["cells"]:
        cell["metadata"].pop("jupyter", None)
        if found := folds(cell):
            cell["metadata"]["jupyter"] = found


def fold_chapters() -> None:
    """Fold every chapter's notebook."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        fold(notebook)
        text = json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False)
        path.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    fold_chapters()
