"""boxgrpo.kernels.dropin's Liger signatures against liger-kernel itself and the formulas in fp64."""

import functools

import pytest
import torch

from boxgrpo.kernels import dropin
from kernel_cases import DEVICE, LANE, assert_beside_peer, assert_refused, same_signature, token_formulas

liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")

B, L, V, H = 3, 5, 37, 6
TEMPERATURE = 0.7
FULL, FRACTIONS = torch.ones(B, L), torch.tensor([[1, 0.5, 1, 0.25, 1], [0.5, 0, 0.5, 1, 0], [0.25, 0.5, 0, 0, 0]])
GAMMA = {"vespo_k_pos": 0.5, "vespo_lambda_pos": 0.7, "vespo_k_neg": 1.0, "vespo_lambda_neg": 0.0}
ORDER = ("hidden", "weight", "ids", "mask", "advantages")  # of the arguments of LigerFusedLinearGRPOLoss
OPTIONS = {
    **{name: {"loss_type": name} for name in ("grpo", "bnpo", "dapo", "dr_grpo")},
    "cispo": {"loss_type": "cispo", "eps_high": 1.1},
    "no mask": {"completion_mask": None, "loss_type": "grpo"},
    "on-policy": {"old": None},
    "no reference": {"beta": 0.0, "ref": None},
    "delta": {"delta": 1.5, "loss_type": "grpo"},
    "ratio of tokens": {"vllm": (B, L), "loss_type": "grpo"},
    "ratio of completions": {"vllm": (B, 1), "loss_type": "cispo", "eps_high": 1.1},
    "ratio, flat": {"vllm": (B,), "loss_type": "bnpo"},
    "kl by ratio": {"use_bias_correction_kl": True, "loss_type": "grpo"},
    "items": {"num_items_in_batch": 29},
    "items, cispo": {"num_items_in_batch": torch.tensor(29), "loss_type": "cispo", "eps_high": 1.1},
    "sequence": {"importance_sampling_level": "sequence", "loss_type": "grpo", "eps_low": 0.05, "eps_high": 0.05},
    "sequence, all": {
        "importance_sampling_level": "sequence",
        "delta": 1.3,
        "vllm": (B, L),
        "use_bias_correction_kl": True,
    },
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.3},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "eps_low": 0.05, "completion_mask": FULL},
    "luspo of tokens": {"loss_type": "luspo", "eps_low": 1.5, "completion_mask": FULL},
    "vespo": {"loss_type": "vespo"},
    "vespo, ratio of tokens": {"loss_type": "vespo", "vllm": (B, L), "completion_mask": FULL, **GAMMA},
    "vespo, ratio of completions": {"loss_type": "vespo", "vllm": (B,), **GAMMA},
    "fractions": {"loss_type": "dr_grpo", "completion_mask": FRACTIONS},
    "fractions, averaged": {"loss_type": "grpo", "completion_mask": FRACTIONS},
    "delta within the clip": {"delta": 1.1, "eps_high": 0.4},
}


