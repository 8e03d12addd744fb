"""Fine-tuning of any SD3-family model on a folder of captioned pictures.

In full, or by LoRA: then only small corrections learn, and the file that comes out is
one that diffusers loads.
"""

import functools
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.data.captioned import captions_of, read_pictures
from minidiff.engine.loading import blueprint, load
from minidiff.engine.memory import StreamedEmbedding, StreamedLinear, free_memory, weigh
from minidiff.files.pictures import from_bytes, save_sheet
from minidiff.interface.checks import check_range
from minidiff.interface.terminal import tell
from minidiff.learning import parallel, steps
from minidiff.learning.run import (
    Run,
    cached,
    check_folder,
    check_other,
    fingerprint,
    is_out_of_memory,
    lasting,
)
from minidiff.lora import ATTENTION, FILE, LowRank, add_lora, save_lora
from minidiff.recipes.features import (
    Features,
    FlowBatches,
    collect,
    encode_latents,
    shuffled,
    validation,
)
from minidiff.sampling import Pipeline
from minidiff.training import Batch, Task, TrainingConfig, fit, transformer_loss

MOST_HELD_OUT = 32  # pictures: each costs eight looks at a validation


@dataclass(frozen=True)
class LoraConfig:
    """Rank and strength of the corrections, and which layers get one."""

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = tuple(ATTENTION)


