"""The command line: ``sample``, ``train``, ``download``, ``info``, ``evaluate``.

Commands import what they need when they run, so that ``--help`` answers at once.
"""

import functools
import sys
import warnings
from contextlib import redirect_stdout
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minidiff.interface.terminal import is_refused_memory, printable, tell

if TYPE_CHECKING:
    import torch

    from minidiff.sampling import Pipeline

app = typer.Typer(
    help="Stable Diffusion 3.5 from scratch.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
MODEL = "tiny, sd3.5-medium, sd3.5-large, sd3.5-large-turbo, a hub id, a folder"
Model = Annotated[str, typer.Option(help=f"{MODEL}, or an official single file.")]
DEVICE = "cpu, cuda, mps; by default cuda if there is one, else cpu."
Device = Annotated[str | None, typer.Option(help=DEVICE)]
DATA = "Folder of Fashion-MNIST's parquet files."
Data = Annotated[Path | None, typer.Option(help=DATA)]
Overwrite = Annotated[bool, typer.Option(help="Replace an existing file.")]
INTERRUPTED = 130  # 128 and SIGINT's number, as shells count


def main() -> None:
    """Run a command; a bad input is one line on stderr and exit status 2."""
    warnings.showwarning = lambda message, *_: tell(f"minidiff: {one_line(message)}")
    if hasattr(sys.stdout, "reconfigure"):  # for names that are no text
        windows = sys.platform == "win32"
        sys.stdout.reconfigure(errors="replace" if windows else "surrogateescape")
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except OSError as error:
        named = error.filename and error.strerror
        fail(f"{error.filename}: {error.strerror}" if named else error)
    except ValueError as error:
        fail(error)
    except Exception as error:
        fail(explain(error))
    if code == INTERRUPTED:  # typer, too, returns this
        fail("interrupted", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def explain(error: Exception) -> str:
    """What to tell of the option parser's errors and some of torch's; raises others."""
    if hasattr(error, "format_message"):  # the option parser's
        return error.format_message()
    less = "fewer or smaller pictures at once, or a smaller batch, need less"
    if type(error).__name__ == "OutOfMemoryError":  # of a GPU
        return f"{str(error).split('. ')[0]}; {less} (sample has --memory)"
    if isinstance(error, MemoryError) or is_refused_memory(error):
        return f"this machine's memory is full; {less}"
    found = f"{type(error).__name__} {error}"
    if "InvalidCxxCompiler" in found or "Compiler: cl is not found" in found:
        return "--compile needs a C++ compiler; expected g++, clang++ or cl in PATH"
    if "Failed to find C compiler" in found:  # Triton's, at its first kernel
        return "kernels for a GPU need a C compiler; expected gcc or clang in PATH"
    if "TritonMissing" in found:
        return "--compile needs Triton on a GPU; expected a PyTorch that comes with it"
    raise error


def fail(message: object, code: int = 2) -> None:
    """Print one line and leave."""
    tell(f"minidiff: {one_line(message)}")
    sys.exit(code)


def one_line(message: object) -> str:
    """``message`` with a space for each of its white spaces."""
    return " ".join(str(message).split())


# Pictures


@app.command()
def sample(
    prompt: Annotated[
        str | None, typer.Argument(help="What the picture shows.")
    ] = None,
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
    prompt_2: Annotated[
        str | None, typer.Option(help="What CLIP-G reads instead.")
    ] = None,
    prompt_3: Annotated[str | None, typer.Option(help="What T5 reads instead.")] = None,
    negative_prompt_2: Annotated[
        str | None, typer.Option(help="The same, to steer away from.")
    ] = None,
    negative_prompt_3: Annotated[
        str | None, typer.Option(help="The same, to steer away from.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File with a prompt on each line.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Prompts drawn at once; by default 1.")
    ] = None,
    num_images: Annotated[int, typer.Option(help="How many pictures of each.")] = 1,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    sampler: Annotated[str, typer.Option(help="euler, heun or dpmpp_2m.")] = "euler",
    image: Annotated[
        Path | None, typer.Option(help="Picture to begin from (image to image).")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="How much of it may change, above 0 to 1; by default 0.6."),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="White where to draw, black where to keep.")
    ] = None,
    skip_layers: Annotated[
        str | None,
        typer.Option(help="Skip Layer Guidance; 7,8,9 for SD3.5 Medium."),
    ] = None,
    skip_layer_scale: Annotated[
        float | None, typer.Option(help="Its strength; by default 2.8.")
    ] = None,
    lora: Annotated[
        list[Path] | None, typer.Option(help="Local LoRA file, in diffusers' keys.")
    ] = None,
    lora_scale: Annotated[
        float | None, typer.Option(help="Its strength; by default 1.")
    ] = None,
    preview: Annotated[
        Path | None, typer.Option(help="PNG written anew at each step.")
    ] = None,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16; bfloat16 on a GPU by default."),
    ] = None,
    text_encoders: Annotated[
        Path | None, typer.Option(help="Folder of them, for a single file.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="8GB, 12GB, 16GB, 24GB: a plan that fits.")
    ] = None,
    t5: Annotated[
        str | None, typer.Option(help="resident, streamed, or none: left out.")
    ] = None,
    clip: Annotated[str | None, typer.Option(help="resident or streamed.")] = None,
    modulation: Annotated[
        str | None, typer.Option(help="resident or streamed: AdaLN's layers.")
    ] = None,
    fp8: Annotated[
        bool | None, typer.Option(help="Store the blocks' matrices in 8 bits.")
    ] = None,
    vae_tile: Annotated[
        int | None, typer.Option(help="Work in tiles of so many latent pixels.")
    ] = None,
    vae_slicing: Annotated[
        bool | None, typer.Option(help="The autoencoder, one picture at a time.")
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="The blocks in fused passes.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile each kind of block.")
    ] = False,
) -> None:
    """Draw pictures of a prompt, or of each prompt in a file."""
    from minidiff.engine.rehearsal import rehearse
    from minidiff.files.pictures import save_picture
    from minidiff.files.reading import read_prompts
    from minidiff.interface.checks import check_range

    if (prompt is None) == (prompts is None):
        raise ValueError("expected a prompt, or --prompts with a file, and not both")
    if not prompts:
        refuse("--prompts", batch_size=batch_size)
    if not lora:
        refuse("--lora", lora_scale=lora_scale)
    if not skip_layers:
        refuse("--skip-layers", skip_layer_scale=skip_layer_scale)
    batch_size = 1 if batch_size is None else batch_size
    check_range("--num-images", num_images, 1)
    check_range("--batch-size", batch_size, 1)
    texts = [prompt] if prompts is None else read_prompts(prompts)
    names = output_files(output, len(texts) * num_images, overwrite)
    if preview:
        check_png("--preview", preview)
        check_writable(preview, overwrite)
        if preview.resolve() in {name.resolve() for name in names}:
            raise ValueError(f"--preview is {preview}, which a picture will be called")
    blocks = parse_blocks(skip_layers)
    start = open_start(image, mask, strength)
    if lora:
        check_lora(lora)

    plan = {"memory": memory, "t5": t5, "clip": clip, "modulation": modulation}
    plan |= {"fp8": fp8, "vae_tile": vae_tile, "vae_slicing": vae_slicing}
    plan = {name: value for name, value in plan.items() if value is not None}
    call = {
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
        "num_images_per_prompt": num_images,
    }

    def perform(pipe: "Pipeline") -> None:
        if lora:
            from minidiff.lora import load_lora

            scale = 1.0 if lora_scale is None else lora_scale
            load_lora(pipe, lora[0], scale, fused=compile)  # else exact: no rounding
        follow = {"callback_on_step_end": preview_into(preview)} if preview else {}
        if blocks:
            follow |= skipping(pipe, guidance_scale, blocks, skip_layer_scale)
        for i in range(0, len(texts), batch_size):
            first, part = i * num_images, texts[i : i + batch_size]
            options = start | call | follow
            pictures = draw(pipe, part, seed=seed + first, **options)
            for name, picture in zip(names[first:], pictures, strict=False):
                if output is None and name.exists():  # since this run began
                    name = output_files(None, 1, overwrite)[0]
                save_picture(picture, name, overwrite)
                print(name, flush=True)

    target = find_device(device), parse_dtype(dtype)
    from minidiff.engine.loading import load

    with redirect_stdout(sys.stderr):  # stdout is for the names
        fits = rehearse(perform, model, *target, text_encoders, **plan)
        how = {"text_encoders": text_encoders, "fast": fast, "compile": compile}
        pipe = load(model, *target, memory=fits, **how)
    del pipe.settings["memory"]
    pipe.settings |= plan  # as it was asked for
    perform(pipe)


