"""How well a drawing keeps to a sketch: intersection over union of their edges."""

from torch import Tensor
from torch.nn import functional as F

from minidiff.control import canny


def agreement(pictures: Tensor, sketches: Tensor, reach: int = 1) -> Tensor:
    """Intersection over union (B,) of the edges of pictures with those of sketches.

    ``pictures`` (B, 3, H, W) in [0, 1], ``sketches`` (B, 1, H, W) of 0 and 1. An edge
    counts as met where the other has one at most ``reach`` pixels away: with the shares
    p of the drawing's edges and r of the sketch's, it is p·r / (p + r − p·r), which for
    a reach of 0 is the plain one. Two that have no edges at all agree.
    """
    drawn = canny(pictures)
    p, r = met(drawn, sketches, reach), met(sketches, drawn, reach)
    return p * r / (p + r - p * r).clamp(min=1e-12)


def met(edges: Tensor, others: Tensor, reach: int) -> Tensor:
    """The share (B,) of edges that have one of the others within reach; 1 of none."""
    near = F.max_pool2d(others, 2 * reach + 1, stride=1, padding=reach)
    count = edges.sum((1, 2, 3))
    return (edges * near).sum((1, 2, 3)).where(count > 0, 1) / count.clamp(min=1)
