"""Attention over a pack: padded buckets and the varlen layout against a plain mask (ARCHITECTURE.md, Packed batch)."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch

from boxgrpo.kernels import gather_keys
from boxgrpo.model import attention
from boxgrpo.model.attention import PackedAttention, pick_backend
from boxgrpo.model.batch import Group, Prompt, pack_groups
from kernel_cases import Recorded

HEADS, KV_HEADS = 4, 2


def make_pack(tree, dtype=torch.float32, device="cpu", width=16):
    """A text-only pack of [(prompt length, completion lengths)], with random q, k, v and an upstream gradient."""
    g = torch.Generator().manual_seed(0)
    no_images = torch.empty(0, 3, dtype=torch.int64)
    groups = [
        Group(Prompt(torch.ones(p, dtype=torch.int64), torch.arange(p).expand(3, -1), None, no_images), [
            torch.ones(c, dtype=torch.int64) for c in completions
        ])
        for p, completions in tree
    ]  # fmt: skip
    pack = pack_groups(groups, image_token_id=-1)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    q, k, v, upstream = (torch.randn(len(pack.input_ids), h, width, generator=g).to(device, dtype) for h in heads)
    return pack.to(device), (q, k, v), upstream


def dense(q, k, v, visible):
    """(Q, heads, d) from the definition: softmax over the visible keys; `visible` is (Q, K) bool."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, float("-inf")).softmax(-1), v)


def by_mask(pack, q, k, v):
    """By the definition: a token attends to its own segment up to itself, and to all of the segment's parent."""
    visible = torch.zeros(len(q), len(q), dtype=torch.bool)
    for row, length, parent, count in pack.spans:
        visible[row : row + length, row : row + length] = torch.ones(length, length, dtype=torch.bool).tril()
        visible[row : row + length, parent : parent + count] = True
    return dense(q, k, v, visible)


def by_varlen_layout(pack, q, k, v):
    """As flash attention reads the varlen arguments: each segment's keys gathered, causal bottom-right."""
    keys, values = gather_keys(k, v, pack.kv_index, pack.cu_seqlens, pack.cu_seqlens_k, pack.max_q)
    bounds = [pairwise(offsets.tolist()) for offsets in (pack.cu_seqlens, pack.cu_seqlens_k)]
    out = []
    for (q_start, q_end), (k_start, k_end) in zip(*bounds, strict=True):
        queries, count = q_end - q_start, k_end - k_start
        assert queries <= pack.max_q and count <= pack.max_k
        visible = torch.ones(queries, count, dtype=torch.bool).tril(count - queries)
        out.append(dense(q[q_start:q_end], keys[k_start:k_end], values[k_start:k_end], visible))
    return torch.cat(out)


