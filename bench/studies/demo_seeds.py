"""What GRPO adds to the demo's cold start, on three seeds, beside continued SFT for the same seconds (Table 4, row 6).

python bench/studies/demo_seeds.py     writes bench/results/<device>/demo.json, prints the table

With `--world digits` the same runs learn handwritten digits (trainer/world/digits.py), from a base model of their own;
the file is digits.json.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image

from boxgrpo.bench.machine import folder, machine
from boxgrpo.bench.publish.tables import table
from boxgrpo.bench.records import write
from boxgrpo.trainer import demo
from boxgrpo.trainer.arguments import option, parse
from boxgrpo.trainer.presence import check_paths
from boxgrpo.trainer.runtime.ranks import run_as_script
from boxgrpo.trainer.runtime.reporter import METRICS, read_metrics
from boxgrpo.trainer.world import recipe


@dataclass
class SeedsOptions:
    """The demo on several seeds, each with continued SFT beside GRPO."""

    choices: ClassVar = {"world": recipe.DemoOptions.choices["world"]}
    seeds: str = option("0,1,2", "Seeds, separated by commas.")
    output_dir: str = option("out/seeds", "Folder for the runs.")
    world: str = option("drawn", "As demo.py's.")
    base: str = option("", "As demo.py's; of a model/ that base.py left beside its run/, the record has its scores.")


def run(options: SeedsOptions) -> dict:
    """Every seed's summary, with the machine's name."""
    described, runs = machine(), []  # described before hours pass and the tree changes
    for seed in recipe.parse_numbers(options.seeds, "seeds"):
        path = Path(options.output_dir) / str(seed)
        same = {"seed": seed, "world": options.world, "base": options.base}
        runs.append(demo.run(recipe.DemoOptions(output_dir=str(path), continued_sft=True, **same)))
    return {"machine": described, "runs": runs} | ({"base": base_run(Path(options.base))} if options.base else {})


def base_run(model: Path) -> dict:
    """Seconds in the steps of the run that made a base model, and its curve on held-out scenes; {} if none is there."""
    run = model.resolve().parent / "run"
    if not (run / METRICS).exists():
        return {}
    metrics = read_metrics(run)
    curve = {m["step"]: m["eval/accuracy_at_0.5"] for m in metrics if "eval/accuracy_at_0.5" in m}
    times = [m["step_time"] for m in metrics if "step_time" in m]  # of some of the steps
    return {"seconds": round(metrics[-1]["step"] * sum(times) / len(times), 1), "accuracy_at_0.5": curve}


def main(args: list[str] | None = None) -> None:
    options = parse(SeedsOptions, args, prog="demo_seeds.py")
    check_paths(options)
    result = run(options)
    name = "demo" if options.world == "drawn" else options.world
    write(result, folder() / f"{name}.json")
    pictures = Image.open(f"{options.output_dir}/{result['runs'][0]['seed']}/pictures.png")
    pictures.quantize(128).save(folder() / f"{name}.png", optimize=True)  # the first seed's, for the README
    print("\n" + table("demo", result))


if __name__ == "__main__":
    run_as_script(main, "demo_seeds.py")
