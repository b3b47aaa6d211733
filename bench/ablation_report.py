"""The ablation's tables: the drawn world's figures, and beside each the paper's."""

import statistics
from collections.abc import Sequence

from boxgrpo.bench.published import ABLATION, COLUMNS

LABELS = {
    "base": "the model that all start from",
    "pure_rl": "pure RL",
    "sft": "SFT on coordinates",
    "cot_sft": "CoT-SFT",
    "continued_cot_sft": "continued CoT-SFT",
    "grpo": "GRPO",
    "grpo_log": "GRPO-Difficulty, −log(mIoU)",
    "grpo_power": "GRPO-Difficulty, (1 − mIoU)²",
    "grpo_exp": "GRPO-Difficulty, exp(1 − mIoU)",
}
FROM = {"pure_rl": "base", "sft": "base", "cot_sft": "base"}  # the others: cot_sft


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± sample standard deviation, in points of values in 0-1; one value has no ±."""
    mean = f"{100 * statistics.fmean(values):{sign}.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _by_seed(runs: Sequence[dict], method: str) -> dict[int, dict]:
    return {run["seed"]: run for run in runs if run["method"] == method}


def _methods(runs: Sequence[dict]) -> list[str]:
    return [name for name in ABLATION if _by_seed(runs, name)]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def summary(runs: Sequence[dict]) -> str:
    """A row a method: Acc@0.5, what it adds to its start (the same seed's), and both in the paper."""
    rows = []
    for name in _methods(runs):
        mine, (row, _, paper) = _by_seed(runs, name), ABLATION[name]
        added = ["", ""]
        if name != "base":
            start = FROM.get(name, "cot_sft")
            before = _by_seed(runs, start)
            gained = [run["scores"]["mean"] - before[seed]["scores"]["mean"] for seed, run in mine.items()]
            added = [spread(gained, "+"), f"{paper - ABLATION[start][2]:+.2f}"]
        seconds = [run["seconds"] for run in mine.values() if "seconds" in run]
        rows.append(
            [
                row,
                LABELS[name],
                spread([run["scores"]["mean"] for run in mine.values()]),
                added[0],
                spread([run["scores"]["format"] for run in mine.values()]),
                f"{statistics.fmean(seconds):.0f}" if seconds else "",
                f"{paper:.2f}",
                added[1],
            ]
        )
    head = ["No.", "method", "drawn world", "gain", "format, %", "s", "paper, 7B", "gain"]
    return _markdown(head, rows)


def per_task(runs: Sequence[dict]) -> str:
    """Tables 4 and 5: a row from the drawn world and under it the paper's, in the paper's columns."""
    rows = []
    for name in _methods(runs):
        scores = [run["scores"] for run in _by_seed(runs, name).values()]
        row, tasks, average = ABLATION[name]
        rows.append([row, LABELS[name], *(spread([s[task] for s in scores]) for task in (*COLUMNS, "mean"))])
        rows.append(["", "paper", *(f"{value:.2f}" for value in (*tasks, average))])
    return _markdown(["No.", "method", *COLUMNS.values(), "AVG"], rows)


def per_level(runs: Sequence[dict]) -> str:
    """Acc@0.5 at each level of the drawn world."""
    levels = [key for key in runs[0]["scores"] if key.startswith("level ")]
    rows = []
    for name in _methods(runs):
        scores = [run["scores"] for run in _by_seed(runs, name).values()]
        rows.append([LABELS[name], *(spread([s[level] for s in scores]) for level in levels)])
    return _markdown(["method", *levels], rows)


def report(result: dict) -> str:
    """The whole page as Markdown."""
    runs, o, described = result["runs"], result["options"], result["machine"]
    seeds = sorted({run["seed"] for run in runs})
    return f"""# The ablation on the drawn world

Acc@0.5 in points on {o["held_out"]} held-out scenes of each seed ({", ".join(map(str, seeds))}), ten tasks at three
levels: mean ± standard deviation over the seeds. Stage 1 has {o["cold_start"]} scenes, stage 2 and pure RL
{o["train"]}. *Gain* is over the checkpoint that a method begins with, of the same seed; *s* are seconds of training;
*No.* is the row of the paper's Table 4, T5 a row of Table 5. The paper's figures are those of Qwen2-VL-7B on MIG-Bench,
another model and other pictures: what can be compared is which method gains on which, not how much.

{described["device"]}, torch {described["torch"]}, {described["revision"]}, {described["date"]}.

{summary(runs)}

## By task, as in Tables 4 and 5

{per_task(runs)}

## By level

{per_level(runs)}

## Figure 3

Shares of easy (mean IoU of a group above 0.7), medium and hard (below 0.3) groups, and the rewards, while training.
Lines are means over the seeds, bands reach from the lowest to the highest.

![Shares of easy, medium and hard groups, and rewards](curves.png)
"""
