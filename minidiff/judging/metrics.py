"""How good is a model: prompts followed, Fréchet distance, PSNR, beside real scenes'.

Every figure is set beside the same figure of real test scenes: the judge is no oracle,
and what it gets wrong on real pictures is the ceiling for generated ones.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidiff.data.garments import IMAGE_SIZE, Scenes, prompts
from minidiff.data.rng import fold_in, normal
from minidiff.interface.checks import check_range
from minidiff.judging.distances import frechet_distance, psnr_by_picture
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
SEEN = tuple(row for row, (_, held_out) in ROWS.items() if not held_out)
MOST_PROMPTS = 100_000  # in each row
LARGEST_SEED = 2**63 - 1


def choose_rows(garments: str) -> tuple[str, ...]:
    """The rows with "one" or "two" garments, or "all"."""
    if garments not in ("one", "two", "all"):
        raise ValueError(f"garments is {garments!r}, expected one, two or all")
    return tuple(r for r, (kind, _) in ROWS.items() if garments in (kind, "all"))


def check_side(transformer: Any, vae: Any) -> None:
    """Raise ValueError for a model that draws no scenes, by its pictures' size."""
    side = transformer.config.sample_size * vae.config.factor
    if side != IMAGE_SIZE:
        raise ValueError(f"the model draws {side} × {side} pixels, scenes have 64 × 64")


def assess(
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
) -> dict[str, Any]:
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
    check_range("n", n, 2, MOST_PROMPTS)
    check_range("seed", seed, 0, LARGEST_SEED)
    check_side(pipe.transformer, pipe.vae)
    device = next(pipe.transformer.parameters()).device
    judge = load_judge(device=device) if judge is None else judge
    if guidance_scale is None:
        guidance_scale = pipe.defaults.guidance_scale
    options = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
    }
    extract = inception or judge.features
    measured = Comparison(pipe, judge, extract, n, seed, folder, batch, options)
    result: dict[str, Any] = {"n": n, "seed": seed, **options, "rows": {}}
    whole = set(SEEN) <= set(rows)
    reference = measured.training_features() if whole else None
    features = {}
    for row in rows:
        start = time.perf_counter()
        means, features[row] = measured.row(row)
        result["rows"][row] = means
        real, model = means["real"]["all"], means["model"]["all"]
        seconds = time.perf_counter() - start
        log(f"{row}: real {real:.3f}, model {model:.3f} ({seconds:.0f} s)")
    if reference is not None:
        found = {
            k: torch.cat([features[r][k] for r in SEEN]) for k in ("model", "real")
        }
        result |= measured.distances(found, reference, FEATURES[inception is not None])
    return result


@dataclass(frozen=True)
class Comparison:
    """What a model draws beside real scenes: who looks, at which, and how many."""

    pipe: Any
    judge: Judge
    extract: Extract
    n: int  # prompts in a row
    seed: int
    folder: Folder
    batch: int
    options: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """Where the judge is."""
        return next(self.judge.parameters()).device

    def scenes(
        self,
        kind: str,
        held_out: bool = False,
        split: str = "test",
        seed: int | None = None,
    ) -> Scenes:
        """Scenes with "one" or "two" garments."""
        seed = self.seed if seed is None else seed
        two = float(kind == "two")
        return Scenes(split, self.folder, self.device, seed, two, held_out)

    def parts(self, n: int) -> Iterator[Tensor]:
        """The numbers 0 … n − 1, as many as are looked at together."""
        yield from torch.arange(n).split(self.batch)

    @torch.no_grad()
    def row(self, row: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A row of the table, and the features (n, D) that its pictures gave.

        Real scenes and prompts have the same attributes: those of ``seed``.
        """
        kind, held_out = ROWS[row]
        texts, wanted = prompts(self.n, kind, held_out, self.seed)
        scenes = self.scenes(kind, held_out)
        scores: dict[str, list[dict[str, Tensor]]] = {"real": [], "model": []}
        features: dict[str, list[Tensor]] = {"real": [], "model": []}
        for i in self.parts(self.n):
            drawn = generate(
                self.pipe, [texts[j] for j in i], i, self.seed, **self.options
            )
            pictures = {"real": scenes.batch(i).images, "model": drawn.to(self.device)}
            for name, images in pictures.items():
                right = score(self.judge(images), wanted.select(i).to(self.device))
                scores[name].append(right)
                features[name].append(self.extract(images))
        means = {name: right_shares(s) for name, s in scores.items()}
        return means, {name: torch.cat(f) for name, f in features.items()}

    @torch.no_grad()
    def training_features(self) -> Tensor:
        """Features of 2·n real training scenes, n with one garment: the reference."""
        parts = []
        for kind in ("one", "two"):
            scenes = self.scenes(kind, False, "train", fold_in(self.seed, 2))
            parts += [self.extract(scenes.batch(i).images) for i in self.parts(self.n)]
        return torch.cat(parts)

    @torch.no_grad()
    def reconstructions(self) -> tuple[float, Tensor]:
        """The VAE's mean PSNR on 2·n test scenes, n with one garment, and features."""
        vae = self.pipe.vae
        weight = next(vae.parameters())
        ratios, features = [], []
        for kind in ("one", "two"):
            scenes = self.scenes(kind)
            for i in self.parts(self.n):
                images = scenes.batch(i).images
                decoded = vae.decode(vae.encode(images.to(weight.dtype)).mode())
                decoded = decoded.float().clamp(-1, 1)
                ratios.append(psnr_by_picture(decoded, images))
                features.append(self.extract(decoded))
        return torch.cat(ratios).mean().item(), torch.cat(features)

    def distances(
        self, features: dict[str, Tensor], reference: Tensor, name: str
    ) -> dict[str, Any]:
        """Fréchet distances to training scenes: of pictures, test scenes, the VAE's."""
        ratio, decoded = self.reconstructions()
        compared = {"model": features["model"], "floor": features["real"]}
        compared["vae"] = decoded
        found = {
            k: round(frechet_distance(v, reference), 2) for k, v in compared.items()
        }
        facts = {"features": name, "n": 2 * self.n}
        return {"frechet": facts | found, "vae_psnr": round(ratio, 2)}


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


def right_shares(scores: list[dict[str, Tensor]]) -> dict[str, float]:
    """Shares of right pictures, by what is asked of them."""
    joined = {name: torch.cat([s[name] for s in scores]) for name in scores[0]}
    means = {name: x.cpu().double().mean().item() for name, x in joined.items()}
    return {name: round(mean, 4) for name, mean in means.items()}


def format_table(result: dict) -> str:
    """The result of ``assess`` as a Markdown table with two lines beneath it."""
    parts = ["all", "garments", "colors", "background", "colors and background"]
    parts.append("layout")
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
