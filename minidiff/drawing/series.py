"""What one command draws: the pipeline that fits it, and its pictures as they come.

Nothing large is imported before the pipeline is wanted: what is wrong with a command's
files is told at once.
"""

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidiff.files.disk import check_output, numbered, reserved
from minidiff.files.pictures import contact_sheet, save_picture, thumbnail
from minidiff.interface.limits import MOST_PICTURES, check_pictures
from minidiff.interface.options import fields_of, not_none
from minidiff.interface.terminal import tell

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from minidiff.control import Control
    from minidiff.drawing.image_to_image import Start
    from minidiff.interface.request import Request
    from minidiff.sampling import Pipeline

AT_ONCE = 64  # more of one prompt gain no speed, and none is saved before the last
SHOWN = 100  # pictures on a contact sheet
USUAL = Path("picture.png")


@dataclass(frozen=True)
class Series:
    """``num_images`` pictures of each of ``texts``; picture i starts from seed + i.

    ``batch_size`` prompts are drawn at once (None: one, and at most 64 pictures), or
    as many as memory holds. ``request`` says all else (None: as the model has it),
    ``start`` what to begin from. ``lora``, a file or its folder, acts ``lora_scale``
    times; ``skip_layers`` are those of Skip Layer Guidance.
    """

    texts: Sequence[str]
    num_images: int = 1
    batch_size: int | None = None
    seed: int = 0
    request: "Request | None" = None
    start: "Start | None" = None
    lora: Path | None = None
    lora_scale: float = 1.0
    skip_layers: Sequence[int] = ()
    skip_layer_scale: float = 2.8

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            number = getattr(self, name)
            if number is not None and not 1 <= number <= MOST_PICTURES:
                found = f"--{name.replace('_', '-')} is {number}"
                wanted = f"a whole number, 1 to {MOST_PICTURES}"
                raise ValueError(f"{found}; expected {wanted}")
        check_pictures(len(self.texts), self.num_images)

    def __len__(self) -> int:
        return len(self.texts) * self.num_images

    def begin(self, options: dict[str, Any]) -> "tuple[Series, Pipeline]":
        """The series with all that a command's ``options`` ask for, and what draws it.

        Options are called as the fields of Request, Start and Plan, and as the
        arguments of ``load``, or begin with ``control``.
        """
        import torch

        from minidiff.drawing.image_to_image import Start
        from minidiff.engine.memory import Plan

        dtype = options["dtype"] and getattr(torch, options["dtype"])
        options = options | {"dtype": dtype}
        start = Start(**fields_of(Start, options)) if options["image"] else None
        series = replace(self, request=asked_for(options), start=start)
        plan = fields_of(Plan, options) | not_none(memory=options["memory"])
        return series, series.load(
            options["model"],
            options["text_encoders"],
            options["device"],
            dtype,
            plan,
            fast=options["fast"] or None,
            compile=options["compile"],
        )

    def load(
        self,
        model: str,
        text_encoders: Path | None,
        device: str,
        dtype: "torch.dtype | None",
        plan: dict[str, Any],
        fast: bool | None,
        compile: bool,
    ) -> "Pipeline":
        """A pipeline in which one picture fits: checked first, without any weights.

        ``plan``: ``memory`` and settings of a Plan. What is printed goes to stderr:
        stdout is for names. Raises ValueError or OSError for a file that is of no use.
        """
        from minidiff.engine import loading, memory
        from minidiff.files.lora_files import lora_file
        from minidiff.files.weights import open_tensors
        from minidiff.interface.checks import find_target

        if self.lora:
            open_tensors(lora_file(self.lora))  # before all else
        wanted, target = memory.requested(**plan), find_target(device, dtype)
        given = loading.Given(model, text_encoders, t5=wanted.t5 != "none")
        with redirect_stdout(sys.stderr):
            opened = loading.open_model(given, *target, weights=False)
            rehearsal = self.with_lora(opened.rehearsal(wanted), compile)
            fit = opened.fit(requests=[self.check(rehearsal)], **plan)
            if fit.plan != wanted:  # it may keep weights away that a LoRA is added to
                self.with_lora(opened.rehearsal(fit.plan), compile)
            pipe = opened.load(fit, fast=fast, compile=compile, **plan)
        return self.with_lora(pipe, compile)

    def with_lora(self, pipe: "Pipeline", fused: bool) -> "Pipeline":
        """``pipe`` with the LoRA, ``fused`` into the weights or beside them."""
        from minidiff.engine.adapters import load_lora

        if self.lora:
            load_lora(pipe, self.lora, self.lora_scale, fused)
        return pipe

    def batch(self, pipe: "Pipeline", rows: range) -> "Request":
        """The request for the pictures of these numbers."""
        from minidiff.interface.request import Request

        own = self.request or Request("")
        if self.skip_layers:
            from minidiff.drawing.guidance import SkipLayer

            beneath = pipe.guidance(own.guidance_scale)
            guidance = SkipLayer(beneath, self.skip_layers, self.skip_layer_scale)
            own = replace(own, guidance=guidance, guidance_scale=None)
        prompts = [self.texts[i // self.num_images] for i in rows]
        return replace(own, prompt=prompts, seed=self.seed + rows.start)

    def check(self, pipe: "Pipeline") -> "Request":
        """The first picture's request, as ``pipe`` would draw it; nothing is told."""
        request = self.batch(pipe, range(1))
        with warnings.catch_warnings(action="ignore"):  # told when it is drawn
            return (
                self.start.check(pipe, request) if self.start else pipe.check(request)
            )

    def draw(self, pipe: "Pipeline") -> "Iterator[Image]":
        """The pictures, batch by batch; one that memory does not hold is halved."""
        from minidiff.engine.memory import NoRoom

        first, size = 0, min(self.num_images, AT_ONCE)
        if self.batch_size:
            size = self.batch_size * self.num_images
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
        request = self.batch(pipe, rows)
        if self.start:
            return self.start.draw(pipe, request)
        return pipe.draw(pipe.check(request))


def asked_for(options: dict[str, Any]) -> "Request":
    """The request that a command's options make; the series has prompts and seeds."""
    from minidiff.drawing.previews import write_previews
    from minidiff.interface.request import Request

    asked = fields_of(Request, options) | {"prompt": "", "seed": 0}
    if file := options["preview"]:
        asked["callback_on_step_end"] = write_previews(file)
    asked["control"] = options["control"] and steered_by(options)
    return Request(**asked)


def steered_by(options: dict[str, Any]) -> "Control":
    """What a ControlNet and its picture make."""
    from minidiff.control import Control, load_control

    net = load_control(options["control"], options["device"], options["dtype"])
    how = {name: options[f"control_{name}"] for name in ("strength", "start", "end")}
    return Control(options["control_image"], net, **not_none(**how))


@dataclass(frozen=True)
class Outputs:
    """The files of ``count`` pictures: ``file``, or file-0, file-1, … for several.

    With ``file`` None the first free names: picture.png, picture-1.png, … ``preview``
    is written beside them, and of several pictures a ``sheet``: a small one of each.
    Raises ValueError or OSError for a name that cannot be written.
    """

    file: Path | None
    count: int
    overwrite: bool = False
    preview: Path | None = None
    sheet: bool = False

    def __post_init__(self) -> None:
        for option, file in (("--output", self.file), ("--preview", self.preview)):
            if file and file.suffix.lower() != ".png":
                found = f"{option} is {file}"
                raise ValueError(f"{found}; expected a name that ends in .png")
        names = self.names()
        for name in filter(None, (*names, self.preview)):
            check_output(name, self.overwrite)
        if self.has_sheet:
            check_output(self.sheet_name(), overwrite=True)  # or the next free name
        if self.preview and self.preview.resolve() in {n.resolve() for n in names}:
            found = f"--preview is {self.preview}"
            raise ValueError(f"{found}, which a picture will be called")

    def names(self) -> list[Path]:
        """What the pictures will be called, unless others take the names meanwhile."""
        if self.file is None:
            free = (name for name in numbered(USUAL) if not name.exists())
            return list(islice(free, self.count))
        if self.count == 1:
            return [self.file]
        stem = self.file.stem
        return [self.file.with_stem(f"{stem}-{i}") for i in range(self.count)]

    @property
    def has_sheet(self) -> bool:
        """Whether a contact sheet is written."""
        return self.sheet and self.count > 1

    def sheet_name(self) -> Path:
        """What the contact sheet will be called, if the name is free."""
        file = self.file or USUAL
        return file.with_stem(f"{file.stem}-sheet")

    def held(self) -> AbstractContextManager[None]:
        """Within, no other run takes the first name; it can be written."""
        return reserved(self.names()[0], self.overwrite or self.file is None)

    def save(self, pictures: "Iterable[Image]") -> Iterator[Path]:
        """Write each picture as it comes, and then the contact sheet."""
        free, shown = numbered(USUAL), list["Image"]()
        for picture, name in zip(pictures, self.names(), strict=True):
            yield self.save_as(picture, numbered(name) if self.file else free)
            if self.has_sheet and len(shown) < SHOWN:
                shown.append(thumbnail(picture))
        if shown:
            names = numbered(self.sheet_name())
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
