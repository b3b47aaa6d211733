"""Attention of a packed batch, and of completions that are decoded token by token beside their prompts.

A pack takes one varlen call where the device has one, and SDPA over padded buckets elsewhere. For decoding a prompt's
keys and values are stored once for all its completions; each completion adds its own.
"""

import functools
import importlib.util
import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from boxgrpo.kernels import gather_keys

from .batch import PackedBatch

FLASH_PACKAGES = {"flash_attn_3": "flash_attn_interface", "flash_attn": "flash_attn"}  # by backend


def pick_backend(x: Tensor) -> str:
    """The fastest of flash_attn_3, flash_attn, varlen and sdpa that takes this tensor.

    Flash kernels take half precision on CUDA; FlashAttention-3, the package `flash_attn_interface`, is for Hopper.
    """
    device = x.device
    if device.type != "cuda" or x.dtype not in (torch.float16, torch.bfloat16):
        return "sdpa"
    return _flash_backend(device)


@functools.cache
def _flash_backend(device: torch.device) -> str:
    installed = importlib.util.find_spec
    if installed("flash_attn_interface") and torch.cuda.get_device_capability(device) == (9, 0):
        return "flash_attn_3"
    return "flash_attn" if installed("flash_attn") else "varlen"


@dataclass
class Bucket:
    """Segments computed together, padded on the right; outputs of padded queries are dropped."""

    rows: Tensor  # (B, Q) int64, rows of T
    keys: Tensor  # (B, K) int64, rows of T: the parent's, then the segment's own
    mask: Tensor | None  # (B, 1, Q, K) bool, aligned bottom-right; None: plain causal, for segments without a parent


@dataclass
class PackedAttention:
    """Causal attention of every segment over itself and, where it has one, its parent.

    Called as `attend(layer, q, k, v)` with q (T, heads, d) and k, v (T, kv_heads, d); returns (T, heads, d).
    """

    batch: PackedBatch
    backend: str = "auto"  # or one that `pick_backend` returns
    kv: list[tuple[Tensor, Tensor]] | None = None  # a list: each layer's k and v are appended, for a `DecodeCache`
    buckets: tuple[list[Bucket], Tensor] | None = None  # for SDPA, made at the first call

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kv is not None:
            self.kv.append((k, v))
        if not self.batch.spans:  # no rows, but every projection stays in the graph: its gradient is zero, not missing
            return q + (k + v).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        backend = pick_backend(q) if self.backend == "auto" else self.backend
        if backend != "sdpa":
            b = self.batch
            k, v = gather_keys(k, v, b.kv_index, b.cu_seqlens, b.cu_seqlens_k, b.max_q)
            return varlen(q, k, v, b.cu_seqlens, b.cu_seqlens_k, b.max_q, b.max_k, causal=True, backend=backend)
        if self.buckets is None:  # one SDPA call for each bucket of segments of similar lengths
            self.buckets = make_buckets(self.batch.spans, q.device)
        buckets, place = self.buckets
        mixed = []
        for b in buckets:
            queries, keys, values = (
                x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:]).transpose(1, 2)
                for x, rows in ((q, b.rows), (k, b.keys), (v, b.keys))
            )
            options = {"attn_mask": b.mask, "is_causal": b.mask is None, "enable_gqa": q.shape[1] != k.shape[1]}
            out = F.scaled_dot_product_attention(queries, keys, values, **options)  # (B, heads, Q, d)
            mixed.append(out.transpose(1, 2).reshape(-1, *q.shape[1:]))
        return torch.cat(mixed).index_select(0, place)


