"""``minidiff evaluate``: how well a model follows its prompts."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

from minidiff.cli.options import (
    MODEL,
    Device,
    Overwrite,
    examples,
    find_device,
    option,
    refuse,
)
from minidiff.interface.terminal import tell

EXAMPLES = examples(
    "minidiff evaluate --model my-model/model --output found.json",
    "minidiff evaluate -n 100 --garments one --guidance-scale 3 --seed 5",
)
WHO, WHAT, HOW, OUT = "Model", "What is measured", "How to draw", "Output"


def evaluate(
    model: Annotated[str, option(WHO, f"{MODEL}.", metavar="NAME")] = "tiny",
    n: Annotated[
        int, option(WHAT, "Prompts in each row.", "-n", "--n", metavar="N")
    ] = 500,
    garments: Annotated[
        str, option(WHAT, "Rows: one, two, or all.", metavar="NAME")
    ] = "all",
    judge: Annotated[
        Path | None,
        option(WHAT, "Folder of a judge.", metavar="FOLDER", usual="the shipped one"),
    ] = None,
    prompts: Annotated[
        Path | None,
        option(
            WHAT,
            "Free prompts, JSON lines, instead of rows (see the page on training).",
            metavar="FILE",
        ),
    ] = None,
    inception: Annotated[
        Path | None,
        option(
            WHAT,
            "Inception-v3's weights, safetensors: distances are then FID.",
            metavar="FILE",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        option(
            WHAT,
            "Folder of Fashion-MNIST's parquet files.",
            metavar="FOLDER",
            usual="$MINIDIFF_DATA",
        ),
    ] = None,
    steps: Annotated[int, option(HOW, "Denoising steps.", metavar="N")] = 28,
    guidance_scale: Annotated[
        float | None,
        option(
            HOW,
            "How closely to follow a prompt.",
            metavar="X",
            usual="the model's own",
        ),
    ] = None,
    seed: Annotated[
        int, option(HOW, "Choose a guidance with another.", metavar="N")
    ] = 2,
    device: Device = None,
    output: Annotated[
        Path | None, option(OUT, "JSON file to write as well.", metavar="FILE")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure how well a model that draws scenes follows its prompts."""
    from minidiff.files.writing import reserved, write_json

    if garments != "all":
        refuse("--garments all", None, inception=inception)
    with reserved(output, overwrite) if output else nullcontext():
        from minidiff.judging import evaluation

        size, files = (n, guidance_scale, steps, garments, seed), (inception, data)
        asked = model, *size, judge, *files, find_device(device), prompts
        result = evaluation.Evaluation(*asked).measure(tell)
        if output:
            write_json(output, result)
    print(evaluation.table(result))
