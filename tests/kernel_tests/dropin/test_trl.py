"""boxgrpo.kernels.dropin's TRL signatures against TRL itself and the formulas in fp64; a GRPOTrainer runs on them."""

import functools

import pytest
import torch

from boxgrpo.kernels import LossOptions, chunks, dropin, grpo_loss
from kernel_cases import assert_beside_peer, assert_refused, same_signature, seeded

trl = pytest.importorskip("trl", reason="trl is not installed")
utils = pytest.importorskip("trl.trainer.utils")

N, V, H = 11, 29, 7
NAMES = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
HEADS = {
    "plain": {},
    "scaled": {"scale": 0.5},
    "negative": {"scale": -1.5},
    "zero": {"scale": 0.0},
    "capped": {"softcap": 3.0},
    "biased": {"bias": True},
    "all": {"bias": True, "softcap": 3.0, "scale": 1.5},
}


def make_head(bias=False, **_):
    g = seeded()
    tensors = [torch.randn(shape, generator=g) for shape in ((N, H), (V, H), (V,))]
    return tensors if bias else [*tensors[:2], None], torch.randint(V, (N,), generator=g)


def dense(inputs, targets, softcap=None, scale=1.0, temperature=1.0, **_):
    hidden, weight, bias = inputs
    z = scale * (hidden @ weight.T + (0 if bias is None else bias))
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    logps = z.log_softmax(1)
    chosen = logps.gather(1, targets[:, None]).squeeze(1)
    entropy = -(logps.exp() * logps).sum(1)
    return chosen, entropy, logps.exp().square().sum(1).log(), z.mean(1), z.argmax(1) == targets


def with_gradients(call, inputs, dtype, entropy=True):
    """The outputs of call(inputs) and the gradients of an uneven sum of logps and entropy."""
    inputs = [None if x is None else x.to(dtype).requires_grad_() for x in inputs]
    outputs = call(inputs)
    upstream = torch.linspace(-1, 2, N, dtype=dtype).roll(3), torch.linspace(2, -1, N, dtype=dtype)
    upstream[0][5:9] = upstream[1][7:] = 0  # rows with one of both gradients, and two with none
    total = sum((out * given).sum() for out, given in zip(outputs[: 1 + entropy], upstream, strict=False))
    gradients = torch.autograd.grad(total, [x for x in inputs if x is not None])
    return [x.detach() for x in (*outputs, *gradients) if x is not None]


@pytest.mark.parametrize("chunk", [4, 1000])
@pytest.mark.parametrize("outputs", ["default", ("log_probs", "entropy"), ("log_probs",)])
@pytest.mark.parametrize("head", HEADS)
def test_chunked_log_prob_function(head, outputs, chunk, monkeypatch):
    monkeypatch.setattr(chunks, "chunk_rows", lambda *_, **__: chunk)
    options = {"temperature": 0.7, "softcap": None, "scale": 1.0} | HEADS[head]
    inputs, targets = make_head(**options)
    wanted = NAMES if outputs == "default" else outputs

    def call(function):
        rest = () if outputs == "default" else (outputs,)
        order = targets, options["temperature"], 8, options["softcap"], options["scale"], *rest
        found = {}

        def run(inputs):
            found["outputs"] = function(*inputs, *order)
            return found["outputs"]

        values = with_gradients(run, inputs, torch.float32, entropy="entropy" in wanted)
        assert [x is not None for x in found["outputs"]] == [name in wanted for name in NAMES]
        assert not any(x.requires_grad for x in found["outputs"][2:] if x is not None)
        return values

    def formulas(dtype):
        def run(inputs):
            found = dense(inputs, targets, **options)
            return [x for x, name in zip(found, NAMES, strict=True) if name in wanted]

        return with_gradients(run, inputs, dtype, entropy="entropy" in wanted)

    assert_beside_peer(
        call(dropin.ChunkedLogProbFunction.apply),
        call(utils._ChunkedLogProbFunction.apply),
        formulas(torch.float64),
        formulas(torch.float32),
    )


