"""Four journeys through the package: which files and functions each of them meets.

    python benchmarks/journeys.py [--only prompt]
    python benchmarks/journeys.py --package ../another/checkout --files

A function counts where it was called, a pair of files where each calls the other: a
reader who follows the journey must then go back and forth between them. What runs while
a module is imported is left out, and what Python and PyTorch call of themselves
(comprehensions, ``__torch_function__``).
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[1]


class Track:
    """The functions of a package that are called, and which file calls which."""

    def __init__(self, package: Path) -> None:
        self.package = str(package.resolve())
        self.functions: set[tuple[str, str]] = set()
        self.calls: set[tuple[str, str]] = set()

    def place(self, frame: FrameType) -> str | None:
        """The package's file in which a function's frame runs; None for all else."""
        code = frame.f_code
        own = code.co_name[0] != "<" and code.co_name != "__torch_function__"
        inside = own and code.co_filename.startswith(self.package)
        return code.co_filename if inside else None

    def chain(self, frame: FrameType) -> list[str]:
        """The files through which a frame was reached, the nearest first.

        Empty while a module of the package is imported.
        """
        files, above = [], frame.f_back
        while above:
            if place := self.place(above):
                files.append(place)
            code = above.f_code
            if code.co_name == "<module>" and code.co_filename.startswith(self.package):
                return []
            above = above.f_back
        return files or [""]

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        """What ``sys.setprofile`` calls."""
        file = self.place(frame) if event == "call" else None
        if file and (callers := self.chain(frame)):
            self.functions.add((file, frame.f_code.co_qualname))
            if callers[0] not in ("", file):
                self.calls.add((callers[0], file))

    @contextmanager
    def following(self) -> Iterator[None]:
        """Count what is called within this context."""
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)

    @property
    def files(self) -> list[str]:
        """The files met, by their path in the package."""
        cut = len(self.package) + 1
        return sorted({file[cut:] for file, _ in self.functions})

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of files that call each other both ways."""
        both = {(a, b) for a, b in self.calls if a < b and (b, a) in self.calls}
        cut = len(self.package) + 1
        return sorted((a[cut:], b[cut:]) for a, b in both)


def shell(*words: str) -> Callable[[], None]:
    """A journey that begins at a command line."""

    def run() -> None:
        from minidiff.cli import main

        sys.argv = ["minidiff", *words]
        try:
            main()
        except SystemExit as ended:
            assert not ended.code, ended.code

    return run


def load() -> None:
    """A model's weights, from its folder to where they compute."""
    import minidiff

    minidiff.load("tiny")


def budget() -> None:
    """A memory plan, from the words to the picture."""
    import minidiff

    minidiff.load("tiny", memory="12GB")("a red dress", num_inference_steps=2)


def journeys(folder: Path) -> dict[str, Callable[[], None]]:
    """Each journey by its name; what they write lies in ``folder``."""
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(folder / "own.png")
    (folder / "own.txt").write_text("a red background\n")
    Image.new("RGB", (64, 64), "blue").save(folder / "other.png")
    (folder / "other.txt").write_text("a blue background\n")
    draw = "sample", "a red dress", "--output", str(folder / "drawn" / "a.png")
    (folder / "drawn").mkdir()
    learn = "train", "--from", "tiny", "--lora", "--data", str(folder), "--steps", "2"
    return {
        "a prompt → a PNG": shell(*draw, "--device", "cpu"),
        "a model's folder → weights in place": load,
        "pictures and captions → a LoRA": shell(
            *learn, "--output", str(folder / "run"), "--device", "cpu"
        ),
        'memory="12GB" → a picture': budget,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", type=Path, default=ROOT, help="a checkout")
    parser.add_argument("--files", action="store_true", help="name files and pairs")
    parser.add_argument("--only", default="", help="a word of a journey's name")
    args = parser.parse_args()
    sys.path.insert(0, str(args.package.resolve()))
    print(f"{'journey':38}{'files':>6}{'functions':>11}{'both ways':>11}")
    with tempfile.TemporaryDirectory() as folder:
        chosen = [x for x in journeys(Path(folder)).items() if args.only in x[0]]
        for name, run in chosen:
            track = Track(args.package / "minidiff")
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                with track.following():
                    run()
            counts = len(track.files), len(track.functions), len(track.pairs)
            print("{:38}{:>6}{:>11}{:>11}".format(name, *counts))
            if args.files:
                print("  " + "\n  ".join(track.files))
                print("  " + "\n  ".join(f"{a} ⇄ {b}" for a, b in track.pairs))


if __name__ == "__main__":
    main()
