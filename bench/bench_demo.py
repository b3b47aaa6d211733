"""What GRPO adds to the demo's cold start, on three seeds, beside continued SFT for the same seconds (Table 4, row 6).

python bench/bench_demo.py     half an hour on two CPU cores; writes bench/results/<device>/demo.json, prints the table
"""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from boxgrpo.trainer import demo
from boxgrpo.trainer.options import option, parse

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class BenchDemoOptions:
    """The demo on several seeds, each with continued SFT beside GRPO."""

    seeds: str = option("0,1,2", "Seeds, separated by commas.")
    output_dir: str = option("out/seeds", "Folder for the runs; a seed that is done there is not run again.")


def machine() -> dict[str, str]:
    """What a figure must be read with."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    described = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    revision = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    return {
        "device": gpu or f"{described[0].split(': ')[1]}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "revision": subprocess.run(revision, capture_output=True, text=True).stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def table(result: dict) -> str:
    """The runs as Markdown: Acc@0.5 in points, and the mean IoU of well-formed answers."""
    rows = [
        "| seed | cold start | after GRPO | lift | IoU before → after | continued SFT | seconds of GRPO, of SFT |",
        "|---|---|---|---|---|---|---|",
    ]
    lifts = []
    for run in result["runs"]:
        before, after, more = (100 * run[stage]["mean"] for stage in ("before", "after", "continued_sft"))
        ious = [run["details"][stage]["well_formed_iou"] for stage in ("before", "after")]
        lifts.append(after - before)
        rows.append(
            f"| {run['seed']} | {before:.1f} | {after:.1f} | {lifts[-1]:+.1f} | {ious[0]:.3f} → {ious[1]:.3f} "
            f"| {more:.1f} | {run['stage_seconds']['grpo']:.0f}, {run['stage_seconds']['continued_sft']:.0f} |"
        )
    rows.append(f"| mean | | | {sum(lifts) / len(lifts):+.1f} | | | |")
    return "\n".join(rows)


def run(options: BenchDemoOptions) -> dict:
    """Every seed's summary, with the machine's name; a seed's summary.json ends its run."""
    runs, described = [], machine()  # the revision that the runs begin with
    for seed in map(int, options.seeds.split(",")):
        folder = Path(options.output_dir) / str(seed)
        done = folder / "summary.json"
        if not done.exists():
            demo.run(demo.DemoOptions(output_dir=str(folder), seed=seed, continued_sft=True))
        runs.append(json.loads(done.read_text()))
    return {"machine": described, "runs": runs}


def main(args: list[str] | None = None) -> None:
    result = run(parse(BenchDemoOptions, args, prog="bench_demo.py"))
    folder = RESULTS / ("cuda" if torch.cuda.is_available() else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n" + table(result))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"bench_demo.py: {error}")
