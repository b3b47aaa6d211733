"""Sampling of tokens by Gumbel-max with counter-based noise: the public function and its torch twin.

The vocabulary is divided into at most 1024 groups: entry v belongs to group (v // 8) mod 1024. Noise on each group's
log-mass selects a group; noise on its entries selects the token. The result has exactly the softmax's distribution,
because the maximum of Gumbel-perturbed scores is distributed like their perturbed log-sum-exp. A row needs a thousand
hashes and logarithms instead of 152k.

The noise of entry v is a hash of (seed, prompt id, completion index, position) and v; that of group g has 2^30 + g in
place of v:

- per row, 64-bit: h = mix64(seed + GOLDEN), then h = mix64(h ^ counter) for the three counters; mix64 is the finaliser
  of SplitMix64 (Steele et al. 2014, constants of Stafford's variant 13). k0, k1 = low and high half of h.
- per entry, 32-bit: x = v * ODD + k0; x ^= x >> 16; x *= 0x7feb352d; x ^= k1; x ^= x >> 15; x *= 0x846ca68b;
  x ^= x >> 16, all shifts logical. (Wellons' lowbias32 with a second key in its middle. Without that key, rows whose
  k0 differ by a multiple of ODD would draw shifted copies of the same noise.)
- uniform: u = (float(x & 0x7fffffff) + 0.5) * 2^-31 * (1 - 2^-24), in (0, 1); Gumbel = -log(-log1p(-u)). The largest
  noise has the smallest u, where fp32 is dense. With 24 bits the largest noise of a flat vocabulary of 152k would tie
  once in 50 draws; hence 31.

With equal logits every implementation draws the same token. Rounding in fp32 would swap the two best groups once in a
million draws, so these two and their entries are compared in fp64.
"""

import ctypes

import torch
from torch import Tensor

from .chunks import LOGIT_FLOOR, chunk_rows
from .dispatch import FLOATS, accumulation_dtype, call, check_tensor, register, runs_fast

GOLDEN = 0x9E3779B97F4A7C15
MIX64 = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
ODD = 0x9E3779B1
MIX32 = (0x7FEB352D, 0x846CA68B)
GROUPS, WIDTH = 1024, 8  # groups, and neighbouring entries that share one
FIRST_GROUP = 1 << 30  # where the groups' counters start, above every vocabulary
UNIFORM_SCALE = 2.0**-31 * (1 - 2.0**-24)

# The same bits as torch's signed integers, whose sums and products wrap as those of unsigned ones do.
_GOLDEN, *_MIX64 = (ctypes.c_int64(bits).value for bits in (GOLDEN, *MIX64))
_ODD, *_MIX32 = (ctypes.c_int32(bits).value for bits in (ODD, *MIX32))


