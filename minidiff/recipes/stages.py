"""The stages that make the tiny model: from scenes to a folder that ``load`` opens.

Each stage learns by its own objective (``minidiff.training``), keeps its checkpoints
under ``OUTPUT/runs/STAGE`` and exports float16 weights in the hub's layout into
``OUTPUT/model``; the next stage reads them from there.
"""

import filecmp
import functools
import json
import math
import shutil
import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidiff.attention import Heads, JointAttention
from minidiff.data import rng
from minidiff.data.captioned import Pictures
from minidiff.data.fashion_mnist import fashion_mnist
from minidiff.data.garments import SCENES, Scenes, token_table
from minidiff.dit import MMDiT
from minidiff.engine import loading
from minidiff.files import layout
from minidiff.files.layout import ENCODERS, TOKENIZERS
from minidiff.files.pictures import from_bytes, save_sheet, to_bytes
from minidiff.files.reading import read_json
from minidiff.files.weights import TINY, load_component, save_component
from minidiff.files.writing import write_json, write_text
from minidiff.flow_matching import Scheduler, euler, guide, shift_sigma
from minidiff.interface.checks import check_range
from minidiff.interface.terminal import printable
from minidiff.judging.judge import Judge, accuracy, judge_loss, measure, save_judge
from minidiff.judging.metrics import check_side, psnr
from minidiff.learning import parallel
from minidiff.learning.trainer import (
    Run,
    cached,
    check_batch,
    check_folder,
    check_other,
    fingerprint,
    lasting,
    recompute,
)
from minidiff.text_encoders import (
    CLIPTextConfig,
    CLIPTextEncoder,
    T5Config,
    T5Encoder,
    assemble,
)
from minidiff.tokenizer import CLIPTokenizer, T5Tokenizer
from minidiff.training import (
    Batch,
    CLIPTraining,
    T5Training,
    Task,
    TrainingConfig,
    choose_spans,
    clip_loss,
    corrupt_spans,
    drop_encoders,
    fit,
    loss_by_level,
    noise_and_levels,
    precise,
    t5_loss,
    transformer_loss,
    vae_loss,
)
from minidiff.vae import VAE, Upsample

Settings = TypeVar("Settings")
STAGES = ("tokenizers", "clip", "t5", "vae", "judge", "transformer")
CLIP_VOCABULARY = 704  # rows of the table: 512 bytes, then merges and two markers
LENGTH = 32  # tokens of a prompt, for each encoder
MAY_BE_0 = ("warmup_steps", "validate_every", "weight_decay", "two_garments")
MAY_BE_0 += ("hold_latents",)
FRACTIONS = ("ema_decay", "beta2", "two_garments")


@dataclass(frozen=True)
class Recipe:
    """How long each stage learns, and from how many scenes."""

    clip: TrainingConfig
    t5: TrainingConfig
    vae: TrainingConfig
    judge: TrainingConfig
    transformer: TrainingConfig
    pictures: int  # scenes kept as pictures, for CLIP and the autoencoder
    latents: int  # scenes kept as latents, for the transformer
    captions: int = 20_000  # that the tokenizers learn from
    held: int = 512  # test scenes that validation looks at
    two_garments: float = 0.65  # of T5's and the transformer's scenes: they are harder
    uniform_levels: bool = False  # noise levels uniform, not logit-normal
    keep_latents: bool = False  # of the autoencoder only the decoder learns
    hold_latents: float = 0.0  # how strongly, where both learn: see ``held_loss``
    shift: float = 1.0  # moves noise levels towards 1
    scenes: str = "composed"  # or "plain" (garments as they are), or a folder


RECIPES = {
    "gpu": Recipe(
        clip=TrainingConfig(2500, 1024, 1e-3, warmup_steps=200, save_every=500),
        t5=TrainingConfig(2500, 1024, 1e-3, warmup_steps=200, save_every=500),
        vae=TrainingConfig(
            3200,
            256,
            2e-3,
            warmup_steps=100,
            muon=True,
            save_every=500,
            validate_every=500,
        ),
        judge=TrainingConfig(4000, 512, 2e-3, 200, weight_decay=0.05, save_every=500),
        transformer=TrainingConfig(
            24_000,
            512,
            5e-3,
            warmup_steps=500,
            ema_decay=0.9995,
            muon=True,
            save_every=1500,
            validate_every=2000,
        ),
        pictures=2**18,
        latents=2**20,
        shift=2.0,  # between what texture and what garments need: see "further"
    ),
    # What began minidiff/pretrained/tiny, on two CPU cores; all of that had AdamW
    "shipped": Recipe(
        clip=TrainingConfig(
            350, 128, 1.5e-3, 20, ema_decay=0.99, save_every=100, bfloat16=True
        ),
        t5=TrainingConfig(
            500, 64, 1e-3, 30, ema_decay=0.99, save_every=100, bfloat16=True
        ),
        vae=TrainingConfig(
            1600,
            12,
            2e-3,
            40,
            ema_decay=0.995,
            muon=True,
            save_every=100,
            validate_every=400,
            bfloat16=True,
        ),
        judge=TrainingConfig(
            7000,
            128,
            3e-3,
            200,
            weight_decay=0.05,
            save_every=500,
            validate_every=1000,
            bfloat16=True,
        ),
        transformer=TrainingConfig(
            2800,
            32,
            8e-3,
            150,
            ema_decay=0.998,
            muon=True,
            save_every=200,
            validate_every=500,
            bfloat16=True,
        ),
        pictures=2**14,
        latents=2**15,
        held=256,
        two_garments=0.4,
    ),
    "trial": Recipe(  # every stage for a few steps
        clip=TrainingConfig(60, 64, 1e-3, warmup_steps=10, log_every=5, save_every=20),
        t5=TrainingConfig(60, 64, 1e-3, warmup_steps=10, log_every=5, save_every=20),
        vae=TrainingConfig(30, 8, 1e-3, warmup_steps=5, log_every=5, save_every=10),
        judge=TrainingConfig(20, 32, 2e-3, warmup_steps=5, log_every=5, save_every=10),
        transformer=TrainingConfig(
            60, 16, 1e-3, warmup_steps=5, log_every=5, save_every=20, validate_every=60
        ),
        pictures=2048,
        latents=1024,
        captions=2000,
        held=32,
    ),
}


