"""Attention over a pack: the plain mask of DESIGN section 2 against the tree path and the varlen layout."""

import importlib.util

import pytest
import torch

from boxgrpo.model.attention import PackedAttention, pick_backend
from boxgrpo.model.batch import Group, Prompt
from boxgrpo.model.packing import pack_groups

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
    """Who sees whom, said plainly: a token sees its own segment up to itself, and all of its parent."""
    segment = torch.repeat_interleave(torch.arange(len(pack.parent)), pack.cu_seqlens.diff())  # (T)
    row = torch.arange(len(segment))
    own = (segment[:, None] == segment) & (row[:, None] >= row)
    return dense(q, k, v, own | (pack.parent[segment][:, None] == segment))


def by_varlen_layout(pack, q, k, v):
    """What flash attention makes of the varlen arguments: each segment's keys gathered, causal bottom-right."""
    keys, values = k[pack.kv_index], v[pack.kv_index]
    offsets, key_offsets = pack.cu_seqlens.tolist(), pack.cu_seqlens_k.tolist()
    out = []
    for s in range(len(pack.parent)):
        here, there = slice(offsets[s], offsets[s + 1]), slice(key_offsets[s], key_offsets[s + 1])
        queries, count = here.stop - here.start, there.stop - there.start
        assert queries <= pack.max_q and count <= pack.max_k
        visible = torch.ones(queries, count, dtype=torch.bool).tril(count - queries)
        out.append(dense(q[here], keys[there], values[there], visible))
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
    """This torch takes the arguments we hand to its varlen attention, forward and backward: shapes alone, no device."""
    pack, inputs, upstream = make_pack(TREES["two groups"], torch.bfloat16, "meta")
    attention = PackedAttention(pack, backend="varlen")
    for result, like in zip(run(lambda *qkv: attention(0, *qkv), inputs, upstream), (upstream, *inputs), strict=True):
        assert result.shape[0] == like.shape[0] and result.dtype == torch.bfloat16


def test_backend_by_tensor():
    assert pick_backend(torch.empty(1)) == "sdpa"
    assert pick_backend(torch.empty(1, dtype=torch.bfloat16)) == "sdpa"
    with pytest.raises(ValueError, match="attention backend is 'eager'; it must be auto, flash_attn, varlen, sdpa"):
        PackedAttention(make_pack(TREES["equal lengths"])[0], backend="eager")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["flash_attn", "varlen", "sdpa", "auto"])
def test_backends_agree_on_the_device(backend, dtype):
    """Each backend errs from the fp32 truth by no more than a plain softmax in the same precision, and a little."""
    if backend == "flash_attn" and not importlib.util.find_spec("flash_attn"):
        pytest.skip("flash_attn is not installed")
    tree = [(300, (70, 1, 129)), (65, (64,)), (128, ())]
    pack, inputs, upstream = make_pack(tree, dtype, "cuda", width=128)
    on_cpu = pack.to("cpu")

    def plain(inputs, upstream, cast):
        results = run(
            lambda q, k, v: by_mask(on_cpu, q, k, v), [x.cpu().to(cast) for x in inputs], upstream.cpu().to(cast)
        )
        return [x.float() for x in results]

    truth = plain(inputs, upstream, torch.float32)
    rounded = plain(inputs, upstream, dtype)
    attention = PackedAttention(pack, backend)
    results = run(lambda q, k, v: attention(0, q, k, v), inputs, upstream)
    for name, ours, eager, exact in zip(("out", "dq", "dk", "dv"), results, rounded, truth, strict=True):
        error, allowed = (ours.cpu().float() - exact).norm(), (eager - exact).norm()
        assert error <= 1.5 * allowed + 1e-3 * exact.norm(), f"{backend} {name}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["flash_attn", "varlen", "sdpa"])
def test_empty_pack_on_the_device(backend):
    """A flash kernel refuses a batch of nothing; the pack of a rank without work must not reach it."""
    pack, inputs, upstream = make_pack([], torch.bfloat16, "cuda", width=128)
    attention = PackedAttention(pack, backend)
    assert all(len(x) == 0 for x in run(lambda q, k, v: attention(0, q, k, v), inputs, upstream))
