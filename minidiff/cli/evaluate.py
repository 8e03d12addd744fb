"""``minidiff evaluate``: how well a model follows its prompts."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

from minidiff.cli.options import (
    MODEL,
    OUT,
    WHO,
    Device,
    Group,
    Overwrite,
    examples,
    find_device,
)
from minidiff.interface.options import fields_of
from minidiff.interface.terminal import tell

EXAMPLES = examples(
    "minidiff evaluate --model my-model/model --output found.json",
    "minidiff evaluate --model my-model/turbo --steps 1 --beside my-model/model",
    "minidiff evaluate -n 100 --rows one --guidance-scale 3 --seed 5",
)
WHAT, HOW = Group("What is measured"), Group("How to draw")


def evaluate(
    model: Annotated[str, WHO(f"{MODEL}.")] = "tiny",
    n: Annotated[int, WHAT("Prompts in each row.", "-n", "--n")] = 500,
    rows: Annotated[
        str, WHAT("Rows whose name holds this word: thing, trained, …; or all.")
    ] = "all",
    judge: Annotated[
        Path | None, WHAT("Folder of a judge.", usual="the shipped one")
    ] = None,
    prompts: Annotated[
        Path | None,
        WHAT("Free prompts, JSON lines, instead of rows (see the page on training)."),
    ] = None,
    inception: Annotated[
        Path | None,
        WHAT("Inception-v3's weights, safetensors: distances are then FID."),
    ] = None,
    data: Annotated[
        Path | None,
        WHAT("Folder of Fashion-MNIST's parquet files.", usual="$MINIDIFF_DATA"),
    ] = None,
    beside: Annotated[
        str | None, WHAT("Another model, of which diversity is a share.")
    ] = None,
    steps: Annotated[
        int | None, HOW("Denoising steps.", usual="the model's own")
    ] = None,
    guidance_scale: Annotated[
        float | None, HOW("How closely to follow a prompt.", usual="the model's own")
    ] = None,
    seed: Annotated[int, HOW("Choose a guidance with another.")] = 2,
    device: Device = None,
    output: Annotated[Path | None, OUT("JSON file to write as well.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure how well a model that draws scenes follows its prompts."""
    from minidiff.files.disk import reserved, write_json

    given = locals()
    with reserved(output, overwrite) if output else nullcontext():
        from minidiff.judging import evaluation

        asked = fields_of(evaluation.Evaluation, given)
        asked["device"] = find_device(device)
        result = evaluation.Evaluation(**asked).measure(tell)
        if output:
            write_json(output, result)
    print(evaluation.table(result))
