"""The GRPO loss from hidden states and the head, or from logits: loss and gradients in one pass over the logits."""

import torch
from torch import Tensor

from .chunks import HeadSweep, LogitSweep, backward, forward
from .dispatch import accumulation_dtype, check_scored_rows, check_writable, register, runs_fast
from .loss import (
    GrpoStats,
    TokenTerms,
    grpo_loss_torch,
    register_saved_gradients,
    scale_saved_gradients,
    scaled_copy,
    token_objective,
    token_terms,
)
from .loss_options import OPTIONS_SCHEMA, LossOptions, options_of_call


def fused_grpo_loss_torch(
    hidden, weight, targets, advantages, completion_cu, temperature, grad_hidden, grad_weight, *options
) -> tuple[Tensor, ...]:
    """loss (), dhidden (N, H), dweight (V, H), logps (N), entropy (N), stats (7); an unrequested gradient is (0)."""
    sweep = HeadSweep(hidden, weight, grad_hidden, grad_weight)
    return _loss_and_gradients(sweep, targets, advantages, completion_cu, temperature, options)


def fused_grpo_loss_from_logits_torch(
    logits, targets, advantages, completion_cu, temperature, grad, *options, overwrite: bool = False
) -> tuple[Tensor, ...]:
    """loss (), dlogits (N, V) or (0), logps (N), entropy (N), stats (7)."""
    sweep = LogitSweep(logits, grad, overwrite)
    return _loss_and_gradients(sweep, targets, advantages, completion_cu, temperature, options)


def _loss_and_gradients(sweep, targets, advantages, completion_cu, temperature, options) -> tuple[Tensor, ...]:
    o = LossOptions._make(options)
    in_one_pass = sweep.wanted and not o.needs_all_logps
    gradient = None
    if in_one_pass:
        terms, _, _ = token_terms(targets.shape[0], sweep.dtype, advantages, completion_cu, o)

        def gradient(rows, logps: Tensor) -> Tensor:
            terms_of_rows = TokenTerms(*(None if tensor is None else tensor[rows] for tensor in terms))
            token = token_objective(logps, None, terms_of_rows, o)
            return token.dpolicy + token.dkl

    logps, entropy = forward(sweep, targets, temperature, entropy=True, gradient=gradient)
    loss, dlogps, stats = grpo_loss_torch(logps, advantages, completion_cu, *options)
    if sweep.wanted and not in_one_pass:
        backward(sweep, targets, temperature, dlogps)
    return loss, *sweep.results(), logps, entropy, stats


def fused_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    completion_cu: Tensor,
    *,
    temperature: float = 1.0,
    options: LossOptions | None = None,
    backend: str = "auto",
    **loss_options,
) -> tuple[Tensor, GrpoStats]:
    """grpo_loss(token_logps(hidden, weight, targets)), with the gradients computed while each chunk of logits exists.

    At the token level no logit is computed twice (6·N·V·H FLOP, 4 with a frozen head). On a CPU rows without gradient
    are left out of the second product; on a GPU that would need a synchronisation, so the caller should leave them
    out. The sequence level, and `vespo` with `old_logps` or `sampler_factor`, need all logps of a completion first and
    compute the logits a second time. With Triton a second backward through a retained graph raises: the first scales
    the saved gradients in place.

    Args:
        hidden: (N, H) float; row n predicts targets[n].
        weight: (V, H), the head, of hidden's dtype.
        targets: (N) int64.
        advantages: (BG) float.
        completion_cu: (BG+1) int32 or int64, offsets of each completion's tokens into N.
        temperature: above 0; logps are those of logits / temperature.
        options: a `LossOptions`; None: `LossOptions(**loss_options)`.

    Returns:
        loss, 0-dim fp32 (fp64 for fp64 inputs), differentiable once in hidden and weight, and `GrpoStats`.

    Raises:
        ValueError: a shape, a dtype or an option does not fit; on a CPU also offsets that do not end at N.
    """
    check_scored_rows(hidden, targets, temperature, weight)
    options = options_of_call(hidden.shape[0], advantages, completion_cu, options, loss_options)
    triton = runs_fast("fused_grpo_loss", backend, hidden)
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    loss, _, _, logps, entropy, stats = torch.ops.boxgrpo.fused_grpo_loss(
        hidden, weight, targets, advantages, completion_cu, temperature, *wanted, triton, *options
    )
    return loss, GrpoStats(*stats.unbind(), logps, entropy)


