"""Replacements for TRL 1.16's `trl.trainer.utils._ChunkedLogProbFunction` and its `selective_log_softmax` functions."""

import torch
from torch import Tensor

from boxgrpo.kernels.logps import token_logps_from_logits

from .head import EXTRAS, LogitMap, head_logps


class ChunkedLogProbFunction:
    """Replaces TRL's autograd function: `trl.trainer.utils._ChunkedLogProbFunction = ChunkedLogProbFunction`.

    GRPOTrainer and RLOOTrainer call it for every log-probability that they train on or compare with.
    """

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", *EXTRAS),
    ) -> tuple[Tensor | None, ...]:
        """log softmax at `targets` of softcap · tanh(scale · (hidden @ weight.T + bias) / softcap) / temperature.

        Without bias, soft cap and extra outputs this is `token_logps`; with them it takes as many FLOP. Under autocast
        the product is of the autocast dtype, else of hidden's, as in TRL; the logits are always fp32, and so are the
        gradients' sums, which are rounded only to the dtype of what they belong to.

        Args:
            hidden: (N, H) float. weight: (V, H) float. bias: (V) float. targets: (N) int.
            temperature: above 0.
            chunk_size: ignored; our chunks are whole rows, TRL's are columns.
            final_logit_softcapping: above 0.
            outputs: which of "entropy", "log_sum_sq_probs", "mean_logits" and "is_top1" to compute; "log_probs" is
                always computed.

        Returns:
            log_probs (N) in nats and entropy (N) in nats, differentiable once in hidden, weight and bias;
            log_sum_sq_probs (N), log of the sum of p²; mean_logits (N), the mean of a row's logits;
            is_top1 (N) bool, whether the target is a row's first maximum. fp32 (fp64 for fp64 inputs), or None.

        Raises:
            ValueError: shapes, dtypes, temperature, soft cap or a name in `outputs` do not fit.
        """
        unknown = sorted(set(outputs) - {"log_probs", "entropy", *EXTRAS})
        if unknown:
            raise ValueError(f"outputs holds {unknown[0]!r}; it may hold log_probs, entropy, {', '.join(EXTRAS)}.")
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        if hasattr(weight, "ds_id"):  # DeepSpeed ZeRO-3 gathers the head for this call only, and the backward reads it
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        found = head_logps(
            hidden,
            weight,
            targets.long(),
            bias=bias,
            dtype=dtype,
            logit_map=LogitMap(temperature, final_logit_softcapping, logit_scale),
            entropy="entropy" in outputs,
            extras=tuple(name for name in EXTRAS if name in outputs),
        )
        return tuple(found.get(name) for name in ("log_probs", "entropy", *EXTRAS))


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """log softmax(logits / temperature) at `index`.

    Args:
        logits: (…, V) float.
        index: (…) or (…, K) int, K ids of each row.
        temperature: above 0.
        row_mask: of index's shape; where it is 0 the result is 0 and has no gradient, whatever the logits and the id.

    Returns:
        Of index's shape, nats, fp32 (fp64 for fp64 logits) as from TRL's Triton kernel; its CPU path returns logits'
        dtype.

    Raises:
        ValueError: shapes, dtypes or temperature do not fit.
    """
    return _selected(logits, index, temperature, row_mask, entropy=False)[0]


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_log_softmax` and the entropy (…) of each row in nats, detached unless `entropy_requires_grad`."""
    logps, entropy = _selected(logits, index, temperature, row_mask, entropy=True)
    return logps, entropy if entropy_requires_grad else entropy.detach()


def _selected(logits, index, temperature, row_mask, entropy) -> tuple[Tensor, Tensor | None]:
    shape, several = logits.shape[:-1], index.dim() == logits.dim()
    if (index.shape[:-1] if several else index.shape) != shape:
        raise ValueError(f"index has shape {tuple(index.shape)}; it must be {tuple(shape)}, or that and (K).")
    kept = torch.ones_like(index, dtype=torch.bool) if row_mask is None else row_mask != 0
    if kept.shape != index.shape:
        raise ValueError(f"row_mask has shape {tuple(kept.shape)}; it must be index's, {tuple(index.shape)}.")
    live = kept.any(-1) if several else kept
    rows, ids = logits.reshape(-1, logits.shape[-1]), index.long().masked_fill(~kept, 0)
    # For several ids per row, the row's largest logit is scored; the others follow from their differences to it.
    top = rows.detach().argmax(1, keepdim=True) if several else None
    targets = top.squeeze(1) if several else ids.flatten()
    found = token_logps_from_logits(rows, targets, temperature=temperature, entropy=entropy)
    logps, entropies = found if entropy else (found, None)
    if several:
        chosen, largest = (rows.gather(1, at).to(logps.dtype) for at in (ids.flatten(0, -2), top))
        logps = logps.unsqueeze(1) + (chosen - largest) / temperature
    logps = logps.view(index.shape).masked_fill(~kept, 0)
    return logps, entropies.view(shape).masked_fill(~live, 0) if entropy else None