# What went on with minidiff/pretrained/tiny, on the same cores: ``--start`` with the
# model that "shipped" made. The autoencoder and the transformer learn on.
RECIPES["longer"] = replace(
    RECIPES["shipped"],
    vae=TrainingConfig(
        4000,
        16,
        1.5e-3,
        100,
        ema_decay=0.998,
        save_every=250,
        validate_every=1000,
        bfloat16=True,
    ),
    transformer=TrainingConfig(
        5000,
        64,
        1.6e-3,
        200,
        accumulation=2,
        save_every=250,
        validate_every=1000,
        bfloat16=True,
    ),
    pictures=2**15,
    latents=2**16,
    two_garments=0.5,
)
# What went on from there: ``--start`` with what "longer" made, ``--stage transformer``,
# then once more with 13,000 steps. The noise above sigma 0.7 decides which garment it
# is: the shift has 3 samples of 5 there.
RECIPES["further"] = replace(
    RECIPES["longer"],
    transformer=replace(
        RECIPES["longer"].transformer, steps=10_000, learning_rate=1.2e-3
    ),
    two_garments=0.65,
    shift=3.0,
)
# What finished the transformer: the same levels, Muon's steps.
RECIPES["muon"] = replace(
    RECIPES["further"],
    transformer=replace(
        RECIPES["further"].transformer, steps=9_000, learning_rate=1.5e-3, muon=True
    ),
)
# What finished the autoencoder (``--stage vae``), by Muon's steps too: its latents
# hardly move, so that the transformer need not learn again. Then ``--stage
# transformer``: what is new in them is fine detail, which lies at low levels.
RECIPES["details"] = replace(
    RECIPES["muon"],
    vae=replace(RECIPES["longer"].vae, steps=10_000, learning_rate=2e-3, muon=True),
    transformer=replace(RECIPES["muon"].transformer, steps=10_000),
    hold_latents=0.05,
    shift=2.0,
)


def find_recipe(name: str, cuda: bool = False) -> Recipe:
    """The recipe of that name, or the one that a JSON file describes.

    The file changes "shipped": {"transformer": {"steps": 5000}, "latents": 4096}. With
    ``cuda`` what it does not say is compiled and in bfloat16 (CLIP in float32). Raises
    ValueError for an unknown name or key, naming it.
    """
    if name in RECIPES:
        return for_gpu(RECIPES[name]) if cuda else RECIPES[name]
    if not name.endswith(".json"):
        known = ", ".join(RECIPES)
        raise ValueError(f"--recipe is {name!r}; expected {known}, or a .json file")
    chosen = changed(find_recipe("shipped", cuda), read_json(Path(name)), name)
    for stage in ("clip", "t5", "judge"):
        if getattr(chosen, stage).muon:
            raise ValueError(f"{name}, {stage}: muon is for vae and transformer")
    return chosen


def for_gpu(recipe: Recipe) -> Recipe:
    """The same stages compiled and in bfloat16.

    CLIP compares unit vectors: for its logits bfloat16 is too coarse.
    """
    stages = {
        name: replace(getattr(recipe, name), compile=True, bfloat16=name != "clip")
        for name in STAGES[1:]
    }
    return replace(recipe, **stages)


def changed(settings: Settings, changes: dict, where: str) -> Settings:
    """A dataclass with ``changes``, in those of its fields that are dataclasses too."""
    values = {}
    for name, value in changes.items():
        if name not in {f.name for f in fields(settings)}:
            known = ", ".join(f.name for f in fields(settings))
            raise ValueError(f"{where} sets {name!r}; expected {known}")
        old = getattr(settings, name)
        deeper = is_dataclass(old) and isinstance(value, dict)
        values[name] = changed(old, value, f"{where}, {name}") if deeper else value
        check_number(name, value, where)
        if old is not None and type(values[name]) is not type(old):
            kinds = type(old).__name__, type(value).__name__
            if kinds != ("float", "int"):
                raise ValueError(
                    f"{where}: {name} is a {kinds[1]}, expected {kinds[0]}"
                )
    return replace(settings, **values)


