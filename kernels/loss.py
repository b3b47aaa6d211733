"""The GRPO loss from log-probabilities: its torch twin and public function, and the objective of a token.

Formulas: ARCHITECTURE.md, section "The mathematics" (GRPO, Shao et al. 2024, eq. 3, with UniVG-R1's difficulty weight
phi on the policy term). Gradients are written out by hand: the fused losses need d loss / d logp of a row while its
logits still exist.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import FLOATS, accumulation_dtype, check_tensor, register, runs_fast
from .loss_options import AVERAGED, LOG_RATIO_BOUNDS, OF_COMPLETIONS, OPTIONS_SCHEMA, LossOptions, options_of_call


class GrpoStats(NamedTuple):
    """Detached tensors on the device. Scalars are 0-dim statistics of the call's tokens, 0 if there are none.

    `clip_low` is the share of tokens with ratio < 1 - epsilon and A < 0, `clip_high` that of tokens with ratio >
    1 + epsilon_high and A > 0 (for `cispo` ratio > epsilon_high, and clip_low is 0), `clip_region` that of either:
    TRL's definitions. `sapo` and `vespo` do not clip. At the sequence level every token has its completion's ratio, and
    for `vespo` the ratio's statistics are those of its weight phi(w).
    """

    kl: Tensor
    clip_low: Tensor
    clip_high: Tensor
    clip_region: Tensor
    ratio_min: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    logps: Tensor  # (N) nats
    entropy: Tensor  # (N) nats; (0) from grpo_loss, which is not given the logits


class TokenTerms(NamedTuple):
    """The inputs of a token's objective except its logp; every tensor is (N)."""

    advantage: Tensor
    gain: Tensor  # factor of the policy term: phi * sampler_factor * s_i / denominator
    kl_gain: Tensor  # factor of the KL: beta * s_i / denominator
    old_logps: Tensor | None
    ref_logps: Tensor | None


class TokenObjective(NamedTuple):
    """(n) each: a token's loss, d policy / d log ratio and d KL / d logp, multiplied by its gains; and statistics."""

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
    """The terms of N tokens, each token's completion (N), and the completions' lengths (BG)."""
    if completion_cu.device.type == "cpu" and completion_cu[-1] != n:
        raise ValueError(f"completion_cu ends at {completion_cu[-1]}; the call scores {n} tokens. Both must agree.")
    lengths = completion_cu.diff()
    completion = torch.repeat_interleave(lengths, output_size=n)
    if o.denominator is not None:
        share = 1 / o.denominator.to(dtype)
    else:
        share = 1 / max(lengths.shape[0] if o.loss_type in OF_COMPLETIONS else n, 1)
    shares = torch.ones_like(lengths, dtype=dtype) * share  # (BG)
    if o.loss_type in AVERAGED:
        shares = shares / lengths.clamp(min=1)
    gains = shares if o.weights is None else shares * o.weights.to(dtype)
    gain = gains[completion]
    if o.sampler_factor is not None and o.loss_type != "vespo":
        gain = gain * o.sampler_factor.to(dtype)
    old, ref = (None if tensor is None else tensor.to(dtype) for tensor in (o.old_logps, o.ref_logps))
    terms = TokenTerms(advantages.to(dtype)[completion], gain, o.beta * shares[completion], old, ref)
    return terms, completion, lengths


