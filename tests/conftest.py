"""Settings of the tests, the built book and a real browser.

The fixtures ``shared`` and ``fashion`` (where data lies) are in ../conftest.py.
"""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import plain_pictures, request
from small import small_pipeline
from torch import Tensor

from minidiff import cli
from minidiff.flow_matching import euler

ROOT = Path(__file__).parents[1]

PATIENCE = 600_000  # milliseconds
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is not slow and needs no built book, browser or server is quick."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            needs = {"book", "chromium", "jupyterlab"} & set(item.fixturenames)
            if not needs and not item.get_closest_marker("slow"):
                item.add_marker("quick")


@pytest.fixture(autouse=True)
def settings() -> None:
    """One thread and a fixed seed for every test."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of four plain pictures with their captions."""
    return plain_pictures(tmp_path / "pictures")


@pytest.fixture
def short_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages draw their grids in 2 of the 28 steps: nothing hangs on how they look."""
    from minidiff.recipes import control_stage, jumps, transformer_stage

    def draw(velocity: Callable, x: Tensor, sigmas: Tensor) -> Tensor:
        return euler(velocity, x, sigmas[::14])

    for stage in (control_stage, jumps, transformer_stage):
        monkeypatch.setattr(stage, "euler", draw)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> Callable[..., tuple]:
    """Run the command line in an empty folder; returns exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple:
        monkeypatch.setattr(sys, "argv", ["minidiff", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline of random weights, in the hub's layout."""
    folder = tmp_path_factory.mktemp("small")
    small_pipeline(folder / "tokenizers").save_pretrained(folder / "saved")
    return folder / "saved"


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
        yield Patient(browser)
        browser.close()


class Patient:
    """A browser whose pages are waited for however busy the machine is."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def new_context(self, **options: Any) -> Any:
        context = self.browser.new_context(**options)
        context.set_default_timeout(PATIENCE)
        return context

    def new_page(self, **options: Any) -> Any:
        return self.new_context(**options).new_page()


@pytest.fixture
def jupyterlab(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], AbstractContextManager[str]]:
    """Starts JupyterLab in a folder, on a free port: the server's URL, token "t"."""
    home = tmp_path_factory.mktemp("home")
    for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
        monkeypatch.setenv(f"JUPYTER_{name}", str(home / name))

    @contextmanager
    def start(folder: Path) -> Iterator[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
        command += [f"--port={port}", "--IdentityProvider.token=t", "--ip=127.0.0.1"]
        command += ["--ServerApp.port_retries=0"]  # not beside what waits for it
        with (home / "log").open("w") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        try:
            wait_for(f"http://127.0.0.1:{port}/api", process, home / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            end(process)

    return start


def end(process: subprocess.Popen) -> None:
    """Ask a server to end, and kill it if it has not within a minute."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    """Until the server answers, however busy the machine is; or its log if it ends."""
    while process.poll() is None:
        with suppress(OSError):
            request(url)
            return
        time.sleep(0.5)
    raise RuntimeError(log.read_text())
