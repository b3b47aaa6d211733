"""Each rule of a run's health: broken just above its limit, kept just below it, over steps and not over lines."""

import re

import pytest

from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.runtime.health import RULES, Health


def findings(lines) -> dict[str, int]:
    """The step at which each kind is found."""
    health = Health()
    added = [finding for line in lines for finding in health.read(line)]
    assert {finding.kind: finding for finding in added} == health.found and len(added) == len(health.found), "once each"
    return {finding.kind: finding.step for finding in added}


def series(metric, values, every=1):
    return [{"step": every * (i + 1), metric: value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("kind", "metric", "kept", "broken", "step"),
    [
        ("no format", "rewards/format/mean", [0] * 19, [0] * 20, 20),
        ("no format", "rewards/format/mean", [*[0] * 10, 1 / 128, *[0] * 19], [0.5, *[0] * 20], 21),
        ("equal groups", "frac_reward_zero_std", [0.7] * 49, [0.7] * 50, 50),
        ("equal groups", "frac_reward_zero_std", [0.2, 1.0] * 50, [0.3, 1.0] * 25, 50),
        ("low entropy", "entropy", [0.051] * 30, [0.1] * 10 + [0.049] * 10, 16),
        ("low entropy", "entropy", [0.2] * 10 + [0.01] * 5 + [0.2] * 10, [0.049] * 10, 10),
        ("high entropy", "entropy", [0.2] * 10 + [0.59] * 50, [0.2] * 10 + [0.61] * 10, 20),
        ("high entropy", "entropy", [0.2] * 10 + [9.0] + [0.2] * 10, [0.2] * 9 + [9.0] + [0.61] * 10, 20),
        ("high entropy", "entropy", [0.02] * 10 + [0.14] * 50, [0.02] * 10 + [0.16] * 10, 20),
        ("clipped completions", "completions/clipped_ratio", [0.19] * 50, [0.21] * 10, 10),
        ("high KL", "kl", [0.1] * 5 + [1e6] * 4 + [0.1] * 20, [0.99] * 10 + [1.01] * 10, 16),
    ],
)
def test_a_rule_is_broken_above_its_limit_alone(kind, metric, kept, broken, step):
    """Over its window, at the first step that shows it; one or a few steps beside the others break nothing."""
    assert kind not in findings(series(metric, kept))
    assert findings(series(metric, broken))[kind] == step


@pytest.mark.parametrize(("every", "step"), [(2, 22), (10, 30), (100, 300)])
def test_windows_count_steps_and_hold_three_lines(every, step):
    """20 steps without format; the first line covers one step."""
    assert findings(series("rewards/format/mean", [0] * 60, every)) == {"no format": step}


def test_missing_metrics_are_passed_over():
    """Null in the file, another metric's line, and the 0 that is logged for entropy where no token was scored."""
    lines = series("entropy", [None, 0.0] * 30) + series("kl", [0.0] * 30) + series("rewards/format/mean", [None] * 30)
    assert findings(lines) == {}
    lines = series("rewards/format/mean", [0] * 20)
    lines[5:5] = [{"step": 5, "eval/mean_iou": 0.5, "eval/accuracy_at_0.5": 0.5}, {"step": 5, "loss": 1.0}]
    assert findings(lines) == {"no format": 20}


def evaluated(training, held_out, metric, count=400, every=50):
    """Lines of a run with an evaluation after every 50 steps; `training` is the metric's mean up to each."""
    for i, (value, accuracy) in enumerate(zip(training, held_out, strict=True)):
        yield from ({"step": every * i + n + 1, metric: value} for n in range(every))
        best = max(held_out[: i + 1])
        scores = {"eval/accuracy_at_0.5": accuracy, "eval/count": count, "eval/best_accuracy_at_0.5": best}
        yield {"step": every * (i + 1), **scores}


RISING, FALLING = [0.5, 0.6, 0.7, 0.72], [1.0, 0.5, 0.3, 0.28]


@pytest.mark.parametrize(
    ("training", "held_out", "count", "step"),
    [
        (RISING, [0.6, 0.7, 0.66, 0.66], 400, None),  # within two standard errors, 0.046
        (RISING, [0.6, 0.7, 0.66, 0.66], 1600, 200),
        (RISING, [0.6, 0.7, 0.68, 0.68], 1_000_000, None),  # less than 0.03, however many records
        (RISING, [0.6, 0.7, 0.6, 0.7], 400, None),  # once, not twice
        (RISING, [0.6, 0.7, 0.6, 0.6], 400, 200),
        ([0.5, 0.7, 0.71, 0.72], [0.6, 0.7, 0.6, 0.6], 400, None),  # training stands still
        (RISING, [0.7, 0.6, 0.6, 0.6], 400, 150),
    ],
)
def test_parting_needs_a_fall_beyond_noise_and_progress_in_training(training, held_out, count, step):
    found = findings(evaluated(training, held_out, "rewards/accuracy/mean", count))
    assert found == ({} if step is None else {"parting": step})


def test_parting_of_sft_is_told_by_its_loss():
    held_out = [0.6, 0.7, 0.6, 0.6]
    assert findings(evaluated(FALLING, held_out, "loss")) == {"parting": 200}
    assert findings(evaluated([1.0, 0.5, 0.49, 0.48], held_out, "loss")) == {}


def test_other_evaluation_data_begin_a_new_comparison():
    """As in a resumed run with another --eval_data, whose best score starts anew."""
    lines = [*evaluated(RISING, [0.6, 0.7, 0.5, 0.5], "rewards/accuracy/mean")]
    for line in lines:
        if line["step"] > 100 and "eval/count" in line:
            line["eval/best_accuracy_at_0.5"] = 0.5
    assert findings(lines) == {}


def test_a_message_has_the_value_the_rule_and_flags_that_exist():
    broken = {"no format": 0.0, "equal groups": 0.7, "low entropy": 0.04, "clipped completions": 0.3, "high KL": 1.5}
    lines = [line for kind, value in broken.items() for line in series(RULES[kind].metric, [value] * 50)]
    lines += series("entropy", [0.2] * 10 + [0.9] * 10)
    lines += evaluated(RISING, [0.6, 0.7, 0.6, 0.6], "rewards/accuracy/mean")
    messages = {}
    for part in (lines[:250], lines[250:]):  # entropy falls, and rises in another run
        health = Health()
        for line in part:
            health.read(line)
        messages |= {kind: finding.message for kind, finding in health.found.items()}
    assert messages.keys() == {*RULES, "parting"}
    for text in messages.values():
        flags = {*re.findall(r"--(\w+)", text)}
        assert flags and flags <= vars(GrpoOptions()).keys()
    assert "70.0% of the groups had equal rewards in 50 steps, more than 60%;" in messages["equal groups"]
    assert "0.040 nats a token in 10 steps, below 0.05;" in messages["low entropy"]
    assert "is 4.50 times that of the start (0.05 at least) in 10 steps, more than 3 times" in messages["high entropy"]
    assert (
        "was 0.700 after step 100 and is 0.600, while the IoU in training went from 0.600 to 0.720."
        in (messages["parting"])
    )
