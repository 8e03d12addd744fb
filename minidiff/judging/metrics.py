"""How good is the model: prompts followed, Fréchet distance, PSNR, attention.

Every figure is set beside the same figure of real test scenes: the judge is no oracle,
and what it gets wrong on real pictures is the ceiling for generated ones.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.data.garments import IMAGE_SIZE, Scenes, captions, prompts
from minidiff.data.rng import fold_in, normal
from minidiff.interface.checks import check_range
from minidiff.judging.inception import InceptionV3
from minidiff.judging.judge import EVALUATION_SEED, Judge, load_judge, score

Folder = str | Path | None  # of the data set: see ``minidiff.data.garments``
Extract = Callable[[Tensor], Tensor]  # pictures (B, 3, 64, 64) → features (B, D)
FEATURES = "the judge's last hidden layer", "Inception-v3's last pool (FID)"
ROWS = {
    "one garment, seen pairs": ("one", False),
    "one garment, pair never trained": ("one", True),
    "two garments, seen pairs": ("two", False),
    "two garments, one never trained": ("two", True),
}


def choose_rows(garments: str) -> tuple[str, ...]:
    """The rows with "one" or "two" garments, or "all"."""
    if garments not in ("one", "two", "all"):
        raise ValueError(f"garments is {garments!r}, expected one, two or all")
    return tuple(r for r, (kind, _) in ROWS.items() if garments in (kind, "all"))


# Distances


def _root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric positive semi-definite matrix (D, D)."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to features (N, D) and (M, D).

    ‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2 (C₁ C₂)^½), in float64 (Heusel et al. 2017, equation 6;
    Dowson and Landau 1982). C₁ C₂ has the eigenvalues of the symmetric C₁^½ C₂ C₁^½,
    whose root is real and stable where that of C₁ C₂ itself need not be. The result
    depends on the features and on N and M: name all three beside it.

    Raises:
        ValueError: shapes that do not fit, fewer than two rows, or values not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features are {tuple(a.shape)} and {tuple(b.shape)}")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} rows, expected at least two of each")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features are not finite")
    a, b = a.cpu().double(), b.cpu().double()  # not every GPU can
    first, second = (torch.atleast_2d(x.T.cov()) for x in (a, b))
    root = _root(first)
    product = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0)
    spread = a.var(0).sum() + b.var(0).sum() - 2 * product.sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + spread).clamp(min=0).item()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of pictures (B, C, H, W) in [−1, 1]."""
    difference = (a.clamp(-1, 1) - b.clamp(-1, 1)).cpu().double()  # not every GPU can
    error = difference.square().mean((1, 2, 3))
    return 10 * (4 / error).log10()  # peak to peak, 2² = 4


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation (…) of the last dimension of ``a`` and ``b`` (…, N)."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)


# Real scenes and generated ones


def _scenes(
    kind: str,
    held_out: bool,
    split: str,
    folder: Folder,
    device: torch.device,
    seed: int,
) -> Scenes:
    return Scenes(split, folder, device, seed, float(kind == "two"), held_out)


def _average(scores: list[dict[str, Tensor]]) -> dict[str, float]:
    """Shares of right pictures, by what is asked of them."""
    names = scores[0]
    means = {k: torch.cat([s[k] for s in scores]).cpu().double().mean() for k in names}
    return {k: round(v.item(), 4) for k, v in means.items()}


@torch.no_grad()
def generate(
    pipe: Any, texts: list[str], indices: Tensor, seed: int, **options: Any
) -> Tensor:
    """Pictures (B, 3, H, W) in [−1, 1], the noise of each a function of its index."""
    config, weight = pipe.transformer.config, next(pipe.transformer.parameters())
    shape = (config.in_channels, config.sample_size, config.sample_size)
    latents = normal(fold_in(seed, 1), indices, shape, weight.device)
    latents = latents.to(weight.dtype)
    images = pipe(texts, latents=latents, output_type="pt", **options)
    return images.float() * 2 - 1


@torch.no_grad()
def evaluate_row(
    pipe: Any,
    judge: Judge,
    extract: Extract,
    row: str,
    n: int,
    seed: int,
    folder: Folder,
    batch: int,
    **options: Any,
) -> tuple[dict, dict[str, Tensor]]:
    """One row of the table, and the features (n, D) that its pictures gave.

    Real scenes and prompts have the same attributes: those of ``seed``.
    """
    device, (kind, held_out) = next(judge.parameters()).device, ROWS[row]
    texts, wanted = prompts(n, kind, held_out, seed)
    scenes = _scenes(kind, held_out, "test", folder, device, seed)
    scores, features = {"real": [], "model": []}, {"real": [], "model": []}
    for i in torch.arange(n).split(batch):
        part = [texts[j] for j in i]
        pictures = {
            "real": scenes.batch(i).images,
            "model": generate(pipe, part, i, seed, **options).to(device),
        }
        for name, images in pictures.items():
            scores[name].append(score(judge(images), wanted.select(i).to(device)))
            features[name].append(extract(images))
    means = {name: _average(s) for name, s in scores.items()}
    return means, {name: torch.cat(f) for name, f in features.items()}