def token_objective(logps: Tensor, log_ratio: Tensor | None, terms: TokenTerms, o: LossOptions) -> TokenObjective:
    """The objective of each token. `log_ratio` (n): a completion's; None: logps - old_logps."""
    if log_ratio is None:
        log_ratio = torch.zeros_like(logps) if terms.old_logps is None else logps - terms.old_logps
    ratio, advantage = log_ratio.exp(), terms.advantage
    clip_low = clip_high = torch.zeros_like(ratio, dtype=torch.bool)
    if o.kind == "cispo":
        slope = ratio.clamp(max=o.epsilon_high) * advantage  # a constant: no gradient flows through the ratio
        policy = slope * logps
        clip_high = (ratio > o.epsilon_high) & (advantage > 0)
    elif o.kind == "sapo":
        temperature = torch.where(advantage > 0, *advantage.new_tensor(o.sapo_temperatures))
        steep = temperature * (ratio - 1)
        policy = torch.sigmoid(steep) * (4 / temperature) * advantage
        # Finite: for a ratio that overflows the gate is flat, and 0 * inf would be NaN.
        slope = 4 * torch.sigmoid(steep) * torch.sigmoid(-steep) * ratio.clamp(max=1e30) * advantage
    else:
        low, high = 1 - o.epsilon, 1 + o.epsilon_high
        clip_low = (ratio < low) & (advantage < 0)
        clip_high = (ratio > high) & (advantage > 0)
        bounded = ratio if o.delta is None else ratio.clamp(max=o.delta)
        policy = torch.minimum(bounded * advantage, ratio.clamp(low, high) * advantage)
        is_constant = clip_low | clip_high
        if o.delta is not None:  # of the two bounds above, the lower one holds for A > 0, else the higher one
            is_constant |= ratio > torch.where(advantage > 0, o.delta, max(o.delta, high))
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


def vespo_log_weight(log_ratio: Tensor, advantages: Tensor, gamma: tuple[float, ...]) -> Tensor:
    """log phi(w) = k log w + lambda (1 - w), from completions' log w and advantages, of one shape; `gamma` as above."""
    k_pos, lambda_pos, k_neg, lambda_neg = gamma
    log_w, is_good = log_ratio.clamp(*LOG_RATIO_BOUNDS), advantages >= 0
    k, rate = (torch.where(is_good, *log_w.new_tensor(x)) for x in ((k_pos, k_neg), (lambda_pos, lambda_neg)))
    return k * log_w - rate.clamp(min=1e-4) * torch.expm1(log_w)


def grpo_loss_torch(
    logps: Tensor, advantages: Tensor, completion_cu: Tensor, *options
) -> tuple[Tensor, Tensor, Tensor]:
    """(N), (BG), (BG+1), the fields of `LossOptions` -> loss (), dlogps (N), GrpoStats' scalars (7)."""
    o, n, dtype = LossOptions._make(options), logps.shape[0], accumulation_dtype(logps)
    input_dtype, logps = logps.dtype, logps.to(dtype)
    terms, completion, lengths = token_terms(n, dtype, advantages, completion_cu, o)
    log_ratio, by_sequence = None, o.importance_sampling_level == "sequence"

    def mean_of_completion(x: Tensor) -> Tensor:
        sums = x.new_zeros(lengths.shape[0]).index_add_(0, completion, x)
        return (sums / lengths.clamp(min=1))[completion]

    if by_sequence and terms.old_logps is not None:
        log_ratio = mean_of_completion(logps - terms.old_logps)
    elif o.loss_type == "vespo" and o.needs_all_logps:
        exact = logps.double()  # phi multiplies an error of log w by lambda * w
        parts = torch.zeros_like(exact) if terms.old_logps is None else (exact - terms.old_logps).clamp(-20, 20)
        if o.sampler_factor is not None:
            parts = parts + o.sampler_factor.double().log().clamp(*LOG_RATIO_BOUNDS)
        sums = parts.new_zeros(lengths.shape[0]).index_add_(0, completion, parts)
        log_ratio = vespo_log_weight(sums, advantages, o.vespo_gamma)[completion].to(dtype)
    token = token_objective(logps, log_ratio, terms, o)
    # The ratio uses a completion's mean log ratio, so each logp gets the mean slope; in cispo each keeps its own.
    averaged = by_sequence and o.kind != "cispo"
    dlogps = (mean_of_completion(token.dpolicy) if averaged else token.dpolicy) + token.dkl
    stats = token.ratio.new_zeros(7)
    if n:
        shares = token.kl, token.clip_low, token.clip_high, token.clip_low | token.clip_high
        means = torch.stack([x.to(dtype) for x in shares]).mean(1)
        stats = torch.cat([means, torch.stack([token.ratio.amin(), token.ratio.mean(), token.ratio.amax()])])
    return token.loss.sum(), dlogps.to(input_dtype), stats