@pytest.mark.parametrize("head", ["plain", "all"])
def test_dtypes_are_reconciled_as_trl_does(head):
    """Under autocast both take its dtype; else the head takes that of the hidden states. Gradients keep their own."""
    inputs, targets = make_head(**HEADS[head])
    inputs = [None if x is None else x.requires_grad_() for x in inputs]
    given = [x for x in inputs if x is not None]

    def call(hidden, weight, *rest):
        logps, *_ = dropin.ChunkedLogProbFunction.apply(hidden, weight, *rest, targets, 1.0, 8, None, 1.0, ())
        return logps

    half = [x if x is None else x.detach().bfloat16() for x in inputs]
    want = call(*half[:2], inputs[2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = call(*inputs)
    mixed = call(half[0], *inputs[1:])
    for logps in (inside, mixed):
        assert torch.equal(logps, want) and logps.dtype == torch.float32
    assert [x.dtype for x in torch.autograd.grad(inside.sum(), given)] == [torch.float32] * len(given)


@pytest.mark.parametrize("head", ["plain", "biased"])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_case_23_int32_targets_and_an_fp32_head_that_autocast_does_not_round(head, hidden_dtype):
    """Gradients are fp32's of the rounded inputs, as near to fp64's as TRL's or nearer."""
    inputs, targets = make_head(**HEADS[head])
    inputs[0] = inputs[0].to(hidden_dtype)

    def gradients(function, dtype=None):
        leaves = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is None):
            logps = function(leaves)[0]
        return torch.autograd.grad((logps * torch.linspace(-1, 2, N)).sum(), leaves[:2])

    def call(package, ids):
        return lambda leaves: package._ChunkedLogProbFunction.apply(*leaves, ids, 0.7, 8)

    def rounded(leaves):
        product = [x + (x.detach().bfloat16().double() - x.detach()) for x in leaves[:2]]
        return dense([*product, leaves[2]], targets, temperature=0.7)

    ours, theirs = gradients(call(dropin, targets.int())), gradients(call(utils, targets))
    for mine, their, true, given in zip(ours, theirs, gradients(rounded, torch.float64), inputs, strict=False):
        assert mine.dtype == their.dtype == given.dtype
        torch.testing.assert_close(mine.double(), true, rtol=1e-2 if given.dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        assert (mine - true).abs().max() <= (their - true).abs().max()


@pytest.mark.parametrize("head", ["plain", "biased"])
def test_a_head_that_zero_3_takes_away_after_the_call(head):
    """DeepSpeed marks a partitioned parameter with ds_id, gathers it for the call, and empties it behind it."""
    inputs, targets = make_head(**HEADS[head])
    parameters = [torch.nn.Parameter(x.clone()) for x in inputs[1:] if x is not None]
    for parameter in parameters:
        parameter.ds_id = 0

    def gradient(empty):
        hidden = inputs[0].clone().requires_grad_()
        weight, bias = (*parameters, None)[:2]
        logps, *_ = dropin.ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 8)
        whole = [parameter.data for parameter in parameters]
        if empty:
            for parameter in parameters:
                parameter.data = torch.empty(0)
        (found,) = torch.autograd.grad(logps.sum(), hidden)
        for parameter, data in zip(parameters, whole, strict=True):
            parameter.data = data
        return found

    torch.testing.assert_close(gradient(empty=True), gradient(empty=False))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("several, entropy", [((), None), ((1,), None), ((3,), None), ((), True), ((), False)])
@pytest.mark.parametrize("shape", [(N,), (2, N), (2, 3, 4)])
def test_selective_log_softmax(shape, several, entropy, masked):
    """Without the entropy (None), or with it, differentiable or detached."""
    g = seeded()
    logits, index = torch.randn(*shape, V, generator=g), torch.randint(V, (*shape, *several), generator=g)
    mask = torch.rand(index.shape, generator=g) < 0.6 if masked else None

    def values(call, dtype):
        leaf = logits.to(dtype).requires_grad_()
        logps, *entropies = call(leaf)
        assert [x.requires_grad for x in entropies] == ([] if entropy is None else [entropy])
        (gradient,) = torch.autograd.grad((logps * logps.detach()).sum() + 2 * sum(x.sum() for x in entropies), leaf)
        return [logps.detach(), *(x.detach() for x in entropies), gradient]

    def of(package):
        if entropy is None:
            return lambda leaf: [package.selective_log_softmax(leaf, index, 0.7, mask)]
        return lambda leaf: package.selective_log_softmax_and_entropy(leaf, index, entropy, 0.7, mask)

    def formulas(leaf):
        logps = (leaf / 0.7).log_softmax(-1)
        nats = -(logps.exp() * logps).sum(-1)
        kept = 1 if mask is None else mask.to(leaf.dtype)
        logps = logps.gather(-1, index if several else index[..., None]).view(index.shape) * kept
        return [logps] if entropy is None else [logps, (nats if entropy else nats.detach()) * kept]

    ours, theirs = (values(of(package), torch.float32) for package in (dropin, utils))
    assert_beside_peer(ours, theirs, values(formulas, torch.float64), values(formulas, torch.float32))


@pytest.mark.parametrize("several", [(), (2,)])
def test_a_masked_row_may_hold_anything(several):
    """Its logits may be NaN and its id -100, as TRL's kernel has it: result and gradient are 0."""
    g = seeded()
    logits, index = torch.randn(3, 4, V, generator=g), torch.randint(V, (3, 4, *several), generator=g)
    mask = torch.ones_like(index)
    logits[1, 2], index[1, 2], mask[1, 2] = torch.nan, -100, 0
    logits.requires_grad_()
    logps, entropy = dropin.selective_log_softmax_and_entropy(logits, index, row_mask=mask)
    assert not logps[1, 2].any() and entropy[1, 2] == 0
    (gradient,) = torch.autograd.grad(logps.sum() + entropy.sum(), logits)
    assert gradient.isfinite().all() and not gradient[1, 2].any()


def test_results_of_half_precision_are_fp32():
    """As of TRL's Triton kernel. A logit of -inf is a probability of 0, also among several ids."""
    logits = torch.randn(4, V, dtype=torch.bfloat16)
    logits[:, 3] = -torch.inf
    index = torch.tensor([[0, 3]] * 4)
    logps = dropin.selective_log_softmax(logits, index, 0.7)
    want = (logits.double() / 0.7).log_softmax(1).gather(1, index)
    torch.testing.assert_close(logps, want.float())
    assert dropin.selective_log_softmax(logits.requires_grad_(), index[:, 0].int()).dtype == torch.float32


def test_the_weight_of_vespo_is_trls():
    """From log ratios beyond every bound, on both signs of the advantage, with and without a sampler's ratio."""
    g, gamma = seeded(), {"k_pos": 0.5, "lambda_pos": 0.0, "k_neg": 1.0, "lambda_neg": 0.7}
    log_ratio, sampler = 12 * torch.randn(9, 4, generator=g), torch.rand(9, 4, generator=g) * (torch.arange(4) > 0)
    advantages, mask = torch.linspace(-1, 1, 9), torch.rand(9, 4, generator=g) < 0.8
    for factor in (None, sampler.masked_fill(~mask, 1)):
        want = trl.GRPOTrainer.get_gamma_weights(advantages[:, None], log_ratio, mask.float(), factor, **gamma)
        kept = {"old_logps": -log_ratio[mask], "sampler_factor": None if factor is None else factor[mask]}
        cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        logps = torch.zeros(int(cu[-1]), requires_grad=True)
        options = LossOptions(**kept, beta=0.0, loss_type="vespo", vespo_gamma=(*gamma.values(),))
        (gradient,) = torch.autograd.grad(grpo_loss(logps, advantages, cu, options=options)[0], logps)
        torch.testing.assert_close(-gradient * len(logps), (want * advantages[:, None]).expand(9, 4)[mask])


def test_signatures():
    theirs = functools.partial(utils._ChunkedLogProbFunction.forward, None)  # without the context
    same_signature(dropin._ChunkedLogProbFunction.apply, theirs)
    for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):
        same_signature(*(getattr(package, name) for package in (dropin, utils)))


