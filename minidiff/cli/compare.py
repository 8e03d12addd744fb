"""``minidiff compare``: why two pictures differ, setting by setting."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minidiff.cli.options import examples
from minidiff.interface.terminal import cut, printable

if TYPE_CHECKING:
    from PIL.Image import Image

EXAMPLES = examples(
    "minidiff compare one.png other.png",
    "minidiff compare ours.png theirs.webp",
)
# What a setting changes, the most telling first
CAUSES = {
    "weights": "the transformer is another one",
    "model": "other weights",
    "lora": "other corrections beside the weights",
    "lora_scale": "the corrections are added more or less",
    "prompt": "other words",
    "prompt_2": "other words for CLIP-G",
    "prompt_3": "other words for T5",
    "negative_prompt": "guidance leads away from other words",
    "max_sequence_length": "T5 reads more or fewer tokens, and its padding is read too",
    "t5": "without T5 its part of the context is zeros",
    "width": "another size begins from other noise",
    "height": "another size begins from other noise",
    "seed": "other noise to begin from",
    "strength": "more or less of the picture to begin from is kept",
    "sigmas": "other noise levels are visited",
    "num_inference_steps": "other noise levels are visited",
    "sampler": "another solver: near for many steps, not for few",
    "guidance_scale": "the prompt is followed more or less",
    "skip_layers": "blocks are left out to guide away from",
    "dtype": "rounding: the same picture for the eye, seldom to the last bit",
    "fp8": "the blocks' weights are rounded to 8 bits",
    "nf4": "the blocks' and T5's weights are rounded to 4 bits",
    "vae_tile": "the decoder works in tiles, which are blended",
    "fast": "sums in another order: the last bits",
    "version": "another version of the program",
}


def compare(
    one: Annotated[Path, typer.Argument(help="A picture.", metavar="PICTURE")],
    other: Annotated[Path, typer.Argument(help="Another.", metavar="PICTURE")],
) -> None:
    """Say how two pictures differ: their settings side by side, and their pixels.

    The first difference that explains the others is named. Pictures of other programs
    carry no settings that are read here; then only the pixels are compared.
    """
    from minidiff.files.pictures import open_picture

    pictures = [open_picture(path) for path in (one, other)]
    settings = [dict(getattr(picture, "text", {})) for picture in pictures]
    for path, found in zip((one, other), settings, strict=True):
        if not found:
            print(f"{printable(path)} carries no settings")
    print("\n".join(settings_table(*settings)))
    print(pixel_difference(*pictures))
    if (name := first_difference(*settings)) and all(settings):
        print(f"first: {printable(name)}: {CAUSES.get(name, 'not known here')}")


def settings_table(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """The settings of two pictures, a line each; those that differ are marked."""
    names = list(dict.fromkeys((*one, *other)))
    rows = [(n, one.get(n, "–"), other.get(n, "–")) for n in names]
    shown = [[cut(printable(x), 36) for x in row] for row in rows]
    wide = [max((len(row[i]) for row in shown), default=0) for i in range(2)]
    return [
        f"{name:<{wide[0]}}  {a:<{wide[1]}}  {b}{'' if x == y else '  <'}"
        for (name, a, b), (_, x, y) in zip(shown, rows, strict=True)
    ]


def first_difference(one: dict[str, str], other: dict[str, str]) -> str | None:
    """The setting that differs and stands first in ``CAUSES``; None where none does."""
    differ = [n for n in {**one, **other} if one.get(n) != other.get(n)]
    known = [name for name in CAUSES if name in differ]
    return next(iter(known or differ), None)


def pixel_difference(one: "Image", other: "Image") -> str:
    """How far the pixels of two pictures are apart."""
    import numpy as np

    from minidiff.files.pictures import in_rgb

    if one.size != other.size:
        sizes = " and ".join(f"{w} × {h}" for w, h in (one.size, other.size))
        return f"pixels: {sizes}, not compared"
    a, b = (np.asarray(in_rgb(picture), dtype=float) for picture in (one, other))
    far = np.abs(a - b)
    if not far.any():
        return "pixels: the same"
    mean, most = far.mean(), far.max()
    return f"pixels: apart by {mean:.1f} of 255 on average, {most:.0f} at most"
