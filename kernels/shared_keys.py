"""Keys and values of a pack as its segments read them: a prompt's rows once for itself and once for each completion."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import FLOATS, INTS, accumulation_dtype, call, check_tensor, register, runs_fast


def sum_key_gradients_torch(
    dk: Tensor, dv: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, rows: int, max_q: int
) -> tuple[Tensor, Tensor]:
    """(T_kv, heads, d) of what the segments read -> (T, heads, d) of the rows, summed in fp32, in the segments' order.

    `rows` is T, `max_q` the longest segment.
    """
    lengths, keys = cu_seqlens.diff().tolist(), cu_seqlens_k.diff().tolist()
    results = []
    for gradient in (dk, dv):
        exact, sums, prompt = gradient.to(accumulation_dtype(gradient)), [], 0
        for length, read in zip(lengths, exact.split(keys), strict=True):
            shared, own = read.split((len(read) - length, length))
            if len(shared):
                sums[prompt] = sums[prompt] + shared
            else:
                prompt = len(sums)
            sums.append(own)
        results.append(torch.cat(sums).to(gradient.dtype))
    return tuple(results)


def gather_keys(
    k: Tensor, v: Tensor, kv_index: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, max_q: int, *, backend="auto"
) -> tuple[Tensor, Tensor]:
    """k[kv_index] and v[kv_index]; a row's gradient is summed over its readers in fp32, in order, and rounded once.

    (The backward of indexing adds them in the tensors' dtype, on a GPU in any order.) Where no row is read twice, k and
    v are returned as they are. Layout: ARCHITECTURE.md, section "Packed batch".

    Args:
        k, v: (T, heads, d) float, of one dtype.
        kv_index: (T_kv) int64: for each segment the rows of its prompt, if it is a completion, then its own. The
            completions of a prompt follow it.
        cu_seqlens, cu_seqlens_k: (S+1) int32 or int64, offsets of the segments into T and T_kv.
        max_q: the longest segment's rows.

    Returns:
        (T_kv, heads, d) each, differentiable once.

    Raises:
        ValueError: a shape or a dtype does not fit.
    """
    check_tensor("k", k, (None, None, None), FLOATS)
    check_tensor("v", v, tuple(k.shape), (k.dtype,))
    check_tensor("kv_index", kv_index, (None,), (torch.int64,))
    check_tensor("cu_seqlens", cu_seqlens, (None,), INTS)
    check_tensor("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens.shape), INTS)
    triton = runs_fast("gather_keys", backend, k)
    if len(kv_index) == len(k):
        return k, v
    return _Gather.apply(k, v, kv_index, cu_seqlens, cu_seqlens_k, max_q, triton)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, v, kv_index, cu_seqlens, cu_seqlens_k, *options):
        ctx.save_for_backward(cu_seqlens, cu_seqlens_k)
        ctx.options = len(k), *options
        return k.index_select(0, kv_index), v.index_select(0, kv_index)

    @staticmethod
    @once_differentiable
    def backward(ctx, dk, dv):
        return *call(torch.ops.boxgrpo.sum_key_gradients, _run, dk, dv, *ctx.saved_tensors, *ctx.options), *(None,) * 5


def _fake(dk, dv, cu_seqlens, cu_seqlens_k, rows, *_):
    return tuple(x.new_empty(rows, *x.shape[1:]) for x in (dk, dv))


_, _run = register(
    "(Tensor dk, Tensor dv, Tensor cu_seqlens, Tensor cu_seqlens_k, int rows, int max_q, bool triton) "
    "-> (Tensor, Tensor)",
    sum_key_gradients_torch,
    _fake,
)
