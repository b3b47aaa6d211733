"""The decoder's small ops: liger-kernel's Triton where it is installed and the tensors are on a GPU, else torch."""

import functools

import torch.nn.functional as F
from torch import Tensor

from .rope import rotate


@functools.cache
def _liger():
    """liger-kernel's autograd functions, or None where it is not installed."""
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None
    return LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction


def _fused(x: Tensor) -> bool:
    return x.is_cuda and x.numel() > 0 and _liger() is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32: (T, H), (H) -> (T, H)."""
    if _fused(x):
        return _liger()[0].apply(x, weight, eps, 0.0, "llama", False)
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rope.rotate` of q (T, heads, d) and k (T, kv_heads, d); cos and signed sin are (T, 1, d)."""
    if _fused(q):
        return rotate_liger(q, k, cos, sin)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def rotate_liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Liger's wants (1, heads, T, d), and of cosine and unsigned sine, (1, T, d), it reads the first half."""
    half = sin.shape[-1] // 2
    turned = _liger()[1].apply(
        q.transpose(0, 1).unsqueeze(0),
        k.transpose(0, 1).unsqueeze(0),
        cos.transpose(0, 1),
        sin.roll(half, -1).transpose(0, 1),
    )
    return tuple(x.squeeze(0).transpose(0, 1) for x in turned)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    if _fused(gate):
        return _liger()[2].apply(gate, up)
    return F.silu(gate) * up
