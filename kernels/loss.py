"""The GRPO loss from log-probabilities, and the per-token objective that the fused losses share.

Formulas: DESIGN section 3 (GRPO, Shao et al. 2024, eq. 3, with UniVG-R1's difficulty weight phi on the policy term).
Gradients are written out by hand: the fused losses need d loss / d logp of a row while its logits still exist.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from .checks import FLOATS, INTS, accumulation_dtype, check_tensor, use_triton

LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo")
LEVELS = ("token", "sequence")


class GrpoStats(NamedTuple):
    """Detached tensors on the device. Scalars are 0-dim means over the call's tokens, 0 where there are none.

    `clip_low` counts ratio < 1 - epsilon with A < 0, `clip_high` ratio > 1 + epsilon_high with A > 0 (for `cispo`
    ratio > epsilon_high, and no low side), `clip_region` either: TRL's definitions. At the sequence level every token
    has its completion's ratio.
    """

    kl: Tensor
    clip_low: Tensor
    clip_high: Tensor
    clip_region: Tensor
    ratio_min: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    logps: Tensor  # (N) nats
    entropy: Tensor  # (N) nats; (0) from grpo_loss, which sees no distribution


class LossOptions(NamedTuple):
    """The `**loss_options` of the three loss doors.

    old_logps: (N), the logps of the rollout's weights; None: on-policy, ratio 1.
    ref_logps: (N), the reference's; None: no KL.
    weights: (BG), phi >= 0 on the policy term; None: 1.
    sampler_factor: (N) >= 0 on the policy term, min(exp(old - sampler), C) for a foreign sampler; None: 1.
    denominator: 0-dim float tensor, what the sum is divided by; None: this call's own completions (`grpo`) or tokens
        (`bnpo`, `dapo`, `cispo`). `dr_grpo` needs it: completions * max_completion_length, known to the caller only.
    beta: KL coefficient. epsilon, epsilon_high: clip to [1 - epsilon, 1 + epsilon_high], epsilon_high None: epsilon.
    delta: upper bound of the unclipped ratio, above 1 + epsilon_high; None: unbounded.
    For `cispo` epsilon_high is required and bounds the ratio itself (TRL and Liger: 5.0, say); epsilon plays no part.
    """

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

    def checked(self, n: int, advantages: Tensor, completion_cu: Tensor) -> Self:
        """Refuse what does not fit N tokens; fill in epsilon_high."""
        check_tensor("completion_cu", completion_cu, (None,), INTS)
        completions = completion_cu.shape[0] - 1
        if completions < 0:
            raise ValueError("completion_cu is empty; it holds completions + 1 offsets. Pass [0] for no completion.")
        check_tensor("advantages", advantages, (completions,), FLOATS)
        for name, shape in (
            ("old_logps", (n,)),
            ("ref_logps", (n,)),
            ("weights", (completions,)),
            ("sampler_factor", (n,)),
            ("denominator", ()),
        ):
            tensor = getattr(self, name)
            if tensor is not None:
                check_tensor(name, tensor, shape, FLOATS)
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type is {self.loss_type!r}; it is one of {', '.join(LOSS_TYPES)}.")
        if self.importance_sampling_level not in LEVELS:
            raise ValueError(
                f"importance_sampling_level is {self.importance_sampling_level!r}; it is one of {', '.join(LEVELS)}."
            )
        if self.loss_type == "dr_grpo" and self.denominator is None:
            raise ValueError(
                "loss_type is 'dr_grpo' and denominator is None; it divides by completions * max_completion_length. "
                "Pass that product as a 0-dim tensor."
            )
        if self.beta < 0:
            raise ValueError(f"beta is {self.beta}; it must not be negative.")
        if self.loss_type == "cispo":
            return self._checked_cispo()
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon is {self.epsilon}; it must lie between 0 and 1.")
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if high < 0:
            raise ValueError(f"epsilon_high is {high}; it must not be negative.")
        if self.delta is not None and self.delta <= 1 + high:
            raise ValueError(
                f"delta is {self.delta}; the bound of the unclipped ratio must exceed 1 + epsilon_high = {1 + high}. "
                "Raise delta."
            )
        return self._replace(epsilon_high=high)

    def _checked_cispo(self) -> Self:
        if self.epsilon_high is None or self.epsilon_high <= 0:
            raise ValueError(
                f"epsilon_high is {self.epsilon_high}; 'cispo' needs a positive bound of the ratio. Pass 5.0, say."
            )
        if self.delta is not None:
            raise ValueError(f"delta is {self.delta}; 'cispo' has no unclipped ratio to bound. Leave delta out.")
        return self


# The fields above, in their order; the ops take them flat.
OPTIONS_SCHEMA = (
    "Tensor? old_logps, Tensor? ref_logps, Tensor? weights, Tensor? sampler_factor, Tensor? denominator, float beta, "
    "float epsilon, float epsilon_high, float? delta, str loss_type, str importance_sampling_level"
)


def grpo_loss(
    logps: Tensor, advantages: Tensor, completion_cu: Tensor, *, backend: str = "auto", **loss_options
) -> tuple[Tensor, GrpoStats]:
    """The GRPO loss of N scored tokens in BG completions.

    Args:
        logps: (N) float, nats; differentiable, once.
        advantages: (BG) float.
        completion_cu: (BG+1) int32 or int64, offsets of each completion's tokens into N; completions may be empty.
        **loss_options: see `LossOptions`.

    Returns:
        loss, 0-dim fp32 (fp64 for fp64 logps), and `GrpoStats`, whose entropy is empty.

    Raises:
        ValueError: a shape, a dtype or an option does not fit; on a CPU also offsets that do not end at N.
    """
    check_tensor("logps", logps, (None,), FLOATS)
    options = LossOptions(**loss_options).checked(logps.shape[0], advantages, completion_cu)
    triton = use_triton("grpo_loss", backend, logps)
    loss, _, stats = torch.ops.boxgrpo.grpo_loss(logps, advantages, completion_cu, triton, *options)
    logps = logps.detach().to(stats.dtype)
    return loss, GrpoStats(*stats.unbind(), logps, logps.new_empty(0))


class TokenTerms(NamedTuple):
    """What the objective of a token depends on besides its logp; every tensor is (N)."""

    advantage: Tensor
    gain: Tensor  # share of the policy term: phi * factor * s_i / denominator
    kl_gain: Tensor  # share of the KL: beta * s_i / denominator
    old_logps: Tensor | None
    ref_logps: Tensor | None

    def rows(self, rows) -> Self:
        return TokenTerms(*(None if tensor is None else tensor[rows] for tensor in self))


class TokenObjective(NamedTuple):
    """(n) each: a token's part of the loss, d policy / d log ratio, d KL / d logp (all with their gains), and stats."""

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
    """Spread per-completion values over N tokens; also the completion's index (N) and the lengths (BG)."""
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
    """The objective of each token. `log_ratio` (n) stands in for logps - old_logps (sequence level); None: computed."""
    if log_ratio is None:
        log_ratio = torch.zeros_like(logps) if terms.old_logps is None else logps - terms.old_logps
    ratio, advantage = log_ratio.exp(), terms.advantage
    if o.loss_type == "cispo":
        slope = ratio.clamp(max=o.epsilon_high) * advantage  # a constant, in the paper's eyes
        policy = slope * logps
        clip_high = (ratio > o.epsilon_high) & (advantage > 0)
        clip_low = torch.zeros_like(clip_high)
    else:
        low, high = 1 - o.epsilon, 1 + o.epsilon_high
        clip_low = (ratio < low) & (advantage < 0)
        clip_high = (ratio > high) & (advantage > 0)
        bounded = ratio if o.delta is None else ratio.clamp(max=o.delta)
        policy = torch.minimum(bounded * advantage, ratio.clamp(low, high) * advantage)
        # min() takes a constant exactly where the token is clipped, or beyond delta (which is above the clip).
        still = clip_low | clip_high if o.delta is None else clip_low | clip_high | (ratio > o.delta)
        slope = (ratio * advantage).masked_fill(still, 0)
    loss, dpolicy = -terms.gain * policy, -terms.gain * slope
    if terms.ref_logps is None:
        kl = dkl = torch.zeros_like(logps)
    else:
        gap = terms.ref_logps - logps
        grown = torch.expm1(gap)
        kl = grown - gap
        loss, dkl = loss + terms.kl_gain * kl, -terms.kl_gain * grown
    return TokenObjective(loss, dpolicy, dkl, kl, clip_low, clip_high, ratio)


