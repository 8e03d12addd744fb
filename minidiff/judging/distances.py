"""Distances of pictures and of their features: Fréchet's, PSNR, correlation."""

import torch
import torch.nn.functional as F
from torch import Tensor


def square_root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric positive semi-definite matrix (D, D)."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to features (N, D) and (M, D).

    ‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2 (C₁ C₂)^½), in float64 (Heusel et al. 2017, equation 6;
    Dowson and Landau 1982). C₁ C₂ has the eigenvalues of the symmetric C₁^½ C₂ C₁^½,
    whose root is real and stable where that of C₁ C₂ itself need not be. The result
    depends on the features and on N and M: name all three beside it.

    Raises:
        ValueError: shapes that do not fit, fewer than two rows, or values not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features are {tuple(a.shape)} and {tuple(b.shape)}")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} rows, expected at least two of each")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features are not finite")
    a, b = a.cpu().double(), b.cpu().double()  # not every GPU can
    first, second = (torch.atleast_2d(x.T.cov()) for x in (a, b))
    root = square_root(first)
    product = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0)
    spread = a.var(0).sum() + b.var(0).sum() - 2 * product.sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + spread).clamp(min=0).item()


def psnr_by_picture(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of pictures (B, C, H, W) in [−1, 1]."""
    difference = (a.clamp(-1, 1) - b.clamp(-1, 1)).cpu().double()  # not every GPU can
    error = difference.square().mean((1, 2, 3))
    return 10 * (4 / error).log10()  # peak to peak, 2² = 4


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation (…) of the last dimension of ``a`` and ``b`` (…, N)."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)
