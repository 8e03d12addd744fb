"""How well a model draws the small world: what prompts ask for, texture, distances.

Every figure is set beside the same figure of real test scenes: the judge is no oracle,
and what it gets wrong on real pictures is the ceiling for drawn ones.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.data.language import OPPOSITE, Group, Meaning, captions
from minidiff.data.rng import fold_in
from minidiff.data.scenes import COLORS, GARMENT_SHARE, KINDS, SHARES, SIDES, World
from minidiff.files.disk import parse_json, read_text
from minidiff.judging.judge import EVALUATION_SEED
from minidiff.judging.metrics import frechet_distance, generate, psnr_by_picture
from minidiff.judging.witness import Witness, find, follows, shares

PARTS = ("colors", "places")  # of what is right in free prompts
ONE, TWO = (1.0, 0.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0, 0.0)
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


def row_prompts(row: Row, n: int, seed: int) -> tuple[list[str], list[Meaning], Tensor]:
    """n prompts of a row, what they ask for, and the numbers (n,) of their scenes.

    The scenes are those of ``row_scenes``. Where a pair was never trained the prompt
    names it.
    """
    numbers = torch.arange(4 * n)
    parts = row.held_out, row.layouts, row.garments
    attributes = World("test", None, "cpu", seed, *parts).attributes(numbers)
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


class WorldEvaluation:
    """Measures a pipeline that draws 64 × 64 pictures of the small world.

    Args:
        pipe: a ``Pipeline``; ``options`` are given to it with each prompt.
        n: prompts of each row; ``batch``: how many are drawn at once.
        folder: where Fashion-MNIST is (see ``fashion_mnist``).
    """

    def __init__(
        self,
        pipe: Any,
        witness: Witness,
        n: int,
        seed: int = EVALUATION_SEED,
        folder: str | Path | None = None,
        batch: int = 100,
        log: Callable[[str], None] = lambda line: None,
        **options: Any,
    ) -> None:
        self.pipe, self.witness, self.options = pipe, witness, options
        self.n, self.seed, self.folder, self.batch = n, seed, folder, batch
        self.device, self.log = next(witness.parameters()).device, log

    def draw(self, texts: list[str]) -> Tensor:
        """Pictures (N, 3, 64, 64) in [−1, 1] of prompts, each with its own noise."""
        parts = [
            generate(self.pipe, texts[i[0] : i[-1] + 1], i, self.seed, **self.options)
            for i in torch.arange(len(texts)).split(self.batch)
        ]
        return torch.cat(parts).to(self.device)

    @torch.no_grad()
    def judged(
        self, images: Tensor, meanings: Sequence[Meaning]
    ) -> tuple[list[dict[str, bool]], Tensor]:
        """Whether each picture shows what is asked, and the features (N, D)."""
        found, features = [], []
        for part in images.split(128):
            part_features, reading = self.witness.read(part)
            found += find(reading)
            features.append(part_features)
        pairs = zip(found, meanings, strict=True)
        return [follows(*pair) for pair in pairs], torch.cat(features)

    def row(self, name: str) -> tuple[dict, dict[str, Tensor]]:
        """A row's shares, real, model and exchanged, and its pictures."""
        texts, meanings, numbers = row_prompts(ROWS[name], self.n, self.seed)
        scenes = row_scenes(ROWS[name], "test", self.folder, self.device, self.seed)
        real = torch.cat([scenes.batch(i).images for i in numbers.split(128)])
        drawn = self.draw(texts)
        pictures = {"real": real, "model": drawn}
        result: dict[str, Any] = {
            k: shares(self.judged(v, meanings)[0]) for k, v in pictures.items()
        }
        others = meanings[1:] + meanings[:1]
        result["exchanged"] = shares(self.judged(drawn, others)[0])["all"]
        return result, pictures

    def rows(self, names: Sequence[str] = tuple(ROWS)) -> dict:
        """All rows, texture of garments and Fréchet distance, ready for JSON."""
        result = {"n": self.n, "seed": self.seed, **self.options, "rows": {}}
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
        return result | {"psnr": self.reconstruction()}

    def distances(self, pictures: dict[str, Tensor]) -> dict:
        """Fréchet distances to training scenes: of drawn pictures, of test scenes."""
        seed = fold_in(self.seed, 2)
        scenes = World("train", self.folder, self.device, seed)
        numbers = torch.arange(self.n, device=self.device)
        train = torch.cat([scenes.batch(i).images for i in numbers.split(128)])
        every = pictures | {"train": train}
        empty = [Meaning(())] * self.n
        features = {k: self.judged(v, empty)[1] for k, v in every.items()}
        names = {"model": "model", "floor": "real"}
        found = {
            k: round(frechet_distance(features[v], features["train"]), 3)
            for k, v in names.items()
        }
        return {"n": self.n, **found}

    @torch.no_grad()
    def reconstruction(self, n: int = 1000) -> dict[str, float]:
        """Mean PSNR in dB of the autoencoder on test scenes of each sort."""
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
        answers = self.judged(self.draw(texts), meanings)[0]
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