def check_number(name: str, value: object, where: str) -> None:
    """Raise ValueError for a number that no setting of this kind can be."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    may_be_0 = name in (*MAY_BE_0, *FRACTIONS)
    small = value <= 1 or name not in FRACTIONS
    if not (0 <= value < math.inf and small and (value or may_be_0)):
        limits = "at least 0 and finite" if may_be_0 else "above 0 and finite"
        limits = "0 to 1" if name in FRACTIONS else limits
        raise ValueError(f"{where}: {name} is {value}; expected {limits}")
    if name == "beta2" and value == 1:  # Adam would divide by 0
        raise ValueError(f"{where}: beta2 is {value}; expected below 1")


@dataclass(frozen=True)
class Job:
    """Where a stage reads and writes, and on what it runs."""

    output: Path
    recipe: Recipe
    data: str | None = None
    device: str = "cpu"
    cache: Path | None = None
    seed: int = 0
    start: Path | None = None  # a model whose weights are the beginning
    recompute: bool = False  # the transformer's blocks: see ``trainer.recompute``
    crop: bool = True  # pictures of a folder: their middle, or all of them squeezed
    run: Run | None = None  # of the stage that learns now

    @property
    def model(self) -> Path:
        """The exported model, in the hub's layout."""
        return self.output / "model"

    def scenes(
        self, two_garments: float = 0.5, split: str = "train"
    ) -> Scenes | Pictures:
        """Scenes, or the pictures of a folder, of one split on this job's device."""
        name = self.recipe.scenes
        if name not in SCENES:
            return Pictures(split, name, self.device, self.seed, self.crop)
        return SCENES[name](split, self.data, self.device, self.seed, two_garments)


