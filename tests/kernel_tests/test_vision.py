"""The element-wise operations of a vision tower: twins and kernels against fp64, with their gradients."""

import pytest
import torch
from transformers.activations import QuickGELUActivation

from boxgrpo.kernels import quick_gelu, rotate_qk
from boxgrpo.model.decoder import cos_and_sin, rotate
from kernel_cases import BACKENDS, DEVICE, assert_error_rule, assert_refused, exact, seeded

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=seeded(seed)).to(DEVICE, dtype)


def make_product(rows, heads, kv_heads, d, dtype):
    """A product (rows, heads + 2 kv_heads, d) of queries, keys and values, and tables of angles to 50 radians."""
    cos, sin = cos_and_sin(50 * torch.rand(rows, d // 2, generator=seeded(1)))
    return drawn(rows, heads + 2 * kv_heads, d, dtype=dtype), cos.to(DEVICE), sin.to(DEVICE)


def forward_and_gradient(function, x, *upstream):
    leaf = x.detach().clone().requires_grad_()
    results = function(leaf)
    return *(y.detach() for y in results), *torch.autograd.grad(results, [leaf], upstream)


@BACKENDS
@DTYPES
@pytest.mark.parametrize(
    "rows, heads, kv_heads, d", [(11, 16, 16, 80), (9, 6, 2, 24), (1, 1, 1, 2), (21, 2, 3, 128), (0, 4, 4, 80)]
)
def test_rotation(rows, heads, kv_heads, d, dtype, backend):
    """Of slices of one product; the gradient turns back and leaves the values' alone."""
    product, cos, sin = make_product(rows, heads, kv_heads, d, dtype)
    upstream = drawn(rows, heads, d, dtype=dtype, seed=2), drawn(rows, kv_heads, d, dtype=dtype, seed=3)

    def ours(x):
        q, k, _ = x.split([heads, kv_heads, kv_heads], 1)
        return rotate_qk(q, k, cos, sin, backend=backend)

    def plain(x):
        wide = x if x.dtype == torch.float64 else x.float()
        q, k, _ = (rotate(wide, cos.to(wide.dtype), sin.to(wide.dtype)).to(x.dtype)).split(
            [heads, kv_heads, kv_heads], 1
        )
        return q, k

    got = forward_and_gradient(ours, product, *upstream)
    assert all(x.dtype == dtype for x in got) and got[0].is_contiguous() and got[1].is_contiguous()
    if rows:
        truth = forward_and_gradient(plain, exact(product), *map(exact, upstream))
        assert_error_rule(got, forward_and_gradient(plain, product, *upstream), truth)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("shape", [(7,), (5120,), (2, 3, 111)])
def test_quick_gelu(shape, dtype, backend):
    """At ordinary values and at those whose exponentials overflow or vanish."""
    x, upstream = 4 * drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, seed=1)
    x.view(-1)[:4] = torch.tensor([100.0, -100.0, 0.0, -20.0])

    def rule(function, x, dy):
        return forward_and_gradient(lambda leaf: (function(leaf),), x, dy)

    plain, cast = QuickGELUActivation(), torch.float32 if dtype == torch.float32 or backend == "triton" else dtype
    got = rule(lambda leaf: quick_gelu(leaf, backend=backend), x, upstream)
    assert all(y.dtype == dtype for y in got)
    eager = [y.to(dtype) for y in rule(plain, x.to(cast), upstream.to(cast))]
    assert_error_rule(got, eager, rule(plain, exact(x), exact(upstream)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_twins_have_the_bits_of_plain_torch(dtype):
    """Forward and backward: what a CPU trained before these operations it trains with them."""
    product, cos, sin = make_product(37, 4, 4, 80, dtype)
    upstream = drawn(37, 4, 80, dtype=dtype, seed=2), drawn(37, 4, 80, dtype=dtype, seed=3)

    def plain(x):
        return tuple(rotate(part.float(), cos, sin).to(dtype) for part in x.split(4, 1)[:2])

    ours = forward_and_gradient(lambda x: rotate_qk(*x.split(4, 1)[:2], cos, sin, backend="torch"), product, *upstream)
    assert all(map(torch.equal, ours, forward_and_gradient(plain, product, *upstream)))
    x = 4 * drawn(50, 77, dtype=dtype)
    pairs = [
        forward_and_gradient(lambda x, f=f: (f(x),), x, drawn(50, 77, dtype=dtype, seed=1))
        for f in (lambda x: quick_gelu(x, backend="torch"), QuickGELUActivation())
    ]
    assert all(map(torch.equal, *pairs))


@BACKENDS
def test_the_operations_pass_opcheck_and_compile(backend):
    product, cos, sin = make_product(5, 2, 2, 8, torch.float32)
    ops, check, triton = torch.ops.boxgrpo, torch.library.opcheck, backend == "triton"
    leaves = [part.contiguous().requires_grad_() for part in product.split(2, 1)]
    for inverse in (False, True):
        check(ops.rotate_qk, (*leaves[:2], cos, sin, inverse, triton))
    check(ops.quick_gelu, (leaves[2], triton))
    check(ops.quick_gelu_backward, (leaves[2].detach(), product[:, :2].contiguous(), triton))

    def both(q, k, v):
        return sum(x.sum() for x in (*rotate_qk(q, k, cos, sin, backend=backend), quick_gelu(v, backend=backend)))

    results = [f(*leaves) for f in (both, torch.compile(both, fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(*(torch.autograd.grad(x, leaves) for x in results))


def test_what_is_refused():
    product, cos, sin = make_product(5, 2, 2, 8, torch.float32)
    q, k, _ = product.split(2, 1)
    assert_refused(
        (r"k has shape \(5, 2, 4\); it must be \(5, any, 8\)", lambda: rotate_qk(q, k[..., :4], cos, sin)),
        ("k is bfloat16; it must be float32", lambda: rotate_qk(q, k.bfloat16(), cos, sin)),
        (r"sin has shape \(4, 1, 8\); it must be \(5, 1, 8\)", lambda: rotate_qk(q, k, cos, sin[:4])),
        ("cos is bfloat16; it must be float32", lambda: rotate_qk(q, k, cos.bfloat16(), sin)),
        ("x is int64; it must be float16", lambda: quick_gelu(torch.zeros(2, dtype=torch.int64))),
        ("quick_gelu got a CPU tensor", lambda: quick_gelu(q, backend="triton")),
    )
