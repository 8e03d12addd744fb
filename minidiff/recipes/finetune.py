"""Fine-tuning of any SD3-family model on a folder of captioned pictures.

In full, or by LoRA: then only small corrections learn, and the file that comes out is
one that diffusers loads.
"""

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minidiff.data import rng
from minidiff.data.captioned import captions_of, read_folder
from minidiff.engine.loading import blueprint, load
from minidiff.engine.memory import StreamedEmbedding, StreamedLinear, free_memory, weigh
from minidiff.files.pictures import from_bytes, save_sheet
from minidiff.flow_matching import shift_sigma
from minidiff.interface.checks import check_range
from minidiff.interface.terminal import tell
from minidiff.learning import parallel, trainer
from minidiff.learning.trainer import Run, cached, fingerprint, lasting
from minidiff.lora import ATTENTION, FILE, LowRank, add_lora, save_lora
from minidiff.sampling import Pipeline
from minidiff.training import (
    Batch,
    Task,
    TrainingConfig,
    fit,
    loss_by_level,
    noise_and_levels,
    transformer_loss,
)


@dataclass(frozen=True)
class LoraConfig:
    """Rank and strength of the corrections, and which layers get one."""

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = tuple(ATTENTION)


@torch.no_grad()
def encode(pipe: Pipeline, images: Tensor, captions: list[str]) -> Batch:
    """Latents (N, C, h, w), float32, and what the encoders make of the captions.

    ``images`` are uint8 (N, 3, H, W). ``context`` and ``pooled`` have one more row, the
    last: the empty prompt's. All is in main memory: megabytes for each picture.
    """
    latents, contexts, texts = [], [], [*captions, ""]
    for image in images.split(1):
        image = from_bytes(image).to(pipe.device, pipe.dtype)
        mode = pipe.vae.encode(image).mode()
        latents.append(pipe.vae.scale(mode.float()).cpu())
    for start in range(0, len(texts), 32):  # a streamed T5 comes once for each
        pair = pipe.encode_prompt(texts[start : start + 32])
        contexts.append([part.cpu() for part in pair])
    context, pooled = (torch.cat(part) for part in zip(*contexts, strict=True))
    return {"x0": torch.cat(latents), "context": context, "pooled": pooled}


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
    """A name for what ``encode`` returns, made of all that goes into it."""
    parts = (pipe.vae, *filter(None, pipe.text_encoders))
    weights = [fingerprint(x.to(pipe.dtype)) for p in parts for x in all_weights(p)]
    ids = [tokenizer(captions) for tokenizer in filter(None, pipe.tokenizers)]
    return fingerprint(images, captions, pipe.vae.config, *ids, *weights)


