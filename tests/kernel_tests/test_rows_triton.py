"""Log-probabilities from logits in Triton, forward and backward, against fp64 beside eager torch."""

import pytest
import torch

from boxgrpo.kernels import fused_grpo_loss_from_logits, sample_tokens, token_logps_from_logits
from kernel_cases import DEVICE, LANE, SHAPES, counters, eager, gradients, hold_to_the_rule, make_case, seeded

pytestmark = LANE


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logps_from_logits(shape, entropy):
    """Values, and the gradient of any upstream, target and non-target logits alike."""
    case, temperature = make_case(*shape), shape[-1]
    upstream = torch.randn(2, shape[0], generator=seeded(1)).to(DEVICE)
    upstream[:, 0] *= shape[0] == 1  # a row that nothing flows back to

    def run(logits, door):
        logits = logits.detach().requires_grad_()
        values = door(logits)[: 1 + entropy]
        total = sum((x * u.to(x.dtype)).sum() for x, u in zip(values, upstream, strict=False))
        return *(x.detach() for x in values), gradients(total, logits)

    def ours(logits):
        out = token_logps_from_logits(
            logits, case["targets"], temperature=temperature, entropy=entropy, backend="triton"
        )
        return out if entropy else (out,)

    def theirs(logits):
        return eager(logits, case["targets"], temperature)

    got = run(case["logits"], ours)
    hold_to_the_rule(
        got, run(case["logits"], theirs), run(case["logits"].double(), theirs), case["targets"], by_row=True
    )
    assert got[-1].dtype == shape[2] and got[0].dtype == torch.float32


@pytest.mark.parametrize("vocabulary", [300, 40_000])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0])
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
    upstream = torch.linspace(-1, 1, 6, device=DEVICE)

    def run(logits, door):
        logits = logits.detach().requires_grad_()
        logps, entropy = door(logits)
        total = (logps * upstream.to(logps.dtype)).sum() + entropy.sum()
        return logps.detach(), entropy.detach(), gradients(total, logits)

    def ours(logits):
        return token_logps_from_logits(logits, targets, temperature=temperature, entropy=True, backend="triton")

    def clamped(logits):  # eager's own gradient of 0 * -inf is NaN
        return eager(logits.clamp(min=-1e30), targets, temperature)

    hold_to_the_rule(run(logits, ours), run(logits, clamped), run(logits.double(), clamped), targets, by_row=True)
    loss, stats = fused_grpo_loss_from_logits(
        logits.requires_grad_(),
        targets,
        case["advantages"],
        case["completion_cu"],
        temperature=temperature,
        backend="triton",
    )
    assert gradients(loss, logits).isfinite().all() and stats.entropy.isfinite().all()


@pytest.mark.parametrize("vocabulary", [300, 40_000])
def test_a_row_of_minus_infinity_is_a_row_of_equals(vocabulary):
    logits = torch.full((1, vocabulary), float("-inf"), device=DEVICE, requires_grad=True)
    targets = torch.tensor([7], device=DEVICE)
    logps, entropy = token_logps_from_logits(logits, targets, temperature=0.5, entropy=True, backend="triton")
    torch.testing.assert_close(
        torch.cat([logps, -entropy]).cpu(), torch.full((2,), -float(vocabulary)).abs().log().neg()
    )
    want = torch.full_like(logits, -2 / vocabulary)
    want[0, 7] += 2
    torch.testing.assert_close(gradients(logps.sum(), logits), want)