@torch.no_grad()
def reconstructions(
    pipe: Any, extract: Extract, n: int, seed: int, folder: Folder, batch: int
) -> tuple[float, Tensor]:
    """Mean PSNR of the VAE on n test scenes, half with one garment, and features."""
    weight = next(pipe.vae.parameters())
    ratios, features = [], []
    for kind in ("one", "two"):
        scenes = _scenes(kind, False, "test", folder, weight.device, seed)
        for i in torch.arange(n // 2).split(batch):
            images = scenes.batch(i).images
            decoded = pipe.vae.decode(pipe.vae.encode(images.to(weight.dtype)).mode())
            decoded = decoded.float().clamp(-1, 1)
            ratios.append(psnr(decoded, images))
            features.append(extract(decoded))
    return torch.cat(ratios).mean().item(), torch.cat(features)


@torch.no_grad()
def training_features(
    extract: Extract,
    n: int,
    seed: int,
    folder: Folder,
    batch: int,
    device: torch.device,
) -> Tensor:
    """Features of 2·n real training scenes, n with one garment: the reference."""
    parts = []
    for kind in ("one", "two"):
        scenes = _scenes(kind, False, "train", folder, device, fold_in(seed, 2))
        numbers = torch.arange(n).split(batch)
        parts += [extract(scenes.batch(i).images) for i in numbers]
    return torch.cat(parts)


def check_side(transformer: nn.Module, vae: nn.Module) -> None:
    """Raise ValueError for a model that draws no scenes, by its pictures' size."""
    side = transformer.config.sample_size * vae.config.factor
    if side != IMAGE_SIZE:
        raise ValueError(f"the model draws {side} × {side} pixels, scenes have 64 × 64")


def evaluate(
    pipe: Any,
    judge: Judge | None = None,
    n: int = 500,
    guidance_scale: float | None = None,
    num_inference_steps: int = 28,
    folder: Folder = None,
    seed: int = EVALUATION_SEED,
    batch: int = 500,
    rows: tuple[str, ...] = tuple(ROWS),
    log: Callable[[str], None] = lambda line: None,
    inception: InceptionV3 | None = None,
) -> dict:
    """Measure a pipeline that draws scenes: prompts followed and Fréchet distance.

    Args:
        pipe: a ``Pipeline`` whose pictures measure 64 × 64.
        judge: the shipped one if not given, on the pipeline's device.
        n: prompts in each row.
        guidance_scale: the pipeline's default if None. Choose it with another ``seed``.
        folder: the data set (see ``fashion_mnist``).
        rows: which of ``ROWS``. The Fréchet distance is of the rows with seen pairs.
        inception: gives the features of the distance; the judge does if None.

    Returns:
        What ``format_table`` prints, ready for JSON.
    """
    check_range("n", n, 2)
    check_side(pipe.transformer, pipe.vae)
    device = next(pipe.transformer.parameters()).device
    judge = load_judge(device=device) if judge is None else judge
    if guidance_scale is None:
        guidance_scale = pipe.defaults.guidance_scale
    options = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
    }
    result, features = {"n": n, "seed": seed, **options, "rows": {}}, []
    extract = inception or (lambda images: judge.read(images)[0])
    size = n, seed, folder, batch
    whole = set(choose_rows("all")[::2]) <= set(rows)  # both rows with seen pairs
    reference = training_features(extract, *size, device) if whole else None
    for row in rows:
        start = time.perf_counter()
        means, found = evaluate_row(pipe, judge, extract, row, *size, **options)
        result["rows"][row] = means
        features += [found] if not ROWS[row][1] else []
        real, model = means["real"]["all"], means["model"]["all"]
        seconds = time.perf_counter() - start
        log(f"{row}: real {real:.3f}, model {model:.3f} ({seconds:.0f} s)")
    if whole:
        name = FEATURES[inception is not None]
        result |= _distances(pipe, extract, name, features, reference, *size)
    return result


def _distances(
    pipe: Any,
    extract: Extract,
    name: str,
    features: list[dict[str, Tensor]],
    reference: Tensor,
    n: int,
    seed: int,
    folder: Folder,
    batch: int,
) -> dict:
    """Fréchet distances to training scenes: of pictures, test scenes, the VAE's."""
    model, real = (torch.cat([f[k] for f in features]) for k in ("model", "real"))
    ratio, decoded = reconstructions(pipe, extract, 2 * n, seed, folder, batch)
    distances = {"model": model, "floor": real, "vae": decoded}
    distances = {
        k: round(frechet_distance(v, reference), 2) for k, v in distances.items()
    }
    facts = {"features": name, "n": 2 * n}
    return {"frechet": facts | distances, "vae_psnr": round(ratio, 2)}


