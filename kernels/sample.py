"""Sampling by Gumbel-max with counter-based noise: a token depends on its own counters and logits, on nothing else.

The noise of vocabulary entry v is a hash of (seed, prompt id, completion index, position) and v:

- per row, 64-bit: h = mix64(seed + GOLDEN), then h = mix64(h ^ counter) for the three counters; mix64 is the finaliser
  of SplitMix64 (Steele et al. 2014, constants of Stafford's variant 13). k0, k1 = low and high half of h.
- per entry, 32-bit: x = v * ODD + k0; x ^= x >> 16; x *= 0x7feb352d; x ^= k1; x ^= x >> 15; x *= 0x846ca68b;
  x ^= x >> 16, all shifts logical (Wellons' lowbias32 with a second key in its middle: without it rows whose k0 differ
  by a multiple of ODD would draw shifted copies of the same noise).
- uniform: u = (float(x & 0x7fffffff) + 0.5) * 2^-31 * (1 - 2^-24), in (0, 1); Gumbel = -log(-log1p(-u)). Winners have a
  small u, where fp32 is dense: 31 bits resolve a flat vocabulary of 152k, 24 would tie in 1 draw of 50.
"""

import torch
from torch import Tensor

from .checks import FLOATS, accumulation_dtype, check_backend, check_tensor
from .chunks import LOGIT_FLOOR, chunk_rows

GOLDEN = 0x9E3779B97F4A7C15
MIX64 = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
ODD = 0x9E3779B1
MIX32 = (0x7FEB352D, 0x846CA68B)
UNIFORM_SCALE = 2.0**-31 * (1 - 2.0**-24)


def sample_tokens(
    logits: Tensor,
    *,
    seed: int,
    prompt_ids: Tensor,
    completion_ids: Tensor,
    positions: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    forbidden: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Draw one token for each row of logits.

    The filters apply in this order: forbidden ids leave, then the top_k largest stay, then, of what is left and
    renormalised, the smallest set of the likeliest tokens that reaches top_p stays.

    Args:
        logits: (n, V) float.
        seed: 0 <= seed < 2^63.
        prompt_ids, completion_ids, positions: (n) int64, the row's counters: serial number of the prompt in the run's
            stream, index of the completion in its group, position of the token in the completion.
        temperature: 0 takes the likeliest allowed token.
        top_k: 0 or V and more: off. Of equal logits at the edge exactly k stay.
        top_p: in (0, 1]; 1: off.
        forbidden: (F) int64 ids that no row may draw, or None.

    Returns:
        tokens (n) int64 and logps (n) fp32 (fp64 for fp64 logits): the token's log-softmax at the temperature (at 1 for
        temperature 0) over the whole vocabulary, before any filter. Not differentiable.

    Raises:
        ValueError: a shape, a dtype or an option does not fit.
    """
    check_backend("sample_tokens", backend, logits)
    check_tensor("logits", logits, (None, None), FLOATS)
    n, vocabulary = logits.shape
    for name, counter in (("prompt_ids", prompt_ids), ("completion_ids", completion_ids), ("positions", positions)):
        check_tensor(name, counter, (n,), (torch.int64,))
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be at least 0 and below 2^63.")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; it must be at least 0.")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; it must be at least 0. Pass 0 to turn it off.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must lie in (0, 1]. Pass 1 to turn it off.")
    if forbidden is not None:
        check_tensor("forbidden", forbidden, (None,), (torch.int64,))
        if forbidden.shape[0] >= vocabulary:
            raise ValueError(f"{forbidden.shape[0]} ids of {vocabulary} are forbidden; at least one must be allowed.")
    return torch.ops.boxgrpo.sample_tokens(
        logits, seed, prompt_ids, completion_ids, positions, temperature, top_k, top_p, forbidden
    )


def sample_tokens_torch(
    logits: Tensor,
    seed: int,
    prompt_ids: Tensor,
    completion_ids: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    forbidden: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Twin of `sample_tokens`, rows in chunks that stay in the cache."""
    n, vocabulary = logits.shape
    dtype = accumulation_dtype(logits)
    keys = row_keys(seed, prompt_ids, completion_ids, positions)
    tokens = torch.empty(n, dtype=torch.int64, device=logits.device)
    logps = torch.empty(n, dtype=dtype, device=logits.device)
    entries = torch.arange(vocabulary, dtype=torch.int32, device=logits.device).unsqueeze(0)
    filtered = temperature > 0 and (0 < top_k < vocabulary or top_p < 1)
    step = chunk_rows(vocabulary, dtype, logits.device, at_least=4)
    for at in range(0, n, step):
        rows = slice(at, at + step)
        scores = logits[rows].to(dtype, copy=True)
        if temperature not in (0.0, 1.0):
            scores.mul_(1 / temperature)
        log_softmax = torch.log_softmax(scores.clamp_(min=LOGIT_FLOOR), 1)
        allowed, candidates = log_softmax, entries
        if forbidden is not None:
            allowed = torch.index_fill(log_softmax, 1, forbidden, float("-inf"))
        if filtered:
            allowed, candidates = _filter(allowed, top_k or vocabulary, top_p)
        if temperature > 0:
            allowed = allowed + gumbel(keys[rows], candidates, dtype)
        best = _row_argmax(allowed).unsqueeze(1)
        if filtered:
            best = candidates.gather(1, best).long()
        tokens[rows] = best.squeeze(1)
        logps[rows] = log_softmax.gather(1, best).squeeze(1)
    return tokens, logps


