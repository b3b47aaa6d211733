"""Log-probabilities from logits in Triton, forward and backward, against fp64 beside eager torch."""

import pytest
import torch

from boxgrpo.kernels import fused_grpo_loss_from_logits, sample_tokens, token_logps_from_logits
from kernel_cases import DEVICE, LANE, SHAPES, counters, eager, gradients, judge, make_case, seeded

pytestmark = LANE


def check_logps(case, temperature, entropy=True):
    """Values, and the gradient of their sums with case["upstream"] (2, N), target and other logits alike."""

    def run(compute, case):
        logits = case["logits"].detach().requires_grad_()
        values = compute(logits)[: 1 + entropy]
        total = sum((x * u.to(x.dtype)).sum() for x, u in zip(values, case["upstream"], strict=False))
        return *(x.detach() for x in values), gradients(total, logits)

    def ours(logits):
        options = {"temperature": temperature, "entropy": entropy, "backend": "triton"}
        found = token_logps_from_logits(logits, case["targets"], **options)
        return found if entropy else (found,)

    def theirs(logits):
        return eager(logits, case["targets"], temperature)

    return judge(run, ours, theirs, case, targets=case["targets"], by_row=True)


@pytest.mark.parametrize("shape, entropy", [(shape, i < 4 or i % 2) for i, shape in enumerate(SHAPES)], ids=str)
def test_logps_from_logits(shape, entropy):
    case = make_case(*shape)
    case["upstream"] = torch.randn(2, shape[0], generator=seeded(1)).to(DEVICE)
    case["upstream"][:, 0] *= shape[0] == 1  # a row without an upstream gradient
    got = check_logps(case, shape[-1], bool(entropy))
    assert got[-1].dtype == shape[2] and got[0].dtype == torch.float32


@pytest.mark.parametrize("vocabulary", [300, 40_000])
@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_extreme_logits(vocabulary, temperature):
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
    check_logps(case, temperature)
    rest = targets, case["advantages"], case["completion_cu"]
    logits.requires_grad_()
    loss, stats = fused_grpo_loss_from_logits(logits, *rest, temperature=temperature, backend="triton")
    assert gradients(loss, logits).isfinite().all() and stats.entropy.isfinite().all()


@pytest.mark.parametrize("vocabulary", [300, 40_000])
def test_a_row_of_minus_infinity_is_a_row_of_equals(vocabulary):
    logits = torch.full((1, vocabulary), float("-inf"), device=DEVICE, requires_grad=True)
    targets = torch.tensor([7], device=DEVICE)
    logps, entropy = token_logps_from_logits(logits, targets, temperature=0.5, entropy=True, backend="triton")
    torch.testing.assert_close(torch.cat([-logps, entropy]).cpu(), torch.full((2,), float(vocabulary)).log())
    want = torch.full_like(logits, -2 / vocabulary)
    want[0, 7] += 2
    torch.testing.assert_close(gradients(logps.sum(), logits), want)


@pytest.mark.parametrize("backend", ["triton", "torch"])
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


@pytest.mark.parametrize("vocabulary", [300, 40_000])
@pytest.mark.parametrize("rows", ["apart", "columns", "transposed", "odd"])
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
    else:  # rows start between two words
        strided = torch.nn.functional.pad(plain, (1, 0))[:, 1:]
    assert strided.stride() != plain.stride() or strided.storage_offset()
    for a, b in zip(every_result(strided, case), every_result(plain, case), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n, vocabulary, strides", [(4, 300, (2**30, 1)), (4, 40_000, (2**30, 1)), (2, 3, (1, 2**30))])
def test_offsets_beyond_two_to_the_31(n, vocabulary, strides):
    """Rows or columns 2^30 elements apart: the last starts beyond int32. Untouched pages of storage cost nothing."""
    case = make_case(n, vocabulary, torch.bfloat16, 1.0)
    size = sum((count - 1) * stride for count, stride in zip((n, vocabulary), strides)) + 1
    strided = torch.empty(size, dtype=torch.bfloat16, device=DEVICE).as_strided((n, vocabulary), strides)
    strided.copy_(case["logits"])
    for a, b in zip(every_result(strided, case), every_result(case["logits"], case), strict=True):
        torch.testing.assert_close(a, b)


def test_a_temperature_near_zero():
    """-1e30, the stand-in for -inf, over 1e-9 would be infinite."""
    logits = torch.randn(3, 300, generator=seeded()).to(DEVICE)
    logits[:, 5] = float("-inf")
    targets = logits.argmax(1)
    targets[2] = 5
    logits.requires_grad_()
    logps, entropy = token_logps_from_logits(logits, targets, temperature=1e-9, entropy=True, backend="triton")
    assert logps[:2].eq(0).all() and logps[2] < -1e20 and logps.isfinite().all()
    assert entropy.eq(0).all() and gradients(logps[:2].sum() + entropy.sum(), logits).eq(0).all()


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
