"""Intervals of the ablation's paired differences: their centre, their coverage, and what a claim's verdict rests on."""

import numpy as np
import pytest

from boxgrpo.bench.publish.tables import table
from boxgrpo.bench.studies.ablation import TRIED
from boxgrpo.bench.studies.claims import CLAIMS, judge, paired_interval, verdict


def runs(gain, rng, *, seeds=5, questions=500, spread=0.0):
    """(better, other) for each seed: the better method is right on a further share of `gain` ± `spread` questions."""
    found = []
    for _ in range(seeds):
        luck = rng.random(questions)
        mine = gain + spread * rng.standard_normal()
        found.append((luck < 0.5 + mine, luck < 0.5))
    return found


def test_the_interval_holds_the_true_difference_in_about_95_of_100_studies():
    rng = np.random.default_rng(0)
    studies = [paired_interval(runs(0.05, rng, spread=0.02), seed=k) for k in range(60)]
    assert np.mean([s["difference"] for s in studies]) == pytest.approx(0.05, abs=0.005)
    # With five seeds a bootstrap's interval is too narrow by a factor of about 0.9.
    assert 0.75 <= np.mean([s["low"] <= 0.05 <= s["high"] for s in studies]) <= 1


def test_the_spread_over_seeds_widens_the_interval_and_pairing_narrows_it():
    def width(pairs):
        interval = paired_interval(pairs)
        return interval["high"] - interval["low"]

    rng = np.random.default_rng(1)
    same = runs(0.05, rng)
    assert width(runs(0.05, rng, spread=0.05)) > 1.5 * width(same)
    assert width([(a, rng.permutation(b)) for a, b in same]) > 1.5 * width(same)
    assert paired_interval(same) == paired_interval(same)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.01, 0.03, "holds"), (-0.03, -0.01, "does not hold"), (-0.01, 0.03, "too close to tell")],
)
def test_a_claim_holds_if_its_whole_interval_is_above_zero(low, high, said):
    assert verdict({"low": low, "high": high}) == said


def test_claims_are_judged_on_the_seeds_that_both_methods_have():
    right, wrong = [True] * 40, [True] * 20 + [False] * 20
    hits = {("grpo", 0): right, ("grpo", 1): right, ("continued_cot_sft", 1): wrong, ("pure_rl", 2): wrong}
    (found,) = judge(hits)
    assert (found["other"], found["seeds"], found["difference"]) == ("continued_cot_sft", [1], 0.5)
    row = "| GRPO gains more than continued CoT-SFT | 1 | +50.0 | +35.0 to +65.0 | holds |"
    assert table("claims", [found | {"low": 0.35, "high": 0.65}]).splitlines()[-1] == row
    assert {name for claim in CLAIMS for name in claim[:2]} <= set(TRIED)
