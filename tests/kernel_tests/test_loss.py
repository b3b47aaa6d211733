"""The three loss functions against a dense reference written from the formulas, in fp64."""

import pytest
import torch

from boxgrpo.kernels import (
    chunks,
    fused_grpo_loss,
    fused_grpo_loss_from_logits,
    grpo_loss,
    token_logps,
)
from kernel_cases import VARIANTS

N, V, H = 11, 13, 5
CU = torch.tensor([0, 3, 3, 4, 11], dtype=torch.int32)  # one completion is empty
TEMPERATURE = 0.7
FUNCTIONS = ("logps", "head", "logits", "overwrite")


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=g)

    hidden, weight = normal(N, H), normal(V, H)
    targets = torch.randint(V, (N,), generator=g)
    logps = (hidden @ weight.T / TEMPERATURE).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "advantages": torch.tensor([1.3, -0.4, -0.9, -1.1], dtype=torch.float64),
        # Ratios from 0.5 to 2, so that either bound and delta are met on both signs of the advantage.
        "old_logps": logps + torch.linspace(-0.7, 0.7, N, dtype=torch.float64)[torch.randperm(N, generator=g)],
        "ref_logps": logps + 0.5 * normal(N),
        "weights": torch.tensor([0.5, 2.0, 1.5, 0.3], dtype=torch.float64),
        "sampler_factor": torch.rand(N, dtype=torch.float64, generator=g) * 2,
    }


def options_of(case, **variant):
    names = ("old_logps", "ref_logps", "weights", "sampler_factor")
    return {name: case[name] for name in names if case[name] is not None} | variant


def run(function, case, options, hidden=None, weight=None):
    """The function's loss and stats from hidden states and head, whatever it takes."""
    hidden, weight = (case[k] if x is None else x for k, x in (("hidden", hidden), ("weight", weight)))
    targets, rest = case["targets"], (case["advantages"], CU)
    if function == "head":
        return fused_grpo_loss(hidden, weight, targets, *rest, temperature=TEMPERATURE, **options)
    if function == "logps":
        return grpo_loss(token_logps(hidden, weight, targets, temperature=TEMPERATURE), *rest, **options)
    logits, overwrite = hidden @ weight.T, function == "overwrite"
    return fused_grpo_loss_from_logits(
        logits, targets, *rest, temperature=TEMPERATURE, overwrite_logits=overwrite, **options
    )


