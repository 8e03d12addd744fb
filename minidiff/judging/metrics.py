"""How good is a model: prompts followed, texture, Fréchet distance, PSNR.

Every figure is set beside the same figure of real test scenes: the judge is no oracle,
and what it gets wrong on real pictures is the ceiling for drawn ones.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.data.language import Meaning, captions
from minidiff.data.rng import fold_in, normal
from minidiff.data.samples import ONE, TWO
from minidiff.data.scenes import GARMENT_SHARE, IMAGE_SIZE, SHARES, World
from minidiff.interface.checks import check_range
from minidiff.judging.answers import EVERYTHING, follows, shares
from minidiff.judging.distances import frechet_distance, psnr_by_picture
from minidiff.judging.judge import EVALUATION_SEED, Judge, find

Extract = Callable[[Tensor], Tensor]  # pictures (B, 3, 64, 64) → features (B, D)
FEATURES = "the judge's last hidden layer", "Inception-v3's last pool (FID)"
MOST_PROMPTS = 100_000  # in each row
LARGEST_SEED = 2**63 - 1
PARTS = ("colors", "places")  # of what is right in free prompts
SEVERAL = (0.0, 0.0, 0.5, 0.5, 0.0)


class Row(NamedTuple):
    """A row of the table: which scenes, and whether phrasings are new ones."""

    layouts: tuple[float, ...] = SHARES
    garments: float = GARMENT_SHARE
    held_out: str = ""  # "colors" or "places" of the first group, named in the prompt
    new_phrasing: bool = False


ROWS = {
    "one garment": Row(ONE, 1.0),
    "one thing": Row(ONE, 0.0),
    "one garment, colour never trained": Row(ONE, 1.0, "colors"),
    "one thing, colour never trained": Row(ONE, 0.0, "colors"),
    "one thing, place never trained": Row(ONE, 0.0, "places"),
    "two garments": Row(TWO, 1.0),
    "two things": Row(TWO, 0.0),
    "several of a kind": Row(SEVERAL),
    "all scenes": Row(),
    "all scenes, phrasing never trained": Row(new_phrasing=True),
}


def choose_rows(word: str) -> tuple[str, ...]:
    """The rows whose names hold ``word``; all that there are for "all"."""
    chosen = tuple(row for row in ROWS if word == "all" or word in row)
    if not chosen:
        raise ValueError(f"rows is {word!r}; expected all, or a word of {list(ROWS)}")
    return chosen


def row_prompts(
    row: Row, n: int, seed: int, folder: str | Path | None = None
) -> tuple[list[str], list[Meaning], Tensor]:
    """n prompts of a row, what they ask for, and the numbers (n,) of their scenes.

    The scenes, and the ``folder`` of Fashion-MNIST, are those of ``row_scenes``. Where
    a pair was never trained the prompt names it.
    """
    numbers = torch.arange(4 * n)
    parts = row.held_out, row.layouts, row.garments
    attributes = World("test", folder, "cpu", seed, *parts).attributes(numbers)
    texts, meanings = captions(attributes, fold_in(seed, 1), numbers, row.new_phrasing)
    kept = [i for i, m in enumerate(meanings) if names_pair(m, row.held_out)][:n]
    chosen = [texts[i] for i in kept], [meanings[i] for i in kept]
    return *chosen, torch.tensor(kept)


def names_pair(meaning: Meaning, held_out: str) -> bool:
    """Whether a prompt names the first group's colour or place, if it is asked for."""
    asked = {"colors": meaning.groups[0].color, "places": meaning.place}
    return bool(asked.get(held_out, True)) and meaning.place != "corner"


def row_scenes(row: Row, split: str, folder: Any, device: Any, seed: int) -> World:
    """The real scenes of a row."""
    return World(split, folder, device, seed, row.held_out, row.layouts, row.garments)


def check_side(transformer: Any, vae: Any) -> None:
    """Raise ValueError for a model that draws no scenes, by its pictures' size."""
    side = transformer.config.sample_size * vae.config.factor
    if side != IMAGE_SIZE:
        raise ValueError(f"the model draws {side} × {side} pixels, scenes have 64 × 64")


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


