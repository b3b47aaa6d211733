"""Triton kernels of decode.py: one launch each, which a CUDA graph can record."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import Launch, cdiv, next_power_of_2

COLUMNS = 1024  # of a program of silu_mul


@triton.jit
def add_rms_norm_kernel(x, delta, weight, total, normed, width, eps, BLOCK: tl.constexpr):
    """A program computes a row."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = tl.program_id(0).to(tl.int64) * width + columns
    added = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
    rounded = added.to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask=inside)
    wide = rounded.to(tl.float32)  # the norm of what the next layer reads
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    scaled = wide * scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, scaled.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(source, cos, sin, half, inside):
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _store_halves(target, low, high, half, inside):
    tl.store(target, low.to(target.dtype.element_ty), mask=inside)
    tl.store(target + half, high.to(target.dtype.element_ty), mask=inside)


@triton.jit
def rotate_into_cache_kernel(
    q,
    k,
    v,
    cos,
    sin,
    keys,
    values,
    at,
    rotated,
    q_stride,
    k_stride,
    v_stride,
    slots,
    copies,
    KV_HEADS: tl.constexpr,
    REPEAT: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program computes a key head of a completion, and the REPEAT query heads that read it; head_dim is 2 * HALF."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column, r = tl.arange(0, COLUMNS), tl.arange(0, ROWS)[:, None]
    inside = column < HALF
    c = tl.load(cos + row * 2 * HALF + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + row * 2 * HALF + HALF + column, mask=inside, other=0.0).to(tl.float32)
    source = q + row * q_stride + (head * REPEAT + r) * 2 * HALF + column[None, :]
    known = (r < REPEAT) & inside[None, :]
    low, high = _rotate(source, c[None, :], s[None, :], HALF, known)
    for copy in range(copies):
        place = copy * tl.num_programs(0) + row
        target = rotated + ((place * REPEAT + r) * KV_HEADS + head) * 2 * HALF + column[None, :]
        _store_halves(target, low, high, HALF, known)

    slot = tl.load(at)
    inside &= (slot >= 0) & (slot < slots)
    place = ((row * slots + slot) * KV_HEADS + head) * 2 * HALF + column
    own = head * 2 * HALF + column
    low, high = _rotate(k + row * k_stride + own, c, s, HALF, inside)
    _store_halves(keys + place, low, high, HALF, inside)
    source = v + row * v_stride + own
    low, high = tl.load(source, mask=inside), tl.load(source + HALF, mask=inside)
    _store_halves(values + place, low, high, HALF, inside)


@triton.jit
def merge_attention_kernel(
    out_a,
    lse_a,
    out_b,
    lse_b,
    merged,
    rows,
    sets,
    KV_HEADS: tl.constexpr,
    REPEAT: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program merges the REPEAT heads of a completion that read one key head; `rows` is n * REPEAT, a set of a's."""
    first, head = tl.program_id(0).to(tl.int64) * REPEAT, tl.program_id(1)
    column, r = tl.arange(0, COLUMNS)[None, :], tl.arange(0, ROWS)
    known = r < REPEAT
    mass_b = tl.load(lse_b + head * rows + first + r, mask=known, other=0.0)
    mass_a = lse_a + head * sets * rows + first + r
    top = mass_b
    for part in range(sets):
        top = tl.maximum(top, tl.load(mass_a + part * rows, mask=known, other=0.0))
    inside = known[:, None] & (column < DIM)
    source = ((first + r[:, None]) * KV_HEADS + head) * DIM + column
    total = tl.exp(mass_b - top)
    mixed = total[:, None] * tl.load(out_b + source, mask=inside, other=0.0).to(tl.float32)
    for part in range(sets):
        share = tl.exp(tl.load(mass_a + part * rows, mask=known, other=0.0) - top)
        a = tl.load(out_a + part * rows * KV_HEADS * DIM + source, mask=inside, other=0.0)
        mixed += share[:, None] * a.to(tl.float32)
        total += share
    target = merged + (first * KV_HEADS + head * REPEAT + r[:, None]) * DIM + column
    tl.store(target, (mixed / total[:, None]).to(merged.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_kernel(gate, up, out, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    """A program computes BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


def add_rms_norm_launch(x, delta, weight, eps, total, normed) -> Launch:
    """x, delta (n, H), weight (H) -> total, normed (n, H)."""
    n, width = x.shape
    arguments = x.contiguous(), delta.contiguous(), weight.contiguous(), total, normed, width, eps
    return Launch(add_rms_norm_kernel, (n,), arguments, {"BLOCK": next_power_of_2(width)}, num_warps=8)


def rotate_into_cache_launch(q, k, v, cos, sin, keys, values, at, rotated, copies: int = 1) -> Launch:
    """q (n, heads, d), k, v (n, kv_heads, d), cos, sin (n, 1, d), keys, values (n, C, kv_heads, d) -> rotated."""
    (n, heads, d), kv_heads = q.shape, k.shape[1]
    q, k, v = (x if x.stride()[1:] == (d, 1) else x.contiguous() for x in (q, k, v))
    strides = q.stride(0), k.stride(0), v.stride(0)
    arguments = q, k, v, cos.contiguous(), sin.contiguous(), keys, values, at, rotated, *strides, keys.shape[1], copies
    constants = {"KV_HEADS": kv_heads, "REPEAT": heads // kv_heads, "HALF": d // 2} | _tile(heads // kv_heads, d // 2)
    return Launch(rotate_into_cache_kernel, (n, kv_heads), arguments, constants, num_warps=2)


def merge_attention_launch(out_a, lse_a, out_b, lse_b, repeat, merged) -> Launch:
    """out (rows, kv_heads, d), lse (kv_heads, rows), those of a in sets of n * repeat rows -> merged (n, heads, d)."""
    rows, kv_heads, d = out_b.shape
    arguments = *(x.contiguous() for x in (out_a, lse_a, out_b, lse_b)), merged, rows, len(out_a) // max(rows, 1)
    constants = {"KV_HEADS": kv_heads, "REPEAT": repeat, "DIM": d} | _tile(repeat, d)
    return Launch(merge_attention_kernel, (rows // repeat, kv_heads), arguments, constants, num_warps=2)


def silu_mul_launch(gate, up, out) -> Launch:
    """gate, up (n, I) -> out (n, I)."""
    gate, up = (x if x.stride(1) == 1 else x.contiguous() for x in (gate, up))
    n, width = gate.shape
    arguments = gate, up, out, gate.stride(0), up.stride(0), width
    return Launch(silu_mul_kernel, (n, cdiv(width, COLUMNS)), arguments, {"BLOCK": COLUMNS}, num_warps=4)


def _tile(rows: int, columns: int) -> dict[str, int]:
    return {"ROWS": next_power_of_2(rows), "COLUMNS": next_power_of_2(columns)}


def add_rms_norm_triton(x, delta, weight, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm_torch` on Triton, for all dtypes but fp64, as the functions below."""
    total, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    add_rms_norm_launch(x, delta, weight, eps, total, normed).run()
    return total, normed


def rotate_into_cache_triton(q, k, v, cos, sin, keys, values, at, copies: int) -> Tensor:
    """`rotate_into_cache_torch` on Triton."""
    rotated = q.new_empty(copies * q.shape[0] * q.shape[1] // k.shape[1], *k.shape[1:])
    rotate_into_cache_launch(q, k, v, cos, sin, keys, values, at, rotated, copies).run()
    return rotated


def merge_attention_triton(out_a, lse_a, out_b, lse_b, repeat: int) -> Tensor:
    """`merge_attention_torch` on Triton."""
    rows, kv_heads, d = out_b.shape
    merged = out_b.new_empty(rows // repeat, kv_heads * repeat, d)
    merge_attention_launch(out_a, lse_a, out_b, lse_b, repeat, merged).run()
    return merged


def silu_mul_triton(gate, up) -> Tensor:
    """`silu_mul_torch` on Triton."""
    out = gate.new_empty(gate.shape)
    silu_mul_launch(gate, up, out).run()
    return out
