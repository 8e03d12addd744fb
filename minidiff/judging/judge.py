"""The judge: a small network that finds a scene's items and says what they are.

It is trained on real scenes of the training split only and frozen before any
evaluation. Whether a picture shows what a sentence asks for is then a question to what
it has found (``judging.answers``). All pairs of kind and colour are among its scenes:
shown only those that the model is trained on, it would learn that the others do not
exist. Its last hidden layer gives the features of the Fréchet distance.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.data.scenes import COLORS, IMAGE_SIZE, KINDS, SceneBatch, item_groups
from minidiff.files.disk import write_json
from minidiff.files.weights import load_component, save_weights
from minidiff.training import precise

JUDGE = Path(__file__).parent.parent / "pretrained" / "judge"
GROUPS = 8  # of channels, in each normalisation
CELL = 8  # pixels along a side of a cell
SPREAD = 6.0  # of an item's trace around its centre, in pixels
EVALUATION_SEED = 2  # scenes that training (seeds 0, 1, 3, 4, 6 to 9) never draws


@dataclass(frozen=True)
class JudgeConfig:
    """Widths and residual blocks at 32, 16 and 8 pixels; features of a cell."""

    widths: tuple[int, ...] = (24, 48, 96)
    blocks: tuple[int, ...] = (1, 2, 2)
    features: int = 128

    def __post_init__(self) -> None:
        three = len(self.widths) == len(self.blocks) == 3
        if not three or any(width % GROUPS for width in self.widths):
            found = f"widths are {self.widths}, blocks {self.blocks}"
            raise ValueError(f"{found}; expected 3 each, widths in steps of {GROUPS}")


class Reading(NamedTuple):
    """Logits of every cell (B, 8, 8, …) and of the ground (B, 12)."""

    presence: Tensor  # (B, 8, 8): is an item's centre here?
    kinds: Tensor  # (B, 8, 8, KINDS)
    colors: Tensor  # (B, 8, 8, 12)
    ground: Tensor  # (B, 12)


class Item(NamedTuple):
    """What the judge found at one place; x and y in pixels."""

    kind: str
    color: str
    x: float
    y: float


class Found(NamedTuple):
    """All that the judge found in one picture."""

    items: tuple[Item, ...]
    ground: str


class Residual(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2016, section 3.3).

    Group normalisation: a picture's logits do not depend on its neighbours in a batch.
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, width)
        same = width_in == width and stride == 1
        self.shortcut = None if same else nn.Conv2d(width_in, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        return F.relu(h + (x if self.shortcut is None else self.shortcut(x)))


class Judge(nn.Module):
    """Pictures (B, 3, 64, 64) in [−1, 1] → a ``Reading``.

    A convolutional trunk gives an 8 × 8 map. Each cell reads itself, with what lies
    around it, beside the mean of all cells.
    """

    def __init__(self, config: JudgeConfig = JudgeConfig()) -> None:  # noqa: B008
        super().__init__()
        self.config = config
        width = config.widths[0]
        self.stem = nn.Conv2d(20, width, 3, 1, 1)
        blocks = []
        levels = zip(config.widths, config.blocks, strict=True)
        for level, (new, count) in enumerate(levels):
            for i in range(count):
                blocks += [Residual(width, new, 2 if level and i == 0 else 1)]
                width = new
        self.blocks = nn.Sequential(*blocks)
        self.around = nn.Conv2d(width, config.features, 3, 1, 1)
        self.presence = nn.Linear(2 * config.features, 1)
        self.kind = nn.Linear(2 * config.features, len(KINDS))
        self.color = nn.Linear(2 * config.features, len(COLORS))
        self.ground = nn.Linear(config.features, len(COLORS))

    def forward(self, images: Tensor) -> Reading:
        return self.read(images)[1]

    def features(self, images: Tensor) -> Tensor:
        """What the Fréchet distance compares: (B, 2·features)."""
        return self.read(images)[0]

    def read(self, images: Tensor) -> tuple[Tensor, Reading]:
        """Features (B, 2·features): the cells' mean and maximum; and the logits."""
        # (B, 5, 64, 64) → (B, 20, 32, 32): no detail of a small item is averaged
        x = F.pixel_unshuffle(with_silhouette(images), 2)
        x = F.relu(self.around(self.blocks(F.relu(self.stem(x)))))
        mean, most = x.mean((2, 3)), x.amax((2, 3))  # (B, F, 8, 8) → 2 × (B, F)
        cells = x.permute(0, 2, 3, 1)  # → (B, 8, 8, F)
        cells = torch.cat([cells, mean[:, None, None].expand_as(cells)], -1)
        presence = self.presence(cells)[..., 0]
        heads = presence, self.kind(cells), self.color(cells), self.ground(mean)
        return torch.cat([mean, most], 1), Reading(*heads)


