"""What GRPO adds to the demo's cold start, on three seeds, beside continued SFT for the same seconds (Table 4, row 6).

python bench/studies/demo_seeds.py     writes bench/results/<device>/demo.json, prints the table
"""

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from boxgrpo.bench.machine import folder, machine
from boxgrpo.trainer import demo
from boxgrpo.trainer.arguments import option, parse
from boxgrpo.trainer.runtime.ranks import run_as_script
from boxgrpo.trainer.world import recipe


@dataclass
class BenchDemoOptions:
    """The demo on several seeds, each with continued SFT beside GRPO."""

    seeds: str = option("0,1,2", "Seeds, separated by commas.")
    output_dir: str = option("out/seeds", "Folder for the runs.")


STAGES = {"before": "sft", "after": "grpo", "continued_sft": "continued_sft"}


def habits(run: Path) -> dict[str, dict[str, float]]:
    """Of each stage's held-out answers the share that leaves a margin, and Acc@0.5 of the rest.

    At level 0 the demo's exact boxes stand on quarters of the image; only a margin ends on an odd eighth.
    """
    found = {}
    for stage, name in STAGES.items():
        answers = json.loads((run / f"eval_{name}/results.json").read_text())["answers"]
        rest = [a["iou"] > 0.5 for a in answers if not any(v % 250 for v in a["box"] or ())]
        found[stage] = {"margin": 1 - len(rest) / len(answers), "rest_accuracy_at_0.5": sum(rest) / max(1, len(rest))}
    return found


def table(result: dict) -> str:
    """The runs as Markdown: cold start → GRPO | continued SFT, in points and mean IoU of well-formed answers."""
    rows = [
        "| seed | | cold start | after GRPO | continued SFT |",
        "|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        details = [run["details"][stage] for stage in STAGES]
        kept = [run["habits"][stage] for stage in STAGES]
        points = [100 * run[stage]["mean"] for stage in STAGES]
        lifted = [f"{p:.1f} ({p - points[0]:+.1f})" for p in points[1:]]
        seconds = [run["stage_seconds"][name] for name in ("cold_start", "grpo", "continued_sft")]
        for number, label, cells in (
            (str(run["seed"]), "Acc@0.5", [f"{points[0]:.1f}", *lifted]),
            ("", "IoU", [f"{d['well_formed_iou']:.3f}" for d in details]),
            ("", "format", [f"{d['format']:.3f}" for d in details]),
            ("", "answers with a margin", [f"{100 * k['margin']:.0f} %" for k in kept]),
            ("", "Acc@0.5 of the others", [f"{100 * k['rest_accuracy_at_0.5']:.1f}" for k in kept]),
            ("", "seconds", [f"{v:.0f}" for v in seconds]),
        ):
            rows.append("| " + " | ".join([number, label, *cells]) + " |")
    return "\n".join(rows)


def run(options: BenchDemoOptions) -> dict:
    """Every seed's summary, with the machine's name."""
    described = machine()  # before hours pass and the tree moves on
    runs = []
    for seed in map(int, options.seeds.split(",")):
        path = Path(options.output_dir) / str(seed)
        summary = demo.run(recipe.DemoOptions(output_dir=str(path), seed=seed, continued_sft=True))
        runs.append(summary | {"habits": habits(path)})
    return {"machine": described, "runs": runs}


def keep(result: dict, options: BenchDemoOptions, into: Path) -> None:
    """What the README shows: the figures, and the first seed's pictures in a palette."""
    (into / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    pictures = Image.open(f"{options.output_dir}/{result['runs'][0]['seed']}/pictures.png")
    pictures.quantize(128).save(into / "demo.png", optimize=True)


def main(args: list[str] | None = None) -> None:
    options = parse(BenchDemoOptions, args, prog="bench_demo.py")
    result = run(options)
    keep(result, options, folder())
    print("\n" + table(result))


if __name__ == "__main__":
    run_as_script(main, "bench_demo.py")
