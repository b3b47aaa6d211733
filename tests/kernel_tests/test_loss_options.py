"""What the GRPO losses take: half precision, loss scales, options and tensors, or refuse by name."""

import pytest
import torch

from boxgrpo.kernels import LossOptions, fused_grpo_loss, fused_grpo_loss_from_logits, grpo_loss, token_logps
from kernel_cases import OWN, assert_refused, eager, exact, gradients, make_case, seeded

N, V, H = 11, 13, 5
TEMPERATURE = 0.7
FUNCTIONS = ("logps", "head", "logits", "overwrite")


@pytest.fixture
def case():
    """fp64 on the CPU; ratios from 0.5 to 2, so that either bound and delta are met on both signs of the advantage."""
    g = seeded()
    hidden, weight = (torch.randn(n, H, dtype=torch.float64, generator=g) for n in (N, V))
    found = {name: x.cpu() for name, x in exact(make_case(N, V, torch.float32, TEMPERATURE)).items()}
    logps, _ = eager(hidden @ weight.T, found["targets"], TEMPERATURE)
    spread = torch.linspace(-0.7, 0.7, N, dtype=torch.float64)[torch.randperm(N, generator=g)]
    found |= {"old_logps": logps + spread, "ref_logps": logps + spread.roll(5)}
    return found | {"hidden": hidden, "weight": weight}


def own_options(case, **variant):
    return {name: case[name] for name in OWN} | variant


def run(function, case, options, hidden=None, weight=None):
    """The function's loss and stats from hidden states and head, whatever it takes."""
    hidden, weight = (case[k] if x is None else x for k, x in (("hidden", hidden), ("weight", weight)))
    targets, rest = case["targets"], (case["advantages"], case["completion_cu"])
    if function == "head":
        return fused_grpo_loss(hidden, weight, targets, *rest, temperature=TEMPERATURE, **options)
    if function == "logps":
        return grpo_loss(token_logps(hidden, weight, targets, temperature=TEMPERATURE), *rest, **options)
    options = {"temperature": TEMPERATURE, "overwrite_logits": function == "overwrite"} | options
    return fused_grpo_loss_from_logits(hidden @ weight.T, targets, *rest, **options)


@pytest.mark.parametrize("function", ["head", "logps"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_the_head_loses_only_the_rounding_of_inputs_and_gradients(case, function, dtype):
    """Also under autocast: loss and logps equal fp64's of the same rounded inputs, gradients up to one rounding."""

    def run_in(computed):
        leaves = [case[name].to(dtype).to(computed).requires_grad_() for name in ("hidden", "weight")]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=computed == dtype):
            loss, stats = run(function, case, own_options(case), *leaves)
        return loss, stats, torch.autograd.grad(loss, leaves)

    (loss, stats, got), (want, want_stats, truth) = run_in(dtype), run_in(torch.float64)
    assert all(x.dtype == torch.float32 for x in (loss, *stats)) and want.dtype == torch.float64
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.logps.double(), want_stats.logps, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, truth, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("function", ["head", "logits", "overwrite"])
def test_a_loss_scale_beyond_fp16_scales(case, function):
    """65536 is infinite in fp16; the gradients times it are not."""
    options = own_options(case, denominator=torch.tensor(1000.0))
    results = []
    for scale in (1, 65536):
        leaves = [case[name].half().requires_grad_() for name in ("hidden", "weight")]
        loss, _ = run(function, case, options, *leaves)
        results.append(torch.autograd.grad(scale * loss, leaves))
    for plain, scaled in zip(*results, strict=True):
        assert scaled.isfinite().all() and scaled.any()
        torch.testing.assert_close(scaled.float(), 65536 * plain.float(), rtol=2e-3, atol=0.01)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_rows_without_gradient_do_not_reach_the_product(case, level, monkeypatch):
    """A completion with advantage 0 and no KL is dropped: its rows of dhidden are 0, and never multiplied."""
    case["advantages"] = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **options: products.append(a.shape) or mm(a, b, **options))
    hidden = case["hidden"].requires_grad_()
    options = {"ref_logps": None, "importance_sampling_level": level, "epsilon": 1.0, "epsilon_high": 9.0}
    loss, _ = run("head", case, own_options(case, **options))
    dhidden, idle = gradients(loss, hidden), int(case["completion_cu"][3])
    assert not dhidden[:idle].any() and dhidden[idle:].any(1).all()
    assert [rows for rows, width in products if width == V] == [N - idle]