def dense(hidden, weight, case, options):
    """The formulas of ARCHITECTURE.md, section "The mathematics", one completion and one token after the other."""
    o = {"beta": 0.04, "epsilon": 0.2, "epsilon_high": None, "delta": None, "loss_type": "grpo"} | options
    kind, by_sequence = o["loss_type"], o.get("importance_sampling_level") == "sequence"
    high = 1 + (o["epsilon"] if o["epsilon_high"] is None else o["epsilon_high"])
    distribution = (hidden @ weight.T / TEMPERATURE).log_softmax(1)
    total, logps, kls, lows, highs, ratios = 0.0, [], [], [], [], []
    for i, (start, end) in enumerate(zip(CU[:-1].tolist(), CU[1:].tolist(), strict=True)):
        advantage, phi = case["advantages"][i], 1.0 if o["weights"] is None else o["weights"][i]
        tokens = range(start, end)
        logp = {t: distribution[t, case["targets"][t]] for t in tokens}
        log_ratio = {t: logp[t] - (logp[t].detach() if o["old_logps"] is None else o["old_logps"][t]) for t in tokens}
        if by_sequence and tokens:
            mean = sum(log_ratio.values()) / len(tokens)
            log_ratio = dict.fromkeys(tokens, mean)
        for t in tokens:
            ratio = log_ratio[t].exp()
            if kind == "cispo":
                policy = -torch.clamp(ratio, max=o["epsilon_high"]).detach() * advantage * logp[t]
                lows.append(False)
                highs.append(bool(ratio > o["epsilon_high"] and advantage > 0))
            else:
                bounded = ratio if o["delta"] is None else torch.clamp(ratio, max=o["delta"])
                policy = -torch.min(bounded * advantage, torch.clamp(ratio, 1 - o["epsilon"], high) * advantage)
                lows.append(bool(ratio < 1 - o["epsilon"] and advantage < 0))
                highs.append(bool(ratio > high and advantage > 0))
            gap = 0 * logp[t] if o["ref_logps"] is None else o["ref_logps"][t] - logp[t]
            kl = gap.exp() - gap - 1
            share = 1 / len(tokens) if kind == "grpo" else 1.0
            factor = 1.0 if o["sampler_factor"] is None else o["sampler_factor"][t]
            total = total + share * (phi * factor * policy + o["beta"] * kl)
            logps.append(logp[t].detach())
            kls.append(kl.detach())
            ratios.append(ratio.detach())
    own = len(CU) - 1 if kind == "grpo" else N
    loss = total / options.get("denominator", torch.tensor(float(own)))
    clips = [torch.tensor(x, dtype=torch.float64).mean() for x in (lows, highs, [a or b for a, b in zip(lows, highs)])]
    ratios, entropy = torch.stack(ratios), -(distribution.exp() * distribution).sum(1).detach()
    scalars = (torch.stack(kls).mean(), *clips, ratios.min(), ratios.mean(), ratios.max())
    return loss, (*scalars, torch.stack(logps), entropy)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("function, chunk", [*((function, 4) for function in FUNCTIONS), ("head", 1000)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_the_formulas(case, variant, function, chunk, monkeypatch):
    """Loss, both gradients and every statistic, with all rows in one chunk and with a ragged last chunk."""
    monkeypatch.setattr(chunks, "chunk_rows", lambda *_, **__: chunk)
    hidden, weight = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    options = options_of(case, **VARIANTS[variant])
    want, want_stats = dense(hidden, weight, case, options)
    loss, stats = run(function, case, options)
    torch.testing.assert_close(loss, want)
    # An upstream factor: the backward has to scale what the forward made.
    for got, expected in zip(gradients(3 * loss, hidden, weight), gradients(3 * want, hidden, weight), strict=True):
        torch.testing.assert_close(got, expected)
    for name, got, expected in zip(stats._fields, stats, want_stats, strict=True):
        assert not got.requires_grad
        if name == "entropy" and function == "logps":
            assert got.shape == (0,)
            continue
        torch.testing.assert_close(got, expected, msg=lambda m, name=name: f"{name}: {m}")


def test_the_case_meets_every_branch(case):
    """Without clipped and unclipped tokens of both signs the test above would prove little."""
    _, stats = run("head", case, options_of(case, delta=1.5))
    assert stats.clip_low > 0 and stats.clip_high > 0 and stats.clip_region < 1
    assert stats.ratio_min < 0.8 and stats.ratio_max > 1.5


def test_micro_batches_with_a_global_count_add_up_to_the_whole(case):
    """Splitting a batch cannot change loss or gradient, except for bnpo."""
    for loss_type, count in (("grpo", 4.0), ("dapo", float(N)), ("dr_grpo", 4 * 16.0)):
        options = options_of(case, loss_type=loss_type, denominator=torch.tensor(count))
        hidden = case["hidden"].requires_grad_()
        whole, _ = run("head", case, options)
        parts = []
        for first, last in ((0, 2), (2, 4)):
            rows = slice(int(CU[first]), int(CU[last]))
            cut = {k: x[rows if len(x) == N else slice(first, last)] for k, x in options.items() if k in case}
            part, _ = fused_grpo_loss(
                hidden[rows],
                case["weight"],
                case["targets"][rows],
                case["advantages"][first:last],
                CU[first : last + 1] - CU[first],
                temperature=TEMPERATURE,
                **(options | cut),
            )
            parts.append(part)
        torch.testing.assert_close(sum(parts), whole)
        torch.testing.assert_close(*gradients(sum(parts), hidden), *gradients(whole, hidden))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_rows_without_gradient_do_not_reach_the_product(case, level, monkeypatch):
    """A completion with advantage 0 and no KL is dropped: its rows of dhidden are 0, and never multiplied."""
    case |= {"advantages": torch.tensor([0.0, 1.0, 0.0, 1.0]), "ref_logps": None}
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **options: products.append(a.shape) or mm(a, b, **options))
    hidden = case["hidden"].requires_grad_()
    loss, _ = run("head", case, options_of(case, importance_sampling_level=level, epsilon=1.0, epsilon_high=9.0))
    (dhidden,) = gradients(loss, hidden)
    assert not dhidden[:4].any() and dhidden[4:].any(1).all()
    assert [rows for rows, width in products if width == V] == [7]


def test_a_frozen_head_gets_no_gradient_product(case, monkeypatch):
    wanted = []
    results = chunks.HeadSweep.results
    monkeypatch.setattr(chunks.HeadSweep, "results", lambda self: wanted.append(self.dweight) or results(self))
    case["hidden"].requires_grad_()
    run("head", case, {})[0].backward()
    assert wanted == [None] and case["weight"].grad is None and case["hidden"].grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", ["head", "logits", "overwrite"])
def test_half_precision_loses_only_the_rounding_of_inputs_and_gradients(case, function, dtype):
    """The epilogue is fp32: loss and logps equal fp64's of the same rounded inputs, gradients up to one rounding."""
    names = ("hidden", "weight") if function == "head" else ("logits",)
    source = case | {"logits": case["hidden"] @ case["weight"].T}
    rest = case["targets"], case["advantages"], CU

    def run_in(computed):
        leaves = [source[name].to(dtype).to(computed).requires_grad_() for name in names]
        if function == "head":
            loss, stats = fused_grpo_loss(*leaves, *rest, **options_of(case))
        else:
            body = leaves[0] * 1  # a leaf may not be overwritten
            loss, stats = fused_grpo_loss_from_logits(
                body, *rest, overwrite_logits=function == "overwrite", **options_of(case)
            )
        return loss, stats, gradients(loss, *leaves)

    loss, stats, got = run_in(dtype)
    want, want_stats, exact = run_in(torch.float64)
    assert all(x.dtype == torch.float32 for x in (loss, *stats))
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.logps.double(), want_stats.logps, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-6)


