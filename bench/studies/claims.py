"""The paper's claims on trial: two methods' differences, paired by seed and question, with bootstrap intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95  # of the intervals


class Claim(NamedTuple):
    """`better` answers more held-out questions right than `other`."""

    better: str  # methods of ablation.py
    other: str
    text: str


CLAIMS = (
    Claim("grpo", "continued_cot_sft", "GRPO gains more than continued CoT-SFT"),
    Claim("grpo", "pure_rl", "CoT-SFT and GRPO reach more than pure RL with the same samples"),
    Claim("grpo_exp", "grpo", "GRPO-Difficulty reaches more than GRPO"),
)


def paired_interval(pairs: Sequence[tuple[Sequence[bool], Sequence[bool]]], *, seed: int = 0) -> dict[str, float]:
    """Mean difference of two methods' accuracies and its bootstrap interval.

    A resample draws seeds with replacement, then for each of them questions with replacement, the same for both
    methods: so the interval holds the spread over runs and that over questions.

    Args:
        pairs: for each seed whether each question is answered right, by the first method and by the second; as many
            questions for each seed.

    Returns:
        `difference`, `low` and `high`, in 0-1.
    """
    rng = np.random.default_rng(seed)
    gains = np.array([np.asarray(a, dtype=int) - np.asarray(b, dtype=int) for a, b in pairs])  # (seeds, questions)
    shares = np.stack([(gains == value).mean(1) for value in (-1, 0, 1)], axis=1)  # (seeds, 3)
    drawn = rng.integers(len(gains), size=(RESAMPLES, len(gains)))
    # Of a seed's resampled questions only the counts of these three values matter.
    counts = rng.multinomial(gains.shape[1], shares[drawn])  # (RESAMPLES, seeds, 3)
    resampled = (counts[..., 2] - counts[..., 0]).mean(1) / gains.shape[1]
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"difference": float(gains.mean()), "low": float(low), "high": float(high)}


def verdict(interval: dict[str, float]) -> str:
    """Whether a claim holds by its interval."""
    if interval["low"] > 0:
        return "holds"
    return "does not hold" if interval["high"] < 0 else "too close to tell"


def judge(hits: dict[tuple[str, int], Sequence[bool]]) -> list[dict]:
    """The claims whose methods both ran on some seed, each with its interval and verdict.

    Args:
        hits: whether each held-out question is answered right, by (method, seed).
    """
    found = []
    for claim in CLAIMS:
        seeds = sorted(seed for method, seed in hits if method == claim.better and (claim.other, seed) in hits)
        if seeds:
            interval = paired_interval([(hits[claim.better, seed], hits[claim.other, seed]) for seed in seeds])
            found.append(claim._asdict() | interval | {"seeds": seeds, "verdict": verdict(interval)})
    return found
