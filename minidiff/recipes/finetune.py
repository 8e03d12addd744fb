"""Fine-tuning of any SD3-family model on a folder of captioned pictures.

In full, or by LoRA: then only small corrections learn, and the file that comes out is
one that diffusers loads.
"""

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.data.captioned import captions_of
from minidiff.efficiency import StreamedLinear, weigh
from minidiff.engine.adapters import components
from minidiff.engine.loading import blueprint, load
from minidiff.engine.memory import StreamedEmbedding, free_memory, to_float8
from minidiff.files.layout import ENCODERS
from minidiff.files.lora_files import FILE
from minidiff.files.pictures import save_sheet
from minidiff.files.weights import shipped
from minidiff.interface.checks import check_range, given
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
from minidiff.lora import ATTENTION, LowRank, add_lora, save_lora
from minidiff.recipes.features import Features, validation
from minidiff.recipes.jumps import SIZES
from minidiff.recipes.own_pictures import (
    PictureConfig,
    Pictures,
    Sizes,
    encode_pictures,
    features_of,
    mixed_batches,
    prior_latents,
    read_sets,
    split_pictures,
)
from minidiff.sampling import Pipeline
from minidiff.text_encoders import assemble
from minidiff.training import Batch, Task, TrainingConfig, fit, transformer_loss

CLIPS = tuple(ENCODERS)[:2]
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class LoraConfig:
    """Rank and strength of the corrections, and which layers get one.

    ``fp8``: the blocks' own weights are in 8 bits. ``encoders``: both CLIPs' attention
    gets corrections too.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = tuple(ATTENTION)
    fp8: bool = False
    encoders: bool = False


@dataclass(frozen=True)
class FinetuneOptions:
    """``minidiff train --from``: 500 steps of one picture unless told otherwise.

    Args:
        model: what ``load`` takes.
        pictures: a folder of pictures with captions.
        output: the folder of the run and of its result.
        steps, batch_size, learning_rate: how long and how fast; a batch is 1 unless
            told otherwise, of jumps 4.
        lora: the corrections that learn; None lets all weights of the transformer.
        device: "cpu", "cuda", …
        compile: the step.
        recompute: less memory for more time.
        accumulation: parts of a batch, one after the other.
        how: what is made of the pictures.
        stage: "turbo" distils.
    """

    model: str
    pictures: Path
    output: Path
    steps: int = 500
    batch_size: int | None = None
    learning_rate: float = 1e-4
    lora: LoraConfig | None = None
    device: str = "cpu"
    compile: bool = False
    recompute: bool = False
    accumulation: int = 1
    how: PictureConfig = PictureConfig()
    stage: str = "all"

    def config(self) -> TrainingConfig:
        """How the pictures are learned from."""
        if not 0 < self.learning_rate < math.inf:
            found = f"--learning-rate is {self.learning_rate}"
            raise ValueError(f"{found}; expected a finite number above 0")
        return TrainingConfig(
            self.steps,
            given(self.batch_size, SIZES if self.stage == "turbo" else 1),
            self.learning_rate,
            warmup_steps=min(100, self.steps // 10 + 1),
            bfloat16=self.device.startswith("cuda"),
            compile=self.compile,
            accumulation=self.accumulation,
            save_every=100,
            validate_every=max(100, self.steps // 5),
        )


def finetune_pictures(options: FinetuneOptions) -> Path:
    """Fine-tune as ``options`` say; the file or folder that it wrote."""
    o = options
    config = o.config()
    more: dict[str, Any] = {"how": o.how, "recompute": o.recompute}
    return finetune(o.model, o.pictures, o.output, config, o.lora, o.device, **more)


def lora_config(
    rank: int = 8,
    alpha: float | None = None,
    targets: str | None = None,
    fp8: bool = False,
    encoders: bool = False,
) -> LoraConfig:
    """Of --rank, --alpha and --targets; ValueError for numbers that cannot be."""
    check_range("--rank", rank, 1)
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"--alpha is {alpha}; expected a finite number above 0")
    chosen = targets.split(",") if targets else ATTENTION
    names = tuple(name.strip() for name in chosen)
    return LoraConfig(rank, alpha, names, fp8, encoders)


def finetune(
    model: Path | str,
    pictures: Path | str,
    output: Path | str,
    config: TrainingConfig,
    lora: LoraConfig | None = None,
    device: str = "cpu",
    drop: float = 0.1,
    seed: int = 0,
    recompute: bool = False,
    how: PictureConfig = PictureConfig(),  # noqa: B008
) -> Path:
    """Train ``model`` on the folder ``pictures``; the file or folder it wrote.

    Every tenth picture, 1 to 32 in all, is not learned from: they say which weights are
    the best. With ``lora`` the file is ``output``/pytorch_lora_weights.safetensors,
    else ``output``/model holds a whole model. A stopped run goes on when called again.
    ``recompute`` saves memory: see ``steps.recompute``. With ``lora`` and
    ``config.bfloat16`` the model's own weights, which do not learn, are in bfloat16.
    """
    device, output = parallel.start(device), Path(output)
    captions = captions_of(Path(pictures))
    check_run(config, output)
    dtype = torch.bfloat16 if lora and config.bfloat16 else torch.float32
    sizes = check_model(model, lora, dtype, device)
    settings: dict[str, Any] = {"base": base_name(model)}
    settings |= {"folder": str(Path(pictures).resolve()), "lora": str(lora)}
    settings |= {"drop": drop, "seed": seed, **lasting(config)}
    settings |= {"how": str(how)}
    with Run(output / "run", settings) as run:
        sets = read_sets(Path(pictures), captions, sizes, how)
        tuned = begin_tuning(model, lora, device, dtype, seed, recompute)
        pipe = tuned.pipe
        began = fingerprint(*all_weights(pipe.transformer), pipe.scheduler.shift)
        learned = [encoded(tuned, one, output) for one in sets]
        names = " ".join(name for name, _ in learned)
        repeats = fingerprint(*(one.repeats for one in sets))
        run.add(encodings=names, began=began, repeats=repeats)
        features = [one for _, one in learned]
        prior = prior_of(tuned, how, seed, output / "cache", began)
        shown = Shown(tuned, how.prompts or sets[0].captions[:4], seed)

        def draw() -> None:
            shown.save(output / "grids" / f"{run.step:06}.png")

        task = finetuning_task(tuned, features, config, draw, seed, drop, prior)
        averaged = fit(task, config, run, device)
    tuned.trained.load_state_dict(averaged.state_dict())
    return output if parallel.rank() else export_tuned(model, tuned, output)


# Before anything is read


def base_name(model: Path | str) -> str:
    """What a run remembers of its model: a name, or the whole path of a folder."""
    known = not shipped(model) and Path(model).exists()
    return str(Path(model).resolve() if known else model)


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
) -> Sizes:
    """The sizes in pixels of the pictures that ``model`` draws.

    ValueError for corrections that do not fit, and for a card that is too small.
    """
    parts: dict[str, Any] = dict(blueprint(model))
    if lora:  # a rank or names that these layers do not have
        add_lora(parts["transformer"], lora.rank, lora.alpha, lora.targets)
    check_card(parts, lora, dtype, device)
    c, factor = parts["transformer"].config, parts["vae"].config.factor
    grid = c.patch_size * factor
    return Sizes(c.sample_size * factor, grid, c.pos_embed_max_size * grid)


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
    """A pipeline, what of it learns, and LoRA's corrections by part and layer."""

    pipe: Pipeline
    trained: nn.Module
    updates: dict[str, dict[str, LowRank]] | None

    @property
    def encoders(self) -> bool:
        """Whether the text encoders learn."""
        return len(self.updates or ()) > 1


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
    if lora and lora.encoders:
        streamed.pop("clip", None)
    with redirect_stdout(sys.stderr):  # stdout is for the result's name
        pipe = load(model, device, dtype, **streamed)
    pipe.progress = False
    trained: nn.Module = pipe.transformer
    updates = None
    torch.manual_seed(seed)
    if lora:
        updates = begin_lora(pipe, lora)
        every = [one for layers in updates.values() for one in layers.values()]
        trained = nn.ModuleList(every).float()
    else:
        for parameter in trained.parameters():  # it may be a read-only memory map
            parameter.data = parameter.data.clone()
        trained.requires_grad_(True)
    if recompute:
        steps.recompute(pipe.transformer.joint_blocks)
    return Tuned(pipe, trained, updates)


