"""The GRPO losses from logps, logits and the head: twin and kernel against the formulas in fp64, beside fp32's."""

import pytest
import torch

from boxgrpo.kernels import (
    GrpoStats,
    chunks,
    fused_grpo_loss,
    fused_grpo_loss_from_logits,
    grpo_loss,
    token_logps,
    token_logps_from_logits,
)
from kernel_cases import (
    BACKENDS,
    DEVICE,
    LANE,
    SHAPES,
    TOLERANCE,
    VARIANTS,
    check_error,
    eager,
    gradients,
    make_case,
    on_triton,
    options_of,
    seeded,
    token_formulas,
)


def formulas(logits, case, temperature):
    """The loss of eager log-probabilities and its statistics, in fp32, or in fp64 for fp64 logits."""
    options = {"beta": 0.04, "weights": None, "denominator": None, "loss_type": "grpo"} | case["options"]
    beta, weights, denominator = (options.pop(name) for name in ("beta", "weights", "denominator"))
    logps, entropy = eager(logits, case["targets"], temperature)
    sizes = case["completion_cu"].diff()
    owner = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    policy, kl, ratio, low, high = token_formulas(logps, owner, case["advantages"], **options)
    terms = policy * (1 if weights is None else weights[owner]) + beta * kl
    by_completion = options["loss_type"] in ("grpo", "sapo")
    total = (terms / sizes[owner] if by_completion else terms).sum()
    if denominator is None:
        denominator = len(sizes) if by_completion or options["loss_type"] == "luspo" else len(logps)
    clips = (x.to(logps.dtype).mean() for x in (low, high, low | high))
    found = kl.mean(), *clips, ratio.min(), ratio.mean(), ratio.max(), logps, entropy
    return total / denominator, GrpoStats(*(x.detach() for x in found))


SMALL = (11, 257, torch.float32, 0.7)


@BACKENDS
@pytest.mark.parametrize(
    "compute, variant, shape",
    [
        *((compute, variant, SMALL) for compute in ("logits", "logps") for variant in VARIANTS),
        *(("overwrite", variant, SMALL) for variant in ("grpo", "on policy", "sequence", "vespo")),
        *(("overwrite", variant, (5, 33_000, torch.bfloat16, 1.0)) for variant in ("cispo", "on policy", "sequence")),
        *(("logits", "grpo", shape) for shape in SHAPES),
    ],
    ids=str,
)
def test_every_loss(compute, variant, shape, backend):
    """Loss, all statistics, logps, entropy and gradient of every variant, and of the default one on every shape."""
    case, temperature = make_case(*shape), shape[-1]
    case["options"] = options_of(case, VARIANTS[variant])

    def run(loss_of, case):
        logits = case["logits"].detach().requires_grad_()
        loss, stats = loss_of(logits, case)
        scalars = torch.stack([x.to(stats.logps.dtype) for x in stats[:7]])
        return loss.detach(), scalars, stats.logps, stats.entropy, gradients(2 * loss, logits)  # exact in bf16

    def ours(logits, case):
        rest = case["targets"], case["advantages"], case["completion_cu"]
        if compute == "logps":
            logps, entropy = eager(logits, case["targets"], temperature)
            loss, stats = grpo_loss(logps, *rest[1:], backend=backend, **case["options"])
            assert stats.entropy.shape == (0,)
            return loss, stats._replace(entropy=entropy.detach())
        options = {"temperature": temperature, "overwrite_logits": compute == "overwrite", "backend": backend}
        return fused_grpo_loss_from_logits(logits * 1, *rest, **options, **case["options"])  # no leaf is overwritten

    def theirs(logits, case):
        return formulas(logits, case, temperature)

    _, scalars, *_ = check_error(run, ours, theirs, case, targets=case["targets"])
    if variant == "delta":  # the case covers every branch
        _, low, high, region, least, _, most = scalars
        assert low > 0 and high > 0 and region < 1 and least < 0.8 and most > 1.5


