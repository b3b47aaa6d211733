"""The ablation's tables: the drawn world's figures, and beside each the paper's."""

import statistics
from collections.abc import Sequence

from boxgrpo.trainer.evaluation.benches import BENCHES
from boxgrpo.trainer.evaluation.published import DIFFICULTY_FUNCTIONS, STAGES

PAPER = STAGES.rows | DIFFICULTY_FUNCTIONS.rows
COLUMNS = BENCHES["mig"].columns
METHODS = {  # recipe: row of Table 4, or T5; what it is called here; and in the paper
    "base": ("1", "the model that all start from", "Qwen2-VL-7B"),
    "pure_rl": ("2", "pure RL", "Pure RL (21k)"),
    "sft": ("4", "SFT on coordinates", "SFT (90k)"),
    "cot_sft": ("5", "CoT-SFT", "CoT-SFT (90k)"),
    "continued_cot_sft": ("6", "continued CoT-SFT", "CoT-SFT (10k)"),
    "grpo": ("7", "GRPO", "GRPO (10k)"),
    "grpo_log": ("T5", "GRPO-Difficulty, −log(mIoU)", "GRPO-Difficulty, log"),
    "grpo_power": ("T5", "GRPO-Difficulty, (1 − mIoU)²", "GRPO-Difficulty, power"),
    "grpo_exp": ("8", "GRPO-Difficulty, exp(1 − mIoU)", "GRPO-Difficulty, exp"),
}
FROM = {"pure_rl": "base", "sft": "base", "cot_sft": "base"}  # the others: cot_sft


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± sample standard deviation, in points of values in 0-1; one value has no ±."""
    mean = f"{100 * statistics.fmean(values):{sign}.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _by_seed(runs: Sequence[dict], method: str) -> dict[int, dict]:
    return {run["seed"]: run for run in runs if run["method"] == method}


def _methods(runs: Sequence[dict]) -> list[str]:
    return [name for name in METHODS if _by_seed(runs, name)]


def _published(method: str) -> tuple[float, ...]:
    """The paper's numbers, the average last."""
    return PAPER[METHODS[method][2]]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def summary(runs: Sequence[dict]) -> str:
    """A row a method: Acc@0.5, what it adds to its start (the same seed's), and both in the paper."""
    rows = []
    for name in _methods(runs):
        mine, (row, label, _), paper = _by_seed(runs, name), METHODS[name], _published(name)[-1]
        added = ["", ""]
        if name != "base":
            start = FROM.get(name, "cot_sft")
            before = _by_seed(runs, start)
            gained = [run["scores"]["mean"] - before[seed]["scores"]["mean"] for seed, run in mine.items()]
            added = [spread(gained, "+"), f"{paper - _published(start)[-1]:+.2f}"]
        seconds = [run["seconds"] for run in mine.values() if "seconds" in run]
        rows.append(
            [
                row,
                label,
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
        row, label, _ = METHODS[name]
        rows.append([row, label, *(spread([s[task] for s in scores]) for task in (*COLUMNS, "mean"))])
        rows.append(["", "paper", *(f"{value:.2f}" for value in _published(name))])
    return _markdown(["No.", "method", *COLUMNS.values(), "AVG"], rows)


def per_level(runs: Sequence[dict]) -> str:
    """Acc@0.5 at each level of the drawn world."""
    levels = [key for key in runs[0]["scores"] if key.startswith("level ")]
    rows = []
    for name in _methods(runs):
        scores = [run["scores"] for run in _by_seed(runs, name).values()]
        rows.append([METHODS[name][1], *(spread([s[level] for s in scores]) for level in levels)])
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
