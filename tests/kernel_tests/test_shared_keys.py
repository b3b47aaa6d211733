"""gather_keys: the layout's rows and their gradients, summed in fp32 and rounded once, in one order."""

import pytest
import torch

from boxgrpo.kernels import gather_keys
from boxgrpo.kernels.shared_keys import sum_key_gradients_torch
from kernel_cases import BACKENDS, DEVICE, Recorded, assert_refused, seeded

# Each prompt's length with those of its completions; a conversation has none.
TREES = {
    "groups": [(37, (70, 1, 29)), (1, (5,)), (64, ()), (130, (8,) * 16)],
    "conversations": [(40, ()), (3, ())],
    "nothing": [],
}


def layout(tree):
    """kv_index (T_kv), the offsets of T and of T_kv, and the longest segment."""
    index, lengths, row = [], [], 0
    for prompt, completions in tree:
        own = torch.arange(row, row + prompt)
        row, lengths, index = row + prompt, [*lengths, prompt], [*index, own]
        for length in completions:
            index.append(torch.cat([own, torch.arange(row, row + length)]))
            row, lengths = row + length, [*lengths, length]
    offsets = (torch.tensor([0, *sizes]).cumsum(0).int() for sizes in (lengths, map(len, index)))
    tensors = torch.cat([torch.empty(0, dtype=torch.int64), *index]), *offsets
    return *(x.to(DEVICE) for x in tensors), max(lengths, default=0)


def case(tree, dtype, heads=2, width=24):
    """k and v, the upstream gradients of what is read, and the layout."""
    pack, g = layout(tree), seeded()
    rows = int(pack[1][-1])
    sizes = rows, rows, *(len(pack[0]),) * 2
    k, v, *upstream = (torch.randn(n, heads, width, generator=g).to(DEVICE, dtype) for n in sizes)
    return [k.requires_grad_(), v.requires_grad_()], upstream, pack


def exact_sums(upstream, index, rows):
    """In fp64, by the definition of indexing's gradient."""
    return [x.new_zeros(rows, *x.shape[1:], dtype=torch.float64).index_add_(0, index, x.double()) for x in upstream]


@BACKENDS
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_rows_and_gradients_are_those_of_indexing(tree, backend):
    leaves, upstream, pack = case(tree, torch.float32 if backend == "triton" else torch.float64)
    read = gather_keys(*leaves, *pack, backend=backend)
    assert all(torch.equal(x, leaf[pack[0]]) for x, leaf in zip(read, leaves, strict=True))
    found = torch.autograd.grad(read, leaves, upstream)
    for ours, exact in zip(found, exact_sums(upstream, pack[0], len(leaves[0])), strict=True):
        torch.testing.assert_close(ours, exact.to(ours.dtype), rtol=0, atol=1e-14 if backend == "torch" else 4e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_is_rounded_once(dtype):
    """Every element within half a unit in the last place of the exact sum, which sums in half precision are not."""
    leaves, upstream, pack = case(TREES["groups"], dtype)
    found = torch.autograd.grad(gather_keys(*leaves, *pack, backend="torch"), leaves, upstream)
    for ours, read, exact in zip(found, upstream, exact_sums(upstream, pack[0], len(leaves[0])), strict=True):
        by_atomics = torch.zeros_like(ours)  # as indexing's backward on a GPU: every addition rounds
        for row, gradient in zip(pack[0].tolist(), read, strict=True):
            by_atomics[row] += gradient
        once = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6
        assert ((ours - exact).abs() <= once).all()
        assert (ours - exact).norm() < 0.6 * (by_atomics - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_rounds_as_the_twin(dtype):
    """Bit by bit, each time: both add in the same order."""
    leaves, upstream, pack = case(TREES["groups"], dtype, width=128)
    twin = sum_key_gradients_torch(*upstream, *pack[1:3], len(leaves[0]), pack[3])
    for _ in range(3):
        found = torch.autograd.grad(gather_keys(*leaves, *pack, backend="triton"), leaves, upstream)
        assert all(torch.equal(x, y) for x, y in zip(found, twin, strict=True))


def test_no_operator_adds_in_an_undefined_order():
    """The backward calls our operator alone; its twin calls none that writes at indices."""
    leaves, upstream, pack = case(TREES["groups"], torch.bfloat16)
    read = gather_keys(*leaves, *pack)
    with Recorded() as backward:
        torch.autograd.grad(read, leaves, upstream)
    with Recorded() as twin:
        sum_key_gradients_torch(*upstream, *pack[1:3], len(leaves[0]), pack[3])
    assert {name for name in backward.names if "detach" not in name} == {"boxgrpo::sum_key_gradients"}
    assert not [name for name in twin.names if any(part in name for part in ("index", "scatter", "put"))]
    with Recorded() as plain:
        torch.autograd.grad([x.index_select(0, pack[0]) for x in leaves], leaves, upstream)
    assert any("index_add" in name for name in plain.names)  # so the names above would show one


def test_what_is_refused():
    (k, v), _, (index, cu, cu_k, longest) = case(TREES["groups"], torch.float32)
    assert_refused(
        (r"k has shape \(\d+, 48\)", lambda: gather_keys(k.flatten(1), v, index, cu, cu_k, longest)),
        ("v is float16; it must be float32", lambda: gather_keys(k, v.half(), index, cu, cu_k, longest)),
        ("kv_index is int32", lambda: gather_keys(k, v, index.int(), cu, cu_k, longest)),
        (r"cu_seqlens_k has shape \(2,\)", lambda: gather_keys(k, v, index, cu, cu_k[:2], longest)),
        (
            "gather_keys got a",
            lambda: gather_keys(k.to("meta"), v.to("meta"), index, cu, cu_k, longest, backend="triton"),
        ),
    )
