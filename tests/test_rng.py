import pytest
import torch

from minidiff.data.rng import bits, fold_in, normal, uniform


def splitmix64(state: int) -> int:
    """The published finaliser, in Python's own unbounded integers."""
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


@pytest.mark.parametrize("seed", [0, 1, -7, 2**63, 2**64 - 1])
def test_bits_are_splitmix64(seed):
    golden = 0x9E3779B97F4A7C15
    for index in (0, 5, 2**40):
        key = splitmix64((index + seed) % 2**64) ^ seed * golden % 2**64
        key = splitmix64(key)
        expected = [splitmix64((key + i * golden) % 2**64) for i in range(1, 5)]
        found = bits(seed, torch.tensor([index]), 4)[0].tolist()
        assert [x % 2**64 for x in found] == expected


def test_a_row_depends_on_nothing_but_seed_and_index():
    indices = torch.tensor([5, 3, 10**12, 0, 3])
    whole = normal(1, indices, (3, 5, 7))
    assert whole.shape == (5, 3, 5, 7)
    for row, index in zip(whole, indices, strict=True):
        assert torch.equal(row, normal(1, index[None], (3, 5, 7))[0])
    assert torch.equal(whole[1], whole[4])
    assert torch.equal(uniform(1, indices, 9)[:, :4], uniform(1, indices, 4))


def test_uniform_distribution():
    u = uniform(3, torch.arange(2000), 100)
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 50, 0, 1)
    chi_squared = ((counts - 4000) ** 2 / 4000).sum()
    assert chi_squared < 100  # 49 degrees of freedom: mean 49, deviation 10


def test_normal_distribution():
    z = normal(4, torch.arange(2000), (100,)).double()
    assert z.isfinite().all()
    moments = torch.stack([z.mean(), (z**2).mean(), (z**3).mean(), (z**4).mean()])
    expected = torch.tensor([0.0, 1, 0, 3], dtype=torch.float64)
    assert torch.allclose(moments, expected, atol=0.05)
    cdf = torch.distributions.Normal(0, 1).cdf(z.flatten().sort().values)
    steps = torch.linspace(0, 1, len(cdf), dtype=torch.float64)
    assert (cdf - steps).abs().max() < 2 / len(cdf) ** 0.5  # Kolmogorov and Smirnov


def test_rows_columns_and_seeds_are_independent():
    streams = [
        normal(0, torch.arange(256), (400,)),
        normal(1, torch.arange(256), (400,)),
    ]
    streams.append(normal(fold_in(0, 1), torch.arange(256), (400,)))
    rows = torch.cat(streams).double()
    correlation = torch.corrcoef(rows) - torch.eye(len(rows), dtype=torch.float64)
    assert correlation.abs().max() < 6 / 400**0.5
    columns = torch.corrcoef(streams[0].double().T) - torch.eye(400)
    assert columns.abs().max() < 6 / 256**0.5


def test_folding_gives_distinct_seeds():
    seeds = {fold_in(s, n) for s in range(50) for n in range(50)}
    assert len(seeds) == 2500


@pytest.mark.slow
def test_compiled_equals_eager():
    compiled = torch.compile(lambda i: normal(0, i, (8,)), backend="aot_eager")
    indices = torch.arange(4)
    assert torch.equal(compiled(indices), normal(0, indices, (8,)))
