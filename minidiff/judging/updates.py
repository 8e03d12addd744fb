"""How much the blocks of a transformer add to the patches, at one noise level."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.dit import MMDiT


@torch.no_grad()
def added(
    model: MMDiT, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor
) -> Tensor:
    """What attention and MLP add, as a share of the patches they change: (blocks, 2).

    ``x`` (B, C, h, w) at level ``sigma`` (B,). The share is ‖gate · update‖ / ‖stream‖,
    the mean over patches and samples. (Dual attention is not counted.)
    """
    found: dict[tuple[int, str], Tensor] = {}
    hooks = []
    for i, block in enumerate(model.joint_blocks):
        stream: Any = block.x_block
        parts = {"x1": stream.norm1, "u1": stream.attn.proj}
        parts |= {"x2": stream.norm2, "u2": stream.mlp}
        for name, part in parts.items():
            keep = partial(remember, found, (i, name))
            hooks.append(part.register_forward_hook(keep))
    model(x, sigma, context, pooled)
    for hook in hooks:
        hook.remove()
    shares = []
    modulations = model.modulations(sigma, pooled).blocks
    for i, (block, both) in enumerate(
        zip(model.joint_blocks, modulations, strict=True)
    ):
        m = block.x_block.split(both[1].unsqueeze(1))  # (B, 1, D) each
        gates = {"1": m.gate, "2": m.gate_mlp}
        pairs = [(g * found[i, f"u{k}"], found[i, f"x{k}"]) for k, g in gates.items()]
        shares.append([(u.norm(dim=-1) / x.norm(dim=-1)).mean() for u, x in pairs])
    return torch.tensor(shares)


def remember(
    found: dict[tuple[int, str], Tensor],
    key: tuple[int, str],
    part: nn.Module,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> None:
    """A hook: of a norm the tokens (B, N, D) that enter it, else what comes out."""
    found[key] = inputs[0] if key[1].startswith("x") else output
