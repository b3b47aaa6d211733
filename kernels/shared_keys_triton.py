"""Triton kernel that sums the gradients of keys and values over the segments that read them: one launch, no atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import Launch, cdiv

BLOCK = 2048  # elements of a program; a segment's rows are contiguous, and so is what each segment reads of them


@triton.jit
def _shared(segment, segments, cu_seqlens, cu_seqlens_k):
    """How many of a segment's keys are its prompt's: 0 for a prompt, and for `segment == segments`."""
    after = tl.minimum(segment + 1, segments)
    before = tl.load(cu_seqlens_k + segment) - tl.load(cu_seqlens + segment)
    return tl.load(cu_seqlens_k + after) - tl.load(cu_seqlens + after) - before


@triton.jit
def _load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["segments", "blocks"])
def key_gradients_kernel(
    dk_read, dv_read, dk, dv, cu_seqlens, cu_seqlens_k, segments, blocks, width, BLOCK: tl.constexpr
):
    """A program sums one block of a segment's own rows, of `width` elements each, over the segments that read them."""
    segment = tl.program_id(0) // blocks
    first, end = tl.load(cu_seqlens + segment), tl.load(cu_seqlens + segment + 1)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    size = (end - first).to(tl.int64) * width
    if at < size:
        elements = at + tl.arange(0, BLOCK)
        mask = elements < size
        shared = _shared(segment, segments, cu_seqlens, cu_seqlens_k)
        place = (tl.load(cu_seqlens_k + segment) + shared).to(tl.int64) * width + elements
        dk_sum, dv_sum = _load(dk_read, place, mask), _load(dv_read, place, mask)
        if shared == 0:  # a prompt, which its completions follow
            reader = segment + 1
            while _shared(reader, segments, cu_seqlens, cu_seqlens_k) > 0:
                place = tl.load(cu_seqlens_k + reader).to(tl.int64) * width + elements
                dk_sum += _load(dk_read, place, mask)
                dv_sum += _load(dv_read, place, mask)
                reader += 1
        place = first.to(tl.int64) * width + elements
        tl.store(dk + place, dk_sum.to(dk.dtype.element_ty), mask=mask)
        tl.store(dv + place, dv_sum.to(dv.dtype.element_ty), mask=mask)


def key_gradients_launch(dk_read, dv_read, cu_seqlens, cu_seqlens_k, max_q: int, dk, dv) -> Launch:
    """dk_read, dv_read (T_kv, heads, d) -> dk, dv (T, heads, d); every one is contiguous."""
    segments, width = len(cu_seqlens) - 1, dk.shape[1] * dk.shape[2]
    blocks = max(cdiv(max_q * width, BLOCK), 1)
    arguments = dk_read, dv_read, dk, dv, cu_seqlens, cu_seqlens_k, segments, blocks, width
    return Launch(key_gradients_kernel, (segments * blocks,), arguments, {"BLOCK": BLOCK}, num_warps=4)


def sum_key_gradients_triton(dk, dv, cu_seqlens, cu_seqlens_k, rows: int, max_q: int) -> tuple[Tensor, Tensor]:
    """`sum_key_gradients_torch` on Triton, for all dtypes but fp64; each element is read once and written once."""
    sums = tuple(torch.empty((rows, *x.shape[1:]), dtype=x.dtype, device=x.device) for x in (dk, dv))
    offsets = cu_seqlens.contiguous(), cu_seqlens_k.contiguous()
    key_gradients_launch(dk.contiguous(), dv.contiguous(), *offsets, max_q, *sums).run()
    return sums
