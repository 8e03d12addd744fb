"""Any folder of pictures with captions, as training data.

A caption stands beside its picture (``dress.png``, ``dress.txt``), or all of them in
``metadata.jsonl``: one JSON object a line with ``file_name`` and ``text``, as in the
hub's image folders.

A folder within it may say how often its pictures count, once being usual: each picture
in ``10_dresses/`` is shown ten times an epoch by a fine-tuning.
"""

import functools
import json
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from minidiff.data.scenes import IMAGE_SIZE
from minidiff.files.disk import excerpt, read_text
from minidiff.files.pictures import from_bytes, in_rgb, open_picture, to_tensor
from minidiff.interface.terminal import tell

LONGEST_CAPTION = 10_000  # bytes, or characters: no encoder reads a fifth of it
REPEATS = re.compile(r"([1-9]\d{0,2})_")  # begins the name of such a folder
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")


def captions_of(folder: Path) -> dict[str, str]:
    """Each picture's name and its caption.

    Raises FileNotFoundError for a folder that is not there or holds no caption, and
    ValueError for a caption without a picture, and for two captions of one.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    listed = folder / "metadata.jsonl"
    found: dict[str, str] = {}
    if listed.exists():
        for number, line in enumerate(read_text(listed).split("\n"), 1):
            entry = _entry(listed, number, line)
            if twice := entry.keys() & found.keys():
                told = f"{listed}, line {number}: {excerpt(min(twice))} has a caption"
                raise ValueError(f"{told} already; expected one of each picture")
            found |= entry
    for place in folders_of(folder):
        pictures = {path.stem: path for path in pictures_in(place)}
        for path in files_in(place, (".txt",)):
            picture = pictures.get(path.stem, path.with_suffix(".png"))
            name = picture.relative_to(folder).as_posix()
            found.setdefault(name, read_text(path, LONGEST_CAPTION).strip())
    if not found:
        raise FileNotFoundError(
            f"no captions in {folder}: expected a .txt beside each picture, or "
            "metadata.jsonl, which may name those in subfolders"
        )
    for name in found:
        check_picture(folder, name)
    return found


def check_picture(folder: Path, name: str) -> None:
    """Raise ValueError unless ``folder`` has this picture; what is near is named."""
    path, shown = folder / name, excerpt(name)
    with suppress(OSError):  # a name that is too long, say
        if path.is_file():
            return
        if path.exists():
            raise ValueError(f"{folder}: {shown} is no file; expected a picture")
    near = [p.name for p in files_in(path.parent) if p.stem == path.stem]
    near = [name for name in near if not name.lower().endswith(".txt")]
    kinds = f" (found {', '.join(near)})" if near else ""
    raise ValueError(f"{folder}: the caption of {shown} has no picture{kinds}")


def folders_of(folder: Path) -> list[Path]:
    """``folder``, and those within it that say how often their pictures count."""
    inner = (path for path in files_in(folder) if REPEATS.match(path.name))
    return [folder, *(path for path in inner if path.is_dir())]


def repeats_of(name: str) -> int:
    """How often a picture counts in an epoch, as its folder's name says: 1 to 999."""
    found = REPEATS.match(Path(name).parent.name)
    return int(found[1]) if found else 1


def pictures_in(folder: Path) -> list[Path]:
    """The files of ``folder`` that are named like pictures, in order."""
    return files_in(folder, PICTURES)


def files_in(folder: Path, ends: tuple[str, ...] = ()) -> list[Path]:
    """What has one of these ends, or any, in order; hidden files are left out."""
    paths = folder.iterdir() if folder.is_dir() else ()
    named = (path for path in paths if not path.name.startswith("."))
    return sorted(path for path in named if not ends or path.suffix.lower() in ends)


def _entry(path: Path, number: int, line: str) -> dict[str, str]:
    """The picture and the caption in a line of metadata.jsonl; none in a blank one."""
    if not line.strip():
        return {}
    place = f"{path}, line {number}"
    try:
        entry = json.loads(line)
        name, text = entry["file_name"], entry["text"]
        if not (isinstance(name, str) and isinstance(text, str)):
            raise TypeError
        text.encode()  # ValueError for half of a surrogate pair
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{place}: expected an object with file_name and text "
            f"({type(error).__name__})"
        ) from None
    file = Path(name)
    if file.anchor or ".." in file.parts or "\0" in name:
        found = f"{place}: file_name is {excerpt(repr(name))}"
        raise ValueError(f"{found}; expected a file in this folder or below")
    if len(text) > LONGEST_CAPTION:
        found = f"{place}: text has {len(text):,} characters"
        raise ValueError(f"{found}; expected at most {LONGEST_CAPTION:,}")
    return {file.as_posix(): text}