BAD_OPTIONS = {
    "loss_type is 'ppo'": {"loss_type": "ppo"},
    "importance_sampling_level is 'word'": {"importance_sampling_level": "word"},
    "Pass that product": {"loss_type": "dr_grpo"},
    "beta is -1": {"beta": -1.0},
    "epsilon is -1": {"epsilon": -1.0},
    "epsilon_high is -0.1": {"epsilon_high": -0.1},
    "delta is 0.0; the bound": {"delta": 0.0},
    "epsilon_high is None; 'cispo'": {"loss_type": "cispo"},
    "'cispo' has no unclipped ratio": {"loss_type": "cispo", "epsilon_high": 5.0, "delta": 9.0},
    "'sapo' has no unclipped ratio": {"loss_type": "sapo", "delta": 9.0},
    r"sapo_temperatures are \(1.0, 0.0\)": {"loss_type": "sapo", "sapo_temperatures": (1.0, 0.0)},
    "'vespo' weighs completions": {"loss_type": "vespo", "importance_sampling_level": "sequence"},
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
def test_options_in_one_object(case, function):
    """Its values are checked when it is made, its tensors by the call, which takes either it or keywords."""
    o = LossOptions(**own_options(case, delta=1.5, epsilon_high=0.3))
    wants = run(function, case, o._asdict()), run(function, case, {"options": o})
    torch.testing.assert_close(*wants, rtol=0, atol=0)
    assert LossOptions(epsilon=0.1).epsilon_high == 0.1
    assert_refused(
        ("options and beta are given", lambda: run(function, case, {"options": o, "beta": 0.1})),
        ("delta is -1", lambda: LossOptions(delta=-1)),
        ("ref_logps has shape", lambda: run(function, case, {"options": o._replace(ref_logps=torch.zeros(2))})),
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bad_options_are_refused(case, function):
    assert_refused(*((message, lambda o=options: run(function, case, o)) for message, options in BAD_OPTIONS.items()))


def test_bad_tensors_are_refused(case):
    hidden, weight, targets, advantages, cu = (
        case[k] for k in ("hidden", "weight", "targets", "advantages", "completion_cu")
    )

    def head(*changes, **options):
        return lambda: fused_grpo_loss(*changes, advantages, cu, **options)

    assert_refused(
        (r"hidden has shape \(11, 5, 1\); it must be \(any, any\)", head(hidden[..., None], weight, targets)),
        ("weight is float32; it must be float64", head(hidden, weight.float(), targets)),
        (r"weight has shape \(13, 4\); it must be \(any, 5\)", head(hidden, weight[:, :4], targets)),
        ("targets is int32; it must be int64", head(hidden, weight, targets.int())),
        ("temperature is 0.0", head(hidden, weight, targets, temperature=0.0)),
    )
    for message, *args in (
        (r"advantages has shape \(3,\); it must be \(5\)", advantages[:3], cu),
        ("completion_cu is float32; it must be int32 or int64", advantages, cu.float()),
        ("completion_cu is empty", advantages, cu[:0]),
        ("completion_cu ends at 10; the call scores 11 tokens", advantages, cu.clamp(max=10)),
    ):
        assert_refused((message, lambda args=args: grpo_loss(case["old_logps"], *args)))
        assert_refused((message, lambda args=args: fused_grpo_loss(hidden, weight, targets, *args)))
    expanded = torch.zeros(1, V, requires_grad=True).expand(N, V)
    overwritten = {"overwrite_logits": True}
    assert_refused(
        (
            r"overwrite_logits is set and the logits \(11, 13\) are expanded",
            lambda: fused_grpo_loss_from_logits(expanded, targets, advantages, cu, **overwritten),
        )
    )
