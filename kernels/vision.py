"""Element-wise work of a vision tower's block, in one pass each: rotary positions of queries and keys, and quick-GELU.

Both have gradients: of Triton by a kernel, of the twins by autograd, which keeps more and computes nothing twice. A
product's queries, keys and values may lie beside each other, as its slices.
"""

import torch
from torch import Tensor

from .dispatch import FLOATS, accumulation_dtype, call, check_tensor, register, runs_fast

SLOPE = 1.702  # of quick-GELU's sigmoid


def rotate_qk_torch(q, k, cos, sin, inverse: bool) -> tuple[Tensor, Tensor]:
    """Arguments and results as `rotate_qk`; `inverse` turns by the negative angle, as the backward pass does."""
    half, sin = q.shape[-1] // 2, -sin if inverse else sin
    wide = (x.to(accumulation_dtype(x)) for x in (q, k))
    return tuple(torch.addcmul(x * cos, x.roll(half, -1), sin).to(q.dtype) for x in wide)


def quick_gelu_torch(x) -> Tensor:
    """Arguments and results as `quick_gelu`."""
    return x * torch.sigmoid(SLOPE * x)


def quick_gelu_backward_torch(x, dy) -> Tensor:
    """The gradient of `quick_gelu` at x, of any shape, from that of its result."""
    share = torch.sigmoid(SLOPE * x)
    return dy * share + torch.ops.aten.sigmoid_backward(dy * x, share) * SLOPE


def rotate_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Rotate queries and keys in fp32, pairing element i with i + d / 2, and round once.

    Args:
        q: (T, heads, d); k: (T, kv_heads, d).
        cos, sin: (T, 1, d) fp32, without gradient; both halves of cos are alike, those of sin differ in sign, and the
            first one is -sine.

    Returns:
        Tensors of q's and k's shapes and dtypes.

    Raises:
        ValueError: shapes, dtypes or `backend` do not fit.
    """
    check_tensor("q", q, (None, None, None), FLOATS)
    check_tensor("k", k, (q.shape[0], None, q.shape[2]), (q.dtype,))
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_tensor(name, tensor, (q.shape[0], 1, q.shape[2]), (torch.float32,))
    if runs_fast("rotate_qk", backend, q, k):
        return call(torch.ops.boxgrpo.rotate_qk, _rotate, q, k, cos, sin, False, True)
    return rotate_qk_torch(q, k, cos, sin, False)


def quick_gelu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """x * sigmoid(1.702 x), of any shape. On Triton the backward pass keeps x alone.

    Raises:
        ValueError: the dtype or `backend` does not fit.
    """
    check_tensor("x", x, (None,) * x.dim(), FLOATS)
    if runs_fast("quick_gelu", backend, x):
        return call(torch.ops.boxgrpo.quick_gelu, _quick_gelu, x, True)
    return quick_gelu_torch(x)


_rotate_op, _rotate = register(
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse, bool triton) -> (Tensor, Tensor)",
    rotate_qk_torch,
    lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
)
_quick_gelu_op, _quick_gelu = register(
    "(Tensor x, bool triton) -> Tensor", quick_gelu_torch, lambda x, _: x.new_empty(x.shape)
)
register("(Tensor x, Tensor dy, bool triton) -> Tensor", quick_gelu_backward_torch, lambda x, *_: x.new_empty(x.shape))


def _save_angles(ctx, inputs, output) -> None:
    _, _, *angles, ctx.inverse, ctx.triton = inputs
    ctx.save_for_backward(*angles)


def _rotate_backward(ctx, dq, dk):
    dq, dk = torch.ops.boxgrpo.rotate_qk(dq, dk, *ctx.saved_tensors, not ctx.inverse, ctx.triton)
    return dq, dk, None, None, None, None


def _save_input(ctx, inputs, output) -> None:
    x, ctx.triton = inputs
    ctx.save_for_backward(x)


def _quick_gelu_backward(ctx, dy):
    return torch.ops.boxgrpo.quick_gelu_backward(*ctx.saved_tensors, dy, ctx.triton), None


_rotate_op.register_autograd(_rotate_backward, setup_context=_save_angles)
_quick_gelu_op.register_autograd(_quick_gelu_backward, setup_context=_save_input)
