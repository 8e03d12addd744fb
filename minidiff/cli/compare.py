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
# What a setting changes, or one value of it; the most telling first
CAUSES = {
    "weights": "the transformer is another one",
    "model": "other weights",
    "lora": "other corrections beside the weights",
    "lora_scale": "the corrections are added more or less",
    "prompt": "other words",
    "prompt_2": "other words for CLIP-G",
    "prompt_3": "other words for T5",
    "prompt_embeds": "another encoding of the words, or other weights of them",
    "pooled_prompt_embeds": "another pooled vector of the words",
    "negative_prompt": "guidance leads away from other words",
    "negative_prompt_2": "guidance leads away from other words for CLIP-G",
    "negative_prompt_3": "guidance leads away from other words for T5",
    "negative_prompt_embeds": "guidance leads away from another encoding",
    "negative_pooled_prompt_embeds": "guidance leads away from another pooled vector",
    "max_sequence_length": "T5 reads more or fewer tokens, and its padding is read too",
    "t5 none": "without T5 its part of the context is zeros",
    "image": "another picture to begin from",
    "mask_image": "other places are drawn anew",
    "control": "another sketch steers, or otherwise",
    "width": "another size begins from other noise",
    "height": "another size begins from other noise",
    "seed": "other noise to begin from",
    "latents": "other noise to begin from",
    "strength": "more or less of the picture to begin from is kept",
    "shift": "other noise levels are visited",
    "sigmas": "other noise levels are visited",
    "num_inference_steps": "other noise levels are visited",
    "sampler": "another solver: near for many steps, not for few",
    "guidance_scale": "the prompt is followed more or less",
    "skip_layers": "blocks are left out to guide away from",
    "skip_layer_scale": "the drawing is led more or less away from fewer blocks",
    "skip_layer_start": "blocks are left out in other steps",
    "skip_layer_stop": "blocks are left out in other steps",
    "cache_threshold": "where the first block hardly changes, the others are skipped",
    "dtype": "rounding: the same picture for the eye, seldom to the last bit",
    "fp8": "the blocks' weights are rounded to 8 bits",
    "nf4": "the blocks' and T5's weights are rounded to 4 bits",
    "memory": "another plan, which may round the weights or work in tiles",
    "vae_tile": "the decoder works in tiles, which are blended",
    "fast": "sums in another order: the last bits",
    "compile": "sums in another order: the last bits",
    "vae_slicing": "one picture at a time, in another order of sums: the last bits",
    "t5": "where its weights wait: the same numbers, but that nf4 rounds a resident T5",
    "clip": "where its weights wait: the same numbers",
    "modulation": "where its weights wait: the same numbers",
    "version": "another version of the program",
}
# Titles on the book's page of quirks
QUIRKS = {
    "max_sequence_length": "Padding is read like text",
    "t5 none": "No prompt is not the same as nothing",
    "shift": "Schedule: shifted twice",
}
SAME = "pixels: the same"
UNTOLD = "nothing noted; a callback, say, or a part replaced by hand leaves no note"


def compare(
    one: Annotated[Path, typer.Argument(help="A picture.", metavar="PICTURE")],
    other: Annotated[Path, typer.Argument(help="Another.", metavar="PICTURE")],
) -> None:
    """Say how two pictures differ: their settings side by side, and their pixels.

    Where pixels differ, the first difference that explains the others is named.
    Pictures of other programs carry no settings that are read here; then only the
    pixels are compared.
    """
    from minidiff.files.pictures import open_picture

    pictures = [open_picture(path) for path in (one, other)]
    settings = [own_settings(picture) for picture in pictures]
    for path, found in zip((one, other), settings, strict=True):
        if not found:
            print(f"{printable(path)} carries no settings of minidiff")
    print("\n".join(settings_table(*settings)))
    print(pixels := pixel_difference(*pictures))
    if all(settings) and pixels != SAME:
        print(f"first: {cause(first_difference(*settings))}")


def own_settings(picture: "Image") -> dict[str, str]:
    """The settings that this program has written into a picture."""
    found = dict(getattr(picture, "text", {}))
    return found if found.get("version", "").startswith("minidiff ") else {}


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
    """What differs and stands first in ``CAUSES``; None where nothing does."""
    differ = [n for n in {**one, **other} if one.get(n) != other.get(n)]
    values = {f"{n} {found.get(n)}" for n in differ for found in (one, other)}
    known = [key for key in CAUSES if key in values.union(differ)]
    return next(iter(known or differ), None)


def cause(key: str | None) -> str:
    """What there is to say of a key of ``CAUSES``, or of a setting that is none."""
    if key is None:
        return UNTOLD
    quirk = f" (quirks: “{QUIRKS[key]}”)" if key in QUIRKS else ""
    return f"{printable(key)}: {CAUSES.get(key, 'not known here')}{quirk}"


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
        return SAME
    mean, most = far.mean(), far.max()
    return f"pixels: apart by {mean:.1f} of 255 on average, {most:.0f} at most"
