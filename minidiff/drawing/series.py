"""Many pictures of one command: drawn as memory holds them, saved as they come."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidiff.files.pictures import contact_sheet, save_picture, thumbnail
from minidiff.files.writing import check_output, numbered, reserved
from minidiff.interface.terminal import tell

if TYPE_CHECKING:
    from PIL.Image import Image

    from minidiff.drawing.image_to_image import Start
    from minidiff.interface.request import Request
    from minidiff.sampling import Pipeline

MOST = 100_000  # pictures of one command
AT_ONCE = 64  # more of one prompt gain no speed, and none is saved before the last
SHOWN = 100  # pictures on a contact sheet
USUAL = Path("picture.png")


@dataclass(frozen=True)
class Series:
    """``num_images`` pictures of each of ``texts``; picture i starts from seed + i.

    ``batch_size`` prompts are drawn at once (None: one, and at most 64 pictures), or
    as many as memory holds. ``request`` says all else (None: as the model has it),
    ``start`` what to begin from.
    """

    texts: Sequence[str]
    num_images: int = 1
    batch_size: int | None = None
    seed: int = 0
    request: "Request | None" = None
    start: "Start | None" = None

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            check_number(f"--{name.replace('_', '-')}", getattr(self, name))
        if len(self) > MOST:
            asked = f"{len(self.texts):,} × {self.num_images:,} pictures are asked for"
            raise ValueError(f"{asked}; expected at most {MOST:,} in one command")

    def __len__(self) -> int:
        return len(self.texts) * self.num_images

    @property
    def at_once(self) -> int:
        """How many pictures are drawn at once where memory is no matter."""
        if self.batch_size is None:
            return min(self.num_images, AT_ONCE)
        return self.batch_size * self.num_images

    def batch(self, rows: range) -> "Request":
        """The request for the pictures of these numbers."""
        from minidiff.interface.request import Request

        prompts = [self.texts[i // self.num_images] for i in rows]
        own = self.request or Request("")
        return replace(own, prompt=prompts, seed=self.seed + rows.start)

    def check(self, pipe: "Pipeline") -> "Request":
        """The first picture's request, as ``pipe`` would draw it; nothing is told."""
        request = self.batch(range(1))
        with warnings.catch_warnings(action="ignore"):  # told when it is drawn
            if self.start is None:
                return pipe.check(request)
            from minidiff.drawing import image_to_image

            return image_to_image.check(pipe, request, self.start)

    def draw(self, pipe: "Pipeline") -> "Iterator[Image]":
        """The pictures, batch by batch; one that memory does not hold is halved."""
        from minidiff.engine.memory import NoRoom

        first, size = 0, self.at_once
        while first < len(self):
            rows = range(first, min(first + size, len(self)))
            try:
                pictures = self.draw_batch(pipe, rows)
            except NoRoom:
                if size == 1:
                    raise
                size = (size + 1) // 2
                continue
            yield from pictures
            first = rows.stop

    def draw_batch(self, pipe: "Pipeline", rows: range) -> Any:
        """The pictures of these numbers."""
        if pipe.progress and len(self) > 1:
            several = f"{rows.start + 1} to " if len(rows) > 1 else ""
            pipe.progress = f"{several}{rows.stop} of {len(self)}"
        request = self.batch(rows)
        if self.start is None:
            return pipe.draw(pipe.check(request))
        from minidiff.drawing import image_to_image

        return image_to_image.draw(pipe, request, self.start)


def check_number(option: str, number: int | None) -> None:
    """Raise ValueError unless ``number`` is one of pictures."""
    if number is not None and not 1 <= number <= MOST:
        raise ValueError(f"{option} is {number}; expected a whole number, 1 to {MOST}")


def check_preview(file: Path | None, outputs: "Outputs") -> None:
    """Raise ValueError unless previews can be written beside the pictures."""
    if file is None:
        return
    check_png("--preview", file)
    check_output(file, outputs.overwrite)
    if file.resolve() in {name.resolve() for name in outputs.names()}:
        raise ValueError(f"--preview is {file}, which a picture will be called")


def check_png(option: str, file: Path) -> None:
    """Raise ValueError unless ``file`` is named as what is written."""
    if file.suffix.lower() != ".png":
        raise ValueError(f"{option} is {file}; expected a name that ends in .png")


@dataclass(frozen=True)
class Outputs:
    """The files of ``count`` pictures: ``file``, or file-0, file-1, … for several.

    With ``file`` None the first free names: picture.png, picture-1.png, …
    """

    file: Path | None
    count: int
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.file:
            check_png("--output", self.file)
        for name in self.names():
            check_output(name, self.overwrite)

    def names(self) -> list[Path]:
        """What the pictures will be called, unless others take the names meanwhile."""
        if self.file is None:
            free = (name for name in numbered(USUAL) if not name.exists())
            return list(islice(free, self.count))
        if self.count == 1:
            return [self.file]
        stem = self.file.stem
        return [self.file.with_stem(f"{stem}-{i}") for i in range(self.count)]

    def held(self) -> AbstractContextManager[None]:
        """Within, no other run takes the first name; it can be written."""
        return reserved(self.names()[0], self.overwrite or self.file is None)

    def save(self, pictures: "Iterable[Image]", sheet: bool = False) -> Iterator[Path]:
        """Write each picture as it comes, and ``sheet``: a small one of each on one."""
        free, shown = numbered(USUAL), list["Image"]()
        for picture, name in zip(pictures, self.names(), strict=True):
            yield self.save_as(picture, numbered(name) if self.file else free)
            if sheet and self.count > 1 and len(shown) < SHOWN:
                shown.append(thumbnail(picture))
        if shown:
            file = self.file or USUAL
            names = numbered(file.with_stem(f"{file.stem}-sheet"))
            tell(f"contact sheet: {self.save_as(contact_sheet(shown), names)}")

    def save_as(self, picture: "Image", names: Iterator[Path]) -> Path:
        """Write a picture under the first of ``names``, or the first that is free."""
        for name in names:
            try:
                save_picture(picture, name, self.overwrite and self.file is not None)
                return name
            except FileExistsError:  # another run has taken it
                continue
        raise FileExistsError("no name is free")
