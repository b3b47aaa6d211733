"""Torch twin of the GRPO loss from log-probabilities, and the objective of a token, which the fused losses share.

Formulas: ARCHITECTURE.md, section "The mathematics" (GRPO, Shao et al. 2024, eq. 3, with UniVG-R1's difficulty weight
phi on the policy term). Gradients are written out by hand: the fused losses need d loss / d logp of a row while its
logits still exist.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from .checks import accumulation_dtype
from .loss_options import LossOptions


class TokenTerms(NamedTuple):
    """All that the objective of a token depends on besides its logp; every tensor is (N)."""

    advantage: Tensor
    gain: Tensor  # share of the policy term: phi * factor * s_i / denominator
    kl_gain: Tensor  # share of the KL: beta * s_i / denominator
    old_logps: Tensor | None
    ref_logps: Tensor | None

    def rows(self, rows) -> Self:
        return TokenTerms(*(None if tensor is None else tensor[rows] for tensor in self))


class TokenObjective(NamedTuple):
    """(n) each: parts of the loss, d policy / d log ratio and d KL / d logp, all with their gains; and statistics."""

    loss: Tensor
    dpolicy: Tensor
    dkl: Tensor
    kl: Tensor
    clip_low: Tensor
    clip_high: Tensor
    ratio: Tensor


def token_terms(
    n: int, dtype: torch.dtype, advantages: Tensor, completion_cu: Tensor, o: LossOptions
) -> tuple[TokenTerms, Tensor, Tensor]:
    """Spread the values of completions over N tokens; also each token's completion (N) and the lengths (BG)."""
    if completion_cu.device.type == "cpu" and completion_cu[-1] != n:
        raise ValueError(f"completion_cu ends at {completion_cu[-1]}; the call scores {n} tokens. Both must agree.")
    lengths = completion_cu.diff()
    completion = torch.repeat_interleave(lengths, output_size=n)
    if o.denominator is not None:
        share = 1 / o.denominator.to(dtype)
    else:
        share = 1 / max(lengths.shape[0] if o.loss_type == "grpo" else n, 1)
    shares = torch.ones_like(lengths, dtype=dtype) * share  # (BG)
    if o.loss_type == "grpo":
        shares = shares / lengths.clamp(min=1)
    gains = shares if o.weights is None else shares * o.weights.to(dtype)
    gain = gains[completion]
    if o.sampler_factor is not None:
        gain = gain * o.sampler_factor.to(dtype)
    old, ref = (None if tensor is None else tensor.to(dtype) for tensor in (o.old_logps, o.ref_logps))
    terms = TokenTerms(advantages.to(dtype)[completion], gain, o.beta * shares[completion], old, ref)
    return terms, completion, lengths


def token_objective(logps: Tensor, log_ratio: Tensor | None, terms: TokenTerms, o: LossOptions) -> TokenObjective:
    """The objective of each token. `log_ratio` (n) is given at the sequence level; None: logps - old_logps."""
    if log_ratio is None:
        log_ratio = torch.zeros_like(logps) if terms.old_logps is None else logps - terms.old_logps
    ratio, advantage = log_ratio.exp(), terms.advantage
    if o.loss_type == "cispo":
        slope = ratio.clamp(max=o.epsilon_high) * advantage  # a constant: no gradient flows through the ratio
        policy = slope * logps
        clip_high = (ratio > o.epsilon_high) & (advantage > 0)
        clip_low = torch.zeros_like(clip_high)
    else:
        low, high = 1 - o.epsilon, 1 + o.epsilon_high
        clip_low = (ratio < low) & (advantage < 0)
        clip_high = (ratio > high) & (advantage > 0)
        bounded = ratio if o.delta is None else ratio.clamp(max=o.delta)
        policy = torch.minimum(bounded * advantage, ratio.clamp(low, high) * advantage)
        # The minimum is constant exactly where the ratio is clipped, or above delta (which exceeds the clip).
        is_constant = clip_low | clip_high if o.delta is None else clip_low | clip_high | (ratio > o.delta)
        slope = (ratio * advantage).masked_fill(is_constant, 0)
    loss, dpolicy = -terms.gain * policy, -terms.gain * slope
    if terms.ref_logps is None:
        kl = dkl = torch.zeros_like(logps)
    else:
        gap = terms.ref_logps - logps
        growth = torch.expm1(gap)
        kl = growth - gap
        loss, dkl = loss + terms.kl_gain * kl, -terms.kl_gain * growth
    return TokenObjective(loss, dpolicy, dkl, kl, clip_low, clip_high, ratio)


def grpo_loss_torch(
    logps: Tensor, advantages: Tensor, completion_cu: Tensor, *options
) -> tuple[Tensor, Tensor, Tensor]:
    """(N), (BG), (BG+1), the fields of `LossOptions` -> loss (), dlogps (N), GrpoStats' scalars (7)."""
    o, n, dtype = LossOptions(*options), logps.shape[0], accumulation_dtype(logps)
    input_dtype, logps = logps.dtype, logps.to(dtype)
    terms, completion, lengths = token_terms(n, dtype, advantages, completion_cu, o)
    log_ratio, by_sequence = None, o.importance_sampling_level == "sequence"

    def mean_of_completion(x: Tensor) -> Tensor:
        sums = x.new_zeros(lengths.shape[0]).index_add_(0, completion, x)
        return (sums / lengths.clamp(min=1))[completion]

    if by_sequence and terms.old_logps is not None:
        log_ratio = mean_of_completion(logps - terms.old_logps)
    token = token_objective(logps, log_ratio, terms, o)
    # A completion's ratio changes with each of its logps by 1/|o|; cispo's slope is that of each logp by itself.
    spread = by_sequence and o.loss_type != "cispo"
    dlogps = (mean_of_completion(token.dpolicy) if spread else token.dpolicy) + token.dkl
    return token.loss.sum(), dlogps.to(input_dtype), _scalars(token, n)


def _scalars(token: TokenObjective, n: int) -> Tensor:
    if n == 0:
        return token.ratio.new_zeros(7)
    means = torch.stack(
        [x.to(token.ratio.dtype) for x in (token.kl, token.clip_low, token.clip_high, token.clip_low | token.clip_high)]
    ).mean(1)
    return torch.cat([means, torch.stack([token.ratio.amin(), token.ratio.mean(), token.ratio.amax()])])
