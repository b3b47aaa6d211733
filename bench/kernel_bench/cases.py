"""The cases of the kernel benchmark: each op on inputs of a shape, by our functions and by their usual alternatives.

A case makes its inputs anew for a seed and returns, by name, callables without arguments that run forward and backward
and return their results. Peers that are not installed, or do not run on the device, are left out.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from boxgrpo.bench.kernel_bench.decode_ops import decode_ops
from boxgrpo.bench.kernel_bench.host import host_calls
from boxgrpo.bench.kernel_bench.vision_ops import vision_ops
from boxgrpo.bench.publish.tables import sizes
from boxgrpo.kernels import (
    fused_grpo_loss,
    fused_grpo_loss_from_logits,
    group_advantages,
    grpo_loss,
    sample_tokens,
    token_logps,
    token_logps_from_logits,
)

COMPLETION, GROUP = 256, 8  # tokens in a completion, completions of a prompt
BETA, EPSILON = 0.04, 0.2
QWEN_2B, QWEN_7B = 151_936, 152_064  # rows of the head
TOKENS = 151_657  # that the tokenizer has
TINY = {"N": 16, "V": 160, "H": 8, "n": 4, "B": 3, "G": 4, "P": 5, "W": 8, "calls": 2}
TINY |= {"heads": 4, "kv": 2, "d": 8, "C": 3, "I": 20, "copies": 2, "sets": 3}  # of a layer that decodes


@dataclass(frozen=True)
class Case:
    """`bytes_floor` and `flops_floor`: the least that the op must move and compute, forward and backward.

    Element-wise work counts as a few FLOP, an exponential as one: it decides no floor, but places a roofline's points.
    """

    op: str
    shape: dict[str, int]
    dtype: torch.dtype
    bytes_floor: float
    flops_floor: float
    make: Callable[["Case", torch.device, int], dict[str, Callable[[], object]]] = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.op} {sizes(self.shape)} {str(self.dtype).removeprefix('torch.')}"

    def tiny(self) -> "Case":
        """The same of a small size; what forbids the vocabulary's last tokens has the whole vocabulary."""
        kept = {"V": QWEN_2B} if self.op == "sample_tokens" else {}
        shape = {key: (TINY | kept)[key] for key in self.shape}
        return replace(self, shape=shape, bytes_floor=1.0, flops_floor=1.0)


def choose(every: Sequence, only: str | None) -> list:
    """The cases whose name holds the regular expression `only`, all for None. Raises ValueError where none does."""
    try:
        re.compile(only or "")
    except re.error as error:
        raise ValueError(f"only is {only!r}; it must be a regular expression ({error}). Correct --only.") from error
    if found := [case for case in every if only is None or re.search(only, case.name)]:
        return found
    raise ValueError(f"only is {only!r}, which no case's name holds; there are {'; '.join(c.name for c in every)}.")


