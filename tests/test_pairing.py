"""A chapter is one text: the module, its notebook, and what JupyterLab saves."""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
import tokenize
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import jupytext
import nbformat
import pytest
from helpers import request

from minidiff.classroom.folding import fold, folds

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
chapters = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def module(path: Path) -> Path:
    """minidiff/vae.py of notebooks/03_vae.ipynb."""
    return ROOT / "minidiff" / f"{path.stem[3:]}.py"


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, list[str], str]]:
    return [
        (cell.cell_type, cell.metadata.get("tags", []), cell.source)
        for cell in notebook.cells
    ]


def tagged(path: Path, tag: str) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(path, 4)
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")


def test_every_chapter_has_a_notebook() -> None:
    settings = (ROOT / "jupytext.toml").read_text()
    stems = re.findall(r'"notebooks//(\w+)/ipynb', settings)
    assert [path.stem for path in NOTEBOOKS] == stems


PAPER = re.compile(r"arxiv\.org/abs/[\d.]+\d")


@chapters
def test_linked_papers_stand_in_the_bibliography_once(path: Path) -> None:
    kept = PAPER.findall((ROOT / "book" / "references.bib").read_text())
    assert len(set(kept)) == len(kept)
    assert set(PAPER.findall(module(path).read_text())) <= set(kept)


@chapters
def test_pair_agrees(path: Path) -> None:
    assert cells(nbformat.read(path, 4)) == cells(jupytext.read(module(path)))


@chapters
def test_the_map_says_here(path: Path) -> None:
    text = module(path).read_text(encoding="utf-8")
    assert f'viz.show_pipeline("{module(path).stem}")' in text


@chapters
def test_every_cell_is_executed(path: Path) -> None:
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            assert cell.execution_count, f"never run:\n{cell.source}"
            kinds = [out.output_type for out in cell.outputs]
            assert "error" not in kinds, f"an error:\n{cell.source}"
            streams = [out.name for out in cell.outputs if out.output_type == "stream"]
            assert "stderr" not in streams, f"output on stderr:\n{cell.source}"


@chapters
def test_no_printed_claim_is_false(path: Path) -> None:
    """Chapters print "loops = tensors: True"; a False would be re-executed as such."""
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            assert not re.search(r": False$", printed(cell), re.M), cell.source


IMPORT = """
import sys, torch, numpy, PIL.Image, safetensors.torch, huggingface_hub, regex, tqdm
opened = []
kept = tuple({sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev"})
def watch(event, args):
    path = args[0] if event == "open" and isinstance(args[0], str) else ".py"
    if not path.endswith((".py", ".pyc", ".so")) and not path.startswith(kept):
        opened.append(path)
sys.addaudithook(watch)
for name in sys.argv[1:]:
    __import__("minidiff." + name)
    assert not opened, f"importing minidiff.{name} opens {opened}"
    assert "matplotlib" not in sys.modules, f"minidiff.{name} loads matplotlib"
"""