def parse_dtype(name: str | None) -> "torch.dtype | None":
    """torch's number of that name."""
    import torch

    known = ("float32", "bfloat16", "float16")
    if name not in (None, *known):
        raise ValueError(f"--dtype is {name!r}; expected one of {', '.join(known)}")
    return name and getattr(torch, name)


def draw(pipe: "Pipeline", prompts: list[str], **call: Any) -> list:
    """Pictures of the prompts, begun from a picture where ``call`` has an image."""
    if "image" not in call:
        return pipe(prompts, **call)
    from minidiff.drawing.image_to_image import image_to_image

    return image_to_image(pipe, prompts, **call)


def open_start(image: Path | None, mask: Path | None, strength: float | None) -> dict:
    """The picture to begin from with its mask, opened; empty without one."""
    if not image:
        refuse("--image, the picture to begin from", mask=mask, strength=strength)
        return {}
    from minidiff.drawing.image_to_image import open_file

    opened = {"image": open_file(image), "mask_image": open_file(mask)}
    return opened | ({} if strength is None else {"strength": strength})


def check_lora(files: list[Path]) -> None:
    """Raise ValueError or OSError, before a model is read, for what cannot be used."""
    from minidiff.files.weights import read_header
    from minidiff.lora import lora_file

    file, *others = files
    if others:
        raise ValueError("--lora is given more than once; expected one file")
    read_header(lora_file(file))


