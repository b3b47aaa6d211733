"""Attention over a packed batch: one varlen call where the device has one, SDPA per tree elsewhere."""

import importlib.util
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import PackedBatch

BACKENDS = ("flash_attn", "varlen", "sdpa")


def pick_backend(x: Tensor) -> str:
    """The fastest backend that takes this tensor. Flash kernels want half precision on CUDA."""
    if x.device.type != "cuda" or x.dtype not in (torch.float16, torch.bfloat16):
        return "sdpa"
    return "flash_attn" if importlib.util.find_spec("flash_attn") else "varlen"


class PackedAttention:
    """Causal attention of every segment over itself and, where it has one, its parent.

    Called as `attend(layer, q, k, v)` with q (T, heads, d) and k, v (T, kv_heads, d); returns (T, heads, d).
    """

    def __init__(self, batch: PackedBatch, backend: str = "auto"):
        if backend not in (*BACKENDS, "auto"):
            raise ValueError(f"attention backend is {backend!r}; it must be auto, {', '.join(BACKENDS)}.")
        self.batch = batch
        self.backend = backend
        self.masks: dict[tuple[int, int], Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.batch.trees:  # no rows, but every projection stays in the graph: its gradient is zero, not missing
            return q + (k + v).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        backend = pick_backend(q) if self.backend == "auto" else self.backend
        if backend == "sdpa":
            return self._trees(q, k, v)
        b = self.batch
        k, v = k[b.kv_index], v[b.kv_index]
        return varlen(q, k, v, b.cu_seqlens, b.cu_seqlens_k, b.max_q, b.max_k, causal=True, backend=backend)

    def _trees(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A prompt attends causally; its G completions are one batched call over prompt and own keys.

        The completions are padded to the longest on the right: by causality no real query sees a padded key, and the
        padded queries' rows are dropped.
        """
        lengths = [n for _, prompt, completions in self.batch.trees for n in (prompt, *completions)]
        # One split, not a slice a tree: the backward of a slice writes a gradient of the whole row.
        segments = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)), strict=True)
        out = []
        for _, prompt, completions in self.batch.trees:
            prompt_q, prompt_k, prompt_v = next(segments)  # (1, heads, P, d)
            out.append(sdpa(prompt_q, prompt_k, prompt_v, causal=True))
            if not completions:
                continue
            own = zip(*(next(segments) for _ in completions), strict=True)
            longest = max(completions)
            own_q, own_k, own_v = (torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[2])) for x in t]) for t in own)
            keys = torch.cat((prompt_k.expand(len(completions), -1, -1, -1), own_k), dim=2)  # (G, heads, P + C, d)
            values = torch.cat((prompt_v.expand(len(completions), -1, -1, -1), own_v), dim=2)
            mixed = sdpa(own_q, keys, values, mask=self._bottom_right(longest, prompt + longest, q.device))
            out += [x[:, :, :n] for x, n in zip(mixed.split(1), completions, strict=True)]
        return torch.cat(out, dim=2)[0].transpose(0, 1)

    def _bottom_right(self, queries: int, keys: int, device) -> Tensor:
        """(queries, keys) bool: query i sees the keys up to keys - queries + i. SDPA's own `is_causal` is top-left."""
        if (queries, keys) not in self.masks:
            ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
            self.masks[queries, keys] = ones.tril(keys - queries)
        return self.masks[queries, keys]


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """SDPA of (B, heads, Q, d) with (B, kv_heads, K, d)."""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, causal: bool, backend: str
) -> Tensor:
    """One flash call over ragged segments; causal is aligned bottom-right. (T, heads, d), (T_kv, kv_heads, d) x2."""
    if backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=causal)
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
