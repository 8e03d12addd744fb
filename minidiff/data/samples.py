"""What ships of the small world, so that no data set is needed: scenes, captions."""

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from minidiff.data.language import captions, shown
from minidiff.data.rng import fold_in, uniform
from minidiff.data.scenes import SHARES, Attributes, World, draw_attributes
from minidiff.files.disk import write_text
from minidiff.files.pictures import from_bytes, save_sheet, to_tensor

SAMPLES = Path(__file__).parent.parent / "pretrained" / "scenes"
ONE, TWO = (1.0, 0.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0, 0.0)  # items in a scene
FIRST = "a red dress on a blue background"


def sample_captions(
    n: int, layouts: tuple[float, ...] = SHARES, seed: int = 1
) -> list[str]:
    """Captions of n scenes of the world; ``layouts``: how often each of LAYOUTS."""
    numbers = torch.arange(n)
    drawn = draw_attributes(uniform(seed, numbers, 33), "", layouts)
    return captions(drawn, fold_in(seed, 1), numbers)[0]


def sample_scenes() -> tuple[Tensor, list[str]]:
    """Sixteen scenes of the test split, half of them of two items or more.

    Returns pictures (16, 3, 64, 64) in [−1, 1] and their captions; the first shows
    "a red dress on a blue background".
    """
    sheet = from_bytes(to_tensor(Image.open(SAMPLES / "scenes.png")))
    texts = json.loads((SAMPLES / "scenes.json").read_text())["captions"]
    # (3, 2·64, 8·64) → (3, 2, 64, 8, 64) → (2, 8, 3, 64, 64) → (16, 3, 64, 64)
    tiles = sheet.unflatten(2, (-1, 64)).unflatten(1, (-1, 64))
    return tiles.permute(1, 3, 0, 2, 4).flatten(0, 1).contiguous(), texts


def find_first(attributes: Attributes) -> int:
    """The number of the first scene that shows what ``FIRST`` asks for."""
    group = ("dress", 1, "red")
    for i, meaning in enumerate(shown(attributes)):
        if (meaning.groups[0][:3], meaning.ground) == (group, "blue"):
            if len(meaning.groups) == 1 and meaning.place == "middle":
                return i
    raise ValueError(f"none of {len(attributes.place)} scenes shows {FIRST}")


def write_samples(folder: str | Path | None, output: Path = SAMPLES) -> None:
    """Make the files that ``sample_scenes`` reads."""
    one = World("test", folder, layouts=ONE)
    several = World("test", folder, layouts=(0.0, *SHARES[1:]))
    garments = World("test", folder, layouts=ONE, garments=1.0)
    first = find_first(garments.attributes(torch.arange(100_000)))
    chosen = (garments, [first]), (one, range(7)), (several, range(8, 16))
    pictures, texts = [], []
    for world, rows in chosen:
        numbers = torch.tensor([*rows])
        pictures.append(world.batch(numbers).images)
        texts += captions(world.attributes(numbers), 1, numbers)[0]
    save_sheet((torch.cat(pictures) + 1) / 2, 8, output / "scenes.png")
    text = json.dumps({"captions": [FIRST, *texts[1:]]}, indent=1)
    write_text(output / "scenes.json", text + "\n")


if __name__ == "__main__":
    import sys

    write_samples(sys.argv[1] if sys.argv[1:] else None)
