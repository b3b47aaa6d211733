"""The operations of a decoder layer that takes one token of each completion: twins and kernels against fp64."""

import pytest
import torch

from boxgrpo.kernels import add_rms_norm, merge_attention, rotate_into_cache, silu_mul
from kernel_cases import BACKENDS, DEVICE, assert_error_rule, assert_refused, exact, seeded

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
HEADS = pytest.mark.parametrize("heads, kv_heads, d", [(28, 4, 128), (6, 6, 16), (6, 2, 24)])


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=seeded(seed)).to(DEVICE, dtype)


def as_slices(*tensors):
    """Tensors (n, …) as slices of one tensor's rows, as one product returns them."""
    joint = torch.cat([x.flatten(1) for x in tensors], 1)
    return [part.view(x.shape) for part, x in zip(joint.split([x[0].numel() for x in tensors], 1), tensors)]


@BACKENDS
@DTYPES
@pytest.mark.parametrize("n, width", [(1, 8), (3, 100), (5, 1536)])
def test_a_sum_and_its_norm(n, width, dtype, backend):
    """The norm is that of the sum as the next layer reads it, rounded once."""
    x, delta = drawn(n, width, dtype=dtype), 3 * drawn(n, width, dtype=dtype, seed=1)
    weight = drawn(width, dtype=dtype, seed=2)
    total, normed = add_rms_norm(x, delta, weight, eps=1e-5, backend=backend)
    assert_error_rule([total], [x + delta], [x.double() + delta.double()])
    stream, w = total.double(), weight.double()
    truth = stream * (stream.square().mean(1, keepdim=True) + 1e-5).rsqrt() * w
    assert_error_rule([normed], [truth.to(dtype)], [truth])


def rotated(x, cos, sin):
    """Pairs (i, i + d / 2) turned by the angle that cos and the second half of sin give."""
    low, high = x.chunk(2, -1)
    c, s = cos.chunk(2, -1)[0], sin.chunk(2, -1)[1]
    return torch.cat((low * c - high * s, high * c + low * s), -1)


