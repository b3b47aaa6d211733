"""A step's completions do not depend on the rounds they are sampled in, and their scores are those done by hand."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

from boxgrpo.kernels import group_advantages
from boxgrpo.kernels.vocabulary import EOS, unpack_entries
from boxgrpo.model.batch import Group
from boxgrpo.model.generate import prefill
from boxgrpo.trainer.data.example import Example
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.rewards.grounding import score
from boxgrpo.trainer.rollout.base import sampler_factor
from boxgrpo.trainer.rollout.local import LocalRollout, ReplayRollout, embed_images
from boxgrpo.trainer.runtime.ranks import Ranks

OPTIONS = GrpoOptions(num_generations=3, max_completion_length=12, temperature=1.2)


def changed(**changes):
    return dataclasses.replace(OPTIONS, **changes)


@pytest.fixture
def sample(model, vocabulary):
    """sample(groups, **changes of the options): the groups with completions."""
    return lambda groups, **changes: LocalRollout(changed(**changes), vocabulary, Ranks())(model, groups)


def as_lists(groups):
    return [[c.tolist() for c in group.completions] for group in groups]


@pytest.mark.parametrize("rounds", [2, 4])
@pytest.mark.parametrize("embedded", [False, True], ids=["tower in every round", "tower once"])
def test_rounds_sample_what_one_round_does(model, groups, sample, rounds, embedded):
    given = embed_images(model, groups) if embedded else groups
    whole = as_lists(sample(given))
    assert as_lists(sample(given, gradient_accumulation_steps=rounds)) == whole
    assert [len({tuple(c) for c in group}) for group in whole] == [3, 3, 3, 3], "siblings differ"


def with_room_for(monkeypatch, prompts: int, never: int | None = None) -> list[int]:
    """Prefill fails above so many prompts, and always for serial number `never`; returns the sizes of its calls."""
    sizes = []

    def limited(policy, groups, **options):
        sizes.append(len(groups))
        if len(groups) > prompts or never in [g.serial for g in groups]:
            raise torch.OutOfMemoryError("no room")
        return prefill(policy, groups, **options)

    monkeypatch.setattr("boxgrpo.trainer.rollout.local.prefill", limited)
    return sizes


def test_where_memory_runs_out_there_are_more_rounds(model, groups, vocabulary, sample, monkeypatch, caplog):
    whole = as_lists(sample(groups))
    sizes = with_room_for(monkeypatch, prompts=2)
    rollout = LocalRollout(OPTIONS, vocabulary, Ranks())
    assert as_lists(rollout(model, groups)) == as_lists(rollout(model, groups)) == whole
    assert sizes == [4, 2, 2, 2, 2], "the number of rounds stays"
    assert "from now on in 2 rounds per step" in caplog.text


def test_a_group_that_never_fits_is_left_out_and_named(groups, sample, monkeypatch, caplog):
    whole = as_lists(sample(groups))
    with_room_for(monkeypatch, prompts=4, never=groups[2].serial)
    found = sample(groups)
    assert [g.serial for g in found] == [groups[i].serial for i in (0, 1, 3)]
    assert as_lists(found) == [whole[i] for i in (0, 1, 3)]
    assert f"left out {groups[2].source}: sampling it alone runs out of memory" in caplog.text


def test_a_rank_without_groups_has_rewards_and_advantages_of_none(vocabulary):
    rewards = score([], vocabulary.bytes, "cpu")
    assert rewards.accuracy.shape == (0,) and rewards.boxes.shape == (0, 4)
    advantages, weights, miou = group_advantages(rewards.accuracy.view(0, 3), rewards.format.view(0, 3))
    assert advantages.shape == (0, 3) and weights.shape == miou.shape == (0,)


@pytest.fixture
def with_patches(model, monkeypatch):
    """with_patches(n): from here on the tower takes at most n patches at once; returns the numbers that it is given."""

    def limit(most):
        tower, seen = model.visual.forward, []

        def limited(pixels, grids):
            seen.append(len(pixels.patches))
            if len(pixels.patches) > most:
                raise torch.OutOfMemoryError("no room")
            return tower(pixels, grids)

        monkeypatch.setattr(model.visual, "forward", limited)
        return seen

    return limit


def test_embeddings_are_each_prompts_own_in_as_many_passes_as_memory_needs(model, groups, with_patches):
    whole = embed_images(model, groups)
    seen = with_patches(max(len(g.prompt.pixel_values) for g in groups[1:]))
    for embedded in (whole, embed_images(model, groups)):
        assert embedded[0].image_embeds is None, "a prompt without images"
        for group in embedded[1:]:
            alone = model.visual(group.prompt.pixels, group.prompt.image_grid_thw)
            torch.testing.assert_close(group.image_embeds, alone, rtol=0, atol=1e-5)
    assert len(seen) > 3 + 6 and embed_images(model, groups[:1]) == groups[:1]


def test_a_group_whose_images_never_fit_is_left_out_and_named(model, groups, with_patches, caplog):
    with_patches(0)
    assert embed_images(model, groups[:2]) == groups[:1], "the prompt without images stays"
    assert f"left out {groups[1].source}: its images alone run out of memory" in caplog.text


def test_no_vision_token_and_no_row_beyond_the_tokenizer_is_ever_sampled(model, groups, sample, vocabulary, processor):
    tokenizer, rows = processor.tokenizer, model.config.text_config.vocab_size
    assert rows == len(tokenizer) + 8
    vision = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    expected = {*tokenizer.convert_tokens_to_ids(vision), *range(len(tokenizer), rows)}
    assert set(vocabulary.forbidden.tolist()) == expected
    found = sample(groups[:1], temperature=50.0, num_generations=100, max_completion_length=20)  # as good as uniform
    drawn = {t for group in as_lists(found) for c in group for t in c}
    assert len(drawn) > 0.8 * rows and not drawn & expected


def test_the_vocabulary_is_the_tokenizers_and_as_large_as_the_head(vocabulary, processor, model):
    """Completions end at the tokenizer's end tokens; generation_config is not read: it is not even there."""
    assert processor.tokenizer.convert_ids_to_tokens(list(vocabulary.eos_token_ids)) == ["<|im_end|>", "<|endoftext|>"]
    roles = unpack_entries(vocabulary.bytes.entries)[2]
    assert (roles == EOS).nonzero()[:, 0].tolist() == sorted(vocabulary.eos_token_ids)
    assert len(vocabulary.bytes.entries) == model.config.text_config.vocab_size


