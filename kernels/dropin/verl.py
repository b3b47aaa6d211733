"""Replacements for `verl.utils.kernel.linear_cross_entropy`, `verl.utils.torch_functional.logprobs_from_logits` and
`verl.trainer.ppo.core_algos.compute_grpo_outcome_advantage`.
"""

from collections import defaultdict

import torch
from torch import Tensor

from boxgrpo.kernels.advantages import group_advantages
from boxgrpo.kernels.dispatch import FLOATS, INTS, check_choice, check_tensor
from boxgrpo.kernels.logps import token_logps, token_logps_from_logits

REDUCTIONS = {"none": lambda logps: logps, "sum": torch.sum, "mean": torch.mean}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: "torch.distributed.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """`token_logps` with its entropy; (N, V) logits are never in memory.

    Args:
        hidden: (…, H) float, N rows in all. weight: (V, H) of hidden's dtype. labels: (…) int, N in all.
        temperature: above 0; None: 1.
        reduction: of the logps, "none", "sum" or "mean"; None: "none".
        dist_process_group: None or a group of one rank; in verl each of its ranks holds a share of the vocabulary.

    Returns:
        logps (N), or 0-dim if reduced, and entropy (N), nats, fp32 (fp64 for fp64 inputs), differentiable once.

    Raises:
        ValueError: more than one rank; a reduction, shapes, dtypes or a temperature that do not fit.
    """
    if dist_process_group is not None and (ranks := torch.distributed.get_world_size(dist_process_group)) > 1:
        raise ValueError(
            f"dist_process_group has {ranks} ranks; a head that is split by vocabulary is not supported. Gather it."
        )
    reduction = (reduction or "none").lower()
    check_choice("reduction", reduction, tuple(REDUCTIONS))
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), labels.flatten().long()
    temperature = 1.0 if temperature is None else temperature
    logps, entropy = token_logps(rows, weight, labels, temperature=temperature, entropy=True)
    return REDUCTIONS[reduction](logps), entropy


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """`token_logps_from_logits`.

    Args:
        logits: (…, V) float. labels: (…) int.
        inplace_backward: the backward writes the gradient over the logits, which are lost then.

    Returns:
        (…) nats, fp32 (fp64 for fp64 logits), differentiable once.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    logps = token_logps_from_logits(rows, labels.flatten().long(), inplace_backward=inplace_backward)
    return logps.view(logits.shape[:-1])


@torch.no_grad()
def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config=None,
) -> tuple[Tensor, Tensor]:
    """`group_advantages` of the sums of rewards, in groups of any sizes.

    Args:
        token_level_rewards: (n, T) float or int. response_mask: (n, T).
        index: n hashable group labels, as a numpy array, a tensor or a list.
        epsilon: added to the std (ddof 1) in the divisor.
        norm_adv_by_std_in_grpo: divide by std + epsilon; False: only subtract the mean.
        config: ignored, as in verl.

    Returns:
        The advantages (n, T), fp32 for integers, twice: a response's value at each of its tokens, 0 where the mask
        is 0. For a response alone in its group, mean 0 and std 1 are used, as in verl, so that its reward is kept.
        Equal rewards give exactly 0.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    n = len(index)
    check_tensor("token_level_rewards", token_level_rewards, (n, None), (*FLOATS, *INTS, torch.bool))
    if response_mask.shape != token_level_rewards.shape:
        shape = tuple(token_level_rewards.shape)
        raise ValueError(f"response_mask has shape {tuple(response_mask.shape)}; it must be the rewards', {shape}.")
    scores = token_level_rewards.sum(1)
    scores = scores if scores.is_floating_point() else scores.float()
    members = defaultdict(list)
    for row, group in enumerate(index.tolist() if hasattr(index, "tolist") else index):
        members[group].append(row)
    by_size = defaultdict(list)
    for rows in members.values():
        by_size[len(rows)].append(rows)
    scale = "group" if norm_adv_by_std_in_grpo else "none"
    advantages = scores / (1 + epsilon) if norm_adv_by_std_in_grpo else scores.clone()  # for groups of one
    for size, groups in by_size.items():
        if size > 1:
            rows = torch.tensor(groups, device=scores.device)
            found, _, _ = group_advantages(scores[rows], scores[rows], difficulty="none", scale=scale, eps=epsilon)
            advantages[rows] = found.to(scores.dtype)
    advantages = advantages.unsqueeze(1) * response_mask
    return advantages, advantages
