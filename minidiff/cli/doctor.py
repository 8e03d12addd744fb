"""``minidiff doctor``: whether this machine computes what it should."""

from typing import Annotated

import typer

from minidiff.cli.options import MODEL, WHO, Device, Dtype, examples, find_device

EXAMPLES = examples(
    "minidiff doctor", "minidiff doctor --model sd3.5-medium --device cuda"
)


def doctor(
    model: Annotated[str, WHO(f"{MODEL} or an official single file.")] = "tiny",
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Examine versions, device and files, and compute a block and a decoder.

    Each result is compared with the CPU's in float32; where one is wrong the exit
    status is 1. Licence and token are asked of the hub; no token is shown.
    """
    import torch

    from minidiff.engine.doctor import examine
    from minidiff.interface.checks import find_target
    from minidiff.interface.terminal import printable

    where = find_target(find_device(device), dtype and getattr(torch, dtype))
    wrong = False
    for found in examine(model, *where):
        print(printable(found), flush=True)
        wrong |= found.wrong
    if wrong:
        raise typer.Exit(1)