def with_silhouette(images: Tensor) -> Tensor:
    """The pictures with two more channels, (B, 5, H, W), that know no colour.

    The distance to the background, the median of the border, shows the shape whatever
    its colour; the brightest channel shows the shading.
    """
    top, bottom = images[:, :, 0], images[:, :, -1]
    left, right = images[..., 0], images[..., -1]
    border = torch.cat([top, bottom, left, right], 2)  # 4 × (B, 3, 64) → (B, 3, 256)
    ground = border.median(2).values[..., None, None]
    distance = (images - ground).abs().amax(1, keepdim=True)
    return torch.cat([images, distance, images.amax(1, keepdim=True)], 1)


def traces(centres: Tensor, present: Tensor) -> Tensor:
    """How near every cell's middle is to each item's centre, (B, 3, 8, 8) in [0, 1].

    ``centres`` (B, 3, 2), x and y in pixels; ``present`` (B, 3).
    """
    middles = torch.arange(CELL // 2, IMAGE_SIZE, CELL, device=centres.device)
    x, y = (centres[..., i, None] - middles for i in (0, 1))  # (B, 3, 8)
    square = y[..., :, None] ** 2 + x[..., None, :] ** 2  # → (B, 3, 8, 8)
    return torch.exp(-square / (2 * SPREAD**2)) * present[..., None, None]


def judge_targets(scenes: SceneBatch) -> dict[str, Tensor]:
    """What a reading should say: trace, kinds, colors (B, 8, 8), ground (B,).

    Kinds and colours are −1 away from the items; so are a thing's own colours.
    """
    groups = item_groups(scenes.attributes)
    trace, nearest = traces(scenes.centres, groups >= 0).max(1)  # (B, 8, 8)
    group = groups.gather(1, nearest.flatten(1)).clamp(min=0)
    near = trace > 0.4
    found = {"trace": trace, "ground": scenes.attributes.ground}
    for name in ("kinds", "colors"):
        value = getattr(scenes.attributes, name).gather(1, group).view_as(nearest)
        found[name] = value.masked_fill(~near, -1)
    return found


def judge_loss(judge: Judge, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropies of presence, kinds, colours and ground, summed; over scenes.

    ``batch`` holds "images" (B, 3, 64, 64) and what ``judge_targets`` makes.
    """
    reading = judge(batch["images"])
    shown = precise(reading.presence)
    presence = F.binary_cross_entropy_with_logits(shown, batch["trace"])
    kinds = over_cells(reading.kinds, batch["kinds"])
    colors = over_cells(reading.colors, batch["colors"])
    ground = F.cross_entropy(precise(reading.ground), batch["ground"])
    return 20 * presence + kinds + colors + ground


def over_cells(logits: Tensor, target: Tensor) -> Tensor:
    """The mean over scenes of their cells' cross-entropy; a target of −1 is left out.

    ``logits`` (B, 8, 8, C), ``target`` (B, 8, 8).
    """
    wide = precise(logits).movedim(-1, 1)  # → (B, C, 8, 8)
    loss = F.cross_entropy(wide, target, ignore_index=-1, reduction="none")
    return (loss.sum((1, 2)) / (target >= 0).sum((1, 2)).clamp(min=1)).mean()


# What it found


@torch.no_grad()
def find(reading: Reading) -> list[Found]:
    """The items of each picture: where presence has a peak above one half."""
    p = reading.presence.double().sigmoid()
    # of neighbours that are alike, as around an item on their corner, the first counts
    p = p - 1e-9 * torch.arange(p[0].numel(), device=p.device).view(p.shape[1:])
    peak = (p == F.max_pool2d(p[:, None], 3, 1, 1)[:, 0]) & (p > 0.5)
    kinds, colors = reading.kinds.argmax(-1), reading.colors.argmax(-1)
    grounds = [list(COLORS)[i] for i in reading.ground.argmax(-1).tolist()]
    items: list[list[Item]] = [[] for _ in grounds]
    rows, ys, xs = peak.nonzero(as_tuple=True)
    values = (rows, ys, xs, kinds[peak], colors[peak])
    for row, y, x, kind, color in zip(*(v.tolist() for v in values), strict=True):
        place = CELL * x + CELL / 2, CELL * y + CELL / 2
        items[row].append(Item(KINDS[kind], list(COLORS)[color], *place))
    return [Found(tuple(i), g) for i, g in zip(items, grounds, strict=True)]


def save_judge(judge: Judge, output: Path, **facts: object) -> None:
    """Write model.safetensors (fp16) and config.json, with ``facts`` about it."""
    output.mkdir(parents=True, exist_ok=True)
    save_weights(judge, output / "model.safetensors", dtype=torch.float16)
    write_json(output / "config.json", asdict(judge.config) | facts)


def load_judge(folder: str | Path = JUDGE, device: str | torch.device = "cpu") -> Judge:
    """A trained judge, frozen, in eval mode and float32.

    Raises FileNotFoundError or ValueError, naming the file or folder, for a bad one.
    """
    if not (Path(folder) / "model.safetensors").exists():
        raise FileNotFoundError(
            f"no judge in {folder}: train it with `minidiff train --stage judge`"
        )
    judge = load_component(Judge, JudgeConfig, folder, device, torch.float32)
    return judge.requires_grad_(False)