def shuffled(indices: Tensor, n: int) -> Tensor:
    """Places in a pool of ``n`` for samples 0, 1, 2, …: each once an epoch."""
    return (indices * 2654435761 + indices // n * 40503) % n


def key(job: Job, purpose: str) -> int:
    """A seed for one purpose."""
    return rng.fold_in(job.seed, sum(map(ord, purpose)))


@torch.no_grad()
def picture_pool(
    scenes: Scenes | Pictures, n: int, chunk: int = 4096
) -> tuple[Tensor, ...]:
    """Scenes 0 … n − 1: pictures uint8 (n, 3, 64, 64), captions and meanings (n,)."""
    parts = []
    for start in range(0, n, chunk):
        device = scenes.device
        batch = scenes.batch(torch.arange(start, min(n, start + chunk), device=device))
        parts.append((to_bytes(batch.images), batch.caption_ids, batch.meanings))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


# Tokenizers


def token_tables(job: Job) -> list[Tensor]:
    """Ids of every caption by each tokenizer, (captions + 1, L); the last row is ""."""
    texts, tables = job.scenes().all_captions(), []
    encode = token_table if job.recipe.scenes in SCENES else encode_all
    for tokenizer in loading.read_tokenizers(job.model, TOKENIZERS):
        empty = tokenizer([""]).int()
        tables.append(torch.cat([encode(tokenizer, texts), empty]).to(job.device))
    return tables


def encode_all(tokenizer: CLIPTokenizer | T5Tokenizer, texts: list[str]) -> Tensor:
    """Token ids of any ``texts`` (N, L); how many had to be cut is told."""
    if cut := sum(len(tokenizer.encode(text)) > LENGTH for text in texts):
        log(f"{cut} of {len(texts)} captions are cut: they have over {LENGTH} tokens")
    return tokenizer(texts).int()


def train_tokenizers(job: Job) -> None:
    """BPE for both CLIPs and Unigram for T5, from training captions.

    T5 has room for 250 letters: rarer ones it will read as unknown.
    """
    indices = torch.arange(job.recipe.captions, device=job.device)
    captions = job.scenes().batch(indices).captions
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        clip = CLIPTokenizer.train(captions, CLIP_VOCABULARY, LENGTH, pad)
        clip.save_pretrained(job.model / name)
    letters = {c for c, _ in Counter("".join(captions)).most_common(250)}
    known = ["".join(c if c in letters else " " for c in text) for text in captions]
    t5 = T5Tokenizer.train(known, T5Config.tiny().vocab_size, 32, LENGTH)
    t5.save_pretrained(job.model / "tokenizer_3")


# Text encoders


def train_clip(job: Job) -> None:
    """Both CLIP text encoders, contrastively against one picture tower."""
    images, captions, meaning = picture_pool(job.scenes(), job.recipe.pictures)
    ids_l, ids_g, _ = token_tables(job)

    def batch(indices: Tensor) -> dict[str, Tensor]:
        place = shuffled(indices, len(images))
        return {
            "images": from_bytes(images[place]),
            "ids_l": ids_l[captions[place]].long(),
            "ids_g": ids_g[captions[place]].long(),
            "meaning": meaning[place],
        }

    encoders = (
        CLIPTextEncoder(clip_config(0, job)),
        CLIPTextEncoder(clip_config(1, job)),
    )
    task = Task(CLIPTraining(*encoders), clip_loss, batch)
    model = learn(job, "clip", task)
    for encoder, folder in zip(model.text, ENCODERS, strict=False):
        export(job, encoder, folder)


def clip_config(number: int, job: Job) -> CLIPTextConfig:
    """The tiny configuration with the trained tokenizer's end token."""
    config = (CLIPTextConfig.tiny_l, CLIPTextConfig.tiny_g)[number]()
    tokenizers = loading.read_tokenizers(job.model, TOKENIZERS)
    end = tokenizers[number].eos_token_id
    return replace(config, vocab_size=CLIP_VOCABULARY, eos_token_id=end)


def train_t5(job: Job) -> None:
    """T5's encoder: odd samples restore hidden words, even ones say the same anew."""
    n = job.recipe.pictures
    scenes = job.scenes(job.recipe.two_garments)
    ids = token_tables(job)[2]
    tokenizer = T5Tokenizer.from_pretrained(job.model / "tokenizer_3")
    config = T5Config.tiny()
    sentinels = [tokenizer.sentinel_id(i) for i in range(3)]
    sentinels = torch.tensor(sentinels, device=job.device)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    every = torch.arange(n, device=job.device).split(2**16)
    captions = torch.cat([scenes.caption_pairs(part) for part in every])
    seed = key(job, "spans")

    def batch(indices: Tensor) -> dict[str, Tensor]:
        place = shuffled(indices, n)
        source, other = ids[captions[place]].long().unbind(1)  # (B, 2, L) → 2 × (B, L)
        hidden = choose_spans(rng.uniform(seed, indices, 4), source, pad)
        corrupted, target = corrupt_spans(source, hidden, sentinels, pad, eos)
        restore = (indices % 2 == 1)[:, None]
        return {
            "source": torch.where(restore, corrupted, source),
            "target": torch.where(restore, target, other),
        }

    task = Task(T5Training(T5Encoder(config)), t5_loss, batch)
    export(job, learn(job, "t5", task).encoder, ENCODERS[2])


# Autoencoder


class UncompiledUpsample(Upsample):
    """``Upsample``, left out of compilation.

    On a CPU, in bfloat16, PyTorch 2.13's inductor makes zeros of the gradient that
    flows back through nearest-neighbour upsampling: all layers before it stand still.
    """

    forward = torch.compiler.disable(Upsample.forward)


def compilable(vae: VAE) -> VAE:
    """The same autoencoder, safe to compile on a CPU."""
    for layer in vae.modules():
        if isinstance(layer, Upsample):
            layer.__class__ = UncompiledUpsample
    return vae


def train_vae(job: Job) -> None:
    """The autoencoder, and the shift and scale of its latents."""
    recipe, images = job.recipe, picture_pool(job.scenes(), job.recipe.pictures)[0]
    vae = begun(job, "vae").to(job.device, memory_format=torch.channels_last)
    vae = compilable(vae) if job.device == "cpu" else vae
    config = vae.config
    seed, side = key(job, "posterior"), images.shape[-1] // config.factor
    shape = (config.latent_channels, side, side)
    held = torch.arange(recipe.held, device=job.device)
    tests = job.scenes(split="test").batch(held).images
    means = latent_means(vae, images) if recipe.hold_latents else None

    def batch(indices: Tensor) -> Batch:
        place = shuffled(indices, len(images))
        known = {} if means is None else {"known": means[place].float()}
        noise = rng.normal(seed, indices, shape)
        return {"images": from_bytes(images[place]), "noise": noise} | known

    @torch.no_grad()
    def validate(vae: VAE) -> dict[str, float]:
        decoded = vae.decode(vae.encode(tests).mode())
        return {"psnr": psnr(decoded, tests).mean().item()}

    vae.encoder.requires_grad_(not recipe.keep_latents)
    holding = functools.partial(held_loss, weight=recipe.hold_latents)
    loss = holding if recipe.hold_latents else vae_loss
    vae = learn(job, "vae", Task(vae, loss, batch, validate))
    if not (recipe.keep_latents or recipe.hold_latents):
        vae = measured(vae, from_bytes(images[:1024]))
    export(job, vae, "vae")


def chunk_size(device: torch.device) -> int:
    """How many pictures are encoded at once: what the caches of ``device`` hold."""
    return 64 if device.type == "cpu" else 2048


@torch.no_grad()
def latent_means(vae: VAE, images: Tensor) -> Tensor:
    """float16 latents (n, C, h, w), not scaled, of ``images`` in bytes."""
    parts = images.split(chunk_size(images.device))
    return torch.cat([vae.encode(from_bytes(x)).mean.half() for x in parts])


def held_loss(vae: VAE, batch: Batch, weight: float) -> Tensor:
    """The loss of a ``vae`` whose means stay near ``batch["known"]`` (B, C, h, w).

    A transformer that has learned on these then fits what ``vae`` becomes.
    """
    posterior = vae.encode(batch["images"])  # once, for both terms
    encoded = SimpleNamespace(encode=lambda _: posterior, decode=vae.decode)
    distance = precise(posterior.mean) - batch["known"]
    return vae_loss(encoded, batch) + weight * distance.square().mean()


@torch.no_grad()
def measured(vae: VAE, images: Tensor) -> VAE:
    """The same weights with shift and scale that make latents of mean 0, variance 1."""
    latents = vae.encode(images).mode()
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    config = replace(vae.config, shift_factor=shift, scaling_factor=scale)
    copy = VAE(config).to(images.device)
    copy.load_state_dict(vae.state_dict())
    return copy.eval()


# Judge


def train_judge(job: Job) -> None:
    """The judge of ``minidiff evaluate``, under ``OUTPUT/judge``.

    All pairs are among its scenes, and both layouts as often: see its module.
    """
    scenes = Scenes("train", job.data, job.device, job.seed, held_out=None)
    tests = Scenes("test", job.data, job.device, job.seed, 0.0, held_out=None)

    def batch(indices: Tensor) -> dict[str, Tensor]:
        scene = scenes.batch(indices)
        images = scene.images.contiguous(memory_format=torch.channels_last)
        return {"images": images} | scene.attributes._asdict()

    def validate(judge: Judge) -> dict[str, float]:
        return {"one garment": accuracy(judge, tests, 4 * job.recipe.held)["all"]}

    model = Judge().to(memory_format=torch.channels_last)
    judge = learn(job, "judge", Task(model, judge_loss, batch, validate))
    if parallel.rank():
        return
    judge = judge.half().float()  # measured as it will be read back
    n = 20 * job.recipe.held
    measured, config = measure(judge, job.data, n), job.recipe.judge
    seen = config.steps * config.batch_size
    folder = job.output / "judge"
    save_judge(judge, folder, accuracy=measured, test_scenes=n, seen=seen)


# Transformer


class Features:
    """What the frozen models make of scenes: latents, and each caption's encodings.

    ``tables`` are the captions' ids (``token_tables``). Scene i has the row
    ``place[i]`` of ``context`` and ``pooled``; row 0 is the empty prompt's. With
    ``job.cache`` all is kept there, under a name made of what made it.
    """

    def __init__(
        self, job: Job, scenes: Scenes | Pictures, n: int, tables: list[Tensor]
    ) -> None:
        parts = ("vae", *ENCODERS)
        self.vae, *self.encoders = (load_part(job, name) for name in parts)
        path = job.cache and job.cache / self.name(scenes.content, tables, n)
        kept = cached(path, lambda: self.encode(scenes, tables, n), job.device)
        self.latents, self.place = kept["latents"], kept["place"]
        self.context, self.pooled = kept["context"], kept["pooled"]

    def name(self, content: tuple, tables: list[Tensor], n: int) -> str:
        """The file of these models' encodings of n scenes made of ``content``."""
        parts = (self.vae, *self.encoders)
        weights = [x for part in parts for x in part.state_dict().values()]
        return f"{fingerprint(*weights, *tables, *content, n)}.safetensors"

    def encode(
        self, scenes: Scenes | Pictures, tables: list[Tensor], n: int
    ) -> dict[str, Tensor]:
        """Latents, places, contexts and pooled vectors, as the attributes are."""
        latents, captions = encode_scenes(self.vae, scenes, n)
        # the empty prompt, the last row of the tables, is encoded too, as row 0 here
        empty = torch.tensor([len(tables[0]) - 1], device=captions.device)
        unique, place = captions.unique(return_inverse=True)
        rows = torch.cat([empty, unique])
        context, pooled = encode_captions(self.encoders, tables, rows)
        known = {"latents": latents, "place": place + 1}
        return known | {"context": context, "pooled": pooled}


@torch.no_grad()
def encode_scenes(vae: VAE, scenes: Scenes | Pictures, n: int) -> tuple[Tensor, Tensor]:
    """float16 latents (n, C, h, w), scaled, and caption numbers (n,) of n scenes."""
    device, latents, captions = scenes.device, [], []
    chunk = chunk_size(device)
    for start in range(0, n, chunk):
        batch = scenes.batch(torch.arange(start, min(n, start + chunk), device=device))
        with torch.autocast(device.type, torch.bfloat16):
            mode = vae.encode(batch.images).mode()
        latents.append(vae.scale(mode.float()).half())
        captions.append(batch.caption_ids)
    return torch.cat(latents), torch.cat(captions)


@torch.no_grad()
def encode_captions(
    encoders: list, tables: list[Tensor], rows: Tensor, chunk: int = 4096
) -> tuple[Tensor, Tensor]:
    """float16 contexts (N, 2·L, D) and pooled vectors (N, P) of captions ``rows``."""
    context, pooled = None, []
    for start in range(0, len(rows), chunk):
        ids = [table[rows[start : start + chunk]].long() for table in tables]
        (l, pooled_l), (g, pooled_g) = encoders[0](ids[0]), encoders[1](ids[1])
        part = assemble(l, g, encoders[2](ids[2])).half()
        if context is None:  # its gigabytes only once, not in parts beside the whole
            context = part.new_empty(len(rows), *part.shape[1:])
        context[start : start + chunk] = part
        pooled.append(torch.cat([pooled_l, pooled_g], -1).half())
    return context, torch.cat(pooled)


def train_transformer(job: Job) -> None:
    """The MMDiT, by rectified flow on latents and captions that are encoded once."""
    tables, scenes = token_tables(job), job.scenes(job.recipe.two_garments)
    features = Features(job, scenes, job.recipe.latents, tables)
    tests = job.scenes(split="test")
    held = Features(replace(job, cache=None), tests, job.recipe.held, tables)
    widths = tuple(e.config.hidden_size for e in features.encoders[:2])
    shape, seed = tuple(features.latents.shape[1:]), key(job, "noise")
    drops = key(job, "dropout")

    def batch(indices: Tensor) -> dict[str, Tensor]:
        place = shuffled(indices, len(features.latents))
        u = rng.uniform(drops, indices, 4)
        row = torch.where(u[:, 0] < 0.1, 0, features.place[place])  # row 0 is ""
        context, pooled = drop_encoders(
            features.context[row], features.pooled[row], u[:, 1:] >= 0.05, widths
        )
        known = {"x0": features.latents[place].float(), "context": context.float()}
        noise, sigma = noise_and_levels(indices, shape, seed)
        if job.recipe.uniform_levels:
            sigma = rng.uniform(seed + 1, indices, 1)[:, 0]
        sigma = shift_sigma(sigma, job.recipe.shift)
        return known | {"pooled": pooled.float(), "noise": noise, "sigma": sigma}

    fixed = {"x0": held.latents.float(), "context": held.context[held.place].float()}
    fixed["pooled"] = held.pooled[held.place].float()
    numbers = torch.arange(len(fixed["x0"]), device=job.device)
    fixed["noise"] = rng.normal(key(job, "validation"), numbers, shape)

    def validate(model: MMDiT) -> dict:
        losses = loss_by_level(model, fixed)
        save_grid(model, held, job.output / "grids" / f"{job.run.step:06}.png")
        return {"validation": sum(losses) / len(losses), "by_level": losses}

    model = begun(job, "transformer")
    if job.device == "cpu" and job.recipe.transformer.bfloat16:
        plain_attention(model)
    if job.recompute:
        recompute(model.joint_blocks)
    task = Task(model, transformer_loss, batch, validate)
    model = learn(job, "transformer", task)
    export(job, model, "transformer")
    finish(job)
    save_grid(model, held, job.output / "grid.png")


@torch.no_grad()
def save_grid(model: MMDiT, held: Features, file: Path, scale: float = 4.0) -> None:
    """Thirty-two held-out captions drawn in 28 steps, as one picture."""
    if parallel.rank():
        return
    columns = min(8, len(held.latents))
    n = min(32, len(held.latents) // columns * columns)
    device = held.latents.device
    row = torch.cat([held.place[:n], torch.zeros(n, dtype=torch.long, device=device)])
    context, pooled = held.context[row].float(), held.pooled[row].float()
    noise = rng.normal(0, torch.arange(n, device=device), held.latents.shape[1:])

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        v = model(torch.cat([x, x]), sigma.expand(2 * n), context, pooled)
        positive, negative = v.chunk(2)
        return guide(negative, positive, scale)

    x = euler(velocity, noise, Scheduler(shift=1.0).sigmas(28).to(device))
    images = held.vae.decode(held.vae.unscale(x)).clamp(-1, 1)
    save_sheet((images + 1) / 2, columns, file)


# All stages


def begun(job: Job, name: str) -> torch.nn.Module:
    """A part to train: its tiny configuration, or what ``job.start`` has learned."""
    kind, config = loading.PARTS[name]
    if job.start is None:
        return kind(config.tiny())
    model = load_component(kind, config, job.start / name)
    for parameter in model.parameters():  # it may be a read-only memory map
        parameter.data = parameter.data.clone()
    return model


def learn(job: Job, stage: str, task: Task) -> torch.nn.Module:
    """Fit one stage in its own folder."""
    config = getattr(job.recipe, stage)
    with attention_to_train(job.device, config.bfloat16):
        return fit(task, config, job.run, job.device)


class PlainAttention(JointAttention):
    """Joint attention in two products with a softmax between.

    In bfloat16 on a CPU that is the fastest to go back through: PyTorch's fused form is
    slow there, and its own plain form (``SDPBackend.MATH``) multiplies in float32. The
    scale stands before the products, where inductor does not take them for the fused
    form.
    """

    def forward(self, context: Heads, image: Heads) -> tuple[Tensor, Tensor]:
        pairs = zip(context, image, strict=True)
        q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in pairs)
        weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1).to(v.dtype)
        out = (weights @ v).transpose(1, 2).flatten(2)
        length = context.q.shape[1]
        return out[:, :length].contiguous(), out[:, length:].contiguous()


