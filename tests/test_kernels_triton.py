"""The Triton kernels against fp64, beside the error that eager torch makes on the same inputs.

On the CPU they run in Triton's interpreter, in a process of their own: `TRITON_INTERPRET=1 pytest <this file>`, which
`make test` does. Otherwise every test here is a `gpu` test. The rule: no error above eager's of the same dtype, plus
TOLERANCE of the largest value.
"""

import itertools

import pytest
import torch

from boxgrpo.kernels import (
    fused_grpo_loss,
    fused_grpo_loss_from_logits,
    group_advantages,
    grpo_loss,
    sample_tokens,
    token_logps,
    token_logps_from_logits,
)
from boxgrpo.kernels.checks import interpreting

DEVICE = "cpu" if interpreting() else "cuda"
pytestmark = [] if interpreting() else [pytest.mark.gpu]

TOLERANCE = 4e-6  # of the largest value: 32 ulps of fp32, where eager may happen to round to the exact value
VARIANTS = {
    "grpo": {},
    "bnpo": {"loss_type": "bnpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.3},
    "dr_grpo": {"loss_type": "dr_grpo", "denominator": torch.tensor(48.0)},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "delta": {"delta": 1.5, "beta": 0.0},
    "global count": {"loss_type": "dapo", "denominator": torch.tensor(37.0)},
    "on policy": {"old_logps": None, "ref_logps": None, "weights": None, "sampler_factor": None},
    "no reference": {"ref_logps": None},
    "sequence": {"importance_sampling_level": "sequence", "epsilon": 0.1},
    "sequence delta": {"importance_sampling_level": "sequence", "delta": 1.25},
    "sequence cispo": {"importance_sampling_level": "sequence", "loss_type": "cispo", "epsilon_high": 1.05},
    "sequence on policy": {"importance_sampling_level": "sequence", "old_logps": None},
}
# Rows, vocabulary, dtype, temperature: one row, odd widths on both sides of the launch table's edge, the 2B's and 7B's.
SHAPES = [
    (1, 13, torch.float32, 0.7),
    (11, 257, torch.float32, 2.0),
    (7, 8192, torch.bfloat16, 0.1),
    (5, 32_769, torch.float32, 1.3),
    (5, 32_771, torch.bfloat16, 1.0),
    (6, 151_936, torch.bfloat16, 1.0),
    (6, 152_064, torch.float32, 0.1),
    (6, 151_936, torch.float16, 2.0),
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
    names = ("old_logps", "ref_logps", "weights", "sampler_factor")
    options = {name: case[name] for name in names} | variant
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


def exact(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def eager(logits, targets, temperature):
    """logps and entropy as a user writes them, in the logits' own dtype."""
    distribution = (logits / temperature).log_softmax(1)
    products = torch.where(distribution.isneginf(), 0, distribution.exp() * distribution)
    return distribution.gather(1, targets[:, None]).squeeze(1), -products.sum(1)


def hold_to_the_rule(ours, eagers, truths):
    """Each of ours no further from the truth than eager's, plus TOLERANCE of the largest value."""
    for i, (got, theirs, truth) in enumerate(zip(ours, eagers, truths, strict=True)):
        assert got.isfinite().all(), i
        error, allowed = ((x.double() - truth).abs().max() for x in (got, theirs))
        scale = truth.abs().max().clamp(min=1e-30)
        if got.dtype in (torch.float16, torch.bfloat16):  # the interpreter truncates where hardware rounds
            allowed = allowed + interpreting() * torch.finfo(got.dtype).eps * scale
        assert error <= allowed + TOLERANCE * scale, (i, error.item(), allowed.item(), scale.item())


def gradients(value, leaf):
    return torch.autograd.grad(value, leaf)[0]


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
    hold_to_the_rule(got, run(case["logits"], theirs), run(case["logits"].double(), theirs))
    assert got[-1].dtype == shape[2] and got[0].dtype == torch.float32


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
    hold_to_the_rule(got, theirs, truth)
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
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("n", [1, 90])
@pytest.mark.parametrize("wanted", ["both", "hidden", "weight"])
def test_the_head(level, n, wanted, monkeypatch):
    """token_logps and the fused loss, over several chunks of logits and of gradients, a ragged one last."""
    monkeypatch.setattr("boxgrpo.kernels.doors_triton.LOGIT_BYTES", 4 * 500 * 16)
    monkeypatch.setattr("boxgrpo.kernels.doors_triton.GRADIENT_BYTES", 4 * 500 * 40)
    monkeypatch.setattr("boxgrpo.kernels.doors_triton.ROW_MULTIPLE", 16)
    g, vocabulary, width = seeded(), 500, 24
    case = make_case(n, vocabulary, torch.float32, 0.8)
    hidden, weight = (torch.randn(size, width, generator=g).to(DEVICE) for size in (n, vocabulary))
    options = options_of(case, {"importance_sampling_level": level})
    rest = case["advantages"], case["completion_cu"]
    upstream = torch.randn(2, n, generator=g).to(DEVICE)

    def run(hidden, weight, door, options, rest):
        hidden, weight = hidden.detach(), weight.detach()
        leaves = [
            x.requires_grad_() for x, name in ((hidden, "hidden"), (weight, "weight")) if wanted in ("both", name)
        ]
        logps, entropy, (loss, stats) = door(hidden, weight, options, rest)
        total = (logps * upstream[0]).sum() + (entropy * upstream[1]).sum()
        values = loss, torch.stack([*stats[:7]]), stats.logps, logps, entropy
        return *(x.detach() for x in values), *(
            y for x in (total, 3 * loss) for y in torch.autograd.grad(x, leaves, retain_graph=True)
        )

    def ours(hidden, weight, options, rest):
        head = {"temperature": 0.8, "backend": "triton"}
        logps, entropy = token_logps(hidden, weight, case["targets"], entropy=True, **head)
        return logps, entropy, fused_grpo_loss(hidden, weight, case["targets"], *rest, **head, **options)

    def theirs(hidden, weight, options, rest):
        logps, entropy = eager(hidden @ weight.T, case["targets"], 0.8)
        loss, stats = grpo_loss(logps, *rest, **options)
        return logps, entropy, (loss, stats._replace(logps=logps))

    double = {name: exact(x) for name, x in options.items()}
    hold_to_the_rule(
        run(hidden, weight, ours, options, rest),
        run(hidden, weight, theirs, options, rest),
        run(hidden.double(), weight.double(), theirs, double, tuple(map(exact, rest))),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1536, 3584])
def test_the_head_at_real_size(width):
    """bf16 on the tensor cores, at the 2B's and the 7B's width: cuBLAS's fp32 logits and sums of dweight."""
    g, n, vocabulary = seeded(), 1100, 151_936
    case = make_case(n, 64, torch.float32, 1.0)
    case["targets"] = torch.randint(vocabulary, (n,), generator=g).to("cuda")
    hidden = torch.randn(n, width, generator=g).to("cuda", torch.bfloat16)
    weight = (torch.randn(vocabulary, width, generator=g) / width**0.5).to("cuda", torch.bfloat16)
    rest = case["targets"], case["advantages"], case["completion_cu"]

    def run(hidden, weight, door):
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss, stats = door(*leaves)
        return loss.detach(), stats.logps, *torch.autograd.grad(loss, leaves)

    def ours(hidden, weight):
        return fused_grpo_loss(hidden, weight, *rest, backend="triton")

    def theirs(hidden, weight):
        logps, _ = eager(hidden @ weight.T, rest[0], 1.0)
        loss, stats = grpo_loss(logps, *rest[1:])
        return loss, stats._replace(logps=logps.detach())

    truth = run(hidden.double(), weight.double(), theirs)
    hold_to_the_rule(run(hidden, weight, ours), run(hidden, weight, theirs), truth)


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

    hold_to_the_rule(run(logits, ours), run(logits, clamped), run(logits.double(), clamped))
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
    advantages, _, _ = group_advantages(rewards, rewards, backend="triton")
    assert advantages.isnan().any(1).tolist() == [True, False]


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
            results[-1] += (gradients(over, body),)
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
    body = strided.detach()
    fused_grpo_loss_from_logits(body.requires_grad_()[:], *rest, overwrite_logits=True, backend="triton")
    results[0] += (body.detach(),)
    results[1] += (results[1][3],)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


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


def test_bad_indices_give_nan():
    """Nobody can look at a device's targets and offsets without waiting for it: what they spoil is NaN, not memory."""
    case = make_case(6, 300, torch.float32, 1.0)
    case["targets"][1], case["targets"][4] = -1, 302
    logps = token_logps_from_logits(case["logits"], case["targets"], backend="triton")
    assert logps.isnan().tolist() == [i in (1, 4) for i in range(6)]
    logps = torch.zeros(6, device=DEVICE, requires_grad=True)
    loss, _ = grpo_loss(logps, torch.ones(1, device=DEVICE), torch.tensor([0, 4], device=DEVICE), backend="triton")
    assert loss.isnan() and gradients(loss, logps).isnan().tolist() == [False] * 4 + [True] * 2


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("bounds", [[0], [0, 0, 0]])
def test_no_tokens_give_zeros(bounds, level):
    cu, rest = torch.tensor(bounds, device=DEVICE), torch.ones(len(bounds) - 1, device=DEVICE)
    logits = torch.empty(0, 50, device=DEVICE, requires_grad=True)
    hidden, weight = (torch.empty(k, 4, device=DEVICE, requires_grad=True) for k in (0, 50))
    targets = torch.empty(0, dtype=torch.int64, device=DEVICE)
    options = {"importance_sampling_level": level, "backend": "triton"}
    for loss, stats in (
        fused_grpo_loss_from_logits(logits, targets, rest, cu, **options),
        fused_grpo_loss(hidden, weight, targets, rest, cu, **options),
        grpo_loss(logits.sum(1), rest, cu, **options),
    ):
        loss.backward()
        assert loss == 0 and all((x == 0).all() for x in stats)
    assert not weight.grad.any()
    tokens, logps = sample_tokens(logits.detach(), seed=1, **counters(0), backend="triton")
    assert tokens.shape == logps.shape == (0,)


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


def counters(n):
    """(n) counters, large ones among them."""
    i = torch.arange(n, device=DEVICE)
    return {"prompt_ids": i // 8 + 2**40, "completion_ids": i % 8, "positions": i * 3 % 1000}


@pytest.mark.parametrize(
    "vocabulary, dtype, n",
    [(3, torch.float32, 20), (300, torch.float32, 40), (20_000, torch.bfloat16, 20), (151_936, torch.bfloat16, 8)],
)
@pytest.mark.parametrize("temperature", [0.0, 0.1, 1.0, 2.0])
@pytest.mark.parametrize("banned", [None, [0, 2], [9, 10], [1, 299, 8192, 8193, 151_935]], ids=str)
def test_samples_are_the_twins(vocabulary, dtype, n, temperature, banned):
    """The same token on the twin and in the kernel, its logp within fp32's rounding; ties go to the first."""
    logits = (3 * torch.randn(n, vocabulary, generator=seeded(vocabulary))).to(DEVICE, dtype)
    logits[1] = 0
    logits[2, : vocabulary // 2] = float("-inf")
    logits[3] = float("-inf")
    forbidden = None
    if banned is not None:
        forbidden = torch.tensor([i for i in banned if i < vocabulary], dtype=torch.int64, device=DEVICE)
    options = {"seed": 2**62 + 5, "temperature": temperature, "forbidden": forbidden} | counters(n)
    tokens, logps = sample_tokens(logits, **options, backend="triton")
    want, want_logps = sample_tokens(logits, **options, backend="torch")
    assert torch.equal(tokens, want)
    torch.testing.assert_close(logps, want_logps, rtol=1e-5, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch():
    logits = torch.randn(20, 20_000, generator=seeded()).to(DEVICE)
    own = counters(20)
    whole = sample_tokens(logits, seed=3, **own, backend="triton")
    order = torch.randperm(20, generator=seeded(1)).to(DEVICE)
    shuffled = sample_tokens(logits[order], seed=3, **{k: v[order] for k, v in own.items()}, backend="triton")
    alone = sample_tokens(logits[7:8], seed=3, **{k: v[7:8] for k, v in own.items()}, backend="triton")
    for a, b, c in zip(whole, shuffled, alone, strict=True):
        assert torch.equal(a[order], b) and torch.equal(a[7:8], c)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_most_of_the_vocabulary_may_be_forbidden(temperature):
    """Padded ids by the thousand, whole groups of them; and a forbidden favourite far above the rest."""
    logits = torch.randn(8, 20_000, generator=seeded()).to(DEVICE)
    logits[:, 12_345] = 500
    forbidden = torch.tensor([*range(64, 128), *range(9000, 20_000)], device=DEVICE)
    options = {"seed": 5, "temperature": temperature, "forbidden": forbidden} | counters(8)
    tokens, logps = sample_tokens(logits, **options, backend="triton")
    want, want_logps = sample_tokens(logits, **options, backend="torch")
    assert torch.equal(tokens, want) and not torch.isin(tokens, forbidden).any()
    torch.testing.assert_close(logps, want_logps)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_no_numbers_still_draw_an_id(value, temperature):
    logits = torch.full((2, 300), value, device=DEVICE)
    logits[1] = 0
    logits[1, 8] = value
    tokens, logps = sample_tokens(logits, seed=1, temperature=temperature, **counters(2), backend="triton")
    assert (tokens >= 0).all() and (tokens < 300).all() and logps.isnan().all()


def test_filters_go_through_the_twin():
    logits = torch.randn(9, 300, generator=seeded()).to(DEVICE)
    for filters in ({"top_k": 5}, {"top_p": 0.5}):
        got = sample_tokens(logits, seed=3, **counters(9), **filters, backend="triton")
        want = sample_tokens(logits, seed=3, **counters(9), **filters, backend="torch")
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "difficulty, scale", itertools.product(["exp", "power", "log", "none"], ["group", "batch", "none"])
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


def test_doors_pass_opcheck():
    case = make_case(5, 40, torch.float32, 0.7)
    ops, logits = torch.ops.boxgrpo, case["logits"].requires_grad_()
    targets, rest = case["targets"], (case["advantages"], case["completion_cu"])
    g = seeded()
    hidden, weight = (torch.randn(k, 4, generator=g).to(DEVICE).requires_grad_() for k in (5, 40))
    own = counters(5)
    for entropy in (False, True):
        torch.library.opcheck(ops.token_logps, (hidden, weight, targets, 0.7, entropy, True))
        torch.library.opcheck(ops.token_logps_from_logits, (logits, targets, 0.7, entropy, True))
    for level in ("token", "sequence"):
        o = (*[None] * 5, 0.04, 0.2, 0.2, None, "grpo", level)
        torch.library.opcheck(ops.fused_grpo_loss, (hidden, weight, targets, *rest, 0.7, True, True, True, *o))
        torch.library.opcheck(ops.fused_grpo_loss_from_logits, (logits, targets, *rest, 0.7, True, True, *o))
        torch.library.opcheck(ops.grpo_loss, (case["old_logps"].requires_grad_(), *rest, True, *o))
    torch.library.opcheck(ops.sample_tokens, (logits.detach(), 4, *own.values(), 0.7, 0, 1.0, None, True))
    rewards = torch.rand(2, 4, generator=g).to(DEVICE)
    torch.library.opcheck(ops.group_advantages, (rewards, rewards, "exp", "group", 1e-4, True))


def test_doors_compile_without_a_graph_break():
    case = make_case(5, 40, torch.float32, 0.7)
    g = seeded()
    hidden, weight = (torch.randn(k, 4, generator=g).to(DEVICE).requires_grad_() for k in (5, 40))
    own = counters(5)

    def step(hidden, weight):
        options = options_of(case, {}) | {"backend": "triton"}
        logits, rest = hidden @ weight.T, (case["advantages"], case["completion_cu"])
        tokens, _ = sample_tokens(logits.detach(), seed=3, **own, backend="triton")
        logps, entropy = token_logps(hidden, weight, tokens, entropy=True, backend="triton")
        again = token_logps_from_logits(logits, tokens, backend="triton")
        advantages, _, _ = group_advantages(
            logps[:4].view(2, 2).detach(), entropy[:4].view(2, 2).detach(), backend="triton"
        )
        losses = (
            fused_grpo_loss(hidden, weight, tokens, *rest, **options)[0],
            fused_grpo_loss_from_logits(logits, tokens, *rest, **options)[0],
            grpo_loss(again, *rest, **options)[0],
        )
        return sum(losses) + logps.sum() + entropy.sum() + advantages.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = [f(hidden, weight) for f in (step, compiled)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(x, (hidden, weight)) for x in results))


def test_fp64_stays_with_the_twin():
    logits = torch.randn(3, 9, dtype=torch.float64, device=DEVICE)
    targets = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="token_logps_from_logits got fp64, which only the torch twin"):
        token_logps_from_logits(logits, targets, backend="triton")
    assert token_logps_from_logits(logits, targets).dtype == torch.float64
    with pytest.raises(ValueError, match="group_advantages got fp64"):
        group_advantages(logits.float(), logits, backend="triton")
