"""Keys and values for decoding: a prompt's stand once for all its completions; each completion adds only its own."""

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


class DecodeCache:
    """Keys and values of B prompts, each shared by G completions, and of up to C own tokens of each completion.

    `static` attention runs over all of the room for own tokens, masked, and knows its place from a number on the
    device alone: every step is the same launches, which a CUDA graph can record. Else it runs over what is there.
    """

    def __init__(self, prefill: Prefill, num_generations: int, max_new_tokens: int, *, static: bool):
        batch = prefill.batch
        self.prompt_lengths = batch.cu_seqlens.diff().cpu()  # (B)
        self.group, self.static = num_generations, static
        self.length = 0  # own tokens so far
        self.at = torch.zeros(1, dtype=torch.int64, device=batch.cu_seqlens.device)  # the same, on the device
        lengths = self.prompt_lengths.tolist()

        def padded(x):  # (T, kv_heads, d) -> (B, kv_heads, P, d)
            return pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2).contiguous()

        self.prefix = [(padded(k), padded(v)) for k, v in prefill.kv]
        self.bias = self._bias()
        _, heads, d = prefill.kv[0][0].shape
        shape = (len(lengths), heads, num_generations, max_new_tokens, d)
        self.own = [(k.new_zeros(shape), v.new_zeros(shape)) for k, v in prefill.kv]

    def _bias(self) -> Tensor:
        """(B, 1, 1, P) fp32: what a query's score against each of a prompt's places is raised by, 0 or -inf."""
        inside = torch.arange(int(self.prompt_lengths.max())) < self.prompt_lengths[:, None]
        return torch.zeros(inside.shape).masked_fill_(~inside, float("-inf"))[:, None, None].to(self.at.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token per completion: q (n, heads, d), k and v (n, kv_heads, d) -> (n, heads, d)."""
        n, heads, d = q.shape
        kv_heads, repeat = k.shape[1], heads // k.shape[1]
        prompts = n // self.group
        own_k, own_v = self.own[layer]
        new_k, new_v = (x.view(prompts, self.group, kv_heads, d).transpose(1, 2) for x in (k, v))
        if self.static:
            own_k.index_copy_(3, self.at, new_k.unsqueeze(3))
            own_v.index_copy_(3, self.at, new_v.unsqueeze(3))
        else:
            own_k[:, :, :, self.length], own_v[:, :, :, self.length] = new_k, new_v
            own_k, own_v = own_k[..., : self.length + 1, :], own_v[..., : self.length + 1, :]
        prefix_k, prefix_v = self.prefix[layer]
        # (B, kv_heads, G, repeat, d): against the prompt, G·repeat queries are one product
        q = q.view(prompts, self.group, kv_heads, repeat, d).transpose(1, 2).float() * d**-0.5
        stacked = q.reshape(prompts, kv_heads, self.group * repeat, d)
        # Scores in fp32, as flash attention keeps them in training: rounded to bf16 they would move the ratio.
        on_prefix = stacked @ prefix_k.transpose(-1, -2).float() + self.bias
        on_own = q @ own_k.transpose(-1, -2).float()
        if self.static:
            places = torch.arange(on_own.shape[-1], device=q.device)
            on_own = on_own.masked_fill(places > self.at, float("-inf"))
        scores = torch.cat((on_prefix.view(*q.shape[:-1], -1), on_own), dim=-1)
        p_prefix, p_own = scores.softmax(-1).to(v.dtype).split([prefix_k.shape[2], own_k.shape[3]], dim=-1)
        mixed = (p_prefix.reshape(*stacked.shape[:-1], -1) @ prefix_v).view(q.shape) + p_own @ own_v
        return mixed.transpose(1, 2).reshape(n, heads, d)

    def advance(self) -> None:
        """The step's keys and values are in all layers."""
        self.length += 1
        self.at += 1

    def keep(self, prompts: Tensor, completions: Tensor) -> None:
        """Go on with `completions` (B', G') of `prompts` (B'), both int64 on the CPU."""
        device = self.at.device
        self.prompt_lengths, self.group = self.prompt_lengths[prompts], completions.shape[1]
        longest = int(self.prompt_lengths.max())
        self.bias = self._bias()
        prompts, completions = prompts.to(device), completions.to(device)
        self.prefix = [tuple(x[prompts, :, :longest].contiguous() for x in pair) for pair in self.prefix]
        # An index before and behind a slice puts the indexed axes first: (B', G', kv_heads, C, d).
        rows = prompts[:, None], slice(None), completions
        self.own = [tuple(x[rows].transpose(1, 2).contiguous() for x in pair) for pair in self.own]
