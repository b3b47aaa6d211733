"""Sampling from a shared prefill: greedy equals transformers', sampled log-probabilities equal the trainer's."""

import copy
import itertools

import pytest
import torch

from boxgrpo.model.batch import Group
from boxgrpo.model.cache import DecodeCache
from boxgrpo.model.generate import generate
from boxgrpo.model.packing import pack_groups

IMAGE, VISION = (
    102,
    torch.tensor([102, 103, 104, 105]),
)  # ids of the fixtures' image pad, video pad, vision start and end
LENGTH = 12


@pytest.fixture
def model(twins):
    return twins("tiny")[0]


@pytest.fixture
def prompts(make_prompt):
    """No image, one, and three of different sizes, with questions of different lengths."""
    grids = [[], [(1, 4, 6)], [(1, 2, 4), (1, 6, 4), (1, 4, 2)]]
    return [make_prompt(g, words=5 + 3 * i, seed=10 + i) for i, g in enumerate(grids)]


def sample(model, prompts, serials=None, **options):
    options = {"eos_token_ids": (101,), "max_completion_length": LENGTH, "forbidden": VISION} | options
    return generate(model, prompts, prompt_ids=serials or range(len(prompts)), **options)


def transformers_greedy(theirs, prompt, eos):
    images = {}
    if len(prompt.image_grid_thw):
        images = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    ids = prompt.input_ids[None]
    out = theirs.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == IMAGE).int(),
        **images,
        max_new_tokens=LENGTH,
        do_sample=False,
        eos_token_id=list(eos),
        pad_token_id=100,
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["tiny", "published"])
def test_greedy_equals_transformers(twins, prompts, make_prompt, kind):
    """Prompts of 0 to 6 images decoded together against each by itself; some stop at an end token."""
    sizes = [(1, 4, 6), (1, 2, 4), (1, 6, 4), (1, 4, 2), (1, 2, 2), (1, 4, 4)]
    prompts = [*prompts, *(make_prompt(sizes[:n], words=6, seed=20 + n) for n in (2, 4, 5, 6))]
    ours, theirs = twins(kind)
    unending = [transformers_greedy(theirs, p, eos=(159,)) for p in prompts]
    eos = (unending[1][4], unending[2][7])  # so that at least two stop early
    expected = [transformers_greedy(theirs, p, eos) for p in prompts]
    assert len({len(tokens) for tokens in expected}) > 1, "the prompts should end at different lengths"
    rollout = sample(ours, prompts, eos_token_ids=eos, temperature=0, forbidden=None)
    assert [c.tolist() for c in rollout.completions()] == expected
    assert rollout.lengths.tolist() == [len(tokens) for tokens in expected]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_are_the_trainers(model, prompts, temperature):
    """What sampling reports is what a forward over the packed completions gives, token by token."""
    rollout = sample(model, prompts, num_generations=4, temperature=temperature)
    completions = rollout.completions()
    assert rollout.ids.dtype == torch.int64 and rollout.logps.dtype == torch.float32
    groups = [Group(p, completions[4 * i : 4 * i + 4], i) for i, p in enumerate(prompts)]
    pack = pack_groups(groups, image_token_id=IMAGE)
    with torch.no_grad():
        logits = model(pack) @ model.head_weight.T / temperature
    expected = logits.log_softmax(-1).gather(1, pack.targets[:, None])[:, 0]
    sampled = torch.cat([row[:n] for row, n in zip(rollout.logps, rollout.lengths.tolist(), strict=True)])
    torch.testing.assert_close(sampled, expected, rtol=0, atol=1e-5)


def test_a_sample_depends_on_its_serial_number_alone(model, prompts):
    """Not on the batch around it, nor on how many siblings it has; a new seed or serial number draws anew."""

    def completions(*args, **options):
        return [c.tolist() for c in sample(model, *args, **options).completions()]

    together = completions(prompts, [7, 3, 5], num_generations=4)
    assert completions(prompts[::-1], [5, 3, 7], num_generations=4) == together[8:] + together[4:8] + together[:4]
    for i, serial in enumerate([7, 3, 5]):
        assert completions(prompts[i : i + 1], [serial], num_generations=2) == together[4 * i : 4 * i + 2]
    assert len({tuple(c) for c in together[:4]}) > 1, "siblings differ"
    other_seed = completions(prompts, [7, 3, 5], num_generations=4, seed=1)
    other_serials = completions(prompts, [8, 4, 6], num_generations=4)
    assert all(a != b for other in (other_seed, other_serials) for a, b in zip(together, other, strict=True))


def test_forbidden_ids_never_come(model, prompts):
    """Half of the vocabulary is refused, each prompt's likeliest tokens with it."""
    favourites = sample(model, prompts, temperature=0).ids.unique()
    forbidden = torch.cat((favourites, torch.arange(0, 160, 2))).unique()
    for options in ({"temperature": 0}, {"num_generations": 8, "temperature": 2.0}):
        drawn = sample(model, prompts, forbidden=forbidden, **options).ids
        assert not torch.isin(drawn, forbidden).any()


