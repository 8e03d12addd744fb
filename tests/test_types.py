"""The type checker's exceptions: few, each for one named error, none for a file."""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST = 40


def exceptions() -> list[str]:
    """Every `type: ignore` in the package, as "file:line: the line"."""
    found = []
    for path in sorted((ROOT / "minidiff").rglob("*.py")):
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type == tokenize.COMMENT and re.search(
                r"^#\s*(type:\s*ignore|mypy:)", token.string
            ):
                line = token.line.strip()
                place = f"{path.relative_to(ROOT)}:{token.start[0]}"
                found.append(f"{place}: {line}")
    return found


@pytest.mark.slow
def test_the_type_checkers_exceptions_are_few_and_name_their_error():
    found = exceptions()
    assert len(found) <= MOST, "\n".join(found)
    for line in found:
        assert re.search(r"\S.*\S\s+# type: ignore\[[a-z-]+\]", line.split(": ", 1)[1])


@pytest.mark.parametrize(
    "relaxed", ["ignore_errors", "disable_error_code", "follow_imports"]
)
def test_the_type_checker_has_no_relaxing_switch(relaxed):
    assert relaxed not in (ROOT / "pyproject.toml").read_text()
