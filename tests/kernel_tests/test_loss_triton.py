"""The losses and group advantages in Triton against fp64, beside eager torch, and what autograd knows of them."""

import itertools

import pytest
import torch

from boxgrpo.kernels import fused_grpo_loss_from_logits, group_advantages, grpo_loss, token_logps_from_logits
from kernel_cases import (
    DEVICE,
    LANE,
    SHAPES,
    VARIANTS,
    eager,
    exact,
    gradients,
    hold_to_the_rule,
    make_case,
    options_of,
    seeded,
)

pytestmark = LANE


def run_loss(case, temperature, options, logits, door):
    logits = logits.detach().requires_grad_()
    loss, stats = door(logits, options)
    scalars = torch.stack([x.to(stats.logps.dtype) for x in stats[:7]])
    return loss.detach(), scalars, stats.logps, stats.entropy, gradients(3 * loss, logits)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(11, 257, torch.float32, 0.7), (13, 33_000, torch.bfloat16, 1.0)], ids=str)
@pytest.mark.parametrize("door", ["logits", "overwrite", "logps"])
def test_every_loss(door, shape, variant):
    """Loss, all statistics, logps, entropy and gradient of every variant."""
    case, temperature = make_case(*shape), shape[-1]
    options = options_of(case, VARIANTS[variant])
    rest = case["advantages"], case["completion_cu"]

    def ours(logits, options):
        if door == "logps":
            return from_logps(logits, options, backend="triton")
        body = logits * 1  # a leaf may not be overwritten
        return fused_grpo_loss_from_logits(
            body,
            case["targets"],
            *rest,
            temperature=temperature,
            overwrite_logits=door == "overwrite",
            backend="triton",
            **options,
        )

    def from_logps(logits, options, backend="torch"):
        logps, entropy = eager(logits if backend == "torch" else logits.float(), case["targets"], temperature)
        loss, stats = grpo_loss(
            logps, *map(exact, rest) if logits.dtype == torch.float64 else rest, backend=backend, **options
        )
        return loss, stats._replace(entropy=entropy.detach(), logps=logps.detach())

    double = {name: exact(x) for name, x in options.items()}
    got = run_loss(case, temperature, options, case["logits"], ours)
    theirs = run_loss(case, temperature, options, case["logits"], from_logps)
    truth = run_loss(case, temperature, double, case["logits"].double(), from_logps)
    hold_to_the_rule(got, theirs, truth, case["targets"])
    if variant == "delta":  # the case meets every branch
        _, low, high, region, least, _, most = truth[1]
        assert low > 0 and high > 0 and region < 1 and least < 0.8 and most > 1.5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fused_loss_on_every_shape(shape):
    case, temperature = make_case(*shape), shape[-1]
    options = options_of(case, {})
    rest = case["targets"], case["advantages"], case["completion_cu"]

    def ours(logits, options):
        return fused_grpo_loss_from_logits(logits, *rest, temperature=temperature, backend="triton", **options)

    def theirs(logits, options):
        logps, entropy = eager(logits, case["targets"], temperature)
        loss, stats = grpo_loss(logps, *(exact(x) if logits.dtype == torch.float64 else x for x in rest[1:]), **options)
        return loss, stats._replace(entropy=entropy.detach(), logps=logps.detach())

    double = {name: exact(x) for name, x in options.items()}
    hold_to_the_rule(
        run_loss(case, temperature, options, case["logits"], ours),
        run_loss(case, temperature, options, case["logits"], theirs),
        run_loss(case, temperature, double, case["logits"].double(), theirs),
        case["targets"],
    )


@pytest.mark.parametrize(
    "difficulty, scale", [*itertools.product(["exp", "power", "log", "none"], ["group", "batch", "none"])]
)
@pytest.mark.parametrize("shape", [(1, 2), (5, 7), (300, 8), (3, 2000)])
def test_group_advantages(shape, difficulty, scale):
    """Against the twin in fp64, beside the twin in fp32; rewards close together and far from 0."""
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


