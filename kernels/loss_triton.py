"""Triton kernels of the GRPO loss from log-probabilities: the objective of a token, and the sums over tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import Launch
from .loss_options import AVERAGED, LOG_RATIO_BOUNDS, OF_COMPLETIONS, LossOptions

LOWEST, HIGHEST = map(tl.constexpr, LOG_RATIO_BOUNDS)


@triton.jit
def token_range(completion, completion_cu, completions, n, BLOCK: tl.constexpr):
    """A completion's first token and the one after its last; an empty range if the offsets do not rise from 0 to n."""
    wrong = (tl.load(completion_cu) != 0) | (tl.load(completion_cu + completions) != n)
    for at in range(0, completions, BLOCK):
        i = at + tl.arange(0, BLOCK)
        low = tl.load(completion_cu + i, mask=i < completions, other=0)
        high = tl.load(completion_cu + i + 1, mask=i < completions, other=0)
        wrong |= tl.max((high < low).to(tl.int32), 0) > 0
    start = tl.load(completion_cu + completion).to(tl.int64)
    end = tl.load(completion_cu + completion + 1).to(tl.int64)
    return start, tl.where(wrong, start, end)


@triton.jit
def completion_terms(completion, count, advantages, completion_cu, weights, denominator, beta, AVERAGED: tl.constexpr):
    """A completion's advantage, factor of the policy term and factor of the KL (`token_terms` of loss.py)."""
    share = tl.full((), 1.0, tl.float32)
    if denominator is not None:
        share /= tl.load(denominator).to(tl.float32)
    else:
        share /= count
    if AVERAGED:
        share /= tl.maximum(tl.load(completion_cu + completion + 1) - tl.load(completion_cu + completion), 1)
    gain = share
    if weights is not None:
        gain *= tl.load(weights + completion).to(tl.float32)
    return tl.load(advantages + completion).to(tl.float32), gain, beta * share


