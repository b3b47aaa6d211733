"""Intersection over union of boxes."""

import torch
from torch import Tensor

from .dispatch import FLOATS, accumulation_dtype, check_tensor, register_compiled, runs_fast


def box_iou(
    a: Tensor, b: Tensor, *, pairwise: bool = False, generalized: bool = False, backend: str = "auto"
) -> Tensor:
    """IoU of boxes with continuous coordinates, of row i with row i or of every pair. It has no gradient.

    Args:
        a, b: (n, 4) and (m, 4) float, x1 y1 x2 y2 in one unit; n = m unless `pairwise`.
        pairwise: every box of a with every box of b, as torchvision's `box_iou`.
        generalized: return GIoU = IoU - (hull - union) / hull; hull is the area of the smallest box around both
            ([Rezatofighi et al. 2019](https://arxiv.org/abs/1902.09630)).
        backend: as in `grounding_rewards`; fp64 is computed by the twin only.

    Returns:
        (n), or (n, m) if `pairwise`: IoU in [0, 1], GIoU in [-1, 1], computed in fp64 and rounded to fp32 (fp64 if
        either is fp64). A box without positive width and height, or with a coordinate that is not finite, has IoU 0
        and GIoU -1 with anything.

    Raises:
        ValueError: shapes, dtypes, devices or backend do not fit.
    """
    check_tensor("a", a, (None, 4), FLOATS)
    check_tensor("b", b, (None if pairwise else a.shape[0], 4), FLOATS)
    dtype = accumulation_dtype(a, b)
    if dtype == torch.float64 and backend == "auto":
        backend = "torch"
    fast = runs_fast("box_iou", backend, a, fast="extension")
    op = torch.ops.boxgrpo.box_iou if fast else torch.ops.boxgrpo.box_iou_torch
    return op(a.to(dtype), b.to(dtype), pairwise, generalized)


def box_iou_torch(a: Tensor, b: Tensor, pairwise: bool = False, generalized: bool = False) -> Tensor:
    """IoU, or GIoU, of boxes (n, 4) and (m, 4): (n), or (n, m) if `pairwise`."""
    dtype = accumulation_dtype(a, b)
    a, b = a.double(), b.double()
    if pairwise:
        a, b = a[:, None], b[None]
    size_a, size_b = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = size_a.prod(-1) + size_b.prod(-1) - overlap
    valid = (size_a > 0).all(-1) & (size_b > 0).all(-1) & union.isfinite()
    iou = torch.where(valid, overlap / union, 0).clamp(max=1)
    if not generalized:
        return iou.to(dtype)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    return torch.where(valid, iou - ((hull - union) / hull).clamp(min=0), -1).to(dtype)


def _fake(a: Tensor, b: Tensor, pairwise: bool, generalized: bool) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]) if pairwise else a.shape[0])


register_compiled("(Tensor a, Tensor b, bool pairwise, bool generalized) -> Tensor", box_iou_torch, _fake)
