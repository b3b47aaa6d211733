"""CUDA graphs of decoding steps: their pool, their stream and their failures, with a stand-in for torch's graphs."""

import contextlib
import copy
import functools
import weakref
from types import SimpleNamespace

import pytest
import torch

from boxgrpo.model import generate
from sampling import VISION, sample


class FakeGraph:
    """torch's CUDA graph for `next_token` on a CPU: what is recorded does not run, and a replay runs it.

    As torch, it refuses a pool that no graph has any longer.
    """

    alive: weakref.WeakSet
    recorded: list  # (pool, stream) of each recording of a step
    errors: list  # of the recordings to come, None: it succeeds
    replays: int
    stream = open = step = None

    def capture_begin(self, pool=None, *, capture_error_mode):
        assert capture_error_mode == "thread_local" and FakeGraph.stream is not None is FakeGraph.open
        assert pool is None or pool in [graph.held for graph in FakeGraph.alive]
        self.held = pool or object()
        FakeGraph.open = self
        FakeGraph.alive.add(self)

    def record(self, step):
        FakeGraph.recorded.append((self.held, FakeGraph.stream))
        if error := FakeGraph.errors and FakeGraph.errors.pop(0):
            raise error
        self.step, self.rows = step, step.args[0].rows

    def capture_end(self):
        FakeGraph.open = None

    def pool(self):
        return self.held

    def replay(self):
        assert self.step.args[0].rows is self.rows
        FakeGraph.replays += 1
        self.step()


@pytest.fixture
def sample_recorded(model, groups, monkeypatch):
    """sample_recorded(*errors of its recordings): the completions, on a CPU, with rows that are dropped many times."""
    FakeGraph.alive, FakeGraph.recorded, FakeGraph.errors, FakeGraph.replays = weakref.WeakSet(), [], [], 0
    step = generate.Decoding.next_token

    def next_token(self, **options):
        bound = functools.partial(step, self, **options)
        FakeGraph.open.record(bound) if FakeGraph.open else bound()

    @contextlib.contextmanager
    def on(stream):
        FakeGraph.stream = stream
        yield
        FakeGraph.stream = None

    def sample_with(*errors):
        FakeGraph.errors = [*errors]
        options = {"num_generations": 6, "temperature": 1.5, "eos_token_ids": [*range(9)]}
        return sample(model, groups, max_completion_length=40, **options)[0]

    fakes = {"CUDAGraph": FakeGraph, "Stream": SimpleNamespace, "stream": on}
    fakes["current_stream"] = lambda: SimpleNamespace(priority=-1)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(generate.Decoding, "next_token", next_token)
    monkeypatch.setattr(generate, "STATIC_DEVICES", ("cpu",))
    yield sample_with
    generate._recorder.cache_clear()


@pytest.fixture
def plain(sample_recorded, monkeypatch):
    """The completions by steps that are not recorded."""
    with monkeypatch.context() as patch:
        patch.setattr(generate.Decoding, "_record", lambda *_, **__: None)
        return sample_recorded()


def test_all_recordings_share_a_pool_and_a_stream(sample_recorded, plain):
    """Of one rollout and of the next one; the stream has the priority of the one that replays."""
    assert not FakeGraph.recorded
    assert sample_recorded() == plain
    recordings, replays = len(FakeGraph.recorded), FakeGraph.replays
    assert recordings > 1 and replays > 10
    assert sample_recorded() == plain
    assert (len(FakeGraph.recorded), FakeGraph.replays) == (2 * recordings, 2 * replays)
    pool, stream = FakeGraph.recorded[0]
    assert all(p is pool and s is stream for p, s in FakeGraph.recorded) and stream.priority == -1


def test_without_memory_for_a_graph_rows_are_decoded_without_it(sample_recorded, plain, caplog):
    """Until rows are dropped, when it is tried again, in a new pool; a rollout has one warning."""
    lacking = torch.OutOfMemoryError("no room")
    assert sample_recorded(lacking, lacking, *[None] * 9) == plain
    first, second, third = (pool for pool, _ in FakeGraph.recorded[:3])
    assert len({first, second, third}) == 3 and FakeGraph.replays
    assert [r.levelname for r in caplog.records if "memory ran out while a decoding step" in r.message] == ["WARNING"]


def test_another_error_of_a_recording_ends_the_rollout(sample_recorded, plain):
    with pytest.raises(RuntimeError, match="a bug"):
        sample_recorded(RuntimeError("a bug"))
    assert FakeGraph.open is None, "the capture has ended"
    assert sample_recorded() == plain


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_step_samples_as_a_plain_one(model, groups, monkeypatch, dtype):
    """The CUDA graph of a step, replayed, and recorded anew when rows have left."""
    model = copy.deepcopy(model).to("cuda", dtype)
    model.model.join_storage()
    options = {"num_generations": 8, "temperature": 1.5, "eos_token_ids": tuple(range(8)), "max_completion_length": 80}
    options["forbidden"] = VISION.to("cuda")
    recorded, _ = sample(model, groups, **options)
    assert recorded == sample(model, groups, **options)[0], "from the same pool"
    monkeypatch.setattr(generate.Decoding, "_record", lambda *_, **__: None)
    assert recorded == sample(model, groups, **options)[0]