def make_case(options):
    """Tensors and options of one call; ratios from 0.5 to 2, so that either bound and delta are met."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, generator=g) for shape in ((B, L, H), (V, H), (V,)))
    logits = torch.cat((hidden @ weight.T, torch.randn(B, 1, V, generator=g)), 1)
    ids = torch.randint(V, (B, L), generator=g)
    logps = (logits[:, :-1] / TEMPERATURE).log_softmax(2).gather(2, ids[..., None])[..., 0]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [1, 1, 0, 0, 0]])
    options = {"beta": 0.04, "eps_low": 0.2, "eps_high": 0.25, "loss_type": "dapo", "completion_mask": mask} | options
    order = torch.randperm(B * L, generator=g).view(B, L)
    tensors = {
        "logits": logits,
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "ids": ids,
        "advantages": torch.tensor([1.3, -0.9, 0.4]),
        "mask": FULL if options["completion_mask"] is None else options["completion_mask"].float(),
        "old": logps + torch.linspace(-0.7, 0.7, B * L)[order],
        "ref": logps + 0.5 * torch.randn(B, L, generator=g),
        "vllm": 2 * torch.rand(options.pop("vllm", ()), generator=g),
        "upstream": torch.randn(B, L, generator=g),
    }
    for name in ("old", "ref"):
        tensors[name] = options.pop(name, tensors[name])
    tensors["vllm"] = tensors["vllm"] if tensors["vllm"].dim() else None
    tensors = {name: x if x is None else x.to(DEVICE) for name, x in tensors.items()}
    return tensors, {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


def dense(logps, tensors, options):
    """Loss, kl, clipped of each token and the reduced loss, as the papers write them, in logps' dtype."""
    tensors = {name: x if x is None else x.to(logps.dtype) for name, x in tensors.items()}
    mask, vllm, kind = tensors["mask"], tensors["vllm"], options["loss_type"]
    kept = mask.bool()
    rows = {"old_logps": tensors["old"], "ref_logps": tensors["ref"] if options["beta"] else None}
    rows["sampler_factor"] = vllm[:, None] if vllm is not None and vllm.dim() == 1 else vllm
    if kind == "vespo" and vllm is not None and vllm.dim() == 1:  # once, with the first token
        rows["sampler_factor"] = rows["sampler_factor"] ** (torch.arange(L, device=mask.device) == 0)
    temperatures = [options.get(f"sapo_temperature_{sign}", 1.0) for sign in ("pos", "neg")]
    gamma = [options.get(name, default) for name, default in zip(GAMMA, (2.0, 3.0, 3.0, 2.0), strict=True)]
    policy, kl, ratio, low, high = token_formulas(
        logps[kept],
        torch.arange(B, device=mask.device)[:, None].expand(B, L)[kept],
        tensors["advantages"],
        **{name: x if x is None else x.expand(B, L)[kept] for name, x in rows.items()},
        epsilon=options["eps_low"],
        epsilon_high=options["eps_high"],
        sapo_temperatures=temperatures,
        vespo_gamma=gamma,
        **{name: options[name] for name in ("delta", "loss_type", "importance_sampling_level") if name in options},
    )
    kl = kl * ratio if options.get("use_bias_correction_kl") else kl
    found = policy + options["beta"] * kl, kl, (low | high).to(logps.dtype)
    loss, kl, clipped = (torch.zeros_like(logps).masked_scatter(kept, x) * mask for x in found)
    if kind in ("grpo", "sapo"):
        return (loss, kl, clipped), (loss.sum(1) / mask.sum(1).clamp(min=1)).mean()
    if kind == "luspo":
        return (loss, kl, clipped), (loss * mask.sum(1, keepdim=True)).mean()
    count = {"dr_grpo": B * L, "bnpo": mask.sum()}.get(kind, options.get("num_items_in_batch", mask.sum()))
    return (loss, kl, clipped), loss.sum() / float(count)


def triton_values(function, tensors, options, reduce, *, inplace=False):
    """What `triton_grpo_loss` returns, and the gradient of its loss; and whether that was written over the logits."""
    logits = tensors["logits"].clone().requires_grad_() * 1
    rest = [tensors[name] for name in ("old", "ref", "ids", "advantages")]
    ratio = {"temperature": TEMPERATURE, "vllm_is_ratio": tensors["vllm"]}
    first, *found = function(logits, *rest, inplace=inplace, reduce=reduce, **ratio, **options)
    (gradient,) = torch.autograd.grad(first, logits, None if reduce else tensors["upstream"])
    found = found[0] if reduce else found
    return [first, *found, gradient], gradient.data_ptr() == logits.data_ptr()


# Where the gradient of Liger's Triton kernel is not that of its values: for A < 0 it is 0 from a delta within the clip
# to the clip; at the token level it reads luspo's upstream at the wrong stride; per token it leaves the weight out.
WRONG = {
    ("delta within the clip", False),
    ("delta within the clip", True),
    ("luspo of tokens", True),
    ("fractions", False),
    ("fractions, averaged", False),
}


