"""Options: flags, help and YAML derive from the dataclasses; an error names the value, the rule and the remedy."""

import dataclasses
import importlib
import json
import math
import sys
from typing import get_type_hints

import pytest
import torch

from boxgrpo.kernels import LossOptions
from boxgrpo.trainer import grpo, sft
from boxgrpo.trainer.arguments import check_options, parse, read_yaml
from boxgrpo.trainer.effects import RULES, without_effect
from boxgrpo.trainer.engine.optimizer import make_schedule
from boxgrpo.trainer.options import (
    SCHEDULES,
    EvalOptions,
    GrpoOptions,
    SftOptions,
    validate_grpo,
    validate_sft,
)
from boxgrpo.trainer.presence import check_paths, check_presence
from boxgrpo.trainer.run import total_steps


@pytest.mark.parametrize("kind", [SftOptions, GrpoOptions, EvalOptions])
def test_no_flags_give_the_dataclass_and_help_explains_every_field(kind, capsys):
    assert parse(kind, []) == kind()
    with pytest.raises(SystemExit):
        parse(kind, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for f in dataclasses.fields(kind):
        assert f"--{f.name}" in text
        assert f.metadata["help"][:25] in text


def test_flags_overrule_files_and_later_files_earlier_ones(tmp_path):
    (tmp_path / "recipe.yaml").write_text("learning_rate: 1e-5\nbeta: 0\nmax_steps: 7\nfreeze_vision: false\n")
    (tmp_path / "mine.yaml").write_text("max_steps: 8\nepsilon: 0.3\nepsilon_high: 0.28\n")
    files = [f"--config={tmp_path / name}.yaml" for name in ("recipe", "mine")]
    expected = GrpoOptions(
        learning_rate=1e-5, beta=0.0, max_steps=8, freeze_vision=False, epsilon=0.2, epsilon_high=0.28
    )
    assert parse(GrpoOptions, [*files, "--epsilon", "0.2"]) == expected


@pytest.mark.parametrize(("max_steps", "steps"), [(5, 5), (0, 20), (-1, 20)])
def test_steps_are_given_or_follow_from_the_epochs(max_steps, steps):
    assert total_steps(GrpoOptions(max_steps=max_steps, num_train_epochs=2.0), examples=160, per_step=16) == steps


@pytest.mark.parametrize(
    "text, message",
    [
        ("learing_rate: 1", "did you mean learning_rate"),
        ("max_steps: many", "max_steps is 'many'; it must be of type int"),
        ("learning_rate: fast", "learning_rate is 'fast'; it must be a number"),
        ("- 1", "must map option names"),
        ("a: [1", "x.yaml is no YAML .*Correct it"),
    ],
)
def test_bad_yaml_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match="x.yaml: no such file"):
        read_yaml(GrpoOptions, tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(GrpoOptions, tmp_path / "x.yaml")


def test_an_unknown_flag_names_its_neighbour(capsys):
    with pytest.raises(SystemExit):
        parse(GrpoOptions, ["--num_generation", "4"])
    assert "unknown flag '--num_generation'; did you mean --num_generations?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_generations": 1}, "num_generations is 1; it must be at least 2"),
        ({"prompts_per_step": 6}, "prompts_per_step is 6; .* multiple of 4"),
        ({"gradient_accumulation_steps": 3}, "multiple of 12"),
        (
            {"dynamic_sampling": True, "engine": "deepspeed", "zero_stage": 3, "ds3_gather_for_generation": False},
            "dynamic_sampling is True with ds3_gather_for_generation False, .* Leave one of the two out",
        ),
        ({"max_refills": -1}, "max_refills is -1; it must be at least 0. Raise --max_refills"),
        ({"loss_type": "ppo"}, "loss_type is 'ppo'"),
        ({"loss_type": "cispo"}, "epsilon_high"),
        ({"delta": 1.1}, r"delta is 1.1; .* above 1 \+ epsilon_high = 1.2"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "'vespo' weighs completions"),
        ({"difficulty": "sqrt"}, "difficulty is 'sqrt'"),
        ({"scale_rewards": "yes"}, "scale_rewards is 'yes'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level is 'word'"),
        ({"rollout": "replay"}, "Give --rollout_file"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"rollout": "vlm"}, "rollout is 'vlm'; it must be one of local, vllm, replay"),
        ({"rollout": "vllm", "rollout_file": "x.jsonl"}, "rollout_file is x.jsonl; vLLM's completions are not stored"),
        ({"rollout": "vllm", "temperature": 0.9, "top_p": 0.9}, "temperature is 0.9 with top_k 0 and top_p 0.9"),
        ({"vllm_gpu_memory_utilization": 30.0}, "gpu_memory_utilization is 30.0; it must be at most 1. Lower"),
        ({"vllm_importance_sampling_clip_max": 0.5}, "clip_max is 0.5; it must be at least 1"),
        ({"num_iterations": 0}, "num_iterations is 0"),
        ({"logging_steps": 0}, "logging_steps is 0; it must be at least 1"),
        ({"freeze_vision": False, "lora_rank": 8}, "freeze_vision is False and lora_rank 8; .* Use --freeze_vision"),
        ({"eval_every": 2}, "eval_every is 2 and eval_data ''. Give both"),
        ({"eval_data": "a.json"}, "eval_every is 0 and eval_data 'a.json'. Give both"),
        ({"lora_alpha": 16}, "lora_alpha is 16 and lora_rank 0; .* Give --lora_rank"),
        ({"profile_steps": "10-13"}, "must be two numbers, such as 10:13"),
        ({"profile_steps": "13:10"}, "must be the larger"),
        ({"profile_steps": "3:3"}, "must be the larger"),
        ({"profile_steps": "0:3"}, "steps count from 1"),
        ({"profile_steps": "10:13", "max_steps": 9}, "the run ends with step 9"),
        ({"memory_snapshot": True}, "there is no GPU"),
        ({"output_dir": ""}, "output_dir is ''; .* Name one with --output_dir"),
        ({"min_pixels": 9, "max_pixels": 4}, "min_pixels is 9 and max_pixels 4; .* Lower --min_pixels"),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}, "learning_rate is 1e-08; .*Raise --learning_rate"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type is 'reduce_lr_on_plateau'"),  # case 12
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0; it must be at least 0. Raise --max_grad_norm"),  # case 2
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_loaded(change, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        validate_grpo(dataclasses.replace(GrpoOptions(), **change), world_size=4)


def test_adam_in_host_memory_is_refused_for_weights_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="optimizer is 'cpu_adam' and the weights are on a GPU; .*--optimizer adamw"):
        validate_grpo(GrpoOptions(optimizer="cpu_adam"), world_size=1)
    validate_grpo(GrpoOptions(optimizer="cpu_adam", engine="deepspeed", offload_optimizer=True), world_size=1)