@pytest.mark.parametrize("rows", ["apart", "columns", "transposed", "odd"])
def test_strided_logits(rows):
    """Views that no copy is made of, on either side of the table's edge; the gradient is that of the same numbers."""
    for vocabulary in (300, 40_000):
        case = make_case(6, vocabulary, torch.bfloat16, 1.0)
        plain = case["logits"]
        if rows == "apart":  # one position of each sequence
            strided = plain.view(2, 3, -1)[:, 1]
            plain = strided.contiguous()
        elif rows == "columns":
            strided = torch.stack([plain, plain], 2)[:, :, 1]
        elif rows == "transposed":
            strided = plain.t().contiguous().t()
        else:  # rows start between two words
            strided = torch.nn.functional.pad(plain, (1, 0))[:, 1:]
        n = plain.shape[0]
        rest = case["targets"][:n], case["advantages"][:1], torch.tensor([0, n], device=DEVICE)
        results = []
        for logits in (plain, strided):
            logits = logits.detach().requires_grad_()
            loss, stats = fused_grpo_loss_from_logits(logits, *rest, backend="triton")
            logps, entropy = token_logps_from_logits(logits, rest[0], entropy=True, backend="triton")
            total = logps.sum() + entropy.sum()
            results.append((loss, stats.logps, logps, gradients(loss, logits), gradients(total, logits)))
            body = logits.detach().clone(memory_format=torch.preserve_format)
            over, _ = fused_grpo_loss_from_logits(
                body.requires_grad_() * 1, *rest, overwrite_logits=True, backend="triton"
            )
            results[-1] += (gradients(3 * over, body),)
        assert strided.stride() != plain.stride() or strided.storage_offset()
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("vocabulary", [300, 40_000])
def test_offsets_beyond_two_to_the_31(vocabulary):
    """Rows 2^30 elements apart: the fourth starts beyond int32. Untouched pages of the storage cost nothing."""
    n, apart = 4, 2**30
    case = make_case(n, vocabulary, torch.bfloat16, 1.0)
    strided = torch.empty(3 * apart + vocabulary, dtype=torch.bfloat16, device=DEVICE).as_strided(
        (n, vocabulary), (apart, 1)
    )
    strided.copy_(case["logits"])
    rest = case["targets"], case["advantages"], case["completion_cu"]
    results = []
    for logits in (strided, case["logits"]):
        logits = logits.detach().requires_grad_()
        tokens, logps = sample_tokens(logits.detach(), seed=1, **counters(n), backend="triton")
        loss, stats = fused_grpo_loss_from_logits(logits, *rest, backend="triton")
        plain = token_logps_from_logits(logits, case["targets"], backend="triton")
        results.append((tokens, logps, stats.logps, gradients(loss, logits), gradients(plain.sum(), logits)))
    body, numbers = strided.detach(), case["logits"].detach()
    loss, _ = fused_grpo_loss_from_logits(body.requires_grad_()[:], *rest, overwrite_logits=True, backend="triton")
    gradients(2 * loss, body)
    results[0] += (body.detach().clone(),)
    results[1] += (2 * results[1][3],)
    body = strided.detach().copy_(numbers).requires_grad_()
    again = token_logps_from_logits(body[:], case["targets"], inplace_backward=True, backend="triton")
    gradients(again.sum(), body)
    results[0] += (body.detach(),)
    results[1] += (results[1][4],)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_columns_beyond_two_to_the_31():
    """Columns 2^30 elements apart: the third one starts beyond int32."""
    apart = 2**30
    case = make_case(2, 3, torch.bfloat16, 1.0)
    strided = torch.empty(2 * apart + 2, dtype=torch.bfloat16, device=DEVICE).as_strided((2, 3), (1, apart))
    rest = case["targets"], case["advantages"], case["completion_cu"]
    results = []
    for body in (strided, case["logits"]):
        numbers = case["logits"].clone()
        with torch.no_grad():
            body.copy_(numbers)
        drawn = sample_tokens(body, seed=1, **counters(2), backend="triton")
        leaf = body.detach().requires_grad_()
        loss, _ = fused_grpo_loss_from_logits(leaf[:], *rest, overwrite_logits=True, backend="triton")
        gradients(3 * loss, leaf)
        results.append((*drawn, loss.detach(), leaf.detach().clone()))
        with torch.no_grad():
            body.copy_(numbers)
        leaf = body.detach().requires_grad_()
        logps = token_logps_from_logits(leaf[:], case["targets"], inplace_backward=True, backend="triton")
        gradients(logps.sum(), leaf)
        results[-1] += (logps.detach(), leaf.detach().clone())
        with torch.no_grad():
            body.copy_(numbers)
    for a, b in zip(*results, strict=True):
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
