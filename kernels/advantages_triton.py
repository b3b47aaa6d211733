"""Triton kernel of group_advantages: one launch, no synchronisation."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .advantages import MIN_MIOU
from .dispatch import Launch, cdiv, next_power_of_2

ELEMENTS = 1024  # target size of a program's tile, which consists of whole groups


@triton.jit
def _load_tile(pointer, group, column, groups, size):
    """Load rows `group` of a (groups, size) tensor as fp32, 0 outside of it; also return the mask of the inside."""
    mask = (group[:, None] < groups) & (column[None, :] < size)
    offsets = group[:, None].to(tl.int64) * size + column[None, :]
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32), mask


@triton.jit(do_not_specialize=["groups"])
def advantages_kernel(
    rewards,
    accuracy,
    advantages,
    weights,
    miou,
    groups,
    size,
    eps,
    least_miou,
    DIFFICULTY: tl.constexpr,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """A program computes GROUPS groups of at most SIZE rewards; for the batch's std each program reads all rewards."""
    column = tl.arange(0, SIZE)
    divisor = 1.0
    if SCALE == "batch":
        # Two passes, the first for the mean: the difference of large sums would lose the digits of a small variance.
        total = tl.zeros((GROUPS, SIZE), tl.float32)
        for at in range(0, groups, GROUPS):
            r, _ = _load_tile(rewards, at + tl.arange(0, GROUPS), column, groups, size)
            total += r
        batch_mean = tl.sum(total) / (groups * size)
        total = tl.zeros((GROUPS, SIZE), tl.float32)
        for at in range(0, groups, GROUPS):
            r, mask = _load_tile(rewards, at + tl.arange(0, GROUPS), column, groups, size)
            total += tl.where(mask, (r - batch_mean) * (r - batch_mean), 0.0)
        divisor = tl.sqrt(tl.sum(total) / (groups * size - 1)) + eps

    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    r, mask = _load_tile(rewards, group, column, groups, size)
    mean = tl.sum(r, 1) / size
    centred = tl.where(mask, r - mean[:, None], 0.0)
    result = centred
    if SCALE == "group":
        result = centred / (tl.sqrt(tl.sum(centred * centred, 1) / (size - 1)) + eps)[:, None]
    elif SCALE == "batch":
        result = centred / divisor
    # Rounding may move the mean of equal rewards by an ulp, and an ulp over (std + eps) is not 0.
    equal = tl.max(tl.where(mask, r, float("-inf")), 1) == tl.min(tl.where(mask, r, float("inf")), 1)
    equal &= mean == mean  # NaN, which max and min ignore, stays in the result
    result = tl.where(equal[:, None], 0.0, result)
    tl.store(advantages + group[:, None].to(tl.int64) * size + column[None, :], result, mask=mask)

    a, _ = _load_tile(accuracy, group, column, groups, size)
    m = tl.sum(a, 1) / size
    if DIFFICULTY == "exp":
        phi = tl.exp(1 - m)
    elif DIFFICULTY == "power":
        phi = (1 - m) * (1 - m)
    elif DIFFICULTY == "log":
        phi = -tl.log(tl.clamp(m, least_miou, 1.0, propagate_nan=tl.PropagateNan.ALL))
    else:
        phi = tl.full((GROUPS,), 1.0, tl.float32)
    tl.store(miou + group, m, mask=group < groups)
    tl.store(weights + group, phi, mask=group < groups)


def advantages_launch(rewards, accuracy, difficulty, scale, eps, advantages, weights, miou) -> Launch:
    """rewards (B, G), accuracy (B, G) -> advantages (B, G), weights (B), miou (B), which the kernel fills."""
    groups, size = rewards.shape
    width = next_power_of_2(size)
    rows = min(max(ELEMENTS // width, 1), next_power_of_2(max(groups, 1)))
    inputs = rewards.contiguous(), accuracy.contiguous()
    arguments = *inputs, advantages, weights, miou, groups, size, eps, MIN_MIOU
    constants = {"DIFFICULTY": difficulty, "SCALE": scale, "GROUPS": rows, "SIZE": width}
    return Launch(advantages_kernel, (cdiv(groups, rows),), arguments, constants, num_warps=4)


def group_advantages_triton(
    rewards: Tensor, accuracy: Tensor, difficulty: str, scale: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`group_advantages_torch` on Triton, for all dtypes but fp64."""
    advantages = torch.empty_like(rewards, dtype=torch.float32, memory_format=torch.contiguous_format)
    weights = rewards.new_empty(rewards.shape[0], dtype=torch.float32)
    miou = torch.empty_like(weights)
    advantages_launch(rewards, accuracy, difficulty, scale, eps, advantages, weights, miou).run()
    return advantages, weights, miou