def format_table(result: dict) -> str:
    """The result of ``evaluate`` as a Markdown table with two lines beneath it."""
    parts = ("all", "garments", "colors", "background", "colors and background")
    parts += ("layout",)
    header = "| right in %, real / model | " + " | ".join(parts) + " |"
    lines = [header, "|---" * (len(parts) + 1) + "|"]
    for row, means in result["rows"].items():
        cells = (
            f"{100 * means['real'][p]:.1f} / {100 * means['model'][p]:.1f}"
            for p in parts
        )
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"{result['n']} prompts a row, {result['num_inference_steps']} steps, "
        f"guidance scale {result['guidance_scale']}, seed {result['seed']}.",
    ]
    if "frechet" in result:
        f = result["frechet"]
        lines += [
            f"Fréchet distance in {f['features']}, {f['n']} pictures against as "
            f"many training scenes: model {f['model']}, test scenes {f['floor']}, "
            f"VAE reconstructions {f['vae']}.",
            f"VAE: {result['vae_psnr']} dB PSNR.",
        ]
    lines += [_best_block(k, v) for k, v in result.get("attention", {}).items()]
    return "\n".join(lines)


def _best_block(word: str, found: dict[str, list[float]]) -> str:
    """The block where a word's map agrees most with the garment, up to the sign."""
    cells = []
    for direction, values in found.items():
        best = max(range(len(values)), key=lambda i: abs(values[i]))
        cells.append(f"{values[best]:+.2f} in block {best} ({direction})")
    return f"Attention of {word} and the garment's mask: " + ", ".join(cells) + "."


# Attention


def word_positions(tokenizer: Any, text: str, start: int) -> list[list[int]]:
    """The positions of each word's tokens in ``tokenizer``'s ids of ``text``."""
    positions = []
    for word in text.split():
        length = len(tokenizer.encode(word)) - start - 1
        first = positions[-1][-1] + 1 if positions else start
        positions.append(list(range(first, first + length)))
    return positions


@torch.no_grad()
def attention_correlation(
    pipe: Any,
    record_attention: Callable,
    n: int = 64,
    sigma: float = 0.6,
    folder: Folder = None,
    seed: int = EVALUATION_SEED,
) -> dict[str, dict[str, list[float]]]:
    """Does a word look where its garment is? Mean correlation in every block.

    Real one-garment test scenes are noised to ``sigma`` and shown to the transformer
    with their captions; each word's map over the patches is correlated with the
    garment's opacity. ``record_attention`` is ``minidiff.attention``'s.

    Returns:
        For "T5 color", "T5 garment", "T5 background" (if there is T5), "CLIP color", …:
        lists over the blocks, "image to text" (patches ask, the word answers) and "text
        to image".
    """
    weight = next(pipe.transformer.parameters())
    batch = _scenes("one", False, "test", folder, weight.device, seed).batch(
        torch.arange(n)
    )
    texts = captions(batch.attributes, torch.zeros(n, dtype=torch.long))
    context, pooled = pipe.encode_prompt(texts)
    x0 = pipe.vae.scale(pipe.vae.encode(batch.images.to(weight.dtype)).mode())
    noise = normal(fold_in(seed, 3), torch.arange(n), x0.shape[1:], weight.device)
    x = ((1 - sigma) * x0 + sigma * noise).to(weight.dtype)
    with record_attention(pipe.transformer, average_heads=True) as maps:
        pipe.transformer(x, torch.full((n,), sigma).to(weight), context, pooled)
    patch = 64 // int((maps[0][0].shape[-1] - context.shape[1]) ** 0.5)
    masks = F.avg_pool2d(batch.masks[:, :1], patch).flatten(1).cpu()  # (n, patches)
    words = {name: [] for name in _word_rows(pipe, texts[0])}
    for text in texts:
        for name, row in _word_rows(pipe, text).items():
            words[name].append(row)
    return {
        name: _directions(maps, rows, masks, context.shape[1])
        for name, rows in words.items()
    }


def _word_rows(pipe: Any, text: str) -> dict[str, list[int]]:
    """Rows of the context that belong to the colour, the garment, the background."""
    clip, _, t5 = pipe.tokenizers
    rows = {"CLIP": word_positions(clip, text, 1)}
    if t5:
        behind = clip.model_max_length
        places = word_positions(t5, text, 0)
        rows["T5"] = [[behind + i for i in place] for place in places]
    places = {
        "color": slice(1, 2),
        "garment": slice(2, -4),
        "background": slice(-2, -1),
    }
    return {
        f"{encoder} {name}": sum(positions[place], [])
        for encoder, positions in rows.items()
        for name, place in places.items()
    }


def _directions(
    maps: dict[int, list[Tensor]], rows: list[list[int]], masks: Tensor, length: int
) -> dict[str, list[float]]:
    """Correlations in both directions, per block; text comes before ``length``."""
    found = {"image to text": [], "text to image": []}
    for block in sorted(maps):
        (weights,) = maps[block]  # (n, tokens, tokens)
        asked = [w[length:, r].mean(1) for w, r in zip(weights, rows, strict=True)]
        asks = [w[r, length:].mean(0) for w, r in zip(weights, rows, strict=True)]
        for name, picked in zip(found, (asked, asks), strict=True):
            mean = correlation(torch.stack(picked), masks).mean().item()
            found[name].append(round(mean, 3))
    return found