def grpo_loss_torch(
    logps: Tensor, advantages: Tensor, completion_cu: Tensor, *options
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin: (N), (BG), (BG+1), the fields of `LossOptions` -> loss (), dlogps (N), GrpoStats' scalars (7)."""
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
    # A completion's ratio moves with each of its logps by 1/|o|; cispo's slope is on logps and stays where it is.
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


def scale_saved_gradients(ctx, dloss: Tensor, n_inputs: int, in_place: bool = False) -> tuple:
    """The autograd formula of an op that already holds the gradients of its first inputs: None where it has none.

    A copy of them would be as large as the logits. A CPU looks whether dloss is 1 and hands them on as they are;
    `in_place` a kernel looks, and writes only if not. Then a second backward through a retained graph raises.
    """
    if dloss is None:  # a graph that does not reach the loss
        return (None,) * n_inputs
    eager = type(dloss) is Tensor  # and not a tracer
    if in_place and eager:
        from .loss_triton import scale_triton as scaled
    elif eager and dloss.device.type == "cpu":
        scaled = _as_it_is if dloss == 1 else torch.mul
    else:
        scaled = scaled_copy
    gradients = [
        scaled(gradient, dloss) if wanted else None
        for gradient, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    ]
    return *gradients, *(None,) * (n_inputs - len(gradients))


def _as_it_is(gradient: Tensor, dloss: Tensor) -> Tensor:
    return gradient


def scaled_copy(gradient: Tensor, dloss: Tensor) -> Tensor:
    """gradient * dloss (0-dim), in gradient's dtype."""
    # Off the CPU torch.mul would round dloss to the gradient's dtype, and a loss scale of 65536 to infinity.
    return (gradient.to(dloss.dtype) * dloss).to(gradient.dtype)


def _grpo_loss(logps, advantages, completion_cu, triton, *options):
    if triton:
        from .loss_triton import grpo_loss_triton as f
    else:
        f = grpo_loss_torch
    return f(logps, advantages, completion_cu, *options)


_op = torch.library.custom_op(
    "boxgrpo::grpo_loss",
    _grpo_loss,
    mutates_args=(),
    schema=f"(Tensor logps, Tensor advantages, Tensor completion_cu, bool triton, {OPTIONS_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(logps, advantages, completion_cu, triton, *options):
    dtype = accumulation_dtype(logps)
    return logps.new_empty((), dtype=dtype), torch.empty_like(logps), logps.new_empty(7, dtype=dtype)


def _save(ctx, inputs, output) -> None:
    ctx.n_inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1])


_op.register_autograd(lambda ctx, dloss, *_: scale_saved_gradients(ctx, dloss, ctx.n_inputs), setup_context=_save)