@pytest.mark.parametrize("change", [{}, {"temperature": 0.9}, {"top_k": 5, "top_p": 0.9}])
def test_what_vllm_can_sample_is_taken(change):
    assert validate_grpo(GrpoOptions(rollout="vllm", **change), world_size=4) == LossOptions(beta=0.04, epsilon=0.2)


def test_an_sft_batch_divides_among_the_ranks():
    with pytest.raises(ValueError, match="train_batch_size is 24; it must divide by 5 ranks"):
        validate_sft(SftOptions(), world_size=5)


@pytest.mark.parametrize("loop", [grpo, sft])
def test_the_timeout_is_that_of_the_ranks(loop, monkeypatch, tmp_path):
    class Reached(Exception):
        pass

    def join_ranks(timeout):
        raise Reached(timeout)

    monkeypatch.setattr(loop, "join_ranks", join_ranks)
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        (tmp_path / name).touch()
    with pytest.raises(Reached, match="33"):
        loop.main([f"--model={tmp_path}", f"--data={tmp_path}", "--timeout=33"])


# Every command's options. A text is judged where a file or a name is needed, and has no ends.
CLASSES = ("options.SftOptions", "options.GrpoOptions", "options.EvalOptions", "apps.ground.GroundOptions")
CLASSES = (*CLASSES, "apps.memory.MemoryOptions", "chains.make.CotOptions", "chains.accept.AcceptOptions")
CLASSES = (*CLASSES, "world.recipe.DemoOptions", "bench.bench_data.DataBenchOptions", "bench.soaks.soak.SoakOptions")
CLASSES = (*CLASSES, "bench.studies.ablation.AblationOptions", "bench.studies.demo_seeds.SeedsOptions")
CLASSES = (*CLASSES, "base.BaseOptions")
# Numbers without an end of their own, by the reason: int32 is the end.
WITHOUT_END = {"max_steps": "0 or less means: by the epochs"}


