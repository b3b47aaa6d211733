"""The next step's groups and image embeddings are prepared while this step decodes."""

import contextlib
import dataclasses
import itertools
import threading
import time
from functools import partial
from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch

from boxgrpo.trainer.data.loader import Loader
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.rollout.local import LocalRollout, PrefetchedBatches, embed_images
from boxgrpo.trainer.runtime.ranks import Ranks

PICTURED = [SimpleNamespace(input_ids=(), image_grid_thw=[name]) for name in "abcde"]  # prompts
OPTIONS = GrpoOptions(num_generations=3)


def batches_of(prompts, embed, *, early, pin_for=None, workers=0, start=0) -> PrefetchedBatches:
    """Batches of two groups, endlessly."""
    examples = [SimpleNamespace(prompt=prompt, source=f"data#{i}") for i, prompt in enumerate(prompts)]
    options = {"batch_size": 2, "seed": 1, "workers": workers, "pin_for": pin_for, "start": start}
    loader = Loader(examples, attrgetter("prompt"), **options)
    return PrefetchedBatches(loader, embed, early=early)


@pytest.fixture
def embedding():
    """A function for `PrefetchedBatches`, to which a prompt is its own embedding, and the serial numbers it gets."""
    calls = []

    def embed(groups):
        calls.append([g.serial for g in groups])
        return [dataclasses.replace(g, image_embeds=g.prompt) for g in groups]

    return embed, calls


@pytest.mark.parametrize("early", [True, False], ids=["early", "in time"])
def test_groups_have_their_own_embeddings_early_or_in_time(embedding, early):
    embed, calls = embedding
    batches = batches_of(PICTURED, embed, early=early)
    for step in range(1, 5):
        groups = batches.take(2)
        assert calls == [[2 * k, 2 * k + 1] for k in range(step if early else step - 1)]
        groups = batches.embed(groups)
        batches.embed_ahead()
        assert [g.serial for g in groups] == [2 * step - 2, 2 * step - 1]
        assert all(g.image_embeds is g.prompt for g in groups)
        assert batches.position == 2 * step
    assert batches.loader.position == 8 + 2 * early, "early, one step more was taken than given out"


@pytest.mark.parametrize("early", [True, False], ids=["early", "in time"])
def test_any_number_of_slots_is_taken(embedding, early):
    """A step of two slots, then refills of one and two, and so on: nothing is lost, doubled or embedded twice."""
    embed, calls = embedding
    batches = batches_of(PICTURED, embed, early=early)
    serials = []
    for slots in (2, 1, 2, 2, 1, 1, 2):
        groups = batches.embed(batches.take(slots))
        batches.embed_ahead()
        batches.embed_ahead()
        assert len(groups) == slots and all(g.image_embeds is g.prompt for g in groups)
        serials += [g.serial for g in groups]
        held = batches.loader.position - batches.position
        assert batches.position == len(serials) and held in ((2, 3) if early else (0, 1)), "early, a whole step is held"
    assert serials == [*range(11)]
    embedded = [*itertools.chain(*calls)]
    assert embedded[:11] == serials and len(embedded) == 11 + (held if early else 0)


@pytest.mark.parametrize("early", [True, False], ids=["early", "in time"])
def test_a_resumed_run_embeds_the_same_batches(embedding, early):
    """Stopped at slot 3: images that are embedded ahead are so two by two, from an even slot on, as without a stop."""
    embed, calls = embedding
    batches = batches_of(PICTURED, embed, early=early, start=3)
    groups = batches.embed(batches.take(1)) + batches.embed(batches.take(2))
    assert [g.serial for g in groups] == [3, 4, 5] and batches.position == 6
    assert calls == ([[2, 3], [4, 5]] if early else [[3], [4, 5]])


class FakeStream:
    """Notes in `events` which work is queued on which stream, by their priorities, and what a stream waits for."""

    events: list
    current: "FakeStream"

    def __init__(self, priority=0, name=""):
        self.name = name or f"priority {priority}"

    def wait_stream(self, other):
        self.events.append(f"{self.name} waits for {other.name}")

    def queue(self, work):
        self.events.append(f"{work} on {self.current.name}")