def plain_attention(model: MMDiT) -> MMDiT:
    """The same transformer, faster to train on a CPU."""
    for layer in model.modules():
        if isinstance(layer, JointAttention):
            layer.__class__ = PlainAttention
    return model


def attention_to_train(device: str, bfloat16: bool) -> AbstractContextManager:
    """PyTorch's own choice, but plain products for bfloat16 on a CPU.

    The fused form is slow there on the way back.
    """
    slow = device == "cpu" and bfloat16
    return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()


def begin(job: Job, stage: str) -> Run:
    """A stage's folder; what differs from a run that was begun there is named."""
    settings = {"stage": stage, "seed": job.seed, **samples(job)}
    if stage == "tokenizers":
        kept = ("stage", "seed", "scenes", "data", "captions")
        settings = {name: settings[name] for name in kept}
        return Run(job.output / "runs" / stage, settings)
    settings |= lasting(getattr(job.recipe, stage))
    began = begun(job, stage).state_dict().values() if job.start else ()
    settings["began"] = fingerprint(*began) if began else None
    if stage == "transformer":
        settings["encoders"] = encoders_name(job)
    return Run(job.output / "runs" / stage, settings)


def encoders_name(job: Job) -> str:
    """A short name for what makes the transformer's latents and contexts."""
    vae, *encoders = (load_part(job, name) for name in ("vae", *ENCODERS))
    parts = (vae.encoder, *encoders)
    weights = [x for part in parts for x in part.state_dict().values()]
    return fingerprint(*weights, vae.config)