# Fields that have an effect whatever the others are. (In some commands others have, too.)
ALWAYS = set(
    """model data image_root max_steps freeze_vision lora_rank lora_alpha gradient_checkpointing max_grad_norm
    weight_decay adam_beta2 engine offload_optimizer optimizer logging_steps save_steps resume timeout max_skipped
    eval_every eval_data profile_steps memory_snapshot peak_tflops learning_rate lr_scheduler_type train_batch_size
    cutoff_len tokens_per_pass prompts_per_step num_generations num_iterations max_prompt_length temperature beta
    loss_type scale_rewards difficulty dynamic_sampling rollout rollout_file log_completions bench predictions
    limit image question serve gpus device prompt_tokens gigabits judge_model sample chains min_iou judge_temperature
    max_tokens tries ask answers tasks levels size cold_start from_nothing train held_out continued_sft processes
    records repeats parts steps kills cold_start_steps seeds methods quick world base start""".split()
)


def make(name):
    """The options of a class by its name in CLASSES, all at their defaults."""
    module, _, name = name.rpartition(".")
    module = f"boxgrpo.{module}" if module.startswith("bench.") else f"boxgrpo.trainer.{module}"
    return getattr(importlib.import_module(module), name)()


def without(options, typed=()):
    """The names of the options that have no effect."""
    return {text.split()[0].removeprefix("--") for text in without_effect(options, {*typed})}


@pytest.mark.parametrize("name", CLASSES)
def test_every_option_has_an_effect_or_the_command_says_that_it_has_none(name):
    """At values of the option that decides it; typed, even its default is told, and what nobody gave is not."""
    options = make(name)
    assert not without(options)
    assert vars(options).keys() <= ALWAYS | {field for fields, *_ in RULES for field in fields.split()}
    for fields, other, has_effect in RULES:
        if other not in vars(options):
            continue
        values = options.choices.get(other, {str: ("", "ddp"), bool: (False, True)}.get(type(getattr(options, other))))
        answered = {"predictions": "p.json"} if hasattr(options, "predictions") else {}
        cases = [{other: value} for value in values or (0, 1, 2)]
        cases = [dataclasses.replace(options, **more | case) for case in cases for more in ({}, answered)]
        writes = other == "output_dir" and not answered  # a run always does
        for field in (field for field in fields.split() if hasattr(options, field)):
            assert {bool(has_effect(case)) for case in cases} == ({True} if writes else {True, False}), field
            for case in cases:
                if not has_effect(case):
                    assert field in without(case, {field}) and field not in without(case)


def test_options_without_effect_are_told_in_one_line(capsys, monkeypatch):
    given = ["--loss_type=sapo", "--epsilon", "0.1", "--zero_stage=3", "--save_total_limit=2", "--eval_image_root=x"]
    parse(GrpoOptions, [*given, "--rollout=replay", "--top_k=5", "--vllm_gpu_memory_utilization=0.3"], prog="grpo.py")
    assert capsys.readouterr().err == (
        "WARNING no effect: --zero_stage with --engine ddp, --save_total_limit with --save_steps 0, --eval_image_root "
        "without --eval_data, --epsilon with --loss_type sapo, --top_k with --rollout replay, "
        "--vllm_gpu_memory_utilization with --rollout replay\n"
    )
    monkeypatch.setenv("RANK", "1")
    parse(GrpoOptions, given, prog="grpo.py")
    assert capsys.readouterr().err == ""


