"""Torch twin of `box_iou`."""

import torch
from torch import Tensor

from .checks import accumulation_dtype


def box_iou_torch(a: Tensor, b: Tensor, pairwise: bool = False, generalized: bool = False) -> Tensor:
    """IoU, or GIoU, of boxes (n, 4) and (m, 4): (n), or (n, m) if `pairwise`."""
    dtype = accumulation_dtype(a, b)
    a, b = a.double(), b.double()
    if pairwise:
        a, b = a[:, None], b[None]
    size_a, size_b = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = size_a.prod(-1) + size_b.prod(-1) - overlap
    proper = (size_a > 0).all(-1) & (size_b > 0).all(-1) & union.isfinite()
    iou = torch.where(proper, overlap / union, 0).clamp(max=1)
    if not generalized:
        return iou.to(dtype)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    return torch.where(proper, iou - ((hull - union) / hull).clamp(min=0), -1).to(dtype)
