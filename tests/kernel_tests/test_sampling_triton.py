"""sample_tokens in Triton: the twin's tokens, on any batch."""

import pytest
import torch

from boxgrpo.kernels import sample_tokens
from boxgrpo.kernels.sample_torch import FIRST_GROUP, gumbel, row_keys
from kernel_cases import DEVICE, LANE, counters, seeded

pytestmark = LANE


@pytest.mark.parametrize(
    "vocabulary, dtype, n",
    [(3, torch.float32, 20), (300, torch.float32, 40), (20_000, torch.bfloat16, 20), (151_936, torch.bfloat16, 8)],
)
@pytest.mark.parametrize("temperature", [0.0, 0.1, 1.0, 2.0])
@pytest.mark.parametrize("banned", [None, [0, 2], [9, 10], [1, 299, 8192, 8193, 151_935]], ids=str)
def test_samples_are_the_twins(vocabulary, dtype, n, temperature, banned):
    """The same token on the twin and in the kernel, its logp within fp32's rounding; ties go to the first."""
    logits = (3 * torch.randn(n, vocabulary, generator=seeded(vocabulary))).to(DEVICE, dtype)
    logits[1] = 0
    logits[2, : vocabulary // 2] = float("-inf")
    logits[3] = float("-inf")
    forbidden = None
    if banned is not None:
        forbidden = torch.tensor([i for i in banned if i < vocabulary], dtype=torch.int64, device=DEVICE)
    options = {"seed": 2**62 + 5, "temperature": temperature, "forbidden": forbidden} | counters(n)
    tokens, logps = sample_tokens(logits, **options, backend="triton")
    want, want_logps = sample_tokens(logits, **options, backend="torch")
    assert torch.equal(tokens, want)
    torch.testing.assert_close(logps, want_logps, rtol=1e-5, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch():
    logits = torch.randn(20, 20_000, generator=seeded()).to(DEVICE)
    own = counters(20)
    whole = sample_tokens(logits, seed=3, **own, backend="triton")
    order = torch.randperm(20, generator=seeded(1)).to(DEVICE)
    shuffled = sample_tokens(logits[order], seed=3, **{k: v[order] for k, v in own.items()}, backend="triton")
    alone = sample_tokens(logits[7:8], seed=3, **{k: v[7:8] for k, v in own.items()}, backend="triton")
    for a, b, c in zip(whole, shuffled, alone, strict=True):
        assert torch.equal(a[order], b) and torch.equal(a[7:8], c)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_most_of_the_vocabulary_may_be_forbidden(temperature):
    """Padded ids by the thousand, whole groups of them; and a forbidden favourite far above the rest."""
    logits = torch.randn(8, 20_000, generator=seeded()).to(DEVICE)
    logits[:, 12_345] = 500
    forbidden = torch.tensor([*range(64, 128), *range(9000, 20_000)], device=DEVICE)
    options = {"seed": 5, "temperature": temperature, "forbidden": forbidden} | counters(8)
    tokens, logps = sample_tokens(logits, **options, backend="triton")
    want, want_logps = sample_tokens(logits, **options, backend="torch")
    assert torch.equal(tokens, want) and not torch.isin(tokens, forbidden).any()
    torch.testing.assert_close(logps, want_logps)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_no_numbers_still_draw_an_id(value, temperature):
    logits = torch.full((2, 300), value, device=DEVICE)
    logits[1] = 0
    logits[1, 8] = value
    tokens, logps = sample_tokens(logits, seed=1, temperature=temperature, **counters(2), backend="triton")
    assert (tokens >= 0).all() and (tokens < 300).all() and logps.isnan().all()


def test_filters_go_through_the_twin():
    logits = torch.randn(9, 300, generator=seeded()).to(DEVICE)
    for filters in ({"top_k": 5}, {"top_p": 0.5}):
        got = sample_tokens(logits, seed=3, **counters(9), **filters, backend="triton")
        want = sample_tokens(logits, seed=3, **counters(9), **filters, backend="torch")
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("second", [1, 8])
def test_near_ties_are_settled_in_fp64(second):
    """Logits that even out the noise of two entries, of one group or of two, but for their own last bit.

    fp32 noise would take the other one in a third of these rows.
    """
    n, own = 200, counters(200)
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


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_an_id_that_is_forbidden_twice_counts_once(backend):
    forbidden = torch.tensor([2, 0, 2, 2], device=DEVICE)
    options = {"seed": 1, "forbidden": forbidden, "backend": backend} | counters(40)
    tokens, logps = sample_tokens(torch.zeros(40, 5, device=DEVICE), **options)
    assert set(tokens.tolist()) == {1, 3, 4}
    torch.testing.assert_close(logps, torch.full((40,), -5.0, device=DEVICE).neg().log().neg())
