"""``minidiff export``: a model for web pages, or in ONNX for every other runtime."""

from pathlib import Path
from typing import Annotated, Literal

from minidiff.cli.options import MODEL, OUT, WHO, examples
from minidiff.interface.terminal import status

EXAMPLES = examples(
    "minidiff export --model tiny --output site/live",
    "minidiff export --model tiny --control tiny-edges --output site/live",
    "minidiff export --model tiny --format onnx --output tiny-onnx",
)


def export(
    output: Annotated[Path, OUT("Folder of the files.")],
    model: Annotated[str, WHO(f"{MODEL}, small.")] = "tiny",
    control: Annotated[
        str | None, WHO("A ControlNet that reads sketches, as well: tiny-edges.")
    ] = None,
    format: Annotated[
        Literal["web", "onnx"],
        OUT("web: for pages that draw; onnx: a file for each part.", metavar="<str>"),
    ] = "web",
) -> None:
    """Write what a page needs to draw with a model, without a server's help.

    A page loads page.js and then models.js; minidiff.draw({prompt, seed}) is a promise
    of pixels. Several models may be in one folder. In ONNX each part is a file, for one
    picture at a time; this needs the packages onnx and onnxscript.
    """
    with status(f"loading {model}"):
        from minidiff.control import load_control
        from minidiff.engine.loading import load
        from minidiff.live import exporting, onnx

        if format == "onnx":
            onnx.check_possible(control)
        pipe = load(model, fast=False)  # fused layers have no form in ONNX
        net = load_control(control) if control else None
    if format == "onnx":
        onnx.export_onnx(pipe, output)
    else:
        exporting.export_pipeline(pipe, output, model, net)
    print(output)
