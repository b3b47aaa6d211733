"""What GRPO adds to the demo's cold start, on three seeds, beside continued SFT for the same seconds (Table 4, row 6).

python bench/studies/demo_seeds.py     writes bench/results/<device>/demo.json, prints the table
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
from boxgrpo.trainer.world import recipe


@dataclass
class SeedsOptions:
    """The demo on several seeds, each with continued SFT beside GRPO."""

    choices: ClassVar = {}
    seeds: str = option("0,1,2", "Seeds, separated by commas.")
    output_dir: str = option("out/seeds", "Folder for the runs.")


def run(options: SeedsOptions) -> dict:
    """Every seed's summary, with the machine's name."""
    described, runs = machine(), []  # described before hours pass and the tree changes
    for seed in recipe.parse_numbers(options.seeds, "seeds"):
        path = Path(options.output_dir) / str(seed)
        runs.append(demo.run(recipe.DemoOptions(output_dir=str(path), seed=seed, continued_sft=True)))
    return {"machine": described, "runs": runs}


def main(args: list[str] | None = None) -> None:
    options = parse(SeedsOptions, args, prog="demo_seeds.py")
    check_paths(options)
    result = run(options)
    write(result, folder() / "demo.json")
    pictures = Image.open(f"{options.output_dir}/{result['runs'][0]['seed']}/pictures.png")
    pictures.quantize(128).save(folder() / "demo.png", optimize=True)  # the first seed's, for the README
    print("\n" + table("demo", result))


if __name__ == "__main__":
    run_as_script(main, "demo_seeds.py")
