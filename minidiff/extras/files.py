"""What ``minidiff sample`` reads and writes: prompts, and pictures with their settings.

The settings are text chunks (iTXt) of the PNG file, each under its own name.
"""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


def read_prompts(file: Path | str) -> list[str]:
    """The lines of a UTF-8 file that are not blank; ValueError if there is none."""
    try:
        lines = Path(file).read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not a text in UTF-8") from None
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"{file} holds no prompt; expected one on each line")
    return prompts


def save_picture(
    picture: "Image", file: Path | str, settings: Mapping[str, Any], replace: bool
) -> None:
    """Write a PNG that carries its size, our version and ``settings`` (None: left out).

    Raises FileExistsError for an existing file unless told to ``replace`` it.
    """
    from PIL.PngImagePlugin import PngInfo

    info, size = PngInfo(), {"width": picture.width, "height": picture.height}
    known = {**settings, **size, "version": f"minidiff {version('minidiff')}"}
    for name, value in known.items():
        if value is not None:
            info.add_itxt(name, str(value))
    with Path(file).open("wb" if replace else "xb") as stream:
        picture.save(stream, "PNG", pnginfo=info)


def read_settings(file: Path | str) -> dict[str, str]:
    """The settings in a PNG file; ValueError for what is no picture or has none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as picture:
            picture.load()
            found = dict(getattr(picture, "text", {}))
    except UnidentifiedImageError:
        raise ValueError(f"{file} is not a picture that can be read") from None
    if not found:
        raise ValueError(f"{file} carries no settings; minidiff sample writes them")
    return found
