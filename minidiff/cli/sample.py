"""``minidiff sample``: pictures of prompts."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from minidiff.cli.options import (
    MODEL,
    Device,
    Overwrite,
    examples,
    find_device,
    find_dtype,
    given,
    option,
    refuse,
)
from minidiff.interface.terminal import status, tell

EXAMPLES = examples(
    'minidiff sample "a red dress on a blue background" --num-images 4',
    'minidiff sample "a lighthouse" --model sd3.5-large --memory 12GB --seed 7',
)
WHAT, SIZE = "What to draw", "How many, how large"
START, HOW = "From a picture", "How to draw"
WHO, ROOM, SPEED, OUT = "Model", "Memory", "Speed", "Output"
OWN = "the model's own"


def sample(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What the picture shows.", metavar="PROMPT"),
    ] = None,
    prompts: Annotated[
        Path | None, option(WHAT, "A prompt on each line of a file.", metavar="FILE")
    ] = None,
    negative_prompt: Annotated[
        str, option(WHAT, "What to steer away from.", metavar="TEXT")
    ] = "",
    prompt_2: Annotated[
        str | None,
        option(WHAT, "What CLIP-G reads.", metavar="TEXT", usual="the prompt"),
    ] = None,
    prompt_3: Annotated[
        str | None,
        option(WHAT, "What T5 reads.", metavar="TEXT", usual="the prompt"),
    ] = None,
    negative_prompt_2: Annotated[
        str | None, option(WHAT, "The same, to steer away from.", metavar="TEXT")
    ] = None,
    negative_prompt_3: Annotated[
        str | None, option(WHAT, "The same, to steer away from.", metavar="TEXT")
    ] = None,
    num_images: Annotated[
        int, option(SIZE, "Pictures of each prompt.", metavar="N")
    ] = 1,
    seed: Annotated[
        int, option(SIZE, "Picture i starts from seed + i.", metavar="N")
    ] = 0,
    height: Annotated[
        int | None, option(SIZE, "Pixels.", metavar="N", usual=OWN)
    ] = None,
    width: Annotated[
        int | None, option(SIZE, "Pixels.", metavar="N", usual=OWN)
    ] = None,
    batch_size: Annotated[
        int | None,
        option(SIZE, "Prompts drawn at once.", metavar="N", usual="1"),
    ] = None,
    steps: Annotated[
        int | None, option(HOW, "Denoising steps.", metavar="N", usual=OWN)
    ] = None,
    guidance_scale: Annotated[
        float | None,
        option(
            HOW,
            "How closely to follow the prompt; 1 or less: no guidance.",
            metavar="X",
            usual=OWN,
        ),
    ] = None,
    sampler: Annotated[
        str, option(HOW, "euler, heun or dpmpp_2m.", metavar="NAME")
    ] = "euler",
    skip_layers: Annotated[
        str | None,
        option(HOW, "Skip Layer Guidance: 7,8,9 for Medium.", metavar="LIST"),
    ] = None,
    skip_layer_scale: Annotated[
        float | None, option(HOW, "Its strength.", metavar="X", usual="2.8")
    ] = None,
    image: Annotated[
        Path | None,
        option(
            START,
            "Picture to begin from; what is transparent in it lies on white.",
            metavar="FILE",
        ),
    ] = None,
    strength: Annotated[
        float | None,
        option(
            START,
            "How much of it may change, above 0 to 1.",
            metavar="X",
            usual="0.6",
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        option(START, "White where to draw, black where to keep.", metavar="FILE"),
    ] = None,
    model: Annotated[
        str, option(WHO, f"{MODEL} or an official single file.", metavar="NAME")
    ] = "tiny",
    text_encoders: Annotated[
        Path | None, option(WHO, "Folder of them, for a single file.", metavar="FOLDER")
    ] = None,
    lora: Annotated[
        list[Path] | None,
        option(WHO, "LoRA, a file in diffusers' keys or its folder.", metavar="FILE"),
    ] = None,
    lora_scale: Annotated[
        float | None, option(WHO, "Its strength.", metavar="X", usual="1")
    ] = None,
    device: Device = None,
    dtype: Annotated[
        str | None,
        option(
            WHO,
            "float32, bfloat16 or float16.",
            metavar="NAME",
            usual="float32 on a CPU, else bfloat16",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        option(ROOM, "8GB, 12GB, 16GB, 24GB, …: a plan that fits.", metavar="SIZE"),
    ] = None,
    t5: Annotated[
        str | None,
        option(ROOM, "resident, streamed, or none: left out.", metavar="WHERE"),
    ] = None,
    clip: Annotated[
        str | None, option(ROOM, "resident or streamed.", metavar="WHERE")
    ] = None,
    modulation: Annotated[
        str | None,
        option(ROOM, "AdaLN's layers: resident or streamed.", metavar="WHERE"),
    ] = None,
    fp8: Annotated[bool | None, option(ROOM, "The blocks' matrices in 8 bits.")] = None,
    vae_tile: Annotated[
        int | None,
        option(ROOM, "Work in tiles of so many latent pixels.", metavar="N"),
    ] = None,
    vae_slicing: Annotated[
        bool | None, option(ROOM, "The autoencoder, one picture at a time.")
    ] = None,
    fast: Annotated[
        bool, option(SPEED, "The blocks in fused passes.", "--fast")
    ] = False,
    compile: Annotated[
        bool, option(SPEED, "Compile each kind of block.", "--compile")
    ] = False,
    output: Annotated[
        Path | None,
        option(
            OUT,
            "PNG file to write; of several, NAME-0.png, NAME-1.png, …",
            metavar="FILE",
            usual="a free name",
        ),
    ] = None,
    overwrite: Overwrite = False,
    no_sheet: Annotated[
        bool, option(OUT, "Of several pictures, no contact sheet.", "--no-sheet")
    ] = False,
    preview: Annotated[
        Path | None, option(OUT, "PNG written anew at each step.", metavar="FILE")
    ] = None,
) -> None:
    """Draw pictures of a prompt, or of each prompt in a file.

    Their names are printed. Each keeps its settings, which minidiff info shows.
    """
    from minidiff.drawing.series import Outputs, Series, check_preview
    from minidiff.files.reading import read_prompts

    if (prompt is None) == (prompts is None):
        raise ValueError("expected a prompt, or --prompts with a file, and not both")
    refuse("--prompts", prompts, batch_size=batch_size)
    refuse("--lora", lora, lora_scale=lora_scale)
    refuse("--skip-layers", skip_layers, skip_layer_scale=skip_layer_scale)
    refuse("--image, the picture to begin from", image, mask=mask, strength=strength)
    texts = read_prompts(prompts) if prompts else [str(prompt)]
    series = Series(texts, num_images, batch_size, seed)
    outputs = Outputs(output, len(series), overwrite)
    check_preview(preview, outputs)
    plan = chosen(memory=memory, t5=t5, clip=clip, modulation=modulation, fp8=fp8)
    plan |= chosen(vae_tile=vae_tile, vae_slicing=vae_slicing)
    with outputs.held():
        with status(f"loading {model}"):
            from minidiff.drawing.job import Job
            from minidiff.files.words import seen, warning
            from minidiff.interface.request import Request

            request = Request(
                "",
                prompt_2=prompt_2,
                prompt_3=prompt_3,
                negative_prompt=negative_prompt,
                negative_prompt_2=negative_prompt_2,
                negative_prompt_3=negative_prompt_3,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                sampler=sampler,
                height=height,
                width=width,
                callback_on_step_end=followed_by(preview),
            )
            start = begun_from(image, given(strength, 0.6), mask)
            series = replace(series, request=request, start=start)
            added = one_of(lora), given(lora_scale, 1.0), compile
            skipped = find_blocks(skip_layers), given(skip_layer_scale, 2.8)
            job = Job(series, *added, *skipped)
            target = find_device(device), find_dtype(dtype)
            pipe = job.load(model, text_encoders, target, plan, fast, compile)
        if line := warning(texts, seen(model)):
            tell(line)
        for name in outputs.save(job.draw(pipe), not no_sheet):
            print(name, flush=True)


def chosen(**settings: Any) -> dict[str, Any]:
    """The settings that are not None."""
    return {name: value for name, value in settings.items() if value is not None}


def one_of(files: list[Path] | None) -> Path | None:
    """The file of --lora, if there is one; ValueError for more."""
    if files and len(files) > 1:
        raise ValueError("--lora is given more than once; expected one file")
    return files[0] if files else None


def find_blocks(numbers: str | None) -> list[int]:
    """ "7,8,9" → [7, 8, 9]."""
    try:
        return [int(number) for number in (numbers or "").split(",") if numbers]
    except ValueError:
        found = f"--skip-layers is {numbers!r}"
        raise ValueError(f"{found}; expected whole numbers: 7,8,9") from None


def begun_from(image: Path | None, strength: float, mask: Path | None) -> Any:
    """The picture to begin from with its mask, opened, if there is one."""
    if not image:
        return None
    from minidiff.drawing.image_to_image import Start

    return Start(image, strength, mask)


def followed_by(preview: Path | None) -> Any:
    """The callback that writes previews into a file, if there is one."""
    if not preview:
        return None
    from minidiff.drawing.previews import write_previews

    return write_previews(preview)
