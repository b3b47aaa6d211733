"""What is wrong with a run, found in its lines of metrics: each kind once, with the value, the rule and the remedy.

docs/training.md, "My reward does not move", explains the kinds in the order in which to check them.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from operator import gt, le, lt
from statistics import fmean, median
from typing import NamedTuple

# A window holds the latest lines that cover so many steps, of which --logging_steps may leave out some. It holds three
# lines at least: then one outlier does not move their median.
FEWEST_LINES = 3
RECENT_STEPS = 10  # covered by a window, unless a rule has reason for more
NO_FORMAT_STEPS = 20  # 2560 completions in a row at 16 prompts a step and 8 completions each
# A share of the groups. A step learns from the rest alone, fewer than two in five of the prompts that it sampled. In a
# step of 16 groups the share has a standard deviation of 0.12, its mean over 50 steps one of 0.02.
MOST_EQUAL_GROUPS, EQUAL_GROUPS_STEPS = 0.6, 50
LEAST_ENTROPY = 0.05  # nats a token; a choice of two, the likelier one at 99 %, has 0.056
MOST_ENTROPY_GROWTH = 3.0  # times the start, or times LEAST_ENTROPY where it starts lower
START_LINES = 10  # whose median entropy is the start
MOST_CLIPPED = 0.2  # a share of the completions, few of which have an answer, whatever their reasoning is worth
# Nats a token: a token is e times as likely as it was to the starting model. A run of VLM-R1 on boxes has 0.08 to 0.2
# (github.com/om-ai-lab/VLM-R1/issues/44). One token can raise the mean of one step far more and do no harm: a median.
MOST_KL = 1.0
# Held-out Acc@0.5 has fallen if two evaluations in a row are below the best by more than its noise: by 2 standard
# errors, which are 0.05 for 400 records, and by 0.03 for however many.
FALL_ERRORS, LEAST_FALL = 2.0, 0.03
PARTING_STEPS = 50  # of training before an evaluation: the mean IoU of 16 prompts a step has a standard error of 0.01
LEAST_IOU_RISE = 0.03
LEAST_LOSS_FALL = 0.05  # of SFT's loss, a share of it

ENTROPY, ENTROPY_GROWTH = "entropy", "entropy growth"  # the second is derived from the first
IOU, LOSS = "rewards/accuracy/mean", "loss"
HELD_OUT, BEST_HELD_OUT = "eval/accuracy_at_0.5", "eval/best_accuracy_at_0.5"


class Rule(NamedTuple):
    """Broken where the `summary` of the metric's values over `steps` steps compares with `limit` by `breaks`."""

    metric: str
    steps: int
    summary: Callable[[Sequence[float]], float]
    breaks: Callable[[float, float], bool]
    limit: float
    message: str


RULES = {
    "no format": Rule(
        *("rewards/format/mean", NO_FORMAT_STEPS, max, le, 0.0),
        "no completion had the answer format in {steps} steps, so none can be preferred for it. Train a cold start "
        "first, or a longer one; if completions are cut off, raise --max_completion_length.",
    ),
    "equal groups": Rule(
        *("frac_reward_zero_std", EQUAL_GROUPS_STEPS, fmean, gt, MOST_EQUAL_GROUPS),
        "{value:.1%} of the groups had equal rewards in {steps} steps, more than {limit:.0%}; they teach nothing. "
        "Raise --temperature or --num_generations, train on easier or harder data, or give --dynamic_sampling true.",
    ),
    "low entropy": Rule(
        *(ENTROPY, RECENT_STEPS, median, lt, LEAST_ENTROPY),
        "the entropy is {value:.3f} nats a token in {steps} steps, below {limit}; the completions of a prompt are "
        "nearly the same. Raise --temperature, lower --learning_rate, or begin with a shorter cold start.",
    ),
    "high entropy": Rule(
        *(ENTROPY_GROWTH, RECENT_STEPS, median, gt, MOST_ENTROPY_GROWTH),
        "the entropy is {value:.2f} times that of the start (0.05 at least) in {steps} steps, more than {limit:.0f} "
        "times; the completions become random. Lower --learning_rate, --max_grad_norm or --temperature, or raise "
        "--beta.",
    ),
    "clipped completions": Rule(
        *("completions/clipped_ratio", RECENT_STEPS, fmean, gt, MOST_CLIPPED),
        "{value:.1%} of the completions were cut off in {steps} steps, more than {limit:.0%}; few of those have an "
        "answer. Raise --max_completion_length, or train a cold start on shorter chains.",
    ),
    "high KL": Rule(
        *("kl", RECENT_STEPS, median, gt, MOST_KL),
        "the KL to the starting model is {value:.3g} nats a token in {steps} steps, more than {limit:.0f}. Lower "
        "--learning_rate or --max_grad_norm, or raise --beta, and --resume an earlier checkpoint.",
    ),
}
METRICS = {rule.metric for rule in RULES.values()} - {ENTROPY_GROWTH} | {IOU, LOSS}


