"""``minidiff download``: a model's files from the hub."""

from typing import Annotated

import typer

from minidiff.cli.options import examples

EXAMPLES = examples(
    "minidiff download sd3.5-medium",
    "minidiff download sd3.5-large --without-t5",
)
NAMES = "sd3.5-medium, sd3.5-large, sd3.5-large-turbo, or a hub id."
LARGE = "Leave out the largest encoder: for sample --t5 none."


def download(
    model: Annotated[str, typer.Argument(help=NAMES)],
    without_t5: Annotated[bool, typer.Option("--without-t5", help=LARGE)] = False,
) -> None:
    """Fetch a model's files from the hub, check them and print their folder.

    Licence and token: see the model's page there, and hf auth login.
    """
    from minidiff.files import hub
    from minidiff.files.layout import ON_HUB

    if model not in ON_HUB and model.count("/") != 1:
        known = ", ".join(ON_HUB)
        raise ValueError(f"model is {model!r}; expected {known} or a hub id owner/name")
    print(hub.download_model(model, not without_t5, check_all=True))
