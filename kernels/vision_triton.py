"""Triton kernels of vision.py: each value is read once and written once, 16 bytes at a time where strides allow it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import Launch, cdiv
from .vision import SLOPE

BLOCK = 4096  # elements of a program of quick_gelu
ROWS, PAIRS = 8, 128  # of a program of rotate_qk


@triton.jit
def _rotate(source, target, source_stride, pairs, row, rows, pair, cos, sin, HALF: tl.constexpr):
    """Rotate `pair` of the rows (r, heads, 2 * HALF); HALF is a constant, so that runs of it stay contiguous."""
    column = pair // HALF * (2 * HALF) + pair % HALF
    inside = (row < rows) & (pair < pairs)
    low = tl.load(source + row * source_stride + column, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + row * source_stride + column + HALF, mask=inside, other=0.0).to(tl.float32)
    place = target + row * (2 * pairs) + column
    tl.store(place, (low * cos - high * sin).to(target.dtype.element_ty), mask=inside)
    tl.store(place + HALF, (high * cos + low * sin).to(target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def rotate_qk_kernel(
    q,
    k,
    cos,
    sin,
    new_q,
    new_k,
    rows,
    q_stride,
    k_stride,
    q_pairs,
    k_pairs,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """A program rotates PAIRS pairs of ROWS rows; neighbours in the grid have the same rows, of whose angles one half
    of each table is read."""
    chunks = tl.cdiv(tl.maximum(q_pairs, k_pairs), PAIRS)
    row = (tl.program_id(0) // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    pair = (tl.program_id(0) % chunks) * PAIRS + tl.arange(0, PAIRS)[None, :]
    angle = row * (2 * HALF) + pair % HALF
    c = tl.load(cos + angle, mask=row < rows, other=0.0)
    s = tl.load(sin + HALF + angle, mask=row < rows, other=0.0)
    if INVERSE:
        s = -s
    _rotate(q, new_q, q_stride, q_pairs, row, rows, pair, c, s, HALF)
    _rotate(k, new_k, k_stride, k_pairs, row, rows, pair, c, s, HALF)


@triton.jit
def quick_gelu_kernel(x, dy, out, size, slope, BLOCK: tl.constexpr):
    """BLOCK values of x; `out` is quick-GELU or, with dy, the gradient of x."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(slope * value)
    if dy is None:
        result = value * share
    else:
        result = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        result *= share * (1 + slope * value * (1 - share))
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


def rotate_qk_launch(q, k, cos, sin, inverse, new_q, new_k) -> Launch:
    """q (T, heads, d), k (T, kv_heads, d), cos, sin (T, 1, d) -> new_q, new_k, which are contiguous."""
    rows, _, d = q.shape
    q, k = (x if x.stride()[1:] == (d, 1) else x.contiguous() for x in (q, k))
    pairs = [x.shape[1] * d // 2 for x in (q, k)]
    arguments = q, k, cos.contiguous(), sin.contiguous(), new_q, new_k, rows, q.stride(0), k.stride(0), *pairs
    constants = {"HALF": d // 2, "INVERSE": inverse, "ROWS": ROWS, "PAIRS": PAIRS}
    return Launch(rotate_qk_kernel, (cdiv(rows, ROWS) * cdiv(max(pairs), PAIRS),), arguments, constants, num_warps=4)


def quick_gelu_launch(x, dy, out) -> Launch:
    """x, dy (None: forward) and out of one shape; out is contiguous."""
    size, dy = x.numel(), None if dy is None else dy.contiguous()
    arguments = x.contiguous(), dy, out, size, SLOPE
    return Launch(quick_gelu_kernel, (cdiv(size, BLOCK),), arguments, {"BLOCK": BLOCK}, num_warps=8)


def rotate_qk_triton(q, k, cos, sin, inverse: bool) -> tuple[Tensor, Tensor]:
    """`rotate_qk_torch` on Triton, for all dtypes but fp64."""
    results = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    rotate_qk_launch(q, k, cos, sin, inverse, *results).run()
    return results


def quick_gelu_triton(x) -> Tensor:
    """`quick_gelu_torch` on Triton, rounded once, for all dtypes but fp64."""
    return quick_gelu_backward_triton(x, None)


def quick_gelu_backward_triton(x, dy) -> Tensor:
    """`quick_gelu_backward_torch` on Triton, rounded once, for all dtypes but fp64."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    quick_gelu_launch(x, dy, out).run()
    return out