def begin_lora(pipe: Pipeline, lora: LoraConfig) -> dict[str, dict[str, LowRank]]:
    """New corrections by part and layer, at their layers."""
    if lora.fp8:
        to_float8(pipe.transformer)
    given = lora.rank, lora.alpha
    updates = {"transformer": add_lora(pipe.transformer, *given, lora.targets)}
    for name, encoder in components(pipe).items() if lora.encoders else ():
        if name in CLIPS:
            updates[name] = add_lora(encoder, *given, CLIP_ATTENTION)
    return updates


def encoded(tuned: Tuned, pictures: Pictures, output: Path) -> tuple[str, Features]:
    """Pictures of one shape with their captions, encoded once, and a name for them."""
    images, captions, repeats = pictures
    name = encoding_name(tuned.pipe, images, captions, tuned.encoders)
    path = output / "cache" / f"{name}.safetensors"

    def make() -> dict[str, Tensor]:
        more = tuned.encoders
        return encode_pictures(tuned.pipe, images, captions, more).tensors()

    return name, Features(**cached(path, make, "cpu"), repeats=repeats)


def prior_of(
    tuned: Tuned, how: PictureConfig, seed: int, cache: Path, began: str
) -> Features | None:
    """What is to stay, as the model draws it before it learns; None for no prompt."""
    if not how.prior:
        return None
    count, pipe = how.prior_pictures, tuned.pipe
    name = fingerprint("prior", how.prior, count, seed, began)
    made = cached(
        cache / f"{name}.safetensors",
        lambda: {"latents": prior_latents(pipe, how.prior, count, seed)},
        "cpu",
    )
    texts = [how.prior] * count
    return features_of(pipe, made["latents"], texts, tuned.encoders)


