"""Pictures in files. Nothing large is imported here."""

from pathlib import Path

from PIL import Image, ImageOps

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
