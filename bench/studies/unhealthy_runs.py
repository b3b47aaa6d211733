"""GRPO runs that do not learn, for docs/training.md: the demo's with one thing changed in each.

python bench/studies/unhealthy_runs.py     writes bench/results/<device>/unhealthy_runs.json and .png, prints the table
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure

from boxgrpo.bench.machine import folder, machine
from boxgrpo.bench.publish.plots import STYLE
from boxgrpo.bench.publish.tables import table
from boxgrpo.bench.records import write
from boxgrpo.bench.studies.curves import binned
from boxgrpo.trainer import demo
from boxgrpo.trainer.arguments import option, parse
from boxgrpo.trainer.evaluation.pictures import REWARDS
from boxgrpo.trainer.options import COUNT
from boxgrpo.trainer.presence import check_paths
from boxgrpo.trainer.runtime.health import HELD_OUT, IOU, RULES, Health
from boxgrpo.trainer.runtime.ranks import run_as_script
from boxgrpo.trainer.runtime.reporter import read_metrics
from boxgrpo.trainer.world.recipe import BASE, DemoOptions, draw_world, run_flags


class Change(NamedTuple):
    """What a run has that the demo's has not, and the metric that shows what is wrong."""

    text: str
    flags: tuple[str, ...]
    metric: str
    limit: float  # beyond which docs/training.md calls the metric wrong


def limit(kind: str) -> tuple[str, float]:
    return RULES[kind].metric, RULES[kind].limit


CHANGES = {
    "healthy": Change("nothing changed", (), *limit("equal groups")),
    "no_format": Change("no cold start", (f"--model={BASE}",), *limit("no format")),
    "equal_groups": Change("temperature 0.3", ("--temperature=0.3",), *limit("equal groups")),
    "high_entropy": Change("learning rate × 20", ("--learning_rate=1e-3",), "entropy", math.nan),
    "clipped": Change("at most 14 tokens", ("--max_completion_length=14",), *limit("clipped completions")),
    "high_kl": Change("the same, its KL", ("--learning_rate=1e-3", "--beta=1e-6"), *limit("high KL")),
    "parting": Change("64 records", (), HELD_OUT, math.nan),
}
FEW_RECORDS = 64
COLUMNS = 4  # of the plot


@dataclass
class UnhealthyRunsOptions:
    """The demo's GRPO with one thing changed at a time."""

    choices: ClassVar = {}
    ranges: ClassVar = {"max_steps": COUNT}
    output_dir: str = option("out/unhealthy", "Folder for the world, the cold start and the runs.")
    max_steps: int = option(80, "Steps of each run.")


def train(o: UnhealthyRunsOptions, name: str) -> dict:
    """Train the demo's GRPO with the change; its curves, and what the health rules found."""
    world, path, few = DemoOptions(output_dir=o.output_dir), Path(o.output_dir) / name, name == "parting"
    flags = [*run_flags(world, "grpo"), f"--output_dir={path}", f"--max_steps={o.max_steps}"]
    flags += CHANGES[name].flags
    if few:
        flags += [f"--data={o.output_dir}/world/train.json#{FEW_RECORDS}", "--eval_every=10"]
        flags += [f"--eval_data={o.output_dir}/world/held_out.json"]
    demo.torchrun("grpo.py", world, flags)
    metrics, health = read_metrics(path), Health()
    for line in metrics:
        health.read(line)
    found = [{"kind": f.kind, "step": f.step, "message": f.message} for f in health.found.values()]
    curves = binned(metrics, 40)
    ious = [sum(part) / len(part) for part in (curves[IOU][:4], curves[IOU][-4:])]
    return {"name": name, "text": CHANGES[name].text, "found": found, "iou": ious, "curves": curves}


def plot(runs: Sequence[dict], out_png: Path) -> None:
    """For each run its rewards and, below, the metric that shows what is wrong, its limit, and what was found when."""
    rows = math.ceil(len(runs) / COLUMNS)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.8 * COLUMNS, 4.4 * rows))
        grid = figure.subplots(2 * rows, COLUMNS, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for k, run in enumerate(runs):
            above, below = grid[2 * (k // COLUMNS) :, k % COLUMNS][:2]
            change, curves = CHANGES[run["name"]], run["curves"]
            for key, label, colour in REWARDS:
                above.plot(curves["step"], curves[key], color=colour, label=label)
            points = [p for p in zip(curves["step"], curves[change.metric]) if p[1] is not None]
            below.plot(*zip(*points), color="#b03a68")
            below.axhline(change.limit, color="#8a8a8a", linestyle="--")
            for finding in run["found"]:
                place = {"xy": (finding["step"], 0.03), "xycoords": ("data", "axes fraction"), "ha": "right"}
                below.axvline(finding["step"], color="#8a8a8a", linewidth=1)
                below.annotate(finding["kind"], **place, rotation=90, fontsize=8)
            above.set(title=change.text, ylim=(-0.02, 1.02))
            below.set(xlabel="step", ylim=(0, None), title=change.metric)
            above.set_axis_on()
            below.set_axis_on()
        grid[0, 0].set_ylabel("mean reward")
        grid[0, 0].legend()
        figure.savefig(out_png)


def run(o: UnhealthyRunsOptions) -> dict:
    described, world = machine(), DemoOptions(output_dir=o.output_dir)
    draw_world(world)
    demo.cold_start(world)
    return {"machine": described, "steps": o.max_steps, "runs": [train(o, name) for name in CHANGES]}


def main(args: list[str] | None = None) -> None:
    options = parse(UnhealthyRunsOptions, args, prog="unhealthy_runs.py")
    check_paths(options)
    result = run(options)
    write(result, folder() / "unhealthy_runs.json")
    plot(result["runs"], folder() / "unhealthy_runs.png")
    print("\n" + table("unhealthy_runs", result))


if __name__ == "__main__":
    run_as_script(main, "unhealthy_runs.py")
