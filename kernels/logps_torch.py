"""Torch twins of the log-probabilities' ops, in chunks of rows; the arguments are those of the ops in logps.py."""

from torch import Tensor

from .rows_torch import HeadRows, LogitRows, backward, forward


def token_logps_torch(hidden, weight, targets, temperature: float, entropy: bool) -> tuple[Tensor, ...]:
    """(N, H), (V, H), (N) -> logps (N), entropy (N), or (0) if not wanted, and no state (0)."""
    return _logps(HeadRows(hidden, weight, temperature), targets, entropy)


def token_logps_backward_torch(
    hidden, weight, targets, temperature, entropy, state, dlogps, dentropy, grad_hidden, grad_weight
) -> tuple[Tensor, Tensor]:
    """Upstream (N), (N) or (0) -> dhidden (N, H), dweight (V, H); an unwanted one is (0). `state` is unread."""
    rows = HeadRows(hidden, weight, temperature, grad_hidden, grad_weight)
    return _gradients(rows, targets, entropy, dlogps, dentropy)


def token_logps_from_logits_torch(logits, targets, temperature: float, entropy: bool) -> tuple[Tensor, ...]:
    """(N, V), (N) -> logps (N), entropy (N), or (0) if not wanted, and no state (0)."""
    return _logps(LogitRows(logits, temperature), targets, entropy)


def token_logps_from_logits_backward_torch(
    logits, targets, temperature, entropy, state, dlogps, dentropy, overwrite: bool = False
) -> Tensor:
    """dlogits (N, V), in the logits' own storage with `overwrite`. `state` is unread."""
    rows = LogitRows(logits, temperature, grad=True, overwrite=overwrite)
    return _gradients(rows, targets, entropy, dlogps, dentropy)[0]


def _logps(rows: HeadRows | LogitRows, targets: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    return *forward(rows, targets, entropy), targets.new_empty(0).float()


def _gradients(rows: HeadRows | LogitRows, targets: Tensor, entropy, dlogps, dentropy) -> tuple[Tensor, ...]:
    backward(rows, targets, dlogps, *((entropy, dentropy) if entropy.numel() == targets.numel() else ()))
    return rows.results()