# Free prompts


def read_free_prompts(path: Path) -> list[tuple[str, Meaning]]:
    """Prompts of a JSON-lines file and what their pictures must show.

    A line is {"prompt", "things": [{"thing", "color", "place"}], "ground"}; keys that
    are missing or null are free, a repeated entry is a count.

    Raises ValueError naming the file and line of one that is not so.
    """
    lines = read_text(path).splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entry = parse_json(line, "it")
                found.append((str(entry["prompt"]), wanted(entry)))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                what = f"{path}, line {number}: {error}"
                raise ValueError(f"{what}; expected a prompt and its things") from None
    if not found:
        raise ValueError(f"{path} holds no prompt")
    return found


def wanted(entry: dict) -> Meaning:
    """What an entry of such a file asks for."""
    things = [
        (check_term("thing", t["thing"], KINDS),)
        + tuple(check_term(k, t.get(k), known) for k, known in ASKED.items())
        for t in entry["things"]
    ]
    groups = [(key, len(list(same))) for key, same in itertools.groupby(sorted(things))]
    order = sorted(groups, key=lambda group: things.index(group[0]))
    if not 1 <= len(order) <= 2:
        raise ValueError(f"{len(order)} kinds of things")
    places = [place for (_, _, place), _ in order]
    place = places[0] or (OPPOSITE.get(places[-1], "") if len(order) == 2 else "")
    found = tuple(Group(kind, n, color) for (kind, color, _), n in order)
    return Meaning(
        found, place, check_term("ground", entry.get("ground"), tuple(COLORS))
    )


ASKED = {"color": tuple(COLORS), "place": SIDES}


def check_term(name: str, value: str | None, known: Sequence[str]) -> str:
    """``value``, or "" for none. Raises ValueError unless it is known."""
    if value and value not in known:
        raise ValueError(f"{name} is {value!r}")
    return value or ""


def format_world(result: dict) -> str:
    """What ``WorldEvaluation`` measured as a Markdown table with lines beneath it."""
    if "prompts" in result:
        return format_free(result["prompts"])
    parts = ("all", "things", "colors", "places", "ground")
    lines = ["| right in %, real / model | " + " | ".join(parts) + " | exchanged |"]
    lines.append("|---" * (len(parts) + 2) + "|")
    for name, row in result["rows"].items():
        pairs = [(100 * row["real"][p], 100 * row["model"][p]) for p in parts]
        cells = [f"{real:.1f} / {model:.1f}" for real, model in pairs]
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * row['exchanged']:.1f} |")
    lines += ["", f"{result['n']} prompts a row, seed {result['seed']}."]
    if "frechet" in result:
        f = result["frechet"]
        lines.append(
            f"Fréchet distance in the judge's features, {f['n']} pictures against as "
            f"many training scenes: model {f['model']}, test scenes {f['floor']}."
        )
    if "texture" in result:
        t = result["texture"]
        share = t["model"] / t["real"]
        lines.append(f"Texture inside garments: {share:.2f} of real scenes'.")
    known = ", ".join(f"{k} {v} dB" for k, v in result["psnr"].items())
    return "\n".join([*lines, f"Autoencoder: {known}."])


def format_free(result: dict) -> str:
    """What free prompts gave: the shares, and the prompts that were drawn wrongly."""
    kinds = ", ".join(f"{k} {100 * result[k]:.1f} %" for k in ("right", *PARTS))
    wrong = [row["prompt"] for row in result["rows"] if not row["all"]]
    return "\n".join(
        [f"{result['n']} prompts: {kinds}.", *map("wrong: {}".format, wrong)]
    )
