"""Sampling by Gumbel-max: a token depends on its own counters and logits alone, not on its batch or its rank."""

import torch
from torch import Tensor

from .checks import FLOATS, accumulation_dtype, check_tensor
from .dispatch import is_fast, register
from .sample_torch import sample_tokens_torch


def sample_tokens(
    logits: Tensor,
    *,
    seed: int,
    prompt_ids: Tensor,
    completion_ids: Tensor,
    positions: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    forbidden: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Draw one token for each row of logits.

    The filters apply in this order: forbidden ids are removed; of the others the top_k largest are kept; of those,
    renormalised, the smallest set of the likeliest tokens whose probabilities reach top_p is kept.

    Args:
        logits: (n, V) float.
        seed: 0 <= seed < 2^63.
        prompt_ids, completion_ids, positions: (n) int64, the row's counters: serial number of the prompt in the run's
            stream, index of the completion in its group, position of the token in the completion.
        temperature: 0 takes the likeliest allowed token.
        top_k: 0, or V and more: off. Exactly k are kept, also where logits are equal.
        top_p: in (0, 1]; 1: off.
        forbidden: (F) int64 ids that no row may draw, or None.

    Returns:
        tokens (n) int64 and logps (n) fp32 (fp64 for fp64 logits): the token's log-softmax at the temperature (at 1 for
        temperature 0) over the whole vocabulary, before any filter. Not differentiable.

    Raises:
        ValueError: a shape, a dtype or an option does not fit.
    """
    check_tensor("logits", logits, (None, None), FLOATS)
    n, vocabulary = logits.shape
    for name, counter in (("prompt_ids", prompt_ids), ("completion_ids", completion_ids), ("positions", positions)):
        check_tensor(name, counter, (n,), (torch.int64,))
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be at least 0 and below 2^63.")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; it must be at least 0.")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; it must be at least 0. Pass 0 to turn it off.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must lie in (0, 1]. Pass 1 to turn it off.")
    if forbidden is not None:
        check_tensor("forbidden", forbidden, (None,), (torch.int64,))
        if forbidden.shape[0] >= vocabulary:
            raise ValueError(f"{forbidden.shape[0]} ids of {vocabulary} are forbidden; at least one must be allowed.")
    triton = is_fast("sample_tokens", backend, logits)
    return torch.ops.boxgrpo.sample_tokens(
        logits, seed, prompt_ids, completion_ids, positions, temperature, top_k, top_p, forbidden, triton
    )


def _fake(logits, *_):
    n = logits.shape[0]
    return logits.new_empty(n, dtype=torch.int64), logits.new_empty(n, dtype=accumulation_dtype(logits))


register(
    "(Tensor logits, int seed, Tensor prompt_ids, Tensor completion_ids, Tensor positions, float temperature, "
    "int top_k, float top_p, Tensor? forbidden, bool triton) -> (Tensor, Tensor)",
    sample_tokens_torch,
    _fake,
)