def cases(device: torch.device) -> Iterator[Case]:
    """Steps of 8, 32 and 128 completions at the 2B's and 7B's sizes on a GPU; on a CPU what two cores can run.

    The operations of decode.py and vision.py are a GPU's alone: a CPU runs their twins or none.
    """
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    for n in (2048, 8192, 32768) if gpu else (512,):
        shape, logits = {"N": n, "V": QWEN_2B}, n * QWEN_2B * dtype.itemsize
        flop = 7.0 * n * QWEN_2B  # largest, difference, exponential, sum; difference, exponential, product
        yield Case("fused_grpo_loss_from_logits", shape, dtype, 2 * logits, flop, _loss_from_logits)
        yield Case("token_logps_from_logits", shape, dtype, 3 * logits, flop, _logps_from_logits)
        if n <= 8192:
            by_sequence = partial(_loss_from_logits, level="sequence")
            yield Case("fused_grpo_loss_from_logits, sequence level", shape, dtype, 3 * logits, flop, by_sequence)
    heads = [(n, QWEN_2B, 1536) for n in (2048, 8192, 32768)] + [(n, QWEN_7B, 3584) for n in (2048, 8192, 32768)]
    for n, vocabulary, width in heads if gpu else [(512, QWEN_2B, 256)]:
        shape, product = {"N": n, "V": vocabulary, "H": width}, 2.0 * n * vocabulary * width
        once = (n + vocabulary) * width * dtype.itemsize  # hidden and weight; their gradients are as large
        yield Case("fused_grpo_loss", shape, dtype, 2 * once, 3 * product, _loss_from_hidden)
        # Ours computes a fourth product, and so holds no logits.
        yield Case("token_logps", shape, dtype, 2 * once, 3 * product, _logps_from_hidden)
        if n <= 8192:
            frozen = partial(_loss_from_hidden, frozen=True)
            least = once + n * width * dtype.itemsize
            yield Case("fused_grpo_loss, frozen head", shape, dtype, least, 2 * product, frozen)
    for n in (8192, 262_144):  # three logps read, a gradient written; ratio and KL, clipped, and their slopes
        yield Case("grpo_loss", {"N": n}, torch.float32, 4 * 4 * n, 20.0 * n, _loss_from_logps)
    for n in (128, 1024) if gpu else (128,):
        flop = 6.0 * n * QWEN_2B  # largest, difference, exponential, sum; noise added, largest
        yield Case("sample_tokens", {"n": n, "V": QWEN_2B}, dtype, n * QWEN_2B * dtype.itemsize, flop, _samples)
    for groups in (16, 1024):
        moved = 4 * (3 * groups * GROUP + 2 * groups)
        flop = 6.0 * groups * GROUP  # two sums; difference, its square, their sum; quotient
        yield Case("group_advantages", {"B": groups, "G": GROUP}, torch.float32, moved, flop, _advantages)
    yield from (Case(*fields) for fields in host_calls())
    if gpu:
        others = *decode_ops(128, dtype), *vision_ops(32_768, dtype)  # patches of four prompts
        yield from (Case(*fields) for fields in others)
        # Of a layer's keys and values, for one group of the 7B with four images.
        shape = {"P": 2198, "C": COMPLETION, "G": GROUP, "W": 512}
        shared, own = 2198 * GROUP * 512, (2198 + COMPLETION * GROUP) * 512
        yield Case("sum_key_gradients", shape, dtype, 2 * (shared + 2 * own) * 2, 2.0 * shared, _key_gradients)


class Rollout:
    """Targets, and the loss's arguments for each token and completion."""

    def __init__(self, case: Case, device: torch.device, seed: int, level: str = "token"):
        n, vocabulary = case.shape["N"], case.shape.get("V", QWEN_2B)
        g = torch.Generator(device).manual_seed(seed)
        self.length = min(COMPLETION, n)
        self.completions = n // self.length
        self.targets = torch.randint(vocabulary, (n,), device=device, generator=g)
        self.advantages = torch.randn(self.completions, device=device, generator=g)
        self.offsets = torch.arange(0, n + 1, self.length, device=device, dtype=torch.int32)
        # Near the logps of logits that are standard normal, so that ratios are near 1.
        expected = -torch.tensor(vocabulary, dtype=torch.float32).log() - 0.5
        self.old, self.ref = expected.item() + 0.1 * torch.randn(2, n, device=device, generator=g)
        self.upstream, self.level = torch.linspace(-1, 1, n, device=device), level
        self.options = {"old_logps": self.old, "ref_logps": self.ref, "beta": BETA, "epsilon": EPSILON}
        self.options["importance_sampling_level"] = level

    def by_completion(self, x: Tensor) -> Tensor:
        return x.view(self.completions, self.length)

    def weighted_sum(self, logps: Tensor) -> Tensor:
        """A scalar whose gradient is another one for each token."""
        return (logps * self.upstream).sum()

    def eager_logps(self, logits: Tensor) -> Tensor:
        return logits.float().log_softmax(1).gather(1, self.targets[:, None]).squeeze(1)

    def eager_loss(self, logps: Tensor) -> Tensor:
        """GRPO as a user writes it: the clipped ratio with k3's KL, mean over the means of completions."""
        log_ratio, advantages = logps - self.old, self.advantages.repeat_interleave(self.length)
        if self.level == "sequence":
            log_ratio = self.by_completion(log_ratio).mean(1).repeat_interleave(self.length)
        ratio = log_ratio.exp()
        policy = -torch.minimum(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages)
        kl = (self.ref - logps).exp() - (self.ref - logps) - 1
        return self.by_completion(policy + BETA * kl).mean()