def run(attend, inputs, upstream):
    """Output and the gradients of q, k, v."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


TREES = {
    "two groups": [(5, (3, 1, 6)), (4, (2,))],
    "equal lengths": [(3, (4, 4, 4))],
    "prompts alone": [(4, ()), (1, ())],
    "one token each": [(1, (1, 1)), (1, (1,))],
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("path", ["buckets", "varlen layout"])
def test_equals_the_plain_mask(tree, path):
    """Forward and backward; the gathered keys' gradients add up over a prompt's completions."""
    pack, inputs, upstream = make_pack(tree)
    attention = PackedAttention(pack)

    def attend(q, k, v):
        return attention(0, q, k, v) if path == "buckets" else by_varlen_layout(pack, q, k, v)

    expected = run(lambda q, k, v: by_mask(pack, q, k, v), inputs, upstream)
    for ours, plain in zip(run(attend, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)


def test_varlen_call_is_accepted():
    """This torch accepts our arguments of its varlen attention, forward and backward: shapes alone, no device.

    The shared keys' gradients are summed by our operator, and by no atomics.
    """
    assert {pick_backend(torch.empty(1, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)} == {"sdpa"}
    pack, inputs, upstream = make_pack(TREES["two groups"], torch.bfloat16, "meta")
    attention = PackedAttention(pack, backend="varlen")
    with Recorded() as operators:
        results = run(lambda *qkv: attention(0, *qkv), inputs, upstream)
    assert operators.names.count("boxgrpo::sum_key_gradients") == 1
    assert not [name for name in operators.names if any(part in name for part in ("index_add", "scatter", "put"))]
    for result, like in zip(results, (upstream, *inputs), strict=True):
        assert result.shape[0] == like.shape[0] and result.dtype == torch.bfloat16


@pytest.fixture
def package(monkeypatch):
    """package(name, result): a package whose varlen function returns `result`; the list of its calls."""
    attention._flash_backend.cache_clear()

    def install(name, result):
        calls, module = [], ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.flash_attn_varlen_func = lambda *args, **options: calls.append((args, options)) or result
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    yield install
    attention._flash_backend.cache_clear()


@pytest.mark.parametrize(
    ("installed", "capability", "chosen"),
    [
        (("flash_attn_interface", "flash_attn"), (9, 0), "flash_attn_3"),
        (("flash_attn_interface", "flash_attn"), (8, 0), "flash_attn"),
        (("flash_attn_interface",), (10, 0), "varlen"),
        ((), (9, 0), "varlen"),
    ],
)
def test_the_fastest_installed_backend_is_chosen(installed, capability, chosen, package, monkeypatch):
    """FlashAttention-3 on Hopper alone."""
    for name in attention.FLASH_PACKAGES.values():
        if name in installed:
            package(name, None)
        else:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    assert pick_backend(x) == chosen
    assert pick_backend(SimpleNamespace(device=x.device, dtype=torch.float32)) == "sdpa"


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize(("backend", "name"), attention.FLASH_PACKAGES.items())
def test_a_flash_package_gets_the_packs_layout(backend, name, as_tuple, package):
    """By the argument names that FlashAttention 2 and 3 share; a tuple's first part is the output."""
    pack, (q, k, v), out = make_pack(TREES["two groups"])
    calls = package(name, (out, None) if as_tuple else out)
    assert PackedAttention(pack, backend)(0, q, k, v) is out
    ((args, options),) = calls
    for given, wanted in zip(args, (q, k[pack.kv_index], v[pack.kv_index]), strict=True):
        assert torch.equal(given, wanted)
    assert options.pop("causal") is True
    bounds = {"cu_seqlens_q": pack.cu_seqlens, "cu_seqlens_k": pack.cu_seqlens_k}
    assert options == bounds | {"max_seqlen_q": pack.max_q, "max_seqlen_k": pack.max_k}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["flash_attn_3", "flash_attn", "varlen", "sdpa", "auto"])
def test_backends_agree_on_the_device(backend, dtype):
    """Each backend's error against fp32 is at most one and a half times that of a plain softmax in its precision.

    A flash kernel refuses a batch of nothing: the pack of a rank without work must not reach it.
    """
    if (name := attention.FLASH_PACKAGES.get(backend)) and not importlib.util.find_spec(name):
        pytest.skip(f"{name} is not installed")
    if backend == "flash_attn_3" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("FlashAttention-3 is for Hopper")
    tree = [(300, (70, 1, 129)), (65, (64,)), (128, ())]
    pack, inputs, upstream = make_pack(tree, dtype, "cuda", width=128)
    on_cpu = pack.to("cpu")

    def plain(cast):
        leaves = [x.cpu().to(cast) for x in inputs]
        return [x.float() for x in run(lambda q, k, v: by_mask(on_cpu, q, k, v), leaves, upstream.cpu().to(cast))]

    truth, rounded = plain(torch.float32), plain(dtype)
    attention = PackedAttention(pack, backend)
    results = run(lambda q, k, v: attention(0, q, k, v), inputs, upstream)
    for name, ours, eager, exact in zip(("out", "dq", "dk", "dv"), results, rounded, truth, strict=True):
        error, allowed = (ours.cpu().float() - exact).norm(), (eager - exact).norm()
        assert error <= 1.5 * allowed + 1e-3 * exact.norm(), f"{backend} {name}"
    nothing, inputs, upstream = make_pack([], dtype, "cuda", width=128)
    attention = PackedAttention(nothing, backend)
    assert all(len(x) == 0 for x in run(lambda q, k, v: attention(0, q, k, v), inputs, upstream))