class Finding(NamedTuple):
    kind: str
    step: int
    message: str


class Evaluation(NamedTuple):
    step: int
    held_out: float  # Acc@0.5
    training: float  # IoU, or SFT's loss, over the steps before


class Health:
    """Reads a run's lines of metrics in order; `found` has the first finding of each kind."""

    def __init__(self):
        self.found: dict[str, Finding] = {}
        # By metric its latest lines: the number of steps that a line covers, and its value.
        self.history = defaultdict(lambda: deque(maxlen=max(EQUAL_GROUPS_STEPS, PARTING_STEPS)))
        self.last_step: dict[str, int] = {}  # by metric
        self.start: list[float] = []  # entropies
        self.best: Evaluation | None = None
        self.previous = math.inf  # held-out score

    def read(self, line: dict) -> list[Finding]:
        """The findings that the line adds. Metrics that it lacks, or that are None, are passed over."""
        step = line["step"]
        values = {name: line[name] for name in METRICS if line.get(name) is not None}
        if not values.get(ENTROPY):  # 0 where no group had a gradient, so that no token was scored
            values.pop(ENTROPY, None)
        elif len(self.start) < START_LINES:
            self.start.append(values[ENTROPY])
        else:
            values[ENTROPY_GROWTH] = values[ENTROPY] / max(median(self.start), LEAST_ENTROPY)
        for name, value in values.items():
            self.history[name].append((step - self.last_step.get(name, step - 1), value))
            self.last_step[name] = step
        messages = {}
        for kind, rule in RULES.items():
            window = self.window(rule.metric, rule.steps) if rule.metric in values else []
            if window and rule.breaks(value := rule.summary(window), rule.limit):
                messages[kind] = rule.message.format(value=value, steps=rule.steps, limit=rule.limit)
        if line.get(HELD_OUT) is not None and (message := self.parting(line)):
            messages["parting"] = message
        added = [Finding(kind, step, text) for kind, text in messages.items() if kind not in self.found]
        self.found |= {finding.kind: finding for finding in added}
        return added

    def window(self, metric: str, steps: int) -> list[float]:
        """The metric's latest values that cover so many steps; [] if there are too few."""
        values, covered = [], 0
        for covers, value in reversed(self.history[metric]):
            values.append(value)
            covered += covers
            if covered >= steps and len(values) >= FEWEST_LINES:
                return values
        return []

    def parting(self, line: dict) -> str:
        """A message where training has improved since the best evaluation, and the held-out score has fallen twice."""
        metric = IOU if self.history[IOU] else LOSS
        training = self.window(metric, PARTING_STEPS) or [value for _, value in self.history[metric]]
        if not training:
            return ""
        now, best = Evaluation(line["step"], line[HELD_OUT], fmean(training)), self.best
        previous, self.previous = self.previous, now.held_out
        # The run's best score is lower than the one here where other data are evaluated than before.
        if best is None or now.held_out > best.held_out or line.get(BEST_HELD_OUT, 1.0) < best.held_out:
            self.best = now
            return ""
        error = math.sqrt(best.held_out * (1 - best.held_out) / max(1, line.get("eval/count", 1)))
        fell = best.held_out - max(previous, now.held_out) > max(LEAST_FALL, FALL_ERRORS * error)
        if metric == IOU:
            name, improved = "IoU", now.training - best.training > LEAST_IOU_RISE
        else:
            name, improved = "loss", now.training < (1 - LEAST_LOSS_FALL) * best.training
        if not (fell and improved):
            return ""
        return (
            f"Acc@0.5 on eval_data was {best.held_out:.3f} after step {best.step} and is {now.held_out:.3f}, while the "
            f"{name} in training went from {best.training:.3f} to {now.training:.3f}. Use output_dir/best, "
            "train on more data or for fewer --num_train_epochs, or lower --learning_rate."
        )
