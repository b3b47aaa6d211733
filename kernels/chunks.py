"""The vocabulary sweep under every head and logits door: rows in chunks, so that no (N, V) tensor of logits is made.

A source gives fp32 (fp64 for fp64 inputs) rows of logits / temperature and takes back the gradient of those rows.
`HeadRows` multiplies hidden states by the head; `LogitRows` reads logits that already exist.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .checks import accumulation_dtype

MIB = 1 << 20
LOGIT_FLOOR = -1e30  # stands for a logit of -inf, so that p * log p is 0 and not NaN


def chunk_rows(vocabulary: int, dtype: torch.dtype, device: torch.device, *, at_least: int) -> int:
    """Rows of one chunk. On a CPU 2 MiB stay in the cache; `at_least` rows are worth leaving it, up to 56 MiB."""
    row = max(vocabulary, 1) * dtype.itemsize
    if device.type != "cpu":
        return max(512 * MIB // row, 1)
    return max(min(max(2 * MIB // row, at_least), 56 * MIB // row), 1)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, accumulated and stored in out's dtype (the out= forms are also the ones that autocast leaves be)."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return out.copy_(torch.mm(a, b, out_dtype=out.dtype))


class _Rows:
    """Rows in chunks, and a chunk in blocks that stay in a CPU's cache through all that is done to a logit."""

    def __init__(self, n: int, vocabulary: int, like: Tensor, temperature: float, at_least: int):
        self.n, self.temperature, self.dtype = n, temperature, accumulation_dtype(like)
        chunks = -(-n // chunk_rows(vocabulary, self.dtype, like.device, at_least=at_least))
        self.step = -(-n // max(chunks, 1)) or 1  # all but the last alike
        self.on_cpu = like.device.type == "cpu"
        self.block = min(self.step, chunk_rows(vocabulary, self.dtype, like.device, at_least=4))
        # Buffers are made once: fresh ones would be paged in anew for every chunk.
        self.chunk = torch.empty(min(self.step, n), vocabulary, dtype=self.dtype, device=like.device)
        self.spare = torch.empty(min(self.block, n), vocabulary, dtype=self.dtype, device=like.device)

    def new(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.chunk.device)

    def chunks(self, live: Tensor | None = None) -> list:
        """Row selections that cover all rows, or only those where `live` (N) bool is set. At least one chunk."""
        # On an accelerator nonzero() would wait for the device; there every row is swept.
        if live is not None and self.on_cpu:
            rows = live.nonzero().squeeze(1)
            if rows.numel() < self.n:
                return list(rows.split(self.step))
        return [slice(at, min(at + self.step, self.n)) for at in range(0, max(self.n, 1), self.step)]

    def blocks(self, rows) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """Makes the logits of a chunk; (row selection, those logits) for each of its blocks."""
        logits = self.logits(rows)
        for at in range(0, max(logits.shape[0], 1), self.block):
            end = min(at + self.block, logits.shape[0])
            selected = slice(rows.start + at, rows.start + end) if isinstance(rows, slice) else rows[at:end]
            yield selected, logits[at:end]

    def log_softmax(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits, 1, out=self.spare[: logits.shape[0]])


class HeadRows(_Rows):
    """Rows of hidden @ weight.T. Sums dhidden (N, H) and dweight (V, H), if wanted, in the accumulation dtype."""

    def __init__(self, hidden, weight, temperature, grad_hidden=False, grad_weight=False):
        # Each chunk reads and writes the whole of dweight: 128 rows make that small beside the product itself.
        super().__init__(hidden.shape[0], weight.shape[0], hidden, temperature, at_least=128)
        if self.on_cpu:  # CPU GEMMs round half-precision results to half precision
            hidden, weight = hidden.to(self.dtype), weight.to(self.dtype)
        self.hidden, self.weight = hidden, weight
        self.dhidden = self.new(*hidden.shape) if grad_hidden else None
        self.dweight = self.new(*weight.shape) if grad_weight else None

    def logits(self, rows) -> Tensor:
        hidden = self.hidden[rows]
        logits = _product(hidden, self.weight.t(), self.chunk[: hidden.shape[0]])
        return logits if self.temperature == 1.0 else logits.mul_(1 / self.temperature)

    def room(self, rows, logits: Tensor) -> Tensor:
        """Where the gradient of a block goes: in the place of its logits, until `accept` takes the whole chunk."""
        return logits

    def keep(self, rows, dlogits: Tensor) -> None:
        pass

    def accept(self, rows, live: Tensor, dlogits: Tensor | None = None) -> None:
        """Push a chunk's dlogits (n, V), those in its place by default, through the head.

        Rows whose `live` (n) is zero carry no gradient and are dropped first; dlogits is overwritten by that.
        """
        dlogits = self.chunk[: live.shape[0]] if dlogits is None else dlogits
        if self.on_cpu and isinstance(rows, slice):
            kept = live.nonzero().squeeze(1)
            if kept.numel() < live.numel():
                for to, at in enumerate(kept.tolist()):
                    if to < at:
                        dlogits[to] = dlogits[at]
                dlogits, rows = dlogits[: kept.numel()], kept + rows.start
        dlogits = dlogits.to(self.weight.dtype)
        hidden = self.hidden[rows]
        if self.dhidden is not None:
            self.dhidden[rows] = _product(dlogits, self.weight, self.new(*hidden.shape))
        if self.dweight is None:
            return
        if hidden.dtype == self.dtype:
            self.dweight.addmm_(dlogits.t(), hidden)
        else:
            self.dweight.add_(torch.mm(dlogits.t(), hidden, out_dtype=self.dtype))

    def gradients(self, like_hidden: Tensor, like_weight: Tensor) -> tuple[Tensor, Tensor]:
        """(dhidden, dweight) in the dtypes of the inputs; an unwanted one is an empty tensor."""
        dhidden = like_hidden.new_empty(0) if self.dhidden is None else self.dhidden.to(like_hidden.dtype)
        dweight = like_weight.new_empty(0) if self.dweight is None else self.dweight.to(like_weight.dtype)
        return dhidden, dweight


class LogitRows(_Rows):
    """Rows of given logits. `dlogits` (N, V), if wanted, is the logits' own storage where `overwrite` is set."""

    def __init__(self, logits, temperature, grad=False, overwrite=False):
        super().__init__(*logits.shape, logits, temperature, at_least=4)
        self.source = logits
        self.dlogits = None
        if grad:
            self.dlogits = logits if overwrite else torch.empty_like(logits, memory_format=torch.contiguous_format)

    def logits(self, rows) -> Tensor:
        source = self.source[rows]
        logits = self.chunk[: source.shape[0]].copy_(source)
        if self.temperature != 1.0:
            logits.mul_(1 / self.temperature)
        return logits.clamp_(min=LOGIT_FLOOR)

    def chunks(self, live: Tensor | None = None) -> list:
        return super().chunks()  # every row of dlogits must be written, the zero ones too

    def room(self, rows, logits: Tensor) -> Tensor:
        return self.dlogits[rows] if self.dlogits.dtype == self.dtype else logits

    def keep(self, rows, dlogits: Tensor) -> None:
        if dlogits.dtype != self.dlogits.dtype:
            self.dlogits[rows] = dlogits.to(self.dlogits.dtype)

    def accept(self, rows, live: Tensor) -> None:
        """Each block was kept; a row that nothing flows back to is 0, even one of NaN."""
        dead = live == 0
        if not self.on_cpu or dead.any():
            self.dlogits[rows].masked_fill_(dead.unsqueeze(1), 0)


def forward(
    source: HeadRows | LogitRows, targets: Tensor, entropy: bool, gradient: Callable | None = None
) -> tuple[Tensor, Tensor]:
    """logps (N) and entropy (N), or (0) if not asked for, in nats.

    `gradient(rows, logps)` gives d loss / d logps of a block; then the block's gradient is made at once, from the
    probabilities at hand. It needs `entropy`.
    """
    assert entropy or gradient is None
    logps, entropies = source.new(source.n), source.new(source.n if entropy else 0)
    for chunk in source.chunks():
        pushed = []
        for rows, logits in source.blocks(chunk):
            log_softmax = source.log_softmax(logits)
            chosen = targets[rows].unsqueeze(1)
            logps[rows] = log_softmax.gather(1, chosen).squeeze(1)
            if not entropy:
                continue
            # Without a gradient to push, the source's own room is not ours: a later pass may read those logits again.
            room = logits if gradient is None else source.room(rows, logits)
            probabilities = torch.exp(log_softmax, out=room)
            entropies[rows] = -log_softmax.mul_(probabilities).sum(1)
            if gradient is not None:
                pushed.append(gradient(rows, logps[rows]))
                source.keep(rows, _softmax_gradient(source, probabilities, chosen, pushed[-1]))
        if pushed:
            source.accept(chunk, torch.cat(pushed))
    return logps, entropies


def backward(source: HeadRows | LogitRows, targets: Tensor, dlogps: Tensor, entropy=None, dentropy=None) -> None:
    """Compute the logits again and push d/dlogps (N) and, with `entropy` (N) of the forward, d/dentropy (N)."""
    live = dlogps != 0 if dentropy is None else (dlogps != 0) | (dentropy != 0)
    for chunk in source.chunks(live):
        for rows, logits in source.blocks(chunk):
            log_softmax = source.log_softmax(logits)
            probabilities = torch.exp(log_softmax, out=source.room(rows, logits))
            if dentropy is not None:  # d entropy / d z = -p (log p + entropy)
                scale = (dentropy[rows] / source.temperature).unsqueeze(1)
                log_softmax.add_(entropy[rows].unsqueeze(1)).mul_(probabilities).mul_(scale)
            dlogits = _softmax_gradient(source, probabilities, targets[rows].unsqueeze(1), dlogps[rows])
            if dentropy is not None:
                dlogits.sub_(log_softmax)
            source.keep(rows, dlogits)
        source.accept(chunk, live[chunk])


def _softmax_gradient(source, probabilities: Tensor, chosen: Tensor, dlogps: Tensor) -> Tensor:
    """d logp / d z = onehot - p, in the place of the probabilities."""
    scale = (dlogps / source.temperature).unsqueeze(1)
    return probabilities.mul_(-scale).scatter_add_(1, chosen, scale)
