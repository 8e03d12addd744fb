"""``minidiff sample``: pictures of prompts."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    import torch

    from minidiff.drawing.image_to_image import Start
    from minidiff.drawing.series import Series
    from minidiff.sampling import Pipeline

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
    from minidiff.files import words
    from minidiff.files.reading import read_prompts
    from minidiff.interface.request import Request

    if (prompt is None) == (prompts is None):
        raise ValueError("expected a prompt, or --prompts with a file, and not both")
    refuse("--prompts", prompts, batch_size=batch_size)
    refuse("--lora", lora, lora_scale=lora_scale)
    refuse("--skip-layers", skip_layers, skip_layer_scale=skip_layer_scale)
    refuse("--image, the picture to begin from", image, mask=mask, strength=strength)
    call: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "prompt_2": prompt_2,
        "prompt_3": prompt_3,
        "negative_prompt_2": negative_prompt_2,
        "negative_prompt_3": negative_prompt_3,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "sampler": sampler,
        "height": height,
        "width": width,
    }
    texts = read_prompts(prompts) if prompts else [str(prompt)]
    series = Series(texts, num_images, batch_size, seed)
    outputs = Outputs(output, len(series), overwrite)
    check_preview(preview, outputs)
    plan = chosen(memory=memory, t5=t5, clip=clip, modulation=modulation, fp8=fp8)
    plan |= chosen(vae_tile=vae_tile, vae_slicing=vae_slicing)
    with outputs.held():
        with status(f"loading {model}"):
            request = Request("", **call, **followed_by(preview))
            start = begun_from(image, mask, strength)
            series = replace(series, request=request, start=start)
            blocks, file = find_blocks(skip_layers), find_lora(lora)

            def asked(pipe: "Pipeline") -> Series:
                attach(pipe, file, given(lora_scale, 1.0), fused=compile)
                return skipping(series, pipe, blocks, skip_layer_scale)

            where = find_device(device), find_dtype(dtype), text_encoders
            pipe = ready(asked, model, where, plan, fast, compile)
        if line := words.warning(texts, words.seen(model)):
            tell(line)
        for name in outputs.save(asked(pipe).draw(pipe), not no_sheet):
            print(name, flush=True)


def ready(
    asked: "Callable[[Pipeline], Series]",
    model: str,
    where: tuple[str, "torch.dtype | None", Path | None],
    plan: dict[str, Any],
    fast: bool,
    compile: bool,
) -> "Pipeline":
    """The pipeline, loaded once its first pictures are checked without weights."""
    from minidiff.engine.loading import Given, open_model
    from minidiff.engine.memory import requested
    from minidiff.interface.checks import find_target

    device, dtype, encoders = where
    wanted = requested(**plan)
    source = Given(model, encoders, t5=wanted.t5 != "none")
    with redirect_stdout(sys.stderr):  # stdout is for the names
        opened = open_model(source, *find_target(device, dtype), weights=False)
        pipe = opened.rehearsal(wanted)
        fit = opened.fit(requests=[asked(pipe).check(pipe)], **plan)
        if fit.plan != wanted:  # weights may be away that a LoRA would be added to
            asked(opened.rehearsal(fit.plan))
        return opened.load(fit, fast=fast, compile=compile, **plan)


def attach(pipe: "Pipeline", lora: Path | None, scale: float, fused: bool) -> None:
    """Apply a LoRA, if there is one; beside the weights unless ``fused``."""
    if lora:
        from minidiff.lora import load_lora

        load_lora(pipe, lora, scale, fused)


def skipping(
    series: "Series", pipe: "Pipeline", blocks: list[int], scale: float | None
) -> "Series":
    """The series with Skip Layer Guidance, where there are ``blocks``."""
    if not blocks:
        return series
    from minidiff.drawing.guidance import SkipLayer

    beneath = pipe.guidance(series.request.guidance_scale)
    guidance = SkipLayer(beneath, blocks, **chosen(scale=scale))
    request = replace(series.request, guidance=guidance, guidance_scale=None)
    return replace(series, request=request)


def chosen(**settings: Any) -> dict[str, Any]:
    """The settings that are not None."""
    return {name: value for name, value in settings.items() if value is not None}


def begun_from(
    image: Path | None, mask: Path | None, strength: float | None
) -> "Start | None":
    """The picture to begin from with its mask, opened, if there is one."""
    if not image:
        return None
    from minidiff.drawing.image_to_image import Start

    return Start(image, given(strength, 0.6), mask)


def followed_by(preview: Path | None) -> dict[str, Any]:
    """The callback that writes previews into a file; empty without one."""
    if not preview:
        return {}
    from minidiff.drawing.previews import write_previews

    return {"callback_on_step_end": write_previews(preview)}


def find_blocks(numbers: str | None) -> list[int]:
    """ "7,8,9" → [7, 8, 9]."""
    try:
        return [int(number) for number in (numbers or "").split(",") if numbers]
    except ValueError:
        found = f"--skip-layers is {numbers!r}"
        raise ValueError(f"{found}; expected whole numbers: 7,8,9") from None


def find_lora(files: list[Path] | None) -> Path | None:
    """Raise ValueError or OSError, before a model is read, for what cannot be used."""
    from minidiff.files.weights import read_header
    from minidiff.lora import lora_file

    if not files:
        return None
    if len(files) > 1:
        raise ValueError("--lora is given more than once; expected one file")
    read_header(lora_file(files[0]))
    return files[0]
