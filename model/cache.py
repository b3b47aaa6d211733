"""Keys and values of completions that are decoded token by token beside their prompts, and attention to them.

A prompt's keys and values are stored once for all its completions; each completion adds its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from boxgrpo.kernels import merge_attention, rotate_into_cache

from .attention import PackedAttention, pick_backend


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


def varlen_part(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, filled: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of ragged segments to their keys, all of them or the first `filled`; the shapes alone set what runs.

    flash-attn's own varlen function has no `filled`, so torch's flash kernel runs, and for fp32 or on a CPU a padded
    stand-in.

    Args:
        q: (T, kv_heads, d); k, v: (T_kv, kv_heads, d).
        cu_q, cu_k: (S+1) int32; max_q, max_k: the most rows and keys of a segment.
        filled: (S) int32, at least 1.

    Returns:
        (T, kv_heads, d) and (kv_heads, T) fp32, the log-sum-exp of the scaled scores, as `merge_attention` takes them.
    """
    if pick_backend(q) != "sdpa":
        sizes = cu_q, cu_k, max_q, max_k
        out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *sizes, 0.0, False, False, seqused_k=filled)
        return out, lse
    row, slot, column = (torch.arange(n, device=q.device) for n in (len(q), max_q, max_k))
    rows, keys = ((cu[:-1, None] + x).clamp(max=n - 1) for cu, x, n in ((cu_q, slot, len(q)), (cu_k, column, len(k))))
    masked = column >= (cu_k.diff() if filled is None else filled)[:, None]  # (S, K)
    padded = (x[at].transpose(1, 2) for x, at in ((q, rows), (k, keys), (v, keys)))
    segment = torch.bucketize(row, cu_q, right=True) - 1
    place = segment * max_q + row - cu_q[segment]  # of each row of q among the padded ones
    parts = partial_attention(*padded, masked[:, None, None])
    mixed, total, top = (x.transpose(1, 2).flatten(0, 1)[place] for x in parts)
    return (mixed / total).to(v.dtype), (top + total.log()).squeeze(2).T


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

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one new token per completion, whose key and value are added to the cache.

        q (n, heads, d), k and v (n, kv_heads, d) -> (n, heads, d).
        """
        n, heads, d = q.shape
        q = q.view(n, k.shape[1], -1, d)  # (n, kv_heads, repeat, d)
        (own_k, own_v), at = self.own[layer], int(self.at)
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


class StaticCache:
    """As `DecodeCache`, with steps that all launch the same kernels, so that a CUDA graph can record one.

    A layer attends twice, to the prompts and to the own tokens so far, whose number is read from the device.
    `repeat` query heads read one key head.
    """

    static = True

    def __init__(self, prefill: PackedAttention, num_generations: int, max_new_tokens: int, *, repeat: int):
        self.lengths = [length for _, length, *_ in prefill.batch.spans]  # of the prompts
        self.owner = torch.arange(len(self.lengths)).repeat_interleave(num_generations)  # (n), each completion's prompt
        self.repeat, self.capacity = repeat, max_new_tokens
        self.at = torch.zeros(1, dtype=torch.int64, device=prefill.batch.cu_seqlens.device)  # own tokens so far
        self.prefix = prefill.kv  # of each layer: keys and values (T, kv_heads, d), prompt by prompt
        self.own = [  # (n, C, kv_heads, d)
            tuple(x.new_zeros(len(self.owner), max_new_tokens, *x.shape[1:]) for x in pair) for pair in self.prefix
        ]
        self._set_segments()

    def _set_segments(self) -> None:
        """What the rows of queries read: `repeat` rows of each completion, which stand by prompt."""
        n, rows = len(self.owner), self.owner.bincount() * self.repeat
        lengths = torch.tensor(self.lengths)
        whole = [F.pad(x.cumsum(0), (1, 0)) for x in (rows, lengths)]  # of all keys of the prompts
        own = [torch.arange(n + 1) * size for size in (self.repeat, self.capacity)]
        cu = [x.to(self.at.device, torch.int32, non_blocking=True) for x in (*whole, *own)]
        self.of_prompts = *cu[:2], int(rows.max()), max(self.lengths)
        self.filled = (self.at + 1).int().repeat(n)  # (n), own tokens with the new one
        self.of_own = *cu[2:], self.repeat, self.capacity, self.filled

    def advance(self) -> None:
        """Count the token whose keys and values all layers have added."""
        self.at += 1
        self.filled += 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention of one new token per completion, whose key, rotated here, and value are added to the cache.

        q (n, heads, d), k and v (n, kv_heads, d), cos and sin as `rotate` takes them -> (n, heads, d).
        """
        keys, values = self.own[layer]
        q = rotate_into_cache(q, k, v, cos, sin, keys, values, self.at)
        prompts = varlen_part(q, *self.prefix[layer], *self.of_prompts)
        own = varlen_part(q, keys.flatten(0, 1), values.flatten(0, 1), *self.of_own)
        return merge_attention(*prompts, *own, repeat=self.repeat)

    def keep(self, kept: Tensor) -> None:
        """As `DecodeCache.keep`."""
        prompts, self.owner = self.owner[kept].unique(return_inverse=True)
        on_device = kept.to(self.at.device)
        for layer, (whole, own) in enumerate(zip(self.prefix, self.own, strict=True)):
            parts = (x.split(self.lengths) for x in whole)
            self.prefix[layer] = tuple(torch.cat([part[i] for i in prompts.tolist()]) for part in parts)
            self.own[layer] = tuple(x[on_device] for x in own)
        self.lengths = [self.lengths[i] for i in prompts.tolist()]
        self._set_segments()