def sample_tokens_torch(
    logits, seed: int, prompt_ids, completion_ids, positions, temperature: float, top_k: int, top_p: float, forbidden
) -> tuple[Tensor, Tensor]:
    """Arguments and results as `sample_tokens`; in chunks of 16 rows on a CPU, more where they fit into its cache."""
    n, vocabulary = logits.shape
    dtype = accumulation_dtype(logits)
    keys = row_keys(seed, prompt_ids, completion_ids, positions)
    tokens = torch.empty(n, dtype=torch.int64, device=logits.device)
    logps = torch.empty(n, dtype=dtype, device=logits.device)
    # 1 / temperature as a kernel receives it, in fp32; 1 for temperature 0, whose logps are those at 1.
    inverse = torch.tensor(1 / (temperature or 1), dtype=torch.float32).item()
    step = chunk_rows(vocabulary, dtype, logits.device, at_least=16)
    # Distance between two runs of WIDTH entries of one group; in a small vocabulary a group has one run.
    stride = min(GROUPS * WIDTH, -(-vocabulary // WIDTH) * WIDTH)
    padded = -(-vocabulary // stride) * stride
    if forbidden is not None:
        # Mark repeats of an id in `forbidden`, without a synchronisation: their mass counts only once.
        places = torch.arange(forbidden.shape[0], device=logits.device)
        repeated = places.new_empty(vocabulary).index_copy_(0, forbidden, places)[forbidden] != places
    masses = torch.zeros(min(step, n), padded, dtype=dtype, device=logits.device)
    for at in range(0, n, step):
        rows = slice(at, at + step)
        scores = logits[rows].to(dtype, copy=True).clamp_(min=LOGIT_FLOOR)
        banned = None if forbidden is None else scores[:, forbidden].masked_fill_(repeated, float("-inf"))
        if forbidden is not None:
            scores.index_fill_(1, forbidden, float("-inf"))
        peak = scores.amax(1, keepdim=True)
        scores.sub_(peak).mul_(inverse)
        mass = torch.exp(scores, out=masses[: scores.shape[0], :vocabulary])
        log_mass = mass.sum(1, keepdim=True).log_()
        if banned is not None:
            log_mass = torch.cat([log_mass, banned.sub_(peak).mul_(inverse)], 1).logsumexp(1, keepdim=True)
        if temperature == 0:
            chosen = _row_argmax(scores).unsqueeze(1)
        else:
            if top_k or top_p < 1:
                scores = _filter(scores, top_k or vocabulary, top_p)
                torch.exp(scores, out=mass)
            runs = masses[: scores.shape[0]].view(scores.shape[0], -1, stride)
            chosen = _draw(logits[rows], scores, peak, runs, keys[rows], inverse)
        tokens[rows] = chosen.squeeze(1)
        logps[rows] = (scores.gather(1, chosen) - log_mass).squeeze(1)
    return tokens, logps


def _draw(logits, scores, peak, mass, keys, inverse: float) -> Tensor:
    """(n, 1) tokens. scores (n, V) are (logits - peak) * inverse, -inf where forbidden; mass (n, runs, stride) their
    exp, padded with zeros.
    """
    (n, vocabulary), stride = scores.shape, mass.shape[2]
    mass = mass.sum(1).view(n, -1, WIDTH).sum(2)  # (n, groups)
    counters = torch.arange(mass.shape[1], dtype=torch.int32, device=mass.device) + FIRST_GROUP
    groups = (mass.log() + gumbel(keys, counters.unsqueeze(0), mass.dtype)).topk(min(2, mass.shape[1]), dim=1).indices
    runs = torch.arange(0, vocabulary, stride, device=mass.device).unsqueeze(1)
    inside = (runs + torch.arange(WIDTH, device=mass.device)).flatten()  # offsets of a group's entries from its first
    entries = groups.unsqueeze(2) * WIDTH + inside  # (n, 2, entries)
    columns = entries.clamp(max=vocabulary - 1).flatten(1)
    exact = logits.gather(1, columns).to(scores.dtype).clamp_(min=LOGIT_FLOOR).double().sub_(peak).mul_(inverse)
    exact.masked_fill_(scores.gather(1, columns).isneginf() | (entries.flatten(1) != columns), float("-inf"))
    exact = exact.view(entries.shape)
    log_mass = exact.logsumexp(2) + gumbel(keys, (groups + FIRST_GROUP).int(), torch.float64)
    winner = log_mass.argmax(1).view(n, 1, 1).expand(-1, 1, entries.shape[2])
    exact, entries = exact.gather(1, winner).squeeze(1), entries.gather(1, winner).squeeze(1)
    return entries.gather(1, (exact + gumbel(keys, entries.int(), torch.float64)).argmax(1, keepdim=True))


def _filter(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """The (n, V) scores, -inf outside the k likeliest and outside top_p."""
    kept, candidates = scores.topk(min(top_k, scores.shape[1]), dim=1)
    if top_p < 1:
        probabilities = kept.softmax(1)
        before = probabilities.cumsum(1) - probabilities
        before[:, 0] = 0  # the likeliest is always kept, whatever the rounding
        kept = kept.masked_fill(before >= top_p, float("-inf"))
    return torch.full_like(scores, float("-inf")).scatter_(1, candidates, kept)


def row_keys(seed: int, *counters: Tensor) -> Tensor:
    """Hash of the seed and the row's counters (n) int64: (n) int64; 0-dim without counters."""
    key = torch.tensor(seed + _GOLDEN)
    for counter in (0, *counters):  # the first round hashes the seed alone
        key = key ^ counter
        # torch's shift to the right repeats the sign bit: the mask makes it logical.
        for shift, factor in zip((30, 27), _MIX64, strict=True):
            key = (key ^ ((key >> shift) & ((1 << (64 - shift)) - 1))) * factor
        key = key ^ ((key >> 31) & ((1 << 33) - 1))
    return key


def gumbel(keys: Tensor, entries: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise (n, k), between -2.9 and 22.2, of row keys (n) int64 and entries (1 or n, k) int32."""
    low, high = keys.contiguous().view(torch.int32).view(-1, 2, 1).unbind(1)
    x = entries * _ODD + low
    x = (x ^ ((x >> 16) & 0xFFFF)) * _MIX32[0] ^ high
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _MIX32[1]
    x ^= (x >> 16) & 0xFFFF
    # The uniform is fp32 in every implementation; only the logarithms are in `dtype`.
    uniform = x.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(UNIFORM_SCALE).to(dtype)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _row_argmax(scores: Tensor) -> Tensor:
    """argmax(1), the first of equal maxima. On a CPU amax is ten times as fast: it finds the maximum's block first."""
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

    The filters apply in this order: forbidden ids are removed; of the others the top_k largest are kept; of those,
    renormalised, the smallest set of the likeliest tokens whose probabilities reach top_p is kept.

    Args:
        logits: (n, V) float.
        seed: 0 <= seed < 2^63.
        prompt_ids, completion_ids, positions: (n) int64, the row's counters: serial number of the prompt in the run's
            stream, index of the completion in its group, position of the token in the completion.
        temperature: 0 takes the likeliest allowed token.
        top_k: 0, or at least V: off. Exactly k are kept, even where logits are equal.
        top_p: in (0, 1]; 1: off.
        forbidden: (F) int64 ids that no row may draw, or None.

    Returns:
        tokens (n) int64 and logps (n) fp32 (fp64 for fp64 logits): the token's log-softmax at the temperature (at 1 for
        temperature 0) over the whole vocabulary, before any filter. Not differentiable.

    Raises:
        ValueError: a shape, a dtype or an option does not fit.
    """
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
    if temperature == 0:
        top_k, top_p = 0, 1.0  # the likeliest token passes any filter
    elif top_k >= vocabulary:
        top_k = 0
    triton = runs_fast("sample_tokens", backend, logits)
    counters = prompt_ids, completion_ids, positions
    options = temperature, top_k, top_p, forbidden, triton
    return call(torch.ops.boxgrpo.sample_tokens, _run, logits, seed, *counters, *options)


def _fake(logits, *_):
    n = logits.shape[0]
    return logits.new_empty(n, dtype=torch.int64), logits.new_empty(n, dtype=accumulation_dtype(logits))


_, _run = register(
    "(Tensor logits, int seed, Tensor prompt_ids, Tensor completion_ids, Tensor positions, float temperature, "
    "int top_k, float top_p, Tensor? forbidden, bool triton) -> (Tensor, Tensor)",
    sample_tokens_torch,
    _fake,
)