@BACKENDS
@pytest.mark.parametrize(
    "n, vocabulary, wanted, variant",
    [
        (1, 500, "both", "grpo"),
        *((40, 500, wanted, "grpo") for wanted in ("both", "hidden", "weight")),
        *((40, 500, wanted, "sequence") for wanted in ("hidden", "weight")),
        *((20, 500, "both", variant) for variant in ("cispo", "on policy", "sequence delta", "vespo")),
        (4, 151_936, "both", "grpo"),
    ],
)
def test_the_head(n, vocabulary, wanted, variant, backend, monkeypatch):
    """token_logps and the fused loss, over several chunks of logits and of gradients, the last of another size."""
    rows = 2 if n == 4 else 16
    if backend == "torch":
        monkeypatch.setattr(chunks, "chunk_rows", lambda *_, **__: rows)
    monkeypatch.setattr(chunks, "sweep_rows", lambda *_: chunks.SweepRows(rows, 2 * rows))
    g, width = seeded(), 24
    case = make_case(n, vocabulary, torch.float32, 0.8)
    case["hidden"], case["weight"] = (torch.randn(size, width, generator=g).to(DEVICE) for size in (n, vocabulary))
    case["options"] = options_of(case, VARIANTS[variant])
    upstream = torch.randn(2, n, generator=g).to(DEVICE)

    def run(compute, case):
        hidden, weight = case["hidden"].detach(), case["weight"].detach()
        both = (hidden, "hidden"), (weight, "weight")
        leaves = [x.requires_grad_() for x, name in both if wanted in ("both", name)]
        logps, entropy, (loss, stats) = compute(hidden, weight, case)
        total = (logps * upstream[0]).sum() + (entropy * upstream[1]).sum()
        values = loss, torch.stack([*stats[:7]]), stats.logps, logps, entropy
        return *(x.detach() for x in values), *(
            y for x in (total, 3 * loss) for y in torch.autograd.grad(x, leaves, retain_graph=True)
        )

    def ours(hidden, weight, case):
        head, rest = {"temperature": 0.8, "backend": backend}, (case["advantages"], case["completion_cu"])
        logps, entropy = token_logps(hidden, weight, case["targets"], entropy=True, **head)
        return logps, entropy, fused_grpo_loss(hidden, weight, case["targets"], *rest, **head, **case["options"])

    def theirs(hidden, weight, case):
        logits = hidden @ weight.T
        return *eager(logits, case["targets"], 0.8), formulas(logits, case, 0.8)

    # dhidden sums over the vocabulary: at 152k a library's order of it moves the error, by a third from run to run
    # with two threads, and to 3.3e-5 with one and the two rows of this chunk.
    check_error(run, ours, theirs, case, tolerance=TOLERANCE if vocabulary < 1000 else 4e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1536, 3584])
@pytest.mark.parametrize("products", [1, 3])
def test_the_head_at_real_size(products, width, monkeypatch):
    """bf16 on the tensor cores, at the 2B's and the 7B's width: fp32 logits, dweight from one product or three."""
    if products == 3:
        monkeypatch.setattr(chunks, "sweep_rows", lambda *_: chunks.SweepRows(384, 384))
    g, n, vocabulary = seeded(), 1100, 151_936
    case = make_case(n, 64, torch.float32, 1.0)
    case["options"], case["targets"] = {}, torch.randint(vocabulary, (n,), generator=g).to("cuda")
    case["hidden"] = torch.randn(n, width, generator=g).to("cuda", torch.bfloat16)
    case["weight"] = (torch.randn(vocabulary, width, generator=g) / width**0.5).to("cuda", torch.bfloat16)

    def run(loss_of, case):
        leaves = case["hidden"].detach().requires_grad_(), case["weight"].detach().requires_grad_()
        loss, stats = loss_of(*leaves, case)
        return loss.detach(), stats.logps, *torch.autograd.grad(loss, leaves)

    def ours(hidden, weight, case):
        rest = case["targets"], case["advantages"], case["completion_cu"]
        return fused_grpo_loss(hidden, weight, *rest, backend="triton")

    check_error(run, ours, lambda hidden, weight, case: formulas(hidden @ weight.T, case, 1.0), case)


@on_triton
@pytest.mark.parametrize("strided", [False, True])
def test_a_loss_scale_reaches_every_element(strided, monkeypatch):
    """Far more blocks than programs: each program scales several blocks."""
    monkeypatch.setattr("boxgrpo.kernels.scale_triton.SCALE_PROGRAMS", 2)
    case = make_case(4, 9000, torch.float32, 1.0)
    rest, logits, found = (case["targets"], case["advantages"], case["completion_cu"]), case["logits"], []
    logits = logits.t().contiguous().t() if strided else logits
    for scale in (1, 2):
        leaf = logits.clone(memory_format=torch.preserve_format).requires_grad_()
        loss, _ = fused_grpo_loss_from_logits(leaf * 1, *rest, overwrite_logits=True, backend="triton")
        found.append(gradients(scale * loss, leaf))
    assert torch.equal(2 * found[0], found[1])


