"""Networks that help the text encoders learn and are thrown away afterwards."""

from typing import Any

import torch
from torch import Tensor, nn


class ImageTower(nn.Module):
    """A small convolutional network: pictures (B, 3, 64, 64) → features (B, F)."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in widths:
            layers += [nn.Conv2d(inputs, width, 3, stride=2, padding=1)]
            layers += [nn.GroupNorm(8, width), nn.SiLU()]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.features = widths[-1] * (64 // 2 ** len(widths)) ** 2

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class AnswerDecoder(nn.Module):
    """A small transformer that writes an answer word by word, reading T5's states.

    Called on the answer so far (B, L) and the states (B, M, width), it returns logits
    (B, L, vocab_size) of each next token.
    """

    def __init__(self, vocab_size: int, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.1)
        order: dict[str, Any] = {"batch_first": True, "norm_first": True}
        layer = nn.TransformerDecoderLayer(width, heads, 2 * width, 0.0, **order)
        self.layers = nn.TransformerDecoder(layer, 2, nn.LayerNorm(width))
        self.head = nn.Linear(width, vocab_size)

    def forward(self, answer: Tensor, states: Tensor) -> Tensor:
        n = answer.shape[1]
        ahead = torch.ones(n, n, dtype=torch.bool, device=answer.device).triu(1)
        x = self.embed(answer) + self.positions[:n]
        return self.head(self.layers(x, states, ahead, tgt_is_causal=True))
