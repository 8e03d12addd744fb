"""Pictures read from files and written into them, with their settings, and as tensors.

The settings are text chunks (iTXt) of a PNG file, each under its own name. Nothing
large is imported here.
"""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from minidiff.files.writing import replacing

if TYPE_CHECKING:
    from torch import Tensor

# Not PostScript, for which PIL would start another program on what the file says
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")


def open_picture(file: Path | str) -> Image.Image:
    """The picture in a file, all of it read, and turned as the camera was held.

    Raises ValueError for what is no picture, or damaged; OSError for what is no file.
    """
    try:
        with Image.open(file, formats=FORMATS) as picture:
            ImageOps.exif_transpose(picture, in_place=True)
    except Exception as error:  # of damage PIL tells in a dozen ways
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise
        what = f"{file} is not a picture that can be read: {error}"
        raise ValueError(f"{what}; expected {', '.join(FORMATS)}") from None
    return picture


def to_pil(pictures: "Tensor") -> list[Image.Image]:
    """Pictures (B, 3, H, W) in [0, 1] → PIL, rounded to the nearest of 256 levels."""
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


def in_rgb(picture: Image.Image) -> Image.Image:
    """A picture in RGB; what is transparent lies on white, 16 bits become 8.

    Raises ValueError for a picture of fractions, whose range is not known.
    """
    import numpy as np

    if picture.mode == "F":
        name = getattr(picture, "filename", "") or "the picture"
        raise ValueError(f"{name} holds fractions; expected 8 or 16 bits a value")
    if picture.mode.startswith("I"):
        values = np.asarray(picture).clip(0, 65535) // 257
        picture = Image.fromarray(values.astype("uint8"))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture)
    return picture.convert("RGB")


def to_tensor(picture: Image.Image) -> "Tensor":
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


def save_picture(picture: Image.Image, file: Path | str, replace: bool = False) -> None:
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
    if not (found := dict(getattr(open_picture(file), "text", {}))):
        raise ValueError(
            f"{file} carries no settings; minidiff sample and save_picture write them"
        )
    return found
