"""``minidiff download``: a model's files from the hub."""

from typing import Annotated

import typer

from minidiff.cli.options import examples, option

EXAMPLES = examples(
    "minidiff download sd3.5-medium",
    "minidiff download sd3.5-large --without-t5",
)


def download(
    model: Annotated[
        str,
        typer.Argument(
            help="sd3.5-medium, sd3.5-large, sd3.5-large-turbo, or a hub id.",
            metavar="MODEL",
        ),
    ],
    without_t5: Annotated[
        bool,
        option(
            "Options",
            "Leave out the largest encoder: for sample --t5 none.",
            "--without-t5",
        ),
    ] = False,
) -> None:
    """Fetch a model's files from the hub, check them and print their folder.

    Licence and token: see the model's page there, and hf auth login.
    """
    from minidiff.files import hub
    from minidiff.files.published import ON_HUB

    if model not in ON_HUB and model.count("/") != 1:
        known = ", ".join(ON_HUB)
        raise ValueError(f"model is {model!r}; expected {known} or a hub id owner/name")
    print(hub.download(model, not without_t5, check_all=True))