def samples(job: Job) -> dict:
    """The settings that change what is learned from, the same for all stages."""
    values = {f.name: getattr(job.recipe, f.name) for f in fields(Recipe)}
    values = {k: v for k, v in values.items() if not isinstance(v, TrainingConfig)}
    del values["held"]  # not learned from
    if job.recipe.scenes in SCENES:
        return values | {"data": fingerprint(*fashion_mnist("train", job.data))}
    content = job.scenes().content
    return values | {"scenes": "pictures", "data": fingerprint(*content)}


def export(job: Job, model: torch.nn.Module, name: str) -> None:
    """Write one component of the hub's layout in float16."""
    if parallel.rank():
        return
    save_component(model, job.model / name, layout.MODELS[name], torch.float16)
    if name in ENCODERS:  # the special ids that transformers' configurations state
        tokenizers = loading.read_tokenizers(job.model, TOKENIZERS)
        tokenizer = tokenizers[ENCODERS.index(name)]
        path = job.model / name / "config.json"
        ids = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id")}
        ids["pad_token_id"] = tokenizer.pad_token_id
        known = {k: v for k, v in ids.items() if v is not None}
        write_json(path, read_json(path) | known)


def finish(job: Job) -> None:
    """The two files that make a folder of components a pipeline."""
    if parallel.rank():
        return
    layout.save_scheduler(Scheduler(shift=1.0), job.model / "scheduler")
    index = layout.pipeline_index((*loading.PARTS, *TOKENIZERS))
    write_json(job.model / "model_index.json", index)


