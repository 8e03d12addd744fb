"""The command line: ``sample``, ``train``, ``download``, ``info``, ``evaluate``.

Commands import what they need when they run, so that ``--help`` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Stable Diffusion 3.5 from scratch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
MODEL = "tiny, sd3.5-medium, sd3.5-large, sd3.5-large-turbo, a hub id, or a folder"
Model = Annotated[str, typer.Option(help=f"{MODEL}.")]


def main() -> None:
    """Run a command; a bad input is one line on stderr and exit status 2."""
    try:
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        fail("interrupted", 130)
    except (ValueError, OSError) as error:
        fail(error)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        fail(error.format_message())  # of the option parser
    sys.exit(code if isinstance(code, int) else 0)


def fail(message: object, code: int = 2) -> None:
    """Print one line and leave."""
    print("minidiff:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(code)


# Pictures


@app.command()
def sample(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    model: Model = "tiny",
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 1 or less is none.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Picture i starts from seed + i.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="File to write; by default a free name.")
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="What to steer away from.")] = "",
    num_images: Annotated[int, typer.Option(help="How many pictures.")] = 1,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    sampler: Annotated[str, typer.Option(help="euler, heun or dpmpp_2m.")] = "euler",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, mps; by default a GPU if there is one."),
    ] = None,
) -> None:
    """Draw pictures of a prompt."""
    files = output_files(output, num_images, overwrite)
    from minidiff.sampling import load

    pipe = load(model, find_device(device))
    pictures = pipe(
        prompt,
        negative_prompt=negative_prompt,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        num_images_per_prompt=num_images,
        seed=seed,
        sampler=sampler,
    )
    for file, picture in zip(files, pictures, strict=True):
        with file.open("wb" if overwrite else "xb") as stream:
            picture.save(stream, "PNG")
        print(file)


def output_files(output: Path | None, count: int, overwrite: bool) -> list[Path]:
    """The ``count`` files to write; ValueError or OSError if one cannot be.

    Without ``output`` the first free picture.png, picture-1.png, … are taken.
    """
    if count < 1:
        raise ValueError(f"--num-images is {count}; expected at least 1")
    if output is None:
        names = (f"picture{f'-{i}' if i else ''}.png" for i in range(10**6))
        free = (Path(name) for name in names if not Path(name).exists())
        files = [next(free) for _ in range(count)]
    elif output.suffix.lower() != ".png":
        raise ValueError(f"--output is {output}; expected a name that ends in .png")
    elif count == 1:
        files = [output]
    else:
        files = [output.with_stem(f"{output.stem}-{i}") for i in range(count)]
    for file in files:
        check_writable(file, overwrite)
    return files


def check_writable(file: Path, overwrite: bool) -> None:
    """Raise ValueError or OSError unless ``file`` can be created (or replaced)."""
    import tempfile

    if file.is_dir():
        raise ValueError(f"{file} is a folder; expected a file name")
    if file.exists() and not overwrite:
        raise ValueError(f"{file} exists; expected a free name, or --overwrite")
    if not file.parent.is_dir():
        raise ValueError(f"{file} cannot be written: {file.parent} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{file} cannot be written: {reason}") from None


def find_device(name: str | None) -> str:
    """A device that exists: the one named, or a GPU if there is one, or the CPU."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    found = {"cpu": True, "cuda": torch.cuda.is_available()}
    found["mps"] = torch.backends.mps.is_available()
    kind = name.split(":")[0]
    if not found.get(kind):
        usable = ", ".join(kind for kind, there in found.items() if there)
        raise ValueError(f"--device is {name!r}; expected one that is here: {usable}")
    return name


# Models


@app.command()
def download(
    model: Annotated[str, typer.Argument(help="sd3.5-medium, …, or a hub id.")],
) -> None:
    """Fetch a model's files from the hub, check them and print their folder."""
    from minidiff.support import hub

    if model not in hub.REPOSITORIES and model.count("/") != 1:
        known = ", ".join(hub.REPOSITORIES)
        raise ValueError(f"model is {model!r}; expected {known} or a hub id owner/name")
    folder = hub.download(model)
    hub.verify(folder)
    print(folder)


