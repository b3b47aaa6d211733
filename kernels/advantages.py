"""Group-relative advantages and difficulty weights."""

import torch
from torch import Tensor

from .dispatch import FLOATS, accumulation_dtype, call, check_choice, check_tensor, register, runs_fast

MIN_MIOU = 0.02  # the "log" weight is -ln(max(mIoU, 0.02)), at most 3.9


def group_advantages_torch(
    rewards: Tensor, accuracy: Tensor, difficulty: str, scale: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """rewards (B, G), accuracy (B, G) -> advantages (B, G), weights (B), mIoU (B)."""
    dtype = accumulation_dtype(rewards, accuracy)
    rewards, accuracy = rewards.to(dtype), accuracy.to(dtype)
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale != "none" and rewards.numel():
        std = rewards.std(1, keepdim=True) if scale == "group" else rewards.std()
        advantages = advantages / (std + eps)
    # Rounding may move the mean of equal rewards by an ulp, and an ulp over (std + eps) is not 0.
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    advantages = advantages.masked_fill(equal, 0)

    miou = accuracy.mean(1)
    if difficulty == "exp":
        weights = torch.exp(1 - miou)
    elif difficulty == "power":
        weights = (1 - miou).square()
    elif difficulty == "log":
        weights = -torch.log(miou.clamp(MIN_MIOU, 1))
    else:
        weights = torch.ones_like(miou)
    return advantages, weights, miou


DIFFICULTIES = ("exp", "power", "log", "none")
SCALES = ("group", "batch", "none")


def group_advantages(
    rewards: Tensor,
    accuracy: Tensor,
    *,
    difficulty: str = "exp",
    scale: str = "group",
    eps: float = 1e-4,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages within each group of G completions, and the group's difficulty weight, as in UniVG-R1.

    Formulas: ARCHITECTURE.md, section "The mathematics".

    Args:
        rewards: (B, G) float, G at least 2.
        accuracy: (B, G) float, IoU of each completion, 0-1.
        difficulty: phi of the group's mean IoU m: "exp" exp(1-m), "power" (1-m)^2, "log" -ln max(m, 0.02), "none" 1.
        scale: divide r - mean(r) by std + eps of the "group" or of the whole "batch", or by nothing ("none").
            The std is the sample one (ddof 1).

    Returns:
        advantages (B, G), weights phi (B) and mIoU (B), fp32 (fp64 for fp64 inputs). Equal rewards in a group give
        advantages of exactly 0.

    Raises:
        ValueError: fewer than 2 completions in a group, an unknown option, or shapes or dtypes that do not fit.
    """
    check_tensor("rewards", rewards, (None, None), FLOATS)
    check_tensor("accuracy", accuracy, rewards.shape, FLOATS)
    if rewards.shape[1] < 2:
        raise ValueError(f"num_generations is {rewards.shape[1]}; a group needs at least 2. Raise --num_generations.")
    check_choice("difficulty", difficulty, DIFFICULTIES)
    check_choice("scale", scale, SCALES)
    triton = runs_fast("group_advantages", backend, rewards, accuracy)
    return call(torch.ops.boxgrpo.group_advantages, _run, rewards, accuracy, difficulty, scale, eps, triton)


def _fake(rewards, accuracy, *_):
    dtype, groups = accumulation_dtype(rewards, accuracy), rewards.shape[0]
    return tuple(rewards.new_empty(shape, dtype=dtype) for shape in (rewards.shape, groups, groups))


_, _run = register(
    "(Tensor rewards, Tensor accuracy, str difficulty, str scale, float eps, bool triton) -> (Tensor, Tensor, Tensor)",
    group_advantages_torch,
    _fake,
)
