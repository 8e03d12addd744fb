"""Attention's measure: does a word look where its garment is?"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.attention import record_attention
from minidiff.data.rng import fold_in, normal
from minidiff.data.samples import ONE
from minidiff.data.scenes import COLORS, KINDS, Attributes, World
from minidiff.judging.distances import correlation
from minidiff.judging.judge import EVALUATION_SEED


def word_positions(tokenizer: Any, text: str, start: int) -> list[list[int]]:
    """The positions of each word's tokens in ``tokenizer``'s ids of ``text``."""
    positions: list[list[int]] = []
    for word in text.split():
        length = len(tokenizer.encode(word)) - start - 1
        first = positions[-1][-1] + 1 if positions else start
        positions.append(list(range(first, first + length)))
    return positions


@torch.no_grad()
def attention_correlation(
    pipe: Any,
    n: int = 64,
    sigma: float = 0.6,
    folder: str | Path | None = None,
    seed: int = EVALUATION_SEED,
) -> dict[str, dict[str, list[float]]]:
    """Does a word look where its garment is? Mean correlation in every block.

    Real one-garment test scenes are noised to ``sigma`` and shown to the transformer
    with their captions; each word's map over the patches is correlated with the
    garment's opacity.

    Returns:
        For "T5 color", "T5 garment", "T5 background" (if there is T5), "CLIP color", …:
        lists over the blocks, "image to text" (patches ask, the word answers) and "text
        to image".
    """
    weight = next(pipe.transformer.parameters())
    scenes = World("test", folder, weight.device, seed, layouts=ONE, garments=1.0)
    batch = scenes.batch(torch.arange(n))
    texts = plain_captions(batch.attributes)
    context, pooled = pipe.encode_prompt(texts)
    x0 = pipe.vae.scale(pipe.vae.encode(batch.images.to(weight.dtype)).mode())
    noise = normal(fold_in(seed, 3), torch.arange(n), x0.shape[1:], weight.device)
    x = ((1 - sigma) * x0 + sigma * noise).to(weight.dtype)
    with record_attention(pipe.transformer, average_heads=True) as maps:
        pipe.transformer(x, torch.full((n,), sigma).to(weight), context, pooled)
    patch = 64 // int((maps[0][0].shape[-1] - context.shape[1]) ** 0.5)
    masks = F.avg_pool2d(batch.masks[:, :1], patch).flatten(1).cpu()  # (n, patches)
    words: dict[str, list[list[int]]] = {k: [] for k in word_rows(pipe, texts[0])}
    for text in texts:
        for name, row in word_rows(pipe, text).items():
            words[name].append(row)
    return {
        name: directions(maps, rows, masks, context.shape[1])
        for name, rows in words.items()
    }


def plain_captions(shown: Attributes) -> list[str]:
    """One sentence a scene, always built alike, that names all but size and place."""
    numbers = shown.colors[:, 0], shown.kinds[:, 0], shown.ground
    names = list(COLORS)
    return [
        f"the {names[color]} {KINDS[kind]} on a {names[ground]} background"
        for color, kind, ground in zip(*(x.tolist() for x in numbers), strict=True)
    ]


def word_rows(pipe: Any, text: str) -> dict[str, list[int]]:
    """Rows of the context that belong to the colour, the garment, the background."""
    clip, _, t5 = pipe.tokenizers
    found = {"CLIP": word_positions(clip, text, 1)}
    if t5:
        behind = clip.model_max_length
        places = word_positions(t5, text, 0)
        found["T5"] = [[behind + i for i in place] for place in places]
    parts = {
        "color": slice(1, 2),
        "garment": slice(2, -4),
        "background": slice(-2, -1),
    }
    return {
        f"{encoder} {name}": [row for rows in positions[place] for row in rows]
        for encoder, positions in found.items()
        for name, place in parts.items()
    }


def directions(
    maps: dict[int, list[Tensor]], rows: list[list[int]], masks: Tensor, length: int
) -> dict[str, list[float]]:
    """Correlations in both directions, per block; text comes before ``length``."""
    found: dict[str, list[float]] = {"image to text": [], "text to image": []}
    for block in sorted(maps):
        (weights,) = maps[block]  # (n, tokens, tokens)
        asked = [w[length:, r].mean(1) for w, r in zip(weights, rows, strict=True)]
        asks = [w[r, length:].mean(0) for w, r in zip(weights, rows, strict=True)]
        for name, picked in zip(found, (asked, asks), strict=True):
            mean = correlation(torch.stack(picked), masks).mean().item()
            found[name].append(round(mean, 3))
    return found
