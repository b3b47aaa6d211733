"""The options of the GRPO losses and their checks; loss.py has the mathematics."""

import math
from typing import NamedTuple, Self

from torch import Tensor

from .dispatch import FLOATS, INTS, check_choice, check_tensor

LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")
AVERAGED = ("grpo", "sapo")  # a completion's loss is the mean over its tokens, else their sum
OF_COMPLETIONS = (*AVERAGED, "luspo")  # a call's own denominator counts completions, else tokens
LEVELS = ("token", "sequence")
LOG_RATIO_BOUNDS = (math.log(1e-8), 20.0)  # of a completion's log ratio in `vespo`, as in its paper's code


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
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    vespo_gamma: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0)


class LossOptions(_LossFields):
    """The options of the three loss functions, in one object or as keywords.

    old_logps: (N), the logps of the rollout's weights; None: on-policy, ratio 1.
    ref_logps: (N), the reference's; None: no KL.
    weights: (BG), phi >= 0, a factor of the policy term; None: 1.
    sampler_factor: (N) >= 0, a factor of the policy term: min(exp(old - sampler), C) if another program sampled the
        tokens than computed `old_logps`; None: 1.
    denominator: 0-dim float tensor, the divisor of the sum; None: this call's completions (`grpo`, `sapo`, `luspo`) or
        tokens (`bnpo`, `dapo`, `cispo`, `vespo`). `dr_grpo` needs it: completions * max_completion_length, which only
        the caller can count.
    beta: KL coefficient. epsilon, epsilon_high: clip to [1 - epsilon, 1 + epsilon_high], epsilon_high None: epsilon.
    delta: upper bound of the unclipped ratio, above 0; None: unbounded.
    For `cispo` epsilon_high is required and bounds the ratio itself (in TRL and Liger, say, 5.0); epsilon is ignored.
    sapo_temperatures: of the soft gate of `sapo`, for A > 0 and for others. It ignores epsilon.
    vespo_gamma: k and lambda of the weight phi(w) of `vespo` for A >= 0, then for A < 0. It ignores epsilon, has the
        token level only, and takes `sampler_factor` into w.

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
        if o.kind != "clip" and o.delta is not None:
            raise ValueError(f"delta is {o.delta}; {o.loss_type!r} has no unclipped ratio to bound. Leave delta out.")
        if o.loss_type == "vespo":
            if o.importance_sampling_level == "sequence":
                raise ValueError("importance_sampling_level is 'sequence'; 'vespo' weighs completions. Use 'token'.")
            return o._replace(epsilon_high=math.inf)
        if o.loss_type == "sapo" and not min(o.sapo_temperatures) > 0:
            raise ValueError(f"sapo_temperatures are {o.sapo_temperatures}; both must be above 0.")
        if o.loss_type == "cispo":
            if o.epsilon_high is None or o.epsilon_high <= 0:
                raise ValueError(
                    f"epsilon_high is {o.epsilon_high}; 'cispo' needs a positive bound of the ratio. Pass, say, 5.0."
                )
            return o
        if not o.epsilon >= 0:
            raise ValueError(f"epsilon is {o.epsilon}; it must not be negative.")
        high = o.epsilon if o.epsilon_high is None else o.epsilon_high
        if high < 0:
            raise ValueError(f"epsilon_high is {high}; it must not be negative.")
        if o.delta is not None and not o.delta > 0:
            raise ValueError(f"delta is {o.delta}; the bound of the unclipped ratio must be above 0. None: no bound.")
        return o._replace(epsilon_high=high)

    @property
    def kind(self) -> str:
        """The objective of a token: "clip", "cispo" or "sapo". `vespo` is "cispo" with its weight as the ratio."""
        return {"cispo": "cispo", "vespo": "cispo", "sapo": "sapo"}.get(self.loss_type, "clip")

    @property
    def needs_all_logps(self) -> bool:
        """Whether a token's gradient needs the logps of its whole completion."""
        unweighted = self.old_logps is None and self.sampler_factor is None  # phi is 1
        return self.importance_sampling_level == "sequence" or (self.loss_type == "vespo" and not unweighted)


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
    "float epsilon, float epsilon_high, float? delta, str loss_type, str importance_sampling_level, "
    "float[] sapo_temperatures, float[] vespo_gamma"
)
