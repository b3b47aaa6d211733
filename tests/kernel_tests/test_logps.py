"""token_logps and token_logps_from_logits: values, gradients, memory, and what they refuse."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from boxgrpo.kernels import chunks, fused_grpo_loss, token_logps, token_logps_from_logits

N, V, H = 7, 13, 5


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, H, dtype=torch.float64, generator=g, requires_grad=True)
    weight = torch.randn(V, H, dtype=torch.float64, generator=g, requires_grad=True)
    return hidden, weight, torch.randint(V, (N,), generator=g)


def functions(inplace):
    """Each function as a function of hidden and weight."""
    return {
        "head": lambda h, w, t, **o: token_logps(h, w, t, **o),
        "logits": lambda h, w, t, **o: token_logps_from_logits(h @ w.T, t, inplace_backward=inplace, **o),
    }


def dense(hidden, weight, targets, temperature):
    distribution = (hidden @ weight.T / temperature).log_softmax(1)
    return distribution[torch.arange(len(targets)), targets], -(distribution.exp() * distribution).sum(1)


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("function", ["head", "logits"])
@pytest.mark.parametrize("entropy", [False, True])
def test_values_and_any_upstream_gradient(case, function, inplace, entropy, chunk, monkeypatch):
    monkeypatch.setattr(chunks, "chunk_rows", lambda *_, **__: chunk)
    hidden, weight, targets = case
    got = functions(inplace)[function](hidden, weight, targets, temperature=0.6, entropy=entropy)
    want = dense(hidden, weight, targets, 0.6)
    pairs = list(zip(got if entropy else (got,), want, strict=False))
    upstream = [torch.linspace(-1, 2, N, dtype=torch.float64).roll(k) for k in range(2)]
    upstream[0][2] = upstream[1][2] = 0  # a row that nothing flows back to
    for a, b in pairs:
        torch.testing.assert_close(a, b)
    sums = [sum((x * u).sum() for x, u in zip(side, upstream, strict=False)) for side in zip(*pairs, strict=True)]
    for a, b in zip(*(torch.autograd.grad(s, (hidden, weight)) for s in sums), strict=True):
        torch.testing.assert_close(a, b)


def test_only_the_wanted_gradient_is_made(case, monkeypatch):
    hidden, weight, targets = case
    made, results = [], chunks.HeadSweep.results
    monkeypatch.setattr(
        chunks.HeadSweep,
        "results",
        lambda self: made.append((self.dhidden is None, self.dweight is None)) or results(self),
    )
    token_logps(hidden, weight.detach(), targets).sum().backward()
    token_logps(hidden.detach(), weight, targets).sum().backward()
    assert made == [(False, True), (True, False)]
    assert hidden.grad.any() and weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_fp32_and_gradients_of_the_inputs_dtype(case, dtype):
    """Logits of half-precision inputs are not rounded: the error against fp64 of the same inputs is fp32's."""
    hidden, weight, targets = case
    hidden, weight = (4 * x.detach().to(dtype) for x in (hidden, weight))
    hidden.requires_grad_()
    logps, entropy = token_logps(hidden, weight, targets, entropy=True)
    assert logps.dtype == entropy.dtype == torch.float32
    for got, want in zip((logps, entropy), dense(hidden.double(), weight.double(), targets, 1.0), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    (logps.sum() + entropy.sum()).backward()
    assert hidden.grad.dtype == dtype


def test_autocast_does_not_lower_the_precision(case):
    hidden, weight, targets = (x.float().detach() if x.is_floating_point() else x for x in case)
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = token_logps(hidden, weight, targets)
    assert torch.equal(inside, token_logps(hidden, weight, targets))


def test_inplace_backward_writes_over_the_logits_once(case):
    hidden, weight, targets = case
    logits = hidden @ weight.T
    logps = token_logps_from_logits(logits, targets, inplace_backward=True)
    (got,) = torch.autograd.grad(logps.sum(), logits, retain_graph=True)
    assert got.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(logps.sum(), logits)


def test_minus_infinity_is_probability_zero(case):
    logits = (case[0] @ case[1].T).detach()
    logits[:, 0] = float("-inf")
    logits.requires_grad_()
    targets = case[2].clamp(min=1)
    logps, entropy = token_logps_from_logits(logits, targets, entropy=True, temperature=1e-3)
    (logps.sum() + entropy.sum()).backward()
    want = (logits.detach()[:, 1:] / 1e-3).log_softmax(1).gather(1, targets[:, None] - 1).squeeze(1)
    torch.testing.assert_close(logps, want)
    assert entropy.isfinite().all() and logits.grad.isfinite().all() and not logits.grad[:, 0].any()


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(case, n):
    hidden, weight, targets = case
    logps, entropy = token_logps(hidden[:n], weight, targets[:n], entropy=True)
    (logps.sum() + entropy.sum()).backward()
    assert logps.shape == entropy.shape == (n,)
    assert weight.grad.shape == (V, H) and weight.grad.any() == (n > 0)


@pytest.mark.parametrize("level", ["logps", "token", "sequence"])
def test_the_head_never_makes_the_logits(level):
    """Of a 384 x 32768 head forward and backward allocate one 128-row chunk, and nothing larger."""
    n, v, h = 384, 32768, 4
    hidden, weight = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
    targets = torch.arange(n)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        if level == "logps":
            logps, entropy = token_logps(hidden, weight, targets, entropy=True)
            loss = logps.sum() + entropy.sum()
        else:
            rest = torch.tensor([1.0, -1.0]), torch.tensor([0, n // 2, n])
            loss, _ = fused_grpo_loss(hidden, weight, targets, *rest, importance_sampling_level=level)
        loss.backward()
    assert weight.grad.any()
    assert max(event.self_cpu_memory_usage for event in profiler.events()) == 128 * v * 4


@pytest.mark.parametrize("vocabulary, rows", [(300, 1747), (32_768, 128), (151_936, 96), (2**26, 1)])
def test_chunks_are_small_but_for_a_wide_vocabulary(vocabulary, rows):
    """2 MiB of fp32 logits; 128 rows where that is more; never over 56 MiB, and never no row."""
    assert chunks.chunk_rows(vocabulary, torch.float32, torch.device("cpu"), at_least=128) == rows


def test_what_is_refused(case):
    hidden, weight, targets = case
    logits = hidden @ weight.T
    expanded = logits[:1].expand(N, V)
    for message, call in (
        (
            "inplace_backward is set .* Pass logits.contiguous",
            lambda: token_logps_from_logits(expanded, targets, inplace_backward=True),
        ),
        (r"hidden has shape \(5,\)", lambda: token_logps(hidden[0], weight, targets)),
        ("hidden is int64; it must be float16 or", lambda: token_logps(hidden.long(), weight, targets)),
        ("weight is float32; it must be float64", lambda: token_logps(hidden, weight.float(), targets)),
        (r"targets has shape \(6,\); it must be \(7\)", lambda: token_logps(hidden, weight, targets[1:])),
        (r"targets has shape \(6,\)", lambda: token_logps_from_logits(logits, targets[1:])),
        ("temperature is -1", lambda: token_logps(hidden, weight, targets, temperature=-1)),
        ("temperature is 0; a scored", lambda: token_logps_from_logits(logits, targets, temperature=0)),
        ("temperature is nan", lambda: token_logps_from_logits(logits, targets, temperature=float("nan"))),
        ("token_logps got a CPU tensor", lambda: token_logps(hidden, weight, targets, backend="triton")),
        ("got a CPU tensor", lambda: token_logps_from_logits(logits, targets, backend="triton")),
        ("got a META tensor", lambda: token_logps(hidden.to("meta"), weight, targets, backend="triton")),
        ("backend is 'auot'", lambda: token_logps(hidden, weight, targets, backend="auot")),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_backward_ops_pass_opcheck(case):
    hidden, weight, targets = (x.detach() for x in case)
    ops, ones = torch.ops.boxgrpo, torch.ones(N, dtype=torch.float64)
    upstream = ones, torch.empty(0), ones, ones  # entropy, state, dlogps, dentropy
    torch.library.opcheck(ops.token_logps_backward, (hidden, weight, targets, 0.6, *upstream, True, False, False))
    logits = hidden @ weight.T
    torch.library.opcheck(ops.token_logps_from_logits_backward, (logits, targets, 0.6, *upstream, False))
