"""List the runs in a folder: their latest metrics, and what is wrong with them.

boxgrpo runs out/demo        a run's output_dir, or a folder with runs at most two levels down
"""

from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from boxgrpo.trainer.arguments import FlagParser
from boxgrpo.trainer.evaluation.report import ABSENT, align
from boxgrpo.trainer.runtime.health import HELD_OUT, Finding, Health
from boxgrpo.trainer.runtime.ranks import run_as_script
from boxgrpo.trainer.runtime.reporter import METRICS, read_metrics

LATEST = 10  # lines of metrics whose mean is shown
COLUMNS = {
    "reward": "reward",
    "IoU": "rewards/accuracy/mean",
    "format": "rewards/format/mean",
    "equal groups": "frac_reward_zero_std",
    "entropy": "entropy",
    "loss": "loss",
    "held-out Acc": HELD_OUT,
}


class Run(NamedTuple):
    """A run as its metrics show it. `steps` is None before the first line."""

    step: int
    steps: int | None
    ended: bool
    latest: dict[str, float]  # by the names of COLUMNS
    findings: list[Finding]


def find_runs(root: Path) -> list[Path]:
    """The folders that hold metrics: `root`, and those one and two levels below it."""
    return sorted(path.parent for depth in ("", "*/", "*/*/") for path in root.glob(depth + METRICS))


def read_run(folder: Path) -> Run:
    lines, health = read_metrics(folder), Health()
    for line in lines:
        health.read(line)
    step, steps = max((line["step"] for line in lines), default=0), lines[-1].get("total_steps") if lines else None
    latest = {}
    for column, metric in COLUMNS.items():
        if values := [line[metric] for line in lines if line.get(metric) is not None]:
            latest[column] = fmean(values[-1 if metric == HELD_OUT else -LATEST :])
    ended = any(folder.glob("*.safetensors")) and step == steps
    return Run(step, steps, ended, latest, [*health.found.values()])


def table(root: Path, folders: list[Path]) -> str:
    """A line for each run, its findings below it."""
    runs = [read_run(folder) for folder in folders]
    rows = [["run", "step", *COLUMNS, ""]]
    for folder, run in zip(folders, runs, strict=True):
        name = root.resolve().name if folder == root else str(folder.relative_to(root))
        step = f"{run.step} of {run.steps or '?'}"
        values = [f"{run.latest[column]:z.3f}" if column in run.latest else ABSENT for column in COLUMNS]
        rows.append([name, step, *values, "ended" if run.ended else "not ended"])
    head, *shown = align(rows).split("\n")
    text = [head]
    for line, run in zip(shown, runs, strict=True):
        text += [line, *(f"  step {finding.step}: {finding.message}" for finding in run.findings)]
    note = f"Means of each run's last {LATEST} lines of metrics; of the held-out Acc@0.5 the last one."
    if any(run.findings for run in runs):
        note += ' docs/training.md, "My reward does not move", says more about what was found.'
    return "\n".join([*text, "", note])


def main(args: list[str] | None = None) -> None:
    parser = FlagParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("path", type=Path, help="a run's output_dir, or a folder with runs at most two levels down")
    root = parser.parse_args(args).path
    if not root.is_dir():
        raise ValueError(f"path is {root}; there is no such folder. Name a run's output_dir, or a folder with runs.")
    if not (folders := find_runs(root)):
        raise ValueError(
            f"path is {root}; neither it nor a folder at most two levels down holds {METRICS}. Name a run's "
            "output_dir, or a folder with runs."
        )
    print(table(root, folders))


if __name__ == "__main__":
    run_as_script(main, "runs.py")