@BACKENDS
def test_nan_reaches_its_own_row_if_that_has_a_gradient(backend):
    """An advantage of 0, on policy and without a reference, has no gradient, whatever the logits are."""
    case = make_case(6, 40_000, torch.float32, 1.0)
    case["logits"][1, 39_999] = case["logits"][4] = float("nan")
    case["advantages"][3:] = 0
    logits, rest = case["logits"].requires_grad_(), (case["targets"], case["advantages"], case["completion_cu"])
    assert fused_grpo_loss_from_logits(logits, *rest, backend=backend, **options_of(case, {}))[0].isnan()
    loss, stats = fused_grpo_loss_from_logits(logits, *rest, backend=backend)
    assert stats.logps.isnan().tolist() == [i in (1, 4) for i in range(6)]
    found = gradients(loss, logits)
    assert found.isnan().any(1).tolist() == [i == 1 for i in range(6)] and found[0].any() and not found[4].any()


@on_triton
@pytest.mark.parametrize(
    "vocabulary, dtype",
    [(100, torch.float32), (49_152, torch.bfloat16), (49_168, torch.float32), (40_003, torch.bfloat16)],
)
def test_targets_at_the_edges_of_blocks(vocabulary, dtype):
    """One block, not full; three full ones; a fourth of 16 logits; rows that do not start at multiples of 16 bytes."""
    targets = torch.tensor([0, 16_383, 16_384, 32_767, 32_768, vocabulary - 1]).clamp(max=vocabulary - 1)
    case = make_case(len(targets), vocabulary, dtype, 1.0)
    rest, found = (case["advantages"], case["completion_cu"]), []
    for backend in ("triton", "torch"):
        logits = case["logits"].clone().requires_grad_()
        loss, stats = fused_grpo_loss_from_logits(logits, targets.to(DEVICE), *rest, backend=backend)
        found.append((stats.logps, stats.entropy, gradients(1000 * loss, logits).float()))
    rtol = 1e-5 if dtype == torch.float32 else 2e-2  # the interpreter truncates to bf16
    torch.testing.assert_close(*found, rtol=rtol, atol=1e-5)


@on_triton
def test_a_target_beyond_the_row_spoils_no_other_row():
    """Its place in memory is a logit of a neighbour."""
    case = make_case(6, 40_000, torch.float32, 1.0)
    rest, found = (case["advantages"], case["completion_cu"]), []
    for stray in (5, -1, 40_000):
        logits, targets = case["logits"].clone().requires_grad_(), case["targets"].clone()
        targets[1] = stray
        options = {"overwrite_logits": True, "backend": "triton"}
        loss, stats = fused_grpo_loss_from_logits(logits * 1, targets, *rest, **options)
        found.append((stats.logps, gradients(loss, logits)))
    others = [0, 2, 3, 4, 5]
    for logps, dlogits in found[1:]:
        assert logps[1].isnan()
        assert torch.equal(logps[others], found[0][0][others]) and torch.equal(dlogits[others], found[0][1][others])


WRITTEN = ("inplace", "overwrite", "fused")  # the twin of "fused" writes over nothing


@pytest.mark.parametrize(
    "compute, backend",
    [*((x, "torch") for x in WRITTEN[:2]), *(pytest.param(x, "triton", marks=LANE) for x in WRITTEN)],
)
def test_autograd_sees_what_is_written_over_the_logits(compute, backend):
    """A second backward, or another reader of overwritten logits, raises; it is never silently wrong."""
    case = make_case(6, 300, torch.float32, 1.0)
    rest = case["targets"], case["advantages"], case["completion_cu"]
    leaf = case["logits"].requires_grad_()
    logits = leaf * 1
    reader = logits.square().sum()

    def value_of(logits):
        if compute == "inplace":
            return token_logps_from_logits(logits, rest[0], inplace_backward=True, backend=backend).sum()
        options = {"overwrite_logits": compute == "overwrite", "backend": backend}
        return fused_grpo_loss_from_logits(logits, *rest, **options)[0]

    value = value_of(logits)
    assert torch.equal(logits, leaf) == (compute != "overwrite")
    first = torch.autograd.grad(2 * value, logits, retain_graph=True)[0]
    assert first.any() and (first.data_ptr() == logits.data_ptr()) == (compute != "fused")
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(value, leaf, retain_graph=True)
    if compute != "fused":
        with pytest.raises(RuntimeError, match="inplace operation"):
            torch.autograd.grad(reader, leaf)
    before = leaf.detach().clone()
    with torch.no_grad():  # no gradient is wanted: nothing is overwritten
        value_of(leaf)
    assert torch.equal(leaf, before)
