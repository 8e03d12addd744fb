"""Weights in 8 bits: half of bf16's memory, one float32 scale for each output channel.

A value is stored as fp8 e4m3 (4 exponent and 3 mantissa bits: a relative step of 1/8
to 1/16) times its row's scale, chosen so that the row's largest value becomes 448.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minidiff.engine.kernels import Rows


def has_fp8(device: torch.device) -> bool:
    """Whether a GPU, or Triton on it, knows fp8: Ada, and what came after it."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


class Float8Linear(nn.Module):
    """A linear layer that stores its matrix (out, in) in fp8 with ``scale`` (out, 1).

    Called, it brings the matrix back to the dtype of its input and multiplies.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, rows: Rows, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", rows.values)
        self.register_buffer("scale", rows.scale)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.out_features, self.in_features = rows.values.shape

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
        return F.linear(x, weight, self.bias)
