"""Where the data lies, for every test, doctest and notebook of the repository."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
SHARED = Path(os.environ.get("MINIDIFF_SHARED", ROOT.parent / "shared"))
# With files on two cores the longest begin first, then notebooks: none ends alone
LONGEST = """
    test_book test_parallel test_stages test_finetuning 08_sampling 07_training
    11_control test_speed_paths 05_dit test_world_judge test_live_page test_memory
""".split()

if "MINIDIFF_DATA" not in os.environ and (SHARED / "fashion_mnist").is_dir():
    os.environ["MINIDIFF_DATA"] = str(SHARED / "fashion_mnist")


def missing(reason: str) -> None:
    """Skip a test for want of data, or fail it (MINIDIFF_REQUIRE_SHARED)."""
    if os.environ.get("MINIDIFF_REQUIRE_SHARED"):
        pytest.fail(f"{reason} (and MINIDIFF_REQUIRE_SHARED is set)", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published configurations, key lists and tokenizers."""
    if not SHARED.is_dir():
        missing(f"no shared data at {SHARED}: set MINIDIFF_SHARED")
    return SHARED


@pytest.fixture(scope="session")
def fashion() -> Path:
    """The folder of Fashion-MNIST's parquet files."""
    folder = Path(os.environ.get("MINIDIFF_DATA", ""))
    if "MINIDIFF_DATA" not in os.environ or not folder.is_dir():
        missing("no Fashion-MNIST: set MINIDIFF_DATA to the folder that holds it")
    return folder


def pytest_configure(config: pytest.Config) -> None:
    """``-n`` hands files out as they are ordered, not by their number of tests."""
    config.option.loadscopereorder = False


def start(item: pytest.Item) -> int:
    """A test's place in the order of files."""
    if item.path.stem in LONGEST:
        return LONGEST.index(item.path.stem)
    return len(LONGEST) + (item.path.suffix != ".ipynb")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of notebooks the texts are compared, not the pictures (HTML that holds SVG).

    Chapter 7 trains on Fashion-MNIST: its notebook is run where the data is.
    """
    items.sort(key=start)
    for notebook in {item.parent for item in items if item.path.suffix == ".ipynb"}:
        notebook.skip_compare += ("text/html",)
    if "MINIDIFF_DATA" not in os.environ:
        reason = "chapter 7 trains on Fashion-MNIST: set MINIDIFF_DATA"
        for item in items:
            if item.path.name == "07_training.ipynb":
                item.add_marker(pytest.mark.skip(reason=reason))