class Comparison:
    """Measures a pipeline that draws 64 × 64 pictures of the small world.

    Args:
        pipe: a ``Pipeline``; ``options`` are given to it with each prompt.
        n: prompts of each row; ``batch``: how many are drawn at once.
        folder: where Fashion-MNIST is (see ``fashion_mnist``).
        inception: gives the features of the distances; the judge does if None.
    """

    def __init__(
        self,
        pipe: Any,
        judge: Judge,
        n: int,
        seed: int = EVALUATION_SEED,
        folder: str | Path | None = None,
        batch: int = 100,
        log: Callable[[str], None] = lambda line: None,
        inception: Extract | None = None,
        **options: Any,
    ) -> None:
        check_range("n", n, 2, MOST_PROMPTS)
        check_range("seed", seed, 0, LARGEST_SEED)
        check_side(pipe.transformer, pipe.vae)
        self.pipe, self.judge, self.options = pipe, judge, options
        self.extract, self.kind = inception or judge.features, FEATURES[bool(inception)]
        self.n, self.seed, self.folder, self.batch = n, seed, folder, batch
        self.device, self.log = next(judge.parameters()).device, log

    def draw(self, texts: list[str]) -> Tensor:
        """Pictures (N, 3, 64, 64) in [−1, 1] of prompts, each with its own noise."""
        parts = [
            generate(self.pipe, texts[i[0] : i[-1] + 1], i, self.seed, **self.options)
            for i in torch.arange(len(texts)).split(self.batch)
        ]
        return torch.cat(parts).to(self.device)

    @torch.no_grad()
    def answers(
        self, images: Tensor, meanings: Sequence[Meaning]
    ) -> list[dict[str, bool]]:
        """Whether each picture (N, 3, 64, 64) shows what is asked."""
        found = [one for part in images.split(128) for one in find(self.judge(part))]
        return [follows(*pair) for pair in zip(found, meanings, strict=True)]

    def row(self, name: str) -> tuple[dict, dict[str, Tensor]]:
        """A row's shares, real, model and exchanged, and its pictures."""
        texts, meanings, numbers = row_prompts(
            ROWS[name], self.n, self.seed, self.folder
        )
        scenes = row_scenes(ROWS[name], "test", self.folder, self.device, self.seed)
        real = torch.cat([scenes.batch(i).images for i in numbers.split(128)])
        drawn = self.draw(texts)
        pictures = {"real": real, "model": drawn}
        result: dict[str, Any] = {
            k: shares(self.answers(v, meanings)) for k, v in pictures.items()
        }
        others = meanings[1:] + meanings[:1]
        result["exchanged"] = shares(self.answers(drawn, others))["all"]
        return result, pictures

    def rows(self, names: Sequence[str] = tuple(ROWS)) -> dict:
        """All rows, texture of garments and Fréchet distance, ready for JSON."""
        result: dict[str, Any] = {"n": self.n, "seed": self.seed, **self.options}
        result["rows"] = {}
        for name in names:
            start = time.perf_counter()
            result["rows"][name], pictures = self.row(name)
            real, model = (result["rows"][name][k]["all"] for k in ("real", "model"))
            seconds = time.perf_counter() - start
            self.log(f"{name}: real {real:.3f}, model {model:.3f} ({seconds:.0f} s)")
            if name == "one garment":
                known = {k: texture(v).median().item() for k, v in pictures.items()}
                result["texture"] = {k: round(v, 5) for k, v in known.items()}
            if name == "all scenes":
                result["frechet"] = self.distances(pictures)
        scenes = min(1000, 10 * self.n)
        return result | {"psnr": self.reconstruction(scenes), "psnr_n": scenes}

    @torch.no_grad()
    def distances(self, pictures: dict[str, Tensor]) -> dict:
        """Fréchet distances to training scenes: of drawn pictures, of test scenes."""
        scenes = World("train", self.folder, self.device, fold_in(self.seed, 2))
        numbers = torch.arange(self.n, device=self.device).split(128)
        train = torch.cat([self.extract(scenes.batch(i).images) for i in numbers])
        found = {
            name: torch.cat([self.extract(part) for part in images.split(128)])
            for name, images in pictures.items()
        }
        far = {k: round(frechet_distance(v, train), 3) for k, v in found.items()}
        known = {"features": self.kind, "n": self.n}
        return known | {"model": far["model"], "floor": far["real"]}

    @torch.no_grad()
    def reconstruction(self, n: int) -> dict[str, float]:
        """Mean PSNR in dB of the autoencoder on n test scenes of each sort."""
        vae, result = self.pipe.vae, {}
        weight = next(vae.parameters())
        for name, share in (("garments", 1.0), ("things", 0.0), ("all", GARMENT_SHARE)):
            scenes = World(
                "test", self.folder, weight.device, self.seed, garments=share
            )
            ratios = []
            for i in torch.arange(n, device=weight.device).split(50):
                images = scenes.batch(i).images
                decoded = vae.decode(vae.encode(images.to(weight.dtype)).mode())
                ratios.append(psnr_by_picture(decoded.float(), images))
            result[name] = round(torch.cat(ratios).mean().item(), 2)
        return result

    def free(self, prompts: Sequence[tuple[str, Meaning]]) -> dict:
        """What a file of free prompts gives: see ``read_free_prompts``."""
        texts, meanings = [t for t, _ in prompts], [m for _, m in prompts]
        answers = self.answers(self.draw(texts), meanings)
        means = shares(answers)
        rows = [{"prompt": t, **a} for t, a in zip(texts, answers, strict=True)]
        known = {"n": len(rows), "right": means["all"], "colors": means["colors"]}
        return known | {"places": means["places"], "rows": rows}


