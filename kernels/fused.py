"""The GRPO loss straight from hidden states and the head, or from logits: loss and gradients in one sweep."""

import torch
from torch import Tensor

from .checks import accumulation_dtype, check_head, check_logits, check_writable, use_triton
from .chunks import HeadRows, LogitRows, backward, forward
from .loss import (
    OPTIONS_SCHEMA,
    GrpoStats,
    LossOptions,
    grpo_loss_torch,
    scale_saved_gradients,
    scaled_copy,
    token_objective,
    token_terms,
)


def fused_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    completion_cu: Tensor,
    *,
    temperature: float = 1.0,
    backend: str = "auto",
    **loss_options,
) -> tuple[Tensor, GrpoStats]:
    """grpo_loss(token_logps(hidden, weight, targets)), with the gradients made while each chunk of logits exists.

    At the token level no logit is computed twice (6·N·V·H FLOP, 4 with a frozen head) and on a CPU rows without
    gradient leave before the second product; on a GPU that would wait for the device, so a caller leaves them out. The
    sequence level needs all logps of a completion first and pays a second pass. With Triton a second backward through a
    retained graph raises: the first scales the gradients where they lie.

    Args:
        hidden: (N, H) float; row n predicts targets[n].
        weight: (V, H), the head, of hidden's dtype.
        targets: (N) int64.
        advantages: (BG) float.
        completion_cu: (BG+1) int32 or int64, offsets of each completion's tokens into N.
        temperature: above 0; logps are those of logits / temperature.
        **loss_options: see `LossOptions`.

    Returns:
        loss, 0-dim fp32 (fp64 for fp64 inputs), differentiable once in hidden and weight, and `GrpoStats`.

    Raises:
        ValueError: a shape, a dtype or an option does not fit; on a CPU also offsets that do not end at N.
    """
    check_head(hidden, weight, targets, temperature)
    options = LossOptions(**loss_options).checked(hidden.shape[0], advantages, completion_cu)
    triton = use_triton("fused_grpo_loss", backend, hidden)
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
    backend: str = "auto",
    **loss_options,
) -> tuple[Tensor, GrpoStats]:
    """grpo_loss(token_logps_from_logits(logits, targets)); loss and gradient in one read and one write of the logits.

    Args:
        logits: (N, V) float; -inf is a probability of 0.
        targets: (N) int64.
        advantages: (BG) float.
        completion_cu: (BG+1) int32 or int64, offsets of each completion's tokens into N.
        temperature: above 0.
        overwrite_logits: the forward writes the gradient over the logits, if they need one. Anything else that reads
            the logits in its backward raises then, and so does a second backward. Not for torch.compile.
        **loss_options: see `LossOptions`.

    Returns:
        loss, 0-dim fp32 (fp64 for fp64 logits), differentiable once in the logits, and `GrpoStats`.

    Raises:
        ValueError: a shape, a dtype or an option does not fit; on a CPU also offsets that do not end at N.
    """
    check_logits(logits, targets, temperature)
    options = LossOptions(**loss_options).checked(logits.shape[0], advantages, completion_cu)
    if overwrite_logits:
        check_writable("overwrite_logits", logits)
    triton = use_triton("fused_grpo_loss_from_logits", backend, logits)
    wanted = torch.is_grad_enabled() and logits.requires_grad
    op = _Overwriting.apply if overwrite_logits else torch.ops.boxgrpo.fused_grpo_loss_from_logits
    outputs = op(logits, targets, advantages, completion_cu, temperature, wanted, triton, *options)
    loss, logps, entropy, stats = outputs[0], *outputs[-3:]
    return loss, GrpoStats(*stats.unbind(), logps, entropy)


def fused_grpo_loss_torch(
    hidden, weight, targets, advantages, completion_cu, temperature, grad_hidden, grad_weight, *options
) -> tuple[Tensor, ...]:
    """Twin: loss (), dhidden (N, H), dweight (V, H), logps (N), entropy (N), stats (7); an unwanted gradient is (0)."""
    rows = HeadRows(hidden, weight, temperature, grad_hidden, grad_weight)
    loss, *rest = _sweep(rows, targets, advantages, completion_cu, grad_hidden or grad_weight, options)
    return loss, *rows.gradients(hidden, weight), *rest