def fused_grpo_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    completion_cu: Tensor,
    *,
    temperature: float = 1.0,
    overwrite_logits: bool = False,
    options: LossOptions | None = None,
    backend: str = "auto",
    **loss_options,
) -> tuple[Tensor, GrpoStats]:
    """grpo_loss(token_logps_from_logits(logits, targets)); loss and gradient in one read and one write of the logits.

    Args:
        logits: (N, V) float; -inf is a probability of 0.
        targets, advantages, completion_cu, temperature: as in `fused_grpo_loss`.
        overwrite_logits: the forward writes the gradient over the logits, if they need one. Any other operation whose
            backward reads the logits raises then, and so does a second backward. Not for torch.compile.
        options: a `LossOptions`; None: `LossOptions(**loss_options)`.

    Returns:
        loss, 0-dim fp32 (fp64 for fp64 logits), differentiable once in the logits, and `GrpoStats`.

    Raises:
        ValueError: a shape, a dtype or an option does not fit; on a CPU also offsets that do not end at N.
    """
    check_scored_rows(logits, targets, temperature)
    options = options_of_call(logits.shape[0], advantages, completion_cu, options, loss_options)
    if overwrite_logits:
        check_writable("overwrite_logits", logits)
    triton = runs_fast("fused_grpo_loss_from_logits", backend, logits)
    wanted = torch.is_grad_enabled() and logits.requires_grad
    op = _Overwriting.apply if overwrite_logits else torch.ops.boxgrpo.fused_grpo_loss_from_logits
    outputs = op(logits, targets, advantages, completion_cu, temperature, wanted, triton, *options)
    loss, logps, entropy, stats = outputs[0], *outputs[-3:]
    return loss, GrpoStats(*stats.unbind(), logps, entropy)


def _fake_head(hidden, weight, targets, advantages, completion_cu, temperature, grad_hidden, grad_weight, *_):
    return _fake(hidden, (hidden, grad_hidden), (weight, grad_weight))


def _fake_logits(logits, targets, advantages, completion_cu, temperature, grad, *_):
    return _fake(logits, (logits, grad))


def _fake(rows: Tensor, *wanted: tuple[Tensor, bool]) -> tuple[Tensor, ...]:
    dtype, n = accumulation_dtype(rows), rows.shape[0]
    loss, *rest = (rows.new_empty(shape, dtype=dtype) for shape in ((), n, n, 7))
    return loss, *(tensor.new_empty(tensor.shape if grad else (0,)) for tensor, grad in wanted), *rest


_INPUTS = "Tensor targets, Tensor advantages, Tensor completion_cu, float temperature"
_TRITON_INDEX = -len(LossOptions._fields) - 1  # index of the argument `triton`, which stands before the options
_head_op, _ = register(
    f"(Tensor hidden, Tensor weight, {_INPUTS}, bool grad_hidden, bool grad_weight, bool triton, {OPTIONS_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fused_grpo_loss_torch,
    _fake_head,
)
_logits_op, _run_on_logits = register(
    f"(Tensor logits, {_INPUTS}, bool grad, bool triton, {OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fused_grpo_loss_from_logits_torch,
    _fake_logits,
)
register_saved_gradients(_head_op, 2, _TRITON_INDEX)
register_saved_gradients(_logits_op, 1, _TRITON_INDEX)


class _Overwriting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, *args):
        storage = logits.detach()  # shares the version counter, so that autograd sees the writes below
        loss, _, *rest = _run_on_logits(storage, *args, overwrite=True)
        ctx.n_inputs, ctx.in_place = 1 + len(args), args[_TRITON_INDEX]
        ctx.save_for_backward(storage)
        ctx.mark_non_differentiable(*rest)
        return loss, *rest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, *_):
        (dlogits,) = ctx.saved_tensors
        if ctx.in_place:
            return scale_saved_gradients(ctx, dloss)
        scaled = dlogits.mul_(dloss) if dloss.device.type == "cpu" else dlogits.copy_(scaled_copy(dlogits, dloss))
        return scaled, *(None,) * (ctx.n_inputs - 1)