def test_nan_is_not_hidden():
    """A NaN logit reaches logps, loss and gradient of its row and leaves the others alone; NaN rewards stay NaN."""
    case = make_case(6, 40_000, torch.float32, 1.0)
    case["logits"][2, 39_999] = float("nan")
    logits = case["logits"].requires_grad_()
    options = options_of(case, {})
    loss, stats = fused_grpo_loss_from_logits(
        logits, case["targets"], case["advantages"], case["completion_cu"], backend="triton", **options
    )
    rows = gradients(loss, logits).isnan().any(1)
    assert loss.isnan() and rows.tolist() == stats.logps.isnan().tolist() == [i == 2 for i in range(6)]
    rewards = torch.tensor([[1.0, float("nan"), 1.0], [0.0, 1.0, 2.0]], device=DEVICE)
    for difficulty in ("exp", "power", "log", "none"):
        ours = group_advantages(rewards, rewards, difficulty=difficulty, backend="triton")
        twin = group_advantages(rewards, rewards, difficulty=difficulty, backend="torch")
        assert ours[0].isnan().any(1).tolist() == [True, False]
        for a, b in zip(ours, twin, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_rows_without_gradient_are_zero_and_not_read_again():
    """Equal rewards: advantages of 0 and no KL. NaN in such a row's logits cannot reach the backward's result."""
    case = make_case(6, 40_000, torch.float32, 1.0)
    advantages, _, _ = group_advantages(*torch.full((2, 1, 5), 0.3, device=DEVICE), backend="triton")
    logits = case["logits"].requires_grad_()
    loss, _ = fused_grpo_loss_from_logits(
        logits, case["targets"], advantages.flatten(), case["completion_cu"], backend="triton"
    )
    assert loss == 0 and not gradients(loss, logits).any()
    body = case["logits"].detach().clone().requires_grad_()
    logps = token_logps_from_logits(body, case["targets"], backend="triton")
    with torch.no_grad():
        body.data[3] = float("nan")
    upstream = torch.ones(6, device=DEVICE)
    upstream[3] = 0
    assert gradients((logps * upstream).sum(), body).isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_expanded_logits_are_not_written_over(backend):
    logits = torch.zeros(1, 9, device=DEVICE, requires_grad=True).expand(6, 9)
    case = make_case(6, 9, torch.float32, 1.0)
    rest = case["advantages"], case["completion_cu"]
    with pytest.raises(ValueError, match=r"overwrite_logits is set and the logits \(6, 9\) are expanded"):
        fused_grpo_loss_from_logits(logits, case["targets"], *rest, overwrite_logits=True, backend=backend)
    with pytest.raises(ValueError, match=r"inplace_backward is set .* Pass logits.contiguous"):
        token_logps_from_logits(logits, case["targets"], inplace_backward=True, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nan_does_not_reach_a_row_without_gradient(backend):
    """On policy and without a reference an advantage of 0 leaves nothing to flow back, whatever the logits are."""
    case = make_case(6, 40_000, torch.float32, 1.0)
    case["logits"][4] = float("nan")
    case["advantages"][3:] = 0
    logits, rest = case["logits"].requires_grad_(), (case["targets"], case["advantages"], case["completion_cu"])
    loss, stats = fused_grpo_loss_from_logits(logits, *rest, backend=backend)
    found = gradients(loss, logits)
    assert stats.logps.isnan().tolist() == [i == 4 for i in range(6)]
    assert found.isfinite().all() and found[:2].any() and not found[4].any()


def test_a_loss_scale_reaches_every_element(monkeypatch):
    """Far more blocks than programs, whole and strided: each program goes round several times."""
    monkeypatch.setattr("boxgrpo.kernels.scale_triton.SCALE_PROGRAMS", 2)
    case = make_case(6, 20_000, torch.float32, 1.0)
    rest = case["targets"], case["advantages"], case["completion_cu"]
    for logits in (case["logits"], case["logits"].t().contiguous().t()):
        found = []
        for scale in (1, 2):
            leaf = logits.clone(memory_format=torch.preserve_format).requires_grad_()
            loss, _ = fused_grpo_loss_from_logits(leaf * 1, *rest, overwrite_logits=True, backend="triton")
            found.append(gradients(scale * loss, leaf))
        assert torch.equal(2 * found[0], found[1])


@pytest.mark.parametrize("door", ["inplace", "overwrite", "fused"])
def test_what_a_kernel_overwrites_autograd_knows(door):
    """A second backward, or another reader of overwritten logits, raises; it is never silently wrong."""
    case = make_case(6, 300, torch.float32, 1.0)
    rest = case["targets"], case["advantages"], case["completion_cu"]
    leaf = case["logits"].requires_grad_()
    logits = leaf * 1
    reader = logits.square().sum()
    if door == "inplace":
        value = token_logps_from_logits(logits, rest[0], inplace_backward=True, backend="triton").sum()
    else:
        value, _ = fused_grpo_loss_from_logits(logits, *rest, overwrite_logits=door == "overwrite", backend="triton")
    first = torch.autograd.grad(2 * value, leaf, retain_graph=True)[0]
    assert first.any()
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(value, leaf, retain_graph=True)
    if door != "fused":
        with pytest.raises(RuntimeError, match="inplace operation"):
            torch.autograd.grad(reader, leaf)
