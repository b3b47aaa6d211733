"""The GRPO loss from log-probabilities: its options, torch twin and public function, and the objective of a token.

Formulas: ARCHITECTURE.md, section "The mathematics" (GRPO, Shao et al. 2024, eq. 3, with UniVG-R1's difficulty weight
phi on the policy term). Gradients are written out by hand: the fused losses need d loss / d logp of a row while its
logits still exist.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from .dispatch import FLOATS, INTS, accumulation_dtype, check_choice, check_tensor, register, runs_fast

LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo")
LEVELS = ("token", "sequence")


class GrpoStats(NamedTuple):
    """Detached tensors on the device. Scalars are 0-dim statistics of the call's tokens, 0 if there are none.

    `clip_low` is the share of tokens with ratio < 1 - epsilon and A < 0, `clip_high` that of tokens with ratio >
    1 + epsilon_high and A > 0 (for `cispo` ratio > epsilon_high, and clip_low is 0), `clip_region` that of either:
    TRL's definitions. At the sequence level every token has its completion's ratio.
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


class _LossFields(NamedTuple):
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    weights: Tensor | None = None
    sampler_factor: Tensor | None = None
    denominator: Tensor | None = None
    beta: float = 0.04
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    loss_type: str = "grpo"
    importance_sampling_level: str = "token"


class LossOptions(_LossFields):
    """The options of the three loss functions, in one object or as keywords.

    old_logps: (N), the logps of the rollout's weights; None: on-policy, ratio 1.
    ref_logps: (N), the reference's; None: no KL.
    weights: (BG), phi >= 0, a factor of the policy term; None: 1.
    sampler_factor: (N) >= 0, a factor of the policy term: min(exp(old - sampler), C) if another program sampled the
        tokens than computed `old_logps`; None: 1.
    denominator: 0-dim float tensor, the divisor of the sum; None: this call's completions (`grpo`) or tokens (`bnpo`,
        `dapo`, `cispo`). `dr_grpo` needs it: completions * max_completion_length, which only the caller can count.
    beta: KL coefficient. epsilon, epsilon_high: clip to [1 - epsilon, 1 + epsilon_high], epsilon_high None: epsilon.
    delta: upper bound of the unclipped ratio, above 1 + epsilon_high; None: unbounded.
    For `cispo` epsilon_high is required and bounds the ratio itself (in TRL and Liger, say, 5.0); epsilon is ignored.

    The constructor checks the values; tensors added with `_replace` are checked by the loss functions.

    Raises:
        ValueError: a value out of its range.
    """

    __slots__ = ()

    def __new__(cls, *args, **kwargs) -> Self:
        o = super().__new__(cls, *args, **kwargs)
        check_choice("loss_type", o.loss_type, LOSS_TYPES)
        check_choice("importance_sampling_level", o.importance_sampling_level, LEVELS)
        if o.beta < 0:
            raise ValueError(f"beta is {o.beta}; it must not be negative.")
        if o.loss_type == "cispo":
            if o.epsilon_high is None or o.epsilon_high <= 0:
                raise ValueError(
                    f"epsilon_high is {o.epsilon_high}; 'cispo' needs a positive bound of the ratio. Pass, say, 5.0."
                )
            if o.delta is not None:
                raise ValueError(f"delta is {o.delta}; 'cispo' has no unclipped ratio to bound. Leave delta out.")
            return o
        if not 0 <= o.epsilon <= 1:
            raise ValueError(f"epsilon is {o.epsilon}; it must lie between 0 and 1.")
        high = o.epsilon if o.epsilon_high is None else o.epsilon_high
        if high < 0:
            raise ValueError(f"epsilon_high is {high}; it must not be negative.")
        if o.delta is not None and o.delta <= 1 + high:
            raise ValueError(
                f"delta is {o.delta}; the bound of the unclipped ratio must exceed 1 + epsilon_high = {1 + high}. "
                "Raise delta."
            )
        return o._replace(epsilon_high=high)


def options_of_call(
    n: int, advantages: Tensor, completion_cu: Tensor, options: LossOptions | None, keywords: dict
) -> LossOptions:
    """`options`, or those of `keywords`, for a call that scores n tokens; refuse tensors that do not fit them."""
    if options is not None and keywords:
        raise ValueError(f"options and {', '.join(keywords)} are given. Put all of them into options, or leave it out.")
    o = LossOptions(**keywords) if options is None else options
    check_tensor("completion_cu", completion_cu, (None,), INTS)
    completions = completion_cu.shape[0] - 1
    if completions < 0:
        raise ValueError("completion_cu is empty; it holds completions + 1 offsets. Pass [0] for no completion.")
    check_tensor("advantages", advantages, (completions,), FLOATS)
    shapes = {"old_logps": (n,), "ref_logps": (n,), "sampler_factor": (n,), "weights": (completions,)}
    for name, shape in (shapes | {"denominator": ()}).items():
        if (tensor := getattr(o, name)) is not None:
            check_tensor(name, tensor, shape, FLOATS)
    if o.loss_type == "dr_grpo" and o.denominator is None:
        raise ValueError(
            "loss_type is 'dr_grpo' and denominator is None; it divides by completions * max_completion_length. "
            "Pass that product as a 0-dim tensor."
        )
    return o


# The fields of `LossOptions` in their order; the ops take each as an argument.
OPTIONS_SCHEMA = (
    "Tensor? old_logps, Tensor? ref_logps, Tensor? weights, Tensor? sampler_factor, Tensor? denominator, float beta, "
    "float epsilon, float epsilon_high, float? delta, str loss_type, str importance_sampling_level"
)


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
        # The minimum is constant exactly where the ratio is clipped or above delta, which exceeds 1 + epsilon_high.
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
    o, n, dtype = LossOptions._make(options), logps.shape[0], accumulation_dtype(logps)
    input_dtype, logps = logps.dtype, logps.to(dtype)
    terms, completion, lengths = token_terms(n, dtype, advantages, completion_cu, o)
    log_ratio, by_sequence = None, o.importance_sampling_level == "sequence"

    def mean_of_completion(x: Tensor) -> Tensor:
        sums = x.new_zeros(lengths.shape[0]).index_add_(0, completion, x)
        return (sums / lengths.clamp(min=1))[completion]

    if by_sequence and terms.old_logps is not None:
        log_ratio = mean_of_completion(logps - terms.old_logps)
    token = token_objective(logps, log_ratio, terms, o)
    # The ratio uses a completion's mean log ratio, so each logp gets the mean slope; in cispo each keeps its own.
    averaged = by_sequence and o.loss_type != "cispo"
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
