"""What the ablation's tables show of each method: the drawn world's figures, and beside them the paper's."""

import statistics
from collections.abc import Sequence

from boxgrpo.trainer.evaluation.benches import BENCHES
from boxgrpo.trainer.evaluation.questions import FACTS

PAPER = FACTS["tables"]["Table 4"] | FACTS["tables"]["Table 5"]
COLUMNS = BENCHES["mig"].columns
METHODS = {  # method: row of Table 4, or T5; its name here; and in the paper
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
STARTS = {"pure_rl": "base", "sft": "base", "cot_sft": "base"}  # the others: cot_sft


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± sample standard deviation, in points of values in 0-1; one value has no ±."""
    mean = f"{100 * statistics.fmean(values):{sign}.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def by_method(runs: Sequence[dict]) -> list[dict]:
    """A row for each method that has runs: spreads over the seeds, and the paper's numbers, the average last.

    `gain` is the difference to the run of the same seed that the method starts from; `paper_gain` the paper's.
    """
    found, rows = {name: [run for run in runs if run["method"] == name] for name in METHODS}, []
    for name, mine in found.items():
        if not mine:
            continue
        number, title, in_paper = METHODS[name]
        row = {"number": number, "name": title, "paper": PAPER[in_paper], "gain": "", "paper_gain": ""}
        row["scores"] = {key: spread([run["scores"][key] for run in mine]) for key in mine[0]["scores"]}
        if name != "base":
            start = STARTS.get(name, "cot_sft")
            before = {run["seed"]: run["scores"]["mean"] for run in found[start]}
            row["gain"] = spread([run["scores"]["mean"] - before[run["seed"]] for run in mine], "+")
            row["paper_gain"] = f"{row['paper'][-1] - PAPER[METHODS[start][2]][-1]:+.2f}"
        seconds = [run["seconds"] for run in mine if "seconds" in run]
        rows.append(row | {"seconds": statistics.fmean(seconds) if seconds else None})
    return rows
