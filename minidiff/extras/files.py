"""Prompts and pictures read from files; pictures written with their settings.

The settings are text chunks (iTXt) of the PNG file, each under its own name.
"""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def read_prompts(file: Path | str) -> list[str]:
    """The lines of a UTF-8 file that are not blank; ValueError if there is none."""
    from minidiff.support.checkpoints import read_text

    lines = read_text(file).split("\n")
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"{file} holds no prompt; expected one on each line")
    return prompts


def save_picture(picture: "Image", file: Path | str, replace: bool = False) -> None:
    """Write a PNG that carries the numbers and texts of ``picture.info``.

    There every picture that a pipeline draws has its prompt, seed, model and settings;
    PIL's own ``save`` leaves them out. Our version is added. Raises FileExistsError for
    an existing file unless told to ``replace`` it, ValueError for another kind's name.
    """
    if Path(file).suffix.lower() != ".png":
        raise ValueError(f"file is {file}; expected a name that ends in .png")
    from PIL.PngImagePlugin import PngInfo

    from minidiff.support.checkpoints import replacing

    info, about = PngInfo(), {"version": f"minidiff {version('minidiff')}"}
    for name, value in (picture.info | about).items():
        if isinstance(value, str | int | float):
            text = str(value).encode("utf-8", "replace")  # a path may be no text
            info.add_itxt(name, text)
    if not replace:
        Path(file).open("xb").close()  # the name is ours, or FileExistsError
    try:
        with replacing(file) as part:
            picture.save(part, "PNG", pnginfo=info)
    except BaseException:
        if not replace:
            Path(file).unlink()
        raise


def read_settings(file: Path | str) -> dict[str, str]:
    """The settings in a PNG file; ValueError for what is no picture or has none."""
    from minidiff.support.pictures import open_picture

    if not (found := dict(getattr(open_picture(file), "text", {}))):
        raise ValueError(
            f"{file} carries no settings; minidiff sample and save_picture write them"
        )
    return found