@pytest.mark.parametrize("function", ["head", "logits", "overwrite"])
def test_a_loss_scale_beyond_fp16_scales(case, function):
    """65536 is infinite in fp16; the gradients times it are not."""
    half = {k: case[k].half() for k in ("hidden", "weight")}
    options = {k: v.float() for k, v in options_of(case, denominator=torch.tensor(1000.0)).items()}
    case = case | {"advantages": case["advantages"].float()}
    results = []
    for scale in (1, 65536):
        leaves = [x.detach().requires_grad_() for x in half.values()]
        loss, _ = run(function, case, options, *leaves)
        results.append(gradients(scale * loss, *leaves))
    for plain, scaled in zip(*results, strict=True):
        assert scaled.isfinite().all() and scaled.any()
        torch.testing.assert_close(scaled.float(), 65536 * plain.float(), rtol=2e-3, atol=0.01)


def test_overwriting_takes_the_logits_storage_and_guards_it(case):
    logits = (case["hidden"] @ case["weight"].T).float().requires_grad_()
    args = case["targets"], case["advantages"], CU
    (want,) = gradients(fused_grpo_loss_from_logits(logits, *args)[0], logits)
    before = logits.detach().clone()
    body = logits * 1.0
    loss, _ = fused_grpo_loss_from_logits(body, *args, overwrite_logits=True)
    assert not torch.equal(body, before)
    (got,) = torch.autograd.grad(loss, body, retain_graph=True)
    torch.testing.assert_close(got, want)
    assert got.data_ptr() == body.data_ptr()
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(loss, body)
    with torch.no_grad():  # no gradient is wanted: nothing is overwritten
        fused_grpo_loss_from_logits(logits, *args, overwrite_logits=True)
    assert torch.equal(logits, before)
    expanded = torch.zeros(1, V, requires_grad=True).expand(N, V)
    with pytest.raises(ValueError, match=r"overwrite_logits is set and the logits \(11, 13\) are expanded"):
        fused_grpo_loss_from_logits(expanded, *args, overwrite_logits=True)


def bad_options():
    return {
        "loss_type is 'ppo'": {"loss_type": "ppo"},
        "importance_sampling_level is 'word'": {"importance_sampling_level": "word"},
        "Pass that product": {"loss_type": "dr_grpo"},
        "beta is -1": {"beta": -1.0},
        "epsilon is 1.5": {"epsilon": 1.5},
        "epsilon_high is -0.1": {"epsilon_high": -0.1},
        "delta is 1.2;.*Raise delta": {"delta": 1.2},
        "epsilon_high is None; 'cispo'": {"loss_type": "cispo"},
        "'cispo' has no unclipped ratio": {"loss_type": "cispo", "epsilon_high": 5.0, "delta": 9.0},
        r"old_logps has shape \(2,\); it must be \(11\)": {"old_logps": torch.zeros(2)},
        "ref_logps is int64": {"ref_logps": torch.zeros(N, dtype=torch.int64)},
        r"weights has shape \(11,\)": {"weights": torch.zeros(N)},
        r"sampler_factor has shape \(4,\)": {"sampler_factor": torch.zeros(4)},
        r"denominator has shape \(1,\)": {"denominator": torch.ones(1)},
        "denominator is a float; it must be a torch tensor": {"denominator": 3.0},
        "backend is 'cuda'": {"backend": "cuda"},
        "backend is 'triton'.*CPU tensor": {"backend": "triton"},
    }


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bad_options_are_refused(case, function):
    for message, options in bad_options().items():
        with pytest.raises(ValueError, match=message):
            run(function, case, options)


def test_bad_tensors_are_refused(case):
    hidden, weight, targets, advantages = (case[k] for k in ("hidden", "weight", "targets", "advantages"))
    for message, args, options in (
        (r"hidden has shape \(11, 5, 1\); it must be \(any, any\)", (hidden[..., None], weight, targets), {}),
        ("weight is float32; it must be float64", (hidden, weight.float(), targets), {}),
        (r"weight has shape \(13, 4\); it must be \(any, 5\)", (hidden, weight[:, :4], targets), {}),
        ("targets is int32; it must be int64", (hidden, weight, targets.int()), {}),
        ("temperature is 0.0", (hidden, weight, targets), {"temperature": 0.0}),
    ):
        with pytest.raises(ValueError, match=message):
            fused_grpo_loss(*args, advantages, CU, **options)
    for message, args in (
        (r"advantages has shape \(3,\); it must be \(4\)", (advantages[:3], CU)),
        ("completion_cu is float32; it must be int32 or int64", (advantages, CU.float())),
        ("completion_cu is empty", (advantages, CU[:0])),
        ("completion_cu ends at 10; the call scores 11 tokens", (advantages, CU.clamp(max=10))),
    ):
        with pytest.raises(ValueError, match=message):
            grpo_loss(case["old_logps"], *args)
        with pytest.raises(ValueError, match=message):
            fused_grpo_loss(hidden, weight, targets, *args)
