"""The ablation's tables: the drawn world's figures, and beside each the paper's."""

import statistics
from collections.abc import Sequence

from boxgrpo.bench.publish.tables import markdown, template
from boxgrpo.trainer.evaluation.benches import BENCHES, PUBLISHED

PAPER = PUBLISHED["tables"]["Table 4"] | PUBLISHED["tables"]["Table 5"]
COLUMNS = BENCHES["mig"].columns
METHODS = {  # method: row of Table 4, or T5; what it is called here; and in the paper
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


def _by_method(runs: Sequence[dict]) -> dict[str, list[dict]]:
    """The runs of each method, seed by seed."""
    found = {name: [run for run in runs if run["method"] == name] for name in METHODS}
    return {name: mine for name, mine in found.items() if mine}


def _published(method: str) -> list[float]:
    """The paper's numbers, the average last."""
    return PAPER[METHODS[method][2]]


def _spreads(mine: Sequence[dict], keys: Sequence[str]) -> list[str]:
    return [spread([run["scores"][key] for run in mine]) for key in keys]


def summary(runs: Sequence[dict]) -> str:
    """A row a method: Acc@0.5, what it adds to its start (the same seed's), and both in the paper."""
    found, rows = _by_method(runs), []
    for name, mine in found.items():
        paper, added = _published(name)[-1], ["", ""]
        if name != "base":
            start = STARTS.get(name, "cot_sft")
            before = {run["seed"]: run["scores"]["mean"] for run in found[start]}
            gained = [run["scores"]["mean"] - before[run["seed"]] for run in mine]
            added = [spread(gained, "+"), f"{paper - _published(start)[-1]:+.2f}"]
        seconds = [run["seconds"] for run in mine if "seconds" in run]
        took = f"{statistics.fmean(seconds):.0f}" if seconds else ""
        mean, form = _spreads(mine, ("mean", "format"))
        rows.append([*METHODS[name][:2], mean, added[0], form, took, f"{paper:.2f}", added[1]])
    return markdown(["No.", "method", "drawn world", "gain", "format, %", "s", "paper, 7B", "gain"], rows)


def per_task(runs: Sequence[dict]) -> str:
    """Tables 4 and 5: a row from the drawn world and under it the paper's, in the paper's columns."""
    rows = []
    for name, mine in _by_method(runs).items():
        rows.append([*METHODS[name][:2], *_spreads(mine, (*COLUMNS, "mean"))])
        rows.append(["", "paper", *(f"{value:.2f}" for value in _published(name))])
    return markdown(["No.", "method", *COLUMNS.values(), "AVG"], rows)


def per_level(runs: Sequence[dict]) -> str:
    """Acc@0.5 at each level of the drawn world."""
    levels = [key for key in runs[0]["scores"] if key.startswith("level ")]
    rows = [[METHODS[name][1], *_spreads(mine, levels)] for name, mine in _by_method(runs).items()]
    return markdown(["method", *levels], rows)


def report(result: dict) -> str:
    """The whole page as Markdown."""
    runs = result["runs"]
    tables = {"summary": summary(runs), "per_task": per_task(runs), "per_level": per_level(runs)}
    seeds = sorted({run["seed"] for run in runs})
    return template("ablation.md").render(o=result["options"], machine=result["machine"], seeds=seeds, **tables)