def make_buckets(spans, device, *, waste: float = 1.3) -> tuple[list[Bucket], Tensor]:
    """Buckets whose padded area is at most `waste` times the real one, and (T) each row's place in their outputs.

    A padded key comes after every real key of its segment: causality hides it from every real query.
    """
    order = sorted(spans, key=lambda s: (s[3] > 0, s[1] + s[3], s[1]))
    groups: list[list[tuple[int, int, int, int]]] = []
    area = 0  # of the current group, without padding
    for span in order:
        _, length, _, parent = span
        if groups:
            group = [*groups[-1], span]
            queries, keys = max(s[1] for s in group), max(s[1] + s[3] for s in group)
            fits = len(group) * queries * keys <= waste * (area + length * (length + parent))
            if fits and (parent > 0) == (group[0][3] > 0):
                groups[-1].append(span)
                area += length * (length + parent)
                continue
        groups.append([span])
        area = length * (length + parent)

    place = torch.empty(sum(s[1] for s in spans), dtype=torch.int64)
    buckets, filled = [], 0
    for group in groups:
        starts, q_lengths, parents, p_lengths = torch.tensor(group).T[..., None]  # each (B, 1)
        q = torch.arange(int(q_lengths.max()))
        k = torch.arange(int((q_lengths + p_lengths).max()))
        real = q < q_lengths  # (B, Q)
        rows = torch.where(real, starts + q, starts)
        keys = torch.where(k < p_lengths, parents + k, starts + k - p_lengths)
        keys = torch.where(k < p_lengths + q_lengths, keys, starts)
        mask = None
        if group[0][3]:
            mask = (k <= p_lengths[:, :, None] + q[:, None])[:, None].to(device)
        place[rows[real]] = filled + torch.arange(real.numel()).view_as(real)[real]
        filled += real.numel()
        buckets.append(Bucket(rows.to(device), keys.to(device), mask))
    return buckets, place.to(device)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, causal: bool, backend: str
) -> Tensor:
    """One flash call over ragged segments; causal is aligned bottom-right. (T, heads, d), (T_kv, kv_heads, d) x2."""
    if backend in FLASH_PACKAGES:
        attend = importlib.import_module(FLASH_PACKAGES[backend]).flash_attn_varlen_func
        lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
        out = attend(q, k, v, **lengths, causal=causal)
        return out[0] if isinstance(out, tuple) else out  # early FlashAttention-3 returns the log-sum-exp, too
    from torch.nn.attention.varlen import varlen_attn

    accepted = inspect.signature(varlen_attn).parameters
    options: dict = {}
    if "window_size" in accepted:
        options["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        options["is_causal"] = causal
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in accepted:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **options)


