"""What a decoder layer computes between its products and its attention when completions grow by one token.

Forward only, for sampling. Of n completions each has `heads` query heads and `kv_heads` key heads; `repeat` query heads
read one key head: head h reads key head h // repeat. Attention gets queries of shape (n * repeat, kv_heads, d): row
i * repeat + r holds, for each key head, the r-th query head of completion i. Heads and completions that share keys are
then rows of one segment, and variable-length attention reads each key once for all of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import FLOATS, accumulation_dtype, call, check_tensor, choose, register, runs_fast


def add_rms_norm_torch(x, delta, weight, eps: float) -> tuple[Tensor, Tensor]:
    """Arguments and results as `add_rms_norm`."""
    total = x + delta
    wide = total.to(accumulation_dtype(x))
    normed = wide * (wide.square().mean(1, keepdim=True) + eps).rsqrt() * weight
    return total, normed.to(x.dtype)


def rotate_into_cache_torch(q, k, v, cos, sin, keys, values, at, copies: int) -> Tensor:
    """Arguments and results as `rotate_into_cache`."""
    (n, kv_heads, d), dtype = k.shape, accumulation_dtype(q)
    q, k = ((x * cos.to(dtype) + x.roll(d // 2, -1) * sin.to(dtype)).to(x.dtype) for x in (q, k))
    keys.index_copy_(1, at, k.unsqueeze(1))
    values.index_copy_(1, at, v.unsqueeze(1))
    return q.view(n, kv_heads, -1, d).transpose(1, 2).repeat(copies, 1, 1, 1).flatten(0, 1)


def merge_attention_torch(out_a, lse_a, out_b, lse_b, repeat: int) -> Tensor:
    """Arguments and results as `merge_attention`."""
    rows = out_b.shape[0]
    shares = torch.stack((*lse_a.split(rows, 1), lse_b)).softmax(0).mT.unsqueeze(3)  # (parts, n * repeat, kv_heads, 1)
    merged = sum(share * out for share, out in zip(shares, (*out_a.split(rows), out_b), strict=True)).to(out_b.dtype)
    return merged.unflatten(0, (-1, repeat)).transpose(1, 2).flatten(1, 2)


def silu_mul_torch(gate, up) -> Tensor:
    """Arguments and results as `silu_mul`."""
    return (F.silu(gate.to(accumulation_dtype(gate))) * up).to(gate.dtype)


_ADD_RMS_NORM = register(
    "(Tensor x, Tensor delta, Tensor weight, float eps, bool triton) -> (Tensor, Tensor)",
    add_rms_norm_torch,
    lambda x, *_: (torch.empty_like(x), torch.empty_like(x)),
)
_MERGE_ATTENTION = register(
    "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, int repeat, bool triton) -> Tensor",
    merge_attention_torch,
    lambda _, _a, b, _b, repeat, _t: b.new_empty(b.shape[0] // repeat, b.shape[1] * repeat, b.shape[2]),
)
_SILU_MUL = register(
    "(Tensor gate, Tensor up, bool triton) -> Tensor", silu_mul_torch, lambda x, *_: x.new_empty(x.shape)
)
_rotate_into_cache = choose(rotate_into_cache_torch, 9)  # no op of torch.library, because it changes the cache


def add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The residual stream with a layer's output added, and its norm: total = x + delta, in x's dtype, and
    total / sqrt(mean(total^2) + eps) * weight, rounded once.

    Args:
        x, delta: (n, H).
        weight: (H).

    Returns:
        (n, H) each, in x's dtype.

    Raises:
        ValueError: shapes, dtypes or `backend` do not fit.
    """
    check_tensor("x", x, (None, None), FLOATS)
    check_tensor("delta", delta, tuple(x.shape), (x.dtype,))
    check_tensor("weight", weight, (x.shape[1],), (x.dtype,))
    return call(*_ADD_RMS_NORM, x, delta, weight, eps, runs_fast("add_rms_norm", backend, x))


def rotate_into_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    *,
    copies: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Rotate queries and keys, pairing element i with i + d / 2, and write keys and values to slot `at` of the cache.

    Args:
        q: (n, heads, d); k, v: (n, kv_heads, d). Rows may be apart, as in slices of one product.
        cos, sin: (n, 1, d); both halves of cos are alike, those of sin differ in sign, and the first one is -sine.
        keys, values: (n, C, kv_heads, d), which are changed in place.
        at: (1) int64 on the device, within 0 and C - 1; elsewhere the kernel writes nothing.
        copies: how often the queries are written, for as many parts of the keys that they read.

    Returns:
        (copies * n * repeat, kv_heads, d), the rotated queries, each copy as the module's docstring orders them.

    Raises:
        ValueError: shapes, dtypes or `backend` do not fit.
    """
    check_tensor("k", k, (q.shape[0], None, q.shape[2]), (q.dtype,))
    check_tensor("v", v, tuple(k.shape), (q.dtype,))
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_tensor(name, tensor, (q.shape[0], 1, q.shape[2]), FLOATS)
    for name, tensor in (("keys", keys), ("values", values)):
        check_tensor(name, tensor, (q.shape[0], None, *k.shape[1:]), (q.dtype,))
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it is written in place. Pass a contiguous tensor.")
    check_tensor("at", at, (1,), (torch.int64,))
    fast = runs_fast("rotate_into_cache", backend, q, k, v)
    return _rotate_into_cache(q, k, v, cos, sin, keys, values, at, copies, fast)


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, repeat: int, backend: str = "auto"
) -> Tensor:
    """Attention to several sets of keys from attention to each: their outputs, weighted by their shares of the mass.

    Args:
        out_a: (sets * n * repeat, kv_heads, d), set by set in the order of the module's docstring; at least one set.
        out_b: (n * repeat, kv_heads, d), of one more.
        lse_a, lse_b: (kv_heads, rows) fp32, log-sum-exp of the scaled scores, as flash attention returns it for sets
            that have keys; -inf for a set without keys, but not for all of them.

    Returns:
        (n, heads, d), each completion's heads in their own order.

    Raises:
        ValueError: shapes, dtypes or `backend` do not fit.
    """
    check_tensor("out_b", out_b, (None, None, None), FLOATS)
    check_tensor("out_a", out_a, (None, *out_b.shape[1:]), (out_b.dtype,))
    if out_a.shape[0] < out_b.shape[0] or out_a.shape[0] % max(out_b.shape[0], 1):
        raise ValueError(f"out_a has {out_a.shape[0]} rows; each of its sets has as many as out_b, {out_b.shape[0]}.")
    for name, tensor, out in (("lse_a", lse_a, out_a), ("lse_b", lse_b, out_b)):
        check_tensor(name, tensor, (out.shape[1], out.shape[0]), (torch.float32, torch.float64))
    fast = runs_fast("merge_attention", backend, out_a, lse_a, lse_b)
    return call(*_MERGE_ATTENTION, out_a, lse_a, out_b, lse_b, repeat, fast)


def silu_mul(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) * up, rounded once: (n, I) x2 -> (n, I). Rows may be apart, as in slices of one product.

    Raises:
        ValueError: shapes, dtypes or `backend` do not fit.
    """
    check_tensor("gate", gate, (None, None), FLOATS)
    check_tensor("up", up, tuple(gate.shape), (gate.dtype,))
    return call(*_SILU_MUL, gate, up, runs_fast("silu_mul", backend, gate, up))