def finetuning_task(
    pipe: Pipeline,
    encoded: Batch,
    model: nn.Module,
    seed: int,
    drop: float,
    config: TrainingConfig,
    draw: Callable[[], None],
) -> Task:
    """Learn ``model`` (the transformer, or its corrections) on encoded pictures.

    Validation looks at a batch of pictures at a time, then calls ``draw``, while the
    averaged weights are in place.
    """
    n, shape = len(encoded["x0"]), tuple(encoded["x0"].shape[1:])
    shift = pipe.scheduler.shift

    def batch(indices: Tensor) -> Batch:
        numbers = indices.cpu()  # as the encodings are in main memory
        place = numbers % n
        dropped = rng.uniform(seed + 1, numbers, 1)[:, 0] < drop
        row = torch.where(dropped, n, place)  # the last is the empty prompt
        known = {"x0": encoded["x0"][place]}
        known |= {k: encoded[k][row] for k in ("context", "pooled")}
        known = {k: x.to(indices.device) for k, x in known.items()}
        noise, sigma = noise_and_levels(indices, shape, seed)
        sigma = shift_sigma(sigma, shift)
        return known | {"noise": noise.to(known["x0"]), "sigma": sigma}

    def loss(_: nn.Module, batch: Batch) -> Tensor:
        return transformer_loss(pipe.transformer, batch)

    @torch.autocast(pipe.device.type, torch.bfloat16, enabled=config.bfloat16)
    def validate(averaged: nn.Module) -> dict:
        learned = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(averaged.state_dict())
        losses = level_losses(pipe, encoded, seed, config.batch_size)
        draw()
        model.load_state_dict(learned)
        return {"validation": sum(losses) / len(losses), "by_level": losses}

    return Task(model, loss, batch, validate)


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

    With ``lora`` the result is ``output``/pytorch_lora_weights.safetensors, else a
    whole model in ``output``/model. A stopped run goes on when called again.
    ``recompute`` saves memory: see ``trainer.recompute``. With ``lora`` and
    ``config.bfloat16`` the model's own weights, which do not learn, are in bfloat16.
    """
    device, output = parallel.start(device), Path(output)
    check(config, Path(pictures), output)
    parts = blueprint(model)
    side = parts["transformer"].config.sample_size * parts["vae"].config.factor
    if lora:  # a rank or names that these layers do not have
        add_lora(parts["transformer"], lora.rank, lora.alpha, lora.targets)
    dtype = torch.bfloat16 if lora and config.bfloat16 else torch.float32
    check_card(parts, lora, dtype, device)
    known = str(model) != "tiny" and Path(model).exists()  # no name of a model
    settings = {"base": str(Path(model).resolve() if known else model)}
    settings |= {"folder": str(Path(pictures).resolve()), "lora": str(lora)}
    settings |= {"drop": drop, "seed": seed, **lasting(config)}
    with Run(output / "run", settings) as run:
        images, captions = read_folder(pictures, side, crop)
        pipe, trained, updates = begin(model, lora, device, dtype, seed, recompute)
        name = encoding_name(pipe, images, captions)
        began = fingerprint(*all_weights(pipe.transformer), pipe.scheduler.shift)
        run.add(encodings=name, began=began)
        path = output / "cache" / f"{name}.safetensors"
        encoded = cached(path, lambda: encode(pipe, images, captions), "cpu")
        grids = output / "grids"

        def draw() -> None:
            save_samples(pipe, encoded, seed, grids / f"{run.step:06}.png")

        task = finetuning_task(pipe, encoded, trained, seed, drop, config, draw)
        averaged = fit(task, config, run, device)
    trained.load_state_dict(averaged.state_dict())
    return output if parallel.rank() else export(model, pipe, updates, output)


def check(config: TrainingConfig, pictures: Path, output: Path) -> None:
    """Raise ValueError or OSError for what can be told before anything is read."""
    if config.sharded:
        raise ValueError("sharded is True; fine-tuning expects False")
    shares = config.accumulation * parallel.size()
    trainer.check_batch(config.steps, config.batch_size, shares)
    captions_of(pictures)
    trainer.check_folder(output)
    trainer.check_other(output, "run", "runs")


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


def begin(
    model: Path | str,
    lora: LoraConfig | None,
    device: str,
    dtype: torch.dtype,
    seed: int,
    recompute: bool,
) -> tuple[Pipeline, nn.Module, dict[str, LowRank] | None]:
    """The pipeline, what of it learns, and with ``lora`` the corrections by layer."""
    cuda = device.startswith("cuda")  # the encoders visit the card while they encode
    streamed = {"t5": "streamed", "clip": "streamed"} if cuda else {}
    with redirect_stdout(sys.stderr):  # stdout is for the result's name
        pipe = load(model, device, dtype, **streamed)
    pipe.progress = False
    trained, updates = pipe.transformer, None
    torch.manual_seed(seed)
    if lora:
        updates = add_lora(pipe.transformer, lora.rank, lora.alpha, lora.targets)
        trained = nn.ModuleList(updates.values()).float()
    else:
        for parameter in trained.parameters():  # it may be a read-only memory map
            parameter.data = parameter.data.clone()
        trained.requires_grad_(True)
    if recompute:
        trainer.recompute(pipe.transformer.joint_blocks)
    return pipe, trained, updates


def export(
    model: Path | str, pipe: Pipeline, updates: dict[str, LowRank] | None, output: Path
) -> Path:
    """Write the corrections, or the whole model: the file or folder it wrote."""
    if updates is None:
        whole = load(model, "cpu", torch.float32)
        whole.transformer = pipe.transformer.cpu()
        whole.save_pretrained(output / "model")
        return output / "model"
    save_lora({"transformer": updates}, output / FILE)
    return output / FILE


def level_losses(
    pipe: Pipeline, encoded: Batch, seed: int = 0, at_once: int = 32
) -> list[float]:
    """The loss on the first 32 pictures by noise level, with fixed noise."""
    n = min(32, len(encoded["x0"]))
    noise = rng.normal(seed, torch.arange(n), tuple(encoded["x0"].shape[1:]))
    fixed = {k: encoded[k][:n] for k in ("x0", "context", "pooled")}
    fixed["noise"] = noise.to(fixed["x0"])
    losses = torch.zeros(8)
    for part in torch.arange(n).split(at_once):
        batch = {k: x[part].to(pipe.device) for k, x in fixed.items()}
        found = loss_by_level(pipe.transformer, batch)
        losses += torch.tensor(found) * len(part) / n
    return losses.tolist()


@torch.no_grad()
def save_samples(pipe: Pipeline, encoded: Batch, seed: int, file: Path) -> None:
    """Draw the first four captions with the model's usual settings, as one picture.

    Where the memory does not hold a drawing, a line on stderr takes its place.
    """
    if parallel.rank():
        return
    guided = [-1] if pipe.defaults.guidance_scale > 1 else []  # the empty prompt
    height, width = (side * pipe.vae.config.factor for side in encoded["x0"].shape[2:])
    pictures = []
    try:
        for i in range(min(4, len(encoded["x0"]))):
            text = (encoded[k][[*guided, i]] for k in ("context", "pooled"))
            noise = pipe.prepare_latents(1, height, width, seed + i)
            pictures.append(pipe.decode(pipe.denoise(noise, *text)))
        save_sheet(torch.cat(pictures), len(pictures), file)
    except (ValueError, RuntimeError) as error:
        if not (isinstance(error, ValueError) or trainer.is_out_of_memory(error)):
            raise
        tell(f"{file.name} is not drawn: {error}")


def train(
    model: str,
    pictures: Path | None,
    output: Path,
    steps: int | None,
    batch_size: int | None,
    learning_rate: float,
    lora: tuple[int, float | None, str | None] | None,
    device: str,
    compile: bool | None,
    recompute: bool,
    crop: bool = True,
) -> Path:
    """``minidiff train --from``: 500 steps of one picture unless told otherwise.

    ``lora``: rank, alpha and the layers' names, by commas.
    """
    if pictures is None:
        raise ValueError("--from needs --data: a folder of pictures with captions")
    if not 0 < learning_rate < math.inf:
        found = f"--learning-rate is {learning_rate}"
        raise ValueError(f"{found}; expected a finite number above 0")
    steps = 500 if steps is None else steps
    config = TrainingConfig(
        steps,
        1 if batch_size is None else batch_size,
        learning_rate,
        warmup_steps=min(100, steps // 10 + 1),
        bfloat16=device.startswith("cuda"),
        compile=bool(compile),
        save_every=100,
        validate_every=max(100, steps // 5),
    )
    settings = lora_config(*lora) if lora else None
    how = {"crop": crop, "recompute": recompute}
    return finetune(model, pictures, output, config, settings, device, **how)


def lora_config(rank: int, alpha: float | None, names: str | None) -> LoraConfig:
    """Of --rank, --alpha and --targets; ValueError for numbers that cannot be."""
    check_range("--rank", rank, 1)
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"--alpha is {alpha}; expected a finite number above 0")
    chosen = names.split(",") if names else ATTENTION
    return LoraConfig(rank, alpha, tuple(name.strip() for name in chosen))