@dataclass(frozen=True)
class FinetuneOptions:
    """``minidiff train --from``: 500 steps of one picture unless told otherwise.

    Args:
        model: what ``load`` takes.
        pictures: a folder of pictures with captions.
        output: the folder of the run and of its result.
        steps, batch_size, learning_rate: how long and how fast.
        lora: the corrections that learn; None lets all weights of the transformer.
        device: "cpu", "cuda", …
        compile: the step.
        recompute: less memory for more time.
        crop: the pictures' middle, or all of them squeezed.
    """

    model: str
    pictures: Path
    output: Path
    steps: int = 500
    batch_size: int = 1
    learning_rate: float = 1e-4
    lora: LoraConfig | None = None
    device: str = "cpu"
    compile: bool = False
    recompute: bool = False
    crop: bool = True

    def config(self) -> TrainingConfig:
        """How the pictures are learned from."""
        if not 0 < self.learning_rate < math.inf:
            found = f"--learning-rate is {self.learning_rate}"
            raise ValueError(f"{found}; expected a finite number above 0")
        return TrainingConfig(
            self.steps,
            self.batch_size,
            self.learning_rate,
            warmup_steps=min(100, self.steps // 10 + 1),
            bfloat16=self.device.startswith("cuda"),
            compile=self.compile,
            save_every=100,
            validate_every=max(100, self.steps // 5),
        )


def finetune_pictures(options: FinetuneOptions) -> Path:
    """Fine-tune as ``options`` say; the file or folder that it wrote."""
    o = options
    config = o.config()
    how = {"crop": o.crop, "recompute": o.recompute}
    return finetune(o.model, o.pictures, o.output, config, o.lora, o.device, **how)


def lora_config(rank: int, alpha: float | None, names: str | None) -> LoraConfig:
    """Of --rank, --alpha and --targets; ValueError for numbers that cannot be."""
    check_range("--rank", rank, 1)
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"--alpha is {alpha}; expected a finite number above 0")
    chosen = names.split(",") if names else ATTENTION
    return LoraConfig(rank, alpha, tuple(name.strip() for name in chosen))


def finetune(
    model: Path | str,
    pictures: Path | str,
    output: Path | str,
    config: TrainingConfig,
    lora: LoraConfig | None = None,
    device: str = "cpu",
    crop: bool = True,
    drop: float = 0.1,
    seed: int = 0,
    recompute: bool = False,
) -> Path:
    """Train ``model`` on the folder ``pictures``; the file or folder it wrote.

    The last tenth of the pictures, 1 to 32, is not learned from: it says which weights
    are the best. With ``lora`` the file is ``output``/pytorch_lora_weights.safetensors,
    else ``output``/model holds a whole model. A stopped run goes on when called again.
    ``recompute`` saves memory: see ``steps.recompute``. With ``lora`` and
    ``config.bfloat16`` the model's own weights, which do not learn, are in bfloat16.
    """
    device, output = parallel.start(device), Path(output)
    captions = captions_of(Path(pictures))
    check_run(config, output)
    dtype = torch.bfloat16 if lora and config.bfloat16 else torch.float32
    side = check_model(model, lora, dtype, device)
    known = str(model) != "tiny" and Path(model).exists()  # no name of a model
    settings: dict[str, Any] = {"base": str(Path(model).resolve() if known else model)}
    settings |= {"folder": str(Path(pictures).resolve()), "lora": str(lora)}
    settings |= {"drop": drop, "seed": seed, **lasting(config)}
    with Run(output / "run", settings) as run:
        images, texts = read_pictures(Path(pictures), captions, side, crop)
        tuned = begin_tuning(model, lora, device, dtype, seed, recompute)
        pipe = tuned.pipe
        name = encoding_name(pipe, images, texts)
        began = fingerprint(*all_weights(pipe.transformer), pipe.scheduler.shift)
        run.add(encodings=name, began=began)
        path = output / "cache" / f"{name}.safetensors"
        kept = cached(path, lambda: vars(encode_pictures(pipe, images, texts)), "cpu")
        features = Features(**kept)

        def draw() -> None:
            save_samples(pipe, features, seed, output / "grids" / f"{run.step:06}.png")

        task = finetuning_task(tuned, features, config, draw, seed, drop)
        averaged = fit(task, config, run, device)
    tuned.trained.load_state_dict(averaged.state_dict())
    return output if parallel.rank() else export_tuned(model, tuned, output)


# Before anything is read


def check_run(config: TrainingConfig, output: Path) -> None:
    """Raise ValueError or OSError for a run that cannot be."""
    if config.sharded:
        raise ValueError("sharded is True; fine-tuning expects False")
    shares = config.accumulation * parallel.size()
    steps.check_batch(config.steps, config.batch_size, shares)
    check_folder(output)
    check_other(output, "run", "runs")


def check_model(
    model: Path | str, lora: LoraConfig | None, dtype: torch.dtype, device: str
) -> int:
    """The side in pixels of the pictures that ``model`` draws.

    ValueError for corrections that do not fit, and for a card that is too small.
    """
    parts: dict[str, Any] = dict(blueprint(model))
    if lora:  # a rank or names that these layers do not have
        add_lora(parts["transformer"], lora.rank, lora.alpha, lora.targets)
    check_card(parts, lora, dtype, device)
    return parts["transformer"].config.sample_size * parts["vae"].config.factor


def check_card(
    parts: Mapping[str, nn.Module],
    lora: LoraConfig | None,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Raise ValueError where the card does not even hold what learning keeps.

    That is the weights; in full also gradients, two averages of AdamW's and the average
    of the weights.
    """
    if not device.startswith("cuda"):
        return
    kept = weigh(parts["transformer"]) * (1 if lora else 5) + weigh(parts["vae"])
    need = kept * dtype.itemsize
    if need > (free := free_memory(torch.device(device), need)):
        less = "a smaller model" if lora else "--lora, or a smaller model"
        raise ValueError(
            f"weights and optimiser take {need / 1e9:.1f}GB, the card has "
            f"{free / 1e9:.1f}GB free; expected {less}"
        )


# What learns, and from what


@dataclass(frozen=True)
class Tuned:
    """A pipeline, what of it learns, and with LoRA the corrections by layer."""

    pipe: Pipeline
    trained: nn.Module
    updates: dict[str, LowRank] | None


def begin_tuning(
    model: Path | str,
    lora: LoraConfig | None,
    device: str,
    dtype: torch.dtype,
    seed: int,
    recompute: bool,
) -> Tuned:
    """Load the model, and make of it what learns."""
    cuda = device.startswith("cuda")  # the encoders visit the card while they encode
    streamed: dict[str, Any] = {"t5": "streamed", "clip": "streamed"} if cuda else {}
    with redirect_stdout(sys.stderr):  # stdout is for the result's name
        pipe = load(model, device, dtype, **streamed)
    pipe.progress = False
    trained: nn.Module = pipe.transformer
    updates = None
    torch.manual_seed(seed)
    if lora:
        updates = add_lora(pipe.transformer, lora.rank, lora.alpha, lora.targets)
        trained = nn.ModuleList(updates.values()).float()
    else:
        for parameter in trained.parameters():  # it may be a read-only memory map
            parameter.data = parameter.data.clone()
        trained.requires_grad_(True)
    if recompute:
        steps.recompute(pipe.transformer.joint_blocks)
    return Tuned(pipe, trained, updates)


def encode_pictures(pipe: Pipeline, images: Tensor, captions: list[str]) -> Features:
    """Pictures, uint8 (N, 3, H, W), and captions as ``pipe``'s encoders make them.

    All is in main memory: megabytes for each picture.
    """
    pictures = (from_bytes(x).to(pipe.device, pipe.dtype) for x in images.split(1))
    latents = encode_latents(pipe.vae, pictures, len(images), torch.empty(0))
    rows = {text: i for i, text in enumerate(dict.fromkeys(["", *captions]))}
    texts = list(rows)  # each once
    parts = (texts[i : i + 32] for i in range(0, len(texts), 32))  # T5 may be streamed
    pairs = (tuple(x.cpu() for x in pipe.encode_prompt(part)) for part in parts)
    place = torch.tensor([rows[caption] for caption in captions])
    return Features(latents, place, *collect(len(texts), pairs))


def all_weights(model: nn.Module) -> list[Tensor]:
    """The tensors of ``model`` by name, those that stay in their file among them."""
    found = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, StreamedLinear):
            pairs = zip(("weight", "bias"), layer.stored, strict=True)
            found |= {f"{name}.{k}": x for k, x in pairs if x is not None}
        elif isinstance(layer, StreamedEmbedding):
            found[f"{name}.weight"] = layer.stored
    return [found[name] for name in sorted(found)]


def encoding_name(pipe: Pipeline, images: Tensor, captions: list[str]) -> str:
    """A name for what ``encode_pictures`` returns, made of all that goes into it."""
    parts = (pipe.vae, *filter(None, pipe.text_encoders))
    weights = [fingerprint(x.to(pipe.dtype)) for p in parts for x in all_weights(p)]
    ids = [tokenizer(captions) for tokenizer in filter(None, pipe.tokenizers)]
    return fingerprint("", images, captions, pipe.vae.config, *ids, *weights)


def split_pictures(features: Features) -> tuple[Features, Features]:
    """What is learned from, and the last tenth (1 to 32 pictures), which is not.

    One picture alone is learned from.
    """
    n = len(features)
    held = min(MOST_HELD_OUT, max(1, n // 10)) if n > 1 else 0
    return features.select(slice(0, n - held)), features.select(slice(n - held, n))


def finetuning_task(
    tuned: Tuned,
    features: Features,
    config: TrainingConfig,
    draw: Callable[[], None],
    seed: int = 0,
    drop: float = 0.1,
) -> Task:
    """Learn the transformer, or its corrections, on encoded pictures.

    Validation looks at the pictures that are held out, a batch at a time, then calls
    ``draw``, while the averaged weights are in place.
    """
    pipe, model = tuned.pipe, tuned.trained
    learned, held = split_pictures(features)
    order = functools.partial(shuffled, n=len(learned), seed=seed + 2)
    shift = pipe.scheduler.shift
    batch = FlowBatches(learned, order, seed, seed + 1, drop, shift=shift)
    fixed = held.fixed(seed)

    def loss(_: nn.Module, batch: Batch) -> Tensor:
        return transformer_loss(pipe.transformer, batch)

    @torch.autocast(pipe.device.type, torch.bfloat16, enabled=config.bfloat16)
    def validate(averaged: nn.Module) -> dict[str, object]:
        now = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(averaged.state_dict())
        found: dict[str, object] = {"held_out": len(held)}
        if len(held):
            size = config.batch_size
            found |= validation(pipe.transformer, fixed, pipe.device, size)
        draw()
        model.load_state_dict(now)
        return found

    return Task(model, loss, batch, validate)


@torch.no_grad()
def save_samples(pipe: Pipeline, features: Features, seed: int, file: Path) -> None:
    """Draw the first four captions with the model's usual settings, as one picture.

    Where the memory does not hold a drawing, a line on stderr takes its place.
    """
    if parallel.rank():
        return
    guided = [0] if pipe.defaults.guidance_scale > 1 else []  # the empty prompt
    factor = pipe.vae.config.factor
    height, width = (side * factor for side in features.latents.shape[2:])
    pictures = []
    try:
        for i, row in enumerate(features.place[:4].tolist()):
            rows = [*guided, row]
            noise = pipe.prepare_latents(1, height, width, seed + i)
            text = features.context[rows], features.pooled[rows]
            pictures.append(pipe.decode(pipe.denoise(noise, *text)))
        save_sheet(torch.cat(pictures), len(pictures), file)
    except (ValueError, RuntimeError) as error:
        if not (isinstance(error, ValueError) or is_out_of_memory(error)):
            raise
        tell(f"{file.name} is not drawn: {error}")


def export_tuned(model: Path | str, tuned: Tuned, output: Path) -> Path:
    """Write the corrections, or the whole model: the file or folder it wrote."""
    if tuned.updates is None:
        whole = load(model, "cpu", torch.float32)
        whole.transformer = tuned.pipe.transformer.cpu()
        whole.save_pretrained(output / "model")
        return output / "model"
    save_lora({"transformer": tuned.updates}, output / FILE)
    return output / FILE