def partial_attention(q: Tensor, k: Tensor, v: Tensor, masked: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Attention to some of the keys, in a form that can be merged with attention to the others.

    Scores are fp32, as in flash attention: rounded to bf16 they would change the ratio of policy to sampler. On a GPU
    half-precision products accumulate in fp32 without a copy of k.

    Args:
        q: (a, b, r, d).
        k, v: (a, b, p, d).
        masked: bool, broadcast to (a, b, r, p): True for keys that are left out; None: no key is.

    Returns:
        (a, b, r, d) fp32, the values weighted by exp(score - top); (a, b, r, 1), the sum of these weights and top, the
        largest score.
    """
    if q.is_cuda and q.dtype != torch.float32:
        product = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
        scores = product.unflatten(0, q.shape[:2])
    else:
        scores = q.float() @ k.float().transpose(-1, -2)
    scores *= q.shape[-1] ** -0.5
    if masked is not None:
        scores.masked_fill_(masked, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return (weights.to(v.dtype) @ v).float(), weights.sum(-1, keepdim=True), top


class DecodeCache:
    """Keys and values of B prompts, each shared by its completions, and of up to C own tokens of n completions.

    Attention covers the own tokens so far, whose number the host reads: no two steps are alike.
    """

    static = False  # whether all steps launch the same kernels

    def __init__(self, prefill: PackedAttention, num_generations: int, max_new_tokens: int):
        cu_seqlens = prefill.batch.cu_seqlens
        self.prompt_lengths = torch.tensor([length for _, length, *_ in prefill.batch.spans])  # (B), without a wait
        prompts, lengths = len(self.prompt_lengths), self.prompt_lengths.tolist()
        self.owner = torch.arange(prompts).repeat_interleave(num_generations)  # (n), each completion's prompt
        self.group = num_generations  # the most completions of a prompt
        self.slots: Tensor | None = None  # (n), places in a grid of B x group, where that is not full
        self.at = torch.zeros(1, dtype=torch.int64, device=cu_seqlens.device)  # own tokens so far
        self.filled = 0  # the same, known to the host without a wait
        padding = torch.arange(max(lengths)) >= self.prompt_lengths[:, None]
        self.padding = padding[:, None, None].to(self.at.device)  # (B, 1, 1, P) bool
        self.prefix, self.own = [], []  # of each layer: keys and values (B, kv_heads, P, d); (n, kv_heads, C, d)
        while prefill.kv:
            pair = prefill.kv.pop(0)  # so that two copies of one layer exist at a time, never of all
            _, heads, d = pair[0].shape
            self.prefix.append(
                tuple(pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2).contiguous() for x in pair)
            )
            self.own.append(tuple(x.new_zeros(len(self.owner), heads, max_new_tokens, d) for x in pair))

    def advance(self) -> None:
        """Count the token whose keys and values all layers have added."""
        self.at += 1
        self.filled += 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one new token per completion, whose key and value are added to the cache.

        q (n, heads, d), k and v (n, kv_heads, d) -> (n, heads, d).
        """
        n, heads, d = q.shape
        q = q.view(n, k.shape[1], -1, d)  # (n, kv_heads, repeat, d)
        (own_k, own_v), at = self.own[layer], self.filled
        own_k[:, :, at], own_v[:, :, at] = k, v
        own, own_total, own_top = partial_attention(q, own_k[:, :, : at + 1], own_v[:, :, : at + 1], None)

        keys, values = self.prefix[layer]  # attended by one product for all completions of a prompt
        grid = q  # (B * group, kv_heads, repeat, d)
        if self.slots is not None:
            grid = q.new_zeros(len(keys) * self.group, *q.shape[1:]).index_copy_(0, self.slots, q)
        stacked = grid.unflatten(0, (-1, self.group)).transpose(1, 2).flatten(2, 3)  # (B, kv_heads, group * repeat, d)
        parts = partial_attention(stacked, keys, values, self.padding)
        parts = (x.unflatten(2, (self.group, -1)).transpose(1, 2).flatten(0, 1) for x in parts)
        prefix, prefix_total, prefix_top = (x if self.slots is None else x[self.slots] for x in parts)

        top = torch.maximum(prefix_top, own_top)
        of_prefix, of_own = (prefix_top - top).exp(), (own_top - top).exp()
        mixed = (of_prefix * prefix + of_own * own) / (of_prefix * prefix_total + of_own * own_total)
        return mixed.to(v.dtype).reshape(n, heads, d)

    def keep(self, kept: Tensor) -> None:
        """Continue with the completions `kept` (n') int64, ascending, on the CPU, and with their prompts."""
        device = self.at.device
        prompts, self.owner, counts = self.owner[kept].unique(return_inverse=True, return_counts=True)
        self.group = int(counts.max())
        place = torch.arange(len(kept)) - (counts.cumsum(0) - counts)[self.owner]  # among the prompt's own
        full = len(kept) == len(prompts) * self.group
        self.slots = None if full else (self.owner * self.group + place).to(device)
        self.prompt_lengths = self.prompt_lengths[prompts]
        longest = int(self.prompt_lengths.max())
        prompts, kept = prompts.to(device), kept.to(device)
        self.padding = self.padding[prompts, ..., :longest].contiguous()
        self.prefix = [tuple(x[prompts, :, :longest].contiguous() for x in pair) for pair in self.prefix]
        self.own = [tuple(x[kept] for x in pair) for pair in self.own]