@pytest.fixture
def streams(monkeypatch):
    """torch.cuda's streams are fakes; returns the class, whose `events` are empty."""
    FakeStream.events, FakeStream.current = [], FakeStream(name="main")

    @contextlib.contextmanager
    def on(stream):
        before, FakeStream.current = FakeStream.current, stream
        yield
        FakeStream.current = before

    fakes = {"Stream": FakeStream, "stream": on, "current_stream": lambda: FakeStream.current}
    for name, fake in (fakes | {"is_available": lambda: True}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return FakeStream


def test_on_a_gpu_the_next_images_come_after_prefill_and_decoding_before_them(streams, vocabulary, monkeypatch):
    """The order of the streams' work, in two rounds; the tower is queued once."""

    def prefill(policy, groups, **options):
        streams.current.queue("prefill")
        return SimpleNamespace(run=lambda **o: streams.current.queue("decode") or [torch.ones(1)] * 3)

    monkeypatch.setattr("boxgrpo.trainer.rollout.local.prefill", prefill)
    batches = batches_of(PICTURED, lambda groups: streams.current.queue("tower") or groups, early=True)
    rollout = LocalRollout(
        dataclasses.replace(OPTIONS, gradient_accumulation_steps=2), vocabulary, Ranks(device="cuda")
    )
    groups = batches.embed(batches.take(2))
    del streams.events[:]
    rollout(None, groups, batches.embed_ahead)
    batches.embed_ahead()
    decode = ["priority -1 waits for main", "decode on priority -1", "main waits for priority -1"]
    tower = ["priority 0 waits for main", "tower on priority 0"]
    assert streams.events == ["prefill on main", *decode, "prefill on main", *tower, *decode]


@pytest.mark.parametrize("arrival", [None, 0, 2], ids=["after decoding", "with the first token", "with the third"])
def test_decoding_waits_for_no_images(streams, vocabulary, monkeypatch, arrival):
    """If the loader is late, the tower is queued when the groups are there: beside decoding, or for the next step."""
    arrived = threading.Event()

    def in_workers(loader, numbers):
        for slot in numbers:
            if slot > 1:
                arrived.wait(20)
            yield loader._slots.prepare(slot)

    def run(*, after_step, **options):
        for token in range(5):
            streams.current.queue(f"token {token}")
            if token == arrival:
                arrived.set()
                for _ in range(200):
                    time.sleep(0 if batches.loader.ready() else 0.01)
            after_step()
        return [torch.ones(1)] * 6

    monkeypatch.setattr("boxgrpo.trainer.rollout.local.prefill", lambda *_, **__: SimpleNamespace(run=run))
    monkeypatch.setattr(Loader, "_in_workers", in_workers)
    batches = batches_of(PICTURED, lambda groups: streams.current.queue("tower") or groups, early=True, workers=1)
    groups = batches.embed(batches.take(2))
    del streams.events[:]
    LocalRollout(OPTIONS, vocabulary, Ranks(device="cuda"))(None, groups, batches.embed_ahead)
    expected = [f"token {t} on priority -1" for t in range(5)]
    if arrival is not None:
        expected[arrival + 1 : arrival + 1] = ["priority 0 waits for priority -1", "tower on priority 0"]
    assert streams.events[1:-1] == expected and batches.position == 2
    arrived.set()
    assert [g.serial for g in batches.take(2)] == [2, 3] and batches.position == 4
    assert streams.events[-1] == ("tower on main" if arrival is None else "main waits for priority -1")


def test_a_trained_tower_runs_in_every_pack():
    batches = batches_of(PICTURED, None, early=True)
    assert [g.image_embeds for g in batches.embed(batches.take(2))] == [None, None]


@pytest.mark.gpu
def test_on_a_gpu_the_embeddings_of_a_stream_of_its_own_are_the_towers(twins, make_prompt):
    model = twins("tiny")[0].cuda()
    try:
        prompts = [make_prompt([(1, 4, 8), (1, 6, 4)], seed=i) for i in range(6)]
        batches = batches_of(prompts, partial(embed_images, model), early=True, pin_for=model.device)
        for _ in range(3):
            groups = batches.embed(batches.take(2))
            batches.embed_ahead()
            for group in groups:
                assert group.prompt.pixels.patches.is_pinned()
                alone = model.visual(group.prompt.pixels, group.prompt.image_grid_thw)
                torch.testing.assert_close(group.image_embeds, alone, rtol=0, atol=1e-4)
    finally:
        model.cpu()
