"""Triton kernel of sample_tokens without top-k and top-p: one read of the logits, or two where temperature is 0."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sample
from .chunks import LOGIT_FLOOR
from .dispatch import Launch, cdiv, next_power_of_2
from .rows_triton import LN2, LOG2E, floored, load_block, update
from .sample import GROUPS, WIDTH, row_keys, sample_tokens_torch

_C0, _C1 = (tl.constexpr(factor) for factor in sample.MIX64)
_D0, _D1 = (tl.constexpr(factor) for factor in sample.MIX32)
_ODD = tl.constexpr(sample.ODD)
_SCALE = tl.constexpr(sample.UNIFORM_SCALE)
_FIRST_GROUP = tl.constexpr(sample.FIRST_GROUP)


@triton.jit
def _mix64(x):
    x = (x ^ (x >> 30)) * tl.full((), _C0, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full((), _C1, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def _row_key(first_key, prompt, completion, position):
    """sample.row_keys, as its low and high 32 bits."""
    key = _mix64((tl.full((), 0, tl.int64) + first_key).to(tl.uint64) ^ prompt.to(tl.uint64))
    key = _mix64(_mix64(key ^ completion.to(tl.uint64)) ^ position.to(tl.uint64))
    return key.to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def _uniform(low, high, counters):
    """(n) int32 counters -> fp32 uniforms; see sample.py."""
    x = counters.to(tl.uint32) * tl.full((), _ODD, tl.uint32) + low
    x = (x ^ (x >> 16)) * tl.full((), _D0, tl.uint32)
    x ^= high
    x = (x ^ (x >> 15)) * tl.full((), _D1, tl.uint32)
    x ^= x >> 16
    return ((x & 0x7FFFFFFF).to(tl.float32) + 0.5) * _SCALE


@triton.jit
def _log1m(u):
    """log(1 - u), corrected by the rounding of the subtraction."""
    w = 1 - u
    return tl.log(w) + ((1 - w) - u) / w


@triton.jit
def _gumbel(low, high, counters, DTYPE: tl.constexpr):
    return -tl.log(-_log1m(_uniform(low, high, counters).to(DTYPE)))


@triton.jit
def _replace_forbidden(z, columns, vocabulary, forbidden, instead):
    """z, with `instead` where `forbidden` (V) uint8 is set."""
    if forbidden is not None:
        banned = tl.load(forbidden + columns, mask=columns < vocabulary, other=0)
        z = tl.where(banned != 0, instead, z)
    return z


@triton.jit
def _exact_group(
    row_ptr, group, stride, vocabulary, peak, inverse, floor, forbidden, low, high,
    PERIOD: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Perturbed log-mass of a group, in fp64, and its token with the largest perturbed logit."""
    i = tl.arange(0, ENTRIES)
    columns = i // WIDTH * PERIOD + group * WIDTH + i % WIDTH
    z = tl.load(row_ptr + columns.to(tl.int64) * stride, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
    raw = floored(z, floor)
    x = (raw.to(tl.float64) - peak) * inverse
    x = tl.where(columns < vocabulary, x, float("-inf"))
    x = _replace_forbidden(x, columns, vocabulary, forbidden, float("-inf"))
    highest = tl.max(x, 0)
    # A group without an allowed entry must have a sum of 0; with -inf as its maximum it would be NaN.
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    log_mass = highest + tl.log(tl.sum(tl.exp(x - highest), 0))
    counter = tl.full((ENTRIES,), 0, tl.int32) + group + _FIRST_GROUP
    score = log_mass + tl.max(_gumbel(low, high, counter, tl.float64), 0)
    best = tl.argmax(x + _gumbel(low, high, columns, tl.float64), 0)
    token = best // WIDTH * PERIOD + group * WIDTH + best % WIDTH
    return score, token


@triton.jit(do_not_specialize=["first_key", "n_ids"])
def sample_kernel(
    logits,
    row_stride,
    column_stride,
    vocabulary,
    inverse_temperature,
    floor,
    first_key,
    prompt_ids,
    completion_ids,
    positions,
    ids,
    n_ids,
    counted_places,
    forbidden,
    tokens,
    logps,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """A program draws the token of one row; each of its threads sums one group."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits + row * row_stride
    scale = inverse_temperature * LOG2E
    # A forbidden logit, or one beyond the row, is set below the floor of the others: its mass is 0, and not NaN.
    top = tl.full((GROUPS,), 2 * floor, tl.float32)
    total = tl.zeros((GROUPS,), tl.float32)
    for at in tl.range(0, vocabulary, BLOCK, num_stages=3):
        z = load_block(row_ptr, at, column_stride, vocabulary, floor, BLOCK)
        z = _replace_forbidden(z, at + tl.arange(0, BLOCK), vocabulary, forbidden, 2 * floor)
        top, total, _ = update(z, top, total, total, scale, GROUPS, WIDTH, False)
    peak = tl.max(top, 0)
    log_masses = (top - peak) * scale + tl.log2(total)
    # The log-probability is over the whole vocabulary: the mass of the forbidden ids is added again.
    highest = peak
    mass = tl.sum(tl.exp2(log_masses), 0)
    if ids is not None:
        for at in range(0, n_ids, GROUPS):
            i = at + tl.arange(0, GROUPS)
            column = tl.load(ids + i, mask=i < n_ids, other=0)
            counts = (i < n_ids) & (tl.load(counted_places + column, mask=i < n_ids, other=-1) == i)
            z = tl.load(row_ptr + column * column_stride, mask=counts, other=float("-inf")).to(tl.float32)
            z = floored(z, tl.where(counts, floor, 2 * floor))
            higher = tl.maximum(highest, tl.max(z, 0))
            mass = mass * tl.exp2((highest - higher) * scale) + tl.sum(tl.exp2((z - higher) * scale), 0)
            highest = higher

    if GREEDY:
        token = tl.full((), 0, tl.int32) + vocabulary
        for at in range(0, vocabulary, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            z = load_block(row_ptr, at, column_stride, vocabulary, floor, BLOCK)
            z = _replace_forbidden(z, columns, vocabulary, forbidden, float("-inf"))
            token = tl.minimum(token, tl.min(tl.where(z == peak, columns, vocabulary), 0))
    else:
        low, high = _row_key(
            first_key, tl.load(prompt_ids + row), tl.load(completion_ids + row), tl.load(positions + row)
        )
        group = tl.arange(0, GROUPS)
        scores = log_masses * LN2 + _gumbel(low, high, group + _FIRST_GROUP, tl.float32)
        best = tl.argmax(scores, 0)
        second = tl.argmax(tl.where(group == best, float("-inf"), scores), 0)
        peak64 = peak.to(tl.float64)
        inverse64 = tl.full((), 0.0, tl.float64) + inverse_temperature
        best_score, token = tl.full((), float("-inf"), tl.float64), best
        for i in tl.static_range(2):
            score, candidate = _exact_group(
                row_ptr, second if i else best, column_stride, vocabulary, peak64, inverse64, floor, forbidden,
                low, high, GROUPS * WIDTH, WIDTH, ENTRIES,
            )  # fmt: skip
            token = tl.where((score > best_score) | (i == 0), candidate, token)
            best_score = score
    token = tl.minimum(token, vocabulary - 1)  # a row of NaN gives a larger one
    tl.store(tokens + row, token)
    chosen = floored(tl.load(row_ptr + token.to(tl.int64) * column_stride).to(tl.float32), floor)
    tl.store(logps + row, ((chosen - highest) * scale - tl.log2(mass)) * LN2)


def sample_launch(logits, seed, prompt_ids, completion_ids, positions, temperature, forbidden, tokens, logps) -> Launch:
    """logits (n, V), counters (n), forbidden (F) ids or None -> tokens (n) int64, logps (n) fp32."""
    vocabulary = logits.shape[1]
    floor = LOGIT_FLOOR * min(temperature or 1.0, 1.0)
    rows = logits, *logits.stride(), vocabulary, 1 / (temperature or 1), floor
    counters = row_keys(seed).item(), *(ids.contiguous() for ids in (prompt_ids, completion_ids, positions))
    banned = None, 0, None, None
    if forbidden is not None:
        is_banned = torch.zeros_like(logits[0], dtype=torch.uint8).index_fill(0, forbidden, 1)
        places = torch.arange(forbidden.shape[0], dtype=torch.int32, device=forbidden.device)
        counted_places = places.new_empty(vocabulary).index_copy_(0, forbidden, places)  # a repeated id counts once
        banned = forbidden.contiguous(), forbidden.shape[0], counted_places, is_banned
    period = GROUPS * WIDTH
    constants = {
        "GREEDY": temperature == 0,
        "BLOCK": min(4 // logits.itemsize, next_power_of_2(cdiv(vocabulary, period))) * period,
        "GROUPS": GROUPS,
        "WIDTH": WIDTH,
        "ENTRIES": next_power_of_2(cdiv(vocabulary, period)) * WIDTH,
    }
    arguments = *rows, *counters, *banned, tokens, logps
    return Launch(sample_kernel, (logits.shape[0],), arguments, constants, num_warps=GROUPS // 32)


def sample_tokens_triton(
    logits, seed, prompt_ids, completion_ids, positions, temperature: float, top_k: int, top_p: float, forbidden
) -> tuple[Tensor, Tensor]:
    """`sample_tokens_torch` on Triton, for all dtypes but fp64; with top-k or top-p it calls the twin."""
    counters = seed, prompt_ids, completion_ids, positions
    if top_k or top_p < 1:
        return sample_tokens_torch(logits, *counters, temperature, top_k, top_p, forbidden)
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    logps = torch.empty(logits.shape[0], device=logits.device)
    sample_launch(logits, *counters, temperature, forbidden, tokens, logps).run()
    return tokens, logps