def load_part(job: Job, name: str) -> torch.nn.Module:
    """The exported component of that name."""
    kind, config = loading.PARTS[name]
    return load_component(kind, config, job.model / name, job.device)


RUN = {
    "tokenizers": train_tokenizers,
    "clip": train_clip,
    "t5": train_t5,
    "vae": train_vae,
    "judge": train_judge,
    "transformer": train_transformer,
}


GOES_ON = ("vae", "transformer")  # stages that can begin with a model's weights
COPIED = ("tokenizers", "clip", "t5")  # whose results they leave as they are
ALONE = ("tokenizers",)  # stages that one process does for all


def run_stages(job: Job, stages: tuple[str, ...]) -> None:
    """Run ``stages`` in order; one that is done already is left alone.

    ValueError for one that was done with other settings.
    """
    for stage in stages:
        done = job.output / "runs" / f"{stage}.done"
        finished, folder = done.exists(), begin(job, stage)
        parallel.wait()  # nobody begins before all have looked
        if finished:
            folder.check()
            log(f"{stage}: was done before")
            continue
        start = time.time()
        torch.manual_seed(job.seed)
        with folder as run:
            if stage not in ALONE or parallel.rank() == 0:
                RUN[stage](replace(job, run=run))
        if parallel.rank() == 0:
            done.parent.mkdir(parents=True, exist_ok=True)
            write_text(done, json.dumps({"seconds": round(time.time() - start, 1)}))
        log(f"{stage}: done in {time.time() - start:.0f} s")
        parallel.wait()


def choose_stages(stage: str, start: Path | None, scenes: str) -> tuple[str, ...]:
    """The stages that ``stage`` names: one, or "all" that there are."""
    possible, case = STAGES, ""
    if start:
        possible, case = GOES_ON, " with --start"
    elif scenes != "composed":  # the judge reads what only composed scenes have
        possible = tuple(s for s in STAGES if s != "judge")
        case = " with plain scenes" if scenes == "plain" else " with your pictures"
    if stage not in (*possible, "all"):
        known = ", ".join(possible)
        raise ValueError(f"--stage is {stage!r}; expected all, {known}{case}")
    return possible if stage == "all" else (stage,)


POOLS = ("pictures", "latents", "captions")

NEEDS = {
    "clip": TOKENIZERS,
    "t5": TOKENIZERS,
    "transformer": (*TOKENIZERS, *ENCODERS, "vae"),
}


def check_needs(stage: str, model: Path) -> None:
    """Raise ValueError where a stage alone lacks what others make before it."""
    for name in NEEDS.get(stage, ()):
        if not (model / name).is_dir():
            raise ValueError(
                f"--stage {stage} needs {model / name}, which is not there; "
                "expected --stage all, or the stages before it first"
            )


def check_batches(recipe: Recipe, stages: tuple[str, ...]) -> None:
    """Raise ValueError where a stage's batch cannot be cut into its parts."""
    for stage in stages:
        if c := getattr(recipe, stage, None):
            check_batch(c.steps, c.batch_size, c.accumulation * parallel.size())


def log(line: str) -> None:
    """Print ``line`` once, however many processes train."""
    if parallel.rank() == 0:
        print(printable(line), flush=True)


def open_start(start: Path) -> Path:
    """The folder of the model to go on from; ValueError unless all of it is whole."""
    folder = TINY if str(start) == "tiny" else start
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"--start is {start}; expected tiny, or a model's folder")
    parts = loading.open_folder(folder).parts
    if "text_encoder_3" not in parts:
        raise ValueError(f"--start is {start}, which lacks T5; expected all encoders")
    check_side(parts["transformer"].model, parts["vae"].model)
    return folder


