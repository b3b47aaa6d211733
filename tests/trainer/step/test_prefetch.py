"""Computing embeddings one step ahead changes when the tower runs, not which groups and embeddings a step gets."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from boxgrpo.trainer.data.loader import Loader
from boxgrpo.trainer.step import prefetch
from boxgrpo.trainer.step.prefetch import PrefetchedBatches


@pytest.fixture
def embedded(monkeypatch):
    """The serial numbers that the tower was given, call by call; its embedding of a prompt is the prompt."""
    calls = []

    def embed(policy, groups, *, sharded=False):
        calls.append([g.serial for g in groups])
        return [replace(g, image_embeds=g.prompt) for g in groups]

    monkeypatch.setattr(prefetch, "embed_images", embed)
    return calls


def batches_of(policy, **options) -> PrefetchedBatches:
    examples = [SimpleNamespace(number=i, source=f"data#{i}") for i in range(5)]
    loader = Loader(examples, lambda e: torch.tensor(e.number), batch_size=2, seed=1, workers=0)
    return PrefetchedBatches(loader, policy, **options)


def test_the_same_groups_with_their_own_embeddings(twins, embedded):
    plain = batches_of(twins("tiny")[0], frozen=True, early=False)
    early = batches_of(twins("tiny")[0], frozen=True, early=True)
    for step in range(1, 5):
        for batches in (plain, early):
            groups = batches.embed(batches.next())
            assert [g.serial for g in groups] == [2 * step - 2, 2 * step - 1]
            assert all(g.image_embeds is g.prompt for g in groups)
            assert batches.position == 2 * step
    assert early.loader.position == 10, "one step more was taken than given out"


def test_the_next_images_are_computed_before_they_are_needed(twins, embedded):
    batches = batches_of(twins("tiny")[0], frozen=True, early=True)
    batches.embed(batches.next())
    assert embedded == [[0, 1], [2, 3]]
    batches.next()
    assert len(embedded) == 2


def test_a_cpu_computes_no_image_early(twins, embedded):
    batches = batches_of(twins("tiny")[0], frozen=True)
    groups = batches.next()
    assert embedded == []
    batches.embed(groups)
    assert embedded == [[0, 1]] and batches.loader.position == 2


def test_a_trained_tower_runs_in_every_pack(twins, embedded):
    batches = batches_of(twins("tiny")[0], frozen=False)
    assert [g.image_embeds for g in batches.embed(batches.next())] == [None, None] and embedded == []


@pytest.mark.gpu
def test_on_a_gpu_the_embeddings_of_a_stream_of_its_own_are_the_towers(twins, make_prompt):
    model = twins("tiny")[0].cuda()
    try:
        grids = [(1, 4, 8), (1, 6, 4)]
        examples = [SimpleNamespace(prompt=make_prompt(grids, seed=i), source=f"data#{i}") for i in range(6)]
        loader = Loader(examples, lambda e: e.prompt, batch_size=2, seed=1, workers=0)
        batches = PrefetchedBatches(loader, model, frozen=True)
        for _ in range(3):
            for group in batches.embed(batches.next()):
                alone = model.visual(group.prompt.pixel_values, group.prompt.image_grid_thw)
                torch.testing.assert_close(group.image_embeds, alone, rtol=0, atol=1e-4)
    finally:
        model.cpu()
