"""Chapter 12: counts against PyTorch's own, and each short cut against the long way."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.efficiency import (
    CARDS,
    Card,
    FirstBlockCache,
    NF4Linear,
    StreamedLinear,
    attend_tiles,
    double,
    folded_kernel,
    interleave,
    normal_levels,
    quantize_nf4,
    restore_nf4,
    step_operations,
    weigh,
)
from minidiff.vae import Upsample

TINY = MMDiTConfig.tiny()
CONFIGS = {
    "plain": replace(TINY, num_layers=3),
    "dual": replace(TINY, num_layers=3, dual_attention_layers=(0, 2)),
    "other sizes": replace(TINY, num_layers=2, in_channels=4, joint_attention_dim=64),
}


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def given(config: MMDiTConfig, batch: int, words: int, **at) -> list[Tensor]:
    """Latents of 8 × 8, context and pooled text."""
    sizes = (config.in_channels, 8, 8), (words, config.joint_attention_dim)
    pooled = (config.pooled_projection_dim,)
    return [torch.randn(batch, *size, **at) for size in (*sizes, pooled)]


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_operations_are_those_that_pytorch_counts(config: MMDiTConfig) -> None:
    with torch.device("meta"):
        model = MMDiT(config)
    x, context, pooled = given(config, 1, 7, device="meta")
    ahead = model.modulations(torch.empty(1, device="meta"), pooled)
    with FlopCounterMode(display=False) as count:
        model(x, None, context, None, modulations=ahead)
    assert step_operations(config, 16, 7) == count.get_total_flops()


def test_numbers_are_weighed_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False))
    assert weigh(model) == 16 + 4 + 4 + 1  # means, variances, a counter
    assert weigh(model, lambda name: name.endswith("weight")) == 12


def test_the_roof_is_the_slower_of_two() -> None:
    card = Card("", 1, peak=100.0, bandwidth=10.0)
    assert card.least_seconds(500, 20) == 5 and card.least_seconds(10, 20) == 2
    assert [c.memory for c in CARDS] == sorted(c.memory for c in CARDS)


@pytest.mark.parametrize("bias", [True, False])
def test_a_streamed_layer_is_the_same_product_and_holds_nothing(bias: bool) -> None:
    layer, x = nn.Linear(5, 3, bias=bias), torch.randn(2, 5)
    streamed = StreamedLinear(layer)
    assert torch.equal(streamed(x), layer(x)) and weigh(streamed) == 0
    assert streamed(x.bfloat16()).dtype == torch.bfloat16


def levels_error() -> float:
    """Dettmers et al. 2023, appendix E."""
    inner = [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568]
    outer = [1.0, 0.6961928, 0.5250731, 0.3949175, 0.2844414, 0.1847734, 0.0910500]
    wanted = torch.tensor([-x for x in outer] + [0.0, *inner, 1.0])
    return error(normal_levels(), wanted)


def test_levels_are_the_published_ones() -> None:
    assert levels_error() < 1e-6


def test_what_lies_on_a_level_comes_back() -> None:
    levels = normal_levels()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)) % 16
    scales = torch.tensor([1.0, 0.5, 4.0, 0.25])  # exact in float16
    matrix = (scales[:, None] * levels[order]).view(2, 128)
    stored = quantize_nf4(matrix)
    assert torch.equal(restore_nf4(stored), matrix)
    assert stored.codes.shape == (128,) and stored.codes.dtype == torch.uint8
    assert stored.codes[0] == order[0] | order[1] << 4  # the even weight lies low
    assert torch.equal(stored.scale.float(), scales)


def test_four_bits_take_the_nearest_level() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    stored = quantize_nf4(x)
    unit = x / stored.scale.float()[:, None]
    nearest = (unit[..., None] - normal_levels()).abs().amin(-1)
    off = (restore_nf4(stored) - x).abs() / stored.scale.float()[:, None]
    assert torch.allclose(off, nearest, atol=1e-6)


def test_zeros_and_odd_sizes_in_four_bits() -> None:
    assert restore_nf4(quantize_nf4(torch.zeros(1, 64))).abs().max() == 0
    with pytest.raises(ValueError, match="a matrix of 65 weights: expected a multiple"):
        quantize_nf4(torch.zeros(5, 13))


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_in_four_bits(bias: bool) -> None:
    layer, x = nn.Linear(128, 6, bias=bias), torch.randn(3, 128)
    small = NF4Linear(layer)
    matrix = restore_nf4(quantize_nf4(layer.weight.detach()))
    assert torch.allclose(small(x), F.linear(x, matrix, layer.bias), atol=1e-6)
    assert small.codes.nbytes + small.scale.nbytes == 128 * 6 * 4.25 / 8
    assert 0.02 < error(small(x), layer(x)) < 0.2


@pytest.mark.parametrize("tile", [1, 37, 128, 300])
@pytest.mark.parametrize("size", [1, 30])  # with 30 an exponential alone is infinite
def test_tiles_of_the_table_give_the_whole(tile: int, size: float) -> None:
    q, k, v = size * torch.randn(3, 2, 3, 300, 16)
    wanted = F.scaled_dot_product_attention(q, k, v)
    assert error(attend_tiles(q, k, v, tile), wanted) < 1e-5
    fewer = attend_tiles(q[:, :, :5], k, v, tile)
    assert error(fewer, wanted[:, :, :5]) < 1e-5


def test_doubling_folded_into_the_convolution() -> None:
    layer = Upsample(6)
    x = torch.randn(2, 6, 5, 7)
    wanted = F.conv2d(F.interpolate(x, scale_factor=2.0), layer.conv.weight, padding=1)
    assert folded_kernel(layer).shape == (24, 6, 2, 2)
    assert error(double(x, layer), wanted) < 1e-6


def test_rows_of_two_streams_are_slices_of_the_joined() -> None:
    text, image = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    rows = torch.cat([interleave(text), interleave(image)])
    assert torch.equal(rows, interleave(torch.cat([text, image], dim=1)))


@torch.no_grad()
def walk(model: MMDiT, steps: int = 6) -> Tensor:
    """A few steps down from noise."""
    torch.manual_seed(0)
    x, context, pooled = given(model.config, 2, 7)
    for i in range(steps):
        x = x - model(x, torch.full((2,), 1 - i / steps), context, pooled) / steps
    return x


@pytest.fixture
def transformer() -> MMDiT:
    torch.manual_seed(0)
    model = MMDiT(CONFIGS["plain"])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


def test_a_cache_that_reuses_nothing_changes_nothing(transformer: MMDiT) -> None:
    cached = FirstBlockCache.of(transformer, 0.0)
    assert torch.allclose(walk(cached), walk(transformer), atol=1e-6)
    assert cached.skipped == 0


def test_a_cache_that_always_reuses_computes_once(transformer: MMDiT) -> None:
    calls = []
    last = transformer.joint_blocks[-1]
    last.register_forward_hook(lambda *_: calls.append(1))
    cached = FirstBlockCache.of(transformer, 1e9)
    found = walk(cached)
    assert (cached.skipped, len(calls)) == (5, 1)
    assert 0 < error(found, walk(transformer)) < 1


def test_a_cache_is_of_one_size(transformer: MMDiT) -> None:
    cached = FirstBlockCache.of(transformer, 1e9)
    walk(cached, 1)
    x, context, pooled = given(cached.config, 3, 7)
    with torch.no_grad():
        found = cached(x, torch.ones(3), context, pooled)
        wanted = transformer(x, torch.ones(3), context, pooled)
    assert torch.allclose(found, wanted, atol=1e-6) and cached.skipped == 0


def test_a_cache_leaves_the_model_alone(transformer: MMDiT) -> None:
    FirstBlockCache.of(transformer, 0.1)
    assert type(transformer) is MMDiT and not hasattr(transformer, "threshold")
