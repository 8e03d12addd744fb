"""``minidiff export``: a model for web pages, which draw with it in the browser."""

from pathlib import Path
from typing import Annotated

from minidiff.cli.options import MODEL, OUT, WHO, examples
from minidiff.interface.terminal import status

EXAMPLES = examples("minidiff export --model tiny --output site/live")


def export(
    output: Annotated[Path, OUT("Folder of the files.")],
    model: Annotated[str, WHO(f"{MODEL}, small.")] = "tiny",
) -> None:
    """Write what a page needs to draw with a model, without a server's help.

    A page loads page.js and then models.js; minidiff.draw({prompt, seed}) is a promise
    of pixels. Several models may be in one folder.
    """
    with status(f"loading {model}"):
        from minidiff.engine.loading import load
        from minidiff.live.exporting import export_pipeline

        pipe = load(model)
    export_pipeline(pipe, output, model)
    print(output)
