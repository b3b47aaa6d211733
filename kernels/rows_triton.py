"""Triton kernels over rows of logits: log-probabilities and entropy, their gradient, and loss and gradient at once.

A program owns a row and walks it in blocks. Each thread keeps its own running maximum, sum and weighted sum, which meet
at the end of the walk; the last two are in base 2, where the hardware's exponential is.

The sums belong to x = (z - top) / temperature * log2 e, from the raw logit z and the row's raw maximum: the difference
of two logits is exact, or nearly, where the difference of two quotients is not.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import LOGIT_FLOOR
from .launch import Launch
from .loss_triton import objective_arguments, store_token, token_objective

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


class RowConfig(NamedTuple):
    """How a program walks its row.

    Of the fused kernel, which walks it twice: `held` elements stay in registers in between, and the blocks of the rest
    are fetched `stages` - 1 ahead.
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
        # One program fills a multiprocessor: 64 KB of a bf16 row of 304 in registers, 64 more on their way to shared
        # memory. The second walk reads 240 KB again: of 132 rows at once 32 MB, half of them past, in an L2 of 50.
        return RowConfig(block=32768 // itemsize, num_warps=32, held=65536 // itemsize, stages=3)
    return RowConfig(block=32768 // itemsize, num_warps=8)


@triton.jit
def load_block(row_ptr, at, stride, vocabulary, floor, BLOCK: tl.constexpr):
    columns = at + tl.arange(0, BLOCK)
    z = tl.load(row_ptr + columns.to(tl.int64) * stride, mask=columns < vocabulary, other=float("-inf"))
    # Beyond the row nothing has mass, not even in a row of -inf.
    return floored(z.to(tl.float32), tl.where(columns < vocabulary, floor, 2 * floor))


@triton.jit
def floored(z, floor):
    """-inf becomes a finite number that is as good as it, so that p * log p is 0; NaN stays."""
    return tl.maximum(z, floor, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _target_logit(row_ptr, target, stride, vocabulary, floor):
    """NaN where there is no such logit."""
    inside = (target >= 0) & (target < vocabulary)
    return floored(tl.load(row_ptr + target * stride, mask=inside, other=float("nan")).to(tl.float32), floor)


@triton.jit
def absorb(z, top, total, weighted, scale, THREADS: tl.constexpr, VECTOR: tl.constexpr, ENTROPY: tl.constexpr):
    """Add a block of logits to each thread's running maximum, sum of 2^x and, with ENTROPY, sum of 2^x x."""
    z = tl.reshape(z, (z.shape[0] // (THREADS * VECTOR), THREADS, VECTOR))  # the thread that loaded them is axis 1
    higher = tl.maximum(top, tl.max(tl.max(z, 2), 0))
    shift = (top - higher) * scale
    x = (z - higher[None, :, None]) * scale
    e = tl.exp2(x)
    shrink = tl.exp2(shift)
    if ENTROPY:
        weighted = shrink * (weighted + total * shift) + tl.sum(tl.sum(e * x, 2), 0)
    return higher, shrink * total + tl.sum(tl.sum(e, 2), 0), weighted


@triton.jit
def _join(top, total, weighted, scale):
    """All threads' sums as one: the row's maximum, log2 of its sum, and its entropy in nats."""
    peak = tl.max(top, 0)
    shift = (top - peak) * scale
    shrink = tl.exp2(shift)
    mass = tl.sum(shrink * total, 0)
    mean = tl.sum(shrink * (weighted + total * shift), 0) / mass
    return peak, tl.log2(mass), (tl.log2(mass) - mean) * LN2


@triton.jit
def logps_kernel(
    logits,
    targets,
    logps,
    entropy,
    peaks,
    log_masses,
    row_stride,
    column_stride,
    vocabulary,
    inverse_temperature,
    floor,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits + row * row_stride
    scale = inverse_temperature * LOG2E
    top = tl.full((THREADS,), floor, tl.float32)
    total = tl.zeros((THREADS,), tl.float32)
    weighted = tl.zeros((THREADS,), tl.float32)
    for at in range(0, vocabulary, BLOCK):
        z = load_block(row_ptr, at, column_stride, vocabulary, floor, BLOCK)
        top, total, weighted = absorb(z, top, total, weighted, scale, THREADS, VECTOR, True)
    peak, log_mass, nats = _join(top, total, weighted, scale)
    chosen = _target_logit(row_ptr, tl.load(targets + row), column_stride, vocabulary, floor)
    tl.store(logps + row, ((chosen - peak) * scale - log_mass) * LN2)
    tl.store(entropy + row, nats)
    tl.store(peaks + row, peak)
    tl.store(log_masses + row, log_mass)


@triton.jit
def gradient_kernel(
    logits,
    targets,
    dlogps,
    dentropy,
    entropy,
    peaks,
    log_masses,
    dlogits,
    row_stride,
    column_stride,
    out_row_stride,
    out_column_stride,
    vocabulary,
    inverse_temperature,
    floor,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(vocabulary, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK
    columns = at + tl.arange(0, BLOCK)
    dlogp = tl.load(dlogps + row).to(tl.float32) * inverse_temperature
    slope = 0.0
    if dentropy is not None:
        slope = tl.load(dentropy + row).to(tl.float32) * inverse_temperature
    dz = tl.zeros((BLOCK,), tl.float32)
    if (dlogp != 0) | (slope != 0):  # else the row is not even read
        z = load_block(logits + row * row_stride, at, column_stride, vocabulary, floor, BLOCK)
        x = (z - tl.load(peaks + row)) * (inverse_temperature * LOG2E) - tl.load(log_masses + row)
        factor = dlogp
        if dentropy is not None:  # d entropy / d z = -p (log p + entropy) / temperature
            factor = dlogp + slope * (x * LN2 + tl.load(entropy + row))
        dz = tl.where(columns == tl.load(targets + row), dlogp, 0.0) - factor * tl.exp2(x)
    out = dlogits + row * out_row_stride + columns.to(tl.int64) * out_column_stride
    tl.store(out, dz.to(dlogits.dtype.element_ty), mask=columns < vocabulary)


@triton.jit
def _elements(words, DTYPE: tl.constexpr):
    """(n) int32 -> the fp32 values of the two half-precision numbers, or of the one fp32, in each word, in order."""
    if tl.float32 == DTYPE:
        z = words.to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        z = tl.reshape(tl.join(low, high), (2 * words.shape[0],))
    return z


@triton.jit
def _slope(z, columns, target, dlogp, peak, log_mass, scale):
    """dlogp * (onehot - p)."""
    return tl.where(columns == target, dlogp, 0.0) - dlogp * tl.exp2((z - peak) * scale - log_mass)


@triton.jit
def _store(dz, columns, row_ptr, stride, vocabulary):
    # Gradients are not read soon: they should not drive logits out of the L2.
    row_ptr += columns.to(tl.int64) * stride
    tl.store(row_ptr, dz.to(row_ptr.dtype.element_ty), mask=columns < vocabulary, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["n", "first"])  # or another count would be another compilation
def fused_kernel(
    logits,
    words,
    targets,
    logps,
    entropy,
    tokens,
    dlogits,
    row_stride,
    column_stride,
    out_row_stride,
    out_column_stride,
    vocabulary,
    inverse_temperature,
    floor,
    terms,
    old_logps,
    ref_logps,
    n,
    epsilon,
    epsilon_high,
    delta,
    first,
    CISPO: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    WORDS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Row i of logits is row `first + i` of n. The HELD leading elements, read as int32, stay in registers."""
    row = tl.program_id(0).to(tl.int64)
    token = first + row
    row_ptr = logits + row * row_stride
    out_ptr = dlogits + row * out_row_stride
    scale = inverse_temperature * LOG2E
    DTYPE: tl.constexpr = logits.dtype.element_ty

    # Read before the walks' one barrier: where dlogits are the logits, a faster warp may write over it after that.
    target = tl.load(targets + token)
    chosen = _target_logit(row_ptr, target, column_stride, vocabulary, floor)
    top = tl.full((THREADS,), floor, tl.float32)
    total = tl.zeros((THREADS,), tl.float32)
    weighted = tl.zeros((THREADS,), tl.float32)
    held = ()
    for piece in tl.static_range(HELD // BLOCK):
        word = row * row_stride * WORDS // BLOCK + piece * WORDS + tl.arange(0, WORDS)
        held = held + (tl.load(words + word),)
        z = floored(_elements(held[piece], DTYPE), floor)
        top, total, weighted = absorb(z, top, total, weighted, scale, THREADS, VECTOR, True)
    for at in tl.range(HELD, vocabulary, BLOCK, num_stages=STAGES):
        z = load_block(row_ptr, at, column_stride, vocabulary, floor, BLOCK)
        top, total, weighted = absorb(z, top, total, weighted, scale, THREADS, VECTOR, True)
    # On their way while the threads' sums meet.
    advantage, gain, kl_gain = tl.load(terms + token), tl.load(terms + n + token), tl.load(terms + 2 * n + token)
    old_logp = None
    ref_logp = None
    if old_logps is not None:
        old_logp = tl.load(old_logps + token).to(tl.float32)
    if ref_logps is not None:
        ref_logp = tl.load(ref_logps + token).to(tl.float32)
    peak, log_mass, nats = _join(top, total, weighted, scale)

    logp = ((chosen - peak) * scale - log_mass) * LN2
    log_ratio = tl.full((), 0.0, tl.float32)
    if old_logp is not None:
        log_ratio = logp - old_logp
    loss, dpolicy, dkl, kl, clip_low, clip_high, ratio = token_objective(
        logp, log_ratio, ref_logp, advantage, gain, kl_gain, epsilon, epsilon_high, delta, CISPO
    )
    tl.store(logps + token, logp)
    tl.store(entropy + token, nats)
    store_token(tokens, n, token, True, loss, kl, clip_low, clip_high, ratio)

    dlogp = (dpolicy + dkl) * inverse_temperature
    blocks = tl.cdiv(vocabulary - HELD, BLOCK)
    if dlogp == 0:  # nothing is read again
        for at in range(0, vocabulary, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            _store(tl.zeros((BLOCK,), tl.float32), columns, out_ptr, out_column_stride, vocabulary)
    else:
        # Unpacked again from the words: a value that is 1 only where all is NaN keeps the compiler from holding the
        # fp32 elements, twice as many registers, over both walks.
        opaque = (log_mass != log_mass).to(tl.int32)
        for piece in tl.static_range(HELD // BLOCK):
            columns = piece * BLOCK + tl.arange(0, BLOCK)
            z = floored(_elements(held[piece] ^ opaque, DTYPE), floor)
            dz = _slope(z, columns, target, dlogp, peak, log_mass, scale)
            _store(dz, columns, out_ptr, out_column_stride, vocabulary)
        for i in tl.range(0, blocks, num_stages=STAGES):  # backwards: what was read last is still in the L2
            at = HELD + (blocks - 1 - i) * BLOCK
            columns = at + tl.arange(0, BLOCK)
            z = load_block(row_ptr, at, column_stride, vocabulary, floor, BLOCK)
            dz = _slope(z, columns, target, dlogp, peak, log_mass, scale)
            _store(dz, columns, out_ptr, out_column_stride, vocabulary)


def _common(logits: Tensor, temperature: float) -> dict:
    return {
        "logits": logits,
        "row_stride": logits.stride(0),
        "column_stride": logits.stride(1),
        "vocabulary": logits.shape[1],
        "inverse_temperature": 1 / temperature,
        "floor": LOGIT_FLOOR * min(temperature, 1.0) ** 2,  # finite divided by the temperature, even twice
    }


def _tiles(config: RowConfig, itemsize: int) -> dict:
    return {"BLOCK": config.block, "THREADS": 32 * config.num_warps, "VECTOR": 16 // itemsize}


def logps_launch(logits, targets, temperature, logps, entropy, peaks, log_masses) -> Launch:
    """logits (N, V), targets (N) -> the other four, (N) fp32 each: one read of the logits."""
    config = row_config("logps", logits.shape[1], logits.itemsize)
    arguments = {
        "targets": targets.contiguous(),
        "logps": logps,
        "entropy": entropy,
        "peaks": peaks,
        "log_masses": log_masses,
    }
    return Launch(
        logps_kernel,
        (logits.shape[0],),
        _common(logits, temperature) | arguments,
        _tiles(config, logits.itemsize),
        config.num_warps,
    )


def gradient_launch(logits, targets, temperature, dlogps, dentropy, entropy, peaks, log_masses, dlogits) -> Launch:
    """Upstream (N), and what `logps_launch` left, -> dlogits (N, V); dentropy and entropy may be None."""
    config = row_config("gradient", logits.shape[1], logits.itemsize)
    arguments = {
        "targets": targets.contiguous(),
        "dlogps": dlogps,
        "dentropy": dentropy,
        "entropy": entropy,
        "peaks": peaks,
        "log_masses": log_masses,
        "dlogits": dlogits,
        "out_row_stride": dlogits.stride(0),
        "out_column_stride": dlogits.stride(1),
    }
    blocks = triton.cdiv(logits.shape[1], config.block)
    return Launch(
        gradient_kernel,
        (logits.shape[0] * blocks,),
        _common(logits, temperature) | arguments,
        {"BLOCK": config.block},
        config.num_warps,
    )


def fused_launch(logits, targets, temperature, terms, o, logps, entropy, tokens, dlogits, first=0) -> Launch:
    """`logits` may be rows first, first + 1, ... of all that `targets`, `terms`, `logps` and `tokens` stand for."""
    config = row_config("fused", logits.shape[1], logits.itemsize)
    if logits.stride(1) != 1:  # each element's own offset takes registers, too
        config = config._replace(block=max(config.block // 4, 512 * config.num_warps // logits.itemsize))
    arguments, constants = objective_arguments(targets.shape[0], o)
    words = _as_words(logits) if 0 < config.held <= logits.shape[1] else None
    arguments |= {
        "words": words,
        "targets": targets.contiguous(),
        "terms": terms,
        "logps": logps,
        "entropy": entropy,
        "tokens": tokens,
        "dlogits": dlogits,
        "out_row_stride": dlogits.stride(0),
        "out_column_stride": dlogits.stride(1),
        "first": first,
    }
    # Elements of a thread lie together as the wider of its accesses, 16 bytes each, wants them.
    constants |= _tiles(config, min(logits.itemsize, dlogits.itemsize)) | {
        "HELD": 0 if words is None else config.held,
        "WORDS": config.block * logits.itemsize // 4,
        "STAGES": config.stages,
    }
    return Launch(
        fused_kernel, (logits.shape[0],), _common(logits, temperature) | arguments, constants, config.num_warps
    )


def _as_words(logits: Tensor) -> Tensor | None:
    """The same storage as int32, or None where columns are apart or rows do not start at multiples of 16 bytes.

    (Words loaded one at a time would not fit the registers.)
    """
    aligned = logits.stride(1) == 1 and all(
        x * logits.itemsize % 16 == 0 for x in (logits.shape[1], logits.stride(0), logits.storage_offset())
    )
    return logits.view(torch.int32) if aligned else None
