"""token_logps and token_logps_from_logits: twin and kernel against fp64 beside eager torch; memory; refusals."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from boxgrpo.kernels import (
    chunks,
    dropin,
    fused_grpo_loss,
    fused_grpo_loss_from_logits,
    sample_tokens,
    token_logps,
    token_logps_from_logits,
)
from kernel_cases import (
    BACKENDS,
    DEVICE,
    SHAPES,
    assert_refused,
    check_error,
    counters,
    eager,
    gradients,
    make_case,
    on_triton,
    seeded,
)

N, V, H = 7, 13, 5


@pytest.fixture
def head():
    """hidden (N, H), weight (V, H) and targets (N), fp64."""
    g = seeded(1)
    hidden, weight = (torch.randn(n, H, dtype=torch.float64, generator=g, requires_grad=True) for n in (N, V))
    return hidden, weight, torch.randint(V, (N,), generator=g)


def check_logps(case, temperature, backend, entropy=True, inplace=False):
    """Values, and the gradient of their sums with case["upstream"] (2, N), target and other logits alike."""

    def run(compute, case):
        logits = case["logits"].detach().requires_grad_()
        values = compute(logits)[: 1 + entropy]
        total = sum((x * u.to(x.dtype)).sum() for x, u in zip(values, case["upstream"], strict=False))
        return *(x.detach() for x in values), gradients(total, logits)

    def ours(logits):
        options = {"temperature": temperature, "entropy": entropy, "inplace_backward": inplace, "backend": backend}
        found = token_logps_from_logits(logits * 1, case["targets"], **options)  # no leaf is overwritten
        return found if entropy else (found,)

    def theirs(logits):
        return eager(logits, case["targets"], temperature)

    return check_error(run, ours, theirs, case, targets=case["targets"], by_row=True)


@BACKENDS
@pytest.mark.parametrize(
    "shape, entropy, inplace", [(shape, i < 4 or i % 2 == 1, i % 3 == 1) for i, shape in enumerate(SHAPES)], ids=str
)
def test_logps_from_logits(shape, entropy, inplace, backend):
    case = make_case(*shape)
    case["upstream"] = torch.randn(2, shape[0], generator=seeded(1)).to(DEVICE)
    case["upstream"][:, 0] *= shape[0] == 1  # a row without an upstream gradient
    got = check_logps(case, shape[-1], backend, entropy, inplace)
    assert got[-1].dtype == shape[2] and got[0].dtype == torch.float32


@BACKENDS
@pytest.mark.parametrize("vocabulary", [300, 40_000])
@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_extreme_logits(vocabulary, temperature, backend):
    """±1e4, -inf beside the target, whole rows of one value: nothing is NaN, and no error above eager's."""
    case = make_case(6, vocabulary, torch.float32, temperature)
    logits, targets = case["logits"], case["targets"]
    logits[0, ::2] = 1e4
    logits[1, :] = -1e4
    logits[2, 1::3] = float("-inf")
    logits[3, :] = float("-inf")
    logits[3, 7], targets[3] = -1e4, 7
    logits[4, 5], targets[4] = 1e4, 6
    targets[2] = 0
    case["upstream"] = torch.stack([torch.linspace(-1, 1, 6), torch.ones(6)]).to(DEVICE)
    check_logps(case, temperature, backend)
    rest = targets, case["advantages"], case["completion_cu"]
    logits.requires_grad_()
    loss, stats = fused_grpo_loss_from_logits(logits, *rest, temperature=temperature, backend=backend)
    assert gradients(loss, logits).isfinite().all() and stats.entropy.isfinite().all()


@BACKENDS
@pytest.mark.parametrize("vocabulary", [300, 40_000])
def test_a_row_of_minus_infinity_is_a_row_of_equals(vocabulary, backend):
    logits = torch.full((1, vocabulary), float("-inf"), device=DEVICE, requires_grad=True)
    targets = torch.tensor([7], device=DEVICE)
    logps, entropy = token_logps_from_logits(logits, targets, temperature=0.5, entropy=True, backend=backend)
    torch.testing.assert_close(torch.cat([-logps, entropy]).cpu(), torch.full((2,), float(vocabulary)).log())
    want = torch.full_like(logits, -2 / vocabulary)
    want[0, 7] += 2
    torch.testing.assert_close(gradients(logps.sum(), logits), want)


