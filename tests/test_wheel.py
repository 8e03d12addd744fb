"""What is installed: the wheel holds the whole package and draws without the source."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
pytestmark = pytest.mark.slow


def files(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in found}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's package and what describes it."""
    folder = tmp_path_factory.mktemp("source")
    compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "minidiff", folder / "minidiff", ignore=compiled)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run([*PIP, "wheel", "-q", *options], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment's scripts: the wheel alone is installed there.

    What it depends on is that of the environment of the tests, whose own minidiff
    stands behind it.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    scripts = Path(sysconfig.get_path("scripts", "venv", paths))
    python = scripts / Path(sys.executable).name
    options = ["--no-deps", "--no-index", wheel]
    subprocess.run([*PIP, "--python", python, "install", "-q", *options], check=True)
    return scripts


def test_the_wheel_holds_every_file_of_the_package(source: Path, wheel: Path) -> None:
    names = (name.removeprefix("minidiff/") for name in ZipFile(wheel).namelist())
    held = {name for name in names if not name.startswith("minidiff-")}
    assert held == files(source / "minidiff")


def test_it_draws_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [installed / "minidiff", "sample", "a red dress", "--steps", "2"]
    subprocess.run(
        [*command, "--output", "dress.png"], cwd=tmp_path, env=environment, check=True
    )
    assert Image.open(tmp_path / "dress.png").size == (64, 64)
    where = "import minidiff; print(minidiff.__file__)"
    python = installed / Path(sys.executable).name
    found = subprocess.check_output(
        [python, "-c", where], cwd=tmp_path, env=environment, text=True
    )
    assert Path(found).is_relative_to(installed.parent)
