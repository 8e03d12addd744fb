"""The judge: a small network that reads a scene's attributes from its picture.

It is trained on real scenes of the training split only and frozen before any
evaluation, so that it can say how often a generated picture shows what its prompt asked
for. All pairs of colour and class are among its scenes: shown only those that the model
is trained on, it would learn that a blue t-shirt does not exist, and see none. Its last
hidden layer gives the features of the Fréchet distance.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.data.fashion_mnist import CLASSES
from minidiff.data.garments import BACKGROUNDS, COLORS, LAYOUTS, Attributes, Scenes
from minidiff.files.disk import write_json
from minidiff.files.layout import Config
from minidiff.files.weights import load_component, save_weights

Network = TypeVar("Network", bound=nn.Module)
JUDGE = Path(__file__).parent.parent / "pretrained" / "judge"
GROUPS = 8  # of channels, in each normalisation
EVALUATION_SEED = 2  # scenes that training (seeds 0, 1, 3, 4, 6 to 9) never draws


@dataclass(frozen=True)
class JudgeConfig:
    """Widths and residual blocks at 32, 16 and 8 pixels; features of each garment."""

    widths: tuple[int, ...] = (24, 48, 96)
    blocks: tuple[int, ...] = (1, 2, 2)
    features: int = 96

    def __post_init__(self) -> None:
        three = len(self.widths) == len(self.blocks) == 3
        if not three or any(width % GROUPS for width in self.widths):
            found = f"widths are {self.widths}, blocks {self.blocks}"
            raise ValueError(f"{found}; expected 3 each, widths in steps of {GROUPS}")


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
    """Pictures (B, 3, 64, 64) in [−1, 1] → logits of every attribute.

    A convolutional trunk gives an 8 × 8 map. Five windows of it, each brought to 4 × 4,
    go through one linear layer: the whole picture, and where a garment lies if it is on
    the left, on the right, above or below. The layout, read from all five, says which
    of them are the two garments.
    """

    def __init__(self, config: JudgeConfig = JudgeConfig()) -> None:  # noqa: B008
        super().__init__()
        self.config = config
        width = config.widths[0]
        self.stem = nn.Conv2d(20, width, 3, 1, 1)
        blocks = []
        for level, (new, count) in enumerate(
            zip(config.widths, config.blocks, strict=True)
        ):
            for i in range(count):
                blocks += [Residual(width, new, 2 if level and i == 0 else 1)]
                width = new
        self.blocks = nn.Sequential(*blocks)
        self.window = nn.Linear(16 * width, config.features)
        self.layout = nn.Linear(5 * config.features, len(LAYOUTS))
        self.background = nn.Linear(5 * config.features, len(BACKGROUNDS))
        self.garment = nn.Linear(config.features, len(CLASSES))
        self.color = nn.Linear(config.features, len(COLORS))

    def forward(self, images: Tensor) -> Attributes:
        """Logits: (B, 3), (B, 2, 10), (B, 2, 8) and (B, 8)."""
        return self.read(images)[1]

    def features(self, images: Tensor) -> Tensor:
        """What the Fréchet distance compares: (B, 2·features)."""
        return self.read(images)[0]

    def read(self, images: Tensor) -> tuple[Tensor, Attributes]:
        """Features of both garments side by side (B, 2·features), and the logits."""
        # (B, 5, 64, 64) → (B, 20, 32, 32): no detail of a small garment is averaged
        x = F.pixel_unshuffle(with_silhouette(images), 2)
        x = windows(self.blocks(F.relu(self.stem(x))))
        x = F.relu(self.window(x))  # (B, 5, 16·W) → (B, 5, F)
        layout = self.layout(x.flatten(1))
        garments = choose_windows(x, layout.softmax(1))  # → (B, 2, F)
        heads = layout, self.garment(garments), self.color(garments)
        return garments.flatten(1), Attributes(*heads, self.background(x.flatten(1)))


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


def windows(x: Tensor) -> Tensor:
    """Five windows of the map (B, W, 8, 8), each 4 × 4 and flat: (B, 5, 16·W)."""
    whole = F.avg_pool2d(x, 2)
    beside = x[:, :, 2:6, :4], x[:, :, 2:6, 4:]
    stacked = x[:, :, :4, 2:6], x[:, :, 4:, 2:6]
    return torch.stack([whole, *beside, *stacked], 1).flatten(2)


def choose_windows(x: Tensor, layout: Tensor) -> Tensor:
    """Both garments' windows (B, 2, F) of ``x`` (B, 5, F), weighted by ``layout``."""
    first, second = x[:, [0, 1, 3]], x[:, [0, 2, 4]]  # single, beside, stacked
    pair = torch.stack([first, second], 1)  # 2 × (B, 3, F) → (B, 2, 3, F)
    return (pair * layout[:, None, :, None].to(x.dtype)).sum(2)


