"""Logits in chunks of rows and their backward pass, for the torch twins and the Triton kernels.

The full (N, V) logits of a head are never in memory: a chunk is computed, used, and overwritten by the next one.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .dispatch import accumulation_dtype

MIB = 1 << 20
LOGIT_FLOOR = -1e30  # replaces a logit of -inf, so that p * log p is 0 and not NaN

# Products in half precision on an H100 or H200: rows and columns of a tile of the result; multiprocessors. A wave is
# one tile on each of them, and a last wave of few tiles takes as long as a full one.
TILE, PROCESSORS = (128, 256), 132
# `HeadSweep`'s buffers for Triton: fp32 logits; logits and gradients together, beside what `sweep_rows` adds.
LOGIT_BYTES, BUFFER_BYTES = 320 * 10**6, 10**9


class SweepRows(NamedTuple):
    """Rows of `HeadSweep`'s buffers for Triton."""

    logits: int  # of one product
    gradients: int  # that both products of the backward consume at once


def sweep_rows(n: int, vocabulary: int, width: int, itemsize: int, grad_weight: bool) -> SweepRows:
    """Rows by whole waves of the products. With all n rows at once, dweight needs no sum in fp32.

    With logits at V = 152k of 512 rows (18 waves), 8192 rows need 3 waves of dhidden at H = 1536, by 2816 rows, and 7
    at H = 3584, by all of them. No more memory is used than by BUFFER_BYTES, the fp32 sum of dweight and its rounded
    copy. Where there is no sum, the gradients may have its bytes; else the buffers have the copy's, made after them.
    """
    logits = _rows_in_few_waves(n, LOGIT_BYTES // (4 * max(vocabulary, 1)), vocabulary)
    row = max(vocabulary, 1) * itemsize
    room = BUFFER_BYTES - 4 * logits * vocabulary
    rounded = width * row if grad_weight and itemsize < 4 else 0
    if n * row <= min(room + 3 * rounded, BUFFER_BYTES + 2 * rounded):  # beside the logits; then beside dweight
        return SweepRows(logits, n)
    return SweepRows(logits, _rows_in_few_waves(n, (room + rounded) // row, width))


def waves(rows: int, columns: int) -> int:
    """Waves of a product's result (rows, columns)."""
    return -(-(-(-rows // TILE[0]) * -(-columns // TILE[1])) // PROCESSORS)


def _rows_in_few_waves(n: int, most: int, columns: int) -> int:
    """Rows of each of several products that have n rows together: few waves, then few products, then few rows."""
    if n <= most:
        return n

    def cost(rows: int) -> tuple[int, int, int]:
        whole, rest = divmod(n, rows)
        return whole * waves(rows, columns) + waves(rest, columns), whole + (rest > 0), rows

    return min(range(TILE[0], max(most, TILE[0]) + 1, TILE[0]), key=cost)


def chunk_rows(vocabulary: int, dtype: torch.dtype, device: torch.device, *, at_least: int) -> int:
    """The number of rows in a chunk of a torch twin.

    On a CPU as many as fit into 2 MiB of cache, but not fewer than `at_least`, nor more than fit into 56 MiB.
    """
    row = max(vocabulary, 1) * dtype.itemsize
    if device.type != "cpu":
        return max(512 * MIB // row, 1)
    return max(min(max(2 * MIB // row, at_least), 56 * MIB // row), 1)


class HeadSweep:
    """The logits of hidden (N, H) and weight (V, H) in chunks; sums up dhidden (N, H) and dweight (V, H) if requested.

    Iteration yields (rows, logits, dlogits) for a Triton kernel. The logits are fp32, in one buffer. The kernel must
    fill dlogits, in the head's dtype, before the next chunk; both products of the backward consume as many rows of it
    as `sweep_rows` says. Traffic per logit: 4 bytes written and read, 2 (bf16) written once and read twice.
    """

    finite = True  # products of finite numbers: no logit is -inf

    def __init__(self, hidden: Tensor, weight: Tensor, grad_hidden=False, grad_weight=False, rounded: bool = True):
        """`rounded`: the gradients get the dtype of hidden and weight; else they keep that of their sums, fp32."""
        self.dtype = accumulation_dtype(hidden)
        self.input_dtype = hidden.dtype if rounded else self.dtype
        if hidden.device.type == "cpu":  # a CPU's products round half-precision results to half precision
            hidden, weight = hidden.to(self.dtype), weight.to(self.dtype)
        self.hidden, self.weight = hidden, weight
        self.wanted, self.grad_weight = grad_hidden or grad_weight, grad_weight
        dtype = hidden.dtype if rounded else self.dtype
        self.dhidden = hidden.new_empty(hidden.shape, dtype=dtype) if grad_hidden else None
        self.dweight = None  # the first product makes it
        self.dweight_dtype, self.product_dtype = self.dtype, dtype  # of a sum of products, and of one alone

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        (n, width), vocabulary = self.hidden.shape, self.weight.shape[0]
        step, gradient_rows = sweep_rows(n, vocabulary, width, self.hidden.itemsize, self.grad_weight)
        if not self.wanted or gradient_rows >= n:
            gradient_rows, self.dweight_dtype = max(n, 1), self.product_dtype
        buffer = self.hidden.new_empty(min(step, n), vocabulary, dtype=self.dtype)
        dlogits = self.hidden.new_empty(min(gradient_rows, n) if self.wanted else 0, vocabulary)
        for first in range(0, n, gradient_rows):
            end = min(first + gradient_rows, n)
            for start in range(first, end, step):
                rows = slice(start, min(start + step, end))
                logits = buffer[: rows.stop - start]
                self.product(self.hidden[rows], self.weight.t(), logits)
                yield rows, logits, dlogits[start - first : rows.stop - first]
            if end == n:
                del logits, buffer  # their memory is for dweight, where this is its only product
            if self.wanted:
                self.add(slice(first, end), dlogits[: end - first])

    def product(self, a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
        """out = a @ b, or out += a @ b, accumulated in fp32. Autocast does not apply to products with an `out`."""
        options = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
        if add:
            torch.addmm(out, a, b, out=out, **options)
        else:
            torch.mm(a, b, out=out, **options)

    def chunks(self, temperature: float = 1.0, live: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield row indices (n) int64 and their logits (n, V) / temperature, in one buffer; at least one chunk.

        On a CPU only rows with nonzero `live` (N) are computed; on a GPU, counting them would need a synchronisation.
        """
        n, vocabulary, device = self.hidden.shape[0], self.weight.shape[0], self.hidden.device
        if self.dhidden is not None:
            self.dhidden.zero_()  # a row without a gradient is not written
        # Each chunk reads and writes the whole of dweight, which with 128 rows takes little time beside the product.
        most = chunk_rows(vocabulary, self.dtype, device, at_least=128)
        step = -(-n // max(-(-n // most), 1))  # chunks of equal size, except the last
        buffer = self.hidden.new_empty(step, vocabulary, dtype=self.dtype)
        only_live = live is not None and device.type == "cpu"
        selected = live.nonzero().squeeze(1) if only_live else torch.arange(n, device=device)
        for rows in selected.split(step):
            logits = buffer[: len(rows)]
            self.product(self.hidden[rows], self.weight.t(), logits)
            yield rows, logits if temperature == 1.0 else logits.mul_(1 / temperature)

    def blocks(
        self, temperature: float, live: Tensor | None = None, live_is_final: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield row indices (n), their log-softmax (n, V) and an output buffer (n, V), for a torch twin.

        A block is a part of a chunk that fits into a CPU's cache. If gradients are requested, the twin must, before
        the next block, write dlogits into the output and set `live` (N) to nonzero for the rows with a gradient. The
        other rows are left out of the products with dlogits. With `live_is_final`, `live` is complete before the first
        block, and the logits of the other rows are not computed either.
        """
        size = chunk_rows(self.weight.shape[0], self.dtype, self.hidden.device, at_least=4)
        log_softmax = self.hidden.new_empty(min(size, self.hidden.shape[0]), self.weight.shape[0], dtype=self.dtype)
        for rows, logits in self.chunks(temperature, live if live_is_final else None):
            for part, block in zip(rows.split(size), logits.split(size), strict=True):
                yield part, torch.log_softmax(block, 1, out=log_softmax[: len(part)]), block
            if live is None:
                continue
            if self.hidden.device.type == "cpu":
                kept = live[rows].nonzero().squeeze(1)
                for to, at in enumerate(kept.tolist()):
                    if to < at:
                        logits[to] = logits[at]
                rows, logits = rows[kept], logits[: len(kept)]
            self.add(rows, logits)

    def add(self, rows: slice | Tensor, dlogits: Tensor) -> None:
        """Add the gradients that follow from the dlogits (n, V) of `rows`; each row must be added only once."""
        hidden, dlogits = self.hidden[rows], dlogits.to(self.weight.dtype)
        if self.dhidden is not None:
            of_rows = isinstance(rows, slice)
            out = self.dhidden[rows] if of_rows else torch.empty_like(hidden, dtype=self.dhidden.dtype)
            self.product(dlogits, self.weight, out)
            if not of_rows:
                self.dhidden[rows] = out
        if self.grad_weight:
            first = self.dweight is None
            if first:
                self.dweight = torch.empty_like(self.weight, dtype=self.dweight_dtype)
            self.product(dlogits.t(), hidden, self.dweight, add=not first)

    def results(self) -> tuple[Tensor, Tensor]:
        """(dhidden, dweight) in the dtype of the inputs; one that was not requested has shape (0)."""
        none = self.hidden.new_empty(0, dtype=self.input_dtype)
        if self.grad_weight and self.dweight is None:  # there are no rows
            self.dweight = torch.zeros_like(self.weight)
        return tuple(none.clone() if x is None else x.to(self.input_dtype) for x in (self.dhidden, self.dweight))


class LogitSweep:
    """`HeadSweep`'s interface for logits (N, V) that already exist; `overwrite`: their gradient replaces them.

    Iteration yields all rows in one chunk.
    """

    finite = False

    def __init__(self, logits: Tensor, grad: bool = False, overwrite: bool = False):
        self.logits, self.wanted, self.overwrite = logits, grad, grad and overwrite
        self.dtype, self.dlogits = accumulation_dtype(logits), logits.new_empty(0)
        if grad:
            self.dlogits = logits if overwrite else torch.empty_like(logits, memory_format=torch.contiguous_format)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        yield slice(0, self.logits.shape[0]), self.logits, self.dlogits
        if self.overwrite:
            increment_version(self.logits)  # autograd does not see a kernel's writes

    def blocks(
        self, temperature: float, live: Tensor | None = None, live_is_final: bool = False
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """As `HeadSweep.blocks`, but always over all rows: the gradient of a row that is not live is zero."""
        n, vocabulary = self.logits.shape
        most = chunk_rows(vocabulary, self.dtype, self.logits.device, at_least=4)
        step = -(-n // max(-(-n // most), 1)) or 1  # blocks of equal size, except the last
        buffer, log_softmax = self.logits.new_empty(2, min(step, n), vocabulary, dtype=self.dtype)
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            logits = buffer[: rows.stop - start].copy_(self.logits[rows])
            if temperature != 1.0:
                logits.mul_(1 / temperature)
            torch.log_softmax(logits.clamp_(min=LOGIT_FLOOR), 1, out=log_softmax[: len(logits)])
            # Write into `dlogits` only for a gradient: it may be the logits, which another sweep reads again.
            in_place = live is not None and self.dlogits.dtype == self.dtype
            out = self.dlogits[rows] if in_place else logits
            yield rows, log_softmax[: len(logits)], out
            if live is None:
                continue
            if not in_place:
                self.dlogits[rows] = out
            zero = live[rows] == 0
            if zero.device.type != "cpu" or zero.any():  # also replaces NaN
                self.dlogits[rows].masked_fill_(zero.unsqueeze(1), 0)

    def results(self) -> tuple[Tensor]:
        """(dlogits): (N, V), or (0) if it was not requested."""
        return (self.dlogits,)


def forward(
    sweep: HeadSweep | LogitSweep, targets: Tensor, temperature: float, entropy: bool, gradient: Callable | None = None
) -> tuple[Tensor, Tensor]:
    """logps (N) and entropy (N) in nats; the entropy has shape (0) if it was not requested.

    `gradient(rows, logps)` returns d loss / d logps of a block. If it is given, dlogits are computed from each block's
    probabilities before the next block; it requires `entropy`.
    """
    assert entropy or gradient is None
    n = targets.shape[0]
    logps, entropies = (targets.new_zeros(size, dtype=sweep.dtype) for size in (n, n if entropy else 0))
    dlogps = None if gradient is None else torch.zeros_like(logps)
    for rows, log_softmax, out in sweep.blocks(temperature, dlogps):
        chosen = targets[rows].unsqueeze(1)
        logps[rows] = log_softmax.gather(1, chosen).squeeze(1)
        if not entropy:
            continue
        probabilities = torch.exp(log_softmax, out=out)
        entropies[rows] = -log_softmax.mul_(probabilities).sum(1)
        if gradient is not None:
            dlogps[rows] = gradient(rows, logps[rows])
            scale = (dlogps[rows] / temperature).unsqueeze(1)
            probabilities.mul_(-scale).scatter_add_(1, chosen, scale)  # d logp / d z = onehot - p
    return logps, entropies


def backward(
    sweep: HeadSweep | LogitSweep, targets: Tensor, temperature: float, dlogps: Tensor, entropy=None, dentropy=None
) -> None:
    """Recompute the logits and backpropagate d/dlogps (N) and d/dentropy (N) into the sweep's gradients.

    `entropy` (N) is the forward's result, or None or of shape (0) if it was not requested.
    """
    with_entropy = entropy is not None and entropy.numel() == targets.numel()
    live = (dlogps != 0) | (dentropy != 0) if with_entropy else dlogps != 0
    for rows, log_softmax, out in sweep.blocks(temperature, live, live_is_final=True):
        probabilities = torch.exp(log_softmax, out=out)
        if with_entropy:  # d entropy / d z = -p (log p + entropy)
            scale = (dentropy[rows] / temperature).unsqueeze(1)
            log_softmax.add_(entropy[rows].unsqueeze(1)).mul_(probabilities).mul_(scale)
        scale = (dlogps[rows] / temperature).unsqueeze(1)
        dlogits = probabilities.mul_(-scale).scatter_add_(1, targets[rows].unsqueeze(1), scale)
        if with_entropy:
            dlogits.sub_(log_softmax)
