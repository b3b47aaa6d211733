"""Runs that are killed at random moments, with corrupt images and NaN losses, end like undisturbed ones.

    python bench/soaks/soak.py [--parts A,B,C] [--steps 500] [--kills 30] [--seed 0] [--engine deepspeed --zero_stage 2]

The demo's GRPO at two ranks, from a short cold start, on a world of which some images are corrupt.

A   short runs: one undisturbed, one with SIGKILL for all its processes `kills` times, resumed each time; a third of
    the kills strike while a checkpoint is written.
B   `steps` steps with NaN losses, and a fifth as many kills.
C   the same steps and faults without kills: resident memory stays flat.

A's two runs, and B and C, must be the same to the bit. Results go to bench/results/<device>/soak.json; the exit status
is 1 when a demand is not met.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from boxgrpo.bench.machine import folder, machine
from boxgrpo.bench.processes import kill
from boxgrpo.bench.publish.tables import table
from boxgrpo.bench.records import write
from boxgrpo.bench.soaks.kills import Kill, plan, strike, timing
from boxgrpo.bench.soaks.verdicts import demand, differences, faulty_demands, memory, metrics_of, none_lost
from boxgrpo.trainer import demo
from boxgrpo.trainer.arguments import option, parse
from boxgrpo.trainer.options import CHOICES, COUNT
from boxgrpo.trainer.presence import check_paths
from boxgrpo.trainer.runtime.ranks import RunFailed, run_as_script
from boxgrpo.trainer.world import recipe

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
CORRUPT = 0.02  # of the training images
SAVE_STEPS = {"A": 3, "B": 20, "C": 20}
KEPT = 2  # checkpoints
FLAT = 0.02


@dataclass
class SoakOptions:
    """Long runs of the demo with faults injected at random."""

    choices: ClassVar = {"engine": ("", *CHOICES["engine"]), "zero_stage": (0, *CHOICES["zero_stage"])}
    ranges: ClassVar = recipe.DemoOptions.ranges | dict.fromkeys(("steps", "kills", "cold_start_steps"), COUNT)
    parts: str = option("A,B,C", "Parts to run, separated by commas.")
    steps: int = option(500, "Steps of parts B and C.")
    kills: int = option(30, "Kills of part A, in two steps each; part B has a fifth of them.")
    seed: int = option(0, "Of the world, the weights, the corrupt images, the NaNs and the moments of the kills.")
    engine: str = option("", "The loop's --engine; empty: its default.")
    zero_stage: int = option(0, "The loop's --zero_stage; 0: its default.")
    cold_start_steps: int = option(300, "SFT steps before.")
    train: int = option(1000, "Scenes to train on, and as many for the cold start.")
    output_dir: str = option("out/soak", "Folder for world and runs.")
    json: str = option("", "Where to write the results; empty: bench/results/<device>/soak.json, or soak_zero2.json.")


def demo_of(o: SoakOptions) -> recipe.DemoOptions:
    scenes = {"levels": "0", "cold_start": o.train, "train": o.train, "held_out": 8}
    return recipe.DemoOptions(output_dir=o.output_dir, seed=o.seed, from_nothing=True, **scenes, processes=RANKS)


def prepare(o: SoakOptions) -> Path:
    """World and cold start, made when they are not there; then some of the training images are made unreadable."""
    root, small = Path(o.output_dir), demo_of(o)
    world = recipe.draw_world(small)
    if not (root / "sft/model.safetensors").exists():
        recipe.make_initial_checkpoint(small)
        demo.torchrun("sft.py", small, [*recipe.run_flags(small, "sft"), f"--max_steps={o.cold_start_steps}"])
    images = sorted((world / "images/train").iterdir())
    draw = random.Random(o.seed)
    for path in draw.sample(images, round(CORRUPT * len(images))):
        path.write_bytes(path.read_bytes()[: draw.randrange(100)])
    return root


def launch(o: SoakOptions, root: Path, name: str, steps: int) -> subprocess.Popen:
    """torchrun with its output in `root / name`.log; a run that was killed goes on. All parts but A have faults.

    What DeepSpeed compiles has a folder of its own: a kill while it does leaves a lock that all later builds wait for.
    """
    part, target = name[0], root / name
    script = ["trainer/grpo.py"] if part == "A" else ["bench/soaks/worker.py", f"--soak_seed={o.seed}"]
    flags = [*recipe.run_flags(demo_of(o), "grpo"), "--overwrite_output_dir=false", "--resume=auto"]
    flags += [f"--output_dir={target}", f"--rollout_file={target / 'samples'}", f"--max_steps={steps}"]
    flags += [f"--save_steps={SAVE_STEPS[part]}", f"--save_total_limit={KEPT}"]
    flags += [f"--{k}={v}" for k, v in (("engine", o.engine), ("zero_stage", o.zero_stage)) if v]
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", f"--nproc_per_node={RANKS}"]
    with target.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [*command, str(ROOT / script[0]), *script[1:], *flags],
            env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(root.resolve() / "extensions")},
            start_new_session=True,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def run_to_the_end(o: SoakOptions, root: Path, name: str, steps: int, kills: Sequence[Kill] = ()) -> float:
    """The run, killed as planned and resumed each time; its seconds.

    Raises:
        ValueError: it ended with an error of its own.
    """
    started = time.monotonic()
    shutil.rmtree(root / name, ignore_errors=True)
    (root / name).with_suffix(".log").unlink(missing_ok=True)
    for planned in [*kills, None]:
        run = launch(o, root, name, steps)
        try:
            if planned is None or not strike(run, root / name, planned):
                run.wait()
                if run.returncode:
                    raise RunFailed(f"{name} ended with status {run.returncode}; see {root / name}.log")
                break
        finally:
            if run.poll() is None:
                kill(run)
    return time.monotonic() - started


def part_a(o: SoakOptions, root: Path, draw: random.Random) -> dict:
    steps, whole, killed = max(4 * SAVE_STEPS["A"], 2 * o.kills), root / "A-whole", root / "A-killed"
    seconds = {"undisturbed": run_to_the_end(o, root, whole.name, steps)}
    times = timing(whole, seconds["undisturbed"])
    kills = plan(draw, o.kills, steps, SAVE_STEPS["A"], times)
    seconds["killed"] = run_to_the_end(o, root, killed.name, steps, kills)
    torn = sum(".part" in k.left or "torn" in k.left for k in kills if k.struck)
    unlike = differences(whole, killed)
    folders = sorted(f.name for f in killed.glob("*checkpoint-*"))
    clean = len(folders) == KEPT and not any(name.startswith(".") for name in folders)
    demands = [
        struck(kills, o.kills, f", {torn} while saving"),
        demand("some while saving", str(torn), torn > 0),
        none_lost(metrics_of(killed), steps),
        demand("to the bit as never killed", f"{len(unlike)} differences", not unlike),
        demand(f"{KEPT} checkpoints kept", ", ".join(folders), clean),
    ]
    found = {"steps": steps, "seconds": {k: round(v) for k, v in seconds.items()}, "differences": unlike}
    found["timing"] = {k: round(v, 3) for k, v in times.items()}
    return found | {"kills": [asdict(k) for k in kills], "demands": demands}


def part_b(o: SoakOptions, root: Path, draw: random.Random) -> dict:
    count = max(1, o.kills // 5)
    kills = plan(draw, count, o.steps, SAVE_STEPS["B"], {"start": 8.0, "step": 0.3, "save": 0.1})
    seconds = run_to_the_end(o, root, "B", o.steps, kills)
    demands = [struck(kills, count), *faulty_demands(root / "B", o.steps)]
    return {"steps": o.steps, "seconds": round(seconds), "kills": [asdict(k) for k in kills], "demands": demands}


def part_c(o: SoakOptions, root: Path, _draw: random.Random) -> dict:
    seconds = run_to_the_end(o, root, "C", o.steps)
    sizes = memory(root / "C")
    demands = faulty_demands(root / "C", o.steps)
    for rank in range(RANKS):
        whole, own = sizes[f"rank{rank}"], sizes[f"rank{rank} anonymous"]
        found = f"{own['growth']:+.2%} ({whole['growth']:+.2%} with files), peak {whole['peak_mb']:.0f} MB"
        demands.append(demand(f"memory of rank {rank} flat", found, abs(own["growth"]) <= FLAT >= whole["growth"]))
    result = {"steps": o.steps, "seconds": round(seconds), "memory": sizes, "demands": demands}
    if "B" in o.parts.split(","):
        result["differences"] = unlike = differences(root / "B", root / "C")
        demands.append(demand("to the bit as part B", f"{len(unlike)} differences", not unlike))
    return result


def struck(kills: Sequence[Kill], wanted: int, detail: str = "") -> dict:
    count = sum(k.struck for k in kills)
    return demand(f"struck by {wanted} kills", f"{count}{detail}", count >= wanted)


PARTS = {"A": part_a, "B": part_b, "C": part_c}


def main(args: list[str] | None = None) -> None:
    o = parse(SoakOptions, args, prog="soak.py")
    check_paths(o)
    names = o.parts.split(",")
    if wrong := set(names) - PARTS.keys():
        raise ValueError(f"parts are {o.parts}; {', '.join(sorted(wrong))} is none of A, B and C. Correct --parts.")
    result = {"machine": machine(), "options": asdict(o), "parts": {}}
    root = prepare(o)
    path = Path(o.json) if o.json else folder() / (f"soak_zero{o.zero_stage}.json" if o.zero_stage else "soak.json")
    for name in sorted(names):
        print(f"\npart {name} ...", flush=True)
        result["parts"][name] = PARTS[name](o, root, random.Random(f"{o.seed} {name}"))
        write(result, path)
    print("\n" + table("soak", result))
    if not all(d["met"] for found in result["parts"].values() for d in found["demands"]):
        sys.exit(1)


if __name__ == "__main__":
    run_as_script(main, "soak.py")
