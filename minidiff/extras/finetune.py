"""Fine-tuning of any SD3-family model on a folder of captioned pictures.

In full, or by LoRA: then only small corrections learn, and the file that comes out is
one that diffusers loads.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minidiff.extras.lora import ATTENTION, FILE, add_lora, save_lora
from minidiff.flow_matching import shift_sigma
from minidiff.sampling import Pipeline, load
from minidiff.support import parallel, rng
from minidiff.support.captioned import read_folder
from minidiff.support.trainer import (
    Run,
    fingerprint,
    load_tensors,
    recompute,
    save_tensors,
)
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
def encode_folder(
    pipe: Pipeline, folder: Path | str, size: int, crop: bool = True
) -> Batch:
    """Latents (N, C, h, w) and what the encoders make of the captions.

    ``context`` and ``pooled`` have one more row, the last: the empty prompt's.
    """
    images, captions = read_folder(folder, size, crop)
    latents, contexts = [], []
    for image in images.split(1):
        mode = pipe.vae.encode(image.to(pipe.device, pipe.dtype)).mode()
        latents.append(pipe.vae.scale(mode))
    for caption in [*captions, ""]:
        contexts.append(pipe.encode_prompt(caption))
    context, pooled = (torch.cat(part) for part in zip(*contexts, strict=True))
    return {"x0": torch.cat(latents), "context": context, "pooled": pooled}


def cached(pipe: Pipeline, folder: Path, size: int, crop: bool, cache: Path) -> Batch:
    """``encode_folder``, kept on disk under a name made of all that went into it."""
    images, captions = read_folder(folder, size, crop)
    weights = [
        value
        for part in (pipe.vae, *filter(None, pipe.text_encoders))
        for value in part.state_dict().values()
    ]
    first = [w.flatten()[:64].float() for w in weights]
    path = cache / f"{fingerprint(images, captions, *first)}.safetensors"
    if path.exists():
        return {k: v.to(pipe.device) for k, v in load_tensors(path)[0].items()}
    encoded = encode_folder(pipe, folder, size, crop)
    cache.mkdir(parents=True, exist_ok=True)
    save_tensors(path, encoded)
    return encoded


def finetuning_task(
    pipe: Pipeline, encoded: Batch, model: nn.Module, seed: int, drop: float
) -> Task:
    """Learn ``model`` (the transformer, or its corrections) on encoded pictures."""
    n, shape = len(encoded["x0"]), tuple(encoded["x0"].shape[1:])
    shift = pipe.scheduler.shift

    def batch(indices: Tensor) -> Batch:
        place = indices % n
        dropped = rng.uniform(seed + 1, indices, 1)[:, 0] < drop
        row = torch.where(dropped, n, place)  # the last row is the empty prompt
        noise, sigma = noise_and_levels(indices, shape, seed)
        known = {"x0": encoded["x0"][place], "noise": noise.to(encoded["x0"])}
        known["sigma"] = shift_sigma(sigma, shift)
        return known | {k: encoded[k][row] for k in ("context", "pooled")}

    def loss(_: nn.Module, batch: Batch) -> Tensor:
        return transformer_loss(pipe.transformer, batch)

    return Task(model, loss, batch)


def finetune(
    model: Path | str,
    pictures: Path | str,
    output: Path | str,
    config: TrainingConfig,
    lora: LoraConfig | None = None,
    device: str = "cpu",
    size: int | None = None,
    crop: bool = True,
    drop: float = 0.1,
    seed: int = 0,
    recomputed: bool = False,
) -> Path:
    """Train ``model`` on the folder ``pictures``; the file or folder it wrote.

    With ``lora`` the result is ``output``/pytorch_lora_weights.safetensors, else a
    whole model in ``output``/model. A stopped run goes on when called again.
    ``recomputed`` saves memory: see ``trainer.recompute``.
    """
    device = parallel.start(device)
    pipe, output = load(model, device, torch.float32), Path(output)
    side = pipe.transformer.config.sample_size * pipe.vae.config.factor
    encoded = cached(pipe, Path(pictures), size or side, crop, output / "cache")
    trained, updates = pipe.transformer, None
    torch.manual_seed(seed)
    if lora:
        updates = add_lora(pipe.transformer, lora.rank, lora.alpha, lora.targets)
        trained = nn.ModuleList(updates.values())
    else:
        for parameter in trained.parameters():  # it may be a read-only memory map
            parameter.data = parameter.data.clone()
        trained.requires_grad_(True)
    if recomputed:
        recompute(pipe.transformer.joint_blocks)
    task = finetuning_task(pipe, encoded, trained, seed, drop)
    settings = {"model": str(model), "pictures": str(pictures), "lora": str(lora)}
    with Run(output / "run", settings | {"steps": config.steps}) as run:
        averaged = fit(task, config, run, device)
    trained.load_state_dict(averaged.state_dict())
    if parallel.rank():
        return output
    if updates is None:
        pipe.save_pretrained(output / "model")
        return output / "model"
    save_lora({"transformer": updates}, output / FILE)
    return output / FILE


def level_losses(pipe: Pipeline, encoded: Batch, seed: int = 0) -> list[float]:
    """The loss on encoded pictures by noise level, with fixed noise."""
    n = len(encoded["x0"])
    noise = rng.normal(seed, torch.arange(n), tuple(encoded["x0"].shape[1:]))
    fixed = {k: encoded[k][:n] for k in ("x0", "context", "pooled")}
    return loss_by_level(pipe.transformer, fixed | {"noise": noise.to(fixed["x0"])})


def train(
    model: str,
    pictures: Path | None,
    output: Path,
    size: tuple[int, int, float],
    lora: tuple[int, float | None, str | None] | None,
    device: str,
    compile: bool | None,
) -> Path:
    """``minidiff train --from``: ``size`` is steps, batch size and learning rate;
    ``lora`` is rank, alpha and the layers' names, by commas."""
    if pictures is None:
        raise ValueError("--from needs --data: a folder of pictures with captions")
    steps, batch_size, rate = size
    config = TrainingConfig(
        steps,
        batch_size,
        rate,
        warmup_steps=min(100, steps // 10 + 1),
        bfloat16=device.startswith("cuda"),
        compile=bool(compile),
        save_every=100,
    )
    chosen = None
    if lora:
        names = tuple(lora[2].split(",")) if lora[2] else tuple(ATTENTION)
        chosen = LoraConfig(lora[0], lora[1], names)
    return finetune(model, pictures, output, config, chosen, device)