def parse_blocks(numbers: str | None) -> list[int]:
    """ "7,8,9" → [7, 8, 9]."""
    try:
        return [int(number) for number in (numbers or "").split(",") if numbers]
    except ValueError:
        found = f"--skip-layers is {numbers!r}"
        raise ValueError(f"{found}; expected whole numbers: 7,8,9") from None


def skipping(
    pipe: "Pipeline", guidance_scale: float | None, blocks: list[int], scale: Any
) -> dict[str, Any]:
    """The arguments with which ``pipe`` draws with Skip Layer Guidance."""
    from minidiff.drawing.guidance import SkipLayer

    strength = () if scale is None else (scale,)
    guidance = SkipLayer(pipe.guidance(guidance_scale), tuple(blocks), *strength)
    return {"guidance": guidance, "guidance_scale": None}


def preview_into(file: Path) -> Any:
    """A callback that writes each step's first estimate, enlarged, into ``file``."""
    from minidiff.drawing.previews import fit_preview
    from minidiff.files.pictures import to_pil
    from minidiff.files.writing import replacing

    fit = functools.cache(fit_preview)

    def follow(
        pipe: "Pipeline", step: int, timestep: Any, tensors: dict[str, Any]
    ) -> None:
        small = to_pil(fit(pipe.vae)(tensors["denoised"][:1]))[0]
        side = pipe.vae.config.factor
        large = small.resize((small.width * side, small.height * side), resample=0)
        try:
            with replacing(file) as part:  # a viewer never sees half of it
                large.save(part, "PNG")
        except OSError as error:  # on Windows, say, a viewer has it open
            tell(f"no preview of this step: {error}")

    return follow


def check_png(option: str, file: Path) -> None:
    """Raise ValueError unless ``file`` is named as what is written."""
    if file.suffix.lower() != ".png":
        raise ValueError(f"{option} is {file}; expected a name that ends in .png")