@pytest.mark.parametrize(
    "peer, name, reduce",
    [
        *(("formulas", name, reduce) for name in OPTIONS for reduce in (False, True)),
        *(
            pytest.param("liger", name, reduce, marks=LANE)
            for name in OPTIONS
            for reduce in (False, True)
            if (name, reduce) not in WRONG
        ),
    ],
)
def test_triton_grpo_loss(peer, name, reduce):
    tensors, options = make_case(OPTIONS[name])

    def formulas(dtype):
        logits = tensors["logits"].to(dtype).requires_grad_()
        logps = (logits[:, :-1] / TEMPERATURE).log_softmax(2).gather(2, tensors["ids"][..., None])[..., 0]
        (loss, kl, clipped), total = dense(logps, tensors, options)
        if reduce:
            (gradient,) = torch.autograd.grad(total, logits)
            tokens = tensors["mask"].sum()
            values = [total, *([kl.sum() / tokens] if options["beta"] else []), clipped.sum() / tokens]
        else:
            (gradient,) = torch.autograd.grad(loss, logits, tensors["upstream"].to(dtype))
            values = [loss, kl if options["beta"] else None, clipped]
        return [*values, gradient]

    truth, fp32 = formulas(torch.float64), formulas(torch.float32)
    theirs = fp32
    if peer == "liger":  # its kernel, which a CPU runs in the interpreter
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        theirs, _ = triton_values(triton_grpo_loss, tensors, options, reduce)
    for inplace in (False, True):
        ours, overwritten = triton_values(dropin.triton_grpo_loss, tensors, options, reduce, inplace=inplace)
        assert overwritten == inplace and not any(x.requires_grad for x in ours[1:-1] if x is not None)
        assert_beside_peer(ours, theirs, truth, fp32)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "no mask"])
def test_fused_linear_grpo_loss(name, biased):
    """The fused loss, and token_logps where there is a bias, against Liger's module."""
    tensors, options = make_case(OPTIONS[name])
    if biased:
        tensors["old"] = None if tensors["old"] is None else tensors["old"] + 0.1

    def values(logits_of, dtype):
        inputs = [tensors[k].to(dtype).requires_grad_() for k in ("hidden", "weight", *(["bias"] if biased else []))]
        total, metrics = logits_of(*inputs)
        return [total, *metrics, *torch.autograd.grad(3 * total, inputs)]

    def formulas(hidden, weight, bias=0):
        logps = ((hidden @ weight.T + bias) / TEMPERATURE).log_softmax(2).gather(2, tensors["ids"][..., None])[..., 0]
        (_, kl, clipped), total = dense(logps, tensors, options)
        tokens = tensors["mask"].sum()
        return total, [*([kl.sum() / tokens] if options["beta"] else []), clipped.sum() / tokens]

    rest = dict(options)
    call = {"vllm_is_ratio": tensors["vllm"], "num_items_in_batch": rest.pop("num_items_in_batch", None)}
    mask, low, high = rest.pop("completion_mask"), rest.pop("eps_low"), rest.pop("eps_high")
    rest |= {"epsilon_low": low, "epsilon_high": high, "temperature": TEMPERATURE, "max_completion_length": L}

    def module(package):
        loss = package.LigerFusedLinearGRPOLoss(**rest, compiled=False, use_ref_model=tensors["ref"] is not None)
        order = tensors["ids"], mask, tensors["advantages"]
        return lambda hidden, weight, bias=None: loss(
            hidden, weight, *order, bias, tensors["ref"], tensors["old"], **call
        )

    assert_beside_peer(
        values(module(dropin), torch.float32),
        values(module(liger), torch.float32),
        values(formulas, torch.float64),
        values(formulas, torch.float32),
    )


@pytest.mark.parametrize("biased", [False, True])
def test_the_reference_is_scored_from_its_hidden_states(biased):
    tensors, _ = make_case({})
    g = torch.Generator().manual_seed(5)
    order = [tensors[name] for name in ORDER]
    shapes = ((B, L, H), (V, H), (V,))[: 2 + biased]
    ref = [torch.randn(shape, generator=g).to(DEVICE).requires_grad_() for shape in shapes]
    results = [
        package.LigerFusedLinearGRPOLoss(compiled=False)(*order, None, None, None, *ref) for package in (dropin, liger)
    ]
    torch.testing.assert_close(*results)
    assert results[0][1][0] and not results[0][0].requires_grad
    mixed = dropin.LigerFusedLinearGRPOLoss()(*order, None, None, None, ref[0].bfloat16(), *ref[1:])
    torch.testing.assert_close(mixed, results[0], rtol=0.05, atol=0.01)


