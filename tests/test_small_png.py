"""Small PNGs, decoded together, are what PIL reads one by one."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from minidiff.files import small_png


def chunk(kind: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def png(rows: np.ndarray) -> bytes:
    """A grey PNG of stored rows (H, 1 + W), in two parts and with a text."""
    height, width = rows.shape
    sizes = struct.pack(">2I5B", width - 1, height, 8, 0, 0, 0, 0)
    data = zlib.compress(rows.tobytes())
    parts = (b"IDAT", data[:9]), (b"IDAT", data[9:]), (b"IEND", b"")
    begin = chunk(b"IHDR", sizes) + chunk(b"tEXt", b"a\0b")
    return small_png.SIGNATURE + begin + b"".join(chunk(*part) for part in parts)


@pytest.fixture
def stored() -> np.ndarray:
    """Rows (12, 7, 8) of any bytes, with each of the filters."""
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 256, (12, 7, 8), np.uint8)
    rows[..., 0] = np.arange(84).reshape(12, 7) % 5
    return rows


def test_pixels_are_those_of_pil(stored: np.ndarray) -> None:
    files = [png(rows) for rows in stored]
    read = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
    found = small_png.decode(files, 7, chunk=5)
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    assert (found == np.stack(read)).all()


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.replace(b"PNG", b"JPG"),
        lambda file: file[:50],
        lambda file: file[:-30] + bytes([file[-30] ^ 1]) + file[-29:],
        lambda file: file.replace(b"IDAT", b"iDAT"),
    ],
    ids=["no PNG", "cut", "changed", "no pixels"],
)
def test_what_is_no_such_picture(stored: np.ndarray, damage) -> None:
    with pytest.raises(small_png.ERRORS):
        small_png.decode([png(stored[0]), damage(png(stored[1]))], 7)


def test_other_sizes_and_filters(stored: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected PNGs of 28 × 28 pixels"):
        small_png.decode([png(stored[0])], 28)
    stored[3, 2, 0] = 5
    with pytest.raises(ValueError, match="no filter of PNG"):
        small_png.decode([png(rows) for rows in stored], 7)
