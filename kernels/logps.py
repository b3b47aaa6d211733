"""Log-probabilities of given tokens, from hidden states and the head or from logits."""

import torch
from torch import Tensor

from .checks import accumulation_dtype, check_head, check_logits, check_writable, use_triton
from .chunks import HeadRows, LogitRows, backward, forward


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature) at `targets`, without ever holding (N, V) logits.

    Args:
        hidden: (N, H) float; row n predicts targets[n].
        weight: (V, H), the head, of hidden's dtype.
        targets: (N) int64 token ids.
        temperature: above 0.
        entropy: also return the entropy of each row's distribution, differentiable.

    Returns:
        logps (N) in nats, fp32 (fp64 for fp64 inputs); with `entropy` a pair (logps, entropy (N) in nats).
        The backward takes any upstream gradient of both and computes the logits again: 8·N·V·H FLOP in all.
        Differentiable once, in hidden and weight; a frozen head's gradient is not computed.

    Raises:
        ValueError: shapes, dtypes, temperature or backend do not fit.
    """
    check_head(hidden, weight, targets, temperature)
    triton = use_triton("token_logps", backend, hidden)
    logps, entropies, _ = torch.ops.boxgrpo.token_logps(hidden, weight, targets, temperature, entropy, triton)
    return (logps, entropies) if entropy else logps


def token_logps_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at `targets`; a logit of -inf has probability 0.

    Args:
        logits: (N, V) float.
        targets: (N) int64 token ids.
        temperature: above 0.
        entropy: also return the entropy (N) in nats, differentiable.
        inplace_backward: the backward writes the gradient over the logits, which are gone after it (a second backward
            raises). Not for torch.compile.

    Returns:
        logps (N) in nats, fp32 (fp64 for fp64 logits); with `entropy` a pair.

    Raises:
        ValueError: shapes, dtypes, temperature or backend do not fit.
    """
    check_logits(logits, targets, temperature)
    if inplace_backward:
        check_writable("inplace_backward", logits)
    triton = use_triton("token_logps_from_logits", backend, logits)
    op = _InplaceBackward.apply if inplace_backward else torch.ops.boxgrpo.token_logps_from_logits
    logps, entropies, _ = op(logits, targets, temperature, entropy, triton)
    return (logps, entropies) if entropy else logps


