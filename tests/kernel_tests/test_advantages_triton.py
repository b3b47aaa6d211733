"""group_advantages in Triton against the twin in fp64, beside the twin in fp32."""

import itertools

import pytest
import torch

from boxgrpo.kernels import group_advantages
from boxgrpo.kernels.advantages import DIFFICULTIES, SCALES
from kernel_cases import DEVICE, LANE, hold_to_the_rule, seeded

pytestmark = LANE


@pytest.mark.parametrize("difficulty, scale", [*itertools.product(DIFFICULTIES, SCALES)])
@pytest.mark.parametrize("shape", [(1, 2), (5, 7), (300, 8), (3, 2000)])
def test_group_advantages(shape, difficulty, scale):
    """Rewards close together and far from 0, and a group of equal ones."""
    g = seeded(shape[0])
    rewards, accuracy = (torch.rand(*shape, generator=g).to(DEVICE) for _ in range(2))
    rewards = 5 + 0.5 * rewards
    rewards[0] = rewards[0, 0]
    options = {"difficulty": difficulty, "scale": scale}
    ours = group_advantages(rewards.T.contiguous().T, accuracy, **options, backend="triton")
    twin = group_advantages(rewards, accuracy, **options, backend="torch")
    truth = group_advantages(rewards.double(), accuracy.double(), **options, backend="torch")
    assert not ours[0][0].any()  # exact zeros
    hold_to_the_rule(ours, twin, truth)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_nan_stays_nan(difficulty):
    rewards = torch.tensor([[1.0, float("nan"), 1.0], [0.0, 1.0, 2.0]], device=DEVICE)
    ours, twin = (group_advantages(rewards, rewards, difficulty=difficulty, backend=b) for b in ("triton", "torch"))
    assert ours[0].isnan().any(1).tolist() == [True, False]
    for a, b in zip(ours, twin, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
