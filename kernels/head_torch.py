"""Torch twins of the fused GRPO losses, in chunks of rows; the arguments are those of the ops in head.py."""

from torch import Tensor

from .loss_options import LossOptions
from .loss_torch import grpo_loss_torch, token_objective, token_terms
from .rows_torch import HeadRows, LogitRows, backward, forward


def fused_grpo_loss_torch(
    hidden, weight, targets, advantages, completion_cu, temperature, grad_hidden, grad_weight, *options
) -> tuple[Tensor, ...]:
    """loss (), dhidden (N, H), dweight (V, H), logps (N), entropy (N), stats (7); an unwanted gradient is (0)."""
    rows = HeadRows(hidden, weight, temperature, grad_hidden, grad_weight)
    return _loss_and_gradients(rows, targets, advantages, completion_cu, grad_hidden or grad_weight, options)


def fused_grpo_loss_from_logits_torch(
    logits, targets, advantages, completion_cu, temperature, grad, *options, overwrite: bool = False
) -> tuple[Tensor, ...]:
    """loss (), dlogits (N, V) or (0), logps (N), entropy (N), stats (7)."""
    rows = LogitRows(logits, temperature, grad, overwrite)
    return _loss_and_gradients(rows, targets, advantages, completion_cu, grad, options)


def _loss_and_gradients(rows, targets, advantages, completion_cu, grad: bool, options) -> tuple[Tensor, ...]:
    o = LossOptions(*options)
    in_one_pass = grad and o.importance_sampling_level == "token"
    gradient = None
    if in_one_pass:
        terms, _, _ = token_terms(rows.n, rows.dtype, advantages, completion_cu, o)

        def gradient(chunk, logps: Tensor) -> Tensor:
            token = token_objective(logps, None, terms.rows(chunk), o)
            return token.dpolicy + token.dkl

    logps, entropy = forward(rows, targets, entropy=True, gradient=gradient)
    loss, dlogps, stats = grpo_loss_torch(logps, advantages, completion_cu, *options)
    if grad and not in_one_pass:
        backward(rows, targets, dlogps)
    return loss, *rows.results(), logps, entropy, stats
