"""Looking one step ahead changes when images are seen, not which samples and embeddings a step gets."""

import pytest
import torch

from boxgrpo.trainer.data.loader import Loader
from boxgrpo.trainer.data.readers import Example
from boxgrpo.trainer.step import prefetch as ahead
from boxgrpo.trainer.step.prefetch import PrefetchedBatches


@pytest.fixture
def seen(monkeypatch):
    """The prompts that the tower has seen, call by call; its embedding of a prompt is the prompt."""
    calls = []

    def embed(policy, prompts, *, sharded=False):
        calls.append(list(prompts))
        return list(prompts)

    monkeypatch.setattr(ahead, "embed_prompts", embed)
    return calls


def looking(policy, **options) -> PrefetchedBatches:
    examples = [f"example {i}" for i in range(5)]
    loader = Loader(examples, lambda e: (torch.tensor(int(e[-1])),), batch_size=2, seed=1, workers=0)
    return PrefetchedBatches(loader, policy, **options)


def test_the_same_samples_with_their_own_embeddings(twins, seen):
    plain = looking(twins("tiny")[0], frozen=True, early=False)
    early = looking(twins("tiny")[0], frozen=True, early=True)
    for step in range(1, 5):
        samples, others = plain.samples(), early.samples()
        assert [s.serial for s in samples] == [s.serial for s in others] == [2 * step - 2, 2 * step - 1]
        for images in (plain, early):
            assert images.embedded() == (samples, [s.item for s in samples])
            assert images.position == 2 * step and images.epoch == 2 * step / 5
    assert early.loader.position == 10, "it has looked at one step more than it gave out"


def test_the_next_images_are_seen_before_they_are_asked_for(twins, seen):
    images = looking(twins("tiny")[0], frozen=True, early=True)
    images.samples()
    images.embedded()
    assert len(seen) == 2
    ahead_of_time = seen[1]
    assert [s.item for s in images.samples()] == ahead_of_time
    assert len(seen) == 2 and images.embedded()[1] == ahead_of_time


def test_a_cpu_looks_at_no_image_early(twins, seen):
    images = looking(twins("tiny")[0], frozen=True)
    images.samples()
    assert seen == []
    images.embedded()
    assert len(seen) == 1 and images.next is None


def test_a_trained_tower_sees_its_images_in_every_pack(twins, seen):
    images = looking(twins("tiny")[0], frozen=False)
    images.samples()
    assert images.embedded()[1] is None and seen == []


def test_a_sample_whose_images_do_not_fit_is_left_out_and_named(twins, seen, monkeypatch, caplog):
    """The tower's embedding of them has no rows."""
    monkeypatch.setattr(ahead, "embed_prompts", lambda policy, prompts, sharded: [[], [1.0]])
    loader = Loader(
        [Example(name, "diff", (), "", None, source=name) for name in "ab"],
        lambda e: e,
        batch_size=2,
        seed=1,
        workers=0,
    )
    images = PrefetchedBatches(loader, twins("tiny")[0], frozen=True)
    large, small = images.samples()
    assert images.embedded() == ([small], [[1.0]])
    assert f"left out {large.example.source}: its images alone run out of memory" in caplog.text


@pytest.mark.gpu
def test_on_a_gpu_the_embeddings_of_a_stream_of_its_own_are_the_towers(twins, make_prompt):
    model = twins("tiny")[0].cuda()
    try:
        prompts = [make_prompt([(1, 4, 8), (1, 6, 4)], seed=i) for i in range(6)]
        loader = Loader(prompts, lambda p: p, batch_size=2, seed=1, workers=0)
        images = PrefetchedBatches(loader, model, frozen=True)
        for _ in range(3):
            images.samples()
            for sample, embeds in zip(*images.embedded(), strict=True):
                alone = model.embed_images(sample.item.pixel_values, sample.item.image_grid_thw)
                torch.testing.assert_close(embeds, alone, rtol=0, atol=1e-4)
    finally:
        model.cpu()
