"""Requests to vLLM, its weights and when they come, and refused answers; vLLM itself is a fake here."""

import dataclasses
import itertools
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

import fake_vllm
from boxgrpo.model.batch import Group
from boxgrpo.model.checkpoint import load_model
from boxgrpo.trainer.data.example import Example
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.rollout.base import Vocabulary
from boxgrpo.trainer.rollout.vllm import VllmRollout, request_seed


@pytest.fixture(scope="module")
def options(initial):
    values = {"min_pixels": 784, "max_pixels": 50_000, "num_generations": 3, "max_completion_length": 12}
    return GrpoOptions(model=str(initial), rollout="vllm", **values)


@pytest.fixture
def policy(initial):
    model = load_model(initial)
    model.freeze_vision()
    return model


@pytest.fixture
def start(options, processor, policy, groups, monkeypatch):
    """start(**changes) -> the rollout and its engine."""

    def make(noise=0.0, **changes):
        o = dataclasses.replace(options, **changes)
        engines = fake_vllm.install(monkeypatch, seed=o.seed, noise=noise)
        vocabulary = Vocabulary.of(processor, policy.config, "cpu")
        rollout = VllmRollout(o, processor, vocabulary, policy, 3)
        return rollout, engines[0]

    return make


def test_the_engine_is_this_ranks_own_and_starts_asleep(start, options):
    _, engine = start()
    assert engine.events == ["sleep 1"]
    expected = {
        "model": options.model,
        "dtype": "float32",
        "distributed_executor_backend": "external_launcher",
        "enable_sleep_mode": True,
        "gpu_memory_utilization": 0.3,
        "generation_config": "vllm",
        "logprobs_mode": "raw_logprobs",
        "limit_mm_per_prompt": {"image": 3, "video": 0},
        "max_model_len": 4096,  # the tiny model's longest; the options' budgets are over it
        "mm_processor_kwargs": {"size": {"shortest_edge": 784, "longest_edge": 50_000}},
    }
    assert {name: engine.arguments[name] for name in expected} == expected
    _, hot = start(temperature=1.3, max_prompt_length=1000)
    assert hot.arguments["logprobs_mode"] == "processed_logprobs"
    assert hot.arguments["max_model_len"] == 1012


def test_a_request_has_one_placeholder_an_image_and_the_images_at_our_size(start, groups, policy, processor):
    rollout, engine = start()
    rollout(policy, groups)
    for group, request in zip(groups, engine.prompts, strict=True):
        images = request.get("multi_modal_data", {"image": []})["image"]
        grids = group.prompt.image_grid_thw
        assert [(i.height // 14, i.width // 14) for i in images] == [(h, w) for _, h, w in grids.tolist()]
        pad, tokens = processor.image_token_id, request["prompt_token_ids"]
        assert tokens.count(pad) == len(grids)
        assert [i for i in tokens if i != pad] == [i for i in group.prompt.input_ids.tolist() if i != pad]
    assert "multi_modal_data" not in engine.prompts[0]
    assert max(i.width * i.height for i in engine.prompts[2]["multi_modal_data"]["image"]) <= 50_000


def test_images_of_a_chat_keep_their_places_in_a_request(start, policy, processor, tmp_path):
    """The system's text, and a placeholder between the words for each image that the first question shows."""
    for name, size in (("a", (112, 56)), ("b", (60, 140)), ("c", (84, 84))):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / f"{name}.png")
    turns = (("user", "In <image>, not in <image>: where?"), ("assistant", "There."), ("user", "<image>?"))
    example = Example(
        "0", "diff", tuple(str(tmp_path / f"{name}.png") for name in "abc"), "", None, turns, system="Be brief."
    )
    rollout, engine = start()
    (group,) = rollout(policy, [Group(processor.prompt(example), record=example)])
    (request,), mark = engine.prompts, "<|vision_start|><|image_pad|><|vision_end|>"
    text = processor.tokenizer.decode(request["prompt_token_ids"])
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    question = f"<|im_start|>user\nIn {mark}, not in {mark}: where?<|im_end|>\n<|im_start|>assistant\n"
    assert text == system + question
    assert [image.size for image in request["multi_modal_data"]["image"]] == [(112, 56), (56, 140)]
    assert len(group.completions) == 3


def test_sampling_parameters_are_those_of_the_options(start, groups, policy, processor):
    rollout, engine = start(temperature=1.3, max_prompt_length=500)
    rollout(policy, groups)
    for params in engine.params:
        assert (params.n, params.max_tokens, params.temperature, params.top_k, params.top_p) == (3, 12, 1.3, 0, 1.0)
        assert params.logprobs == 0 and params.detokenize is False
        assert params.stop_token_ids == processor.eos_ids
        beyond = range(len(processor.tokenizer), policy.config.text_config.vocab_size)
        assert params.logit_bias == dict.fromkeys([*processor.vision_ids, *beyond], -100.0)
    rollout, engine = start(top_k=5, top_p=0.9)
    rollout(policy, groups[:1])
    assert (engine.params[0].top_k, engine.params[0].top_p) == (5, 0.9)


def test_seeds_follow_the_sample_and_lie_apart():
    seeds = sorted(request_seed(seed, serial) for seed in (0, 42) for serial in range(5000))
    assert seeds[0] >= 0 and seeds[-1] < 2**63 - 1000  # vLLM adds a completion's index
    assert min(b - a for a, b in itertools.pairwise(seeds)) > 1000
    assert request_seed(42, 7) == 12574737069870113  # of any process


def test_what_trains_is_handed_over_under_the_published_names(start, groups, policy, initial):
    rollout, engine = start()
    with safe_open(Path(initial) / "model.safetensors", "pt") as file:
        published = set(file.keys())
    rollout(policy, groups)
    assert engine.loaded == [{name for name in published if not name.startswith("visual.")}]
    policy.freeze_vision(False)
    rollout(policy, groups)
    assert engine.loaded[1] == published


def test_every_call_wakes_loads_forgets_generates_and_sleeps(start, groups, policy):
    rollout, engine = start()
    for _ in range(2):
        engine.events.clear()
        rollout(policy, groups)
        steps = "wake weights, load_weights, wake kv_cache, reset_prefix_cache, reset_encoder_cache, generate, sleep 1"
        assert engine.events == steps.split(", ")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda answers: answers.pop(), "vLLM answered 3 of 4 requests"),
        (lambda answers: answers[1].outputs.pop(), "data#3: vLLM gave 2 completions; num_generations is 3"),
        (lambda answers: answers[2].prompt_token_ids.append(0), r"data#12: vLLM read \d+ tokens, .* the prompt has"),
        (lambda answers: answers[0].outputs[0].logprobs.pop(), "data#7: vLLM gave .* log-probabilities of"),
        (lambda answers: setattr(answers[0].outputs[1], "logprobs", None), "log-probabilities of 0"),
        (lambda answers: answers[0].outputs[1].__dict__.update(token_ids=[], logprobs=[]), "gave 0 tokens"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(start, groups, policy, monkeypatch, damage, message):
    rollout, engine = start()
    generate = engine.generate

    def damaged(*args, **kwargs):
        answers = generate(*args, **kwargs)
        damage(answers)
        return answers

    monkeypatch.setattr(engine, "generate", damaged)
    with pytest.raises(ValueError, match=message):
        rollout(policy, groups)


def test_without_vllm_the_error_names_the_remedy(options, processor, policy, monkeypatch):
    arguments = (options, processor, Vocabulary.of(processor, policy.config, "cpu"), policy, 3)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="rollout is 'vllm' and an import fails.*pip install 'vllm.*--rollout local"):
        VllmRollout(*arguments)