def token_logps_torch(hidden, weight, targets, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    """Twin: (N, H), (V, H), (N) -> logps (N), entropy (N), or (0) if not asked for."""
    return forward(HeadRows(hidden, weight, temperature), targets, entropy)


def token_logps_backward_torch(
    hidden, weight, targets, temperature, entropy, dlogps, dentropy, grad_hidden, grad_weight
) -> tuple[Tensor, Tensor]:
    """Twin of the backward: upstream (N), (N) or (0) -> dhidden (N, H), dweight (V, H); an unwanted one is empty."""
    rows = HeadRows(hidden, weight, temperature, grad_hidden, grad_weight)
    backward(rows, targets, dlogps, *_wanted(entropy, dentropy, targets))
    return rows.gradients(hidden, weight)


def token_logps_from_logits_torch(logits, targets, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    """Twin: (N, V), (N) -> logps (N), entropy (N), or (0) if not asked for."""
    return forward(LogitRows(logits, temperature), targets, entropy)


def token_logps_from_logits_backward_torch(
    logits, targets, temperature, entropy, dlogps, dentropy, overwrite: bool = False
) -> Tensor:
    """Twin of the backward: dlogits (N, V), in the logits' own storage where `overwrite` is set."""
    rows = LogitRows(logits, temperature, grad=True, overwrite=overwrite)
    backward(rows, targets, dlogps, *_wanted(entropy, dentropy, targets))
    return rows.dlogits


def _wanted(entropy: Tensor, dentropy: Tensor, targets: Tensor) -> tuple:
    return (entropy, dentropy) if entropy.numel() == targets.numel() else (None, None)


def _head_forward(hidden, weight, targets, temperature, entropy, triton):
    if triton:
        from .doors_triton import token_logps_triton

        return token_logps_triton(hidden, weight, targets, temperature, entropy)
    return *token_logps_torch(hidden, weight, targets, temperature, entropy), targets.new_empty(0, dtype=torch.float32)


def _head_backward(
    hidden, weight, targets, temperature, entropy, state, dlogps, dentropy, grad_hidden, grad_weight, triton
):
    upstream, wanted = (dlogps, dentropy), (grad_hidden, grad_weight)
    if triton:
        from .doors_triton import token_logps_backward_triton

        return token_logps_backward_triton(hidden, weight, targets, temperature, entropy, state, *upstream, *wanted)
    return token_logps_backward_torch(hidden, weight, targets, temperature, entropy, *upstream, *wanted)


def _logits_forward(logits, targets, temperature, entropy, triton):
    if triton:
        from .doors_triton import token_logps_from_logits_triton

        return token_logps_from_logits_triton(logits, targets, temperature, entropy)
    logps, entropies = token_logps_from_logits_torch(logits, targets, temperature, entropy)
    return logps, entropies, targets.new_empty(0, dtype=torch.float32)


def _logits_backward(logits, targets, temperature, entropy, state, dlogps, dentropy, triton, overwrite: bool = False):
    if triton:
        from .doors_triton import token_logps_from_logits_backward_triton

        return token_logps_from_logits_backward_triton(
            logits, targets, temperature, entropy, state, dlogps, dentropy, overwrite
        )
    return token_logps_from_logits_backward_torch(logits, targets, temperature, entropy, dlogps, dentropy, overwrite)


# `state` is what the Triton forward keeps for its backward: (2, N) fp32, or (0) from the twin, which keeps nothing.
_RESULTS = "(Tensor logps, Tensor entropy, Tensor state)"
_UPSTREAM = "Tensor entropy, Tensor state, Tensor dlogps, Tensor dentropy"
_head_op = torch.library.custom_op(
    "boxgrpo::token_logps",
    _head_forward,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, float temperature, bool entropy, bool triton) "
    f"-> {_RESULTS}",
)
_head_backward_op = torch.library.custom_op(
    "boxgrpo::token_logps_backward",
    _head_backward,
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor targets, float temperature, {_UPSTREAM}, bool grad_hidden, "
    "bool grad_weight, bool triton) -> (Tensor, Tensor)",
)
_logits_op = torch.library.custom_op(
    "boxgrpo::token_logps_from_logits",
    _logits_forward,
    mutates_args=(),
    schema=f"(Tensor logits, Tensor targets, float temperature, bool entropy, bool triton) -> {_RESULTS}",
)
_logits_backward_op = torch.library.custom_op(
    "boxgrpo::token_logps_from_logits_backward",
    _logits_backward,
    mutates_args=(),
    schema=f"(Tensor logits, Tensor targets, float temperature, {_UPSTREAM}, bool triton) -> Tensor",
)


@_head_op.register_fake
def _(hidden, weight, targets, temperature, entropy, triton):
    return _fake_logps(hidden, entropy, triton)


@_logits_op.register_fake
def _(logits, targets, temperature, entropy, triton):
    return _fake_logps(logits, entropy, triton)


@_head_backward_op.register_fake
def _(hidden, weight, targets, temperature, entropy, state, dlogps, dentropy, grad_hidden, grad_weight, triton):
    return (
        hidden.new_empty(hidden.shape if grad_hidden else (0,)),
        weight.new_empty(weight.shape if grad_weight else (0,)),
    )


@_logits_backward_op.register_fake
def _(logits, targets, temperature, entropy, state, dlogps, dentropy, triton):
    return logits.new_empty(logits.shape)


def _fake_logps(rows: Tensor, entropy: bool, triton: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype, n = accumulation_dtype(rows), rows.shape[0]
    return (
        rows.new_empty(n, dtype=dtype),
        rows.new_empty(n if entropy else 0, dtype=dtype),
        rows.new_empty((2, n) if triton else (0,), dtype=torch.float32),
    )


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.temperature, _, ctx.triton = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[1], output[2])


def _head_autograd(ctx, dlogps, dentropy, _):
    hidden, weight, targets, entropy, state = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    gradients = torch.ops.boxgrpo.token_logps_backward(
        hidden, weight, targets, ctx.temperature, entropy, state, dlogps, dentropy, *wanted, ctx.triton
    )
    dhidden, dweight = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return dhidden, dweight, None, None, None, None


def _logits_autograd(ctx, dlogps, dentropy, _):
    logits, targets, entropy, state = ctx.saved_tensors
    dlogits = torch.ops.boxgrpo.token_logps_from_logits_backward(
        logits, targets, ctx.temperature, entropy, state, dlogps, dentropy, ctx.triton
    )
    return dlogits, None, None, None, None


_head_op.register_autograd(_head_autograd, setup_context=_save)
_logits_op.register_autograd(_logits_autograd, setup_context=_save)


class _InplaceBackward(torch.autograd.Function):
    forward = staticmethod(_logits_forward)
    setup_context = staticmethod(_save)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogps, dentropy, _):
        logits, targets, entropy, state = ctx.saved_tensors
        dlogits = _logits_backward(
            logits, targets, ctx.temperature, entropy, state, dlogps, dentropy, ctx.triton, overwrite=True
        )
        return dlogits, None, None, None, None
