"""sample_tokens: the hash bit for bit, the distribution, independence of counters and batch, filters; the kernel."""

import itertools
import math

import pytest
import torch

from boxgrpo.kernels import sample_tokens
from boxgrpo.kernels.sample import FIRST_GROUP, UNIFORM_SCALE, _row_argmax, gumbel, row_keys
from kernel_cases import BACKENDS, DEVICE, assert_refused, counters, on_triton, seeded

M32, M64 = 2**32 - 1, 2**64 - 1
COUNTERS = ("prompt_ids", "completion_ids", "positions")


def count_up(n, name="positions"):
    """(n) counters, of which one counts up and the others are 0."""
    return {k: torch.arange(n) if k == name else torch.zeros(n, dtype=torch.int64) for k in COUNTERS}


def draw(logits, n, seed=0, **options):
    """n tokens of the same logits (V), and their logps."""
    return sample_tokens(logits.expand(n, -1), **{"seed": seed} | count_up(n) | options)


def mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & M64
    return x ^ (x >> 31)


def bits_in_plain_integers(seed, prompt, completion, position, entry):
    """The hash as the module's docstring gives it."""
    key = mix64((seed + 0x9E3779B97F4A7C15) & M64)
    for counter in (prompt, completion, position):
        key = mix64(key ^ counter)
    x = (entry * 0x9E3779B1 + (key & M32)) & M32
    x = (x ^ (x >> 16)) * 0x7FEB352D & M32
    x ^= key >> 32
    x = (x ^ (x >> 15)) * 0x846CA68B & M32
    return x ^ (x >> 16)


def noise_of(bits):
    """The noise of hashes as the module's docstring gives it, in fp64."""
    uniform = ((torch.tensor(bits) & 0x7FFFFFFF).float() + 0.5) * UNIFORM_SCALE
    return -(-(-uniform.double()).log1p()).log()


def test_the_hash_is_the_documented_one():
    """Another implementation has to agree bit for bit, large counters and entries included."""
    cases = [(0, 0, 0, 0), (42, 7, 3, 255), (2**63 - 1, 2**40 + 1, 2**31, 2**33 + 5), (1, 2**62, 1, 1)]
    entries = [0, 1, 151_935, 2**31 - 1]
    for seed, *row in cases:
        keys = row_keys(seed, *(torch.tensor([x]) for x in row))
        got = gumbel(keys, torch.tensor([entries], dtype=torch.int32), torch.float64)
        assert torch.equal(got, noise_of([[bits_in_plain_integers(seed, *row, v) for v in entries]]))
    assert bits_in_plain_integers(42, 7, 3, 255, 151_935) == 0x06E4451C


def test_noise_is_finite_and_gumbel():
    """Mean and variance of 2^22 draws, and no infinity, not even at the ends of the hash."""
    keys = row_keys(3, torch.arange(64), torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.int64))
    noise = gumbel(keys, torch.arange(65536, dtype=torch.int32)[None], torch.float32).double()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772157, abs=4 * (math.pi**2 / 6 / 2**22) ** 0.5)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=5e-3)


