"""The operations of kernels/decode.py in a layer of the 7B that decodes, beside eager and torch.compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from boxgrpo.kernels import add_rms_norm, merge_attention, rotate_into_cache, silu_mul

WIDTH, HEADS, KV, DIM, INNER, SLOTS = 3584, 28, 4, 128, 18_944, 256
SETS = 4  # parts of a prompt that are attended to apart, beside the own tokens


def decode_ops(n: int, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, int], torch.dtype, float, float, Callable]]:
    """The fields of each op's `Case`, for a token of n completions."""
    size = dtype.itemsize
    moved = size * (4 * n + 1) * WIDTH  # the residual, what is added, their sum, its norm; the weight
    yield "add_rms_norm", {"n": n, "H": WIDTH}, dtype, moved, 5.0 * n * WIDTH, _sum_and_norm
    shape = {"n": n, "heads": HEADS, "kv": KV, "d": DIM}
    moved = size * n * DIM * ((1 + SETS) * HEADS + 4 * KV + 1)  # q, k and v, in and out, cos and sin
    written = {"C": SLOTS, "copies": SETS}
    yield "rotate_into_cache", shape | written, dtype, moved, 3.0 * n * DIM * (HEADS + KV), _rotation
    moved = n * HEADS * ((SETS + 2) * size * DIM + (SETS + 1) * 4)  # sets, the result; masses
    yield "merge_attention", shape | {"sets": SETS + 1}, dtype, moved, (2.0 * SETS + 3) * n * HEADS * DIM, _merged_parts
    yield "silu_mul", {"n": n, "I": INNER}, dtype, 3 * size * n * INNER, 4.0 * n * INNER, _gated


def _drawn(case, device, seed: int, *shapes: tuple[int, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
    g = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, device=device, dtype=dtype or case.dtype, generator=g) for shape in shapes]


def _sides(ours: Callable, eager: Callable, *inputs: Tensor) -> dict[str, Callable[[], object]]:
    runs = {"boxgrpo": ours, "eager": eager, "compile": torch.compile(eager, dynamic=False)}
    return {name: partial(run, *inputs) for name, run in runs.items()}


def _sum_and_norm(case, device, seed: int):
    n, width = case.shape.values()

    def eager(x, delta, weight):
        total = x + delta
        return total, F.rms_norm(total, weight.shape, weight, 1e-6)

    return _sides(add_rms_norm, eager, *_drawn(case, device, seed, (n, width), (n, width), (width,)))


def _rotation(case, device, seed: int):
    n, heads, kv, d, slots, copies = case.shape.values()
    joint, angles, keys, values = _drawn(
        case, device, seed, (n, heads + 2 * kv, d), (n, 1, d // 2), (n, slots, kv, d), (n, slots, kv, d)
    )
    cos, sin = (torch.cat(pair, -1) for pair in ([angles.cos()] * 2, [-angles.sin(), angles.sin()]))
    at = torch.full((1,), slots // 2, device=device)

    def ours(q, k, v):
        return rotate_into_cache(q, k, v, cos, sin, keys, values, at, copies=copies), keys, values

    def eager(q, k, v):
        q, k = (torch.addcmul(x * cos, x.roll(d // 2, -1), sin) for x in (q, k))
        keys.index_copy_(1, at, k[:, None])
        values.index_copy_(1, at, v[:, None])
        return q.view(n, kv, -1, d).transpose(1, 2).repeat(copies, 1, 1, 1).flatten(0, 1), keys, values

    return _sides(ours, eager, *joint.split([heads, kv, kv], 1))


def _merged_parts(case, device, seed: int):
    n, heads, kv, d, sets = case.shape.values()
    repeat = heads // kv
    rows = n * repeat
    a, b = _drawn(case, device, seed, ((sets - 1) * rows, kv, d), (rows, kv, d))
    mass_a, mass_b = _drawn(case, device, seed + 1, (kv, (sets - 1) * rows), (kv, rows), dtype=torch.float32)

    def eager(a, mass_a, b, mass_b):
        shares = torch.cat((mass_a, mass_b), 1).view(kv, sets, rows).softmax(1).permute(1, 2, 0)
        merged = (shares[..., None] * torch.cat((a, b)).view(sets, rows, kv, d)).sum(0)
        return merged.to(case.dtype).view(n, repeat, kv, d).transpose(1, 2).reshape(n, heads, d)

    return _sides(partial(merge_attention, repeat=repeat), eager, a, mass_a, b, mass_b)


def _gated(case, device, seed: int):
    (joint,) = _drawn(case, device, seed, (case.shape["n"], 2 * case.shape["I"]))
    return _sides(silu_mul, lambda gate, up: F.silu(gate) * up, *joint.chunk(2, 1))
