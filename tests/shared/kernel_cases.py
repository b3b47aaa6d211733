"""Inputs, plain torch baselines and the error rule of the kernels' tests.

A test of both BACKENDS runs an op's torch twin in the ordinary lane. It runs the Triton kernel on a GPU, or on a CPU in
Triton's interpreter: TRITON_INTERPRET=1 and `-m triton`, in a process of its own, which `make test` does.
"""

import inspect
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from boxgrpo.kernels.dispatch import interpreting

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
LANE = [pytest.mark.triton, *([] if interpreting() else [pytest.mark.gpu])]
BACKENDS = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=LANE)])


def on_triton(test):
    """Decorates a test of Triton kernels alone."""
    for mark in LANE:
        test = mark(test)
    return test


TOLERANCE = 4e-6  # of the largest value: 32 ulps of fp32, where eager may happen to round to the exact value
OWN = ("old_logps", "ref_logps", "weights", "sampler_factor")  # tensors of a case that are options of a loss
VARIANTS = {
    "grpo": {},
    "bnpo": {"loss_type": "bnpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.3},
    "dr_grpo": {"loss_type": "dr_grpo", "denominator": torch.tensor(48.0)},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "delta": {"delta": 1.5, "beta": 0.0},
    "delta within the clip": {"delta": 1.1, "epsilon_high": 0.4, "beta": 0.0},
    "sapo": {"loss_type": "sapo", "sapo_temperatures": (0.8, 1.3)},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.1},
    "luspo of tokens": {"loss_type": "luspo", "epsilon": 1.2},
    "vespo": {"loss_type": "vespo", "vespo_gamma": (0.5, 0.0, 1.0, 0.7)},
    "vespo on policy": {"loss_type": "vespo", **dict.fromkeys(("old_logps", "sampler_factor"))},
    "vespo of a sampler": {"loss_type": "vespo", "old_logps": None},
    "sequence sapo": {"importance_sampling_level": "sequence", "loss_type": "sapo"},
    "global count": {"denominator": torch.tensor(37.0)},
    "global count of tokens": {"loss_type": "dapo", "denominator": torch.tensor(37.0)},
    "on policy": dict.fromkeys(OWN),
    "no reference": {"ref_logps": None},
    "sequence": {"importance_sampling_level": "sequence", "epsilon": 0.1},
    "sequence delta": {"importance_sampling_level": "sequence", "delta": 1.25},
    "sequence cispo": {"importance_sampling_level": "sequence", "loss_type": "cispo", "epsilon_high": 1.05},
    "sequence on policy": {"importance_sampling_level": "sequence", "old_logps": None},
}
# Rows, vocabulary, dtype, temperature: one row, odd widths on both sides of the launch table's edge, the 2B's.
SHAPES = [
    (1, 13, torch.float32, 2.0),
    (11, 257, torch.float32, 0.7),
    (7, 8192, torch.bfloat16, 0.1),
    (4, 32_769, torch.float32, 1.3),
    (4, 32_771, torch.bfloat16, 1.0),
    (4, 40_000, torch.float16, 2.0),
    (4, 40_000, torch.float32, 0.1),
    (4, 151_936, torch.bfloat16, 1.0),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_case(n, vocabulary, dtype, temperature, spread=4.0, seed=0):
    """Inputs on DEVICE; completions of unequal length, one of them empty, one with an advantage of 0."""
    g = seeded(seed)
    logits = (spread * torch.randn(n, vocabulary, generator=g)).to(dtype)
    targets = torch.randint(vocabulary, (n,), generator=g)
    targets[n // 2 :] = logits[n // 2 :].float().argmax(1)  # likely tokens, too
    logps = (logits.double() / temperature).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    bounds = torch.tensor([0, n // 3, n // 3, n // 2, max(n - 1, n // 2), n], dtype=torch.int32)
    case = {
        "logits": logits,
        "targets": targets,
        "advantages": torch.tensor([1.3, -0.4, -0.9, -1.1, 0.0]),
        "completion_cu": bounds,
        "old_logps": (logps + torch.linspace(-0.7, 0.7, n)[torch.randperm(n, generator=g)]).float(),
        "ref_logps": (logps + 0.5 * torch.randn(n, generator=g)).float(),
        "weights": torch.tensor([0.5, 2.0, 1.5, 0.3, 1.0]),
        "sampler_factor": torch.rand(n, generator=g) * 2,
    }
    return {name: tensor.to(DEVICE) for name, tensor in case.items()}


def options_of(case, variant):
    options = {name: case[name] for name in OWN} | variant
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


def exact(x):
    """`x` in fp64, a tensor or a dictionary of tensors."""
    if isinstance(x, dict):
        return {name: exact(value) for name, value in x.items()}
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def eager(logits, targets, temperature):
    """logps and entropy as a careful user writes them: in fp32, or fp64 for fp64 logits."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    distribution = (logits.clamp(min=-1e30) / temperature).log_softmax(1)  # the gradient of -inf would be NaN
    return distribution.gather(1, targets[:, None]).squeeze(1), -(distribution.exp() * distribution).sum(1)


def token_formulas(
    logps,
    owner,
    advantages,
    *,
    old_logps=None,
    ref_logps=None,
    sampler_factor=None,
    epsilon=0.2,
    epsilon_high=None,
    delta=None,
    loss_type="grpo",
    importance_sampling_level="token",
    sapo_temperatures=(1.0, 1.05),
    vespo_gamma=(2.0, 3.0, 3.0, 2.0),
):
    """ARCHITECTURE.md, section "The mathematics", of N tokens; `owner` (N) is each token's completion.

    Returns (N) each: the policy term without the weight, kl, ratio, and whether the ratio is clipped below and above.
    """
    advantage = advantages[owner]
    log_ratio = logps - (logps.detach() if old_logps is None else old_logps)
    if importance_sampling_level == "sequence":
        log_ratio = torch.stack([log_ratio[owner == completion].mean() for completion in owner])
    ratio = log_ratio.exp()
    low = high = torch.zeros_like(ratio, dtype=torch.bool)
    if loss_type == "sapo":
        temperature = torch.where(advantage > 0, *advantage.new_tensor(sapo_temperatures))
        policy = -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantage
    elif loss_type == "vespo":
        parts = log_ratio.detach().clamp(-20, 20)
        if sampler_factor is not None:
            parts = parts + sampler_factor.log().clamp(math.log(1e-8), 20)
        log_w = torch.stack([parts[owner == completion].sum() for completion in owner]).clamp(math.log(1e-8), 20)
        k, rate = (
            torch.where(advantage >= 0, *log_w.new_tensor(pair)) for pair in (vespo_gamma[::2], vespo_gamma[1::2])
        )
        ratio, sampler_factor = (rate.clamp(min=1e-4) * (1 - log_w.exp()) + k * log_w).exp(), None
        policy = -ratio * advantage * logps
    elif loss_type == "cispo":
        policy = -ratio.clamp(max=epsilon_high).detach() * advantage * logps
        high = (ratio > epsilon_high) & (advantage > 0)
    else:
        top = 1 + (epsilon if epsilon_high is None else epsilon_high)
        bounded = ratio if delta is None else ratio.clamp(max=delta)
        policy = -torch.min(bounded * advantage, ratio.clamp(1 - epsilon, top) * advantage)
        low, high = (ratio < 1 - epsilon) & (advantage < 0), (ratio > top) & (advantage > 0)
    gap = torch.zeros_like(logps) if ref_logps is None else ref_logps - logps
    return policy * (1 if sampler_factor is None else sampler_factor), gap.exp() - gap - 1, ratio, low, high


def assert_error_rule(ours, eagers, truths, targets=None, by_row=False, tolerance=TOLERANCE, least=1e-30):
    """Each of ours no further from the truth than eager's, plus `tolerance` of the largest value, at least of `least`.

    With `targets` (N) what is (N, V) also by parts: the targets' entries, and all others, `by_row` row by row. (A
    loss's rows are not alike: where policy and KL nearly cancel, little is left that is not rounding.)
    """
    for i, (got, theirs, truth) in enumerate(zip(ours, eagers, truths, strict=True)):
        assert got.isfinite().all(), i
        parts = [tuple(x.flatten().unsqueeze(0) for x in (got, theirs, truth))]
        if targets is not None and got.dim() == 2:
            at = targets.unsqueeze(1)
            parts.append(tuple(x.gather(1, at).T for x in (got, theirs, truth)))
            others = (x.scatter(1, at, 0) for x in (got, theirs, truth))
            parts.append(tuple(x if by_row else x.flatten().unsqueeze(0) for x in others))
        for part, (got_rows, their_rows, true_rows) in enumerate(parts):
            error, allowed = ((x.double() - true_rows).abs().amax(1) for x in (got_rows, their_rows))
            scale = true_rows.abs().amax(1).clamp(min=least)
            if got.dtype in (torch.float16, torch.bfloat16):  # the interpreter truncates where hardware rounds
                normal = torch.finfo(got.dtype).smallest_normal
                allowed = allowed + interpreting() * torch.finfo(got.dtype).eps * scale.clamp(min=normal)
            worst = (error - allowed - tolerance * scale).argmax()
            assert error[worst] <= allowed[worst] + tolerance * scale[worst], (
                f"value {i}, part {part}, row {worst}: error {error[worst]:.3g}, eager's {allowed[worst]:.3g}, "
                f"largest {scale[worst]:.3g}"
            )


def check_error(run, ours, theirs, case, **rule):
    """The results of `run(ours, case)`, held to the rule beside those of `theirs`, and of `theirs` in fp64."""
    got = run(ours, case)
    assert_error_rule(got, run(theirs, case), run(theirs, exact(case)), **rule)
    return got


def assert_beside_peer(ours, theirs, truth, eager):
    """Ours held to the rule, and `theirs`, another package's, the same function; None stands for no value."""
    for mine, their, true, fp32 in zip(ours, theirs, truth, eager, strict=True):
        if true is None:
            assert mine is None and their is None
            continue
        mine, their, true, fp32 = (x.detach() for x in (mine, their, true, fp32))
        assert mine.shape == their.shape == true.shape and mine.dtype == their.dtype
        if mine.dtype == torch.bool:
            assert torch.equal(mine, true) and torch.equal(their, true)
            continue
        assert mine.dtype == torch.float32
        torch.testing.assert_close(their.double(), true, rtol=1e-4, atol=1e-5 * max(float(true.abs().max()), 1e-3))
        assert_error_rule([mine], [fp32], [true], least=1e-3)


def assert_refused(*cases):
    """Each case is a message, as a pattern, and a call that must raise a ValueError with it."""
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()


def same_signature(mine, theirs):
    mine, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()] for f in (mine, theirs)
    )
    assert mine == theirs


def gradients(value, leaf):
    return torch.autograd.grad(value, leaf)[0]


def counters(n):
    """(n) counters, large ones among them."""
    i = torch.arange(n, device=DEVICE)
    return {"prompt_ids": i // 8 + 2**40, "completion_ids": i % 8, "positions": i * 3 % 1000}


class Recorded(TorchDispatchMode):
    """The names of the operators that run under it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))