def wrong_values(kind, options, name):
    """Values of other types, and for a number those off both ends of its interval, with the rule that refuses each."""
    if kind is str:
        wrong = [(7, "must be a text|must be one of"), (None, "must be a text|must be one of")]
        return [*wrong, ("\u200bno such choice", "must be one of")] if name in options.choices else wrong
    if kind == list[str]:
        return [("one", "must be a list of texts"), ([1], "must be a list of texts")]
    if kind is bool:
        return [(1, "must be true or false"), ("yes", "must be true or false")]
    whole = kind is int
    wrong = [("3", "must be a"), (True, "must be a"), (math.nan, "must be a")]
    if whole:
        wrong.append((3.0, "must be a whole number"))
    if name in options.choices:
        return [*wrong, (max(options.choices[name]) + 1, "must be one of"), (-1, "must be one of")]
    interval = options.ranges[name]
    low, high = (float(end) for end in interval[1:-1].split(", "))
    step = int if whole else float
    below = step(low) - (1 if whole else 1e-6 * (abs(low) + 1)) * (interval[0] == "[")
    above = step(high) + (1 if whole else 1e-6 * (abs(high) + 1)) * (interval[-1] == "]")
    wrong += [(below, "must be (at least|above) .*Raise"), (above, "must be (at most|below) .*Lower")]
    return wrong if whole else [*wrong, (math.inf, "must be at most|must be below"), (-math.inf, "must be")]


@pytest.mark.parametrize("name", CLASSES)
def test_case_02_and_case_12_every_field_refuses_what_is_off_its_ends_or_of_another_kind(name):
    """Cases 2 and 12, and their kind: each refusal has the value, the rule and the flag, and fits into two lines."""
    check_options(options := make(name))
    kinds = get_type_hints(type(options))
    for f in dataclasses.fields(options):
        kind = float if (kind := kinds[f.name]) == float | None else kind
        for value, rule in wrong_values(kind, options, f.name):
            changed = dataclasses.replace(options)
            setattr(changed, f.name, value)
            with pytest.raises(ValueError, match=rule) as refused:
                check_options(changed)
            text = str(refused.value)
            assert text.startswith(f"{f.name} is {value!r}; ") or f"{f.name} is {value}; " in text
            assert f"--{f.name}." in text and len(text) < 300
        if kind in (int, float) and f.name not in options.choices and "2147483648" in options.ranges[f.name]:
            assert f.name in WITHOUT_END


