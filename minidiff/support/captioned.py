"""Any folder of pictures with captions, as training data.

A caption stands beside its picture (``dress.png``, ``dress.txt``), or all of them in
``metadata.jsonl``: one JSON object a line with ``file_name`` and ``text``, as in the
hub's image folders.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from minidiff.support.data import to_tensor

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# What Pillow raises for a damaged file
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def captions_of(folder: Path) -> dict[str, str]:
    """Each picture's name and its caption.

    Raises FileNotFoundError for a folder that is not there or holds no caption, and
    ValueError for a caption without a picture.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    listed, found = folder / "metadata.jsonl", {}
    if listed.exists():
        for number, line in enumerate(_text(listed).splitlines(), 1):
            found |= _entry(listed, number, line)
    pictures = {path.stem: path.name for path in pictures_in(folder)}
    for path in sorted(folder.glob("*.txt")):
        name = pictures.get(path.stem, f"{path.stem}.png")
        found.setdefault(name, _text(path).strip())
    if not found:
        raise FileNotFoundError(
            f"no captions in {folder}: expected a .txt beside each picture, or "
            "metadata.jsonl"
        )
    if missing := [name for name in found if not (folder / name).is_file()]:
        raise ValueError(f"{folder}: the caption of {missing[0]} has no picture")
    return found


def pictures_in(folder: Path) -> list[Path]:
    """The files of ``folder`` that are named like pictures, in order."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text in UTF-8") from None


def _entry(path: Path, number: int, line: str) -> dict[str, str]:
    if not line.strip():
        return {}
    try:
        entry = json.loads(line)
        return {str(entry["file_name"]): str(entry["text"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, line {number}: expected an object with file_name and text "
            f"({type(error).__name__})"
        ) from None


def fitted(picture: Image.Image, size: int, crop: bool = True) -> Image.Image:
    """``picture`` as a square of ``size`` pixels: its middle, or all of it squeezed."""
    if crop:
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        picture = picture.crop((left, top, left + side, top + side))
    return picture.resize((size, size), Image.Resampling.BICUBIC)


def read_folder(
    folder: Path | str, size: int, crop: bool = True
) -> tuple[Tensor, list[str]]:
    """All pictures of ``folder`` (N, 3, size, size) in [−1, 1], and their captions.

    A picture that cannot be read or has no caption is named on stderr and left out;
    ValueError if none is left.
    """
    folder, pictures, captions = Path(folder), [], []
    found = captions_of(folder)
    for path in pictures_in(folder):
        if path.name not in found:
            print(f"{path} is left out: it has no caption", file=sys.stderr)
    for name, caption in found.items():
        try:
            with Image.open(folder / name) as picture:
                ImageOps.exif_transpose(picture, in_place=True)
                pictures.append(to_tensor(fitted(picture.convert("RGB"), size, crop)))
        except UNREADABLE as error:
            print(f"{folder / name} is left out: {error}", file=sys.stderr)
            continue
        captions.append(caption)
    if not pictures:
        raise ValueError(f"{folder}: none of its pictures can be read")
    return torch.stack(pictures), captions
