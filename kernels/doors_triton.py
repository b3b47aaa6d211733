"""The ops over the vocabulary on Triton: logits as they are given, a head's logits in chunks between cuBLAS products.

A head's logits are made in fp32, a chunk of rows at a time, and the kernel turns each into a chunk of gradients in the
head's dtype; once as many of those have come together as fit, the two products of the backward take them. Per logit
that is 4 bytes written and read, and 2 written and read twice (bf16); in FLOP 6·N·V·H for the fused loss, 4 with a
frozen head, 8 for token_logps with its backward.
"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .loss import LossOptions
from .loss_triton import grpo_loss_triton, reduce_launch, terms_triton
from .rows_triton import fused_launch, gradient_launch, logps_launch

# Together below 1 GB; at V = 152k 512 rows of logits and 2048 of their bf16 gradients.
LOGIT_BYTES = 320 * 10**6
GRADIENT_BYTES = 640 * 10**6
ROW_MULTIPLE = 128  # of the products' tiles


def token_logps_from_logits_triton(logits, targets, temperature: float, entropy: bool) -> tuple[Tensor, ...]:
    """logps (N), entropy (N) or (0), and what the backward needs: state (2, N), each row's maximum and log2 of its sum.

    One read of the logits: 2·N·V bytes in bf16.
    """
    logps, nats, state = _logps_room(logits)
    logps_launch(logits, targets, temperature, logps, nats, *state).run()
    return logps, nats if entropy else nats.new_empty(0), state


def token_logps_from_logits_backward_triton(
    logits, targets, temperature, entropy, state, dlogps, dentropy, overwrite: bool = False
) -> Tensor:
    """dlogits (N, V): one read and one write; a row that nothing flows back to is not read."""
    dlogits = logits if overwrite else torch.empty_like(logits, memory_format=torch.contiguous_format)
    _gradient(logits, targets, temperature, entropy, state, dlogps, dentropy, dlogits)
    if overwrite:
        increment_version(logits)  # autograd does not see a kernel's writes
    return dlogits


def fused_grpo_loss_from_logits_triton(
    logits, targets, advantages, completion_cu, temperature, grad: bool, *options, overwrite: bool = False
) -> tuple[Tensor, ...]:
    """loss (), dlogits (N, V) or (0), logps (N), entropy (N), stats (7): one read and one write at the token level."""
    o = LossOptions(*options)
    if grad and o.importance_sampling_level == "token":
        dlogits = logits if overwrite else torch.empty_like(logits, memory_format=torch.contiguous_format)
        terms, out = terms_triton(targets.shape[0], advantages, completion_cu, o), _FusedResults(targets)
        fused_launch(logits, targets, temperature, terms, o, *out.per_token, dlogits).run()
        if overwrite:
            increment_version(logits)  # autograd does not see a kernel's writes
        loss, stats = out.reduced()
        return loss, dlogits, out.logps, out.entropy, stats
    logps, nats, state = token_logps_from_logits_triton(logits, targets, temperature, True)
    loss, dlogps, stats = grpo_loss_triton(logps, advantages, completion_cu, *options)
    dlogits = logits.new_empty(0)
    if grad:
        none = nats.new_empty(0)
        dlogits = token_logps_from_logits_backward_triton(
            logits, targets, temperature, none, state, dlogps, none, overwrite
        )
    return loss, dlogits, logps, nats, stats


def token_logps_triton(hidden, weight, targets, temperature: float, entropy: bool) -> tuple[Tensor, ...]:
    """As token_logps_from_logits_triton, from hidden (N, H) and weight (V, H): 2·N·V·H FLOP."""
    logps, nats, state = _logps_room(hidden)
    for rows, logits in _logit_chunks(hidden, weight):
        logps_launch(logits, targets[rows], temperature, logps[rows], nats[rows], *state[:, rows]).run()
    return logps, nats if entropy else nats.new_empty(0), state


def token_logps_backward_triton(
    hidden, weight, targets, temperature, entropy, state, dlogps, dentropy, grad_hidden, grad_weight
) -> tuple[Tensor, Tensor]:
    """dhidden (N, H), dweight (V, H); an unwanted one is (0). Computes the logits again: 6·N·V·H FLOP."""
    gradients = _HeadGradients(hidden, weight, grad_hidden, grad_weight)
    for rows, logits in _logit_chunks(hidden, weight):
        some = [x[rows] if x.numel() else x for x in (entropy, dentropy)]
        dlogits = gradients.room(rows)
        _gradient(logits, targets[rows], temperature, some[0], state[:, rows], dlogps[rows], some[1], dlogits)
        gradients.filled(rows)
    return gradients.results()


def fused_grpo_loss_triton(
    hidden, weight, targets, advantages, completion_cu, temperature, grad_hidden, grad_weight, *options
) -> tuple[Tensor, ...]:
    """loss (), dhidden (N, H), dweight (V, H), logps (N), entropy (N), stats (7); an unwanted gradient is (0)."""
    o = LossOptions(*options)
    if (grad_hidden or grad_weight) and o.importance_sampling_level == "token":
        terms, out = terms_triton(targets.shape[0], advantages, completion_cu, o), _FusedResults(targets)
        gradients = _HeadGradients(hidden, weight, grad_hidden, grad_weight)
        for rows, logits in _logit_chunks(hidden, weight):
            dlogits = gradients.room(rows)
            rest = o, *out.per_token, dlogits
            fused_launch(logits, targets, temperature, terms, *rest, first=rows.start).run()
            gradients.filled(rows)
        loss, stats = out.reduced()
        return loss, *gradients.results(), out.logps, out.entropy, stats
    logps, nats, state = token_logps_triton(hidden, weight, targets, temperature, True)
    loss, dlogps, stats = grpo_loss_triton(logps, advantages, completion_cu, *options)
    dhidden, dweight = hidden.new_empty(0), weight.new_empty(0)
    if grad_hidden or grad_weight:
        none = nats.new_empty(0)
        dhidden, dweight = token_logps_backward_triton(
            hidden, weight, targets, temperature, none, state, dlogps, none, grad_hidden, grad_weight
        )
    return loss, dhidden, dweight, logps, nats, stats


class _FusedResults:
    """What the fused kernel leaves for each of N tokens."""

    def __init__(self, targets: Tensor):
        n = targets.shape[0]
        self.logps, self.entropy = (torch.empty(n, device=targets.device) for _ in range(2))
        self.tokens = torch.empty(5, n, device=targets.device)
        self.per_token = self.logps, self.entropy, self.tokens

    def reduced(self) -> tuple[Tensor, Tensor]:
        loss, stats = (torch.zeros(shape, device=self.tokens.device) for shape in ((), 7))
        reduce_launch(self.tokens, loss, stats).run()
        return loss, stats


class _HeadGradients:
    """dhidden and dweight from gradients of logits that come in chunk by chunk, in order."""

    def __init__(self, hidden: Tensor, weight: Tensor, grad_hidden: bool, grad_weight: bool):
        n, vocabulary = hidden.shape[0], weight.shape[0]
        self.hidden, self.weight = hidden, weight
        self.dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if grad_hidden else None
        self.dweight = torch.zeros(weight.shape, device=weight.device) if grad_weight else None
        step = _chunk_rows(vocabulary, 4, LOGIT_BYTES)
        self.capacity = max(_chunk_rows(vocabulary, hidden.itemsize, GRADIENT_BYTES) // step, 1) * step
        self.scratch = torch.empty(min(self.capacity, n), vocabulary, dtype=hidden.dtype, device=hidden.device)
        self.start = 0

    def room(self, rows: slice) -> Tensor:
        return self.scratch[rows.start - self.start : rows.stop - self.start]

    def filled(self, rows: slice) -> None:
        if rows.stop - self.start < self.capacity and rows.stop < self.hidden.shape[0]:
            return
        mine = slice(self.start, rows.stop)
        dlogits, hidden = self.scratch[: rows.stop - self.start], self.hidden[mine]
        if self.dhidden is not None:
            torch.mm(dlogits, self.weight, out=self.dhidden[mine])
        if self.dweight is not None:
            _add_product(self.dweight, dlogits.t(), hidden)
        self.start = rows.stop

    def results(self) -> tuple[Tensor, Tensor]:
        dhidden = self.hidden.new_empty(0) if self.dhidden is None else self.dhidden
        dweight = self.weight.new_empty(0) if self.dweight is None else self.dweight.to(self.weight.dtype)
        return dhidden, dweight


def _chunk_rows(vocabulary: int, itemsize: int, limit: int) -> int:
    rows = limit // (max(vocabulary, 1) * itemsize)
    return max(rows // ROW_MULTIPLE * ROW_MULTIPLE, ROW_MULTIPLE)


def _logit_chunks(hidden: Tensor, weight: Tensor):
    """Yields (rows, fp32 logits of those rows), in one buffer."""
    n, vocabulary = hidden.shape[0], weight.shape[0]
    step = _chunk_rows(vocabulary, 4, LOGIT_BYTES)
    scratch = torch.empty(min(step, n), vocabulary, device=hidden.device)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        logits = scratch[: rows.stop - start]
        if hidden.dtype == torch.float32:
            torch.mm(hidden[rows], weight.t(), out=logits)
        else:
            torch.mm(hidden[rows], weight.t(), out_dtype=torch.float32, out=logits)
        yield rows, logits


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's fp32. (The out= forms are the ones that autocast leaves alone.)"""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _logps_room(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = rows.shape[0]
    return tuple(torch.empty(shape, device=rows.device) for shape in (n, n, (2, n)))


def _gradient(logits, targets, temperature, entropy, state, dlogps, dentropy, dlogits) -> None:
    upstream = (dentropy.contiguous(), entropy) if entropy.numel() == targets.numel() else (None, None)
    gradient_launch(logits, targets, temperature, dlogps.contiguous(), *upstream, *state, dlogits).run()