@pytest.mark.slow
def test_import_prints_draws_and_reads_nothing() -> None:
    names = [*(module(path).stem for path in NOTEBOOKS), "viz"]
    command = [sys.executable, "-W", "error", "-c", IMPORT, *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@chapters
def test_jupyterlab_folds_what_the_book_folds(path: Path) -> None:
    """If not, `python -m minidiff.classroom.folding` does it."""
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        assert cell.metadata.get("jupyter", {}) == folds(cell), cell.source
    assert any(
        "outputs_hidden" in c.metadata.get("jupyter", {}) for c in notebook.cells
    )


def test_a_sync_keeps_what_jupyterlab_folds(tmp_path: Path) -> None:
    pair = tmp_path / "a.py", tmp_path / "a.ipynb"
    pair[0].write_text('# %% tags=["hide-output"]\n1\n')
    (tmp_path / "jupytext.toml").write_text(
        'formats = "py:percent,ipynb"\ncell_metadata_filter = "tags,-all"\n'
    )
    sync = [sys.executable, "-m", "jupytext", "--quiet", "--sync", pair[0]]
    subprocess.run(sync, check=True)
    notebook = nbformat.read(pair[1], 4)
    fold(notebook)
    nbformat.write(notebook, pair[1])
    pair[0].write_text('# %% tags=["hide-output"]\n1\n\n# %%\n2\n')
    os.utime(pair[0], (time.time() + 5, time.time() + 5))
    subprocess.run(sync, check=True)
    first, second = nbformat.read(pair[1], 4).cells
    assert first.metadata["jupyter"] == {"outputs_hidden": True}
    assert second.source == "2" and "jupyter" not in second.metadata
    assert "jupyter" not in pair[0].read_text()


# Saving in JupyterLab


@pytest.mark.slow
def test_saving_in_jupyterlab_changes_the_module(
    tmp_path: Path, jupyterlab: Callable[[Path], AbstractContextManager[str]]
) -> None:
    folder = tmp_path / "repository"
    for name in ("notebooks", "minidiff"):
        skip = shutil.ignore_patterns("pretrained", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    shutil.copy(ROOT / "jupytext.toml", folder)
    with jupyterlab(folder) as server:
        save_and_open(folder, f"{server}/api/contents/")


def save_and_open(folder: Path, url: str) -> None:
    path = "notebooks/04_attention.ipynb"
    source = folder / "minidiff/attention.py"
    before = source.read_text()
    model = request(f"{url}{path}?content=1")
    first = next(c for c in model["content"]["cells"] if c["cell_type"] == "code")
    first["source"] += "\nSAVED = 1"
    request(url + path, {"type": "notebook", "content": model["content"]})
    assert "\nSAVED = 1\n" in source.read_text()
    assert source.read_text().replace("\nSAVED = 1\n", "\n") == before
    source.write_text(before.replace("\n# %%\n", "\n# %%\nOPENED = 2\n", 1))
    os.utime(source, (time.time() + 5, time.time() + 5))
    cells = request(f"{url}{path}?content=1")["content"]["cells"]
    assert any("OPENED = 2" in "".join(cell["source"]) for cell in cells)


# The chapters' form


@chapters
def test_exercises_refuse_the_stub_and_accept_the_solution(path: Path) -> None:
    """Outputs that nbval reproduces: "not yet" before a solution, "passed" after."""
    kinds = ("exercise", "check", "solution")
    found = [
        (kind, cell)
        for cell in nbformat.read(path, 4).cells
        for kind in kinds
        if kind in cell.metadata.get("tags", [])
    ]
    assert found, "no exercise with a self-check"
    assert [kind for kind, _ in found] == list(kinds) * (len(found) // 3)
    for kind, cell in found:
        tags = cell.metadata.tags
        assert "active-ipynb" in tags and "nbval-ignore-output" not in tags
        if kind == "check":
            assert re.fullmatch(r"Exercise \d+\.\d+: not yet \(.+\)\n", printed(cell))
        if kind == "solution":
            assert "hide-cell" in tags
            assert re.search(r"^Exercise \d+\.\d+: passed$", printed(cell), re.M)


def words(path: Path) -> int:
    text = "\n".join(
        cell.source
        for cell in nbformat.read(path, 4).cells
        if cell.cell_type == "markdown"
    )
    text = re.sub(r"```.*?```|\$\$.*?\$\$|<[^>]+>", " ", text, flags=re.S)
    return len(re.findall(r"\b[^\W\d_][\w’'-]*", text))


def code_lines(source: str) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    skipped = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER)
    layout += (tokenize.INDENT, tokenize.DEDENT)
    tokens = tokenize.generate_tokens(iter(source.splitlines(True)).__next__)
    used = {
        line
        for token in tokens
        if token.type not in layout
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(used - skipped)


@chapters
def test_nothing_is_left_to_do(path: Path) -> None:
    for cell in nbformat.read(path, 4).cells:
        assert "TODO" not in cell.source, cell.source


@chapters
def test_length(path: Path) -> None:
    aside = {"exercise", "check", "solution", "hide-input", "hide-cell"}
    lines = sum(
        code_lines(cell.source)
        for cell in nbformat.read(path, 4).cells
        if cell.cell_type == "code" and not aside & set(cell.metadata.get("tags", []))
    )
    count = words(path)
    assert 1500 <= count <= 4500, f"{count} words"
    assert lines <= 520, f"{lines} lines of code"


@chapters
def test_no_cell_is_a_wall(path: Path) -> None:
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 60, cell.source


# One prompt's journey


def test_the_journey_agrees_from_chapter_to_chapter() -> None:
    """Each chapter's output says that its tensors are those on record."""
    claim = re.compile(r"^(\w+): (\([\d, ]+\))(, the same in every chapter)?", re.M)
    seen: dict[str, list[tuple[str, str]]] = {}
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            if "journey.meets(" in cell.source and cell.cell_type == "code":
                for name, shape, agrees in claim.findall(printed(cell)):
                    assert agrees, f"{path.stem}: {name} is not on record"
                    seen.setdefault(name, []).append((path.stem, shape))
    assert {"context", "pooled", "noise", "latents"} <= seen.keys()
    for name, places in seen.items():
        assert len({shape for _, shape in places}) == 1, f"{name}: {places}"
    met = {chapter for places in seen.values() for chapter, _ in places}
    part_one = {path.stem for path in NOTEBOOKS if path.stem < "09"}
    assert part_one - met <= {"07_training"}
