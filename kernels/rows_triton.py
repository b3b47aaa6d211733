"""Device functions that Triton's kernels over rows of logits share, and their launch table.

A program reads a row block by block. Each thread has its own running maximum, sum and weighted sum, which are combined
after the last block; both sums are in base 2, in which the hardware computes exponentials.

The sums are over x = (z - top) / temperature * log2 e, from the raw logit z and the row's raw maximum: the difference
of two logits is nearly exact, the difference of two quotients is not.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .chunks import LOGIT_FLOOR

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


class RowConfig(NamedTuple):
    """How a program reads its row, `block` elements at a time.

    The fused kernel reads it twice: `held` elements stay in registers in between, and the blocks of the rest are
    fetched `stages` - 1 ahead.
    """

    block: int
    num_warps: int
    held: int = 0
    stages: int = 1


def row_config(kernel: str, vocabulary: int, itemsize: int) -> RowConfig:
    """The launch table. `kernel` is "logps" (one read), "gradient" (one read, one write) or "fused" (both)."""
    if vocabulary < 32768:
        return RowConfig(block=2048 * 4 // max(itemsize, 2), num_warps=4)
    if kernel == "fused":
        # One program fills a multiprocessor: of a bf16 row of 304 KB, 64 KB stay in registers and 64 more are in flight
        # to shared memory. The second pass reads the other 240 KB again: 32 MB for 132 rows at once, in an L2 of 50 MB.
        return RowConfig(block=32768 // itemsize, num_warps=32, held=65536 // itemsize, stages=3)
    return RowConfig(block=32768 // itemsize, num_warps=8)


@triton.jit
def load_block(row_ptr, at, stride, vocabulary, floor, BLOCK: tl.constexpr):
    columns = at + tl.arange(0, BLOCK)
    z = tl.load(row_ptr + columns.to(tl.int64) * stride, mask=columns < vocabulary, other=float("-inf"))
    # An element beyond the row must add nothing to the sums, even in a row of -inf.
    return floored(z.to(tl.float32), tl.where(columns < vocabulary, floor, 2 * floor))


@triton.jit
def floored(z, floor):
    """Replace -inf by a finite number whose probability is 0 too, so that p * log p is 0; NaN stays."""
    return tl.maximum(z, floor, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def target_logit(row_ptr, target, stride, vocabulary, floor):
    """The logit of `target`; NaN where the row has no such column."""
    inside = (target >= 0) & (target < vocabulary)
    return floored(tl.load(row_ptr + target * stride, mask=inside, other=float("nan")).to(tl.float32), floor)


@triton.jit
def update(z, top, total, weighted, scale, THREADS: tl.constexpr, VECTOR: tl.constexpr, ENTROPY: tl.constexpr):
    """Add a block of logits to each thread's running maximum, sum of 2^x and, with ENTROPY, sum of 2^x x."""
    z = tl.reshape(z, (z.shape[0] // (THREADS * VECTOR), THREADS, VECTOR))  # the thread that loaded them is axis 1
    higher = tl.maximum(top, tl.max(tl.max(z, 2), 0))
    shift = (top - higher) * scale
    x = (z - higher[None, :, None]) * scale
    e = tl.exp2(x)
    rescale = tl.exp2(shift)
    if ENTROPY:
        weighted = rescale * (weighted + total * shift) + tl.sum(tl.sum(e * x, 2), 0)
    return higher, rescale * total + tl.sum(tl.sum(e, 2), 0), weighted


@triton.jit
def merge(top, total, weighted, scale):
    """Join all threads' sums: the row's maximum, log2 of its sum, and its entropy in nats."""
    peak = tl.max(top, 0)
    shift = (top - peak) * scale
    rescale = tl.exp2(shift)
    mass = tl.sum(rescale * total, 0)
    mean = tl.sum(rescale * (weighted + total * shift), 0) / mass
    return peak, tl.log2(mass), (tl.log2(mass) - mean) * LN2


def row_arguments(logits: Tensor, temperature: float) -> tuple:
    """The first arguments of a kernel over rows of logits (N, V)."""
    floor = LOGIT_FLOOR * min(temperature, 1.0) ** 2  # stays finite when divided by the temperature twice
    return logits, *logits.stride(), logits.shape[1], 1 / temperature, floor


def tiles(config: RowConfig, itemsize: int) -> dict:
    """Constants of `update`; a thread loads 16 bytes at a time, as elements of `itemsize` bytes."""
    return {"BLOCK": config.block, "THREADS": 32 * config.num_warps, "VECTOR": 16 // itemsize}
