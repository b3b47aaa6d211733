"""The demo's options and its parts: the drawn world, the initial checkpoint, and the flags of its runs.

`trainer/demo.py` runs all of it; `trainer/grpo.py` without a model and data runs the last part.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from boxgrpo.model.checkpoint import save_model
from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.trainer.arguments import option
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.vocabulary import SPECIAL_TOKENS, SYSTEM_PROMPT, demo_tokenizer
from boxgrpo.trainer.options import ANY_COUNT

from .digits import WORLDS
from .tiny import tiny_config
from .world import DEMO_TASKS, SEEDS_PER_SPLIT, all_texts, list_phrases, write_world

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
BASE = Path(__file__).resolve().parent / "base"  # the base model's checkpoint, as trainer/base.py wrote it
# Runs by folder in the demo's output_dir: recipe, folder of the initial weights, file of records in world/.
RUNS = {
    "sft": ("demo_sft.yaml", BASE, "cold_start.json"),
    "grpo": ("demo_grpo.yaml", "sft", "train.json"),
    "continued_sft": ("demo_sft.yaml", "sft", "train_chains.json"),
}
FROM_NOTHING = {"sft": ("from_nothing_sft.yaml", "initial", "cold_start.json")}


@dataclass
class DemoOptions:
    """Cold start, GRPO and their scores on a world of small scenes."""

    choices: ClassVar = {"processes": (0, 1, 2, 4, 8, 16), "world": tuple(WORLDS)}
    ranges: ClassVar = {"seed": ANY_COUNT, "size": "[0, 5600]", "cold_start": f"[0, {SEEDS_PER_SPLIT}]"}
    ranges |= dict.fromkeys(("train", "held_out"), f"[1, {SEEDS_PER_SPLIT}]")
    output_dir: str = option("out/demo", "Folder for everything the demo makes.")
    seed: int = option(0, "Seed of the world, of initial weights, the data order and the sampling.")
    world: str = option("drawn", "Drawn shapes, or handwritten digits: scikit-learn's scans.")
    base: str = option("", "Folder of the base model; empty: the drawn world's, which is a part of boxgrpo.")
    from_nothing: bool = option(False, "Start from random weights in place of the base model.")
    tasks: str = option(",".join(DEMO_TASKS), "Tasks to draw, by MIG-Bench's names.")
    levels: str = option("0,1", "Difficulties of the scenes, 0 to 2; scenes alternate among them.")
    size: int = option(0, "Side of the images in pixels, a multiple of 56; 0: 112, or from nothing 56.")
    cold_start: int = option(0, "Scenes with reasoning chains; 0: 400, or from nothing 4000.")
    train: int = option(6000, "Scenes for GRPO, with a box only.")
    held_out: int = option(400, "Held-out scenes to score on.")
    continued_sft: bool = option(False, "For comparison also continue SFT for as long as GRPO took.")
    processes: int = option(0, "Processes to train with; 0: one per GPU, or up to two on a CPU.")


def parse_numbers(text: str, name: str) -> list[int]:
    """Parse the value of the flag `name`, whole numbers separated by commas.

    Raises:
        ValueError: `text` is anything else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} is {text!r}; it must be whole numbers and commas. Correct --{name}.") from None


def draw_world(options: DemoOptions) -> Path:
    if options.world != "drawn" and not options.base and not options.from_nothing:
        remedy = f"Train one (trainer/base.py --world {options.world}) and name its folder with --base"
        raise ValueError(f"world is {options.world!r}, which needs a base model of its own. {remedy}.")
    tasks, levels = options.tasks.split(","), parse_numbers(options.levels, "levels")
    size, cold_start = (56, 4000) if options.from_nothing else (112, 400)
    chosen = {"size": options.size or size, "cold_start": options.cold_start or cold_start}
    same = {name: getattr(options, name) for name in ("train", "held_out", "seed", "world")}
    return write_world(Path(options.output_dir) / "world", tasks=tasks, levels=levels, **same, **chosen)


def make_initial_checkpoint(options: DemoOptions, texts: list[str] | None = None, **size: int) -> Path:
    """Write a checkpoint of random weights, with a tokenizer made from the world's texts, or from `texts`.

    `size`: widths and depths of `tiny_config`.
    """
    folder = Path(options.output_dir) / "initial"
    levels = parse_numbers(options.levels, "levels")
    texts = texts or all_texts(options.tasks.split(","), levels=levels, world=options.world)
    template = [f"system\n{SYSTEM_PROMPT}", "user\n", "assistant\n"]
    tokenizer = demo_tokenizer([*texts, *template], phrases=[*template, *list_phrases(texts)])
    config = tiny_config(len(tokenizer), {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}, **size)
    save_model(Qwen2VL(config).init_weights(torch.Generator().manual_seed(options.seed)), folder)
    Processor(tokenizer, Qwen2VLImageProcessorPil()).save_pretrained(folder)
    return folder


def run_flags(options: DemoOptions, run: str) -> list[str]:
    """Flags of `sft.py` or `grpo.py` for a run of `RUNS`."""
    root, runs = Path(options.output_dir), RUNS | (FROM_NOTHING if options.from_nothing else {})
    recipe, model, data = runs[run]
    model = Path(options.base or BASE).resolve() if model == BASE else root / model
    flags = [f"--config={RECIPES / recipe}", f"--model={model}", f"--data={root / 'world' / data}"]
    return [*flags, f"--output_dir={root / run}", f"--seed={options.seed}", "--overwrite_output_dir=true"]
