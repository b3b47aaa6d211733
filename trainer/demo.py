"""The demo: draw scenes, train a tiny Qwen2-VL on them by SFT and then GRPO, score it before and after GRPO.

python trainer/demo.py        writes everything to out/demo
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from boxgrpo.trainer.arguments import parse
from boxgrpo.trainer.evaluation.evaluate import evaluate
from boxgrpo.trainer.evaluation.pictures import contact_sheet, plot_run
from boxgrpo.trainer.evaluation.report import align, scores_table
from boxgrpo.trainer.options import EvalOptions, GrpoOptions
from boxgrpo.trainer.presence import check_paths
from boxgrpo.trainer.runtime.ranks import Ranks, RunFailed, run_as_script
from boxgrpo.trainer.runtime.reporter import read_metrics
from boxgrpo.trainer.world.recipe import RUNS, DemoOptions, draw_world, make_initial_checkpoint, run_flags

HERE = Path(__file__).resolve().parent


def process_count(options: DemoOptions) -> int:
    """`options.processes`, else the largest divisor of a step's prompts up to the number of GPUs, or 2 on a CPU."""
    available = torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    return options.processes or max(n for n in (1, 2, 4, 8, 16) if n <= available)


def torchrun(script: str, options: DemoOptions, flags: list[str]) -> None:
    """Run a script of this folder under torchrun, with the CPU's cores divided among its processes."""
    count = process_count(options)
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", str(count)]
    command += [str(HERE / script), *flags]
    print("\n$ torchrun", *command[1:], flush=True)
    threads = str(max(1, (os.cpu_count() or 1) // count))
    status = subprocess.run(command, env={"OMP_NUM_THREADS": threads} | os.environ).returncode
    if status:
        raise RunFailed(f"{script} ended with status {status}; its message is above.")


def cold_start(options: DemoOptions) -> None:
    """SFT of the base model on reasoning chains; replaces an earlier cold start."""
    shutil.rmtree(Path(options.output_dir) / "sft", ignore_errors=True)
    if options.from_nothing:
        make_initial_checkpoint(options)
    torchrun("sft.py", options, run_flags(options, "sft"))


def continued_sft(options: DemoOptions) -> None:
    """Continue the cold start's SFT, by its recipe, on chains for GRPO's scenes, for as many seconds as GRPO took.

    As in the paper's Table 4, row 6, the additional records are new and their chains are made in the same way.
    """
    root = Path(options.output_dir)
    before, grpo = ([m["step_time"] for m in read_metrics(root / run)] for run in ("sft", "grpo"))
    steps = round(sum(grpo) / (sum(before) / len(before)))
    flags = [f"--max_steps={steps}", f"--seed={options.seed + 1}"]
    torchrun("sft.py", options, run_flags(options, "continued_sft") + flags)


def scores(options: DemoOptions, run: str) -> dict:
    """Scores of a run's checkpoint on the held-out scenes."""
    root = Path(options.output_dir)
    summary = evaluate(
        EvalOptions(
            model=str(root / run),
            data=str(root / "world/held_out.json"),
            output_dir=str(root / f"eval_{run}"),
            overwrite_output_dir=True,
            eval_batch_size=100,
            dtype="float32",
            max_completion_length=parse(GrpoOptions, run_flags(options, "grpo")).max_completion_length,
        ),
        Ranks(device="cuda" if torch.cuda.is_available() else "cpu"),
    )
    print(f"\n{run}: format {summary['format']:.3f}, IoU of well-formed answers {summary['well_formed_iou']:.3f}")
    print(scores_table(summary), flush=True)
    return summary


def accuracies(summary: dict) -> dict[str, float]:
    """Acc@0.5 in 0-1: the mean over tasks, then each task."""
    return {"mean": summary["accuracy_at_0.5"]} | {t: v["accuracy_at_0.5"] for t, v in summary["tasks"].items()}


def progress(metrics: list[dict]) -> dict:
    """What GRPO's steps tell: the first one's share of groups without a signal, and mean IoU and seconds of a step.

    `iou` has three values in 0-1, each a mean over an eighth of the run: at its beginning, middle and end.
    """
    ious = [m["rewards/accuracy/mean"] for m in metrics]
    part, middle = max(1, len(ious) // 8), len(ious) // 2
    parts = ious[:part], ious[max(0, middle - part // 2) :][:part], ious[-part:]
    seconds = sum(m["step_time"] for m in metrics) / len(metrics)
    return {
        "without_signal": metrics[0]["frac_reward_zero_std"],
        "iou": [round(sum(some) / len(some), 4) for some in parts],
        "step_seconds": round(seconds, 3),
    }


def run(options: DemoOptions) -> dict:
    """Run the whole demo; returns the content of summary.json."""
    root = Path(options.output_dir)
    seconds, found = {}, {}

    def stage(name: str, call, *args):
        started = time.perf_counter()
        result = call(*args)
        seconds[name] = round(time.perf_counter() - started, 1)
        return result

    runs = [name for name in RUNS if (root / name).exists()]
    if runs and not (root / "world").exists():
        raise ValueError(f"{root} holds {', '.join(runs)} but no drawn world. Name another --output_dir.")
    stage("world", draw_world, options)  # raises for a folder with another world, before anything is removed
    stage("cold_start", cold_start, options)
    found["before"] = stage("eval_before", scores, options, "sft")
    stage("grpo", torchrun, "grpo.py", options, run_flags(options, "grpo"))
    found["after"] = stage("eval_after", scores, options, "grpo")
    total = sum(seconds.values())
    if options.continued_sft:
        stage("continued_sft", continued_sft, options)
        found["continued_sft"] = scores(options, "continued_sft")
    plot_run(root / "grpo" / "metrics.jsonl", root / "plot.png", title=f"GRPO on the {options.world} world")
    pictures = [Image.open(p) for p in sorted((root / "eval_grpo/pictures").glob("*.png"))]
    contact_sheet(pictures, columns=4).save(root / "pictures.png")
    summary = {
        "seconds": round(total, 1),
        "stage_seconds": seconds,
        "seed": options.seed,
        "processes": process_count(options),
        **{name: accuracies(s) for name, s in found.items()},
        "grpo": progress(read_metrics(root / "grpo")),
        "details": {n: {k: s[k] for k in ("format", "well_formed_iou", "mean_iou")} for n, s in found.items()},
    }
    (root / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def report(summary: dict, root: str) -> str:
    """Acc@0.5 per task in %, a column for each stage."""
    stages = [s for s in ("before", "after", "continued_sft") if s in summary]
    rows = [["Acc@0.5", *(stage.replace("_", " ") for stage in stages)]]
    for task in (*(t for t in summary["before"] if t != "mean"), "mean"):
        rows.append([task, *(f"{100 * summary[stage][task]:.1f}" for stage in stages)])
    lifted = f"{100 * (summary['after']['mean'] - summary['before']['mean']):+.1f} points overall"
    pictures = f"Look at {root}/plot.png and pictures.png."
    return f"{align(rows)}\n\nGRPO: {lifted}, {summary['seconds']:.0f} s. {pictures}"


def main(args: list[str] | None = None) -> None:
    options = parse(DemoOptions, args, prog="demo.py")
    check_paths(options)
    print("\n" + report(run(options), options.output_dir))


if __name__ == "__main__":
    run_as_script(main, "demo.py")
