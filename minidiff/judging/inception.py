"""Inception-v3 as the Fréchet inception distance uses it, for who has its weights.

Szegedy et al. 2015 (https://arxiv.org/abs/1512.00567), with the pools of the original
TensorFlow graph: averages leave the padding out, and the last mixed block takes maxima.
The distance of Heusel et al. 2017 is of these features and no others; published figures
come from the weights ``pt_inception-2015-12-05``. We read them as safetensors only.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from minidiff.files.weights import open_tensors

Kernel = int | tuple[int, int]
Layer = tuple[int, Kernel]  # width and kernel; stride 1, the size stays
Branches = dict[str, list[Layer]]
ACROSS, DOWN = (1, 7), (7, 1)


class Conv(nn.Module):
    """A convolution, batch normalisation and ReLU."""

    def __init__(
        self,
        width_in: int,
        width: int,
        kernel: Kernel,
        stride: int = 1,
        pad: bool = True,
    ) -> None:
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (kernel[0] // 2, kernel[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(width_in, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches of convolutions side by side, and a pool beside them.

    ``pool`` is the width of the convolution after the pool; 0 means that the block
    halves its size: the last layer of each branch and the pool have stride 2.
    ``forked`` branches end in two layers, 1 × 3 and 3 × 1, that read the same.
    """

    def __init__(
        self,
        width: int,
        branches: Branches,
        pool: int,
        maximum: bool = False,
        forked: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.branches: dict[str, list[str]] = {}
        self.forked = forked
        self.halves, self.maximum = pool == 0, maximum
        for name, layers in branches.items():
            self.branches[name] = self.chain(name, width, layers)
        if pool:
            self.branch_pool = Conv(width, pool, 1)

    def chain(self, name: str, width: int, layers: list[Layer]) -> list[str]:
        """Add a branch's layers under their published names, which are returned."""
        alone = len(layers) == 1 and name not in self.forked
        names = [name if alone else f"{name}_{i + 1}" for i in range(len(layers))]
        for label, (new, kernel) in zip(names, layers, strict=True):
            last = self.halves and label == names[-1]
            self.add_module(label, Conv(width, new, kernel, 1 + last, not last))
            width = new
        if name in self.forked:
            fork = f"{name}_{len(layers) + 1}"
            self.add_module(f"{fork}a", Conv(width, 384, (1, 3)))
            self.add_module(f"{fork}b", Conv(width, 384, (3, 1)))
        return names

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for name, labels in self.branches.items():
            h = x
            for label in labels:
                h = getattr(self, label)(h)
            if name in self.forked:
                fork = f"{name}_{len(labels) + 1}"
                parts += [getattr(self, fork + end)(h) for end in "ab"]
            else:
                parts.append(h)
        return torch.cat([*parts, self.pooled(x)], 1)

    def pooled(self, x: Tensor) -> Tensor:
        if self.halves:
            return F.max_pool2d(x, 3, 2)
        if self.maximum:
            return self.branch_pool(F.max_pool2d(x, 3, 1, 1))
        return self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


def _mixed_35(width: int, pool: int) -> Mixed:
    double: list[Layer] = [(64, 1), (96, 3), (96, 3)]
    five: list[Layer] = [(48, 1), (64, 5)]
    branches: Branches = {"branch1x1": [(64, 1)]}
    branches |= {"branch5x5": five, "branch3x3dbl": double}
    return Mixed(width, branches, pool)


def _mixed_17(c: int) -> Mixed:
    seven: list[Layer] = [(c, 1), (c, ACROSS), (192, DOWN)]
    double: list[Layer] = [(c, 1), (c, DOWN), (c, ACROSS), (c, DOWN), (192, ACROSS)]
    branches: Branches = {"branch1x1": [(192, 1)]}
    branches |= {"branch7x7": seven, "branch7x7dbl": double}
    return Mixed(768, branches, 192)


def _mixed_8(width: int, maximum: bool) -> Mixed:
    double: list[Layer] = [(448, 1), (384, 3)]
    branches: Branches = {"branch1x1": [(320, 1)], "branch3x3": [(384, 1)]}
    branches |= {"branch3x3dbl": double}
    return Mixed(width, branches, 192, maximum, ("branch3x3", "branch3x3dbl"))


class InceptionV3(nn.Module):
    """Pictures (B, 3, H, W) in [−1, 1] → the features of the last pool (B, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, pad=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, pad=False)
        for name, width, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
            self.add_module(f"Mixed_{name}", _mixed_35(width, pool))
        halving: Branches = {"branch3x3": [(384, 3)]}
        halving["branch3x3dbl"] = [(64, 1), (96, 3), (96, 3)]
        self.Mixed_6a = Mixed(288, halving, pool=0)
        for name, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            self.add_module(f"Mixed_{name}", _mixed_17(c))
        halving = {"branch3x3": [(192, 1), (320, 3)]}
        halving["branch7x7x3"] = [(192, 1), (192, ACROSS), (192, DOWN), (192, 3)]
        self.Mixed_7a = Mixed(768, halving, pool=0)
        self.Mixed_7b = _mixed_8(1280, maximum=False)
        self.Mixed_7c = _mixed_8(2048, maximum=True)

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images, (299, 299), mode="bilinear", align_corners=False)
        for name, layer in self.named_children():  # in their order above
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                x = F.max_pool2d(x, 3, 2)
            x = layer(x)
        return x.mean((2, 3))


def load_inception(file: str | Path, device: str | torch.device = "cpu") -> InceptionV3:
    """The network with the weights of a safetensors file, frozen, in eval mode.

    Its names are torchvision's; what the features do not need (the classifier) may be
    there. Raises FileNotFoundError or ValueError, naming the file, if it cannot be read
    or is of another network.
    """
    open_tensors(file)
    model = InceptionV3()
    try:
        missing = model.load_state_dict(load_file(file), strict=False).missing_keys
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    except RuntimeError as error:
        first = str(error).split("\n")[1].strip()
        raise ValueError(f"{file} is not of Inception-v3: {first}") from None
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing:
        found = f"{len(missing)} tensors, {missing[0]} among them"
        raise ValueError(f"{file} is not of Inception-v3: it lacks {found}")
    return model.to(device).eval().requires_grad_(False)