def texture(images: Tensor) -> Tensor:
    """Fine texture of what lies on the ground, for those of (B, 3, 64, 64) with enough.

    The mean square of the grey picture's Laplacian inside the mask of pixels that
    differ from the ground, the median of the border, eroded by two pixels.
    """
    edges = images[:, :, 0], images[:, :, -1], images[..., 0], images[..., -1]
    ground = torch.cat(edges, 2).median(2).values[..., None, None]
    mask = ((images - ground).abs().amax(1, keepdim=True) > 0.25).float()
    inside = 1 - F.max_pool2d(1 - mask, 5, 1, 2)
    kernel = images.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    square = F.conv2d(images.mean(1, keepdim=True), kernel, padding=1).square()
    area = inside.sum((1, 2, 3))
    value = (square * inside).sum((1, 2, 3)) / area.clamp(min=1)
    return value[area > 50]


def format_table(result: dict) -> str:
    """What ``Comparison`` measured as a Markdown table with lines beneath it."""
    if "prompts" in result:
        return format_free(result["prompts"])
    parts = ("all", *EVERYTHING)
    lines = ["| right in %, real / model | " + " | ".join(parts) + " | exchanged |"]
    lines.append("|---" * (len(parts) + 2) + "|")
    for name, row in result["rows"].items():
        pairs = [(100 * row["real"][p], 100 * row["model"][p]) for p in parts]
        cells = [f"{real:.0f} / {model:.0f}" for real, model in pairs]
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * row['exchanged']:.0f} |")
    lines += [
        "",
        f"{result['n']} prompts a row, {result['num_inference_steps']} steps, "
        f"guidance scale {result['guidance_scale']}, seed {result['seed']}.",
    ]
    if "frechet" in result:
        f = result["frechet"]
        lines.append(
            f"Fréchet distance in {f['features']}, {f['n']} pictures against as "
            f"many training scenes: model {f['model']}, test scenes {f['floor']}."
        )
    if "texture" in result:
        t = result["texture"]
        share = t["model"] / t["real"]
        lines.append(f"Texture inside garments: {share:.2f} of real scenes'.")
    known = ", ".join(f"{k} {v} dB" for k, v in result["psnr"].items())
    lines.append(f"Autoencoder: {known}, on {result['psnr_n']} scenes each.")
    lines += [best_block(k, v) for k, v in result.get("attention", {}).items()]
    return "\n".join(lines)


def best_block(word: str, found: dict[str, list[float]]) -> str:
    """The block where a word's map agrees most with the garment, up to the sign."""
    cells = []
    for direction, values in found.items():
        best = max(range(len(values)), key=lambda i: abs(values[i]))
        cells.append(f"{values[best]:+.2f} in block {best} ({direction})")
    return f"Attention of {word} and the garment's mask: " + ", ".join(cells) + "."


def format_free(result: dict) -> str:
    """What free prompts gave: the shares, and the prompts that were drawn wrongly."""
    kinds = ", ".join(f"{k} {100 * result[k]:.1f} %" for k in ("right", *PARTS))
    wrong = [row["prompt"] for row in result["rows"] if not row["all"]]
    return "\n".join(
        [f"{result['n']} prompts: {kinds}.", *map("wrong: {}".format, wrong)]
    )
