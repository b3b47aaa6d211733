"""Decoding by steps that all launch the same kernels, for a GPU: keys and values, and attention to them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from boxgrpo.kernels import merge_attention, rotate_into_cache

from .attention import PackedAttention, partial_attention, pick_backend


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
            if len(prompts) < len(self.lengths):
                parts = (x.split(self.lengths) for x in whole)
                self.prefix[layer] = tuple(torch.cat([part[i] for i in prompts.tolist()]) for part in parts)
            self.own[layer] = tuple(x[on_device] for x in own)
        self.lengths = [self.lengths[i] for i in prompts.tolist()]
        self._set_segments()
