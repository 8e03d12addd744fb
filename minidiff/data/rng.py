"""Counter-based random numbers: each row a pure function of (seed, index).

A generator with a state makes sample 1,000 depend on the 999 before it. Here a row is
hashed from its own index, so a batch may be split over devices, reordered or resumed
and every sample keeps its noise. The hash is SplitMix64 (Steele, Lea and Flood 2014,
"Fast splittable pseudorandom number generators"), in int64 arithmetic modulo 2^64.
"""

import math

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as the unsigned ``value``."""
    return (value + 2**63) % 2**64 - 2**63


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right (int64's own ``>>`` copies the sign bit)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: every input bit takes part in every output bit."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def fold_in(seed: int, number: int) -> int:
    """A new seed from ``seed`` and ``number``: one for each purpose or epoch."""
    state = torch.tensor(_signed(seed + number * GOLDEN + GOLDEN))
    return int(_mix(_mix(state) ^ number % 2**62))


def bits(
    seed: int, indices: Tensor, n: int, device: torch.device | str | None = None
) -> Tensor:
    """Random 64-bit integers (B, n), row b a function of ``seed`` and ``indices[b]``.

    Args:
        seed: any integer; taken modulo 2^64.
        indices: integers (B,).
        n: how many numbers a row has; a longer row begins with the shorter one.
        device: where to compute; the device of ``indices`` if not given.
    """
    device = device or indices.device
    indices = indices.to(device=device, dtype=torch.int64)
    key = _mix(_mix(indices + _signed(seed % 2**64)) ^ _signed(seed * GOLDEN))
    counter = torch.arange(1, n + 1, device=device) * _signed(GOLDEN)
    return _mix(key[:, None] + counter)  # (B, 1) + (n) → (B, n)


def uniform(
    seed: int, indices: Tensor, n: int, device: torch.device | str | None = None
) -> Tensor:
    """Uniform float32 numbers (B, n) in [0, 1), the same on every device."""
    return _shift(bits(seed, indices, n, device), 40) * 2.0**-24


def normal(
    seed: int,
    indices: Tensor,
    shape: tuple[int, ...],
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal float32 numbers ``(B, *shape)``; Box and Muller (1958).

    One 64-bit hash gives a radius, a direction, and so two normal numbers. Devices
    agree up to the rounding of their logarithm, sine and cosine.
    """
    n = math.prod(shape)
    random = bits(seed, indices, (n + 1) // 2, device)
    u = (_shift(random, 32) + 1) * 2.0**-32  # in (0, 1]: its logarithm is finite
    angle = (random & 0xFFFFFFFF) * (2 * math.pi * 2.0**-32)
    radius = (-2 * u.log()).sqrt()
    pair = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    # (B, n/2, 2) → (B, n) → (B, *shape)
    return pair.flatten(1)[:, :n].unflatten(1, shape)