def test_what_is_refused():
    (hidden, weight, bias), targets = make_head(bias=True)
    head, select = dropin.ChunkedLogProbFunction.apply, dropin.selective_log_softmax
    logits, index = torch.randn(3, 4, V), torch.zeros(3, 4, dtype=torch.int64)
    named = None, 1.0, ("logits",)
    assert_refused(
        ("outputs holds 'logits'; it may hold", lambda: head(hidden, weight, None, targets, 1.0, 8, *named)),
        ("temperature is 0", lambda: head(hidden, weight, None, targets, 0, 8)),
        ("temperature is 0", lambda: head(hidden, weight, bias, targets, 0, 8)),
        ("the soft cap of the logits is 0", lambda: head(hidden, weight, None, targets, 1.0, 8, 0.0)),
        (r"bias has shape \(28,\); it must be \(29\)", lambda: head(hidden, weight, bias[1:], targets, 1.0, 8)),
        (r"weight has shape \(29, 7\); it must be", lambda: head(hidden[:, 1:], weight, bias, targets, 1.0, 8)),
        (r"targets has shape \(10,\)", lambda: head(hidden, weight, bias, targets[1:], 1.0, 8)),
        (r"index has shape \(3, 3\); it must be \(3, 4\)", lambda: select(logits, index[:, 1:])),
        (r"row_mask has shape \(3, 3\); it must be", lambda: select(logits, index, row_mask=index[:, 1:])),
        ("temperature is -1", lambda: select(logits, index, -1)),
    )