@BACKENDS
@DTYPES
@HEADS
@pytest.mark.parametrize("slices", [True, False])
def test_rotation_into_the_cache(heads, kv_heads, d, dtype, slices, backend):
    """Queries and keys turn, one slot of the cache is written and no other, and each query is where its key head is."""
    n, slots, at = 3, 5, torch.tensor([2], device=DEVICE)
    q, k, v = (drawn(n, h, d, dtype=dtype, seed=h + i) for i, h in enumerate((heads, kv_heads, kv_heads)))
    angles = 3 * drawn(n, 1, d // 2)
    cos, sin = torch.cat([angles.cos()] * 2, -1).to(dtype), torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)
    before = [drawn(n, slots, kv_heads, d, dtype=dtype, seed=i) for i in (7, 8)]
    keys, values = (x.clone() for x in before)
    arguments = as_slices(q, k, v) if slices else (q, k, v)
    queries = rotate_into_cache(*arguments, cos, sin, keys, values, at, copies=2, backend=backend)
    assert queries.shape == (2 * n * heads // kv_heads, kv_heads, d) and queries.is_contiguous()
    queries, copy = queries.chunk(2)
    assert torch.equal(queries, copy)
    by_completion = queries.view(n, heads // kv_heads, kv_heads, d).transpose(1, 2).reshape(n, heads, d)
    truths = [rotated(*map(exact, (x, cos, sin))) for x in (q, k)]
    assert_error_rule([by_completion, keys[:, 2]], [x.to(dtype) for x in truths], truths)
    assert torch.equal(values[:, 2], v)
    others = [0, 1, 3, 4]
    assert all(torch.equal(x[:, others], y[:, others]) for x, y in zip((keys, values), before, strict=True))


@BACKENDS
@DTYPES
@HEADS
def test_merged_parts_are_attention_to_all_keys(heads, kv_heads, d, dtype, backend):
    """Of 9 keys 3, 1 and 5, attended to apart; where the others have no mass a set's output is the result."""
    n, repeat = 3, heads // kv_heads
    q, k, v = drawn(n, heads, d), drawn(kv_heads, 9, d, seed=1), drawn(kv_heads, 9, d, seed=2)
    scores = torch.einsum("nhd,hkd->nhk", exact(q), exact(k).repeat_interleave(repeat, 0)) * d**-0.5
    parts = []
    for keys in (slice(3), slice(3, 4), slice(4, 9)):
        own = torch.einsum(
            "nhk,hkd->nhd", scores[..., keys].softmax(-1), exact(v)[:, keys].repeat_interleave(repeat, 0)
        )
        mass = scores[..., keys].logsumexp(-1)
        rows = own.view(n, kv_heads, repeat, d).transpose(1, 2).reshape(n * repeat, kv_heads, d)
        masses = mass.view(n, kv_heads, repeat).permute(1, 0, 2).reshape(kv_heads, n * repeat)
        parts.append((rows.to(dtype).contiguous(), masses.float().contiguous()))
    truth = torch.einsum("nhk,hkd->nhd", scores.softmax(-1), exact(v).repeat_interleave(repeat, 0))
    (out_a, lse_a), (b, lse_b), last = parts
    merged = merge_attention(torch.cat((out_a, b)), torch.cat((lse_a, lse_b), 1), *last, repeat=repeat, backend=backend)
    assert merged.shape == (n, heads, d) and merged.dtype == dtype
    share = torch.finfo(dtype).eps * truth.abs().max()  # each part is rounded before they are merged
    assert (merged.double() - truth).abs().max() <= 2 * share
    alone = merge_attention(out_a, lse_a, b, torch.full_like(lse_b, float("-inf")), repeat=repeat, backend=backend)
    assert torch.equal(alone.view(n, kv_heads, repeat, d).transpose(1, 2).reshape(b.shape), out_a)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("n, width", [(1, 8), (3, 2100)])
def test_a_gated_product(n, width, dtype, backend):
    gate, up = as_slices(8 * drawn(n, width, dtype=dtype), drawn(n, width, dtype=dtype, seed=1))
    gate[0, 0], gate[0, 1] = 90, -90  # whose exponentials overflow
    got = silu_mul(gate, up, backend=backend)
    truth = torch.nn.functional.silu(gate.double()) * up.double()
    assert_error_rule([got], [truth.to(dtype)], [truth])


@BACKENDS
def test_a_slot_outside_the_cache(backend):
    """The kernel, which cannot raise, writes nothing; the twin raises."""
    q, k, cache = drawn(2, 4, 8), drawn(2, 2, 8), [torch.zeros(2, 3, 2, 8, device=DEVICE) for _ in range(2)]
    for at in (-1, 3):
        arguments = q, k, k, drawn(2, 1, 8), drawn(2, 1, 8), *cache, torch.tensor([at], device=DEVICE)
        if backend == "torch" and DEVICE == "cpu":
            with pytest.raises((IndexError, RuntimeError)):
                rotate_into_cache(*arguments, backend=backend)
        elif backend == "triton":
            rotate_into_cache(*arguments, backend=backend)
    assert not cache[0].any() and not cache[1].any()


def test_what_is_refused():
    x, q, k, turn = torch.zeros(2, 8), torch.zeros(2, 4, 8), torch.zeros(2, 2, 8), torch.zeros(2, 1, 8)
    cache, at, lse = torch.zeros(2, 3, 2, 8), torch.zeros(1, dtype=torch.int64), torch.zeros(2, 4)
    parts = torch.zeros(4, 2, 8)

    def rotate(**changed):
        options = {"q": q, "k": k, "v": k, "cos": turn, "sin": turn, "keys": cache, "values": cache, "at": at}
        return rotate_into_cache(**options | changed)

    def merge(out):
        return merge_attention(out, lse, parts, lse, repeat=2)

    assert_refused(
        (r"delta has shape \(2, 4\); it must be \(2, 8\)", lambda: add_rms_norm(x, x[:, :4], x[0])),
        ("weight is bfloat16; it must be float32", lambda: add_rms_norm(x, x, x[0].bfloat16())),
        ("values is bfloat16; it must be float32", lambda: rotate(values=cache.bfloat16())),
        (
            r"keys has strides .*; it is written in place",
            lambda: rotate(keys=cache.transpose(1, 2).contiguous().transpose(1, 2)),
        ),
        ("at is int32; it must be int64", lambda: rotate(at=at.int())),
        (r"lse_b has shape \(4, 2\); it must be \(2, 4\)", lambda: merge_attention(parts, lse, parts, lse.T, repeat=2)),
        ("out_a has 6 rows; each of its sets has as many as out_b, 4", lambda: merge(parts.new_zeros(6, 2, 8))),
        ("out_a has 0 rows; each of its sets", lambda: merge(parts[:0])),
        (r"up has shape \(1, 8\); it must be \(2, 8\)", lambda: silu_mul(x, x[:1])),
        ("silu_mul got a CPU tensor", lambda: silu_mul(x, x, backend="triton")),
    )
