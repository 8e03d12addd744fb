"""``--stage turbo --from``: any SD3-family model distilled on captioned pictures.

In full, or by LoRA: then only small corrections learn, and are added to the weights at
the end. The result is a folder that shares nothing with its teacher's.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.data.captioned import captions_of
from minidiff.distillation import JumpScheduler
from minidiff.engine.loading import load, usual_of
from minidiff.learning import parallel
from minidiff.learning.run import Run, fingerprint, lasting
from minidiff.lora import detach, fuse
from minidiff.recipes.features import Features, shuffled
from minidiff.recipes.finetune import (
    FinetuneOptions,
    LoraConfig,
    Tuned,
    all_weights,
    base_name,
    begin_tuning,
    check_model,
    check_run,
    encoded,
    finetune_pictures,
)
from minidiff.recipes.jumps import (
    JumpBatches,
    Teacher,
    check_rows,
    comparison,
    draw_paths,
    jump_loss,
)
from minidiff.recipes.own_pictures import read_sets, split_pictures
from minidiff.training import Batch, Task, fit


def learn(options: FinetuneOptions) -> None:
    """Fine-tune, or distil, as ``options`` say; print what was written."""
    turbo = options.stage == "turbo"
    made = distil(options) if turbo else finetune_pictures(options)
    if parallel.rank() == 0:
        print(made)


def distil(options: FinetuneOptions, seed: int = 0) -> Path:
    """Distil ``options.model`` into a few-step model; the folder that it wrote.

    The teacher is guided as the model's defaults say. ValueError for a model that goes
    without guidance and in few steps already. A stopped run goes on when called again.
    """
    o, config = options, options.config()
    device = parallel.start(o.device)
    captions = captions_of(o.pictures)
    check_run(config, o.output)
    check_rows(config)
    check_options(o)
    check_teacher(o.model)
    dtype = torch.bfloat16 if o.lora and config.bfloat16 else torch.float32
    sizes = check_model(o.model, o.lora, dtype, device)
    base = base_name(o.model)
    settings: dict[str, Any] = {"stage": "turbo", "base": base, "lora": str(o.lora)}
    settings |= {"folder": str(o.pictures.resolve()), "seed": seed, **lasting(config)}
    settings |= {"how": str(o.how)}
    with Run(o.output / "run", settings) as run:
        pictures = read_sets(o.pictures, captions, sizes, o.how)[0]
        tuned = begin_tuning(o.model, o.lora, device, dtype, seed, o.recompute)
        name, features = encoded(tuned, pictures, o.output)
        began = fingerprint(*all_weights(tuned.pipe.transformer))
        run.add(encodings=name, began=began)
        task = distilling_task(tuned, features, o, run, began, seed)
        averaged = fit(task, config, run, device)
    tuned.trained.load_state_dict(averaged.state_dict())
    return o.output if parallel.rank() else export_distilled(o.model, tuned, o.output)


def check_options(options: FinetuneOptions) -> None:
    """Raise ValueError for options of fine-tuning that jumps do not have."""
    lora, how = options.lora or LoraConfig(), options.how
    others = {"--fp8": lora.fp8, "--encoders": lora.encoders}
    others |= {"--buckets": how.buckets, "--prior": bool(how.prior)}
    others |= {"--prompt": bool(how.prompts)}
    if given := [name for name, value in others.items() if value]:
        raise ValueError(f"{given[0]} is given; --stage turbo expects none")


def check_teacher(model: Path | str) -> None:
    """Raise ValueError for a model that goes without guidance already."""
    if usual_of(model)[1] <= 1:
        found = f"{model} goes without guidance: it is distilled"
        raise ValueError(f"{found}; expected a guided teacher")


def distilling_task(
    tuned: Tuned,
    features: Features,
    options: FinetuneOptions,
    run: Run,
    began: str,
    seed: int,
) -> Task:
    """Jumps for encoded captions; validation draws what is held out, if there is any.

    The teacher, which is the model before it learns, draws first; ``began`` names it.
    """
    pipe, config, output = tuned.pipe, options.config(), options.output
    (learned,), (held,) = split_pictures([features])
    empty = features.context[0], features.pooled[0]
    usual = pipe.defaults.guidance_scale, pipe.scheduler.shift
    teacher = Teacher(pipe.transformer, empty, *usual, began)
    cache = output / "cache"
    drawn = draw_paths(teacher, learned, config, seed + 1, pipe.device, cache)
    order = functools.partial(shuffled, n=len(drawn), seed=seed + 2)
    batch = JumpBatches(drawn, learned, order, seed)
    shown = held if len(held) else learned.select(slice(0, 1))
    compared = comparison(teacher, shown, pipe.vae, seed, pipe.device)

    def loss(_: nn.Module, batch: Batch) -> Tensor:
        return jump_loss(pipe.transformer, batch, teacher.shift)

    def validate(averaged: nn.Module) -> dict[str, object]:
        now = {k: v.clone() for k, v in tuned.trained.state_dict().items()}
        tuned.trained.load_state_dict(averaged.state_dict())
        file = output / "grids" / f"{run.step or 0:06}.png"
        found = compared.look(pipe.transformer, file)
        tuned.trained.load_state_dict(now)
        return found

    return Task(tuned.trained, loss, batch, validate)


def export_distilled(model: Path | str, tuned: Tuned, output: Path) -> Path:
    """Write the whole few-step model; corrections are added to the weights."""
    whole = load(model, "cpu", torch.float32)
    transformer = tuned.pipe.transformer.cpu()
    if tuned.updates is not None:
        updates = tuned.updates["transformer"]
        detach(updates.values(), transformer)
        fuse(updates, transformer)
    whole.transformer = transformer
    whole.scheduler = JumpScheduler(whole.scheduler.shift)
    whole.save_pretrained(output / "model")
    return output / "model"