@app.command()
def info(
    model: Annotated[str, typer.Argument(help=f"{MODEL}.")] = "tiny",
) -> None:
    """Print a model's parts, their parameters and their size in 16-bit numbers."""
    from minidiff.extras.loading import blueprint
    from minidiff.sampling import DEFAULTS, recognize
    from minidiff.support.checkpoints import count_parameters

    parts = blueprint(model)
    print(f"{'part':<16}{'parameters':>16}{'MB':>10}")
    for name, part in parts.items():
        count = count_parameters(part)
        print(f"{name:<16}{count:>16,}{2 * count / 1e6:>10,.1f}")
    total = sum(map(count_parameters, parts.values()))
    print(f"{'all':<16}{total:>16,}{2 * total / 1e6:>10,.1f}")
    config = parts["transformer"].config
    side = config.sample_size * parts["vae"].config.factor
    usual = DEFAULTS[recognize(model, config)]
    print(
        f"{side}×{side} pixels, {usual.num_inference_steps} steps, "
        f"guidance {usual.guidance_scale}"
    )


# Training


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Folder of the model and its runs.")],
    stage: Annotated[
        str,
        typer.Option(help="tokenizers, clip, t5, vae, judge, transformer, or all."),
    ] = "all",
    data: Annotated[
        Path | None, typer.Option(help="Folder of Fashion-MNIST's parquet files.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="gpu, shipped or trial; by default the device's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of the one stage named.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Of the one stage named.")
    ] = None,
    compile: Annotated[
        bool | None, typer.Option(help="By default on a GPU only.")
    ] = None,
    from_model: Annotated[
        str | None,
        typer.Option("--from", help="Fine-tune this model on the pictures in --data."),
    ] = None,
    lora: Annotated[
        bool, typer.Option(help="Fine-tune small corrections only.")
    ] = False,
    rank: Annotated[int, typer.Option(help="Of the corrections.")] = 8,
    alpha: Annotated[
        float | None, typer.Option(help="Their strength; by default the rank.")
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Layers to correct: to_q,to_k,…")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Of fine-tuning.")] = 1e-4,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, mps; by default a GPU if there is one."),
    ] = None,
) -> None:
    """Train the tiny model, stage by stage; run it again to go on after a stop.

    With --from, fine-tune a model on a folder of pictures, each with its caption in a
    .txt beside it or in metadata.jsonl.
    """
    device = find_device(device)
    if from_model:
        from minidiff.extras import finetune

        chosen = (rank, alpha, targets) if lora else None
        size = (steps or 500, batch_size or 1, learning_rate)
        print(finetune.train(from_model, data, output, size, chosen, device, compile))
        return
    from minidiff.extras import stages

    stages.train(stage, output, data, device, recipe, steps, batch_size, compile)


# Measurements


@app.command()
def evaluate(
    model: Model = "tiny",
    n: Annotated[int, typer.Option("-n", "--n", help="Prompts in each row.")] = 500,
    guidance_scale: Annotated[
        float | None, typer.Option(help="The model's own by default.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 28,
    garments: Annotated[str, typer.Option(help="one, two, or all rows.")] = "all",
    seed: Annotated[int, typer.Option(help="Choose guidance with another.")] = 2,
    judge: Annotated[
        Path | None, typer.Option(help="Folder of a judge; by default the shipped one.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of Fashion-MNIST's parquet files.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file to write as well.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, mps; by default a GPU if there is one."),
    ] = None,
) -> None:
    """Measure how well a model that draws scenes follows its prompts."""
    if output:
        check_writable(output, overwrite)
    from minidiff.support import metrics
    from minidiff.support.judge import JUDGE, load_judge

    rows = metrics.choose_rows(garments)
    reader = load_judge(judge or JUDGE, find_device(device))
    import torch

    from minidiff.attention import record_attention
    from minidiff.sampling import load

    pipe = load(model, find_device(device), torch.float32)
    pipe.progress = False
    result = metrics.evaluate(
        pipe, reader, n, guidance_scale, steps, data, seed, rows=rows, log=log
    )
    found = metrics.attention_correlation(pipe, record_attention, folder=data)
    result |= {"model": model, "attention": found}
    print(metrics.format_table(result))
    if output:
        metrics.write_json(result, output)


def log(line: str) -> None:
    """Tell the user how far it has come, on stderr."""
    print(line, file=sys.stderr, flush=True)
