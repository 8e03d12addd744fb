"""Muon, against PyTorch's own and against what it is for."""

from pathlib import Path

import pytest
import torch
from test_training import assert_same, regression
from torch import nn

from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.learning import muon
from minidiff.learning.muon import (
    AT_ONCE,
    CONDITIONING_RATE,
    RMS,
    Muon,
    orthogonal,
    orthogonal_parts,
)
from minidiff.learning.run import Run
from minidiff.training import fit
from minidiff.vae import VAE, VAEConfig


def test_the_nearest_orthogonal_matrix() -> None:
    """The singular vectors stay, the values come near 1."""
    x = torch.randn(4, 48, 32, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    assert (s[:, 0] / s[:, -1]).min() > 5
    turned = u.mT @ orthogonal(x) @ v.mT
    values = turned.diagonal(dim1=1, dim2=2)
    assert 0.65 < values.min() and values.max() < 1.25
    assert (turned - values.diag_embed()).abs().max() < 1e-4


def test_many_matrices_of_unlike_shapes_are_each_as_long_as_alone() -> None:
    """More squares than are computed at once, and uprights with longer columns."""
    draw = torch.Generator().manual_seed(2)
    squares = [torch.randn(8, 8, generator=draw) for _ in range(AT_ONCE + 3)]
    whole = [*squares, torch.randn(20, 8, generator=draw)]
    for x, found in zip(whole, orthogonal_parts(whole), strict=True):
        alone = orthogonal(x[None])[0] * (RMS * len(x) ** 0.5)
        torch.testing.assert_close(found, alone)


def matrices(*shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    """Weights of numbered layers, each drawn with its own seed."""
    draw = torch.Generator().manual_seed(1)
    values = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    return [(f"layers.{i}.weight", x) for i, x in enumerate(values)]


def learn(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> None:
    """Three steps along gradients that depend on the step alone."""
    draw = torch.Generator().manual_seed(2)
    for _ in range(3):
        for x in weights:
            x.grad = torch.randn(x.shape, generator=draw)
        optimizer.step()


@pytest.mark.parametrize("short", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)], ids=str)
def test_whole_matrices_move_as_with_pytorch(shape, short, monkeypatch) -> None:
    """PyTorch's own multiplies in bfloat16 always."""
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda device: short)
    (own,), (other,) = matrices(shape), matrices(shape)
    before = own[1].detach().clone()
    learn(Muon([own], lr=0.1, weight_decay=0.1), [own[1]])
    settings = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    learn(torch.optim.Muon([other[1]], **settings), [other[1]])
    assert (own[1] - other[1]).norm() < 0.02 * (other[1] - before).norm()


def test_a_convolution_is_a_matrix_with_a_row_for_each_channel_it_gives() -> None:
    ((_, flat),) = matrices((8, 36))
    kernel = nn.Parameter(flat.detach().view(8, 4, 3, 3).clone())
    kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
    flat.grad = torch.randn(8, 36, generator=torch.Generator().manual_seed(3))
    kernel.grad = flat.grad.view(8, 4, 3, 3)
    for x in (flat, kernel):
        Muon([("blocks.0.weight", x)], lr=0.1).step()
    assert torch.equal(kernel.flatten(1), flat)


@pytest.mark.parametrize(
    "kind, config, ends",
    [
        (VAE, VAEConfig.tiny(), ("conv_in", "conv_out", "conv_in", "conv_out")),
        (MMDiT, MMDiTConfig.tiny(), ("proj", "context_embedder", "linear")),
    ],
)
def test_the_layers_at_entrances_and_exits_are_left_to_adamw(kind, config, ends):
    with torch.device("meta"):
        named = list(kind(config).named_parameters())
    optimizer = Muon(named)
    fast, slow = ({id(x) for x in g["params"]} for g in optimizer.param_groups)
    assert len(fast) + len(slow) == len(named)
    left = fast - {id(x) for x in optimizer.matrices}
    known = [n.split(".")[-2] for n, x in named if x.ndim > 1 and id(x) in left]
    assert known == list(ends)
    conditioning = {n.split(".")[0] for n, x in named if id(x) in slow}
    parts = {"t_embedder", "y_embedder", "joint_blocks", "final_layer"}
    assert conditioning == (parts if kind is MMDiT else set())


@pytest.mark.parametrize("rate", [0.01, 1e-4])
def test_what_steers_the_blocks_moves_slowly(rate: float) -> None:
    """Each number by at most the lower rate in AdamW's first step, at any gradient."""
    names = "t_embedder.mlp.0.weight", "joint_blocks.0.x_block.adaLN_modulation.1.bias"
    for name in (*names, "context_embedder.bias"):
        x = nn.Parameter(torch.zeros(4, 4))
        x.grad = torch.full((4, 4), 7.0)
        Muon([(name, x)], lr=rate).step()
        moved = min(rate, CONDITIONING_RATE) if name in names else rate
        torch.testing.assert_close(x.data, torch.full((4, 4), -moved))


def test_several_maps_in_one_weight_are_orthogonal_each() -> None:
    ((name, qkv),) = matrices((48, 16))
    alone = [(f"{name}.{i}", nn.Parameter(x)) for i, x in enumerate(qkv.data.split(16))]
    grad = torch.randn(48, 16, generator=torch.Generator().manual_seed(3))
    optimizers = Muon([(name, qkv)], lr=0.1), Muon(alone, lr=0.1)
    qkv.grad = grad
    for (_, x), part in zip(alone, grad.split(16), strict=True):
        x.grad = part
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(qkv.data, torch.cat([x.data for _, x in alone]))


def test_all_else_moves_as_with_adamw() -> None:
    draw = torch.Generator().manual_seed(4)
    shapes = {"first.weight": (8, 8), "blocks.0.bias": (8,), "conv.in": (4, 4, 3, 3)}
    start = {name: torch.randn(s, generator=draw) for name, s in shapes.items()}
    own, other = ([nn.Parameter(x.clone()) for x in start.values()] for _ in range(2))
    learn(Muon(zip(start, own, strict=True), lr=0.1), own)
    learn(torch.optim.AdamW(other, lr=0.1), other)
    for a, b in zip(own, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_run_that_was_stopped_goes_on_the_same(tmp_path: Path, bfloat16) -> None:
    def action(folder: str, deadline: float | None = None) -> dict[str, torch.Tensor]:
        task, config = regression(steps=4, muon=True, bfloat16=bfloat16)
        with Run(tmp_path / folder, {}) as run:
            return fit(task, config, run, deadline=deadline).state_dict()

    whole = action("whole")
    for _ in range(3):
        with pytest.raises(TimeoutError):
            action("stopped", deadline=1.0)
    assert_same(action("stopped"), whole)
    adam, config = regression(steps=4, bfloat16=bfloat16)
    moved = fit(adam, config).state_dict()
    assert not torch.equal(moved["layers.0.weight"], whole["layers.0.weight"])