@pytest.mark.parametrize("bits", [0, -(2**31), 2**31 - 1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_at_the_ends_of_the_hash(bits, dtype):
    """Entry 0 of the row whose key the hash, run backwards, gives for `bits`."""
    x = bits & M32
    x = (x ^ (x >> 16)) * pow(0x846CA68B, -1, 2**32) & M32
    high = x ^ (x >> 15) ^ (x >> 30)
    keys = torch.tensor([[0, high - (high >> 31 << 32)]], dtype=torch.int32).view(torch.int64).squeeze(1)
    noise = gumbel(keys, torch.zeros(1, 1, dtype=torch.int32), dtype).item()
    assert -2.9 < noise < 22.3 and noise == pytest.approx(noise_of(bits).item(), rel=1e-6)


def chi_square(tokens, probabilities):
    """Pearson's statistic, in standard deviations from its mean (degrees of freedom)."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities * len(tokens)
    freedom = len(probabilities) - 1
    return (((counts - expected) ** 2 / expected).sum().item() - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("counting", COUNTERS)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_each_counter_alone_draws_the_softmax(counting, temperature):
    """60,000 draws that differ in one counter only."""
    n, logits = 60_000, torch.linspace(-1.5, 1.5, 24)
    tokens, logps = draw(logits, n, 5, temperature=temperature, **count_up(n, counting))
    want = (logits.double() / temperature).softmax(0)
    assert abs(chi_square(tokens, want)) < 4
    torch.testing.assert_close(logps, want.log()[tokens].float())


@pytest.mark.parametrize(("n", "bins"), [(600, 16), pytest.param(20_000, 512, marks=pytest.mark.slow)])
def test_a_wide_flat_vocabulary_is_drawn_evenly(n, bins):
    """Bins of 152k equal logits: resolution in the tail and no favour for low ids."""
    vocabulary = 151_936
    tokens, _ = draw(torch.zeros(vocabulary), n, 1)
    assert abs(chi_square(tokens * bins // vocabulary, torch.full((bins,), 1 / bins, dtype=torch.float64))) < 4
    repeats = n - vocabulary * (1 - math.exp(-n / vocabulary))  # that independent draws would show
    assert n - tokens.unique().numel() < repeats + 4 * math.sqrt(repeats) + 2


@pytest.mark.parametrize("first, second", [*itertools.pairwise(["seed", *COUNTERS, "prompt_ids"])])
def test_neighbouring_counters_draw_independently(first, second):
    """Pairs of draws whose counters differ by one step: their 8 x 8 table is that of independent draws."""
    n, flat = 40_000, torch.zeros(8)
    base = {"seed": 9} | count_up(n, second)
    (a, _), (b, _) = draw(flat, n, **base), draw(flat, n, **base | {first: base[first] + 1})
    assert abs(chi_square(a * 8 + b, torch.full((64,), 1 / 64, dtype=torch.float64))) < 4


def test_a_row_depends_on_its_own_counters_only(monkeypatch):
    """In another order, alone, or in other chunks: the same tokens and logps."""
    n = 40
    logits, own = torch.randn(n, 300, generator=seeded()), {k: x.cpu() for k, x in counters(n).items()}
    options = {"seed": 7, "temperature": 0.8, "forbidden": torch.tensor([3])}
    for filters in ({}, {"top_k": 20}, {"top_p": 0.7}):
        tokens, logps = sample_tokens(logits, **own, **options, **filters)
        order = torch.randperm(n, generator=seeded(1))
        shuffled = sample_tokens(logits[order], **{k: v[order] for k, v in own.items()}, **options, **filters)
        alone = [
            sample_tokens(logits[[i]], **{k: v[[i]] for k, v in own.items()}, **options, **filters) for i in (0, 39)
        ]
        with monkeypatch.context() as m:
            m.setattr("boxgrpo.kernels.sample.chunk_rows", lambda *_, **__: 7)
            chunked = sample_tokens(logits, **own, **options, **filters)
        for k, whole in enumerate((tokens, logps)):
            assert torch.equal(shuffled[k], whole[order])
            assert torch.equal(torch.cat([pair[k] for pair in alone]), whole[[0, 39]])
            assert torch.equal(chunked[k], whole)


def test_filters_keep_the_right_set_and_renormalise():
    """Drawn ids are exactly the allowed ones, in the proportions of their softmax; logps stay those of the whole."""
    n, probabilities = 40_000, torch.tensor([0.05, 0.4, 0.02, 0.3, 0.13, 0.1], dtype=torch.float64)
    logits = probabilities.log().float()
    for options, kept in (
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 6}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 99}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.72}, [1, 3, 4]),
        ({"top_p": 1e-9}, [1]),
        ({"forbidden": torch.tensor([1, 4])}, [0, 2, 3, 5]),
        ({"forbidden": torch.tensor([1]), "top_k": 2}, [3, 4]),
        ({"top_k": 3, "top_p": 0.8}, [1, 3]),  # 0.4 / 0.83 and 0.3 / 0.83 reach 0.8 together
        ({"forbidden": torch.tensor([1]), "top_p": 0.7}, [3, 4]),
        ({"forbidden": torch.tensor([], dtype=torch.int64)}, [0, 1, 2, 3, 4, 5]),
    ):
        tokens, logps = draw(logits, n, 3, **options)
        assert tokens.unique().tolist() == kept, options
        torch.testing.assert_close(logps, probabilities.log().float()[tokens])
        if len(kept) > 1:
            own = torch.searchsorted(torch.tensor(kept), tokens)
            assert abs(chi_square(own, probabilities[kept] / probabilities[kept].sum())) < 4, options


@pytest.mark.parametrize("options", [{"top_k": 32}, {"top_p": 0.99}, {"forbidden": torch.arange(8)}])
def test_a_filter_does_not_change_the_noise(options):
    """The noise belongs to groups and entries: without the entries of one group the others draw as before."""
    n = 500
    logits = torch.randn(40, generator=seeded(2)).abs()
    logits[:8] -= 10 * ("forbidden" not in options)
    (free, _), (some, _) = draw(logits, n, 3), draw(logits, n, 3, **options)
    kept = free >= 8
    assert torch.equal(free[kept], some[kept]) and some.min() >= 8


def test_groups_and_entries_draw_the_softmax():
    """A vocabulary of several runs to a group: groups, runs and neighbours each in proportion, the ragged end too."""
    n, vocabulary = 4000, 2 * 8192 + 100
    logits = torch.full((vocabulary,), float("-inf"))
    some = torch.tensor([0, 7, 8, 8191, 8192, 8199, 16384, vocabulary - 1])
    logits[some] = torch.linspace(-1, 1, len(some))
    tokens, logps = draw(logits, n, 11)
    drawn = torch.searchsorted(some, tokens)
    assert torch.equal(some[drawn], tokens)
    assert abs(chi_square(drawn, logits[some].double().softmax(0))) < 4
    torch.testing.assert_close(logps, logits.log_softmax(0)[tokens])


def test_temperature_zero_is_greedy_with_logps_at_one():
    logits = torch.randn(50, 2000, generator=seeded())
    forbidden = logits.argmax(1).unique()[:20]
    tokens, logps = sample_tokens(logits, seed=0, temperature=0.0, top_k=5, forbidden=forbidden, **count_up(50))
    want = logits.index_fill(1, forbidden, float("-inf")).argmax(1)
    assert torch.equal(tokens, want)
    torch.testing.assert_close(logps, logits.log_softmax(1).gather(1, want[:, None]).squeeze(1))


def test_a_forbidden_favourite_leaves_the_rest_in_proportion():
    """All the rest together has less probability than fp32 can hold; it is drawn as if the favourite were not there."""
    n, logits = 20_000, torch.tensor([500.0, 0.0, 0.0, 1.0])
    tokens, logps = draw(logits, n, 1, forbidden=torch.tensor([0]))
    assert abs(chi_square(tokens - 1, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).softmax(0))) < 4
    assert logps.max() == -499


@pytest.mark.parametrize("width", [1, 127, 1024, 1025, 2000, 4096])
def test_row_argmax_is_argmax(width):
    scores = torch.randint(0, 50, (30, width), generator=seeded(width)).float()
    assert torch.equal(_row_argmax(scores), scores.argmax(1))  # the first of many equals
    scores = torch.full((2, width), float("-inf"))
    scores[:, -1] = 1
    assert _row_argmax(scores).tolist() == [width - 1] * 2


def test_dtypes():
    logits, own = torch.randn(3, 9), {"seed": 0} | count_up(3)
    before = logits.clone()
    for dtype, want in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        tokens, logps = sample_tokens(logits.to(dtype), **own)
        assert (tokens.dtype, logps.dtype) == (torch.int64, want)
    sample_tokens(logits, temperature=0.3, forbidden=torch.tensor([1]), **own)
    assert torch.equal(logits, before)


BAD_OPTIONS = {
    r"positions has shape \(1,\); it must be \(2\)": {"positions": torch.zeros(1, dtype=torch.int64)},
    "prompt_ids is int32; it must be int64": {"prompt_ids": torch.zeros(2, dtype=torch.int32)},
    "seed is -1": {"seed": -1},
    "seed is 9223372036854775808": {"seed": 2**63},
    "temperature is -0.1": {"temperature": -0.1},
    "top_k is -1": {"top_k": -1},
    "top_p is 0.0": {"top_p": 0.0},
    "top_p is 1.1": {"top_p": 1.1},
    "forbidden is int32": {"forbidden": torch.zeros(1, dtype=torch.int32)},
    "4 ids of 4 are forbidden": {"forbidden": torch.arange(4)},
    "sample_tokens got a CPU tensor": {"backend": "triton"},
}


def test_what_is_refused():
    assert_refused(
        *((message, lambda o=options: draw(torch.zeros(4), 2, **o)) for message, options in BAD_OPTIONS.items())
    )


def check_is_the_twins(logits, **options):
    """The same tokens on the twin and in the kernel, their logps within fp32's rounding; returns them."""
    options |= {"seed": 2**62 + 5} | counters(logits.shape[0])
    tokens, logps = sample_tokens(logits, **options, backend="triton")
    want, want_logps = sample_tokens(logits, **options, backend="torch")
    assert torch.equal(tokens, want)
    torch.testing.assert_close(logps, want_logps, rtol=1e-5, atol=1e-5)
    return tokens, logps


@on_triton
@pytest.mark.parametrize(
    "vocabulary, dtype, n, temperature, banned",
    [
        *((3, torch.float32, 12, *rest) for rest in itertools.product([0.0, 0.1, 1.0, 2.0], [None, [0, 2]])),
        *((300, torch.float32, 16, *rest) for rest in itertools.product([0.0, 0.1, 1.0, 2.0], [None, [10, 9, 10]])),
        *((20_000, torch.bfloat16, 6, *rest) for rest in itertools.product([0.0, 1.0], [None, [1, 8192, 8193]])),
        *((151_936, torch.bfloat16, 4, t, [1, 299, 8192, 151_935]) for t in (0.0, 1.0)),
    ],
)
def test_samples_are_the_twins(vocabulary, dtype, n, temperature, banned):
    """Also where rows are flat, half or wholly impossible, or an id is forbidden twice; ties go to the first."""
    logits = (3 * torch.randn(n, vocabulary, generator=seeded(vocabulary))).to(DEVICE, dtype)
    logits[1] = 0
    logits[2, : vocabulary // 2] = float("-inf")
    logits[3] = float("-inf")
    forbidden = None if banned is None else torch.tensor(banned, device=DEVICE)
    check_is_the_twins(logits, temperature=temperature, forbidden=forbidden)


@on_triton
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_most_of_the_vocabulary_may_be_forbidden(temperature):
    """Padded ids by the thousand, whole groups of them; and a forbidden favourite far above the rest."""
    logits = torch.randn(4, 20_000, generator=seeded()).to(DEVICE)
    logits[:, 12_345] = 500
    forbidden = torch.tensor([*range(64, 128), *range(9000, 20_000)], device=DEVICE)
    for filters in ({}, {"top_k": 5}, {"top_p": 0.5}):  # with a filter the twin runs
        tokens, _ = check_is_the_twins(logits, temperature=temperature, forbidden=forbidden, **filters)
        assert not torch.isin(tokens, forbidden).any()


@BACKENDS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_no_numbers_still_draw_an_id(value, temperature, backend):
    logits = torch.full((2, 300), value, device=DEVICE)
    logits[1] = 0
    logits[1, 8] = value
    tokens, logps = sample_tokens(logits, seed=1, temperature=temperature, **counters(2), backend=backend)
    assert (tokens >= 0).all() and (tokens < 300).all() and logps.isnan().all()


@on_triton
@pytest.mark.parametrize("second", [1, 8])
def test_near_ties_are_settled_in_fp64(second):
    """Logits that even out the noise of two entries, of one group or of two, but for their own last bit.

    fp32 noise would take the other one in a third of these rows.
    """
    n, own = 60, counters(60)
    keys = row_keys(7, *own.values())
    # Entries 0 and 1 share a group; 0 and 8 are alone in theirs, whose noise decides.
    at = [0, second] if second == 1 else [FIRST_GROUP, FIRST_GROUP + 1]
    noise = gumbel(keys, torch.tensor([at], dtype=torch.int32, device=DEVICE), torch.float64)
    logits = torch.full((n, 16), float("-inf"), device=DEVICE)
    logits[:, 0] = 0
    logits[:, second] = (noise[:, 0] - noise[:, 1]).float()
    margin = noise[:, 0] - (noise[:, 1] + logits[:, second].double())
    tokens, _ = sample_tokens(logits, seed=7, **own, backend="triton")
    clear = margin.abs() > 1e-12
    assert clear.sum() > 0.9 * n
    assert torch.equal(tokens[clear], torch.where(margin > 0, 0, second)[clear])
