"""The stages that learn from captions: tokenizers, both CLIPs, and T5."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from minidiff.data import rng
from minidiff.data.captioned import Pictures
from minidiff.data.garments import Scenes, token_table
from minidiff.data.told import ToldScenes
from minidiff.files.layout import ENCODERS
from minidiff.files.pictures import from_bytes, to_bytes
from minidiff.files.sentencepiece import case_folding
from minidiff.learning.run import cached, fingerprint
from minidiff.recipes.features import collect, place_in_pool
from minidiff.recipes.job import LENGTH, VOCABULARY, Job, Lesson, announce, export_part
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

CLIP_VOCABULARY = 704  # rows of the table: 512 bytes, then merges and two markers


def train_tokenizers(job: Job) -> None:
    """BPE for both CLIPs and Unigram for T5, from training captions.

    T5 has room for 250 letters: rarer ones it will read as unknown.
    """
    indices = torch.arange(job.recipe.captions, device=job.device)
    scenes = job.scenes()
    if isinstance(scenes, ToldScenes):  # its captions need no pictures
        captions = scenes.describe(indices)[0]
    else:
        captions = scenes.batch(indices).captions
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        clip = CLIPTokenizer.train(captions, clip_vocabulary(job), LENGTH, pad)
        clip.save_pretrained(job.model / name)
    letters = {c for c, _ in Counter("".join(captions)).most_common(250)}
    known = ["".join(c if c in letters else " " for c in text) for text in captions]
    known = [text.lower() for text in known] if job.world else known
    t5 = T5Tokenizer.train(known, job.tiny(T5Config).vocab_size, 32, LENGTH)
    if job.world:  # capitals are read as small letters, as CLIP reads them
        t5 = T5Tokenizer(t5.scores, case_folding(), t5.settings)
    t5.save_pretrained(job.model / "tokenizer_3")


def token_tables(job: Job) -> list[Tensor]:
    """Ids of every caption by each tokenizer, (captions + 1, L); the last row is ""."""
    tokenizers, scenes = job.read_tokenizers(), job.scenes()
    encode = token_table if job.composed else encode_all

    def make() -> dict[str, Tensor]:
        texts = scenes.all_captions()
        tables = [torch.cat([encode(t, texts), t([""]).int()]) for t in tokenizers]
        return {str(i): table for i, table in enumerate(tables)}

    path = None
    if job.world and job.cache:  # many captions: they take minutes
        pieces = [list(tokenizer.vocab) for tokenizer in tokenizers]
        path = job.cache / f"{fingerprint(*scenes.content, *pieces)}.safetensors"
    return [x for _, x in sorted(cached(path, make, job.device).items())]


def clip_vocabulary(job: Job) -> int:
    """Rows of a CLIP's table."""
    return VOCABULARY if job.world else CLIP_VOCABULARY


def encode_all(tokenizer: CLIPTokenizer | T5Tokenizer, texts: list[str]) -> Tensor:
    """Token ids of any ``texts`` (N, L); how many had to be cut is told."""
    if cut := sum(len(tokenizer.encode(text)) > LENGTH for text in texts):
        announce(
            f"{cut} of {len(texts)} captions are cut: they have over {LENGTH} tokens"
        )
    return tokenizer(texts).int()


@torch.no_grad()
def picture_pool(
    scenes: Scenes | ToldScenes | Pictures, n: int, chunk: int = 64
) -> tuple[Tensor, ...]:
    """Scenes 0 … n − 1: pictures uint8 (n, 3, 64, 64), captions and meanings (n,)."""

    def parts() -> Iterator[tuple[Tensor, ...]]:
        for start in range(0, n, chunk):
            numbers = torch.arange(start, min(n, start + chunk), device=scenes.device)
            batch = scenes.batch(numbers)
            yield to_bytes(batch.images), batch.caption_ids, batch.meanings

    return collect(n, parts())


def clip_lesson(job: Job) -> Lesson:
    """Both CLIP text encoders, contrastively against one picture tower."""
    images, captions, meaning = picture_pool(job.scenes(), job.recipe.pictures)
    ids_l, ids_g, _ = token_tables(job)

    def batch(indices: Tensor) -> Batch:
        place = place_in_pool(indices, len(images))
        return {
            "images": from_bytes(images[place]),
            "ids_l": ids_l[captions[place]].long(),
            "ids_g": ids_g[captions[place]].long(),
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
        replace(
            config,
            vocab_size=clip_vocabulary(job),
            eos_token_id=tokenizer.eos_token_id,
        )
        for config, tokenizer in zip(
            (CLIPTextConfig.tiny_l(), CLIPTextConfig.tiny_g()),
            job.read_tokenizers(),
            strict=False,
        )
    ]


def t5_lesson(job: Job) -> Lesson:
    """T5's encoder: odd samples restore hidden words, even ones say the same anew."""
    n = job.recipe.pictures
    scenes = job.scenes(job.recipe.two_garments)
    ids = token_tables(job)[2]
    tokenizer = T5Tokenizer.from_pretrained(job.model / "tokenizer_3")
    marks = [tokenizer.sentinel_id(i) for i in range(3)]
    sentinels = torch.tensor(marks, device=job.device)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    every = torch.arange(n, device=job.device).split(2**16)
    captions = collect(n, ((scenes.caption_pairs(part),) for part in every))[0]
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

    encoder = T5Encoder(job.tiny(T5Config))
    return Lesson(Task(T5Training(encoder), t5_loss, batch), export)