def grpo_loss(
    logps: Tensor,
    advantages: Tensor,
    completion_cu: Tensor,
    *,
    options: LossOptions | None = None,
    backend: str = "auto",
    **loss_options,
) -> tuple[Tensor, GrpoStats]:
    """The GRPO loss of N scored tokens in BG completions.

    Args:
        logps: (N) float, nats; differentiable, once.
        advantages: (BG) float.
        completion_cu: (BG+1) int32 or int64, offsets of each completion's tokens into N; completions may be empty.
        options: a `LossOptions`; None: `LossOptions(**loss_options)`.

    Returns:
        loss, 0-dim fp32 (fp64 for fp64 logps), and `GrpoStats`, whose entropy is empty.

    Raises:
        ValueError: a shape, a dtype or an option does not fit; on a CPU also offsets that do not end at N.
    """
    check_tensor("logps", logps, (None,), FLOATS)
    options = options_of_call(logps.shape[0], advantages, completion_cu, options, loss_options)
    triton = runs_fast("grpo_loss", backend, logps)
    loss, _, stats = torch.ops.boxgrpo.grpo_loss(logps, advantages, completion_cu, triton, *options)
    logps = logps.detach().to(stats.dtype)
    return loss, GrpoStats(*stats.unbind(), logps, logps.new_empty(0))


def register_saved_gradients(op: torch.library.CustomOpDef, count: int, triton_index: int | None = None) -> None:
    """Register the autograd formula of an op with the results loss, gradients of its first `count` inputs, and others.

    `triton_index`: index of the op's argument `triton`; if that is true, the gradients are scaled in place.
    """

    def setup_context(ctx, inputs, output) -> None:
        ctx.n_inputs, ctx.in_place = len(inputs), triton_index is not None and inputs[triton_index]
        ctx.save_for_backward(*output[1 : 1 + count])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # otherwise autograd would allocate zeros of dweight's size for the backward

    op.register_autograd(scale_saved_gradients, setup_context=setup_context)


def scale_saved_gradients(ctx, dloss: Tensor | None, *_) -> tuple:
    """The saved gradients times dloss, and None for the other inputs.

    They may be as large as the logits: a dloss of 1 makes no copy on a CPU, and Triton scales them in place, so that a
    second backward through a retained graph raises.
    """
    if dloss is None:  # the graph does not reach the loss
        return (None,) * ctx.n_inputs
    eager = type(dloss) is Tensor  # False while torch.compile traces
    if ctx.in_place and eager:
        from .scale_triton import scale_triton as scaled
    elif eager and dloss.device.type == "cpu":
        scaled = (lambda gradient, _: gradient) if dloss == 1 else torch.mul
    else:
        scaled = scaled_copy
    saved = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    gradients = [scaled(gradient, dloss) if wanted else None for gradient, wanted in saved]
    return *gradients, *(None,) * (ctx.n_inputs - len(gradients))


def scaled_copy(gradient: Tensor, dloss: Tensor) -> Tensor:
    """gradient * dloss (0-dim), in gradient's dtype."""
    # On a GPU torch.mul would round dloss to the gradient's dtype, and a loss scale of 65536 to infinity.
    return (gradient.to(dloss.dtype) * dloss).to(gradient.dtype)


def _fake(logps, advantages, completion_cu, triton, *options):
    dtype = accumulation_dtype(logps)
    return logps.new_empty((), dtype=dtype), torch.empty_like(logps), logps.new_empty(7, dtype=dtype)


_op, _ = register(
    f"(Tensor logps, Tensor advantages, Tensor completion_cu, bool triton, {OPTIONS_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor)",
    grpo_loss_torch,
    _fake,
)
register_saved_gradients(_op, 1)
