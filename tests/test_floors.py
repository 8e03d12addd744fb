"""The house: every room and chapter imports downwards only, types included."""

import ast
from pathlib import Path

import pytest

from minidiff.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minidiff"
# From the ground up; what shares a line may not import each other
FLOORS = (
    ("interface",),
    ("files",),
    ("data",),
    ("learning",),
    ("tokenizer", "flow_matching", "vae"),
    ("text_encoders",),
    ("attention",),
    ("dit",),
    ("training",),
    ("efficiency", "sampling"),
    ("control", "distillation", "lora"),
    ("engine", "live"),
    ("judging",),
    ("recipes",),
    ("drawing",),
    ("classroom",),
    ("viz",),
    ("cli",),
    ("__init__", "__main__"),
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}


def place(path: Path) -> str:
    """The room or chapter that a file of the package is or lies in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms and chapters that a file imports, in functions and for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {n.split(".")[1] for n in found if n.startswith("minidiff.")}


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_its_floor() -> None:
    assert {place(path) for path in FILES} == FLOOR.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    own = place(path)
    names = imported(path) & FLOOR.keys()
    above = {n for n in names if n != own and FLOOR[n] >= FLOOR[own]}
    assert not above, f"{own} stands below {', '.join(sorted(above))}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_says_what_belongs_into_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert path.parent == PACKAGE or len(text.splitlines()) <= 650


def test_no_room_is_over_a_fifth_of_the_package() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    for room in {place(path) for path in FILES}:
        own = sum(n for path, n in lines.items() if place(path) == room)
        assert own <= sum(lines.values()) / 5, room


def test_no_two_public_functions_have_one_name() -> None:
    """But for ``score``: of a density in chapter 6, of an answer by the judge."""
    found: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(path.name)
    twice = {name: files for name, files in found.items() if len(files) > 1}
    assert twice.keys() <= {"score"}, twice


def logic(function: ast.FunctionDef) -> int:
    """Lines of a function's body without its docstring and what it imports."""
    lines: set[int] = set()
    for node in function.body[ast.get_docstring(function) is not None :]:
        lines |= {*range(node.lineno, (node.end_lineno or 0) + 1)}
    for node in ast.walk(function):
        if isinstance(node, ast.Import | ast.ImportFrom):
            lines -= {*range(node.lineno, (node.end_lineno or 0) + 1)}
    return len(lines)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_reads_its_options_and_calls_the_library(name: str) -> None:
    code = ast.parse((PACKAGE / "cli" / f"{name}.py").read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(code) if isinstance(n, ast.FunctionDef)]
    assert name in {f.name for f in functions}
    assert {f.name: logic(f) for f in functions if logic(f) > 12} == {}