def judge_loss(judge: Judge, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropies of all attributes, summed; absent garments (−1) cost nothing.

    ``batch`` holds "images" (B, 3, 64, 64) and the ``Attributes`` by their names.
    """
    logits = judge(batch["images"])
    losses = (
        F.cross_entropy(
            logit.flatten(0, -2),
            batch[name].flatten(),
            ignore_index=-1,
            reduction="sum",
        )
        for name, logit in zip(Attributes._fields, logits, strict=True)
    )
    total: Any = sum(losses)
    return total / len(batch["images"])


def score(logits: Attributes, target: Attributes) -> dict[str, Tensor]:
    """For every picture (B,), is it right in each kind of attribute, and in all?

    ``colors`` and ``garments`` ask for both garments where there are two.
    """
    right = {
        name: ((p.argmax(-1) == t) | (t < 0)).reshape(len(t), -1).all(1)
        for name, p, t in zip(Attributes._fields, logits, target, strict=True)
    }
    everything = torch.stack(list(right.values())).all(0)
    painting = right["colors"] & right["background"]
    return right | {"colors and background": painting, "all": everything}


@torch.no_grad()
def accuracy(judge: Judge, scenes: Scenes, n: int, batch: int = 500) -> dict:
    """Share of the first ``n`` scenes that the judge reads rightly, by attribute."""
    device = scenes.gray.device
    totals: dict[str, float] = {}
    for chunk in torch.arange(n, device=device).split(batch):
        scene = scenes.batch(chunk)
        for name, right in score(judge(scene.images), scene.attributes).items():
            totals[name] = totals.get(name, 0) + right.sum().item()
    return {name: total / n for name, total in totals.items()}


def measure(judge: Judge, folder: str | Path | None, n: int = 10_000) -> dict:
    """Accuracy on real test scenes, the ceiling of every evaluation."""
    device = next(judge.parameters()).device
    return {
        f"{kind}, {'never trained' if held else 'seen'}": accuracy(
            judge, Scenes("test", folder, device, EVALUATION_SEED, two, held), n
        )
        for two, kind in enumerate(("one garment", "two garments"))
        for held in (False, True)
    }


def save_judge(judge: nn.Module, output: Path, **facts: object) -> None:
    """Write model.safetensors (fp16) and config.json, with ``facts`` about it."""
    config: Any = judge.config
    output.mkdir(parents=True, exist_ok=True)
    save_weights(judge, output / "model.safetensors", dtype=torch.float16)
    write_json(output / "config.json", asdict(config) | facts)


def load_frozen(
    kind: type[Network],
    config: type[Config],
    folder: str | Path,
    device: str | torch.device,
) -> Network:
    """A trained judge of some ``kind``, frozen, in eval mode and float32.

    Raises FileNotFoundError or ValueError, naming the file or folder, for a bad one.
    """
    if not (Path(folder) / "model.safetensors").exists():
        raise FileNotFoundError(
            f"no judge in {folder}: train it with `minidiff train --stage judge`"
        )
    judge = load_component(kind, config, folder, device, torch.float32)
    return judge.requires_grad_(False)


def load_judge(folder: str | Path = JUDGE, device: str | torch.device = "cpu") -> Judge:
    """The trained judge of garments: see ``load_frozen``."""
    return load_frozen(Judge, JudgeConfig, folder, device)