@BACKENDS
def test_a_temperature_near_zero(backend):
    """-1e30, the stand-in for -inf, over 1e-9 would be infinite."""
    logits = torch.randn(3, 300, generator=seeded()).to(DEVICE)
    logits[:, 5] = float("-inf")
    targets = logits.argmax(1)
    targets[2] = 5
    logits.requires_grad_()
    logps, entropy = token_logps_from_logits(logits, targets, temperature=1e-9, entropy=True, backend=backend)
    assert logps[:2].eq(0).all() and logps[2] < -1e20 and logps.isfinite().all()
    assert entropy.eq(0).all() and gradients(logps[:2].sum() + entropy.sum(), logits).eq(0).all()


@BACKENDS
@pytest.mark.parametrize("inplace", [False, True])
def test_a_row_without_upstream_gradient_has_none(inplace, backend):
    """Even a row of NaN, which a gradient of 0 from upstream would not stop."""
    body = torch.randn(4, 9, generator=seeded()).to(DEVICE)
    body[2] = float("nan")
    targets = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    options = {"inplace_backward": inplace, "backend": backend}
    logps = token_logps_from_logits(body.requires_grad_() * 1, targets, **options)
    found = gradients(logps[[0, 1, 3]].sum(), body)
    assert found[2].eq(0).all() and found[[0, 1, 3]].isfinite().all() and found.any()


def every_result(logits, case):
    """Of the loss and the log-probabilities of `logits`; the gradients that are written over them, too."""
    n = logits.shape[0]
    rest = case["targets"][:n], case["advantages"][:1], torch.tensor([0, n], device=DEVICE)
    numbers, results = logits.clone(), []

    def restored():
        with torch.no_grad():
            return logits.detach().copy_(numbers).requires_grad_()

    for overwrite in (False, True):
        body = restored()
        options = {"overwrite_logits": overwrite, "backend": "triton"}
        loss, stats = fused_grpo_loss_from_logits(body[:], *rest, **options)
        results += [loss.detach(), stats.logps, gradients(3 * loss, body).clone()]
        body = restored()
        options = {"entropy": True, "inplace_backward": overwrite, "backend": "triton"}
        logps, entropy = token_logps_from_logits(body[:], rest[0], **options)
        results += [logps.detach(), gradients(logps.sum() + entropy.sum(), body).clone()]
    return *results, *sample_tokens(restored().detach(), seed=1, **counters(n), backend="triton")


@on_triton
@pytest.mark.parametrize("vocabulary", [300, 40_000])
@pytest.mark.parametrize("rows", ["apart", "columns", "transposed", "odd", "far"])
def test_strided_logits(rows, vocabulary):
    """Views, which are not copied, on either side of the table's edge: the results are those of the same numbers."""
    case = make_case(4, vocabulary, torch.bfloat16, 1.0)
    plain = case["logits"]
    if rows == "apart":  # one position of each sequence
        strided = plain.view(2, 2, -1)[:, 1]
        plain = strided.contiguous()
    elif rows == "columns":
        strided = torch.stack([plain, plain], 2)[:, :, 1]
    elif rows == "transposed":
        strided = plain.t().contiguous().t()
    elif rows == "odd":  # rows start between two words
        strided = torch.nn.functional.pad(plain, (1, 0))[:, 1:]
    else:
        strided = far_apart(plain, (2**30, 1))
    assert strided.stride() != plain.stride() or strided.storage_offset()
    for a, b in zip(every_result(strided, case), every_result(plain, case), strict=True):
        torch.testing.assert_close(a, b)


def far_apart(logits, strides):
    """2^30 elements apart: the last row or column starts beyond int32. Untouched pages of storage cost nothing."""
    size = sum((count - 1) * stride for count, stride in zip(logits.shape, strides)) + 1
    return torch.empty(size, dtype=logits.dtype, device=DEVICE).as_strided(logits.shape, strides).copy_(logits)


