"""Logits in chunks of rows, and the gradients that come back from them, for torch twins and Triton alike.

Of the head no (N, V) tensor of logits exists: a chunk of them is computed, used and written over by the next one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .checks import accumulation_dtype

MIB = 1 << 20
LOGIT_FLOOR = -1e30  # replaces a logit of -inf, so that p * log p is 0 and not NaN

# The buffers of `HeadSweep`, together below 1 GB; at V = 152k 512 rows of logits and 2048 of their bf16 gradients.
LOGIT_BYTES = 320 * 10**6
GRADIENT_BYTES = 640 * 10**6
ROW_MULTIPLE = 128  # of the matrix products' tiles


def chunk_rows(vocabulary: int, dtype: torch.dtype, device: torch.device, *, at_least: int) -> int:
    """Rows of a torch twin's chunk.

    On a CPU as many as fill 2 MiB, which stay in the cache, or `at_least` rows, but never more than 56 MiB.
    """
    row = max(vocabulary, 1) * dtype.itemsize
    if device.type != "cpu":
        return max(512 * MIB // row, 1)
    return max(min(max(2 * MIB // row, at_least), 56 * MIB // row), 1)


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, summed and stored in out's dtype. (Autocast leaves the out= forms alone.)"""
    return torch.mm(a, b, out=out, **_out_dtype(a, out))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a @ b, summed in total's dtype."""
    return torch.addmm(total, a, b, out=total, **_out_dtype(a, total))


def _out_dtype(a: Tensor, out: Tensor) -> dict:
    return {} if a.dtype == out.dtype else {"out_dtype": out.dtype}


class HeadGradients:
    """dhidden (N, H) and dweight (V, H), if wanted, summed from dlogits of some rows at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor, grad_hidden: bool, grad_weight: bool):
        self.hidden, self.weight = hidden, weight
        self.dhidden = self.dweight = None
        if grad_hidden:
            self.dhidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        if grad_weight:
            self.dweight = torch.zeros(weight.shape, dtype=accumulation_dtype(weight), device=weight.device)

    def add(self, rows: slice | Tensor, dlogits: Tensor) -> None:
        """Add the gradients that come from dlogits (n, V) of `rows`. Each row is given once."""
        hidden = self.hidden[rows]
        if self.dhidden is not None:
            self.dhidden[rows] = product(dlogits, self.weight, out=torch.empty_like(hidden))
        if self.dweight is not None:
            add_product(self.dweight, dlogits.t(), hidden)

    def results(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(dhidden, dweight) in `dtype`; an unwanted one is (0)."""
        none = self.hidden.new_empty(0, dtype=dtype)
        return tuple(none.clone() if x is None else x.to(dtype) for x in (self.dhidden, self.dweight))


class HeadSweep:
    """The logits of hidden (N, H) and weight (V, H) for Triton: (rows, logits, dlogits) for each chunk of rows.

    The logits are fp32, in one buffer. A kernel fills dlogits, in the head's dtype, before the next chunk is taken;
    once GRADIENT_BYTES of them are full, the two products of the backward take them together. Per logit that is 4
    bytes written and read, and 2 written and read twice (bf16).
    """

    def __init__(self, hidden: Tensor, weight: Tensor, grad_hidden: bool = False, grad_weight: bool = False):
        self.gradients = HeadGradients(hidden, weight, grad_hidden, grad_weight)
        self.wanted = grad_hidden or grad_weight

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        hidden, weight = self.gradients.hidden, self.gradients.weight
        n, vocabulary = hidden.shape[0], weight.shape[0]
        step = _rows_within(LOGIT_BYTES, vocabulary, 4)
        held = max(_rows_within(GRADIENT_BYTES, vocabulary, hidden.itemsize) // step, 1) * step
        logits = torch.empty(min(step, n), vocabulary, device=hidden.device)
        dlogits = hidden.new_empty(min(held, n) if self.wanted else 0, vocabulary)
        for first in range(0, n, held):
            end = min(first + held, n)
            for start in range(first, end, step):
                rows = slice(start, min(start + step, end))
                chunk = product(hidden[rows], weight.t(), out=logits[: rows.stop - start])
                yield rows, chunk, dlogits[start - first : rows.stop - first]
            if self.wanted:
                self.gradients.add(slice(first, end), dlogits[: end - first])

    def results(self) -> tuple[Tensor, Tensor]:
        """(dhidden, dweight) in the dtype of the inputs; an unwanted one is (0)."""
        return self.gradients.results(self.gradients.hidden.dtype)


class LogitSweep:
    """Given logits (N, V) for Triton, in one chunk; with `overwrite` their gradient is written over them."""

    def __init__(self, logits: Tensor, grad: bool = False, overwrite: bool = False):
        self.logits, self.wanted, self.overwrite = logits, grad, grad and overwrite
        self.dlogits = logits.new_empty(0)
        if grad:
            self.dlogits = logits if overwrite else torch.empty_like(logits, memory_format=torch.contiguous_format)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        yield slice(0, self.logits.shape[0]), self.logits, self.dlogits
        if self.overwrite:
            increment_version(self.logits)  # autograd does not see a kernel's writes

    def results(self) -> tuple[Tensor]:
        """(dlogits), (N, V), or (0) if unwanted."""
        return (self.dlogits,)


def _rows_within(limit: int, vocabulary: int, itemsize: int) -> int:
    rows = limit // (max(vocabulary, 1) * itemsize)
    return max(rows // ROW_MULTIPLE * ROW_MULTIPLE, ROW_MULTIPLE)