def test_a_restart_begins_its_own_file_anew_and_no_other(vocabulary, tmp_path):
    """--resume auto, killed before the first checkpoint: the run's options tell whose completions these are."""
    path = tmp_path / "stored.jsonl"
    path.write_text("another run's\n")
    options = changed(rollout_file=str(path), resume="auto", output_dir=str(tmp_path))
    for resume, named in (("auto", "other"), ("", path)):
        (tmp_path / "options.yaml").write_text(f"rollout_file: {named}\n")
        with pytest.raises(ValueError, match="is already there"):
            LocalRollout(dataclasses.replace(options, resume=resume), vocabulary, Ranks())
        assert path.read_text() == "another run's\n"
    LocalRollout(options, vocabulary, Ranks())
    assert path.read_text() == ""


def test_stored_completions_are_replayed_by_serial_number(model, groups, vocabulary, tmp_path):
    options = changed(rollout_file=str(tmp_path / "new/stored.jsonl"))
    sampled = LocalRollout(options, vocabulary, Ranks())(model, groups)
    stored = [json.loads(line) for line in (tmp_path / "new/stored.jsonl").read_text().splitlines()]
    assert [record["serial"] for record in stored] == [7, 3, 12, 5]
    assert [record["ids"] for record in stored] == as_lists(sampled)
    replayed = ReplayRollout(options)(None, groups[::-1])
    assert as_lists(replayed) == as_lists(sampled)[::-1]
    assert replayed[0].sampler_logps is None


def test_case_17_completions_of_another_data_file_are_refused(model, groups, vocabulary, tmp_path):
    """A question or an image of the same size is another."""
    options = changed(rollout_file=str(tmp_path / "stored.jsonl"))
    LocalRollout(options, vocabulary, Ranks())(model, groups)
    (pictured, *_) = (g for g in groups if g.prompt.pixels is not None)
    prompt, pixels = pictured.prompt, pictured.prompt.pixels
    other_image = dataclasses.replace(prompt, pixels=dataclasses.replace(pixels, patches=pixels.patches ^ 1))
    for changes in (other_image, dataclasses.replace(prompt, input_ids=prompt.input_ids.flip(0))):
        with pytest.raises(ValueError, match=f"sample {pictured.serial} belong to another prompt .* --data, --seed"):
            ReplayRollout(options)(None, [dataclasses.replace(pictured, prompt=changes)])