@triton.jit(do_not_specialize=["n", "completions", "count"])
def terms_kernel(
    n,
    completions,
    count,
    advantages,
    completion_cu,
    weights,
    denominator,
    beta,
    sampler_factor,
    terms,
    AVERAGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program computes one completion: advantage, gain and KL gain of each of its tokens, (3, n)."""
    completion = tl.program_id(0)
    advantage, gain, kl_gain = completion_terms(
        completion, count, advantages, completion_cu, weights, denominator, beta, AVERAGED
    )
    start, end = token_range(completion, completion_cu, completions, n, BLOCK)
    zeros = tl.zeros((BLOCK,), tl.float32)
    for at in range(start, end, BLOCK):
        token = at + tl.arange(0, BLOCK)
        mask = token < end
        share = zeros + gain
        if sampler_factor is not None:
            share *= _load(sampler_factor, token, mask)
        tl.store(terms + token, zeros + advantage, mask=mask)
        tl.store(terms + n + token, share, mask=mask)
        tl.store(terms + 2 * n + token, zeros + kl_gain, mask=mask)


@triton.jit
def token_objective(logp, log_ratio, ref_logp, advantage, gain, kl_gain, a, b, delta, KIND: tl.constexpr):
    """loss.token_objective: loss, d policy / d log ratio, d KL / d logp, kl, clip low, clip high, ratio.

    a, b: epsilon and epsilon_high; for the kind "sapo" the temperatures for A > 0 and for others.
    """
    ratio = tl.exp(log_ratio)
    if KIND == "cispo":
        slope = tl.minimum(ratio, b, propagate_nan=tl.PropagateNan.ALL) * advantage
        policy = slope * logp
        clip_low = ratio < 0  # always false
        clip_high = (ratio > b) & (advantage > 0)
    elif KIND == "sapo":
        temperature = tl.where(advantage > 0, a, b)
        steep = temperature * (ratio - 1)
        gate = 1 / (1 + tl.exp(-steep))
        policy = gate * (4 / temperature) * advantage
        bounded = tl.minimum(ratio, 1e30, propagate_nan=tl.PropagateNan.ALL)
        slope = 4 * gate * (1 / (1 + tl.exp(steep))) * bounded * advantage
        clip_low = ratio < 0
        clip_high = clip_low
    else:
        least, most = 1 - a, 1 + b
        clip_low = (ratio < least) & (advantage < 0)
        clip_high = (ratio > most) & (advantage > 0)
        is_constant = clip_low | clip_high
        bounded = ratio
        if delta is not None:
            bounded = tl.minimum(ratio, delta, propagate_nan=tl.PropagateNan.ALL)
            is_constant |= ratio > tl.where(advantage > 0, delta, tl.maximum(delta, most))
        clipped = tl.clamp(ratio, least, most, propagate_nan=tl.PropagateNan.ALL)
        policy = tl.minimum(bounded * advantage, clipped * advantage, propagate_nan=tl.PropagateNan.ALL)
        slope = tl.where(is_constant, 0.0, ratio * advantage)
    loss = -gain * policy
    kl = tl.where(clip_low, 0.0, 0.0)  # zeros of the ratio's shape
    dkl = kl
    if ref_logp is not None:
        gap = ref_logp - logp
        kl = _k3(gap)
        loss += kl_gain * kl
        dkl = -kl_gain * (kl + gap)
    return loss, -gain * slope, dkl, kl, clip_low, clip_high, ratio


@triton.jit
def _k3(gap):
    """exp(gap) - gap - 1; by its power series where the subtraction would cancel leading digits."""
    series = 1 / 720 + gap * (1 / 5040 + gap * (1 / 40320 + gap * (1 / 362880)))
    series = gap * gap * (1 / 2 + gap * (1 / 6 + gap * (1 / 24 + gap * (1 / 120 + gap * series))))
    return tl.where(tl.abs(gap) < 1, series, tl.exp(gap) - gap - 1)


@triton.jit
def store_token(tokens, n, token, mask, loss, kl, clip_low, clip_high, ratio):
    """Write a token's values for `reduce_kernel`, (5, n) fp32."""
    tl.store(tokens + token, loss, mask=mask)
    tl.store(tokens + n + token, kl, mask=mask)
    tl.store(tokens + 2 * n + token, clip_low.to(tl.float32), mask=mask)
    tl.store(tokens + 3 * n + token, clip_high.to(tl.float32), mask=mask)
    tl.store(tokens + 4 * n + token, ratio, mask=mask)


@triton.jit
def _load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n", "completions", "count"])
def grpo_kernel(
    n,
    completions,
    count,
    advantages,
    completion_cu,
    weights,
    denominator,
    beta,
    sampler_factor,
    logps,
    old_logps,
    ref_logps,
    a,
    b,
    delta,
    dlogps,
    tokens,
    k_pos,
    lambda_pos,
    k_neg,
    lambda_neg,
    KIND: tl.constexpr,
    AVERAGED: tl.constexpr,
    RATIO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program computes loss and gradient of one completion's tokens.

    RATIO: of which the log is a token's log ratio: its own ("token"), its completion's "mean", or "weight" phi(w).
    """
    completion = tl.program_id(0)
    advantage, gain, kl_gain = completion_terms(
        completion, count, advantages, completion_cu, weights, denominator, beta, AVERAGED
    )
    start, end = token_range(completion, completion_cu, completions, n, BLOCK)
    length = tl.maximum(end - start, 1).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    advantage += tl.zeros((BLOCK,), tl.float32)  # the interpreter cannot broadcast the scalar's comparisons
    common = 0.0  # the log ratio of all tokens
    if RATIO == "mean" and old_logps is not None:
        total = tl.zeros((BLOCK,), tl.float32)
        for at in range(start, end, BLOCK):
            mask = at + lanes < end
            total += _load(logps, at + lanes, mask) - _load(old_logps, at + lanes, mask)
        common = tl.sum(total, 0) / length
    elif RATIO == "weight":
        total = tl.zeros((BLOCK,), tl.float32)
        for at in range(start, end, BLOCK):
            mask = at + lanes < end
            if old_logps is not None:
                gap = _load(logps, at + lanes, mask) - _load(old_logps, at + lanes, mask)
                total += tl.clamp(gap, -20.0, 20.0, propagate_nan=tl.PropagateNan.ALL)
            if sampler_factor is not None:
                factor = tl.log(tl.where(mask, _load(sampler_factor, at + lanes, mask), 1.0))
                total += tl.clamp(factor, LOWEST, HIGHEST, propagate_nan=tl.PropagateNan.ALL)
        zeros = tl.zeros((BLOCK,), tl.float32)
        log_w = tl.clamp(zeros + tl.sum(total, 0), LOWEST, HIGHEST, propagate_nan=tl.PropagateNan.ALL)
        k, rate = tl.where(advantage >= 0, k_pos, k_neg), tl.where(advantage >= 0, lambda_pos, lambda_neg)
        common = k * log_w + rate * (1 - tl.exp(log_w))
    # The ratio uses a completion's mean log ratio, so each logp gets the mean slope; in cispo each keeps its own.
    mean_dpolicy = 0.0
    if RATIO == "mean" and KIND != "cispo":
        total = tl.zeros((BLOCK,), tl.float32)
        for at in range(start, end, BLOCK):
            mask = at + lanes < end
            share = tl.where(mask, gain, 0.0)
            if sampler_factor is not None:
                share *= _load(sampler_factor, at + lanes, mask)
            log_ratio = tl.zeros((BLOCK,), tl.float32) + common
            _, dpolicy, _, _, _, _, _ = token_objective(
                log_ratio, log_ratio, None, advantage, share, 0.0, a, b, delta, KIND
            )
            total += dpolicy
        mean_dpolicy = tl.sum(total, 0) / length
    for at in range(start, end, BLOCK):
        token = at + lanes
        mask = token < end
        logp = _load(logps, token, mask)
        share = tl.where(mask, gain, 0.0)
        if sampler_factor is not None and RATIO != "weight":
            share *= _load(sampler_factor, token, mask)
        log_ratio = tl.zeros((BLOCK,), tl.float32) + common
        if old_logps is not None and RATIO == "token":
            log_ratio = logp - _load(old_logps, token, mask)
        ref_logp = None
        if ref_logps is not None:
            ref_logp = _load(ref_logps, token, mask)
        loss, dpolicy, dkl, kl, clip_low, clip_high, ratio = token_objective(
            logp, log_ratio, ref_logp, advantage, share, kl_gain, a, b, delta, KIND
        )
        if RATIO == "mean" and KIND != "cispo":
            dpolicy = tl.zeros((BLOCK,), tl.float32) + mean_dpolicy
        store_token(tokens, n, token, mask, loss, kl, clip_low, clip_high, ratio)
        tl.store(dlogps + token, (dpolicy + dkl).to(dlogps.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n"])
def reduce_kernel(tokens, loss, scalars, n, BLOCK: tl.constexpr):
    """(5, n) of `store_token` -> loss () and GrpoStats' scalars (7). One program, for a fixed order of sums."""
    lanes = tl.arange(0, BLOCK)
    losses = tl.zeros((BLOCK,), tl.float32)
    kls, lows, highs, regions, ratios = losses, losses, losses, losses, losses
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    most = -least
    for at in range(0, n, BLOCK):
        token = at + lanes
        mask = token < n
        low = tl.load(tokens + 2 * n + token, mask=mask, other=0.0)
        high = tl.load(tokens + 3 * n + token, mask=mask, other=0.0)
        ratio = tl.load(tokens + 4 * n + token, mask=mask, other=0.0)
        losses += tl.load(tokens + token, mask=mask, other=0.0)
        kls += tl.load(tokens + n + token, mask=mask, other=0.0)
        lows += low
        highs += high
        regions += tl.maximum(low, high)
        ratios += ratio
        least = tl.minimum(least, tl.where(mask, ratio, float("inf")), propagate_nan=tl.PropagateNan.ALL)
        most = tl.maximum(most, tl.where(mask, ratio, -float("inf")), propagate_nan=tl.PropagateNan.ALL)
    tl.store(loss, tl.sum(losses, 0))
    tl.store(scalars, tl.sum(kls, 0) / n)
    tl.store(scalars + 1, tl.sum(lows, 0) / n)
    tl.store(scalars + 2, tl.sum(highs, 0) / n)
    tl.store(scalars + 3, tl.sum(regions, 0) / n)
    tl.store(scalars + 4, tl.min(least, 0))
    tl.store(scalars + 5, tl.sum(ratios, 0) / n)
    tl.store(scalars + 6, tl.max(most, 0))


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def objective_arguments(o: LossOptions) -> tuple:
    """The arguments of `token_objective` that come from the options: old and reference logps (N), a, b and delta."""
    pair = o.sapo_temperatures if o.kind == "sapo" else (o.epsilon, o.epsilon_high)
    return _contiguous(o.old_logps), _contiguous(o.ref_logps), *pair, o.delta


def _completion_launch(kernel, n: int, advantages, completion_cu, o: LossOptions, *rest, **constants) -> Launch:
    """Launch with one program per completion; the kernel's first arguments are those of `completion_terms`."""
    factors = (_contiguous(x) for x in (o.weights, o.denominator))
    completions = completion_cu.shape[0] - 1
    count = max(completions if o.loss_type in OF_COMPLETIONS else n, 1)
    first = n, completions, count, advantages.contiguous(), completion_cu.contiguous(), *factors, o.beta
    constants |= {"AVERAGED": o.loss_type in AVERAGED, "BLOCK": 512}
    return Launch(kernel, (completions,), (*first, _contiguous(o.sampler_factor), *rest), constants, num_warps=4)


def terms_launch(terms: Tensor, advantages: Tensor, completion_cu: Tensor, o: LossOptions) -> Launch:
    """Fills terms (3, N): each token's advantage, factor of the policy term and factor of the KL."""
    return _completion_launch(terms_kernel, terms.shape[1], advantages, completion_cu, o, terms)


def terms_triton(n: int, advantages: Tensor, completion_cu: Tensor, o: LossOptions) -> Tensor:
    """terms (3, n); NaN if the offsets are wrong, which the host cannot check without waiting for the device."""
    terms = torch.full((3, n), float("nan"), device=advantages.device)
    terms_launch(terms, advantages, completion_cu, o).run()
    return terms


def grpo_launch(logps, advantages, completion_cu, o: LossOptions, dlogps, tokens) -> Launch:
    """The objective of every completion: logps (N) -> dlogps (N), tokens (5, N)."""
    k_pos, lambda_pos, k_neg, lambda_neg = o.vespo_gamma
    gamma = k_pos, max(lambda_pos, 1e-4), k_neg, max(lambda_neg, 1e-4)
    per_token = logps.contiguous(), *objective_arguments(o), dlogps, tokens, *gamma
    level = "mean" if o.importance_sampling_level == "sequence" else "token"
    kinds = {"KIND": o.kind, "RATIO": "weight" if o.loss_type == "vespo" else level}
    return _completion_launch(grpo_kernel, logps.shape[0], advantages, completion_cu, o, *per_token, **kinds)


def reduce_launch(tokens: Tensor, loss: Tensor, scalars: Tensor) -> Launch:
    """tokens (5, N) of `store_token` -> loss (), scalars (7); no launch if N is 0."""
    n = tokens.shape[1]
    return Launch(reduce_kernel, (min(n, 1),), (tokens, loss, scalars, n), {"BLOCK": 2048}, num_warps=8)


def reduce_triton(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """loss () and GrpoStats' scalars (7) from tokens (5, N); zeros where N is 0."""
    loss, scalars = (torch.zeros(shape, device=tokens.device) for shape in ((), 7))
    reduce_launch(tokens, loss, scalars).run()
    return loss, scalars


def grpo_loss_triton(logps: Tensor, advantages: Tensor, completion_cu: Tensor, *options) -> tuple[Tensor, ...]:
    """`grpo_loss_torch` on Triton, for all dtypes but fp64; NaN where the offsets are wrong."""
    dlogps = torch.full_like(logps, float("nan"), memory_format=torch.contiguous_format)
    tokens = torch.full((5, logps.shape[0]), float("nan"), device=logps.device)
    grpo_launch(logps, advantages, completion_cu, LossOptions._make(options), dlogps, tokens).run()
    loss, scalars = reduce_triton(tokens)
    return loss, dlogps, scalars
