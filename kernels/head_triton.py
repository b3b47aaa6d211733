"""The fused GRPO losses on Triton: at the token level one kernel computes loss and gradient of a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import HeadSweep, LogitSweep
from .dispatch import Launch
from .logps_triton import sweep_gradients, sweep_logps
from .loss import LossOptions
from .loss_triton import (
    grpo_loss_triton,
    objective_arguments,
    reduce_triton,
    store_token,
    terms_triton,
    token_objective,
)
from .rows_triton import LN2, LOG2E, floored, load_block, merge, row_arguments, row_config, target_logit, tiles, update


@triton.jit
def _elements(words, DTYPE: tl.constexpr):
    """(n) int32 -> fp32 values, in order: of the two half-precision numbers in a word, or of its one fp32."""
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
    # Gradients are not read again soon, so they should not evict logits from the L2.
    row_ptr += columns.to(tl.int64) * stride
    tl.store(row_ptr, dz.to(row_ptr.dtype.element_ty), mask=columns < vocabulary, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["n", "first"])  # otherwise each new value triggers a compilation
def fused_kernel(
    logits,
    row_stride,
    column_stride,
    vocabulary,
    inverse_temperature,
    floor,
    words,
    targets,
    terms,
    logps,
    entropy,
    tokens,
    dlogits,
    out_row_stride,
    out_column_stride,
    first,
    n,
    old_logps,
    ref_logps,
    epsilon,
    epsilon_high,
    delta,
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

    # Loaded before the only barrier: after it another warp may have overwritten this logit by its gradient.
    target = tl.load(targets + token)
    chosen = target_logit(row_ptr, target, column_stride, vocabulary, floor)
    top = tl.full((THREADS,), floor, tl.float32)
    total = tl.zeros((THREADS,), tl.float32)
    weighted = tl.zeros((THREADS,), tl.float32)
    held = ()
    for piece in tl.static_range(HELD // BLOCK):
        word = row * row_stride * WORDS // BLOCK + piece * WORDS + tl.arange(0, WORDS)
        held = held + (tl.load(words + word),)
        z = floored(_elements(held[piece], DTYPE), floor)
        top, total, weighted = update(z, top, total, weighted, scale, THREADS, VECTOR, True)
    for at in tl.range(HELD, vocabulary, BLOCK, num_stages=STAGES):
        z = load_block(row_ptr, at, column_stride, vocabulary, floor, BLOCK)
        top, total, weighted = update(z, top, total, weighted, scale, THREADS, VECTOR, True)
    # These loads run while the threads' sums are joined.
    advantage, gain, kl_gain = tl.load(terms + token), tl.load(terms + n + token), tl.load(terms + 2 * n + token)
    old_logp = None
    ref_logp = None
    if old_logps is not None:
        old_logp = tl.load(old_logps + token).to(tl.float32)
    if ref_logps is not None:
        ref_logp = tl.load(ref_logps + token).to(tl.float32)
    peak, log_mass, nats = merge(top, total, weighted, scale)

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
    if dlogp == 0:  # the row is not read again
        for at in range(0, vocabulary, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            _store(tl.zeros((BLOCK,), tl.float32), columns, out_ptr, out_column_stride, vocabulary)
    else:
        # Unpack the words a second time. `opaque` is 0 unless the row is NaN, which the compiler cannot prove: without
        # it the fp32 elements, in twice as many registers, would be held from the first pass to the second.
        opaque = (log_mass != log_mass).to(tl.int32)
        for piece in tl.static_range(HELD // BLOCK):
            columns = piece * BLOCK + tl.arange(0, BLOCK)
            z = floored(_elements(held[piece] ^ opaque, DTYPE), floor)
            dz = _slope(z, columns, target, dlogp, peak, log_mass, scale)
            _store(dz, columns, out_ptr, out_column_stride, vocabulary)
        for i in tl.range(0, blocks, num_stages=STAGES):  # backwards: the blocks read last are still in the L2
            at = HELD + (blocks - 1 - i) * BLOCK
            columns = at + tl.arange(0, BLOCK)
            z = load_block(row_ptr, at, column_stride, vocabulary, floor, BLOCK)
            dz = _slope(z, columns, target, dlogp, peak, log_mass, scale)
            _store(dz, columns, out_ptr, out_column_stride, vocabulary)


def fused_launch(logits, targets, temperature, terms, o, logps, entropy, tokens, dlogits, first=0) -> Launch:
    """`logits` and `dlogits` may be a part of the N rows, from `first` on; the other tensors have all N."""
    config = row_config("fused", logits.shape[1], logits.itemsize)
    if logits.stride(1) != 1:  # then each element's offset needs a register
        config = config._replace(block=max(config.block // 4, 512 * config.num_warps // logits.itemsize))
    words = _as_words(logits) if 0 < config.held <= logits.shape[1] else None
    inputs = *row_arguments(logits, temperature), words, targets.contiguous(), terms
    results = logps, entropy, tokens, dlogits, *dlogits.stride()
    arguments = *inputs, *results, first, targets.shape[0], *objective_arguments(o)
    # Each thread takes adjacent elements, as many as a 16-byte access holds in the narrower of the two dtypes.
    constants = tiles(config, min(logits.itemsize, dlogits.itemsize)) | {
        "CISPO": o.loss_type == "cispo",
        "HELD": 0 if words is None else config.held,
        "WORDS": config.block * logits.itemsize // 4,
        "STAGES": config.stages,
    }
    return Launch(fused_kernel, (logits.shape[0],), arguments, constants, config.num_warps)


def _as_words(logits: Tensor) -> Tensor | None:
    """The same storage as int32; None if columns are not contiguous or rows do not start at multiples of 16 bytes.

    (Words that are loaded one by one would need too many registers.)
    """
    aligned = logits.stride(1) == 1 and all(
        x * logits.itemsize % 16 == 0 for x in (logits.shape[1], logits.stride(0), logits.storage_offset())
    )
    return logits.view(torch.int32) if aligned else None


def fused_grpo_loss_triton(
    hidden, weight, targets, advantages, completion_cu, temperature, grad_hidden, grad_weight, *options
) -> tuple[Tensor, ...]:
    """loss (), dhidden (N, H), dweight (V, H), logps (N), entropy (N), stats (7); an unrequested gradient is (0).

    FLOP: 6·N·V·H, 4 with a frozen head; 2 more at the sequence level.
    """
    sweeps = HeadSweep(hidden, weight), HeadSweep(hidden, weight, grad_hidden, grad_weight)
    return _loss_and_gradients(*sweeps, targets, advantages, completion_cu, temperature, options)


def fused_grpo_loss_from_logits_triton(
    logits, targets, advantages, completion_cu, temperature, grad: bool, *options, overwrite: bool = False
) -> tuple[Tensor, ...]:
    """loss (), dlogits (N, V) or (0), logps (N), entropy (N), stats (7): one read and one write at the token level."""
    sweeps = LogitSweep(logits), LogitSweep(logits, grad, overwrite)
    return _loss_and_gradients(*sweeps, targets, advantages, completion_cu, temperature, options)


def _loss_and_gradients(plain, sweep, targets, advantages, completion_cu, temperature, options) -> tuple[Tensor, ...]:
    """`sweep` computes the requested gradients; `plain` yields the same logits without gradients, for a first pass."""
    o = LossOptions._make(options)
    if sweep.wanted and o.importance_sampling_level == "token":
        terms = terms_triton(targets.shape[0], advantages, completion_cu, o)
        logps, entropy, tokens = (torch.empty(*k, targets.shape[0], device=targets.device) for k in ((), (), (5,)))
        for rows, logits, dlogits in sweep:
            results = logps, entropy, tokens, dlogits
            fused_launch(logits, targets, temperature, terms, o, *results, first=rows.start).run()
            del logits, dlogits, results  # the last would hold the buffers while the sweep rounds its sums
        loss, stats = reduce_triton(tokens)
        return loss, *sweep.results(), logps, entropy, stats
    logps, entropy, state = sweep_logps(plain, targets, temperature)
    loss, dlogps, stats = grpo_loss_triton(logps, advantages, completion_cu, *options)
    gradients = sweep_gradients(sweep, targets, temperature, state, dlogps) if sweep.wanted else sweep.results()
    return loss, *gradients, logps, entropy, stats