@on_triton
def test_columns_beyond_two_to_the_31():
    case = make_case(2, 3, torch.bfloat16, 1.0)
    strided = far_apart(case["logits"], (1, 2**30))
    for a, b in zip(every_result(strided, case), every_result(case["logits"], case), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_where_their_tensors_are():
    """On the second GPU while the first is the current one."""
    case = {name: x.to("cuda:1") for name, x in make_case(6, 300, torch.float32, 1.0).items()}
    rest = case["targets"], case["advantages"], case["completion_cu"]
    results = []
    for backend in ("triton", "torch"):
        logits = case["logits"].detach().requires_grad_()
        loss, _ = fused_grpo_loss_from_logits(logits, *rest, backend=backend)
        results.append((loss, gradients(3 * loss, logits)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def loss_of_head(hidden, weight, targets, **options):
    rest = torch.tensor([1.0, -1.0], dtype=hidden.dtype), torch.tensor([0, len(targets) // 2, len(targets)])
    return fused_grpo_loss(hidden, weight, targets, *rest, **options)[0]


@pytest.mark.parametrize("function", [token_logps, loss_of_head])
def test_only_the_wanted_gradient_is_made(head, function, monkeypatch):
    hidden, weight, targets = head
    made, results = [], chunks.HeadSweep.results
    monkeypatch.setattr(
        chunks.HeadSweep, "results", lambda self: made.append([self.dhidden, self.dweight]) or results(self)
    )
    function(hidden, weight.detach(), targets).sum().backward()
    function(hidden.detach(), weight, targets).sum().backward()
    assert [[x is None for x in pair] for pair in made] == [[False, True], [True, False]]
    assert hidden.grad.any() and weight.grad.any()


@pytest.mark.parametrize("function", ["logps", "biased logps", "token", "sequence"])
def test_the_head_never_makes_the_logits(function):
    """Of a 384 x 32768 head forward and backward allocate one 128-row chunk, and nothing larger."""
    n, v, h = 384, 32768, 4
    hidden, weight = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
    bias, targets = torch.randn(v, requires_grad=True), torch.arange(n)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        if function == "logps":
            loss = sum(x.sum() for x in token_logps(hidden, weight, targets, entropy=True))
        elif function == "biased logps":  # capped, too
            logps, entropy, *_ = dropin.ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 0.7, 8, 3.0)
            loss = logps.sum() + entropy.sum()
        else:
            loss = loss_of_head(hidden, weight, targets, importance_sampling_level=function)
        loss.backward()
    assert weight.grad.any()
    assert max(event.self_cpu_memory_usage for event in profiler.events()) == 128 * v * 4


@pytest.mark.parametrize("vocabulary, rows", [(300, 1747), (32_768, 128), (151_936, 96), (2**26, 1)])
def test_chunks_are_small_but_for_a_wide_vocabulary(vocabulary, rows):
    """2 MiB of fp32 logits; 128 rows where that is more; never over 56 MiB, and never no row."""
    assert chunks.chunk_rows(vocabulary, torch.float32, torch.device("cpu"), at_least=128) == rows


def test_what_is_refused(head):
    hidden, weight, targets = head
    logits, on = hidden @ weight.T, {"backend": "triton"}
    expanded, inplace = logits[:1].expand(N, V), {"inplace_backward": True}
    assert_refused(
        ("is set .* Pass logits.contiguous", lambda: token_logps_from_logits(expanded, targets, **inplace)),
        (r"hidden has shape \(5,\)", lambda: token_logps(hidden[0], weight, targets)),
        ("hidden is int64; it must be float16 or", lambda: token_logps(hidden.long(), weight, targets)),
        ("weight is float32; it must be float64", lambda: token_logps(hidden, weight.float(), targets)),
        (r"targets has shape \(6,\); it must be \(7\)", lambda: token_logps(hidden, weight, targets[1:])),
        (r"targets has shape \(6,\)", lambda: token_logps_from_logits(logits, targets[1:])),
        ("temperature is -1", lambda: token_logps(hidden, weight, targets, temperature=-1)),
        ("temperature is 0; a scored", lambda: token_logps_from_logits(logits, targets, temperature=0)),
        ("temperature is nan", lambda: token_logps_from_logits(logits, targets, temperature=float("nan"))),
        ("token_logps got a META tensor", lambda: token_logps(hidden.to("meta"), weight, targets, **on)),
        ("got a CPU tensor", lambda: token_logps_from_logits(logits, targets, **on)),
        ("backend is 'auot'", lambda: token_logps(hidden, weight, targets, backend="auot")),
    )
