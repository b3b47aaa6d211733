"""Keys and values of completions that are decoded token by token beside their prompts, and attention to them.

A prompt's keys and values are stored once for all its completions; each completion adds its own.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .attention import PackedAttention


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

    `static` attention covers all C own tokens, masked, and reads their number from the device: every step launches the
    same kernels, which a CUDA graph can record. Otherwise it covers the tokens so far.
    """

    def __init__(self, prefill: PackedAttention, num_generations: int, max_new_tokens: int, *, static: bool):
        cu_seqlens = prefill.batch.cu_seqlens
        self.prompt_lengths = torch.tensor([length for _, length, *_ in prefill.batch.spans])  # (B), without a wait
        prompts, lengths = len(self.prompt_lengths), self.prompt_lengths.tolist()
        self.owner = torch.arange(prompts).repeat_interleave(num_generations)  # (n), each completion's prompt
        self.group, self.static = num_generations, static  # the most completions of a prompt
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

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one new token per completion, whose key and value are added to the cache.

        q (n, heads, d), k and v (n, kv_heads, d) -> (n, heads, d).
        """
        n, heads, d = q.shape
        q = q.view(n, k.shape[1], -1, d)  # (n, kv_heads, repeat, d)
        masked, (own_k, own_v) = None, self.own[layer]
        if self.static:
            own_k.index_copy_(2, self.at, k.unsqueeze(2))
            own_v.index_copy_(2, self.at, v.unsqueeze(2))
            masked = torch.arange(own_k.shape[2], device=q.device) > self.at
        else:
            at = int(self.at)
            own_k[:, :, at], own_v[:, :, at] = k, v
            own_k, own_v = own_k[:, :, : at + 1], own_v[:, :, : at + 1]
        own, own_total, own_top = partial_attention(q, own_k, own_v, masked)

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
