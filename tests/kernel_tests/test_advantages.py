"""group_advantages: the twin against the formulas, by hand with the statistics module; the kernel beside the twin."""

import itertools
import math
import statistics

import pytest
import torch

from boxgrpo.kernels import group_advantages
from boxgrpo.kernels.advantages import DIFFICULTIES, SCALES
from kernel_cases import DEVICE, assert_error_rule, assert_refused, on_triton, seeded

REWARDS = [[1.9, 0.3, 1.0, 0.0], [0.5, 0.5, 1.5, 1.25]]
ACCURACY = [[0.9, 0.3, 0.0, 0.0], [0.5, 0.5, 0.5, 0.25]]


def tensors(dtype=torch.float64):
    return torch.tensor(REWARDS, dtype=dtype), torch.tensor(ACCURACY, dtype=dtype)


@pytest.mark.parametrize("scale", SCALES)
def test_advantages_by_hand(scale):
    advantages, _, miou = group_advantages(*tensors(), scale=scale, eps=1e-2)
    for row, got in zip(REWARDS, advantages, strict=True):
        spread = {"group": statistics.stdev(row), "batch": statistics.stdev(REWARDS[0] + REWARDS[1])}
        divisor = spread[scale] + 1e-2 if scale in spread else 1.0
        want = [(r - statistics.mean(row)) / divisor for r in row]
        assert got.tolist() == pytest.approx(want, rel=1e-12)
    assert miou.tolist() == pytest.approx([0.3, 0.4375])


@pytest.mark.parametrize(
    "difficulty, phi",
    [
        ("exp", lambda m: math.exp(1 - m)),
        ("power", lambda m: (1 - m) ** 2),
        ("log", lambda m: -math.log(max(m, 0.02))),
        ("none", lambda m: 1.0),
    ],
)
def test_weights_by_hand(difficulty, phi):
    accuracy = torch.tensor([[0.0, 0.0], [0.01, 0.01], [0.2, 0.6], [1.0, 1.0]], dtype=torch.float64)
    _, weights, _ = group_advantages(accuracy, accuracy, difficulty=difficulty)
    assert weights.tolist() == pytest.approx([phi(m) for m in (0.0, 0.01, 0.4, 1.0)], rel=1e-12)


def test_the_log_weight_is_never_negative():
    """The mean of perfect answers may round to just above 1."""
    accuracy = torch.full((1, 8), 1 + 2e-7)
    _, weights, _ = group_advantages(accuracy, accuracy, difficulty="log")
    assert weights >= 0


@pytest.mark.parametrize("scale", SCALES)
def test_equal_rewards_give_exact_zeros(scale):
    """The fp32 mean of equal rewards may be an ulp off; neither that nor 0/0 may reach the loss."""
    for group in (3, 7, 8):
        equal = (torch.rand(1000, 1, generator=torch.Generator().manual_seed(group)) * 2).expand(-1, group)
        assert (equal.mean(1, keepdim=True) != equal).any() or group == 8
        advantages, _, _ = group_advantages(equal, equal / 2, scale=scale)
        assert not advantages.any()
        apart = equal + torch.eye(1000, group)  # the first groups are not equal
        advantages, _, _ = group_advantages(apart, equal / 2, scale=scale)
        assert advantages[:group].any(1).all() and not advantages[group:].any()


def test_dtypes_and_no_groups():
    rewards, accuracy = tensors(torch.bfloat16)
    assert [x.dtype for x in group_advantages(rewards, accuracy)] == [torch.float32] * 3
    assert [x.dtype for x in group_advantages(*tensors())] == [torch.float64] * 3
    for scale in SCALES:
        shapes = [x.shape for x in group_advantages(rewards[:0], accuracy[:0], scale=scale)]
        assert shapes == [(0, 4), (0,), (0,)]


def test_what_is_refused():
    rewards, accuracy = tensors()
    few = "num_generations is 1; a group needs at least 2. Raise --num_generations."
    assert_refused(
        (few, lambda: group_advantages(rewards[:, :1], accuracy[:, :1])),
        (r"accuracy has shape \(2, 3\); it must be \(2, 4\)", lambda: group_advantages(rewards, accuracy[:, 1:])),
        ("difficulty is 'hard'; it is one of exp", lambda: group_advantages(rewards, accuracy, difficulty="hard")),
        ("scale is 'rank'; it is one of group", lambda: group_advantages(rewards, accuracy, scale="rank")),
        ("group_advantages got a CPU tensor", lambda: group_advantages(rewards, accuracy, backend="triton")),
    )


@on_triton
@pytest.mark.parametrize("difficulty, scale", [*itertools.product(DIFFICULTIES, SCALES)])
@pytest.mark.parametrize("shape", [(1, 2), (5, 7), (300, 8), (3, 2000)])
def test_the_kernel(shape, difficulty, scale):
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
    assert_error_rule(ours, twin, truth)
    rewards[0, 1] = float("nan")  # stays NaN, in its own group where that alone gives the spread
    ours, twin = (group_advantages(rewards, accuracy, **options, backend=b) for b in ("triton", "torch"))
    assert ours[0][0].isnan().all() if scale != "none" else ours[0][0].isnan().any()
    torch.testing.assert_close(ours, twin, equal_nan=True)
