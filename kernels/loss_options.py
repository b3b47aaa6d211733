"""Options and statistics of the GRPO losses."""

from typing import NamedTuple, Self

from torch import Tensor

from .checks import FLOATS, INTS, check_choice, check_tensor

LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo")
LEVELS = ("token", "sequence")


class GrpoStats(NamedTuple):
    """Detached tensors on the device. Scalars are 0-dim means over the call's tokens, 0 where there are none.

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
    entropy: Tensor  # (N) nats; (0) from grpo_loss, which has no distributions


class LossOptions(NamedTuple):
    """The `**loss_options` of the three loss functions.

    old_logps: (N), the logps of the rollout's weights; None: on-policy, ratio 1.
    ref_logps: (N), the reference's; None: no KL.
    weights: (BG), phi >= 0, a factor of the policy term; None: 1.
    sampler_factor: (N) >= 0, a factor of the policy term: min(exp(old - sampler), C) where the tokens were sampled by
        another program than computed `old_logps`; None: 1.
    denominator: 0-dim float tensor, the divisor of the sum; None: this call's completions (`grpo`) or tokens (`bnpo`,
        `dapo`, `cispo`). `dr_grpo` needs it: completions * max_completion_length, known to the caller only.
    beta: KL coefficient. epsilon, epsilon_high: clip to [1 - epsilon, 1 + epsilon_high], epsilon_high None: epsilon.
    delta: upper bound of the unclipped ratio, above 1 + epsilon_high; None: unbounded.
    For `cispo` epsilon_high is required and bounds the ratio itself (in TRL and Liger, say, 5.0); epsilon is unread.
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
        shapes = {"old_logps": (n,), "ref_logps": (n,), "sampler_factor": (n,), "weights": (completions,)}
        for name, shape in (shapes | {"denominator": ()}).items():
            if (tensor := getattr(self, name)) is not None:
                check_tensor(name, tensor, shape, FLOATS)
        if self.loss_type == "dr_grpo" and self.denominator is None:
            raise ValueError(
                "loss_type is 'dr_grpo' and denominator is None; it divides by completions * max_completion_length. "
                "Pass that product as a 0-dim tensor."
            )
        return self.with_checked_values()

    def with_checked_values(self) -> Self:
        """Refuse values that no call can use; fill in epsilon_high. Tensors are not looked at."""
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_choice("importance_sampling_level", self.importance_sampling_level, LEVELS)
        if self.beta < 0:
            raise ValueError(f"beta is {self.beta}; it must not be negative.")
        if self.loss_type == "cispo":
            if self.epsilon_high is None or self.epsilon_high <= 0:
                raise ValueError(
                    f"epsilon_high is {self.epsilon_high}; 'cispo' needs a positive bound of the ratio. Pass, say, 5.0."
                )
            if self.delta is not None:
                raise ValueError(f"delta is {self.delta}; 'cispo' has no unclipped ratio to bound. Leave delta out.")
            return self
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


# The fields of `LossOptions` in their order; the ops take each as an argument.
OPTIONS_SCHEMA = (
    "Tensor? old_logps, Tensor? ref_logps, Tensor? weights, Tensor? sampler_factor, Tensor? denominator, float beta, "
    "float epsilon, float epsilon_high, float? delta, str loss_type, str importance_sampling_level"
)