def _filter(log_softmax: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Scores of the k likeliest, -inf outside top_p, and their ids (int32); (n, k) each."""
    scores, candidates = log_softmax.topk(min(top_k, log_softmax.shape[1]), dim=1)
    if top_p < 1:
        probabilities = scores.softmax(1)
        before = probabilities.cumsum(1) - probabilities
        before[:, 0] = 0  # the likeliest stays, whatever the rounding
        scores = scores.masked_fill(before >= top_p, float("-inf"))
    return scores, candidates.int()


def row_keys(seed: int, *counters: Tensor) -> Tensor:
    """(n) int64 hash of the seed and the row's counters (n) int64."""
    key = torch.full_like(counters[0], _signed(_mix64_int(seed + GOLDEN), 64))
    for counter in counters:
        key = key ^ counter
        for shift, factor in zip((30, 27), MIX64, strict=True):
            key = (key ^ _shifted(key, shift, 64)) * _signed(factor, 64)
        key = key ^ _shifted(key, 31, 64)
    return key


def noise_bits(keys: Tensor, entries: Tensor) -> Tensor:
    """(n) int64 row keys, (1 or n, k) int32 vocabulary entries -> (n, k) int32 hash; products wrap at 32 bits."""
    low, high = (_wrapped(half).unsqueeze(1) for half in (keys & 0xFFFFFFFF, _shifted(keys, 32, 64)))
    x = entries * _signed(ODD, 32) + low
    scratch = torch.empty_like(x)

    def fold(shift: int) -> None:  # x ^= x >> shift
        torch.bitwise_right_shift(x, shift, out=scratch)
        x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))

    fold(16)
    x.mul_(_signed(MIX32[0], 32)).bitwise_xor_(high)
    fold(15)
    x.mul_(_signed(MIX32[1], 32))
    fold(16)
    return x


def gumbel(keys: Tensor, entries: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise (n, k), between -2.9 and 22.2."""
    bits = noise_bits(keys, entries).bitwise_and_(0x7FFFFFFF)
    # The uniform itself is fp32 in every implementation; only the logarithms follow the logits' dtype.
    uniform = bits.float().add_(0.5).mul_(UNIFORM_SCALE).to(dtype)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _shifted(x: Tensor, shift: int, bits: int) -> Tensor:
    """Logical right shift: torch's keeps the sign."""
    return (x >> shift) & ((1 << (bits - shift)) - 1)


def _wrapped(x: Tensor) -> Tensor:
    """(n) int64 in [0, 2^32) -> int32 of the same bits."""
    return torch.where(x >= 1 << 31, x - (1 << 32), x).int()


def _signed(value: int, bits: int) -> int:
    """The signed integer with the low `bits` of `value`."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _mix64_int(x: int) -> int:
    mask = (1 << 64) - 1
    x &= mask
    for shift, factor in zip((30, 27), MIX64, strict=True):
        x = (x ^ (x >> shift)) * factor & mask
    return x ^ (x >> 31)


def _row_argmax(scores: Tensor) -> Tensor:
    """argmax(1), the first of equals: of blocks, then within the best one. torch's own is ten times amax on a CPU."""
    width, block = scores.shape[1], 128
    whole = width // block * block
    if width < 8 * block:
        return scores.argmax(1)
    tops = scores[:, :whole].unflatten(1, (-1, block)).amax(2)
    if whole < width:
        tops = torch.cat([tops, scores[:, whole:].amax(1, keepdim=True)], 1)
    inside = tops.argmax(1, keepdim=True) * block + torch.arange(block, device=scores.device)
    inside.clamp_(max=width - 1)
    return inside.gather(1, scores.gather(1, inside).argmax(1, keepdim=True)).squeeze(1)


_op = torch.library.custom_op(
    "boxgrpo::sample_tokens",
    sample_tokens_torch,
    mutates_args=(),
    schema="(Tensor logits, int seed, Tensor prompt_ids, Tensor completion_ids, Tensor positions, float temperature, "
    "int top_k, float top_p, Tensor? forbidden) -> (Tensor, Tensor)",
)


@_op.register_fake
def _(logits, seed, prompt_ids, completion_ids, positions, temperature, top_k, top_p, forbidden):
    n = logits.shape[0]
    return logits.new_empty(n, dtype=torch.int64), logits.new_empty(n, dtype=accumulation_dtype(logits))
