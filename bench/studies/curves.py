"""The metrics of the ablation's runs, step by step: thinned for the record, and drawn as the paper's Figure 3."""

import math
import os
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from boxgrpo.bench.publish.plots import STYLE
from boxgrpo.trainer.evaluation.pictures import DIFFICULTY, REWARDS

BINS = 20
GRADIENT = [(key.replace("/", "/gradient_"), label, colour) for key, label, colour in DIFFICULTY]
LEFT_OUT = ("timing_s/", "perf/", "data/", *"step total_steps num_tokens epoch skipped_steps learning_rate".split())
TITLES = {
    "pure_rl": "pure RL",
    "grpo": "GRPO",
    "grpo_log": "−log(mIoU)",
    "grpo_power": "(1 − mIoU)²",
    "grpo_exp": "exp(1 − mIoU)",
}


def binned(metrics: Sequence[dict], bins: int = BINS) -> dict[str, list]:
    """Each metric's mean over every `bins`-th part of the run, and the last `step` of that part."""
    parts = [part for part in np.array_split(np.array(metrics, dtype=object), bins) if len(part)]
    keys = {k for m in metrics for k, v in m.items() if not k.startswith(LEFT_OUT) and v is not None}
    curves = {"step": [part[-1]["step"] for part in parts]}
    for key in sorted(keys):
        values = [[m[key] for m in part if m.get(key) is not None] for part in parts]
        curves[key] = [round(math.fsum(v) / len(v), 4) if v else None for v in values]
    return curves


def plot(runs: Sequence[dict], out_png: str | os.PathLike) -> None:
    """A column for each method with RL: shares of easy, medium and hard groups (Figure 3) and of the gradient, rewards.

    Lines are means over the seeds, bands reach from the lowest seed to the highest. Nothing is drawn without such runs.
    """
    columns = {name: found for name in TITLES if (found := [r["curves"] for r in runs if r["method"] == name])}
    if not columns:
        return
    with rc_context(STYLE):
        figure = Figure(figsize=(3.2 * len(columns) + 0.6, 9))
        grid = figure.subplots(3, len(columns), squeeze=False, sharex="col", sharey=True)
        for column, (name, curves) in enumerate(columns.items()):
            steps = curves[0]["step"]
            for axes, drawn in zip(grid[:, column], (DIFFICULTY, GRADIENT, REWARDS)):
                for key, label, colour in drawn:
                    values = np.array([c[key] for c in curves], dtype=float)  # (seeds, bins)
                    axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
                    axes.plot(steps, values.mean(0), color=colour, linewidth=2, label=label)
            grid[0, column].set_title(TITLES[name])
            grid[-1, column].set(xlabel="step", ylim=(-0.02, 1.02))
        for axes, label in zip(grid[:, 0], ("share of groups", "share of the gradient", "mean reward")):
            axes.set_ylabel(label)
            axes.legend()
        figure.savefig(out_png)