def output_files(output: Path | None, pictures: int, overwrite: bool) -> list[Path]:
    """The file of each of ``pictures``; ValueError if one cannot be written.

    Without ``output`` the first free picture.png, picture-1.png, … are taken.
    """
    if output:
        check_png("--output", output)
    if output is None:
        names = (f"picture{f'-{i}' if i else ''}.png" for i in count())
        free = (Path(name) for name in names if not Path(name).exists())
        files = list(islice(free, pictures))
    elif pictures == 1:
        files = [output]
    else:
        files = [output.with_stem(f"{output.stem}-{i}") for i in range(pictures)]
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
    kind, _, number = name.partition(":")
    if not found.get(kind) or not (number or "0").isdecimal():
        usable = ", ".join(kind for kind, there in found.items() if there)
        raise ValueError(f"--device is {name!r}; expected one that is here: {usable}")
    if kind == "cuda" and int(number or 0) >= (cards := torch.cuda.device_count()):
        last = f"cuda:{cards - 1}"
        raise ValueError(f"--device is {name!r}; expected cuda:0 to {last}")
    return "cpu" if kind == "cpu" else name


# Models


@app.command()
def download(
    model: Annotated[str, typer.Argument(help="sd3.5-medium, …, or a hub id.")],
    without_t5: Annotated[
        bool, typer.Option("--without-t5", help="For sample --t5 none.")
    ] = False,
) -> None:
    """Fetch a model's files from the hub, check them and print their folder."""
    from minidiff.files import hub
    from minidiff.files.published import ON_HUB

    if model not in ON_HUB and model.count("/") != 1:
        known = ", ".join(ON_HUB)
        raise ValueError(f"model is {model!r}; expected {known} or a hub id owner/name")
    print(hub.download(model, not without_t5, check_all=True))


@app.command()
def info(
    model: Annotated[
        str, typer.Argument(help=f"{MODEL}; or a picture, for its settings.")
    ] = "tiny",
) -> None:
    """Print a model's parts, their parameters and their size in 16-bit numbers.

    Of a picture that sample has drawn, print the settings.
    """
    name = model.lower()
    is_file = Path(model).is_file() and not name.endswith(".safetensors")
    if is_file or name.endswith(".png"):
        from minidiff.files.pictures import read_settings

        for name, value in read_settings(model).items():
            print(f"{printable(name)}: {printable(value)}")
        return
    from minidiff.engine.loading import blueprint, known_as
    from minidiff.files.weights import count_parameters
    from minidiff.sampling import DEFAULTS, recognize

    parts = blueprint(model)
    print(f"{'part':<16}{'parameters':>16}{'MB':>10}")
    for name, part in parts.items():
        size = count_parameters(part)
        print(f"{name:<16}{size:>16,}{2 * size / 1e6:>10,.1f}")
    total = sum(map(count_parameters, parts.values()))
    print(f"{'all':<16}{total:>16,}{2 * total / 1e6:>10,.1f}")
    config = parts["transformer"].config
    side = config.sample_size * parts["vae"].config.factor
    usual = DEFAULTS[recognize(known_as(model), config)]
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
        Path | None, typer.Option(help=f"{DATA[:-1]}; with --from your pictures.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="gpu, shipped, longer, further, muon, details, trial, or a JSON file."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of the one stage named.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Of the one stage named.")
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            help="By default as a JSON recipe says, or on a GPU (with --from not)."
        ),
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="Model to go on from: tiny, or its folder.")
    ] = None,
    scenes: Annotated[
        str | None,
        typer.Option(
            help="composed, plain (grey garments, captioned by class), or a folder of "
            "pictures with captions."
        ),
    ] = None,
    from_model: Annotated[
        str | None,
        typer.Option("--from", help="Fine-tune this model on the pictures in --data."),
    ] = None,
    lora: Annotated[bool, typer.Option(help="Train a LoRA, not all weights.")] = False,
    rank: Annotated[int | None, typer.Option(help="Of the LoRA; by default 8.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Its strength; by default the rank.")
    ] = None,
    targets: Annotated[str | None, typer.Option(help="Its layers: to_q,to_k,…")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of fine-tuning; by default 1e-4.")
    ] = None,
    recompute: Annotated[
        bool, typer.Option(help="Less memory for the transformer, a third slower.")
    ] = False,
    crop: Annotated[
        bool, typer.Option(help="Of your pictures the middle, or all of it squeezed.")
    ] = True,
    seed: Annotated[
        int | None, typer.Option(help="Of scenes, order and noise; by default 0.")
    ] = None,
    device: Device = None,
) -> None:
    """Train the tiny model, stage by stage; run it again to go on after a stop.

    With --from, fine-tune a model on a folder of pictures, each with its caption in a
    .txt beside it or in metadata.jsonl.

    A JSON file as --recipe changes some of "shipped", for example
    {"vae": {"steps": 5000}, "latents": 4096}. Of clip, t5, vae, judge and transformer:
    steps, batch_size, learning_rate, warmup_steps, weight_decay, beta2, max_grad_norm,
    ema_decay, muon, accumulation, bfloat16, compile, sharded, log_every, save_every,
    validate_every. Of all: pictures, latents, captions, held, two_garments,
    uniform_levels, keep_latents, hold_latents, shift, scenes. Muon is for vae and
    transformer.
    """
    device = find_device(device)
    if not lora:
        refuse("--lora", rank=rank, alpha=alpha, targets=targets)
    if from_model is None:
        refuse("--from", lora=lora or None, learning_rate=learning_rate)
        from minidiff.recipes.train import TrainOptions, train_stages

        options = TrainOptions(
            output=output,
            stage=stage,
            data=data,
            device=device,
            recipe=recipe,
            steps=steps,
            batch_size=batch_size,
            compile=compile,
            start=start,
            scenes=scenes,
            recompute=recompute,
            crop=crop,
            seed=seed or 0,
        )
        train_stages(options)
        return
    if recipe or start or scenes or stage != "all" or seed is not None:
        found = "--from has no stages, recipe, start, scenes or seed"
        raise ValueError(f"{found}; its pictures are --data")
    if data is None:
        raise ValueError("--from needs --data: a folder of pictures with captions")
    from minidiff.learning import parallel
    from minidiff.recipes import finetune

    rank = 8 if rank is None else rank
    tuning = finetune.FinetuneOptions(
        model=from_model,
        pictures=data,
        output=output,
        steps=500 if steps is None else steps,
        batch_size=1 if batch_size is None else batch_size,
        learning_rate=1e-4 if learning_rate is None else learning_rate,
        lora=finetune.lora_config(rank, alpha, targets) if lora else None,
        device=device,
        compile=bool(compile),
        recompute=recompute,
        crop=crop,
    )
    made = finetune.finetune_pictures(tuning)
    if parallel.rank() == 0:
        print(made)


