"""The recipes: their layers are valid, have the paper's numbers, and a tiny run differs only where it must."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import yaml

from boxgrpo.bench.studies.ablation import METHODS
from boxgrpo.trainer.arguments import parse
from boxgrpo.trainer.data.readers import read_usable
from boxgrpo.trainer.effects import without_effect
from boxgrpo.trainer.options import GrpoOptions, SftOptions, validate_grpo, validate_sft
from boxgrpo.trainer.world.recipe import FROM_NOTHING, RECIPES, RUNS

PATHS = {"model", "data", "image_root", "output_dir"}
# Where a run of minutes, of a million parameters on drawn scenes, may differ from the real run.
TINY = PATHS | {
    "learning_rate",  # it has hundreds of steps, not thousands
    "max_steps",
    "max_completion_length",  # its answers have 17 tokens
    "dtype",  # float32 on a GPU, too
    *("engine", "zero_stage", "gradient_checkpointing"),  # it fits anywhere
    *("save_steps", "save_total_limit", "resume"),  # it is too short for checkpoints
    *("logging_steps", "dataloader_num_workers"),
}
LARGE = {"model", "engine", "zero_stage", "gradient_checkpointing"}  # where the 7B differs from the 2B
VALIDATE = {SftOptions: validate_sft, GrpoOptions: validate_grpo}


def options(*layers, method):
    """The method's options by these layers, the later overruling the earlier."""
    return parse(METHODS[method].options, [f"--config={RECIPES / layer}.yaml" for layer in layers])


def unlike(one, other):
    a, b = dataclasses.asdict(one), dataclasses.asdict(other)
    return {name for name in a if a[name] != b[name]}


def test_every_recipe_is_used():
    used = {layer for method in METHODS.values() for layer in method.recipes} | {"2b", "7b", "base"}
    used |= {recipe.removesuffix(".yaml") for recipe, *_ in (*RUNS.values(), *FROM_NOTHING.values())}
    assert {path.stem for path in RECIPES.glob("*.yaml")} == used


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_layers_are_valid_and_differ_only_where_they_must(method):
    """What section 4.1 of the paper names is in the recipe; all else is the options' default."""
    (name, tiny), start = METHODS[method].recipes, METHODS[method].start
    small, large, drawn = (options(*layers, method=method) for layers in (("2b", name), ("7b", name), (name, tiny)))
    for o in (small, large, drawn):
        assert not without_effect(o, set())
        for ranks in (1, 2, 8):
            VALIDATE[type(o)](o, ranks)
    assert unlike(small, large) <= LARGE
    assert (large.engine, large.zero_stage, large.gradient_checkpointing) == ("deepspeed", 3, True)
    assert unlike(drawn, small) | unlike(drawn, large) <= TINY
    assert large.model == ("out/cot_sft" if start == "cot_sft" else "Qwen2-VL-7B-Instruct")
    text = (RECIPES / f"{name}.yaml").read_text()
    assert f"trainer/{METHODS[method].script} --config trainer/recipes/7b.yaml" in text

    second_stage = start == "cot_sft"
    if isinstance(large, SftOptions):
        assert (large.learning_rate, large.train_batch_size) == ((1e-6, 16) if second_stage else (5e-6, 24))
        assert (large.lr_scheduler_type, large.warmup_ratio, large.cutoff_len) == ("cosine", 0.015, 6000)
        named = {"learning_rate", "train_batch_size"}
    else:
        assert (large.learning_rate, large.prompts_per_step) == (1e-6, 16)
        assert (large.num_generations, large.max_completion_length, large.difficulty) == (8, 256, "none")
        assert (large.beta, large.epsilon, large.temperature, large.num_iterations) == (0.04, 0.2, 1.0, 1)
        assert (large.lr_scheduler_type, large.loss_type, large.scale_rewards) == ("linear", "grpo", "group")
        named = {"learning_rate", "prompts_per_step", "num_generations", "max_completion_length", "difficulty"}
    assert named <= yaml.safe_load(text).keys()
    counts = [int(source.rsplit("#", 1)[1]) for source in large.data]
    assert counts == ([7000, 3000] if second_stage else [17733, 3267] if method == "pure_rl" else [76_000, 14_000])


@pytest.mark.parametrize("name", ["base", "from_nothing_sft", "demo_sft"])
def test_the_tower_learns_where_weights_are_random_and_nowhere_else(name):
    options = parse(SftOptions, [f"--config={RECIPES / name}.yaml"])
    validate_sft(options, 2)
    assert options.freeze_vision == (name == "demo_sft")


@pytest.mark.parametrize("method", ["sft", "cot_sft", "pure_rl", "grpo"])
def test_a_recipes_sets_have_what_its_loop_needs(method, tmp_path):
    """Two records of each set, as it is published, under the names in the recipe."""
    o = options("7b", METHODS[method].recipes[0], method=method)
    marked = [("human", "<image>Where is it?"), ("gpt", "<|box_start|>(1,2),(30,40)<|box_end|>")]
    think = [("human", "<image>Where is it?"), ("gpt", "<think>There.</think><answer>(1, 2), (30, 40)</answer>")]
    stage2 = {"images": ["a.jpg"], "question": "Where?", "answer": [1, 2, 30, 40]}
    records = {
        "mgrounding": {"images": ["a.jpg"], "conversations": [{"from": f, "value": v} for f, v in marked]},
        "refcoco": {"image": "c.jpg", "width": 400, "height": 200, "expression": "cat", "bbox": [40, 20, 100, 80]},
        "mgrounding_cot": {"images": ["a.jpg"], "conversations": [{"from": f, "value": v} for f, v in think]},
        "mgrounding_stage2": stage2,
        "refcoco_stage2": stage2 | {"images": ["coco/train2014/COCO_1.jpg"]},
    }
    records["refcoco_cot"] = records["mgrounding_cot"]
    counts = [source.rpartition("#")[2] for source in o.data]
    names = [source.rpartition("#")[0].removeprefix("data/") for source in o.data]
    for name in names:
        (tmp_path / name).write_text(json.dumps([records[name.removesuffix(".json")]] * 2))
    mixed = SimpleNamespace(data=[f"{tmp_path / n}#{c}" for n, c in zip(names, counts, strict=True)])
    mixed.schema, mixed.box_unit, mixed.image_root, mixed.seed = "auto", "auto", "", 0
    examples, faults = read_usable(mixed, needs="turns" if METHODS[method].script == "sft.py" else "gold")
    assert len(examples) == 4 and not faults
