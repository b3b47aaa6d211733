"""Triton kernel that scales saved gradients in place; its torch twin is `loss.scaled_copy`."""

import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from .dispatch import Launch, cdiv

# As many programs as run at the same time, 8 on each of an H200's 132 multiprocessors: a factor of 1 is then cheap.
SCALE_PROGRAMS = 8 * 132


@triton.jit
def scale_kernel(gradient, factor, row_stride, column_stride, rows, columns, BLOCK: tl.constexpr):
    """gradient *= factor. The factor is loaded first: if it is 1, nothing else is read or written."""
    scale = tl.load(factor).to(tl.float32)
    if scale != 1:
        blocks = tl.cdiv(columns, BLOCK)
        for block in range(tl.program_id(0), rows * blocks, tl.num_programs(0)):
            row = (block // blocks).to(tl.int64)
            column = (block % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            at = gradient + row * row_stride + column * column_stride
            value = tl.load(at, mask=column < columns, other=0.0).to(tl.float32) * scale
            tl.store(at, value.to(gradient.dtype.element_ty), mask=column < columns)


def scale_launch(gradient: Tensor, factor: Tensor) -> Launch:
    """gradient (N, K) times a 0-dim factor, in place and in its own strides."""
    rows = gradient.view(1, gradient.numel()) if gradient.is_contiguous() else gradient
    block = 4096
    programs = min(rows.shape[0] * cdiv(rows.shape[1], block), SCALE_PROGRAMS)
    arguments = rows, factor, *rows.stride(), *rows.shape
    return Launch(scale_kernel, (programs,), arguments, {"BLOCK": block}, num_warps=8)


def scale_triton(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient (N, K) * factor (0-dim), in gradient's own storage."""
    scale_launch(gradient, factor).run()
    increment_version(gradient)  # autograd does not see a kernel's writes
    return gradient
