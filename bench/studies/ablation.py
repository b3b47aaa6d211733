"""The paper's ablation (Tables 4 and 5, Figure 3) on the drawn world: eight methods by their recipes.

    python bench/studies/ablation.py [--seeds 0,1,2] [--methods pure_rl,grpo] [--quick true]

In the place of Qwen2-VL there is the base model (trainer/base.py), which has seen none of the tasks; in the place of
MGrounding there are drawn scenes of all ten tasks at three levels, with chains. A seed has a world of its own, its own
CoT-SFT that stage 2 starts from, its own order of data and samples.

An hour on two CPU cores; a run that has ended is not repeated. Results go to bench/results/<device>/ablation.json, the
tables and curves beside the runs too. `--quick true`: two steps of everything, to see that it runs.
"""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from boxgrpo.bench.machine import folder, machine
from boxgrpo.bench.publish.tables import table, template
from boxgrpo.bench.records import write
from boxgrpo.bench.studies.claims import judge
from boxgrpo.bench.studies.curves import binned, plot
from boxgrpo.trainer import demo
from boxgrpo.trainer.arguments import option, parse
from boxgrpo.trainer.evaluation.evaluate import evaluate
from boxgrpo.trainer.options import ANY_COUNT, EvalOptions, GrpoOptions, SftOptions
from boxgrpo.trainer.presence import check_paths
from boxgrpo.trainer.runtime.files import replace_file
from boxgrpo.trainer.runtime.ranks import Ranks, run_as_script
from boxgrpo.trainer.runtime.reporter import read_metrics
from boxgrpo.trainer.world.recipe import BASE, RECIPES, DemoOptions, parse_numbers
from boxgrpo.trainer.world.scenes import TASKS
from boxgrpo.trainer.world.world import write_world

LEVELS = (0, 1, 2)
SIZE = 112  # pixels, the side of an image
COMPLETION = 32  # tokens at most when scored; an answer has up to 17
PATHS = ("model", "data", "output_dir")  # settings that two runs of one recipe differ in
ENDED = "ended.json"  # in the folder of a run that is over
SCORES = "scores.json"


@dataclass(frozen=True)
class Method:
    """One row of the tables."""

    script: str
    start: str  # the run whose checkpoint it begins with
    data: str  # a file of the seed's world
    recipes: tuple[str, ...]  # layers of options, the later overruling the earlier
    flags: tuple[str, ...] = ()
    held_out: str = "held_out"

    @property
    def options(self) -> type:
        return SftOptions if self.script == "sft.py" else GrpoOptions


SFT, GRPO = "tiny_sft", "tiny_grpo"
AS_GRPO = ("--max_steps=600", "--learning_rate=3e-4")
METHODS = {
    "pure_rl": Method("grpo.py", "base", "train", ("pure_rl", GRPO)),
    "sft": Method("sft.py", "base", "coordinates", ("sft", SFT), held_out="held_out_coordinates"),
    "cot_sft": Method("sft.py", "base", "cold_start", ("cot_sft", SFT)),
    "continued_cot_sft": Method("sft.py", "cot_sft", "train_chains", ("continued_cot_sft", SFT), AS_GRPO),
    "grpo": Method("grpo.py", "cot_sft", "train", ("grpo", GRPO)),
    "grpo_log": Method("grpo.py", "cot_sft", "train", ("grpo", GRPO), ("--difficulty=log",)),
    "grpo_power": Method("grpo.py", "cot_sft", "train", ("grpo", GRPO), ("--difficulty=power",)),
    "grpo_exp": Method("grpo.py", "cot_sft", "train", ("grpo", GRPO), ("--difficulty=exp",)),
}

TRIED = ("pure_rl", "cot_sft", "continued_cot_sft", "grpo", "grpo_exp")  # what the claims compare


@dataclass
class AblationOptions:
    """The paper's ablation on the drawn world."""

    choices: ClassVar = DemoOptions.choices
    ranges: ClassVar = DemoOptions.ranges | {"max_steps": ANY_COUNT}
    seeds: str = option("0,1,2,3,4", "Seeds, separated by commas.")
    methods: str = option(",".join(TRIED), "Methods to run, separated by commas; what they start from runs too.")
    output_dir: str = option("out/ablation", "Folder for worlds, runs, table.md and curves.png.")
    cold_start: int = option(12000, "Scenes for stage 1, of each seed.")
    train: int = option(9600, "Scenes for stage 2 and for pure RL, of each seed.")
    held_out: int = option(1000, "Scenes to score on, of each seed.")
    max_steps: int = option(0, "Steps of every run; 0: those of its recipe.")
    processes: int = option(0, "Processes to train with; 0: one per GPU, or on a CPU two where there are two cores.")
    quick: bool = option(False, "One seed, few scenes, two steps a run by one process, into the folder quick/.")
    json: str = option("", "Where to write the results; empty: bench/results/<device>/ablation.json, or into quick/.")


QUICK = {"seeds": "0", "cold_start": 60, "train": 60, "held_out": 60, "max_steps": 2, "processes": 1}


def chosen_methods(o: AblationOptions) -> list[str]:
    """The named methods and those that they start from, in the tables' order.

    Raises:
        ValueError: one is not known.
    """
    named = o.methods.split(",")
    if wrong := [name for name in named if name not in METHODS]:
        raise ValueError(f"methods are {o.methods}; {wrong[0]!r} is none of {', '.join(METHODS)}. Correct --methods.")
    return [name for name in METHODS if name in {*named, *(METHODS[n].start for n in named)}]


def draw(root: Path, seed: int, **scenes: int) -> Path:
    """A world of all tasks at all levels, with one question a record."""
    chosen = {"tasks": list(TASKS), "levels": LEVELS, "size": SIZE, "other_questions": False}
    return write_world(root / "world", seed=seed, **chosen, **scenes)