def test_top_k_of_one_is_greedy(model, prompts):
    greedy = sample(model, prompts, temperature=0)
    assert torch.equal(sample(model, prompts, top_k=1).ids, greedy.ids)
    assert torch.equal(sample(model, prompts, top_p=1e-6).ids, greedy.ids)


def test_lengths_and_ends(model, prompts):
    """A completion ends with its first end token, or has none and the full length."""
    eos = set(range(40))  # a quarter of the vocabulary
    rollout = sample(model, prompts, num_generations=8, temperature=2.0, eos_token_ids=sorted(eos))
    completions = rollout.completions()
    assert len(completions) == 24
    for completion in completions:
        ends = [i for i, token in enumerate(completion.tolist()) if token in eos]
        assert ends == [len(completion) - 1] if ends else len(completion) == LENGTH
    assert any(len(c) < LENGTH for c in completions)
    first = int(completions[0][0])
    ended = sample(model, prompts[:1], temperature=2.0, eos_token_ids=(first,))
    assert ended.ids.tolist() == [[first]] and ended.lengths.tolist() == [1], "decoding stops when all have ended"


def test_embeddings_in_place_of_pixels(model, prompts):
    """With the frozen tower's output at hand the tower does not run."""
    expected = sample(model, prompts)
    embeds = [None if p.pixel_values is None else model.embed_images(p.pixel_values, p.image_grid_thw) for p in prompts]

    def refuse(*args):
        raise AssertionError("the tower ran")

    hook = model.visual.register_forward_pre_hook(refuse)
    model.freeze_vision()
    try:
        rollout = sample(model, prompts, image_embeds=embeds)
    finally:
        hook.remove()
        model.freeze_vision(False)
    assert torch.equal(rollout.ids, expected.ids)
    torch.testing.assert_close(rollout.logps, expected.logps, rtol=0, atol=1e-5)


def test_refused(model, prompts):
    with pytest.raises(ValueError, match="3 prompts and 2 prompt_ids"):
        sample(model, prompts, [1, 2])
    with pytest.raises(ValueError, match="0 prompts and 0 prompt_ids"):
        sample(model, [])


@pytest.fixture
def dropped(monkeypatch):
    """(completions kept, prompts, whether every prompt kept as many) of each time that rows were dropped."""
    sizes = []
    keep = DecodeCache.keep

    def watched(cache, kept):
        keep(cache, kept)
        sizes.append((len(kept), len(cache.prefix[0][0]), cache.slots is None))

    monkeypatch.setattr(DecodeCache, "keep", watched)
    return sizes


@pytest.mark.parametrize("static", [False, True])
def test_stragglers_do_not_carry_the_others(model, prompts, dropped, monkeypatch, static):
    """Rows leave in steps, prompts with them; what the others sample stays the same to the token."""
    monkeypatch.setattr("boxgrpo.model.generate.is_static", lambda device: static)
    options = {"num_generations": 6, "temperature": 1.5, "eos_token_ids": tuple(range(30)), "max_completion_length": 40}
    monkeypatch.setattr("boxgrpo.model.generate.DROP_AT", 0)
    whole = sample(model, prompts, **options)
    assert not dropped
    monkeypatch.setattr("boxgrpo.model.generate.DROP_AT", 0.75)
    found = sample(model, prompts, **options)
    rows = [n for n, *_ in dropped]
    assert len(rows) > 2 and all(b <= 0.75 * a for a, b in itertools.pairwise([18, *rows])), "each time fewer rows"
    assert dropped[-1][1] < 3 and {full for *_, full in dropped} == {True, False}
    assert torch.equal(found.lengths, whole.lengths)
    for a, b, length in zip(found.logps, whole.logps, found.lengths.tolist(), strict=True):
        torch.testing.assert_close(a[:length], b[:length], rtol=0, atol=1e-5)
    assert [c.tolist() for c in found.completions()] == [c.tolist() for c in whole.completions()]


def test_steps_that_are_all_alike_sample_the_same(model, prompts, monkeypatch):
    """The masked, full-width attention that a CUDA graph can record, beside the one that grows."""
    plain = sample(model, prompts, num_generations=4)
    monkeypatch.setattr("boxgrpo.model.generate.is_static", lambda device: True)
    static = sample(model, prompts, num_generations=4)
    assert torch.equal(static.ids, plain.ids) and torch.equal(static.lengths, plain.lengths)
    torch.testing.assert_close(static.logps, plain.logps, rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_a_recorded_step_samples_what_a_plain_one_does(model, prompts, monkeypatch):
    """The CUDA graph of a step, replayed, and recorded anew when rows have left."""
    model = copy.deepcopy(model).to("cuda")
    options = {"num_generations": 8, "temperature": 1.5, "eos_token_ids": tuple(range(8)), "max_completion_length": 80}
    options["forbidden"] = VISION.to("cuda")
    recorded = sample(model, prompts, **options)
    monkeypatch.setattr("boxgrpo.model.generate.is_static", lambda device: False)
    plain = sample(model, prompts, **options)
    assert [c.tolist() for c in recorded.completions()] == [c.tolist() for c in plain.completions()]
