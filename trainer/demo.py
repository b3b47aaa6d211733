"""The main job, small: draw a world, cold-start a tiny Qwen2-VL on it, go on with GRPO, score before and after.

python trainer/demo.py        everything it makes is in out/demo
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from boxgrpo.model.checkpoint import save_model
from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.vocabulary import SPECIAL_TOKENS, SYSTEM_PROMPT, demo_tokenizer
from boxgrpo.trainer.evaluation.evaluate import evaluate
from boxgrpo.trainer.evaluation.pictures import contact_sheet, plot_run
from boxgrpo.trainer.evaluation.tables import scores_table
from boxgrpo.trainer.options import EvalOptions, GrpoOptions, option, parse
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.world.tiny import tiny_config
from boxgrpo.trainer.world.world import DEMO_TASKS, all_texts, wordings, write_world

HERE = Path(__file__).resolve().parent
RECIPES = HERE / "recipes"


@dataclass
class DemoOptions:
    """Cold start, GRPO and their scores on a drawn world."""

    output_dir: str = option("out/demo", "Folder for everything the demo makes.")
    seed: int = option(0, "Seed of the world, the weights, the data order and the sampling.")
    tasks: str = option(",".join(DEMO_TASKS), "Tasks to draw, by MIG-Bench's names.")
    levels: str = option("0", "Difficulties of the scenes, 0 to 2, which take turns.")
    size: int = option(56, "Side of the images in pixels, a multiple of 56.")
    cold_start: int = option(4000, "Scenes with reasoning chains.")
    margins: float = option(0.5, "Share of the chains whose annotator leaves a margin around the object.")
    train: int = option(5000, "Scenes with a box only.")
    held_out: int = option(400, "Scenes to score on.")
    continued_sft: bool = option(False, "Also train the cold start on for as long as GRPO took, as a comparison.")
    processes: int = option(0, "Processes to train with; 0: one per GPU, or on a CPU two where there are two cores.")


def processes(options: DemoOptions) -> int:
    """What is asked for; else as many as there are GPUs and a step's 16 prompts divide among, on a CPU two."""
    available = torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    return options.processes or max(n for n in (1, 2, 4, 8, 16) if n <= available)