def test_when_the_reference_is_unread():
    """Without a reference model, where the KL is 0 and has no gradient, and without a beta."""
    tensors, _ = make_case({})
    order = [*(tensors[name] for name in ORDER), None, torch.full_like(tensors["old"], torch.nan)]
    options = {"compiled": False, "use_ref_model": False}
    results = [package.LigerFusedLinearGRPOLoss(**options)(*order) for package in (dropin, liger)]
    torch.testing.assert_close(*results)
    loss, metrics = dropin.LigerFusedLinearGRPOLoss(beta=0.0)(*order)
    assert results[0][1][0] == 0 and loss.isfinite() and len(metrics) == 1


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo"])
@pytest.mark.parametrize("biased", [False, True])
def test_nothing_scored(loss_type, biased):
    """A loss of 0 that still has a gradient, of zeros."""
    tensors, _ = make_case({})
    hidden, mask = tensors["hidden"].requires_grad_(), torch.zeros_like(tensors["mask"])
    order = tensors["weight"], tensors["ids"], mask, tensors["advantages"]
    bias = tensors["bias"] if biased else None
    loss, metrics = dropin.LigerFusedLinearGRPOLoss(loss_type=loss_type)(hidden, *order, bias, tensors["ref"])
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss == 0 and not any(metrics) and not gradient.any()
    logits = tensors["logits"].requires_grad_()
    loss, metrics = dropin.triton_grpo_loss(
        logits, None, tensors["ref"], *order[1::2], mask, loss_type=loss_type, reduce=True, inplace=False
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and not any(metrics) and not gradient.any()


@pytest.mark.parametrize("items", [None, 40])
def test_the_denominator_of_several_ranks(items, monkeypatch):
    """dapo divides by the tokens of all ranks over their number, in Liger and here."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, **_: tensor.add_(7))
    tensors, _ = make_case({})
    order = [tensors[name] for name in ORDER]
    losses = [
        package.LigerFusedLinearGRPOLoss(compiled=False, beta=0.0, use_ref_model=False)(
            *order, old_per_token_logps=tensors["old"], num_items_in_batch=items
        )[0]
        for package in (dropin, liger)
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_is_not_scored_may_be_anything(level):
    """Padding may hold NaN, infinities and ids out of range: no loss and no gradient comes from it."""
    tensors, options = make_case({"loss_type": "grpo", "importance_sampling_level": level, "vllm": (B, L)})
    dead = tensors["mask"] == 0
    padded = {"old": torch.nan, "ref": torch.inf, "ids": -100, "vllm": torch.nan}
    padded = {name: tensors[name].masked_fill(dead, value) for name, value in padded.items()}
    padded["logits"] = tensors["logits"].clone()
    padded["logits"][:, :-1][dead], padded["logits"][:, -1] = torch.nan, torch.nan
    want, got = (triton_values(dropin.triton_grpo_loss, x, options, True)[0] for x in (tensors, tensors | padded))
    torch.testing.assert_close(got, want)


def test_signatures():
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    same_signature(dropin.triton_grpo_loss, triton_grpo_loss)
    for name in ("__init__", "forward"):
        modules = (dropin.LigerFusedLinearGRPOLoss, liger.LigerFusedLinearGRPOLoss)
        same_signature(*(getattr(module, name) for module in modules))
    theirs = functools.partial(LigerFusedLinearGRPOFunction.forward, None)  # without the context
    same_signature(dropin.liger_fused_linear_grpo, theirs)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["dr_grpo", "luspo"])
def test_case_20_a_mask_of_halves_counts_half(loss_type, level):
    """A mask of 0.5 halves the loss of `dr_grpo`; and `luspo` reads the padding, as Liger's module does."""
    tensors, _ = make_case({})
    fixed = {"loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": L, "compiled": False}
    results = []
    for mask in (tensors["mask"], tensors["mask"] / 2):
        for package in (dropin, liger):
            leaf = tensors["hidden"].clone().requires_grad_()
            order = leaf, tensors["weight"], tensors["ids"], mask, tensors["advantages"]
            loss, _ = package.LigerFusedLinearGRPOLoss(**fixed)(*order, None, tensors["ref"], tensors["old"])
            results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    for ours, theirs in (results[:2], results[2:]):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    if loss_type == "dr_grpo" and level == "token":
        torch.testing.assert_close(results[2][0], results[0][0] / 2)


def test_the_gradient_of_an_fp32_head_is_not_rounded():
    """With hidden states in bf16: it is that of the rounded inputs in fp32, as in Liger."""
    tensors, _ = make_case({})
    found = []
    for hidden, weight in (
        (tensors["hidden"].bfloat16(), tensors["weight"]),
        (tensors["hidden"].bfloat16().float(), tensors["weight"].bfloat16().float()),
    ):
        leaf = weight.clone().requires_grad_()
        order = hidden, leaf, *(tensors[name] for name in ORDER[2:]), None, tensors["ref"], tensors["old"]
        loss, _ = dropin.LigerFusedLinearGRPOLoss()(*order)
        found.append((loss, torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_the_function_and_the_module_are_one():
    """`liger_fused_linear_grpo` with its options by position; both references given: a warning, and the logps count."""
    tensors, _ = make_case({})
    order = [*(tensors[name] for name in ORDER), None, tensors["ref"], tensors["old"], tensors["hidden"]]
    module = dropin.LigerFusedLinearGRPOLoss(0.1, epsilon_low=0.3, loss_type="sapo", temperature=0.7)
    with pytest.warns(UserWarning, match="Using ref_per_token_logps"):
        want = module(*order, vllm_is_ratio=tensors["mask"])
    options = 0.1, 0.3, 0.2, "sapo", None, "token", 1.0, 1.05, 0.7
    with pytest.warns(UserWarning):
        got = dropin.liger_fused_linear_grpo(*order, None, None, *options, vllm_is_ratio=tensors["mask"])
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_what_is_refused():
    tensors, options = make_case({})

    def triton(**changes):
        own = {name: changes.pop(name) for name in [*changes] if name in tensors}
        return triton_values(dropin.triton_grpo_loss, tensors | own, options | changes, False)

    fused = dropin.LigerFusedLinearGRPOLoss
    order = [tensors[name] for name in ORDER]
    sequence, named = {"importance_sampling_level": "sequence"}, {"use_ref_model": False}
    refused = [
        (f"Sequence-level importance sampling is not supported for loss_type='{name}'. Use 'token'", call)
        for name, bound in (("sapo", 0.2), ("vespo", 0.2), ("cispo", 5.0))
        for call in (
            lambda name=name, bound=bound: triton(loss_type=name, eps_high=bound, **sequence),
            lambda name=name, bound=bound: fused(loss_type=name, epsilon_high=bound, **sequence, **named)(*order),
        )
    ]
    assert_refused(
        *refused,
        ("loss_type is 'ppo'", lambda: triton(loss_type="ppo")),
        ("sapo_temperatures are", lambda: fused(loss_type="sapo", sapo_temperature_neg=0.0)),
        ("importance_sampling_level is 'word'", lambda: triton(importance_sampling_level="word")),
        ("'cispo' has no unclipped ratio", lambda: fused(loss_type="cispo", delta=2.0)),
        ("delta is 0.0; the bound", lambda: fused(delta=0.0)),
        (r"logits has shape \(3, 5, 37\); it must be \(3, 6, any\)", lambda: triton(logits=tensors["logits"][:, :-1])),
        (r"old_logp has shape \(3, 4\)", lambda: triton(old=tensors["old"][:, :-1])),
        ("ref_logp is None and beta is 0.04", lambda: triton(ref=None)),
        (r"the mask has shape \(3, 4\)", lambda: triton(completion_mask=torch.ones(3, 4))),
        (r"vllm_is_ratio has shape \(5,\); it must be \(3, 5\), \(3, 1\)", lambda: triton(vllm=torch.ones(5))),
        ("max_completion_length is None; 'dr_grpo'", lambda: fused(loss_type="dr_grpo")),
        ("pass ref_per_token_logps or ref_input", lambda: fused()(*order)),
        ("ref_weight is None", lambda: fused()(*order, ref_input=tensors["hidden"])),
        ("epsilon is -1", lambda: fused(epsilon_low=-1, use_ref_model=False)(*order)),
        (r"_input has shape \(3, 4, 6\)", lambda: fused(use_ref_model=False)(tensors["hidden"][:, 1:], *order[1:])),
    )
