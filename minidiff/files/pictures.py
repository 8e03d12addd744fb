"""Pictures read from files and written into them, with their settings, and as tensors.

The settings are text chunks (iTXt) of a PNG file, each under its own name. Nothing
large is imported here.
"""

import math
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from minidiff.files.disk import creating, file_size, replacing

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

# Not PostScript, for which PIL would start another program on what the file says
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")
MOST_PIXELS = 2**26  # 0.2 GB in RGB, and several times that while it is converted
MOST_DRAWN = 100_000  # that one command draws
LONGEST = 2**22  # bytes of one text; PIL reads 64 MiB of them in all


def open_picture(file: Path | str) -> "Image":
    """The picture in a file, all of it read, and turned as the camera was held.

    Raises ValueError for what is no picture, damaged, or too large to be drawn from;
    OSError for what is no file.
    """
    from PIL import Image, ImageOps

    file_size(file)  # a pipe is not opened
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is refused below
            picture = Image.open(file, formats=FORMATS)
        with picture:
            if math.prod(picture.size) <= MOST_PIXELS:
                ImageOps.exif_transpose(picture, in_place=True)
    except Exception as error:  # of damage PIL tells in a dozen ways
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise
        what = f"{file} is not a picture that can be read: {error}"
        raise ValueError(f"{what}; expected {', '.join(FORMATS)}") from None
    if math.prod(picture.size) > MOST_PIXELS:  # told before its pixels are read
        found = "{} has {}×{} pixels".format(file, *picture.size)
        raise ValueError(f"{found}; expected at most {MOST_PIXELS:,}")
    return picture


def to_pil(pictures: "Tensor") -> "list[Image]":
    """Pictures (B, 3, H, W) in [0, 1] → PIL, rounded to the nearest of 256 levels."""
    from PIL import Image

    values = (pictures * 255).round().byte().cpu()
    values = values.permute(0, 2, 3, 1)  # (B, 3, H, W) → (B, H, W, 3)
    return [Image.fromarray(picture.numpy()) for picture in values]


def save_sheet(pictures: "Tensor", columns: int, file: Path) -> None:
    """Write ``pictures`` (N, 3, H, W) in [0, 1] as one PNG, N / ``columns`` rows."""
    sheet = pictures.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)
    sheet = sheet.flatten(3).flatten(1, 2)  # (3, R, H, K, W) → (3, R·H, K·W)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        to_pil(sheet[None])[0].save(part, "PNG", optimize=True)


def thumbnail(picture: "Image", side: int = 256) -> "Image":
    """A picture of at most ``side`` pixels; a small one in whole enlarged pixels."""
    from PIL import Image

    scale = side / max(picture.size)
    scale = int(scale) if scale >= 1 else scale
    width, height = (max(1, round(length * scale)) for length in picture.size)
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return picture.resize((width, height), how)


def contact_sheet(pictures: "Sequence[Image]", gap: int = 8) -> "Image":
    """Pictures row by row on white, about as many rows as columns."""
    from PIL import Image

    columns = math.ceil(math.sqrt(len(pictures)))
    width, height = (gap + max(p.size[i] for p in pictures) for i in (0, 1))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        sheet.paste(picture, (gap + column * width, gap + row * height))
    return sheet


def in_rgb(picture: "Image") -> "Image":
    """A picture in RGB; what is transparent lies on white, 16 bits become 8.

    Raises ValueError where the range of the values is not known.
    """
    from PIL import Image

    picture = in_eight_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture)
    return picture.convert("RGB")


def in_gray(picture: "Image") -> "Image":
    """A mask in 8 bits; what is transparent counts with the colour that it has.

    Raises ValueError where the range of the values is not known.
    """
    picture = in_eight_bits(picture)
    return (picture.convert("RGB") if picture.mode == "LAB" else picture).convert("L")


def in_eight_bits(picture: "Image") -> "Image":
    """A picture of 16 bits a value, or of fractions from 0 to 1, in 8; others as is.

    Raises ValueError for other fractions, and for whole numbers of 32 bits that do not
    need 9 to 16 of them: black and white may be anywhere.
    """
    import numpy as np
    from PIL import Image

    if picture.mode[0] not in "IF":
        return picture
    values = np.asarray(picture)
    low, high = values.min(), values.max()
    if picture.mode == "F" and 0 <= low <= high <= 1:
        return Image.fromarray((values * 255).round().astype("uint8"))
    deep = picture.mode == "I" and (high == 0 or 255 < high < 2**16)
    if low >= 0 and (deep or picture.mode.startswith("I;16")):
        return Image.fromarray((values // 257).astype("uint8"))
    name = getattr(picture, "filename", "") or "the picture"
    found = f"{name} holds values of 32 bits from {low:g} to {high:g}"
    raise ValueError(
        f"{found}; expected 8 or 16 bits a value, or fractions from 0 to 1"
    )


def is_transparent(picture: "Image") -> bool:
    """Whether any pixel of a picture lets through what lies beneath."""
    if not picture.has_transparency_data:
        return False
    alpha = picture.convert("RGBA").getchannel("A")
    return alpha.getextrema() != (255, 255)


def to_tensor(picture: "Image") -> "Tensor":
    """A picture as uint8 (3, H, W)."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.array(in_rgb(picture)))
    return pixels.permute(2, 0, 1)  # (H, W, 3) → (3, H, W)


def to_bytes(images: "Tensor") -> "Tensor":
    """Pictures in [−1, 1] as uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def from_bytes(images: "Tensor") -> "Tensor":
    """uint8 pictures as numbers in [−1, 1]."""
    return images.float() / 127.5 - 1


def save_picture(picture: "Image", file: Path | str, replace: bool = False) -> None:
    """Write a PNG that carries the numbers and texts of ``picture.info``.

    There every picture that a pipeline draws has its prompt, seed, model and settings;
    PIL's own ``save`` leaves them out. Our version is added. Raises FileExistsError for
    an existing file unless told to ``replace`` it, ValueError for another kind's name.
    """
    if Path(file).suffix.lower() != ".png":
        raise ValueError(f"file is {file}; expected a name that ends in .png")
    from PIL.PngImagePlugin import PngInfo

    info, about = PngInfo(), {"version": f"minidiff {version('minidiff')}"}
    for name, value in (picture.info | about).items():
        if isinstance(value, str | int | float):
            text = str(value).encode("utf-8", "replace")  # a path may be no text
            info.add_itxt(str(name), text[:LONGEST].decode("utf-8", "ignore"))
    with (replacing if replace else creating)(file) as part:
        picture.save(part, "PNG", pnginfo=info)


def read_settings(file: Path | str) -> dict[str, str]:
    """The settings in a PNG file; ValueError for what is no picture or has none."""
    if not (found := dict(getattr(open_picture(file), "text", {}))):
        raise ValueError(
            f"{file} carries no settings; minidiff sample and save_picture write them"
        )
    return found