PIPELINE = ("model_index.json", "scheduler", *TOKENIZERS, *loading.PARTS)


def files_of(path: Path) -> list[Path]:
    """The file ``path``, or the files of this folder, none below."""
    return [path] if path.is_file() else [p for p in path.iterdir() if p.is_file()]


def copy_start(job: Job) -> None:
    """Copy the model to go on from to where this job's stands, whole or not at all.

    Raises ValueError where another model stands already.
    """
    (job.output / "runs").mkdir(exist_ok=True)  # first: the model is known by it
    if not job.model.exists():
        part = job.output / ".model.part"
        shutil.rmtree(part, ignore_errors=True)
        names = [name for name in PIPELINE if (job.start / name).exists()]
        for path in [p for n in names for p in files_of(job.start / n)]:
            copy = part / path.relative_to(job.start)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)  # without its mode: it may be read-only
        part.replace(job.model)
    for name in (*TOKENIZERS, *ENCODERS):
        here, there = job.model / name, job.start / name
        files = [path.name for path in files_of(there)]
        if filecmp.cmpfiles(here, there, files, shallow=False)[0] != files:
            raise ValueError(
                f"{here} is not {job.start}'s: expected another --output, or the "
                "model that it began with"
            )
    for stage in COPIED:
        write_text(job.output / "runs" / f"{stage}.done", json.dumps(str(job.start)))


def limited(recipe: Recipe, seed: int, crop: bool) -> Recipe:
    """The recipe with no more samples than its folder of pictures has."""
    seen, held = (
        len(Pictures(split, recipe.scenes, seed=seed, crop=crop))
        for split in ("train", "test")
    )
    sizes = {name: min(getattr(recipe, name), seen) for name in POOLS}
    return replace(recipe, held=min(recipe.held, held), **sizes)


def check_latents(recipe: Recipe, none: bool) -> None:
    """Raise ValueError for latents that are to be kept or held where there are none."""
    if recipe.keep_latents and recipe.hold_latents:
        raise ValueError("the recipe has keep_latents and hold_latents; expected one")
    if none and (recipe.keep_latents or recipe.hold_latents):
        raise ValueError(
            "the recipe keeps or holds a model's latents; expected --start"
        )


def train(
    stage: str,
    output: Path,
    data: Path | None = None,
    device: str = "cpu",
    recipe: str | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    compile: bool | None = None,
    start: Path | None = None,
    scenes: str | None = None,
    recompute: bool = False,
    seed: int = 0,
    crop: bool = True,
) -> None:
    """``minidiff train``: one stage, or "all" that are not done yet, into ``output``.

    ``start`` names a folder of a model to go on from: its tokenizers and text encoders
    stay, its autoencoder and transformer learn on. ``scenes``: "composed", "plain" or
    a folder of pictures with captions, for the recipe's; ``crop`` takes their middle,
    or squeezes them. ``recompute`` trains the transformer with less memory. ``seed``
    decides what is drawn by chance: other scenes, another order, other noise.

    ``recipe`` is "gpu" (large batches, for a large GPU), "shipped" (what began the
    shipped model, an hour and a half of two CPU cores), "longer", "further", "muon" and
    "details" (what went on with it, with ``start``), "trial" (a few steps of
    everything) or a JSON file (see ``find_recipe``); by default "gpu" on a GPU, else
    "shipped". Raises ValueError for a name or a number that cannot be.
    """
    cuda = device.startswith("cuda")
    chosen = find_recipe(recipe or ("gpu" if cuda else "shipped"), cuda)
    chosen = replace(chosen, scenes=scenes or chosen.scenes)
    own = chosen.scenes not in SCENES
    if own and not Path(chosen.scenes).is_dir():
        known = ", ".join(SCENES)
        raise ValueError(
            f"scenes is {chosen.scenes!r}; expected {known}, or a folder of pictures"
        )
    check_range("--seed", seed, 0, 2**63 - 1)
    stages = choose_stages(stage, start, chosen.scenes)
    size = {"steps": steps, "batch_size": batch_size}
    size = {name: value for name, value in size.items() if value is not None}
    if size and stage not in STAGES[1:]:
        raise ValueError("--steps and --batch-size need a --stage that has them")
    compiled = {} if compile is None else {"compile": compile}
    changes = {name: compiled | (size if name == stage else {}) for name in STAGES[1:]}
    chosen = changed(chosen, changes, "the command line")
    check_latents(chosen, "vae" in stages and start is None)
    start = start and open_start(start)
    check_needs(stage, start or output / "model")
    device = parallel.start(device)
    check_batches(chosen, stages)
    check_folder(output)
    check_other(output, "runs", "run")
    parallel.wait()
    if own:
        chosen = limited(chosen, seed, crop)
    else:
        for split in ("train", "test"):
            fashion_mnist(split, data)
    cache = None if cuda else output / "cache"  # a GPU encodes as fast as a disk reads
    parts = {"start": start, "recompute": recompute, "seed": seed, "crop": crop}
    job = Job(output, chosen, data and str(data), device, cache, **parts)
    if start and parallel.rank() == 0:
        copy_start(job)
    parallel.wait()
    run_stages(job, stages)