def origin(model: Path, data: Path) -> dict:
    """What a run or a score was made of: the weights by their checksum, the world and its file."""
    with (model / "model.safetensors").open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    world = json.loads((data.parent / "world.json").read_text())
    return {"weights": weights[:16], "world": world, "data": data.name}


def train(o: AblationOptions, method: Method, path: Path, model: Path, data: Path, seed: int) -> dict:
    """Train in `path` what its recipes say, if that has not ended yet; what ended.json holds.

    Raises:
        ValueError: `path` holds another run, or the script failed.
    """
    flags = [f"--config={RECIPES / name}.yaml" for name in method.recipes]
    flags += [*method.flags, f"--model={model}", f"--data={data}", "--image_root=", f"--seed={seed}"]
    flags += [f"--output_dir={path}", *([f"--max_steps={o.max_steps}"] if o.max_steps else [])]
    settings = dataclasses.asdict(parse(method.options, flags))
    settings = {k: v for k, v in settings.items() if k not in PATHS} | origin(model, data)
    if (path / ENDED).exists():
        held = json.loads((path / ENDED).read_text())
        for name in (name for name, value in settings.items() if held["settings"].get(name) != value):
            found = f"whose {name} is {held['settings'].get(name)!r}, not {settings[name]!r}"
            raise ValueError(f"{path} holds a run {found}. Remove it, or name another --output_dir.")
        return held
    started, found = time.perf_counter(), machine()
    demo.torchrun(method.script, DemoOptions(processes=o.processes), [*flags, "--overwrite_output_dir=true"])
    ended = {"seconds": round(time.perf_counter() - started, 1), "revision": found["revision"], "settings": settings}
    replace_file(path / ENDED, json.dumps(ended, indent=1) + "\n")
    return ended


def score(world: Path, held_out: str, model: Path, path: Path) -> dict:
    """Acc@0.5 (0-1) of `model` on the seed's held-out scenes, per task and level, and by question; kept in `path`."""
    data = world / f"{held_out}.json"
    made_of = origin(model, data)
    if (path / SCORES).exists() and (held := json.loads((path / SCORES).read_text()))["of"] == made_of:
        return {name: held[name] for name in ("scores", "hits")}
    paths = {"model": str(model), "data": str(data), "output_dir": str(path / "eval")}
    options = EvalOptions(**paths, eval_batch_size=100, dtype="float32", max_completion_length=COMPLETION)
    shutil.rmtree(path / "eval", ignore_errors=True)
    found = evaluate(options, Ranks(device="cuda" if torch.cuda.is_available() else "cpu"))
    answers = json.loads((path / "eval/results.json").read_text())["answers"]
    level = {record["id"]: record["level"] for record in json.loads(data.read_text())}
    hits = [a["iou"] > 0.5 for a in answers]
    by_level = {n: [hit for a, hit in zip(answers, hits, strict=True) if level[a["id"]] == n] for n in LEVELS}
    scores = demo.accuracies(found) | {f"level {n}": sum(h) / max(1, len(h)) for n, h in by_level.items()}
    scores |= {name: found[name] for name in ("format", "mean_iou")}
    kept = {"scores": scores, "hits": hits}
    replace_file(path / SCORES, json.dumps({"of": made_of, **kept}) + "\n")
    return kept


def run_seed(o: AblationOptions, seed: int) -> Iterable[dict]:
    """One record for each run of the seed, the base first; `hits`: whether each held-out question is answered right."""
    root = Path(o.output_dir) / str(seed)
    world = draw(root, seed, cold_start=o.cold_start, train=o.train, held_out=o.held_out)
    yield {"seed": seed, "method": "base", **score(world, "held_out", BASE, root / "base")}
    for name in chosen_methods(o):
        method, path = METHODS[name], root / name
        model = BASE if method.start == "base" else root / method.start
        ended = train(o, method, path, model, world / f"{method.data}.json", seed)
        found = score(world, method.held_out, path, path)
        reached = 100 * found["scores"]["mean"]
        print(f"\nseed {seed}, {name}: Acc@0.5 {reached:.1f}, {ended['seconds']:.0f} s", flush=True)
        yield {"seed": seed, "method": name, **ended, **found, "curves": binned(read_metrics(path))}


def run(o: AblationOptions) -> dict:
    """Everything; what ablation.json holds."""
    described = machine()  # before an hour passes and the tree moves on
    seeds = parse_numbers(o.seeds, "seeds")
    runs = [record for seed in seeds for record in run_seed(o, seed)]
    hits = {(record["method"], record["seed"]): record.pop("hits") for record in runs}
    return {"machine": described, "options": dataclasses.asdict(o), "claims": judge(hits), "runs": runs}


def main(args: list[str] | None = None) -> None:
    o = parse(AblationOptions, args, prog="ablation.py")
    if o.quick:
        o = dataclasses.replace(o, **QUICK, output_dir=f"{o.output_dir}/quick")
    check_paths(o)
    chosen_methods(o)
    result = run(o)
    root = Path(o.output_dir)
    kept = Path(o.json) if o.json else (root if o.quick else folder()) / "ablation.json"
    write(result, kept)
    (root / "table.md").write_text(template("ablation.md").render(result))
    plot(result["runs"], root / "curves.png")
    if kept.parent != root and (root / "curves.png").exists():
        shutil.copy(root / "curves.png", kept.with_suffix(".png"))
    print("\n" + table("ablation", result["runs"]) + "\n\n" + table("claims", result["claims"]))
    print(f"\nAll of it is in {root}/table.md and curves.png, the figures in {kept}.")


if __name__ == "__main__":
    run_as_script(main, "ablation.py")