def test_every_rank_stores_its_own(model, groups, vocabulary, tmp_path):
    options = changed(rollout_file=str(tmp_path / "stored.jsonl"))
    for rank in (0, 1):
        LocalRollout(options, vocabulary, Ranks(rank, 2))(model, groups[rank : rank + 1])
    first, second = tmp_path / "stored.jsonl", tmp_path / "stored.jsonl.rank1"
    assert [json.loads(p.read_text())["serial"] for p in (first, second)] == [7, 3]
    assert ReplayRollout(options).stored.keys() == {7, 3}  # a replay reads them all
    first.unlink()
    with pytest.raises(ValueError, match="rank1 belongs to a run with more ranks"):
        LocalRollout(options, vocabulary, Ranks())


def test_case_17_a_replay_of_a_file_that_is_cut_off_is_refused(groups, tmp_path, caplog):
    """A file that is cut off in its last line is named, and one from before prompts were stored."""
    path = tmp_path / "stored.jsonl"
    whole = '{"serial": 7, "ids": [[1], [2], [3]]}\n'
    for text, number in ((whole + whole[:-1], 2), (whole + whole[:9] + "\n", 2), ("[]\n", 1), ('{"serial": 7}\n', 1)):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"rollout_file .*stored\.jsonl: line {number} is cut off, or holds no"):
            ReplayRollout(changed(rollout_file=str(path)))
    path.write_text(whole)
    replay = ReplayRollout(changed(rollout_file=str(path)))
    assert "it is not checked that its completions belong to this data" in caplog.text
    with pytest.raises(ValueError, match="line 1 holds 3 completions; num_generations is 2. Set --num_generations"):
        ReplayRollout(changed(rollout_file=str(path), num_generations=2))
    with pytest.raises(ValueError, match="line 1 holds a completion of 1 tokens; max_completion_length is 0. Set"):
        ReplayRollout(changed(rollout_file=str(path), max_completion_length=0))
    other = [dataclasses.replace(groups[0], serial=8)]
    with pytest.raises(ValueError, match="no completions for sample 8, which dynamic sampling takes. Lower --max_st"):
        replay(None, other)
    loader = SimpleNamespace(position=7, batch_size=1, peek_step=lambda: groups[:1])
    replay.check(loader, Ranks(), steps=1)
    replay.check(SimpleNamespace(position=8, batch_size=1), Ranks(), steps=0)  # a finished run, resumed
    with pytest.raises(ValueError, match="no completions for sample 8, of the run's step 2 of 3. Lower --max_steps"):
        replay.check(loader, Ranks(), steps=3)


def test_the_correction_by_hand():
    """Twice as likely to the policy, half as likely, three times and so capped, and not given by the sampler."""
    sampler = torch.tensor([0.25, 0.5, 0.2, math.nan]).log()
    pack = SimpleNamespace(old_logps=torch.tensor([0.5, 0.25, 0.6, 0.1]).log(), sampler_logps=sampler)
    torch.testing.assert_close(sampler_factor(pack, cap=2.5), torch.tensor([2.0, 0.5, 2.5, 1.0]))


def test_scores_by_hand(processor, vocabulary):
    """Two prompts with two completions each, prompt after prompt, every one against its own prompt's gold box."""

    def answered(gold, answer_format, *texts):
        example = Example("0", "diff", (), "Where?", gold, answer_format=answer_format)
        return Group(None, [torch.tensor(processor.tokenizer.encode(text)) for text in texts], record=example)

    groups = [
        answered(
            (0.0, 0.0, 500.0, 500.0),
            "think",
            "<think>Here.</think><answer>(250, 0), (750, 500)</answer><|im_end|>",
            "<think>(0, 0), (500, 500)</think><|im_end|><answer>(0, 0), (500, 500)</answer>",
        ),
        answered(
            (100.0, 100.0, 300.0, 300.0),
            "box",
            "It is at (100, 100), (300, 200), not at (100, 100), (300, 300)",
            "<think>Here.</think><answer>(300, 300), (100, 100)</answer><|endoftext|>",
        ),
    ]
    rewards = score(groups, vocabulary.bytes, "cpu")
    # A third in common; nothing before the end token; half of the gold, the first box counts; inverted.
    torch.testing.assert_close(rewards.accuracy, torch.tensor([1 / 3, 0, 1 / 2, 0]), rtol=0, atol=1e-6)
    assert rewards.format.tolist() == [1, 0, 1, 1]
    assert rewards.found.tolist() == [True, False, True, True]
    assert rewards.boxes[0].tolist() == [250, 0, 750, 500] and rewards.boxes[2].tolist() == [100, 100, 300, 200]
