"""Sampling: every prompt is prefilled once, then all G·B completions decode together.

A prompt's keys and values stand once for its G completions; each completion adds only its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from boxgrpo.kernels import sample_tokens

from .attention import PackedAttention
from .packing import Group, Prompt, pack_groups
from .qwen2vl import Qwen2VL


@dataclass
class Rollout:
    """Sampled completions, prompt-major: row b·G + g is completion g of prompt b."""

    ids: Tensor  # (n, C) int64, whatever stands after the end token is padding
    lengths: Tensor  # (n) int64, tokens up to and with the end token
    logps: Tensor  # (n, C) fp32, nats at the sampling temperature

    def completions(self) -> list[Tensor]:
        """Each completion's own tokens, (C_i) int64 on the CPU."""
        ids = self.ids.cpu()
        return [row[:count] for row, count in zip(ids, self.lengths.tolist(), strict=True)]


class Prefill(PackedAttention):
    """Attention that keeps the keys and values it sees, layer by layer."""

    def __init__(self, batch):
        super().__init__(batch)
        self.kv: list[tuple[Tensor, Tensor]] = []

    def __call__(self, layer, q, k, v):
        self.kv.append((k, v))
        return super().__call__(layer, q, k, v)


class DecodeCache:
    """Keys and values of B prompts, each shared by G completions, and of the completions' own tokens."""

    def __init__(self, prefill: Prefill, num_generations: int, max_new_tokens: int):
        batch = prefill.batch
        lengths = batch.cu_seqlens.diff().tolist()
        self.group = num_generations
        self.length = 0  # own tokens so far

        def padded(x):  # (T, kv_heads, d) -> (B, kv_heads, P, d)
            return pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2).contiguous()

        self.prefix = [(padded(k), padded(v)) for k, v in prefill.kv]
        prompt_rows = torch.arange(batch.max_q, device=batch.cu_seqlens.device)
        inside = prompt_rows < batch.cu_seqlens.diff()[:, None]
        self.bias = torch.zeros(inside.shape, device=inside.device).masked_fill_(~inside, float("-inf"))[:, None, None]
        _, heads, d = prefill.kv[0][0].shape
        shape = (len(lengths), heads, num_generations, max_new_tokens, d)
        self.own = [(k.new_zeros(shape), v.new_zeros(shape)) for k, v in prefill.kv]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token per completion: q (n, heads, d), k and v (n, kv_heads, d) -> (n, heads, d)."""
        n, heads, d = q.shape
        kv_heads, repeat = k.shape[1], heads // k.shape[1]
        prompts = n // self.group
        own_k, own_v = self.own[layer]
        own_k[:, :, :, self.length] = k.view(prompts, self.group, kv_heads, d).transpose(1, 2)
        own_v[:, :, :, self.length] = v.view(prompts, self.group, kv_heads, d).transpose(1, 2)
        own_k, own_v = own_k[..., : self.length + 1, :], own_v[..., : self.length + 1, :]
        prefix_k, prefix_v = self.prefix[layer]
        # (B, kv_heads, G, repeat, d): against the prompt, G·repeat queries are one product
        q = q.view(prompts, self.group, kv_heads, repeat, d).transpose(1, 2).float() * d**-0.5
        stacked = q.reshape(prompts, kv_heads, self.group * repeat, d)
        # Scores in fp32, as flash attention keeps them in training: rounded to bf16 they would move the ratio.
        on_prefix = stacked @ prefix_k.transpose(-1, -2).float() + self.bias
        on_own = q @ own_k.transpose(-1, -2).float()
        scores = torch.cat((on_prefix.view(*q.shape[:-1], -1), on_own), dim=-1)
        p_prefix, p_own = scores.softmax(-1).to(v.dtype).split([prefix_k.shape[2], self.length + 1], dim=-1)
        mixed = (p_prefix.reshape(*stacked.shape[:-1], -1) @ prefix_v).view(q.shape) + p_own @ own_v
        return mixed.transpose(1, 2).reshape(n, heads, d)


@torch.no_grad()
def generate(
    model: Qwen2VL,
    prompts: Sequence[Prompt],
    *,
    prompt_ids: Sequence[int],
    eos_token_ids: Sequence[int],
    image_embeds: Sequence[Tensor | None] | None = None,
    num_generations: int = 1,
    max_completion_length: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    forbidden: Tensor | None = None,
) -> Rollout:
    """Sample `num_generations` completions of every prompt.

    Args:
        prompts: B prompts; their tensors are moved to the model's device.
        prompt_ids: B serial numbers in the run's stream; with `seed` they fix the noise, whatever the batch.
        eos_token_ids: a completion ends with the first of these.
        image_embeds: B results of `embed_images`; None runs the tower here.
        temperature: 0 is greedy.
        forbidden: (F) int64 ids never sampled, vision tokens above all.

    Raises:
        ValueError: no prompts, or not one serial number for each.
    """
    if not prompts or len(prompts) != len(prompt_ids):
        raise ValueError(
            f"{len(prompts)} prompts and {len(prompt_ids)} prompt_ids; generate takes at least one prompt and a serial "
            "number for each. Pass prompt_ids of the same length."
        )
    device = model.device
    groups = [Group(p, (), i, None if image_embeds is None else image_embeds[i]) for i, p in enumerate(prompts)]
    batch = pack_groups(groups, image_token_id=model.config.image_token_id).to(device)
    prefill = Prefill(batch)
    hidden = model.hidden(batch, prefill)
    last_rows = (batch.cu_seqlens[1:] - 1).long()
    cache = DecodeCache(prefill, num_generations, max_completion_length)
    del prefill

    def per_completion(values):
        return torch.as_tensor(values, dtype=torch.int64, device=device).repeat_interleave(num_generations)

    n = len(prompts) * num_generations
    serial = per_completion(list(prompt_ids))
    completion = torch.arange(num_generations, device=device).repeat(len(prompts))
    first_position = per_completion([int(p.position_ids.max()) + 1 for p in prompts])
    eos = torch.tensor(list(eos_token_ids), device=device)
    ids = torch.full((n, max_completion_length), int(eos[0]), device=device)
    logps = torch.zeros(n, max_completion_length, device=device)
    lengths = torch.full((n,), max_completion_length, device=device)
    going = torch.ones(n, dtype=torch.bool, device=device)
    x = hidden[last_rows].repeat_interleave(num_generations, 0)
    for t in range(max_completion_length):
        logits = x @ model.head_weight.T
        tokens, token_logps = sample_tokens(
            logits,
            seed=seed,
            prompt_ids=serial,
            completion_ids=completion,
            positions=torch.full_like(serial, t),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            forbidden=forbidden,
        )
        ids[:, t] = tokens
        logps[:, t] = token_logps
        ended = going & torch.isin(tokens, eos)
        lengths.masked_fill_(ended, t + 1)
        going &= ~ended
        # Asking costs a synchronisation: every 16 tokens is enough on a GPU.
        if t + 1 == max_completion_length or ((device.type == "cpu" or t % 16 == 15) and not going.any()):
            break
        embeds = model.model.embed_tokens(tokens)
        x = model.model(embeds, (first_position + t).expand(3, -1), cache.attend)
        cache.length += 1
    return Rollout(ids[:, : t + 1], lengths, logps[:, : t + 1])