def refuse(needed: str, **options: Any) -> None:
    """Raise ValueError where one of ``options`` is set, but not what it belongs to."""
    for name, value in options.items():
        if value is not None:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is {value}, which needs {needed}")


# Measurements


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help=f"{MODEL}.")] = "tiny",
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
    inception: Annotated[
        Path | None,
        typer.Option(
            help="Inception-v3's weights, safetensors: distances are then FID."
        ),
    ] = None,
    data: Data = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file to write as well.")
    ] = None,
    overwrite: Overwrite = False,
    device: Device = None,
) -> None:
    """Measure how well a model that draws scenes follows its prompts."""
    if output:
        check_writable(output, overwrite)
    from minidiff.engine.loading import blueprint
    from minidiff.files.writing import write_json
    from minidiff.interface import checks
    from minidiff.judging import metrics
    from minidiff.judging.inception import load_inception
    from minidiff.judging.judge import JUDGE, load_judge

    checks.check_range("--seed", seed, 0)
    checks.check_range("-n", n, 2)
    checks.check_range("--steps", steps, 1, 1000)
    checks.guidance(guidance_scale, 1.0)
    if garments != "all":
        refuse("--garments all", inception=inception)
    rows = metrics.choose_rows(garments)
    parts = blueprint(model)
    metrics.check_side(parts["transformer"], parts["vae"])
    device = find_device(device)
    reader = load_judge(judge or JUDGE, device)
    extractor = load_inception(inception, device) if inception else None
    import torch

    from minidiff.attention import record_attention
    from minidiff.engine.loading import load

    cpu = device == "cpu"  # its caches hold few pictures at a time
    pipe = load(model, device, torch.float32, fast=cpu)
    pipe.progress = False
    batch = 20 if cpu else 500
    result = metrics.evaluate(
        pipe, reader, n, guidance_scale, steps, data, seed, batch, rows, tell, extractor
    )
    found = metrics.attention_correlation(pipe, record_attention, folder=data)
    result |= {"model": model, "attention": found}
    if output:
        write_json(output, result)
    print(metrics.format_table(result))
