"""Intersection over union of boxes."""

import torch
from torch import Tensor

from .checks import FLOATS, accumulation_dtype, check_backend, check_tensor


def box_iou(a: Tensor, b: Tensor, *, backend: str = "auto") -> Tensor:
    """Row-wise IoU of two lists of boxes, continuous coordinates (DESIGN section 3).

    Args:
        a, b: (n, 4) float, x1 y1 x2 y2 in one unit.

    Returns:
        (n) fp32 (fp64 if either is fp64), in [0, 1]. A box without positive width and height, or with a coordinate
        that is not finite, has IoU 0 with anything.

    Raises:
        ValueError: shapes, dtypes or backend do not fit.
    """
    check_backend("box_iou", backend)
    check_tensor("a", a, (None, 4), FLOATS)
    check_tensor("b", b, (a.shape[0], 4), FLOATS)
    return box_iou_torch(a, b)


def box_iou_torch(a: Tensor, b: Tensor) -> Tensor:
    """Twin of `box_iou`."""
    dtype = accumulation_dtype(a, b)
    a, b = a.to(dtype), b.to(dtype)
    size_a, size_b = a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    union = size_a.prod(1) + size_b.prod(1) - overlap
    proper = (size_a > 0).all(1) & (size_b > 0).all(1) & union.isfinite()
    return torch.where(proper, overlap / union, 0).clamp(max=1)
