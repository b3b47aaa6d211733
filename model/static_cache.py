"""Decoding by steps that all launch the same kernels, for a GPU: keys and values, and attention to them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from boxgrpo.kernels import merge_attention, rotate_into_cache

from .attention import PackedAttention, partial_attention, pick_backend
from .batch import to_device

# Blocks of flash attention that the 132 multiprocessors of an H100 or H200 hold at once, two each.
BLOCKS = 264
PART_KEYS = 256  # of a prompt that is worth a block of its own


def count_parts(lengths: list[int], *, kv_heads: int) -> int:
    """Parts of each prompt that flash attention reads in blocks of their own; none of them is empty."""
    return max(1, min(BLOCKS // (len(lengths) * kv_heads), max(lengths) // PART_KEYS, *lengths))


class Segments(NamedTuple):
    """Rows of queries, segment by segment, and the keys that each segment reads, S of them."""

    cu_q: Tensor  # (S+1) int32, offsets of the rows
    starts: Tensor  # (S+1) int32, of the keys; the last one has no meaning
    filled: Tensor  # (S) int32, the number of keys: at least 1
    max_q: int  # the most rows and keys of a segment
    max_k: int


def varlen_part(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Attention of segments to their keys, whose number is read from the device: the shapes alone set what runs.

    Not every version of flash-attn reads that number (`seqused_k`), so torch's flash kernel runs, which uses of the
    keys' offsets the starts; for fp32 or on a CPU a padded stand-in.

    Args:
        q: (T, kv_heads, d); k, v: (T_kv, kv_heads, d).

    Returns:
        (T, kv_heads, d) and (kv_heads, T) fp32, the log-sum-exp of the scaled scores, as `merge_attention` takes them.
    """
    cu_q, starts, filled, max_q, max_k = segments
    if pick_backend(q) != "sdpa":
        sizes = cu_q, starts, max_q, max_k
        out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *sizes, 0.0, False, False, seqused_k=filled)
        return out, lse
    row, slot, column = (torch.arange(n, device=q.device) for n in (len(q), max_q, max_k))
    rows, keys = ((x[:-1, None] + i).clamp(max=n - 1) for x, i, n in ((cu_q, slot, len(q)), (starts, column, len(k))))
    masked = column >= filled[:, None]  # (S, K)
    padded = (x[at].transpose(1, 2) for x, at in ((q, rows), (k, keys), (v, keys)))
    segment = torch.bucketize(row, cu_q, right=True) - 1
    place = segment * max_q + row - cu_q[segment]  # of each row of q among the padded ones
    parts = partial_attention(*padded, masked[:, None, None])
    mixed, total, top = (x.transpose(1, 2).flatten(0, 1)[place] for x in parts)
    return (mixed / total).to(v.dtype), (top + total.log()).squeeze(2).T


class StaticCache:
    """As `DecodeCache`, with steps that all launch the same kernels, so that a CUDA graph can record one.

    A layer attends twice, to the prompts and to the own tokens so far, whose number is read from the device. A segment
    and key head of flash attention is one block, so long prompts are cut into `parts` until the blocks fill a GPU.
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
        n, rows, lengths = len(self.owner), self.owner.bincount() * self.repeat, torch.tensor(self.lengths)
        self.parts = count_parts(self.lengths, kv_heads=self.own[0][0].shape[2])
        cuts = lengths * torch.arange(self.parts + 1)[:, None] // self.parts  # (parts + 1, prompts)
        counts, starts = cuts.diff(dim=0), cuts[:-1] + lengths.cumsum(0) - lengths  # of each part's keys
        offsets = (
            F.pad(rows.repeat(self.parts).cumsum(0), (1, 0)),
            F.pad(starts.flatten(), (0, 1)),
            counts.flatten(),
            torch.arange(n + 1) * self.repeat,
            torch.arange(n + 1) * self.capacity,
        )
        *prompts, cu_q, starts = (x.to(self.at.device, torch.int32, non_blocking=True) for x in offsets)
        self.prompt_segments = Segments(*prompts, int(rows.max()), int(counts.max()))
        self.filled = (self.at + 1).int().repeat(n)  # (n), own tokens with the new one
        self.own_segments = Segments(cu_q, starts, self.filled, self.repeat, self.capacity)

    def advance(self) -> None:
        """Count the token whose keys and values all layers have added."""
        self.at += 1
        self.filled += 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention of one new token per completion, whose key, rotated here, and value are added to the cache.

        q (n, heads, d), k and v (n, kv_heads, d), cos and sin as `rotate` takes them -> (n, heads, d).
        """
        keys, values = self.own[layer]
        q = rotate_into_cache(q, k, v, cos, sin, keys, values, self.at, copies=self.parts)
        prompts = varlen_part(q, *self.prefix[layer], self.prompt_segments)
        own = varlen_part(
            q[: len(self.owner) * self.repeat], keys.flatten(0, 1), values.flatten(0, 1), self.own_segments
        )
        return merge_attention(*prompts, *own, repeat=self.repeat)

    def keep(self, kept: Tensor) -> None:
        """As `DecodeCache.keep`."""
        prompts, self.owner = self.owner[kept].unique(return_inverse=True)
        on_device = to_device(kept, self.at.device)
        for layer, (whole, own) in enumerate(zip(self.prefix, self.own, strict=True)):
            if len(prompts) < len(self.lengths):
                parts = (x.split(self.lengths) for x in whole)
                self.prefix[layer] = tuple(torch.cat([part[i] for i in prompts.tolist()]) for part in parts)
            self.own[layer] = tuple(x[on_device] for x in own)
        self.lengths = [self.lengths[i] for i in prompts.tolist()]
        self._set_segments()