def fused_grpo_loss_from_logits_torch(
    logits, targets, advantages, completion_cu, temperature, grad, *options, overwrite: bool = False
) -> tuple[Tensor, ...]:
    """Twin: loss (), dlogits (N, V) or (0), logps (N), entropy (N), stats (7)."""
    rows = LogitRows(logits, temperature, grad, overwrite)
    loss, *rest = _sweep(rows, targets, advantages, completion_cu, grad, options)
    return loss, logits.new_empty(0) if rows.dlogits is None else rows.dlogits, *rest


def _sweep(rows, targets, advantages, completion_cu, grad: bool, options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, logps, entropy, stats; the gradients stay in `rows`."""
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
    return loss, logps, entropy, stats


def _head(hidden, weight, targets, advantages, completion_cu, temperature, grad_hidden, grad_weight, triton, *options):
    if triton:
        from .doors_triton import fused_grpo_loss_triton as f
    else:
        f = fused_grpo_loss_torch
    return f(hidden, weight, targets, advantages, completion_cu, temperature, grad_hidden, grad_weight, *options)


def _logits(logits, targets, advantages, completion_cu, temperature, grad, triton, *options, overwrite: bool = False):
    if triton:
        from .doors_triton import fused_grpo_loss_from_logits_triton as f
    else:
        f = fused_grpo_loss_from_logits_torch
    return f(logits, targets, advantages, completion_cu, temperature, grad, *options, overwrite=overwrite)


_INPUTS = "Tensor targets, Tensor advantages, Tensor completion_cu, float temperature"
_head_op = torch.library.custom_op(
    "boxgrpo::fused_grpo_loss",
    _head,
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, {_INPUTS}, bool grad_hidden, bool grad_weight, bool triton, "
    f"{OPTIONS_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_logits_op = torch.library.custom_op(
    "boxgrpo::fused_grpo_loss_from_logits",
    _logits,
    mutates_args=(),
    schema=f"(Tensor logits, {_INPUTS}, bool grad, bool triton, {OPTIONS_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _fake_results(rows: Tensor) -> tuple[Tensor, ...]:
    dtype, n = accumulation_dtype(rows), rows.shape[0]
    loss, logps, entropy, stats = (rows.new_empty(shape, dtype=dtype) for shape in ((), n, n, 7))
    return loss, logps, entropy, stats


@_head_op.register_fake
def _(hidden, weight, targets, advantages, completion_cu, temperature, grad_hidden, grad_weight, triton, *options):
    loss, *rest = _fake_results(hidden)
    dhidden = hidden.new_empty(hidden.shape if grad_hidden else (0,))
    dweight = weight.new_empty(weight.shape if grad_weight else (0,))
    return loss, dhidden, dweight, *rest


@_logits_op.register_fake
def _(logits, targets, advantages, completion_cu, temperature, grad, triton, *options):
    loss, *rest = _fake_results(logits)
    return loss, logits.new_empty(logits.shape if grad else (0,)), *rest


def _save(n_gradients: int):
    def setup_context(ctx, inputs, output) -> None:
        ctx.n_inputs, ctx.triton = len(inputs), inputs[-len(LossOptions._fields) - 1]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # or the backward would be handed zeros of dweight's size
        ctx.save_for_backward(*output[1 : 1 + n_gradients])

    return setup_context


def _backward(ctx, dloss, *_):
    return scale_saved_gradients(ctx, dloss, ctx.n_inputs, in_place=ctx.triton)


_head_op.register_autograd(_backward, setup_context=_save(2))
_logits_op.register_autograd(_backward, setup_context=_save(1))


class _Overwriting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, *args):
        storage = logits.detach()  # shares the version counter: the writes below are seen by autograd
        loss, _, *rest = _logits(storage, *args, overwrite=True)
        ctx.n_inputs, ctx.triton = 1 + len(args), args[-len(LossOptions._fields) - 1]
        ctx.save_for_backward(storage)
        ctx.mark_non_differentiable(*rest)
        return loss, *rest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, *_):
        (dlogits,) = ctx.saved_tensors
        if ctx.triton:
            return scale_saved_gradients(ctx, dloss, ctx.n_inputs, in_place=True)
        scaled = dlogits.mul_(dloss) if dloss.device.type == "cpu" else dlogits.copy_(scaled_copy(dlogits, dloss))
        return scaled, *(None,) * (ctx.n_inputs - 1)
