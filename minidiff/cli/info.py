"""``minidiff info``: what a model is made of, or how a picture was drawn."""

from pathlib import Path
from typing import Annotated

import typer

from minidiff.cli.options import MODEL, examples
from minidiff.interface.terminal import printable

EXAMPLES = examples("minidiff info sd3.5-medium", "minidiff info picture.png")


def info(
    model: Annotated[
        str, typer.Argument(help=f"{MODEL}; or a picture, for its settings.")
    ] = "tiny",
) -> None:
    """Print a model's parts, their parameters and their size in 16-bit numbers.

    Of a picture that sample has drawn, print the settings.
    """
    name = model.lower()
    is_file = Path(model).is_file() and not name.endswith(".safetensors")
    if is_file or name.endswith(".png"):
        from minidiff.files.pictures import read_settings

        for name, value in read_settings(model).items():
            print(f"{printable(name)}: {printable(value)}")
        return
    from minidiff.engine.loading import describe_model

    print(describe_model(model))