@pytest.mark.parametrize("name", SCHEDULES)
def test_case_12_every_schedule_that_is_allowed_can_be_made_and_stepped(name):
    """Case 12: for one that is not, transformers needs arguments that there are no flags for."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = make_schedule(optimizer, GrpoOptions(lr_scheduler_type=name, warmup_ratio=0.2), 10)
    for _ in range(10):
        optimizer.step()
        schedule.step()
        assert 0 <= schedule.get_last_lr()[0] <= 1e-3


def test_case_24_what_is_not_on_this_machine_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    """Files, folders and packages that the options name; case 24: adapters and the id of a model on the hub."""
    model, run = tmp_path / "model", tmp_path / "run"
    for folder in (model, run, run / "adapter", tmp_path / "alone"):
        folder.mkdir()
        (folder / ("config.json" if folder in (model, run) else "adapter_config.json")).write_text(
            json.dumps({"base_model_name_or_path": "BASE"})
        )
    for package in ("peft", "deepspeed", "vllm"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    for name in ("vocab.json", "preprocessor_config.json"):
        (model / name).touch()
    cut, text = tmp_path / "cut", tmp_path / "text"
    for file in (cut / "adapter_config.json", text / "config.json", text / "vocab.json"):
        file.parent.mkdir(exist_ok=True)
        file.write_text('{"base')
    right = {"model": str(model), "data": [f"{text / 'config.json'}#7"]}
    monkeypatch.chdir(tmp_path.parent)
    check_presence(GrpoOptions(**right))
    hub = "Qwen/Qwen2-VL-2B-Instruct"
    for change, message in [
        ({"model": ""}, "no model. Name a checkpoint folder with --model."),
        ({"model": str(tmp_path)}, "it holds no config.json. Name the folder of a Qwen2-VL checkpoint with --model."),
        *(
            ({"model": path}, f"model is {path}; there is no such folder. Name the folder")
            for path in ("a/b/c", "./none", "/none", f"{tmp_path.name}/none", "../none")
        ),
        ({"model": str(cut)}, "cut/adapter_config.json cannot be read .*Copy it again."),
        ({"model": hub}, f"model is {hub}; there is no such folder, .*\nhf download {hub} --local-dir {hub}$"),
        ({"model": str(run / "adapter")}, f"which holds LoRA adapters alone.\nUse --model {run}, which"),
        (
            {"model": str(tmp_path / "alone")},
            "LoRA adapters alone.\nMerge them.*from_pretrained..BASE.*merge_and_unload",
        ),
        ({"model": str(text)}, "it holds none of preprocessor_config.json, processor_config.json. Copy the image"),
        ({"model": str(run)}, "it holds none of tokenizer.json, vocab.json. Copy the tokenizer of the model there"),
        ({"output_dir": str(model / "config.json")}, "config.json; no folder can be written there. Name another with"),
        ({"output_dir": str(model / "config.json/run")}, "run; no folder can be written there. Name another with"),
        ({"data": []}, "no data. Name a file of records with --data."),
        ({"data": ["gone.json#7"]}, "data is gone.json#7; there is no such file or folder. Correct --data."),
        ({"image_root": "gone"}, "image_root is gone; there is no such folder. Correct --image_root."),
        ({"eval_data": "gone.json"}, "eval_data is gone.json; there is no such file. Correct --eval_data."),
        ({"eval_image_root": "gone"}, "eval_image_root is gone; there is no such folder."),
        ({"rollout": "replay", "rollout_file": "gone"}, "rollout_file is gone; there is no such file. Store one"),
        ({"resume": "gone"}, "resume is gone; it is no checkpoint folder. Name one"),
        ({"lora_rank": 8}, "lora_rank is 8, which needs peft; it is not installed. Install it"),
        ({"engine": "deepspeed"}, "engine is 'deepspeed', which needs deepspeed; .* use --engine ddp."),
        ({"rollout": "vllm"}, "rollout is 'vllm', which needs vllm; it is not installed."),
    ]:
        with pytest.raises(ValueError, match=message) as refused:
            check_presence(GrpoOptions(**right | change))
        assert str(refused.value).count("\n") <= 1


def test_a_folder_whose_files_a_run_replaces_holds_none_of_its_inputs(tmp_path):
    """A model or a file that stays there when a run starts anew may be in it."""
    for name in ("best", "checkpoint-3", "base"):
        (tmp_path / name).mkdir()
    (tmp_path / "results.json").touch()
    check_paths(GrpoOptions(model=str(tmp_path / "base"), data=[f"{tmp_path}/data.json"], output_dir=str(tmp_path)))
    for given in ({"model": str(tmp_path / "best")}, {"data": [f"{tmp_path}/checkpoint-3/a.json#2"]}):
        with pytest.raises(
            ValueError, match=r"output_dir holds .*, which is read; it may be lost. Change --output_dir"
        ):
            check_paths(GrpoOptions(**given, output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="output_dir holds .*results.json, which is read"):
        check_paths(EvalOptions(predictions=f"{tmp_path}/results.json", output_dir=str(tmp_path)))
    check_paths(EvalOptions(model=str(tmp_path / "best"), output_dir=str(tmp_path)))