class Ours:
    """Counts our calls; with `sign` -1 the values are ours and their gradients are broken."""

    def __init__(self, sign=1):
        self.calls, self.sign = 0, sign

    def apply(self, *args):
        self.calls += 1
        logps, *rest = dropin.ChunkedLogProbFunction.apply(*args)
        return logps.detach() + self.sign * (logps - logps.detach()), *rest


def test_grpo_trainer_runs_on_ours(initial, tmp_path):
    """With images: losses, gradient norms, KL and entropy are its own; with our gradient broken they move."""
    from datasets import Dataset
    from PIL import Image
    from serve_images_only import ImagesOnly
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(initial)
    processor = ImagesOnly(Qwen2VLImageProcessorPil.from_pretrained(initial), tokenizer, tokenizer.chat_template)
    images = [Image.new("RGB", (56, 56), color) for color in ("red", "blue", "green", "white")]
    prompt = [{"role": "user", "content": "Where is it?"}]
    options = trl.GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        num_iterations=2,  # the second step's ratios are not 1
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        beta=0.04,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )

    def train(function):
        """(3, 4): what three steps log."""
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utils, "_ChunkedLogProbFunction", function)
            trainer = trl.GRPOTrainer(
                str(initial),
                lambda completions, **_: [float(len(completion[0]["content"])) for completion in completions],
                options,
                train_dataset=Dataset.from_list([{"prompt": prompt, "image": image} for image in images]),
                processing_class=processor,
            )
            trainer.model.model.visual.register_forward_hook(lambda *_: seen.append(1))
            trainer.train()
        assert seen
        names = ("loss", "grad_norm", "kl", "entropy")
        return torch.tensor([[step[name] for name in names] for step in trainer.state.log_history if "loss" in step])

    ours, broken = Ours(), Ours(sign=-1)
    want, got, moved = train(utils._ChunkedLogProbFunction), train(ours), train(broken)
    assert want.shape == (3, 4) and ours.calls > 0 and broken.calls > 0
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(moved[0, 2:], got[0, 2:])
    assert (moved - want)[1:, 0].abs().max() > 0.05, (moved, want)
