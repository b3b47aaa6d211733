"""Keys and values for decoding: a prompt's stand once for all its completions; each completion adds only its own."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .attention import PackedAttention


class Prefill(PackedAttention):
    """Attention that keeps the keys and values it sees, layer by layer."""

    def __init__(self, batch):
        super().__init__(batch)
        self.kv: list[tuple[Tensor, Tensor]] = []

    def __call__(self, layer, q, k, v):
        self.kv.append((k, v))
        return super().__call__(layer, q, k, v)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    """q (a, b, r, d) on k (a, b, p, d): (a, b, r, p) fp32, also of half precision, without a copy of k on a GPU."""
    if q.is_cuda and q.dtype != torch.float32:
        product = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
        return product.unflatten(0, q.shape[:2])
    return q.float() @ k.float().transpose(-1, -2)


class Part(NamedTuple):
    """Attention to some of the keys, to be merged with that to the others; all fp32."""

    mixed: Tensor  # (..., d): values weighted by exp(score - top)
    total: Tensor  # (..., 1): sum of these weights
    top: Tensor  # (..., 1): largest score

    @classmethod
    def of(cls, scores: Tensor, v: Tensor) -> "Part":
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top).exp_()
        return cls((weights.to(v.dtype) @ v).float(), weights.sum(-1, keepdim=True), top)

    def merged(self, other: "Part") -> Tensor:
        """Attention to the keys of both: (..., d)."""
        top = torch.maximum(self.top, other.top)
        mine, theirs = (self.top - top).exp(), (other.top - top).exp()
        return (mine * self.mixed + theirs * other.mixed) / (mine * self.total + theirs * other.total)


class DecodeCache:
    """Keys and values of B prompts, each shared by its completions, and of up to C own tokens of n completions.

    `static` attention runs over all of the room for own tokens, masked, and knows its place from a number on the
    device alone: every step is the same launches, which a CUDA graph can record. Else it runs over what is there.
    """

    def __init__(self, prefill: Prefill, num_generations: int, max_new_tokens: int, *, static: bool):
        batch = prefill.batch
        self.prompt_lengths = batch.cu_seqlens.diff().cpu()  # (B)
        prompts = len(self.prompt_lengths)
        self.owner = torch.arange(prompts).repeat_interleave(num_generations)  # (n), each completion's prompt
        self.group, self.static = num_generations, static  # the most completions of a prompt
        self.slots: Tensor | None = None  # (n), places in a grid of B x group, where that is not full
        self.at = torch.zeros(1, dtype=torch.int64, device=batch.cu_seqlens.device)  # own tokens so far
        lengths = self.prompt_lengths.tolist()
        _, heads, d = prefill.kv[0][0].shape
        shape = (len(self.owner), heads, max_new_tokens, d)

        def padded(x):  # (T, kv_heads, d) -> (B, kv_heads, P, d)
            return pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2).contiguous()

        self.prefix, self.own = [], []
        for layer, (k, v) in enumerate(prefill.kv):
            self.prefix.append((padded(k), padded(v)))
            self.own.append((k.new_zeros(shape), v.new_zeros(shape)))
            prefill.kv[layer] = None  # its last use: two copies of one layer, never of all
            del k, v
        self.bias = self._bias()

    def _bias(self) -> Tensor:
        """(B, 1, 1, P) fp32: what a query's score against each of a prompt's places is raised by, 0 or -inf."""
        inside = torch.arange(int(self.prompt_lengths.max())) < self.prompt_lengths[:, None]
        return torch.zeros(inside.shape).masked_fill_(~inside, float("-inf"))[:, None, None].to(self.at.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token per completion: q (n, heads, d), k and v (n, kv_heads, d) -> (n, heads, d).

        Scores are fp32, as flash attention keeps them in training: rounded to bf16 they would move the ratio.
        """
        n, heads, d = q.shape
        q = q.view(n, k.shape[1], -1, d)  # (n, kv_heads, repeat, d)
        on_prefix, on_own = self._on_prefix(layer, q), self._on_own(layer, q, k, v)
        return on_prefix.merged(on_own).to(v.dtype).reshape(n, heads, d)

    def _on_prefix(self, layer: int, q: Tensor) -> Part:
        """All completions of a prompt are one product: B, kv_heads, group * repeat."""
        prefix_k, prefix_v = self.prefix[layer]
        kv_heads, repeat, d = q.shape[1:]
        prompts = len(prefix_k)
        grid = (
            q if self.slots is None else q.new_zeros(prompts * self.group, *q.shape[1:]).index_copy_(0, self.slots, q)
        )
        stacked = grid.view(prompts, self.group, kv_heads, repeat, d).transpose(1, 2).flatten(2, 3)
        found = Part.of(scores_of(stacked, prefix_k) * d**-0.5 + self.bias, prefix_v)

        def per_completion(x: Tensor) -> Tensor:
            x = x.unflatten(2, (self.group, repeat)).transpose(1, 2).flatten(0, 1)
            return x if self.slots is None else x[self.slots]

        return Part(*map(per_completion, found))

    def _on_own(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Part:
        """With the new token's key and value in place."""
        own_k, own_v = self.own[layer]
        if self.static:
            own_k.index_copy_(2, self.at, k.unsqueeze(2))
            own_v.index_copy_(2, self.at, v.unsqueeze(2))
        else:
            at = int(self.at)
            own_k[:, :, at], own_v[:, :, at] = k, v
            own_k, own_v = own_k[:, :, : at + 1], own_v[:, :, : at + 1]
        scores = scores_of(q, own_k) * q.shape[-1] ** -0.5
        if self.static:
            places = torch.arange(scores.shape[-1], device=q.device)
            scores = scores.masked_fill(places > self.at, float("-inf"))
        return Part.of(scores, own_v)

    def advance(self) -> None:
        """The step's keys and values are in all layers."""
        self.at += 1

    def keep(self, kept: Tensor) -> None:
        """Go on with the completions `kept` (n') int64, rising, on the CPU, and with their prompts."""
        device = self.at.device
        prompts, self.owner, counts = self.owner[kept].unique(return_inverse=True, return_counts=True)
        self.group = int(counts.max())
        place = torch.arange(len(kept)) - (counts.cumsum(0) - counts)[self.owner]  # among the prompt's own
        full = len(kept) == len(prompts) * self.group
        self.slots = None if full else (self.owner * self.group + place).to(device)
        self.prompt_lengths = self.prompt_lengths[prompts]
        longest = int(self.prompt_lengths.max())
        self.bias = self._bias()
        prompts, kept = prompts.to(device), kept.to(device)
        self.prefix = [tuple(x[prompts, :, :longest].contiguous() for x in pair) for pair in self.prefix]
        self.own = [tuple(x[kept] for x in pair) for pair in self.own]
