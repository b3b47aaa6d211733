"""Log-probabilities of given tokens, from hidden states and the head or from logits."""

import torch
from torch import Tensor

from .chunks import HeadSweep, LogitSweep, backward, forward
from .dispatch import accumulation_dtype, check_scored_rows, check_writable, register, runs_fast


def token_logps_torch(hidden, weight, targets, temperature: float, entropy: bool) -> tuple[Tensor, ...]:
    """(N, H), (V, H), (N) -> logps (N), entropy (N), or (0) if not requested, and an empty state (0)."""
    return *forward(HeadSweep(hidden, weight), targets, temperature, entropy), hidden.new_empty(0, dtype=torch.float32)


def token_logps_backward_torch(
    hidden, weight, targets, temperature, entropy, state, dlogps, dentropy, grad_hidden, grad_weight
) -> tuple[Tensor, Tensor]:
    """dlogps (N), dentropy (N) or (0) -> dhidden (N, H), dweight (V, H); (0) if not requested. `state` is ignored."""
    sweep = HeadSweep(hidden, weight, grad_hidden, grad_weight)
    backward(sweep, targets, temperature, dlogps, entropy, dentropy)
    return sweep.results()


def token_logps_from_logits_torch(logits, targets, temperature: float, entropy: bool) -> tuple[Tensor, ...]:
    """(N, V), (N) -> logps (N), entropy (N), or (0) if not requested, and an empty state (0)."""
    return *forward(LogitSweep(logits), targets, temperature, entropy), logits.new_empty(0, dtype=torch.float32)


def token_logps_from_logits_backward_torch(
    logits, targets, temperature, entropy, state, dlogps, dentropy, overwrite: bool = False
) -> Tensor:
    """dlogits (N, V), in the logits' own storage with `overwrite`. `state` is ignored."""
    sweep = LogitSweep(logits, grad=True, overwrite=overwrite)
    backward(sweep, targets, temperature, dlogps, entropy, dentropy)
    return sweep.dlogits


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature) at `targets`, without (N, V) logits in memory.

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
    check_scored_rows(hidden, targets, temperature, weight)
    triton = runs_fast("token_logps", backend, hidden)
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
        targets, temperature, entropy: as in `token_logps`.
        inplace_backward: the backward overwrites the logits with their gradient; a second backward raises. Not for
            torch.compile.

    Returns:
        logps (N) in nats, fp32 (fp64 for fp64 logits); with `entropy` a pair.

    Raises:
        ValueError: shapes, dtypes, temperature or backend do not fit.
    """
    check_scored_rows(logits, targets, temperature)
    if inplace_backward:
        check_writable("inplace_backward", logits)
    triton = runs_fast("token_logps_from_logits", backend, logits)
    op = _InplaceBackward.apply if inplace_backward else torch.ops.boxgrpo.token_logps_from_logits
    logps, entropies, _ = op(logits, targets, temperature, entropy, triton)
    return (logps, entropies) if entropy else logps


def _fake_forward(rows: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    entropy, triton = rest[-2:]
    dtype, n = accumulation_dtype(rows), rows.shape[0]
    return (
        rows.new_empty(n, dtype=dtype),
        rows.new_empty(n if entropy else 0, dtype=dtype),
        rows.new_empty((2, n) if triton else (0,), dtype=torch.float32),
    )


def _fake_head_backward(hidden: Tensor, weight: Tensor, *rest) -> tuple[Tensor, ...]:
    *_, grad_hidden, grad_weight, _ = rest
    wanted = (hidden, grad_hidden), (weight, grad_weight)
    return tuple(tensor.new_empty(tensor.shape if grad else (0,)) for tensor, grad in wanted)


# `state` is what the Triton forward saves for its backward, (2, N) fp32; the twin saves nothing and returns (0).
_HEAD = "Tensor hidden, Tensor weight, Tensor targets, float temperature"
_LOGITS = "Tensor logits, Tensor targets, float temperature"
_RESULTS = "(Tensor logps, Tensor entropy, Tensor state)"
_UPSTREAM = "Tensor entropy, Tensor state, Tensor dlogps, Tensor dentropy"
_head_op, _ = register(f"({_HEAD}, bool entropy, bool triton) -> {_RESULTS}", token_logps_torch, _fake_forward)
_logits_op, _logits_forward = register(
    f"({_LOGITS}, bool entropy, bool triton) -> {_RESULTS}", token_logps_from_logits_torch, _fake_forward
)
register(
    f"({_HEAD}, {_UPSTREAM}, bool grad_hidden, bool grad_weight, bool triton) -> (Tensor, Tensor)",
    token_logps_backward_torch,
    _fake_head_backward,
)
_, _logits_backward = register(
    f"({_LOGITS}, {_UPSTREAM}, bool triton) -> Tensor",
    token_logps_from_logits_backward_torch,
    lambda logits, *_: logits.new_empty(logits.shape),
)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.temperature, _, ctx.triton = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[1], output[2])


def _head_autograd(ctx, *upstream):
    return _gradients(ctx, upstream, torch.ops.boxgrpo.token_logps_backward, ctx.needs_input_grad[:2])


def _logits_autograd(ctx, *upstream):
    return _gradients(ctx, upstream, torch.ops.boxgrpo.token_logps_from_logits_backward)


def _gradients(ctx, upstream, run, wanted: tuple[bool, ...] = (), **options) -> tuple[Tensor | None, ...]:
    *tensors, entropy, state = ctx.saved_tensors
    dlogps, dentropy, _ = upstream
    found = run(*tensors, ctx.temperature, entropy, state, dlogps, dentropy, *wanted, ctx.triton, **options)
    found = [x if want else None for x, want in zip(found, wanted, strict=True)] if wanted else [found]
    return *found, *(None,) * 4


_head_op.register_autograd(_head_autograd, setup_context=_save)
_logits_op.register_autograd(_logits_autograd, setup_context=_save)


class _InplaceBackward(torch.autograd.Function):
    forward = staticmethod(_logits_forward)
    setup_context = staticmethod(_save)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        return _gradients(ctx, upstream, _logits_backward, overwrite=True)
