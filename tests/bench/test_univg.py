"""The paper's trainer as the step benchmark re-enacts it: it does our work, in its own way, and gives our numbers."""

import copy
from functools import partial

import pytest
import torch
from transformers import GenerationConfig

from boxgrpo.bench.peers import skipped
from boxgrpo.bench.reward_bench.vocabularies import TOKENS, benchmark_tokenizer
from boxgrpo.bench.step_bench.cases import TEXTS, StepCase
from boxgrpo.bench.step_bench.sides import Measurement, engine_of, load_peer
from boxgrpo.bench.step_bench.univg import Batch, completion_logps, generated, mask_of, micro_loss, rewards_of
from boxgrpo.kernels import group_advantages
from boxgrpo.model.batch import Group, pack_groups
from boxgrpo.model.checkpoint import load_model, save_model
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import read_examples
from boxgrpo.trainer.data.vocabulary import SPECIAL_TOKENS
from boxgrpo.trainer.grpo import logps, policy_loss
from boxgrpo.trainer.options import GrpoOptions, validate_grpo
from boxgrpo.trainer.runtime.ranks import Ranks


@pytest.fixture(scope="module")
def processor(tiny):
    return Processor.from_pretrained(tiny / "model", min_pixels=1, max_pixels=10**6)


@pytest.fixture(scope="module")
def prompt(tiny, processor):
    examples, _ = read_examples(tiny / "records.json")
    return processor.prompt(examples[0])


def test_on_stored_samples_loss_and_gradient_are_ours(tiny, processor, prompt, tmp_path, tiny_case):
    """Four completions, of which two end early, rewards of all kinds, and a reference of other weights."""
    end, length = processor.eos_ids[0], tiny_case.tokens
    completions = torch.randint(300, (4, length), generator=torch.Generator().manual_seed(1))
    completions[1, 2] = completions[3, 4] = end
    accuracy, form = torch.tensor([0.1, 0.9, 0.4, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    policy = load_model(tiny / "model")
    policy.freeze_vision(True)
    before = copy.deepcopy(policy).init_weights(torch.Generator().manual_seed(5))
    before.visual.load_state_dict(policy.visual.state_dict())
    save_model(before, tmp_path / "model")

    peer, batch = load_peer(tiny_case, tiny, Measurement()), Batch.of([prompt] * 4, "cpu")
    mask = mask_of(completions, end)
    assert mask.sum(1).tolist() == [6, 3, 6, 5]
    with torch.no_grad():
        ref_logps = completion_logps(load_peer(tiny_case, tmp_path, Measurement()), batch, completions)
    loss = micro_loss(completion_logps(peer, batch, completions), ref_logps, mask, accuracy, form)
    loss.backward()

    advantages, weights, _ = group_advantages((accuracy + form)[None], accuracy[None], difficulty="exp")
    own = [c[:n] for c, n in zip(completions, mask.sum(1).tolist(), strict=True)]
    with torch.no_grad():
        embeds = policy.visual(prompt.pixel_values, prompt.image_grid_thw)
    group = Group(prompt, own, embeds, advantages=advantages[0], weight=weights[0])
    pack = pack_groups([group], image_token_id=policy.config.image_token_id)
    with torch.no_grad():
        pack.ref_logps = before(pack, partial(logps, pack, 1.0))
    ours, _ = policy(pack, partial(policy_loss, GrpoOptions(), validate_grpo(GrpoOptions(), 1), pack))
    ours.backward()

    torch.testing.assert_close(loss, ours, rtol=1e-5, atol=1e-6)
    for a, b in (
        (peer.lm_head.weight.grad, policy.head_weight.grad),
        (peer.model.language_model.layers[0].mlp.up_proj.weight.grad, policy.model.layers[0].mlp.up_proj.weight.grad),
    ):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item())
    assert all(p.grad is None for p in peer.model.visual.parameters())


def test_the_tower_sees_every_image_three_times_for_each_completion(tiny, prompt, tiny_case):
    """In generate, in the reference and in the policy's forward, by each of the G copies."""
    peer, batch, seen = load_peer(tiny_case, tiny, Measurement()), Batch.of([prompt] * 4, "cpu"), []

    def count(_, args, kwargs):
        seen.append(len(args[0] if args else kwargs["hidden_states"]))

    peer.model.visual.register_forward_pre_hook(count, with_kwargs=True)
    with torch.no_grad():
        completions = generated(peer, batch, GenerationConfig(max_new_tokens=3))
        for _ in range(2):
            completion_logps(peer, batch, completions)
    assert seen == [4 * len(prompt.pixel_values)] * 3


def test_rewards_are_the_rule_and_the_stand_in(processor):
    """The share of even ids is in the accuracy, as on our side."""
    ids = processor.tokenizer.encode(TEXTS[1], add_special_tokens=False)
    accuracy, form = rewards_of(processor.tokenizer, torch.tensor([ids, ids[1:] + ids[:1]]), [0, 0, 500, 250])
    even = sum(i % 2 == 0 for i in ids) / len(ids)
    assert accuracy[0].item() == pytest.approx(0.5 + even) and form.tolist() == [1, 0]


def test_without_masters_the_weights_are_updated(tiny, monkeypatch, tiny_case):
    """The 7B's engine, on the tiny model in bf16: moments in bf16, and no copies."""
    monkeypatch.setattr(StepCase, "masters", property(lambda case: False))
    model = load_model(tiny / "model", dtype=torch.bfloat16)
    engine = engine_of(tiny_case)(model, GrpoOptions(learning_rate=1e-2), Ranks(), 4)
    weight = model.model.layers[0].mlp.up_proj.weight
    start = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    engine.step()
    assert not engine.rounded  # each parameter is its own master
    assert {x.dtype for x in engine.optimizer.state[weight].values() if x.ndim} == {torch.bfloat16}
    assert not torch.equal(weight, start)


def test_a_peer_that_is_missing_is_named(monkeypatch):
    """Not installed, or installed and broken; what needs nothing is never skipped."""
    monkeypatch.setattr(
        "boxgrpo.bench.peers.NEEDS", {"liger": ("no_such_module.inside", "liger-kernel"), "trl": ("json.broken", "trl")}
    )
    found = skipped(["liger", "trl", "univg_r1", "eager"])
    assert found.keys() == {"liger", "trl"} and found["liger"] == "liger-kernel is not installed"
    assert found["trl"].startswith("importing json.broken fails")


def test_without_merges_the_vocabulary_is_as_large(monkeypatch, tmp_path):
    """Published ids for the special tokens, and the prompt's words are tokens."""
    monkeypatch.setenv("BOXGRPO_SHARED", str(tmp_path))
    tokenizer, made_of = benchmark_tokenizer(None, TEXTS)
    assert len(tokenizer) == TOKENS and made_of.startswith("made here")
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(151_643, 151_657))
    assert (
        len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 4 and tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]
    )
    with pytest.raises(ValueError, match="there is no .*merges.txt; the real vocabulary needs"):
        benchmark_tokenizer(tmp_path / "merges.txt", TEXTS)
