"""The GRPO loss from log-probabilities of scored tokens."""

import torch
from torch import Tensor

from .checks import FLOATS, accumulation_dtype, check_tensor
from .dispatch import is_fast, register
from .loss_options import OPTIONS_SCHEMA, GrpoStats, LossOptions
from .loss_torch import grpo_loss_torch
from .saved_gradients import register_saved_gradients


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
    triton = is_fast("grpo_loss", backend, logps)
    loss, _, stats = torch.ops.boxgrpo.grpo_loss(logps, advantages, completion_cu, triton, *options)
    logps = logps.detach().to(stats.dtype)
    return loss, GrpoStats(*stats.unbind(), logps, logps.new_empty(0))


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
