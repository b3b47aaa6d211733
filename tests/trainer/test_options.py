"""Options: flags, help and YAML derive from the dataclasses; an error names the value, the rule and the remedy."""

import dataclasses

import pytest
import torch

from boxgrpo.kernels import LossOptions
from boxgrpo.trainer import grpo, sft
from boxgrpo.trainer.arguments import parse, read_yaml
from boxgrpo.trainer.options import EvalOptions, GrpoOptions, SftOptions, validate_grpo, validate_sft
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
        ({"loss_type": "ppo"}, "loss_type is 'ppo'"),
        ({"loss_type": "cispo"}, "epsilon_high"),
        ({"delta": 1.0}, "delta"),
        ({"difficulty": "sqrt"}, "difficulty is 'sqrt'"),
        ({"scale_rewards": "yes"}, "scale_rewards is 'yes'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level is 'word'"),
        ({"rollout": "replay"}, "Give --rollout_file"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"rollout": "vlm"}, "rollout is 'vlm'; it must be one of local, vllm, replay"),
        ({"rollout": "vllm", "rollout_file": "x.jsonl"}, "rollout_file is x.jsonl; vLLM's completions are not stored"),
        ({"rollout": "vllm", "temperature": 0.9, "top_p": 0.9}, "temperature is 0.9 with top_k 0 and top_p 0.9"),
        ({"rollout": "vllm", "vllm_gpu_memory_utilization": 30.0}, "gpu_memory_utilization is 30.0; it is a share"),
        ({"rollout": "vllm", "vllm_importance_sampling_clip_max": 0.5}, "clip_max is 0.5; it must be at least 1"),
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
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_loaded(change, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        validate_grpo(dataclasses.replace(GrpoOptions(), **change), world_size=4)


@pytest.mark.parametrize("change", [{}, {"temperature": 0.9}, {"top_k": 5, "top_p": 0.9}])
def test_what_vllm_can_sample_is_taken(change):
    assert validate_grpo(GrpoOptions(rollout="vllm", **change), world_size=4) == LossOptions(beta=0.04, epsilon=0.2)


def test_an_sft_batch_divides_among_the_ranks():
    with pytest.raises(ValueError, match="train_batch_size is 24; it must divide by 5 ranks"):
        validate_sft(SftOptions(), world_size=5)


@pytest.mark.parametrize("loop", [grpo, sft])
def test_the_timeout_is_that_of_the_ranks(loop, monkeypatch):
    class Reached(Exception):
        pass

    def join_ranks(timeout):
        raise Reached(timeout)

    monkeypatch.setattr(loop, "join_ranks", join_ranks)
    with pytest.raises(Reached, match="33"):
        loop.main(["--model=m", "--data=d", "--timeout=33"])
