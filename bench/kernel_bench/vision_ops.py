"""The operations of kernels/vision.py in a block of Qwen2-VL's tower, beside eager and torch.compile."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from boxgrpo.kernels import quick_gelu, rotate_qk

HEADS, DIM, INNER = 16, 80, 5120


def vision_ops(
    patches: int, dtype: torch.dtype
) -> Iterator[tuple[str, dict[str, int], torch.dtype, float, float, Callable]]:
    """The fields of each op's `Case`: forward, as of a frozen tower, and with its backward pass."""
    size, shape = dtype.itemsize, {"P": patches, "heads": HEADS, "d": DIM}
    pairs = 2 * HEADS * DIM // 2  # of a patch: queries and keys
    moved = patches * (4 * pairs * size + DIM * 4)  # in and out; a cosine and a sine for each pair of a head
    yield "rotate_qk", shape, dtype, moved, 6.0 * patches * pairs, partial(_rotation, trained=False)
    yield "rotate_qk, trained", shape, dtype, 2 * moved, 12.0 * patches * pairs, partial(_rotation, trained=True)
    shape, values = {"P": patches, "I": INNER}, patches * INNER
    yield "quick_gelu", shape, dtype, 2 * size * values, 4.0 * values, partial(_gelu, trained=False)
    yield "quick_gelu, trained", shape, dtype, 5 * size * values, 12.0 * values, partial(_gelu, trained=True)


def _sides(ours: Callable, eager: Callable, x: torch.Tensor, upstream: tuple | None):
    """Results of x; with `upstream`, the gradients of the results, the gradient of x too."""
    runs = {"boxgrpo": ours, "eager": eager, "compile": torch.compile(eager, dynamic=False)}
    if upstream is None:
        return {name: partial(run, x) for name, run in runs.items()}
    x.requires_grad_()

    def with_gradient(run: Callable) -> tuple[torch.Tensor, ...]:
        results = run(x)
        return *(y.detach() for y in results), *torch.autograd.grad(results, [x], upstream)

    return {name: partial(with_gradient, run) for name, run in runs.items()}


def _rotation(case, device, seed: int, *, trained: bool):
    (patches, heads, d), g = case.shape.values(), torch.Generator(device).manual_seed(seed)
    x, *upstream = (
        torch.randn(patches, n, d, device=device, dtype=case.dtype, generator=g) for n in (3 * heads, heads, heads)
    )
    angles = 60 * torch.rand(patches, 1, d // 2, device=device, generator=g)
    cos, sin = (torch.cat(pair, -1) for pair in ([angles.cos()] * 2, [-angles.sin(), angles.sin()]))

    def parts(x):
        return x.split(heads, 1)[:2]

    def eager(x):
        return tuple(torch.addcmul(t.float() * cos, t.float().roll(d // 2, -1), sin).to(t.dtype) for t in parts(x))

    return _sides(lambda x: rotate_qk(*parts(x), cos, sin), eager, x, tuple(upstream) if trained else None)


def _gelu(case, device, seed: int, *, trained: bool):
    g = torch.Generator(device).manual_seed(seed)
    x, upstream = torch.randn(2, *case.shape.values(), device=device, dtype=case.dtype, generator=g)

    def eager(x):
        return (x * torch.sigmoid(1.702 * x),)

    return _sides(lambda x: (quick_gelu(x),), eager, x.clone(), (upstream,) if trained else None)
