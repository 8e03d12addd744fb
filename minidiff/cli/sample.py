"""``minidiff sample``: pictures of prompts."""

from pathlib import Path
from typing import Annotated

import typer

from minidiff.cli.options import (
    MODEL,
    OUT,
    WHO,
    Device,
    Dtype,
    Group,
    Overwrite,
    examples,
    find_device,
)
from minidiff.interface.options import fields_of
from minidiff.interface.terminal import status

EXAMPLES = examples(
    'minidiff sample "a red dress on a blue background" --num-images 4',
    'minidiff sample "a lighthouse" --model sd3.5-large --memory 12GB --seed 7',
)
WHAT, SIZE = Group("What to draw"), Group("How many, how large")
START, HOW = Group("From a picture"), Group("How to draw")
STEER, ROOM, SPEED = Group("By a sketch"), Group("Memory"), Group("Speed")
OWN, PROMPT = "the model's own", "the prompt"
IMAGE, SKETCH = (
    "image, the picture to begin from",
    "control_image, the picture it reads",
)


def sample(
    prompt: Annotated[
        str | None, typer.Argument(help="What the picture shows.")
    ] = None,
    prompts: Annotated[Path | None, WHAT("A prompt on each line of a file.")] = None,
    negative_prompt: Annotated[str, WHAT("What to steer away from.")] = "",
    prompt_2: Annotated[str | None, WHAT("What CLIP-G reads.", usual=PROMPT)] = None,
    prompt_3: Annotated[str | None, WHAT("What T5 reads.", usual=PROMPT)] = None,
    negative_prompt_2: Annotated[str | None, WHAT("The same, to avoid.")] = None,
    negative_prompt_3: Annotated[str | None, WHAT("The same, to avoid.")] = None,
    num_images: Annotated[int, SIZE("Pictures of each prompt.")] = 1,
    seed: Annotated[int, SIZE("Picture i starts from seed + i.")] = 0,
    height: Annotated[int | None, SIZE("Pixels.", usual=OWN)] = None,
    width: Annotated[int | None, SIZE("Pixels.", usual=OWN)] = None,
    batch_size: Annotated[
        int | None, SIZE("Prompts drawn at once.", usual="1", needs="prompts")
    ] = None,
    num_inference_steps: Annotated[
        int | None, HOW("Denoising steps.", "--steps", usual=OWN)
    ] = None,
    guidance_scale: Annotated[
        float | None,
        HOW("How closely to follow the prompt; 1 or less: no guidance.", usual=OWN),
    ] = None,
    sampler: Annotated[str, HOW("euler, heun or dpmpp_2m.")] = "euler",
    skip_layers: Annotated[
        str | None, HOW("Skip Layer Guidance: 7,8,9 for Medium.")
    ] = None,
    skip_layer_scale: Annotated[
        float | None, HOW("Its strength.", usual="2.8", needs="skip_layers")
    ] = None,
    image: Annotated[
        Path | None,
        START("Picture to begin from; what is transparent in it lies on white."),
    ] = None,
    strength: Annotated[
        float | None,
        START("How much of it may change, above 0 to 1.", usual="0.6", needs=IMAGE),
    ] = None,
    mask_image: Annotated[
        Path | None,
        START("White where to draw, black where to keep.", "--mask", needs=IMAGE),
    ] = None,
    control: Annotated[
        Path | None,
        STEER("ControlNet: tiny-edges, a folder, or an official file.", needs=SKETCH),
    ] = None,
    control_image: Annotated[
        Path | None, STEER("What it reads, as it is: edges, depth, …", needs="control")
    ] = None,
    control_strength: Annotated[
        float | None, STEER("How strongly.", usual="1", needs="control")
    ] = None,
    control_start: Annotated[
        float | None,
        STEER("From this share of the steps on.", usual="0", needs="control"),
    ] = None,
    control_end: Annotated[
        float | None,
        STEER("Up to this share of the steps.", usual="1", needs="control"),
    ] = None,
    model: Annotated[str, WHO(f"{MODEL} or an official single file.")] = "tiny",
    text_encoders: Annotated[
        Path | None, WHO("Folder of them, for a single file.")
    ] = None,
    lora: Annotated[
        list[Path] | None,
        WHO("LoRA, any common trainer's file, or its folder.", metavar="<path>"),
    ] = None,
    lora_scale: Annotated[
        float | None, WHO("Its strength.", usual="1", needs="lora")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    memory: Annotated[
        str | None, ROOM("8GB, 12GB, 16GB, 24GB, …: a plan that fits.")
    ] = None,
    t5: Annotated[str | None, ROOM("resident, streamed, or none: left out.")] = None,
    clip: Annotated[str | None, ROOM("resident or streamed.")] = None,
    modulation: Annotated[
        str | None, ROOM("AdaLN's layers: resident or streamed.")
    ] = None,
    fp8: Annotated[bool | None, ROOM("The blocks' matrices in 8 bits.")] = None,
    nf4: Annotated[
        bool | None, ROOM("These, and T5's, in 4 bits: another picture.")
    ] = None,
    vae_tile: Annotated[
        int | None, ROOM("Work in tiles of so many latent pixels.")
    ] = None,
    vae_slicing: Annotated[
        bool | None, ROOM("The autoencoder, one picture at a time.")
    ] = None,
    fast: Annotated[bool, SPEED("The blocks in fused passes.", "--fast")] = False,
    compile: Annotated[bool, SPEED("Compile each kind of block.", "--compile")] = False,
    output: Annotated[
        Path | None,
        OUT("PNG file; of several, NAME-0.png, NAME-1.png, …", usual="a free name"),
    ] = None,
    overwrite: Overwrite = False,
    no_sheet: Annotated[
        bool, OUT("Of several pictures, no contact sheet.", "--no-sheet")
    ] = False,
    preview: Annotated[Path | None, OUT("PNG written anew at each step.")] = None,
) -> None:
    """Draw pictures of a prompt, or of each prompt in a file.

    Their names are printed. Each keeps its settings, which minidiff info shows.
    """
    from minidiff.drawing.series import Outputs, Series

    given = locals() | {"lora": one_of(lora), "skip_layers": find_blocks(skip_layers)}
    series = Series(find_texts(prompt, prompts), **fields_of(Series, given))
    outputs = Outputs(output, len(series), overwrite, preview, not no_sheet)
    with outputs.held():
        with status(f"loading {model}"):
            series, pipe = series.begin(given | {"device": find_device(device)})
        for name in outputs.save(series.draw(pipe)):
            print(name, flush=True)


def find_texts(prompt: str | None, file: Path | None) -> list[str]:
    """The prompts: the one that is given, or those of a file."""
    from minidiff.files.disk import read_prompts

    if (prompt is None) == (file is None):
        raise ValueError("expected a prompt, or --prompts with a file, and not both")
    return read_prompts(file) if file else [str(prompt)]


def one_of(files: list[Path] | None) -> Path | None:
    """The file of --lora, if there is one; ValueError for more."""
    if files and len(files) > 1:
        raise ValueError("--lora is given more than once; expected one file")
    return files[0] if files else None


def find_blocks(numbers: str | None) -> list[int] | None:
    """ "7,8,9" → [7, 8, 9]."""
    if numbers is None:
        return None
    try:
        return [int(number) for number in numbers.split(",")]
    except ValueError:
        found = f"--skip-layers is {numbers!r}"
        raise ValueError(f"{found}; expected whole numbers: 7,8,9") from None
