"""The fused GRPO losses on Triton: at the token level one kernel computes loss and gradient of a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import HeadSweep, LogitSweep
from .dispatch import Launch
from .logps_triton import sweep_gradients, sweep_logps
from .loss_options import LossOptions
from .loss_triton import (
    grpo_loss_triton,
    objective_arguments,
    reduce_triton,
    store_token,
    terms_triton,
    token_objective,
)
from .rows_triton import (
    LN2,
    LOG2E,
    floored,
    load_block,
    load_full,
    load_words,
    merge,
    row_launch,
    store_block,
    target_logit,
    unpack,
    update,
    update_rest,
)


@triton.jit
def _slope(z, dlogp, peak, log_mass, scale):
    """-dlogp * p, the gradient of a logit that is not the target's."""
    return -dlogp * tl.exp2((z - peak) * scale - log_mass)


@triton.jit(do_not_specialize=["n", "first"])  # otherwise each new value triggers a compilation
def fused_kernel(
    logits,
    row_stride,
    column_stride,
    vocabulary,
    inverse_temperature,
    floor,
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
    a,
    b,
    delta,
    KIND: tl.constexpr,
    FINITE: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Row i of logits is row `first + i` of n. The HELD leading elements, read as int32, stay in registers."""
    row = tl.program_id(0).to(tl.int64)
    token = first + row
    row_ptr = logits + row * row_stride
    scale = inverse_temperature * LOG2E
    DTYPE: tl.constexpr = logits.dtype.element_ty
    target = tl.load(targets + token)
    top = tl.full((THREADS,), floor, tl.float32)
    total = tl.zeros((THREADS,), tl.float32)
    weighted = tl.zeros((THREADS,), tl.float32)
    held = ()
    for piece in tl.static_range(HELD // BLOCK):
        held = held + (load_words(row_ptr, piece * BLOCK, BLOCK),)
        z = floored(unpack(held[piece], DTYPE), floor, FINITE)
        top, total, weighted = update(z, top, total, weighted, scale, THREADS, VECTOR, True)
    top, total, weighted = update_rest(
        top, total, weighted, HELD, row_ptr, column_stride, vocabulary, floor, scale,
        BLOCK, THREADS, VECTOR, FINITE, STAGES,
    )  # fmt: skip
    # These loads run while the threads' sums are joined, and before a warp may overwrite the target's logit.
    chosen = target_logit(row_ptr, target, column_stride, vocabulary, floor)
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
        logp, log_ratio, ref_logp, advantage, gain, kl_gain, a, b, delta, KIND
    )
    tl.store(logps + token, logp)
    tl.store(entropy + token, nats)
    store_token(tokens, n, token, True, loss, kl, clip_low, clip_high, ratio)

    out_ptr = dlogits + row * out_row_stride
    dlogp = (dpolicy + dkl) * inverse_temperature
    if dlogp == 0:  # the row is not read again
        for at in range(0, vocabulary, BLOCK):
            zero = tl.zeros((BLOCK,), tl.float32)
            store_block(zero, out_ptr, at, out_column_stride, vocabulary, THREADS, VECTOR, False)
    else:
        # Unpack the words a second time. `opaque` is 0 unless the row is NaN, which the compiler cannot prove: without
        # it the fp32 elements, in twice as many registers, would be held from the first pass to the second.
        opaque = (log_mass != log_mass).to(tl.int32)
        for piece in tl.static_range(HELD // BLOCK):
            z = floored(unpack(held[piece] ^ opaque, DTYPE), floor, FINITE)
            dz = _slope(z, dlogp, peak, log_mass, scale)
            store_block(dz, out_ptr, piece * BLOCK, out_column_stride, vocabulary, THREADS, VECTOR, True)
        full = vocabulary // BLOCK * BLOCK
        if full < vocabulary:
            z = load_block(row_ptr, full, column_stride, vocabulary, floor, BLOCK)
            dz = _slope(z, dlogp, peak, log_mass, scale)
            store_block(dz, out_ptr, full, out_column_stride, vocabulary, THREADS, VECTOR, False)
        for done in tl.range(HELD, full, BLOCK, num_stages=STAGES):
            at = full - BLOCK + HELD - done  # backwards: the blocks read last are still in the L2
            z = load_full(row_ptr, at, column_stride, floor, BLOCK, VECTOR, FINITE)
            dz = _slope(z, dlogp, peak, log_mass, scale)
            store_block(dz, out_ptr, at, out_column_stride, vocabulary, THREADS, VECTOR, True)
        # The target's gradient, dlogp * (1 - p), replaces the -dlogp * p that a thread has stored, so that no column is
        # compared with the target. One that the row does not have gave a logit of NaN.
        tl.debug_barrier()
        dz = dlogp + _slope(chosen, dlogp, peak, log_mass, scale)
        tl.store(out_ptr + target * out_column_stride, dz.to(dlogits.dtype.element_ty), mask=chosen == chosen)


def fused_launch(
    logits, targets, temperature, terms, o, logps, entropy, tokens, dlogits, first=0, finite=False
) -> Launch:
    """`logits` and `dlogits` may be a part of the N rows, from `first` on; the other tensors have all N.

    `finite`: no logit is -inf, so none is compared with the floor.
    """
    config, row, constants = row_launch("fused", logits, temperature)
    results = logps, entropy, tokens, dlogits, *dlogits.stride()
    arguments = *row, targets.contiguous(), terms, *results, first, targets.shape[0], *objective_arguments(o)
    constants |= {
        "KIND": o.kind,
        "FINITE": finite,
        "HELD": config.held if config.held <= logits.shape[1] else 0,
        "STAGES": config.stages,
    }
    return Launch(fused_kernel, (logits.shape[0],), arguments, constants, config.num_warps)


def fused_grpo_loss_triton(
    hidden, weight, targets, advantages, completion_cu, temperature, grad_hidden, grad_weight, *options
) -> tuple[Tensor, ...]:
    """loss (), dhidden (N, H), dweight (V, H), logps (N), entropy (N), stats (7); an unrequested gradient is (0).

    FLOP: 6·N·V·H, 4 with a frozen head; 2 more where `needs_all_logps`.
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
    if sweep.wanted and not o.needs_all_logps:
        terms = terms_triton(targets.shape[0], advantages, completion_cu, o)
        logps, entropy, tokens = (torch.empty(*k, targets.shape[0], device=targets.device) for k in ((), (), (5,)))
        for rows, logits, dlogits in sweep:
            results = logps, entropy, tokens, dlogits
            fused_launch(logits, targets, temperature, terms, o, *results, first=rows.start, finite=sweep.finite).run()
            del logits, dlogits, results  # the last would hold the buffers while the sweep rounds its sums
        loss, stats = reduce_triton(tokens)
        return loss, *sweep.results(), logps, entropy, stats
    logps, entropy, state = sweep_logps(plain, targets, temperature)
    loss, dlogps, stats = grpo_loss_triton(logps, advantages, completion_cu, *options)
    gradients = sweep_gradients(sweep, targets, temperature, state, dlogps) if sweep.wanted else sweep.results()
    return loss, *gradients, logps, entropy, stats
