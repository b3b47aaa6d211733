"""What holds for every op: schemas, graphs, strided arguments, empty ones and bad ones."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import boxgrpo.kernels
from boxgrpo.kernels import (
    LossOptions,
    dropin,
    fused_grpo_loss,
    fused_grpo_loss_from_logits,
    gather_keys,
    group_advantages,
    grpo_loss,
    sample_tokens,
    token_logps,
    token_logps_from_logits,
)
from boxgrpo.kernels.dispatch import call
from kernel_cases import BACKENDS, DEVICE, assert_refused, counters, gradients, make_case, on_triton, options_of, seeded


def one_completion():
    """Two prompts, of two tokens and of one; the first has a completion of one: kv_index and the offsets."""
    index, *offsets = [0, 1, 0, 1, 2, 3], [0, 2, 3, 4], [0, 2, 5, 6]
    return torch.tensor(index, device=DEVICE), *(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in offsets)


def test_case_18_a_working_folder_that_holds_kernels_defines_no_op_again(monkeypatch):
    """transformers imports `kernels`, Hugging Face's package, and with the clone on its path finds this one."""
    monkeypatch.syspath_prepend(Path(boxgrpo.kernels.__file__).parents[1])
    monkeypatch.setattr(torch.library, "custom_op", None)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    assert importlib.import_module("kernels").grpo_loss is grpo_loss
    sys.modules.pop("kernels")


@on_triton
def test_arguments_need_not_be_contiguous():
    case = make_case(6, 300, torch.float32, 1.0)
    apart = {name: torch.stack([x, 3 * x + 1], -1)[..., 0] if x.dim() == 1 else x for name, x in case.items()}
    results = []
    for c in (case, apart):
        logits, rest = c["logits"].detach().requires_grad_(), (c["advantages"], c["completion_cu"])
        loss, stats = fused_grpo_loss_from_logits(logits, c["targets"], *rest, backend="triton", **options_of(c, {}))
        logps = token_logps_from_logits(logits, c["targets"], backend="triton")
        again, _ = grpo_loss(logps, *rest, backend="triton", **options_of(c, {}))
        own = {name: torch.stack([x, -x], 1)[:, 0] if c is apart else x for name, x in counters(6).items()}
        tokens, _ = sample_tokens(logits.detach(), seed=1, **own, backend="triton")
        results.append((loss, stats.logps, gradients(loss, logits), again, gradients(logps.sum(), logits), tokens))
    assert not apart["targets"].is_contiguous()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@on_triton
@pytest.mark.parametrize("bounds", [[0, 4], [2, 6], [0, 9], [-2, 6], [0, 5, 3, 6], [0, 5, 3, 3, 6], [0, 6, 4]], ids=str)
@pytest.mark.parametrize("compute", ["logps", "logits", "head"])
def test_bad_offsets_and_targets_give_nan(compute, bounds):
    """A device's offsets and targets are not checked, which would wait for it: no memory out of bounds is touched."""
    rest = torch.ones(len(bounds) - 1, device=DEVICE), torch.tensor(bounds, device=DEVICE)
    targets = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    rows, weight = (torch.randn(k, 4, generator=seeded()).to(DEVICE).requires_grad_() for k in (6, 9))
    if compute == "logps":
        loss, _ = grpo_loss(rows.sum(1), *rest, backend="triton")
    elif compute == "logits":
        loss, _ = fused_grpo_loss_from_logits(rows, targets, *rest, backend="triton")
    else:
        loss, _ = fused_grpo_loss(rows, weight, targets, *rest, backend="triton")
    assert loss.isnan() and torch.autograd.grad(loss, rows)[0].isnan().all()
    targets[1], targets[4] = -1, 6
    logps = token_logps_from_logits(rows, targets, backend="triton")
    assert logps.isnan().tolist() == [i in (1, 4) for i in range(6)]


@BACKENDS
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("bounds", [[0], [0, 0, 0]])
def test_no_tokens_give_zeros(bounds, level, backend):
    cu, rest = torch.tensor(bounds, device=DEVICE), torch.ones(len(bounds) - 1, device=DEVICE)
    logits = torch.empty(0, 50, device=DEVICE, requires_grad=True)
    hidden, weight = (torch.empty(k, 4, device=DEVICE, requires_grad=True) for k in (0, 50))
    targets, none = torch.empty(0, dtype=torch.int64, device=DEVICE), torch.empty(0, device=DEVICE)
    options = {"old_logps": none, "ref_logps": none, "importance_sampling_level": level, "backend": backend}
    values = token_logps(hidden, weight, targets, entropy=True, backend=backend)
    for bias in (None, weight[:, 0]):  # TRL scores no token of a micro-batch whose labels are all masked
        values += dropin.ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 8)
    assert [x.shape for x in values] == [(0,)] * 12
    sum(x.sum() for x in values).backward()
    for loss, stats in (
        fused_grpo_loss_from_logits(logits, targets, rest, cu, **options),
        fused_grpo_loss_from_logits(logits * 1, targets, rest, cu, overwrite_logits=True, **options),
        fused_grpo_loss(hidden, weight, targets, rest, cu, **options),
        grpo_loss(logits.sum(1), rest, cu, **options),
    ):
        loss.backward()
        assert loss == 0 and all((x == 0).all() for x in stats)
    assert not weight.grad.any()
    tokens, logps = sample_tokens(logits.detach(), seed=1, **counters(0), backend=backend)
    assert tokens.shape == logps.shape == (0,)


