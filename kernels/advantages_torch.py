"""Torch twin of `group_advantages`."""

import torch
from torch import Tensor

from .checks import accumulation_dtype

LEAST_MIOU = 0.02  # below it the "log" weight stays at -ln 0.02 = 3.9


def group_advantages_torch(
    rewards: Tensor, accuracy: Tensor, difficulty: str, scale: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, G) twice -> advantages (B, G), weights (B), mIoU (B)."""
    dtype = accumulation_dtype(rewards, accuracy)
    rewards, accuracy = rewards.to(dtype), accuracy.to(dtype)
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale != "none" and rewards.numel():
        std = rewards.std(1, keepdim=True) if scale == "group" else rewards.std()
        advantages = advantages / (std + eps)
    # The mean of equal rewards may be off by an ulp, and 1e-8 / (1e-8 + eps) is not 0.
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    advantages = advantages.masked_fill(equal, 0)

    miou = accuracy.mean(1)
    if difficulty == "exp":
        weights = torch.exp(1 - miou)
    elif difficulty == "power":
        weights = (1 - miou).square()
    elif difficulty == "log":
        weights = -torch.log(miou.clamp(LEAST_MIOU, 1))
    else:
        weights = torch.ones_like(miou)
    return advantages, weights, miou
