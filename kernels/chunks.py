"""Rows of logits in chunks, and the gradients that come back from them, for torch twins and Triton alike.

Of the head no (N, V) tensor of logits exists: a chunk of them is computed, used and written over by the next one.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .dispatch import accumulation_dtype

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


class _Rows:
    """Rows in chunks, and a chunk in blocks that stay in a CPU's cache through all operations on a logit."""

    def __init__(self, n: int, vocabulary: int, like: Tensor, temperature: float, at_least: int):
        self.n, self.temperature, self.dtype = n, temperature, accumulation_dtype(like)
        chunks = -(-n // chunk_rows(vocabulary, self.dtype, like.device, at_least=at_least))
        self.step = -(-n // max(chunks, 1)) or 1  # chunks of one size, but for the last
        self.on_cpu = like.device.type == "cpu"
        self.block = min(self.step, chunk_rows(vocabulary, self.dtype, like.device, at_least=4))
        # Buffers are allocated once: new ones would have to be paged in for every chunk.
        self.chunk = torch.empty(min(self.step, n), vocabulary, dtype=self.dtype, device=like.device)
        self.spare = torch.empty(min(self.block, n), vocabulary, dtype=self.dtype, device=like.device)

    def new(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.chunk.device)

    def chunks(self, live: Tensor | None = None) -> list:
        """Row selections that cover all rows, or only those where `live` (N) bool is set. At least one chunk."""
        # On an accelerator nonzero() would wait for the device; there all rows are computed.
        if live is not None and self.on_cpu:
            rows = live.nonzero().squeeze(1)
            if rows.numel() < self.n:
                return list(rows.split(self.step))
        return [slice(at, min(at + self.step, self.n)) for at in range(0, max(self.n, 1), self.step)]

    def blocks(self, rows) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """Computes the logits of a chunk; gives (row selection, logits) for each of its blocks."""
        logits = self.logits(rows)
        for at in range(0, max(logits.shape[0], 1), self.block):
            end = min(at + self.block, logits.shape[0])
            selected = slice(rows.start + at, rows.start + end) if isinstance(rows, slice) else rows[at:end]
            yield selected, logits[at:end]


class HeadRows(_Rows):
    """Rows of hidden @ weight.T. Sums dhidden (N, H) and dweight (V, H), if wanted, in the accumulation dtype."""

    def __init__(self, hidden, weight, temperature, grad_hidden=False, grad_weight=False):
        # Each chunk reads and writes the whole of dweight: with 128 rows that is little beside the product itself.
        super().__init__(hidden.shape[0], weight.shape[0], hidden, temperature, at_least=128)
        self.input_dtype = hidden.dtype
        if self.on_cpu:  # CPU GEMMs round half-precision results to half precision
            hidden, weight = hidden.to(self.dtype), weight.to(self.dtype)
        self.hidden, self.weight = hidden, weight
        self.gradients = HeadGradients(hidden, weight, grad_hidden, grad_weight)

    def logits(self, rows) -> Tensor:
        hidden = self.hidden[rows]
        logits = product(hidden, self.weight.t(), out=self.chunk[: hidden.shape[0]])
        return logits if self.temperature == 1.0 else logits.mul_(1 / self.temperature)

    def gradient_buffer(self, rows, logits: Tensor) -> Tensor:
        """Where the gradient of a block goes: over its logits, until `finish_chunk` takes the whole chunk."""
        return logits

    def finish_block(self, rows, dlogits: Tensor) -> None:
        pass

    def finish_chunk(self, rows, live: Tensor, dlogits: Tensor | None = None) -> None:
        """Push a chunk's dlogits (n, V), those in the chunk's buffer by default, through the head.

        Rows whose `live` (n) is zero carry no gradient. They are dropped first, which writes over dlogits.
        """
        dlogits = self.chunk[: live.shape[0]] if dlogits is None else dlogits
        if self.on_cpu and isinstance(rows, slice):
            kept = live.nonzero().squeeze(1)
            if kept.numel() < live.numel():
                for to, at in enumerate(kept.tolist()):
                    if to < at:
                        dlogits[to] = dlogits[at]
                dlogits, rows = dlogits[: kept.numel()], kept + rows.start
        self.gradients.add(rows, dlogits.to(self.weight.dtype))

    def results(self) -> tuple[Tensor, Tensor]:
        """(dhidden, dweight) in the dtype of the inputs; an unwanted one is (0)."""
        return self.gradients.results(self.input_dtype)


class LogitRows(_Rows):
    """Rows of given logits. `dlogits` (N, V), if wanted, is the logits' own storage where `overwrite` is set."""

    def __init__(self, logits, temperature, grad=False, overwrite=False):
        super().__init__(*logits.shape, logits, temperature, at_least=4)
        sweep = LogitSweep(logits, grad, overwrite)
        self.source, self.dlogits, self.results = logits, sweep.dlogits, sweep.results

    def logits(self, rows) -> Tensor:
        source = self.source[rows]
        logits = self.chunk[: source.shape[0]].copy_(source)
        if self.temperature != 1.0:
            logits.mul_(1 / self.temperature)
        return logits.clamp_(min=LOGIT_FLOOR)

    def chunks(self, live: Tensor | None = None) -> list:
        return super().chunks()  # every row of dlogits must be written, the zeros too

    def gradient_buffer(self, rows, logits: Tensor) -> Tensor:
        return self.dlogits[rows] if self.dlogits.dtype == self.dtype else logits

    def finish_block(self, rows, dlogits: Tensor) -> None:
        if dlogits.dtype != self.dlogits.dtype:
            self.dlogits[rows] = dlogits.to(self.dlogits.dtype)

    def finish_chunk(self, rows, live: Tensor) -> None:
        """Every block is written; a row without an upstream gradient becomes 0, even where it is NaN."""
        dead = live == 0
        if not self.on_cpu or dead.any():
            self.dlogits[rows].masked_fill_(dead.unsqueeze(1), 0)


def forward(
    source: HeadRows | LogitRows, targets: Tensor, entropy: bool, gradient: Callable | None = None
) -> tuple[Tensor, Tensor]:
    """logps (N) and entropy (N), or (0) if not wanted, in nats.

    `gradient(rows, logps)` gives d loss / d logps of a block; then the block's gradient is computed at once, from its
    probabilities. It needs `entropy`.
    """
    assert entropy or gradient is None
    logps, entropies = source.new(source.n), source.new(source.n if entropy else 0)
    for chunk in source.chunks():
        pushed = []
        for rows, logits in source.blocks(chunk):
            log_softmax = torch.log_softmax(logits, 1, out=source.spare[: logits.shape[0]])
            chosen = targets[rows].unsqueeze(1)
            logps[rows] = log_softmax.gather(1, chosen).squeeze(1)
            if not entropy:
                continue
            # Without a gradient the source's own buffer may not be used: a later pass may read those logits again.
            buffer = logits if gradient is None else source.gradient_buffer(rows, logits)
            probabilities = torch.exp(log_softmax, out=buffer)
            entropies[rows] = -log_softmax.mul_(probabilities).sum(1)
            if gradient is not None:
                pushed.append(gradient(rows, logps[rows]))
                source.finish_block(rows, _softmax_gradient(source, probabilities, chosen, pushed[-1]))
        if pushed:
            source.finish_chunk(chunk, torch.cat(pushed))
    return logps, entropies


def backward(source: HeadRows | LogitRows, targets: Tensor, dlogps: Tensor, entropy=None, dentropy=None) -> None:
    """Compute the logits again and push d/dlogps (N) and, with `entropy` (N) of the forward, d/dentropy (N)."""
    live = dlogps != 0 if dentropy is None else (dlogps != 0) | (dentropy != 0)
    for chunk in source.chunks(live):
        for rows, logits in source.blocks(chunk):
            log_softmax = torch.log_softmax(logits, 1, out=source.spare[: logits.shape[0]])
            probabilities = torch.exp(log_softmax, out=source.gradient_buffer(rows, logits))
            if dentropy is not None:  # d entropy / d z = -p (log p + entropy)
                scale = (dentropy[rows] / source.temperature).unsqueeze(1)
                log_softmax.add_(entropy[rows].unsqueeze(1)).mul_(probabilities).mul_(scale)
            dlogits = _softmax_gradient(source, probabilities, targets[rows].unsqueeze(1), dlogps[rows])
            if dentropy is not None:
                dlogits.sub_(log_softmax)
            source.finish_block(rows, dlogits)
        source.finish_chunk(chunk, live[chunk])


def _softmax_gradient(source, probabilities: Tensor, chosen: Tensor, dlogps: Tensor) -> Tensor:
    """d logp / d z = onehot - p, over the probabilities."""
    scale = (dlogps / source.temperature).unsqueeze(1)
    return probabilities.mul_(-scale).scatter_add_(1, chosen, scale)