@BACKENDS
def test_the_ops_pass_opcheck(backend):
    triton = backend == "triton"
    case = make_case(5, 40, torch.float32, 0.7)
    ops, logits, check = torch.ops.boxgrpo, case["logits"].requires_grad_(), torch.library.opcheck
    targets, rest = case["targets"], (case["advantages"], case["completion_cu"])
    g = seeded()
    hidden, weight = (torch.randn(k, 4, generator=g).to(DEVICE).requires_grad_() for k in (5, 40))
    for entropy in (False, True):
        check(ops.token_logps, (hidden, weight, targets, 0.7, entropy, triton))
        check(ops.token_logps_from_logits, (logits, targets, 0.7, entropy, triton))
    for level in ("token", "sequence"):
        given = options_of(case, {"importance_sampling_level": level, "delta": 1.5})
        o = LossOptions(**given)
        check(ops.fused_grpo_loss, (hidden, weight, targets, *rest, 0.7, True, True, triton, *o))
        check(ops.fused_grpo_loss_from_logits, (logits, targets, *rest, 0.7, True, triton, *o))
        check(ops.grpo_loss, (case["old_logps"].clone().requires_grad_(), *rest, triton, *o))
    check(ops.fused_grpo_loss, (hidden, weight.detach(), targets, *rest, 0.7, True, False, triton, *o))
    for filters in ((0, 1.0, None), (3, 0.9, torch.tensor([2], device=DEVICE))):
        check(ops.sample_tokens, (logits.detach(), 4, *counters(5).values(), 0.7, *filters, triton))
    rewards = torch.rand(2, 4, generator=g).to(DEVICE)
    check(ops.group_advantages, (rewards, rewards, "exp", "group", 1e-4, triton))
    x = torch.randn(4, 2, 8, generator=g).to(DEVICE)
    check(ops.add_rms_norm, (rewards, rewards, rewards[0], 1e-6, triton))
    check(ops.silu_mul, (rewards, rewards, triton))
    check(ops.merge_attention, (x, rewards, x, rewards, 2, triton))
    read = torch.randn(2, 6, 1, 4, generator=g).to(DEVICE)
    check(ops.sum_key_gradients, (*read, *one_completion()[1:], 4, 2, triton))
    if not triton:  # the backward ops; the kernel's needs what its forward saved
        ones, head = torch.ones(5), (hidden.detach(), weight.detach(), targets)
        upstream = ones, torch.empty(0), ones, ones  # entropy, state, dlogps, dentropy
        check(ops.token_logps_backward, (*head, 0.6, *upstream, True, False, False))
        check(ops.token_logps_from_logits_backward, (logits.detach(), targets, 0.6, *upstream, False))


@BACKENDS
def test_functions_compile_without_a_graph_break(backend):
    case = make_case(5, 40, torch.float32, 0.7)
    g = seeded()
    hidden, weight = (torch.randn(k, 4, generator=g).to(DEVICE).requires_grad_() for k in (5, 40))
    own, shared = counters(5), one_completion()

    def step(hidden, weight):
        options, on = options_of(case, {}), {"backend": backend}
        logits, rest = hidden @ weight.T, (case["advantages"], case["completion_cu"])
        tokens, _ = sample_tokens(logits.detach(), seed=3, **own, **on)
        logps, entropy = token_logps(hidden, weight, tokens, entropy=True, **on)
        again = token_logps_from_logits(logits, tokens, **on)
        advantages, _, _ = group_advantages(logps[:4].view(2, 2).detach(), entropy[:4].view(2, 2).detach(), **on)
        losses = (
            fused_grpo_loss(hidden, weight, tokens, *rest, **options, **on)[0],
            fused_grpo_loss_from_logits(logits, tokens, *rest, **options, **on)[0],
            grpo_loss(again, *rest, **options, **on)[0],
        )
        read = gather_keys(hidden[:4, None], weight[:4, None], *shared, 2, **on)
        return sum(losses) + logps.sum() + entropy.sum() + advantages.sum() + (read[0] * read[1]).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = [f(hidden, weight) for f in (step, compiled)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(x, (hidden, weight)) for x in results))


@on_triton
def test_fp64_stays_with_the_twin():
    logits = torch.randn(3, 9, dtype=torch.float64, device=DEVICE)
    targets = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    on = {"backend": "triton"}
    assert_refused(
        ("logits got fp64, which only the torch twin", lambda: token_logps_from_logits(logits, targets, **on)),
        ("group_advantages got fp64", lambda: group_advantages(logits.float(), logits, **on)),
    )
    assert token_logps_from_logits(logits, targets).dtype == torch.float64


def test_an_op_is_called_directly_unless_something_takes_part():
    """Autograd, a dispatch mode, a subclass, torch.func and the profiler get the op; a plain call its function."""

    def used(*args):
        return call(lambda *args: "op", lambda *args: "function", *args)

    plain, leaf = torch.zeros(2), torch.zeros(2, requires_grad=True)
    assert used(plain, torch.nn.Parameter(plain, requires_grad=False), 1, "exp", None) == "function"
    assert used(plain, leaf) == "op"
    with torch.no_grad():
        assert used(leaf) == "function"
    with FakeTensorMode() as mode:
        assert used(plain) == "op"
    assert used(mode.from_tensor(plain)) == "op"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert used(plain) == "op"
    seen = []
    torch.vmap(lambda x: (seen.append(used(x)), x)[1])(plain)
    assert seen == ["op"]
