"""The stages that learn from captions: tokenizers, both CLIPs, and T5."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from minidiff.data import rng
from minidiff.data.told import ToldScenes
from minidiff.files.layout import ENCODERS
from minidiff.files.pictures import from_bytes, to_bytes
from minidiff.files.sentencepiece import case_folding
from minidiff.learning.run import cached, fingerprint
from minidiff.recipes.features import collect, place_in_pool
from minidiff.recipes.job import (
    LENGTH,
    AnyScenes,
    Job,
    Lesson,
    announce,
    export_part,
)
from minidiff.text_encoders import CLIPTextConfig, CLIPTextEncoder, T5Config, T5Encoder
from minidiff.tokenizer import CLIPTokenizer, T5Tokenizer
from minidiff.training import (
    Batch,
    CLIPTraining,
    T5Training,
    Task,
    choose_spans,
    clip_loss,
    corrupt_spans,
    t5_loss,
)


def train_tokenizers(job: Job) -> None:
    """BPE for both CLIPs and Unigram for T5, from training captions.

    T5 has room for 250 letters: rarer ones it will read as unknown. Capitals it reads
    as small letters, as CLIP does.
    """
    indices = torch.arange(job.recipe.captions, device=job.device)
    scenes = job.scenes()
    if isinstance(scenes, ToldScenes):  # its captions need no pictures
        captions = scenes.describe(indices)[0]
    else:
        captions = scenes.batch(indices).captions
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        clip = CLIPTokenizer.train(
            captions, CLIPTextConfig.tiny_l().vocab_size, LENGTH, pad
        )
        clip.save_pretrained(job.model / name)
    letters = {c for c, _ in Counter("".join(captions)).most_common(250)}
    known = ["".join(c if c in letters else " " for c in text) for text in captions]
    small = [text.lower() for text in known]
    t5 = T5Tokenizer.train(small, T5Config.tiny().vocab_size, 32, LENGTH)
    t5 = T5Tokenizer(t5.scores, case_folding(), t5.settings)
    t5.save_pretrained(job.model / "tokenizer_3")


def token_tables(job: Job) -> list[Tensor]:
    """Ids of every caption by each tokenizer, (captions + 1, L); the last row is ""."""
    tokenizers, scenes = job.read_tokenizers(), job.scenes()

    def make() -> dict[str, Tensor]:
        texts = scenes.all_captions()
        tables = [torch.cat([encode_all(t, texts), t([""]).int()]) for t in tokenizers]
        return {str(i): table for i, table in enumerate(tables)}

    path = None
    if job.cache:  # many captions: they take minutes
        pieces = [list(tokenizer.vocab) for tokenizer in tokenizers]
        path = job.cache / f"{fingerprint(*scenes.content, *pieces)}.safetensors"
    return [x for _, x in sorted(cached(path, make, job.device).items())]


def encode_all(tokenizer: CLIPTokenizer | T5Tokenizer, texts: list[str]) -> Tensor:
    """Token ids of any ``texts`` (N, L); how many had to be cut is told."""
    if cut := sum(len(tokenizer.encode(text)) > LENGTH for text in texts):
        announce(
            f"{cut} of {len(texts)} captions are cut: they have over {LENGTH} tokens"
        )
    return tokenizer(texts).int()


@torch.no_grad()
def picture_pool(scenes: AnyScenes, n: int, chunk: int = 64) -> tuple[Tensor, ...]:
    """Scenes 0 … n − 1: pictures uint8 (n, 3, 64, 64), captions and meanings (n,)."""

    def parts() -> Iterator[tuple[Tensor, ...]]:
        for start in range(0, n, chunk):
            numbers = torch.arange(start, min(n, start + chunk), device=scenes.device)
            batch = scenes.batch(numbers)
            yield to_bytes(batch.images), batch.caption_ids, batch.meanings

    return collect(n, parts())


def by_color(images: Tensor) -> Tensor:
    """An order of pictures, bytes (N, 3, H, W), in which neighbours have like colours.

    Theirs is the mean colour, each channel in 16 levels.
    """
    levels = [x.float().mean((2, 3)).long() // 16 for x in images.split(1024)]
    key = torch.cat(levels) @ torch.tensor([256, 16, 1], device=images.device)
    return key.argsort(stable=True)


def alike_or_not(indices: Tensor, order: Tensor, size: int) -> Tensor:
    """Places in the pool for samples ``indices``, in batches of ``size``.

    Every other batch holds neighbours in ``order``: where all pictures have the same
    colours, captions are told apart by what they name.
    """
    n, batch = len(order), indices // size
    block = place_in_pool(batch // 2, max(n // size, 1))
    alike = order[(block * size + indices % size) % n]
    return torch.where(batch % 2 == 1, alike, place_in_pool(indices, n))


def clip_lesson(job: Job) -> Lesson:
    """Both CLIP text encoders, contrastively against one picture tower."""
    images, _, meaning = picture_pool(job.scenes(), job.recipe.pictures)
    ids_l, ids_g, _ = token_tables(job)
    pairs = caption_pairs(job)
    order, size = by_color(images), job.recipe.clip.batch_size

    def batch(indices: Tensor) -> Batch:
        place = alike_or_not(indices, order, size)
        return {
            "images": from_bytes(images[place]),
            "ids_l": ids_l[pairs[place]].long(),  # (B, 2, L)
            "ids_g": ids_g[pairs[place]].long(),
            "meaning": meaning[place],
        }

    def export(model: CLIPTraining) -> None:
        for encoder, folder in zip(model.text, ENCODERS, strict=False):
            export_part(job, encoder, folder)

    encoders = [CLIPTextEncoder(config) for config in clip_configs(job)]
    return Lesson(Task(CLIPTraining(*encoders), clip_loss, batch), export)


def clip_configs(job: Job) -> list[CLIPTextConfig]:
    """The tiny configurations with the trained tokenizers' end tokens."""
    return [
        replace(config, eos_token_id=tokenizer.eos_token_id)
        for config, tokenizer in zip(
            (CLIPTextConfig.tiny_l(), CLIPTextConfig.tiny_g()),
            job.read_tokenizers(),
            strict=False,
        )
    ]