def torchrun(script: str, options: DemoOptions, flags: list[str]) -> None:
    """Run a script of this folder as a user would, the CPU's cores shared out among its processes."""
    count = processes(options)
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", str(count)]
    command += [str(HERE / script), *flags]
    print("\n$ torchrun", *command[1:], flush=True)
    threads = str(max(1, (os.cpu_count() or 1) // count))
    status = subprocess.run(command, env={"OMP_NUM_THREADS": threads} | os.environ).returncode
    if status:
        raise ValueError(f"{script} ended with status {status}; its own message stands above.")


def numbers(text: str, name: str) -> list[int]:
    """Whole numbers separated by commas, the value of the flag `name`.

    Raises:
        ValueError: it holds something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} is {text!r}; it must be whole numbers and commas. Correct --{name}.") from None


def draw_world(options: DemoOptions) -> Path:
    return write_world(
        Path(options.output_dir) / "world",
        tasks=options.tasks.split(","),
        cold_start=options.cold_start,
        train=options.train,
        held_out=options.held_out,
        seed=options.seed,
        levels=numbers(options.levels, "levels"),
        size=options.size,
        margins=options.margins,
    )


def newborn(options: DemoOptions, texts: list[str] | None = None) -> Path:
    """A checkpoint of random weights, with a tokenizer for the world's words, or for those of `texts`."""
    folder = Path(options.output_dir) / "newborn"
    texts = texts or all_texts(options.tasks.split(","), levels=numbers(options.levels, "levels"))
    template = [f"system\n{SYSTEM_PROMPT}", "user\n", "assistant\n"]
    tokenizer = demo_tokenizer([*texts, *template], phrases=[*template, *wordings(texts)])
    config = tiny_config(len(tokenizer), {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS})
    save_model(Qwen2VL(config).init_weights(torch.Generator().manual_seed(options.seed)), folder)
    Processor(tokenizer, Qwen2VLImageProcessorPil(), min_pixels=3136, max_pixels=401408).save_pretrained(folder)
    return folder


def cold_start(options: DemoOptions) -> Path:
    """The checkpoint after SFT on reasoning chains, made when it is not there."""
    folder = Path(options.output_dir) / "sft"
    world = draw_world(options)
    if not (folder / "model.safetensors").exists():
        flags = [f"--config={RECIPES / 'demo_sft.yaml'}", f"--model={newborn(options)}"]
        flags += [f"--data={world / 'cold_start.json'}", f"--output_dir={folder}", f"--seed={options.seed}"]
        torchrun("sft.py", options, [*flags, "--overwrite_output_dir=true"])
    return folder


def grpo_flags(options: DemoOptions) -> list[str]:
    """What `grpo.py` runs with when it is given no flags."""
    root = Path(options.output_dir)
    flags = [f"--config={RECIPES / 'demo_grpo.yaml'}", f"--model={root / 'sft'}", f"--data={root / 'world/train.json'}"]
    return [*flags, f"--output_dir={root / 'grpo'}", f"--seed={options.seed}", "--overwrite_output_dir=true"]


def continued_sft(options: DemoOptions) -> Path:
    """The cold start trained on with its own recipe, on chains for GRPO's scenes, for the seconds that GRPO took.

    The paper's Table 4, row 6: there, too, the additional records are new ones, their chains made as before.
    """
    root = Path(options.output_dir)
    seconds = {run: [m["step_time"] for m in read_metrics(root / run)] for run in ("sft", "grpo")}
    steps = round(sum(seconds["grpo"]) / (sum(seconds["sft"]) / len(seconds["sft"])))
    flags = [f"--config={RECIPES / 'demo_sft.yaml'}", f"--model={root / 'sft'}", f"--max_steps={steps}"]
    flags += [f"--data={root / 'world/train_chains.json'}", f"--output_dir={root / 'continued_sft'}"]
    torchrun("sft.py", options, [*flags, f"--seed={options.seed + 1}", "--overwrite_output_dir=true"])
    return root / "continued_sft"


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scores(options: DemoOptions, run: str) -> dict:
    """Scores of a run's checkpoint on the held-out scenes."""
    root = Path(options.output_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    summary = evaluate(
        EvalOptions(
            model=str(root / run),
            data=str(root / "world/held_out.json"),
            output_dir=str(root / f"eval_{run}"),
            overwrite_output_dir=True,
            eval_batch_size=100,
            dtype="float32",
            max_completion_length=parse(GrpoOptions, grpo_flags(options)).max_completion_length,
        ),
        Ranks(device=device),
    )
    print(f"\n{run}: format {summary['format']:.3f}, IoU of well-formed answers {summary['well_formed_iou']:.3f}")
    print(scores_table(summary), flush=True)
    return summary


def flat(summary: dict) -> dict[str, float]:
    """Acc@0.5 in 0-1: the mean over tasks, then each task."""
    return {"mean": summary["accuracy_at_0.5"]} | {t: v["accuracy_at_0.5"] for t, v in summary["tasks"].items()}


def run(options: DemoOptions) -> dict:
    """The whole demo; returns what summary.json holds."""
    root = Path(options.output_dir)
    seconds, found = {}, {}

    def stage(name: str, call, *args):
        started = time.perf_counter()
        result = call(*args)
        seconds[name] = round(time.perf_counter() - started, 1)
        return result

    runs = [name for name in ("sft", "grpo", "continued_sft") if (root / name).exists()]
    if runs and not (root / "world").exists():
        raise ValueError(f"{root} holds {', '.join(runs)} but no drawn world: not a demo's. Name another --output_dir.")
    stage("world", draw_world, options)  # refuses a folder with another world, before anything is lost
    shutil.rmtree(root / "sft", ignore_errors=True)  # a demo trains its own
    stage("cold_start", cold_start, options)
    found["before"] = stage("eval_before", scores, options, "sft")
    stage("grpo", torchrun, "grpo.py", options, grpo_flags(options))
    found["after"] = stage("eval_after", scores, options, "grpo")
    total = sum(seconds.values())
    if options.continued_sft:
        stage("continued_sft", continued_sft, options)
        found["continued_sft"] = scores(options, "continued_sft")
    plot_run(root / "grpo" / "metrics.jsonl", root / "plot.png", title="GRPO on the drawn world")
    pictures = [Image.open(p) for p in sorted((root / "eval_grpo/pictures").glob("*.png"))]
    contact_sheet(pictures, columns=4).save(root / "pictures.png")
    summary = {
        "seconds": round(total, 1),
        "stage_seconds": seconds,
        "seed": options.seed,
        "processes": processes(options),
        **{name: flat(s) for name, s in found.items()},
        "details": {n: {k: s[k] for k in ("format", "well_formed_iou", "mean_iou")} for n, s in found.items()},
    }
    (root / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def report(summary: dict, root: str) -> str:
    """Acc@0.5 per task, a column for each stage."""
    stages = [s for s in ("before", "after", "continued_sft") if s in summary]
    rows = [f"{'Acc@0.5':<18}" + "".join(f"{s.replace('_', ' '):>15}" for s in stages)]
    for task in [t for t in summary["before"] if t != "mean"] + ["mean"]:
        rows.append(f"{task:<18}" + "".join(f"{100 * summary[s][task]:>15.1f}" for s in stages))
    lifted = 100 * (summary["after"]["mean"] - summary["before"]["mean"])
    rows.append(
        f"\nGRPO: {lifted:+.1f} points in all, {summary['seconds']:.0f} s. Look at {root}/plot.png and pictures.png."
    )
    return "\n".join(rows)


def main(args: list[str] | None = None) -> None:
    options = parse(DemoOptions, args, prog="demo.py")
    print("\n" + report(run(options), options.output_dir))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"demo.py: {error}")