def reencoded(pipe: Pipeline, batch: Batch) -> Batch:
    """A batch as the encoders read it now, where it says what they read."""
    if "ids" not in batch:
        return batch
    clips = [pipe.text_encoders[i](batch["ids"][:, i]) for i in range(2)]
    (hidden_l, hidden_g), pooled = zip(*clips, strict=True)
    t5 = batch["context"][:, hidden_l.shape[1] :].to(hidden_l)
    context = assemble(hidden_l, hidden_g, t5)
    return batch | {"context": context, "pooled": torch.cat(pooled, -1)}


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


def encoding_name(
    pipe: Pipeline, images: Tensor, captions: list[str], more: bool = False
) -> str:
    """A name for what ``encode_pictures`` returns, made of all that goes into it."""
    parts = (pipe.vae, *filter(None, pipe.text_encoders))
    weights = [fingerprint(x.to(pipe.dtype)) for p in parts for x in all_weights(p)]
    ids = [tokenizer(captions) for tokenizer in filter(None, pipe.tokenizers)]
    kind = "ids" if more else ""
    return fingerprint(kind, images, captions, pipe.vae.config, *ids, *weights)


def finetuning_task(
    tuned: Tuned,
    features: Sequence[Features],
    config: TrainingConfig,
    draw: Callable[[], None],
    seed: int = 0,
    drop: float = 0.1,
    prior: Features | None = None,
) -> Task:
    """Learn the transformer, or corrections, on encoded pictures, a set a shape.

    Validation looks at the pictures that are held out, a batch at a time, then calls
    ``draw``, while the averaged weights are in place.
    """
    pipe, model = tuned.pipe, tuned.trained
    learned, held = split_pictures(features)
    levels: dict[str, Any] = {"drop": drop, "shift": pipe.scheduler.shift}
    sets = [part for part in learned if len(part)]
    batch = mixed_batches(sets, prior, config.batch_size, seed, **levels)
    fixed = [part.fixed(seed) for part in held if len(part)]

    def loss(_: nn.Module, batch: Batch) -> Tensor:
        return transformer_loss(pipe.transformer, reencoded(pipe, batch))

    @torch.no_grad()
    @torch.autocast(pipe.device.type, torch.bfloat16, enabled=config.bfloat16)
    def validate(averaged: nn.Module) -> dict[str, object]:
        now = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(averaged.state_dict())
        found: dict[str, object] = {"held_out": sum(map(len, held))}
        if fixed:
            look = functools.partial(looked_at, pipe, at_once=config.batch_size)
            found |= mean_of(list(map(look, fixed)), [len(b["x0"]) for b in fixed])
        draw()
        model.load_state_dict(now)
        return found

    return Task(model, loss, batch, validate)


def looked_at(pipe: Pipeline, fixed: Batch, at_once: int) -> dict[str, Any]:
    """The losses on a fixed batch, as the encoders read it now."""
    on_device = {key: x.to(pipe.device) for key, x in fixed.items()}
    batch = reencoded(pipe, on_device) if "ids" in fixed else fixed
    return validation(pipe.transformer, batch, pipe.device, at_once)


def mean_of(
    found: Sequence[Mapping[str, Any]], counts: Sequence[int]
) -> dict[str, Any]:
    """The mean of validations over all their pictures."""
    whole = sum(counts)
    shares = [count / whole for count in counts]
    levels = zip(*(one["by_level"] for one in found), strict=True)
    mean = [math.fsum(a * b for a, b in zip(x, shares, strict=True)) for x in levels]
    return {"validation": sum(mean) / len(mean), "by_level": mean}


@dataclass(frozen=True)
class Shown:
    """Prompts drawn at each validation, at fixed seeds, as one picture."""

    tuned: Tuned
    prompts: Sequence[str]
    seed: int

    @functools.cached_property
    def text(self) -> Batch:
        """The empty prompt and the prompts, encoded once."""
        pipe, count = self.tuned.pipe, len(self.prompts)
        empty = torch.empty(count, 0)
        made = features_of(pipe, empty, list(self.prompts), self.tuned.encoders)
        rows = torch.cat([torch.zeros(1).long(), made.place])
        text = {"context": made.context[rows], "pooled": made.pooled[rows]}
        return text if made.ids is None else text | {"ids": made.ids[rows]}

    @torch.no_grad()
    def save(self, file: Path) -> None:
        """Draw with the model's usual settings.

        Where the memory does not hold a drawing, a line on stderr takes its place.
        """
        if parallel.rank():
            return
        pipe, pictures = self.tuned.pipe, []
        text = {key: x.to(pipe.device) for key, x in self.text.items()}
        text = reencoded(pipe, text)
        guided = [0] if pipe.defaults.guidance_scale > 1 else []  # the empty prompt
        try:
            for i in range(len(self.prompts)):
                rows = [*guided, i + 1]
                noise = pipe.prepare_latents(1, seed=self.seed + i)
                told = text["context"][rows], text["pooled"][rows]
                pictures.append(pipe.decode(pipe.denoise(noise, *told)))
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
    save_lora(tuned.updates, output / FILE)
    return output / FILE
