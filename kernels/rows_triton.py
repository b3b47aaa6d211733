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
    fetched `stages` - 1 ahead. A thread loads `vector` adjacent elements at a time.
    """

    block: int
    num_warps: int
    held: int = 0
    stages: int = 1
    vector: int = 1


def row_config(kernel: str, logits: Tensor) -> RowConfig:
    """The launch table. `kernel` is "logps" (one read), "gradient" (one read, one write) or "fused" (both)."""
    config = _row_config(kernel, logits.shape[1], logits.itemsize)
    if logits.stride(0) % 16 == 0 and logits.stride(1) == 1 and logits.storage_offset() % 16 == 0:
        return config._replace(vector=16 // logits.itemsize)
    # Triton loads one logit at a time, whose offset needs a register.
    return config._replace(block=max(config.block // 4, 512 * config.num_warps // logits.itemsize), held=0)


def _row_config(kernel: str, vocabulary: int, itemsize: int) -> RowConfig:
    if vocabulary < 32768:
        return RowConfig(block=2048 * 4 // max(itemsize, 2), num_warps=4)
    if kernel == "fused":
        # One program fills a multiprocessor: of a bf16 row of 304 KB, 64 KB stay in registers and 64 more (fp32: 128)
        # are in flight to shared memory. The second pass reads the other 240 KB again: 32 MB for 132 rows at once, in
        # an L2 of 50 MB. A thread takes 16 logits of a block, so that few of its instructions are the loop's own.
        return RowConfig(block=16384, num_warps=32, held=65536 // itemsize, stages=3)
    return RowConfig(block=32768 // itemsize, num_warps=8)


@triton.jit
def locate(row_ptr, at, offsets, stride):
    """Pointers to columns at + offsets. Of the sum only its scalar part changes from block to block."""
    return row_ptr + tl.cast(at, tl.int64) * stride + offsets.to(tl.int64) * stride


@triton.jit
def load_words(row_ptr, at, BLOCK: tl.constexpr):
    """The logits of BLOCK columns from `at` on as int32: two half-precision numbers in a word, or one of fp32."""
    PER_WORD: tl.constexpr = 32 // row_ptr.dtype.element_ty.primitive_bitwidth
    return tl.load((row_ptr + at).to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, BLOCK // PER_WORD))


@triton.jit
def unpack(words, DTYPE: tl.constexpr):
    """The fp32 values of what `load_words` returned."""
    if tl.float32 == DTYPE:
        z = words.to(tl.float32, bitcast=True)
    else:
        if tl.bfloat16 == DTYPE:  # the upper half of fp32
            low, high = (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
        else:
            low = words.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
            high = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        z = tl.reshape(tl.join(low, high), (2 * words.shape[0],))
    return z


@triton.jit
def load_full(row_ptr, at, stride, floor, BLOCK: tl.constexpr, VECTOR: tl.constexpr, FINITE: tl.constexpr):
    """fp32 logits of BLOCK columns from `at` on, all of which the row has. FINITE: none is -inf."""
    if VECTOR > 1:
        z = unpack(load_words(row_ptr, at, BLOCK), row_ptr.dtype.element_ty)
    else:
        z = tl.load(locate(row_ptr, at, tl.arange(0, BLOCK), stride)).to(tl.float32)
    return floored(z, floor, FINITE)


@triton.jit
def load_block(row_ptr, at, stride, vocabulary, floor, BLOCK: tl.constexpr):
    """As `load_full`, of columns that the row may lack."""
    columns = at + tl.arange(0, BLOCK)
    z = tl.load(row_ptr + columns.to(tl.int64) * stride, mask=columns < vocabulary, other=float("-inf"))
    # An element beyond the row must add nothing to the sums, even in a row of -inf.
    return floored(z.to(tl.float32), tl.where(columns < vocabulary, floor, 2 * floor))


@triton.jit
def store_block(dz, row_ptr, at, stride, vocabulary, THREADS: tl.constexpr, VECTOR: tl.constexpr, FULL: tl.constexpr):
    """Store dz (BLOCK) from column `at` on; FULL: the row has all of these columns.

    Each thread stores what it has loaded: with one axis, and fp32 logits beside bf16 gradients, Triton would have it
    load 32 adjacent bytes in two accesses, each of which fetches the same 32-byte sectors.
    """
    ROWS: tl.constexpr = dz.shape[0] // (THREADS * VECTOR)
    thread = tl.arange(0, ROWS)[:, None, None] * THREADS + tl.arange(0, THREADS)[None, :, None]
    offsets = thread * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    pointers = locate(row_ptr, at, offsets, stride)
    dz = tl.reshape(dz, (ROWS, THREADS, VECTOR)).to(row_ptr.dtype.element_ty)
    # Gradients are not read again soon, so they should not evict logits from the L2.
    if FULL:
        tl.store(pointers, dz, eviction_policy="evict_first")
    else:
        tl.store(pointers, dz, mask=offsets < vocabulary - at, eviction_policy="evict_first")


@triton.jit
def floored(z, floor, FINITE: tl.constexpr = False):
    """Replace -inf by a finite number whose probability is 0 too, so that p * log p is 0; NaN stays."""
    if not FINITE:
        z = tl.maximum(z, floor, propagate_nan=tl.PropagateNan.ALL)
    return z


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
def update_rest(
    top, total, weighted, first, row_ptr, stride, vocabulary, floor, scale,
    BLOCK: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, FINITE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`update` by the columns from `first` on, a multiple of BLOCK."""
    full = vocabulary // BLOCK * BLOCK
    for at in tl.range(first, full, BLOCK, num_stages=STAGES):
        z = load_full(row_ptr, at, stride, floor, BLOCK, VECTOR, FINITE)
        top, total, weighted = update(z, top, total, weighted, scale, THREADS, VECTOR, True)
    if full < vocabulary:
        z = load_block(row_ptr, full, stride, vocabulary, floor, BLOCK)
        top, total, weighted = update(z, top, total, weighted, scale, THREADS, VECTOR, True)
    return top, total, weighted


@triton.jit
def merge(top, total, weighted, scale):
    """Join all threads' sums: the row's maximum, log2 of its sum, and its entropy in nats."""
    peak = tl.max(top, 0)
    shift = (top - peak) * scale
    rescale = tl.exp2(shift)
    mass = tl.sum(rescale * total, 0)
    mean = tl.sum(rescale * (weighted + total * shift), 0) / mass
    return peak, tl.log2(mass), (tl.log2(mass) - mean) * LN2


def row_launch(kernel: str, logits: Tensor, temperature: float) -> tuple[RowConfig, tuple, dict]:
    """The configuration, the arguments that describe rows of logits (N, V), and the constants of `update`.

    A thread sums what it has loaded, or else threads would exchange the logits of a block.
    """
    config = row_config(kernel, logits)
    floor = LOGIT_FLOOR * min(temperature, 1.0) ** 2  # stays finite when divided by the temperature twice
    arguments = logits, *logits.stride(), logits.shape[1], 1 / temperature, floor
    return config, arguments, {"BLOCK": config.block, "THREADS": 32 * config.num_warps, "VECTOR": config.vector}