def caption_pairs(job: Job) -> Tensor:
    """The numbers of two captions of each scene that say the same, (pictures, 2)."""
    n, scenes = job.recipe.pictures, job.scenes()
    every = torch.arange(n, device=job.device).split(2**16)
    return collect(n, ((scenes.caption_pairs(part),) for part in every))[0]


def t5_lesson(job: Job) -> Lesson:
    """T5's encoder: odd samples restore hidden words, even ones say the same anew."""
    n = job.recipe.pictures
    ids = token_tables(job)[2]
    tokenizer = T5Tokenizer.from_pretrained(job.model / "tokenizer_3")
    marks = [tokenizer.sentinel_id(i) for i in range(3)]
    sentinels = torch.tensor(marks, device=job.device)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    captions = caption_pairs(job)
    seed = job.seed_for("spans")

    def batch(indices: Tensor) -> Batch:
        place = place_in_pool(indices, n)
        source, other = ids[captions[place]].long().unbind(1)  # (B, 2, L) → 2 × (B, L)
        hidden = choose_spans(rng.uniform(seed, indices, 4), source, pad)
        corrupted, target = corrupt_spans(source, hidden, sentinels, pad, eos)
        restore = (indices % 2 == 1)[:, None]
        return {
            "source": torch.where(restore, corrupted, source),
            "target": torch.where(restore, target, other),
        }

    def export(model: T5Training) -> None:
        export_part(job, model.encoder, "text_encoder_3")

    encoder = T5Encoder(T5Config.tiny())
    return Lesson(Task(T5Training(encoder), t5_loss, batch), export)
