"""Log-probabilities of given tokens, from hidden states and the head or from logits."""

import torch
from torch import Tensor

from .checks import check_backend, check_head, check_logits
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
    check_backend("token_logps", backend, hidden)
    check_head(hidden, weight, targets, temperature)
    logps, entropies = torch.ops.boxgrpo.token_logps(hidden, weight, targets, temperature, entropy)
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
    check_backend("token_logps_from_logits", backend, logits)
    check_logits(logits, targets, temperature)
    op = _InplaceBackward.apply if inplace_backward else torch.ops.boxgrpo.token_logps_from_logits
    logps, entropies = op(logits, targets, temperature, entropy)
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


_head_op = torch.library.custom_op(
    "boxgrpo::token_logps",
    token_logps_torch,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, float temperature, bool entropy) -> (Tensor, Tensor)",
)
_head_backward_op = torch.library.custom_op(
    "boxgrpo::token_logps_backward",
    token_logps_backward_torch,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, float temperature, Tensor entropy, Tensor dlogps, "
    "Tensor dentropy, bool grad_hidden, bool grad_weight) -> (Tensor, Tensor)",
)
_logits_op = torch.library.custom_op(
    "boxgrpo::token_logps_from_logits",
    token_logps_from_logits_torch,
    mutates_args=(),
    schema="(Tensor logits, Tensor targets, float temperature, bool entropy) -> (Tensor, Tensor)",
)
_logits_backward_op = torch.library.custom_op(
    "boxgrpo::token_logps_from_logits_backward",
    token_logps_from_logits_backward_torch,
    mutates_args=(),
    schema="(Tensor logits, Tensor targets, float temperature, Tensor entropy, Tensor dlogps, Tensor dentropy) "
    "-> Tensor",
)


@_head_op.register_fake
def _(hidden, weight, targets, temperature, entropy):
    return _fake_logps(hidden, entropy)


@_logits_op.register_fake
def _(logits, targets, temperature, entropy):
    return _fake_logps(logits, entropy)


@_head_backward_op.register_fake
def _(hidden, weight, targets, temperature, entropy, dlogps, dentropy, grad_hidden, grad_weight):
    return (
        hidden.new_empty(hidden.shape if grad_hidden else (0,)),
        weight.new_empty(weight.shape if grad_weight else (0,)),
    )


@_logits_backward_op.register_fake
def _(logits, targets, temperature, entropy, dlogps, dentropy):
    return logits.new_empty(logits.shape)


def _fake_logps(rows: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    n = rows.shape[0]
    return rows.new_empty(n, dtype=dtype), rows.new_empty(n if entropy else 0, dtype=dtype)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.temperature, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _head_backward(ctx, dlogps, dentropy):
    hidden, weight, targets, entropy = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    gradients = torch.ops.boxgrpo.token_logps_backward(
        hidden, weight, targets, ctx.temperature, entropy, dlogps, dentropy, *wanted
    )
    dhidden, dweight = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return dhidden, dweight, None, None, None


def _logits_backward(ctx, dlogps, dentropy):
    logits, targets, entropy = ctx.saved_tensors
    dlogits = torch.ops.boxgrpo.token_logps_from_logits_backward(
        logits, targets, ctx.temperature, entropy, dlogps, dentropy
    )
    return dlogits, None, None, None


_head_op.register_autograd(_head_backward, setup_context=_save)
_logits_op.register_autograd(_logits_backward, setup_context=_save)


class _InplaceBackward(torch.autograd.Function):
    @staticmethod
    def forward(logits, targets, temperature, entropy):
        return token_logps_from_logits_torch(logits, targets, temperature, entropy)

    setup_context = staticmethod(_save)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogps, dentropy):
        logits, targets, entropy = ctx.saved_tensors
        dlogits = token_logps_from_logits_backward_torch(
            logits, targets, ctx.temperature, entropy, dlogps, dentropy, overwrite=True
        )
        return dlogits, None, None, None
