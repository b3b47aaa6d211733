"""Triton kernels of the log-probabilities: forward with entropy, and the gradient from any upstream gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import HeadSweep, LogitSweep
from .dispatch import Launch, cdiv
from .rows_triton import (
    LN2,
    LOG2E,
    load_block,
    merge,
    row_launch,
    store_block,
    target_logit,
    update_rest,
)


@triton.jit
def logps_kernel(
    targets,
    logps,
    entropy,
    peaks,
    log_masses,
    logits,
    row_stride,
    column_stride,
    vocabulary,
    inverse_temperature,
    floor,
    FINITE: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program computes one row: its logp, its entropy, and the two values that the backward needs."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits + row * row_stride
    scale = inverse_temperature * LOG2E
    top = tl.full((THREADS,), floor, tl.float32)
    total = tl.zeros((THREADS,), tl.float32)
    weighted = tl.zeros((THREADS,), tl.float32)
    top, total, weighted = update_rest(
        top, total, weighted, 0, row_ptr, column_stride, vocabulary, floor, scale,
        BLOCK, THREADS, VECTOR, FINITE, 1,
    )  # fmt: skip
    peak, log_mass, nats = merge(top, total, weighted, scale)
    chosen = target_logit(row_ptr, tl.load(targets + row), column_stride, vocabulary, floor)
    tl.store(logps + row, ((chosen - peak) * scale - log_mass) * LN2)
    tl.store(entropy + row, nats)
    tl.store(peaks + row, peak)
    tl.store(log_masses + row, log_mass)


@triton.jit
def gradient_kernel(
    logits,
    row_stride,
    column_stride,
    vocabulary,
    inverse_temperature,
    floor,
    targets,
    dlogps,
    dentropy,
    entropy,
    peaks,
    log_masses,
    dlogits,
    out_row_stride,
    out_column_stride,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program computes dlogits of one block of one row."""
    blocks = tl.cdiv(vocabulary, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK
    dlogp = tl.load(dlogps + row).to(tl.float32) * inverse_temperature
    slope = 0.0
    if dentropy is not None:
        slope = tl.load(dentropy + row).to(tl.float32) * inverse_temperature
    dz = tl.zeros((BLOCK,), tl.float32)
    if (dlogp != 0) | (slope != 0):  # otherwise the row is not read
        z = load_block(logits + row * row_stride, at, column_stride, vocabulary, floor, BLOCK)
        x = (z - tl.load(peaks + row)) * (inverse_temperature * LOG2E) - tl.load(log_masses + row)
        factor = dlogp
        if dentropy is not None:  # d entropy / d z = -p (log p + entropy) / temperature
            factor = dlogp + slope * (x * LN2 + tl.load(entropy + row))
        target = tl.load(targets + row) - at
        target = tl.where((target >= 0) & (target < BLOCK), target, -1).to(tl.int32)
        dz = tl.where(tl.arange(0, BLOCK) == target, dlogp, 0.0) - factor * tl.exp2(x)
    out_ptr = dlogits + row * out_row_stride
    store_block(dz, out_ptr, at, out_column_stride, vocabulary, THREADS, VECTOR, False)


def logps_launch(logits, targets, temperature, logps, entropy, peaks, log_masses, finite=False) -> Launch:
    """logits (N, V), targets (N) -> logps, entropy, peaks, log_masses, (N) fp32 each: one read of the logits."""
    config, row, constants = row_launch("logps", logits, temperature)
    # The row's arguments come last: with them first ptxas spills 8 bytes for 10.0 (fp16, columns apart).
    arguments = targets.contiguous(), logps, entropy, peaks, log_masses, *row
    return Launch(logps_kernel, (logits.shape[0],), arguments, {"FINITE": finite} | constants, config.num_warps)


def gradient_launch(logits, targets, temperature, dlogps, dentropy, entropy, peaks, log_masses, dlogits) -> Launch:
    """dlogps (N), dentropy (N) and the results of `logps_launch` -> dlogits (N, V); both entropies may be None."""
    config, row, constants = row_launch("gradient", logits, temperature)
    upstream = dlogps, dentropy, entropy, peaks, log_masses
    arguments = *row, targets.contiguous(), *upstream, dlogits, *dlogits.stride()
    programs = logits.shape[0] * cdiv(logits.shape[1], config.block)
    return Launch(gradient_kernel, (programs,), arguments, constants, config.num_warps)


def token_logps_triton(hidden, weight, targets, temperature: float, entropy: bool) -> tuple[Tensor, ...]:
    """(N, H), (V, H), (N) -> logps (N), entropy (N) or (0), and the backward's state (2, N): 2·N·V·H FLOP.

    The state is each row's maximum logit and the log2 of its sum of exponentials.
    """
    return sweep_logps(HeadSweep(hidden, weight), targets, temperature, entropy)


def token_logps_backward_triton(
    hidden, weight, targets, temperature, entropy, state, dlogps, dentropy, grad_hidden, grad_weight
) -> tuple[Tensor, Tensor]:
    """dhidden (N, H), dweight (V, H); (0) if not requested. Computes the logits again: 6·N·V·H FLOP."""
    sweep = HeadSweep(hidden, weight, grad_hidden, grad_weight)
    return sweep_gradients(sweep, targets, temperature, state, dlogps, entropy, dentropy)


def token_logps_from_logits_triton(logits, targets, temperature: float, entropy: bool) -> tuple[Tensor, ...]:
    """As `token_logps_triton`, from logits (N, V). One read of them: 2·N·V bytes in bf16."""
    return sweep_logps(LogitSweep(logits), targets, temperature, entropy)


def token_logps_from_logits_backward_triton(
    logits, targets, temperature, entropy, state, dlogps, dentropy, overwrite: bool = False
) -> Tensor:
    """dlogits (N, V): one read and one write; a row without an upstream gradient is not read."""
    sweep = LogitSweep(logits, grad=True, overwrite=overwrite)
    return sweep_gradients(sweep, targets, temperature, state, dlogps, entropy, dentropy)[0]


def sweep_logps(sweep: HeadSweep | LogitSweep, targets, temperature: float, with_entropy: bool = True):
    """logps (N), entropy (N), or (0) if not requested, and state (2, N)."""
    logps, entropy, state = (torch.empty(*shape, targets.shape[0], device=targets.device) for shape in ((), (), (2,)))
    for rows, logits, _ in sweep:
        logps_launch(
            logits, targets[rows], temperature, logps[rows], entropy[rows], *state[:, rows], sweep.finite
        ).run()
    return logps, entropy if with_entropy else entropy.new_empty(0), state


def sweep_gradients(sweep: HeadSweep | LogitSweep, targets, temperature, state, dlogps, entropy=None, dentropy=None):
    """The sweep's gradients from upstream gradients (N). `entropy` is None or (0) if it was not requested."""
    with_entropy = entropy is not None and entropy.numel() == targets.numel()
    for rows, logits, dlogits in sweep:
        upstream = (dentropy[rows].contiguous(), entropy[rows]) if with_entropy else (None, None)
        rest = dlogps[rows].contiguous(), *upstream, *state[:, rows], dlogits
        gradient_launch(logits, targets[rows], temperature, *rest).run()
        del logits, dlogits, rest  # the last would hold the buffers while the sweep rounds its sums
    return sweep.results()
