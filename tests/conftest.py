"""Settings of the tests, the built book and a real browser.

The fixtures ``shared`` and ``fashion`` (where data lies) are in ../conftest.py.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)


@pytest.fixture(autouse=True)
def settings() -> None:
    """One thread and a fixed seed for every test."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The book, built once with warnings as errors: the folder of its HTML."""
    folder = tmp_path_factory.mktemp("book")
    script = shutil.which("jupyter-book", path=str(Path(sys.executable).parent))
    command = [script or "jupyter-book", "build", str(ROOT), "-W", "-n", "--keep-going"]
    command += ["--path-output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    problems = [line for line in lines if "WARNING" in line or "ERROR" in line]
    assert done.returncode == 0, "\n".join(problems or lines[-20:])
    return folder / "_build" / "html"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium, the system's or Playwright's own."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as play:
        names = ("chromium", "chromium-browser", "google-chrome")
        path = next(filter(None, map(shutil.which, names)), None)
        path = path or play.chromium.executable_path
        if not Path(path).exists():
            pytest.skip(
                "no browser: install chromium, or `playwright install chromium`"
            )
        browser = play.chromium.launch(executable_path=path, args=FLAGS.split())
        yield browser
        browser.close()
