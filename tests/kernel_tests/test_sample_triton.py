"""sample_tokens in Triton: the twin's tokens, on any batch."""

import itertools

import pytest
import torch

from boxgrpo.kernels import sample_tokens
from boxgrpo.kernels.sample import FIRST_GROUP, gumbel, row_keys
from kernel_cases import DEVICE, LANE, counters, seeded

pytestmark = LANE


def check_is_the_twins(logits, **options):
    """The same tokens on the twin and in the kernel, their logps within fp32's rounding; returns them."""
    options |= {"seed": 2**62 + 5} | counters(logits.shape[0])
    tokens, logps = sample_tokens(logits, **options, backend="triton")
    want, want_logps = sample_tokens(logits, **options, backend="torch")
    assert torch.equal(tokens, want)
    torch.testing.assert_close(logps, want_logps, rtol=1e-5, atol=1e-5)
    return tokens, logps


@pytest.mark.parametrize(
    "vocabulary, dtype, n, temperature, banned",
    [
        *((3, torch.float32, 12, *rest) for rest in itertools.product([0.0, 0.1, 1.0, 2.0], [None, [0, 2]])),
        *((300, torch.float32, 16, *rest) for rest in itertools.product([0.0, 0.1, 1.0, 2.0], [None, [9, 10]])),
        *((20_000, torch.bfloat16, 6, *rest) for rest in itertools.product([0.0, 1.0], [None, [1, 8192, 8193]])),
        *((151_936, torch.bfloat16, 4, t, [1, 299, 8192, 151_935]) for t in (0.0, 1.0)),
    ],
)
def test_samples_are_the_twins(vocabulary, dtype, n, temperature, banned):
    """Also where rows are flat, half impossible and wholly impossible; ties go to the first."""
    logits = (3 * torch.randn(n, vocabulary, generator=seeded(vocabulary))).to(DEVICE, dtype)
    logits[1] = 0
    logits[2, : vocabulary // 2] = float("-inf")
    logits[3] = float("-inf")
    forbidden = None if banned is None else torch.tensor(banned, device=DEVICE)
    check_is_the_twins(logits, temperature=temperature, forbidden=forbidden)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_most_of_the_vocabulary_may_be_forbidden(temperature):
    """Padded ids by the thousand, whole groups of them; and a forbidden favourite far above the rest."""
    logits = torch.randn(4, 20_000, generator=seeded()).to(DEVICE)
    logits[:, 12_345] = 500
    forbidden = torch.tensor([*range(64, 128), *range(9000, 20_000)], device=DEVICE)
    tokens, _ = check_is_the_twins(logits, temperature=temperature, forbidden=forbidden)
    assert not torch.isin(tokens, forbidden).any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_no_numbers_still_draw_an_id(value, temperature):
    logits = torch.full((2, 300), value, device=DEVICE)
    logits[1] = 0
    logits[1, 8] = value
    tokens, logps = sample_tokens(logits, seed=1, temperature=temperature, **counters(2), backend="triton")
    assert (tokens >= 0).all() and (tokens < 300).all() and logps.isnan().all()


def test_filters_run_the_twin():
    logits = torch.randn(9, 300, generator=seeded()).to(DEVICE)
    for filters in ({"top_k": 5}, {"top_p": 0.5}):
        check_is_the_twins(logits, **filters)


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


def test_an_id_that_is_forbidden_twice_counts_once():
    forbidden = torch.tensor([2, 0, 2, 2], device=DEVICE)
    tokens, logps = check_is_the_twins(torch.zeros(20, 5, device=DEVICE), forbidden=forbidden)
    assert set(tokens.tolist()) == {1, 3, 4}
    torch.testing.assert_close(logps, torch.full((20,), -5.0, device=DEVICE).neg().log().neg())