def _trained(run: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of the scalar `run(*leaves)`; a frozen leaf gets no gradient."""
    trained = [leaf for leaf in leaves if leaf.requires_grad]

    def step() -> tuple[Tensor, ...]:
        loss = run(*leaves)
        return loss.detach(), *torch.autograd.grad(loss, trained)

    return step


def _sides(ours: Callable, eager: Callable, *leaves: Tensor, **peers: Callable | None):
    """Forward and backward by ours, eager, torch.compile and the peers that are here.

    torch.compile is for this shape alone: at a second shape Dynamo would compile for all shapes.
    """
    runs = {"boxgrpo": ours, "eager": eager, "compile": torch.compile(eager, dynamic=False)} | peers
    return {name: _trained(run, *leaves) for name, run in runs.items() if run}


def _loss_from_logits(case: Case, device, seed: int, level: str = "token"):
    r, logits = Rollout(case, device, seed, level), _normal(device, seed, *case.shape.values(), dtype=case.dtype)

    def ours(z, **options):
        return fused_grpo_loss_from_logits(z, r.targets, r.advantages, r.offsets, **r.options, **options)[0]

    body = logits.detach().clone().requires_grad_()  # after the first run it holds gradients, which take as long

    def overwriting() -> tuple[Tensor, ...]:
        loss = ours(body[:], overwrite_logits=True)
        return loss.detach(), *torch.autograd.grad(loss, [body])

    found = _sides(ours, lambda z: r.eager_loss(r.eager_logps(z)), logits) | {"boxgrpo, overwriting": overwriting}
    if device.type == "cuda" and (liger := module_named("liger_kernel.transformers.grpo_loss")):
        # Its logits are (B, L + 1, V) with an unread last row: the same number of rows that count.
        room = _normal(device, seed, r.completions, r.length + 1, case.shape["V"], dtype=case.dtype)
        old, ref, ids = (r.by_completion(x) for x in (r.old, r.ref, r.targets))

        def theirs(z):
            arguments = z, old, ref, ids, r.advantages, None, 1.0, BETA, EPSILON, EPSILON, False, "grpo"
            return liger.triton_grpo_loss(*arguments, importance_sampling_level=level, reduce=True)[0]

        found["liger"] = _trained(theirs, room)
    return found


def _logps_from_logits(case: Case, device, seed: int):
    r, logits = Rollout(case, device, seed), _normal(device, seed, *case.shape.values(), dtype=case.dtype)
    trl = module_named("trl.trainer.utils") if device.type == "cuda" else None
    return _sides(
        lambda z: r.weighted_sum(token_logps_from_logits(z, r.targets)),
        lambda z: r.weighted_sum(r.eager_logps(z)),
        logits,
        trl=trl and (lambda z: r.weighted_sum(trl.selective_log_softmax(z, r.targets))),
    )


def _loss_from_logps(case: Case, device, seed: int):
    r = Rollout(case, device, seed)
    logps = (r.old + 0.1 * _normal(device, seed, case.shape["N"], dtype=case.dtype)).detach().requires_grad_()
    return _sides(lambda x: grpo_loss(x, r.advantages, r.offsets, **r.options)[0], r.eager_loss, logps)


def _loss_from_hidden(case: Case, device, seed: int, frozen: bool = False):
    r, (hidden, weight) = Rollout(case, device, seed), _head(case, device, seed)
    trl_logps, liger = _trl_logps(r.targets), module_named("liger_kernel.chunked_loss")
    module = liger and liger.LigerFusedLinearGRPOLoss(
        beta=BETA,
        epsilon_low=EPSILON,
        epsilon_high=EPSILON,
        loss_type="grpo",
        compiled=device.type == "cuda",
        use_ref_model=True,
    )
    old, ref, ids = (r.by_completion(x) for x in (r.old, r.ref, r.targets))

    def through_liger(h, w):
        rows, mask = h.view(r.completions, r.length, -1), torch.ones_like(ids)
        return module(rows, w, ids, mask, r.advantages, ref_per_token_logps=ref, old_per_token_logps=old)[0]

    return _sides(
        lambda h, w: fused_grpo_loss(h, w, r.targets, r.advantages, r.offsets, **r.options)[0],
        lambda h, w: r.eager_loss(r.eager_logps(h @ w.T)),
        hidden,
        weight.requires_grad_(not frozen),
        trl=trl_logps and (lambda h, w: r.eager_loss(trl_logps(h, w))),
        liger=module and through_liger,
    )


def _logps_from_hidden(case: Case, device, seed: int):
    r = Rollout(case, device, seed)
    trl_logps = _trl_logps(r.targets)
    return _sides(
        lambda h, w: r.weighted_sum(token_logps(h, w, r.targets)),
        lambda h, w: r.weighted_sum(r.eager_logps(h @ w.T)),
        *_head(case, device, seed),
        trl=trl_logps and (lambda h, w: r.weighted_sum(trl_logps(h, w))),
    )


def _trl_logps(targets: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """TRL's log-probabilities of the targets from hidden states and the head's weight."""
    if not (trl := module_named("trl.trainer.utils")):
        return None
    function, size = trl._ChunkedLogProbFunction, trl._CHUNKED_LOGPROB_CHUNK_SIZE
    return lambda h, w: function.apply(h, w, None, targets, 1.0, size, None, 1.0, ("log_probs",))[0]


def _samples(case: Case, device, seed: int):
    logits = _normal(device, seed, case.shape["n"], case.shape["V"], dtype=case.dtype).detach()
    rows = torch.arange(case.shape["n"], device=device)
    own = {"prompt_ids": rows // GROUP, "completion_ids": rows % GROUP, "positions": rows * 0}
    # As a rollout does: 14 special tokens, and the head's rows beyond the last token.
    forbidden = torch.arange(TOKENS - 14, case.shape["V"], device=device)

    def eager():
        distribution = logits.float().log_softmax(1)
        tokens = torch.multinomial(distribution.exp().index_fill(1, forbidden, 0), 1)
        return tokens, distribution.gather(1, tokens)

    return {
        "boxgrpo": lambda: sample_tokens(logits, seed=seed, forbidden=forbidden, **own),
        "one read": lambda: logits.amax(1),
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }


def _advantages(case: Case, device, seed: int):
    g = torch.Generator(device).manual_seed(seed)
    accuracy = torch.rand(case.shape["B"], case.shape["G"], device=device, generator=g)
    rewards = 1 + accuracy

    def eager():
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        miou = accuracy.mean(1)
        return advantages, (1 - miou).exp(), miou

    return {
        "boxgrpo": lambda: group_advantages(rewards, accuracy),
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }


def _key_gradients(case: Case, device, seed: int):
    prompt, length, group, width = case.shape.values()
    rows = prompt + group * length
    own, *completions = torch.arange(rows, device=device).split([prompt] + group * [length])
    index = torch.cat([own, *(part for completion in completions for part in (own, completion))])
    read = [_normal(device, seed + i, len(index), 1, width, dtype=case.dtype).detach() for i in range(2)]
    lengths = torch.tensor([[0, prompt] + group * [length], [0, prompt] + group * [prompt + length]], device=device)

    def eager():  # as indexing's backward
        return [x.new_zeros(rows, 1, width).index_add_(0, index, x) for x in read]

    arguments = *read, *lengths.cumsum(1).int(), rows, prompt, device.type == "cuda"
    return {
        "boxgrpo": lambda: torch.ops.boxgrpo.sum_key_gradients(*arguments),
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }


def _normal(device, seed: int, *shape: int, dtype) -> Tensor:
    g = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, dtype=dtype, generator=g).requires_grad_()


def _head(case: Case, device, seed: int) -> tuple[Tensor, Tensor]:
    """Hidden states and a head whose logits are standard normal."""
    width = case.shape["H"]
    hidden = _normal(device, seed, case.shape["N"], width, dtype=case.dtype)
    weight = _normal(device, seed + 1, case.shape["V"], width, dtype=case.dtype).detach().mul_(width**-0.5)
    return hidden, weight.requires_grad_()


def module_named(name: str):
    """The imported peer, or None where it is not installed."""
    try:
        return __import__(name, fromlist=["_"])
    except ImportError:
        return None