def resized(picture: Image.Image, size: int, crop: bool = True) -> Image.Image:
    """``picture`` as a square of ``size`` pixels: its middle, or all of it squeezed."""
    if crop:
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        picture = picture.crop((left, top, left + side, top + side))
    return picture.resize((size, size), Image.Resampling.BICUBIC)


def tell_of_others(folder: Path, found: Collection[str]) -> None:
    """Name on stderr what has no caption among ``found``: pictures, and folders."""
    places = folders_of(folder)
    for path in (path for place in places for path in pictures_in(place)):
        if path.relative_to(folder).as_posix() not in found:
            tell(f"{path} is left out: it has no caption")
    listed = {Path(name).parts[0] for name in found}
    for path in sorted(set(folder.iterdir()).difference(places)):
        other = path.is_dir() and path.name not in listed
        with suppress(PermissionError):  # some system's own
            if other and not path.name.startswith(".") and any(pictures_in(path)):
                tell(f"{path} is left out: no caption names its pictures")


def read_folder(
    folder: Path | str, size: int, crop: bool = True
) -> tuple[Tensor, list[str]]:
    """All pictures of ``folder`` as uint8 (N, 3, size, size), and their captions."""
    return read_pictures(Path(folder), captions_of(Path(folder)), size, crop)


def read_each(folder: Path, found: dict[str, str]) -> Iterator[tuple[str, Image.Image]]:
    """The names and the pictures, in RGB, of those with captions ``found``.

    One that cannot be read or has no caption is named on stderr and left out.
    """
    tell_of_others(folder, found)
    for name in found:
        try:
            picture = in_rgb(open_picture(folder / name))
        except MemoryError:
            raise
        except Exception as error:  # Pillow has many names for a damaged file
            known = str(error) if name in str(error) else f"{folder / name}: {error}"
            tell(f"{known}; it is left out")
            continue
        yield name, picture


def read_pictures(
    folder: Path, found: dict[str, str], size: int, crop: bool = True
) -> tuple[Tensor, list[str]]:
    """The pictures with captions ``found``, uint8 (N, 3, size, size), and the captions.

    ValueError if none can be read.
    """
    pictures = torch.empty(len(found), 3, size, size, dtype=torch.uint8)
    captions: list[str] = []
    for name, picture in read_each(folder, found):
        pictures[len(captions)] = to_tensor(resized(picture, size, crop))
        captions.append(found[name])
    if not captions:
        raise ValueError(f"{folder}: none of its pictures can be read")
    return pictures[: len(captions)], captions


# What a training learns from, in place of ``garments.Scenes``


_read_once = functools.lru_cache(maxsize=1)(read_folder)


@dataclass(frozen=True)
class PictureBatch:
    """Pictures (B, 3, 64, 64) in [−1, 1], and the numbers (B,) of their captions."""

    images: Tensor
    caption_ids: Tensor
    texts: list[str]

    @property
    def captions(self) -> list[str]:
        """The captions as strings."""
        return [self.texts[i] for i in self.caption_ids.tolist()]

    @property
    def meanings(self) -> Tensor:
        """Every caption means something else (B,)."""
        return self.caption_ids


class Pictures:
    """The pictures of a folder, called like ``garments.Scenes``.

    One in ten, but 8 to 512, is kept for the split "test"; which ones, ``seed`` says.
    """

    def __init__(
        self,
        split: str,
        folder: str,
        device: str | torch.device = "cpu",
        seed: int = 0,
        crop: bool = True,
    ) -> None:
        images, captions = _read_once(folder, IMAGE_SIZE, crop)
        if not any(text.strip() for text in captions):
            raise ValueError(f"{folder}: all captions are empty")
        held = min(512, max(8, len(images) // 10))
        if len(images) < 2 * held:
            raise ValueError(
                f"{folder} holds {len(images)} pictures with captions, too few to "
                f"learn from; expected at least {2 * held}"
            )
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator)
        chosen = order[:held] if split == "test" else order[held:]
        self.texts = list(dict.fromkeys(captions))
        number = {text: i for i, text in enumerate(self.texts)}
        numbers = torch.tensor([number[text] for text in captions])
        self.images = images[chosen].to(device)
        self.numbers = numbers[chosen].to(device)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def device(self) -> torch.device:
        """Where the pictures are."""
        return self.images.device

    @property
    def content(self) -> tuple:
        """All that decides what ``batch`` returns."""
        return self.images, self.numbers, *self.texts

    def all_captions(self) -> list[str]:
        """Every caption of both splits once: entry i is the one with number i."""
        return self.texts

    def batch(self, indices: Tensor) -> PictureBatch:
        """The pictures with the numbers ``indices`` (B,), each below the length."""
        images = from_bytes(self.images[indices])
        return PictureBatch(images, self.numbers[indices], self.texts)

    def caption_pairs(self, indices: Tensor) -> Tensor:
        """Each picture's caption twice (B, 2): nobody has said it in other words."""
        return self.numbers[indices, None].expand(-1, 2)
