"""boxgrpo.kernels.dropin's verl signatures against the formulas that verl documents, in fp64."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch

from boxgrpo.kernels import dropin
from kernel_cases import assert_error_rule, assert_refused, check_error, seeded

N, V, H = 8, 29, 7


def check(call, formulas, **inputs):
    """The error rule for the outputs and for the gradients of an uneven sum of them."""

    def run(function, case):
        leaves = [x.detach().requires_grad_() for x in case.values()]
        outputs = function(*leaves)
        total = sum((x * torch.linspace(-1, 2, x.numel()).to(x.dtype).view(x.shape)).sum() for x in outputs)
        return *(x.detach() for x in outputs), *torch.autograd.grad(total, leaves)

    got = check_error(run, call, formulas, inputs)
    assert {x.dtype for x in got} == {torch.float32}


@pytest.mark.parametrize("shape", [(N,), (2, 4), (1, N)])
@pytest.mark.parametrize("reduction", [None, "none", "sum", "Mean"])
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_linear_cross_entropy(shape, reduction, temperature):
    """Tokens in any shape become (N); only the log-probabilities are reduced."""
    g = seeded()
    hidden, weight = torch.randn(*shape, H, generator=g), torch.randn(V, H, generator=g)
    labels = torch.randint(V, shape, generator=g)

    def formulas(hidden, weight):
        logps = (hidden.flatten(0, -2) @ weight.T / (temperature or 1)).log_softmax(1)
        chosen, entropy = logps.gather(1, labels.view(-1, 1)).squeeze(1), -(logps.exp() * logps).sum(1)
        return {"none": chosen, "sum": chosen.sum(), "mean": chosen.mean()}[(reduction or "none").lower()], entropy

    check(
        lambda hidden, weight: dropin.linear_cross_entropy(hidden, weight, labels, temperature, reduction),
        formulas,
        hidden=hidden,
        weight=weight,
    )


@pytest.mark.parametrize("shape", [(N,), (2, 4), (2, 1, 4)])
@pytest.mark.parametrize("inplace", [False, True])
def test_logprobs_from_logits(shape, inplace):
    g = seeded()
    logits, labels = torch.randn(*shape, V, generator=g), torch.randint(V, shape, generator=g)
    check(
        lambda logits: [dropin.logprobs_from_logits(logits * 1, labels.int(), inplace)],
        lambda logits: [logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)],
        logits=logits,
    )
    rows = logits.requires_grad_() * 1
    (gradient,) = torch.autograd.grad(dropin.logprobs_from_logits(rows, labels, inplace).sum(), rows)
    assert (gradient.data_ptr() == rows.data_ptr()) == inplace


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("epsilon", [1e-6, 0.1])
@pytest.mark.parametrize(
    "index_of", [list, partial(np.array, dtype=object), lambda names: torch.tensor([*map(ord, names)])]
)
def test_compute_grpo_outcome_advantage(index_of, epsilon, norm):
    """Groups of three sizes, mixed up, and one that is alone: mean 0 and std 1."""
    names = ["b", "a", "c", "b", "a", "b", "d", "a", "e", "e"]
    g = seeded()
    rewards, mask = torch.randn(10, 6, generator=g), torch.rand(10, 6, generator=g) < 0.7
    kept = rewards.clone()
    advantages, returns = dropin.compute_grpo_outcome_advantage(rewards, mask.long(), index_of(names), epsilon, norm)
    assert advantages is returns and torch.equal(rewards, kept)

    def formulas(dtype):
        scores = rewards.to(dtype).sum(1)
        values = []
        for i, name in enumerate(names):
            group = scores[[j for j, other in enumerate(names) if other == name]]
            mean, std = (group.mean(), group.std()) if len(group) > 1 else (0.0, 1.0)
            values.append((scores[i] - mean) / (std + epsilon if norm else 1.0))
        return torch.stack(values)[:, None] * mask

    assert_error_rule([advantages], [formulas(torch.float32)], [formulas(torch.float64)])


def test_integer_rewards_count_as_their_floats():
    rewards, mask = torch.tensor([[0, 1], [0, 0], [2, 1], [0, 1]]), torch.ones(4, 2, dtype=torch.int64)
    for given in (rewards, rewards.int(), rewards > 1):
        got, _ = dropin.compute_grpo_outcome_advantage(given, mask, ["a", "a", "b", "c"])
        want, _ = dropin.compute_grpo_outcome_advantage(given.float(), mask, ["a", "a", "b", "c"])
        assert got.dtype == torch.float32 and torch.equal(got, want)


def test_signatures():
    """The arguments of ARCHITECTURE.md, section "Drop-ins", in their order, with the defaults of verl's source."""
    want = {
        "linear_cross_entropy": "hidden weight labels temperature=1.0 reduction='none' dist_process_group=None",
        "logprobs_from_logits": "logits labels inplace_backward=True",
        "compute_grpo_outcome_advantage": "token_level_rewards response_mask index epsilon=1e-06 "
        "norm_adv_by_std_in_grpo=True config=None",
    }
    for name, arguments in want.items():
        parameters = inspect.signature(getattr(dropin, name)).parameters.values()
        given = [p.name + (f"={p.default!r}" if p.default is not p.empty else "") for p in parameters]
        assert given == arguments.split()


def test_what_is_refused(monkeypatch):
    hidden, weight, labels = torch.randn(N, H), torch.randn(V, H), torch.zeros(N, dtype=torch.int64)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: group)
    assert dropin.linear_cross_entropy(hidden, weight, labels, dist_process_group=1)[0].shape == (N,)
    entropy, advantage = dropin.linear_cross_entropy, dropin.compute_grpo_outcome_advantage
    assert_refused(
        ("dist_process_group has 2 ranks", lambda: entropy(hidden, weight, labels, dist_process_group=2)),
        ("reduction is 'max'; it is one of none, sum, mean", lambda: entropy(hidden, weight, labels, 1.0, "max")),
        ("temperature is 0", lambda: entropy(hidden, weight, labels, 0)),
        ("weight is float64; it must be float32", lambda: entropy(hidden, weight.double(), labels)),
        (r"targets has shape \(7,\)", lambda: dropin.logprobs_from_logits(hidden, labels[1:])),
        (r"token_level_rewards has shape \(8, 7\); it must be \(2, any\)", lambda: advantage(hidden, hidden, [0, 1])),
        (r"response_mask has shape \(8, 6\)", lambda: advantage(hidden, hidden[:, 1:], [0] * N)),
    )
