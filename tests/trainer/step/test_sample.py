"""Dynamic sampling: which slots a step takes and which groups it trains, on any number of ranks."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from boxgrpo.kernels import group_advantages
from boxgrpo.model.batch import Group
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.rewards.grounding import step_rewards
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.step.sample import count_slots, sample_with_signal


@pytest.mark.parametrize(
    ("wanted", "found", "sampled", "slots"),
    [
        (16, 0, 0, 16),  # the first round
        (16, 12, 16, 6),  # 4 more at 3/4
        (16, 15, 16, 2),  # 1 more at 15/16
        (16, 15, 64, 4),  # 1 more at less than a quarter, which counts as one
        (16, 14, 56, 8),  # at a quarter
        (16, 0, 16, 16),  # never more than a step
        (8, 6, 9, 3),  # 2 more at 2/3: no fourth by rounding
        (10, 7, 7, 3),  # three groups were left out for memory
    ],
)
def test_a_round_takes_as_many_slots_as_hold_the_missing_groups(wanted, found, sampled, slots):
    assert count_slots(wanted, found, sampled) == slots


def reward(slot):
    return torch.tensor([0.0, 0.5 + slot / 100])


class Threads:
    """Ranks that are threads of this process."""

    def __init__(self, world_size):
        self.values, self.barrier = [None] * world_size, threading.Barrier(world_size, timeout=20)

    def run(self, work):
        """What `work(ranks)` returns on each."""
        world_size = len(self.values)
        with ThreadPoolExecutor(world_size) as pool:
            return [*pool.map(work, [self.rank(i, world_size) for i in range(world_size)])]

    def rank(self, number, world_size):
        def gather(value):
            self.values[number] = value
            self.barrier.wait()
            found = [*self.values]
            self.barrier.wait()
            return found

        ranks = Ranks(number, world_size)
        ranks.gather = gather
        return ranks


def sample_step(r, signal, taken, **changes):
    """A step of 4 prompts; the slots in `signal` have one. `taken` gets the slots of each round."""
    o = GrpoOptions(prompts_per_step=4, num_generations=2, max_refills=2, dynamic_sampling=True, **changes)
    position = 0

    def sample(slots):
        nonlocal position
        position += slots
        taken.append(slots)
        mine = [k for k in range(position - slots, position) if k % r.world_size == r.rank]
        groups = [Group(None, (), serial=k) for k in mine]
        rewards = [reward(k) if k in signal else torch.ones(2) for k in mine]
        accuracy = torch.cat([torch.empty(0), *rewards])
        return groups, step_rewards(o, SimpleNamespace(accuracy=accuracy, format=0 * accuracy), r)

    return sample_with_signal(o, sample, r)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_first_groups_with_a_signal_are_trained(world_size):
    """By hand: 1 of slots 0 to 3; 3 of 8, so that one is missing at 3/8: three more, of which slot 10 is too many."""
    signal, taken = {1, 6, 7, 9, 10, 11}, []
    found = Threads(world_size).run(lambda r: sample_step(r, signal, taken, scale_rewards="batch"))
    assert sorted(taken) == sorted([4, 4, 3] * world_size)
    everyone, trained, metrics = zip(*found)
    slots = [[g.serial for g in groups] for groups, _ in everyone]
    assert sorted(itertools.chain(*slots)) == [*range(11)] and slots == [sorted(mine) for mine in slots]
    kept = {g.serial: row for groups, rewards in trained for g, row in zip(groups, rewards.advantages, strict=True)}
    assert sorted(kept) == [1, 6, 7, 9]
    # Batch-scaled by the groups that are trained, and by no other.
    rewards = torch.stack([reward(k) for k in (1, 6, 7, 9)])
    advantages, _, _ = group_advantages(rewards, rewards, difficulty="none", scale="batch")
    torch.testing.assert_close(torch.stack([kept[k] for k in (1, 6, 7, 9)]), advantages)
    for (groups, rewards), of_rank in zip(everyone, metrics, strict=True):
        assert len(rewards.total) == len(rewards.miou) == len(groups)
        expected = {"refills": 2, "sampled_groups": 11, "trained_groups": 4}
        assert of_rank == {f"dynamic_sampling/{name}": value for name, value in expected.items()}


@pytest.mark.parametrize("world_size", [1, 3])
def test_without_any_signal_the_rounds_end(world_size):
    taken = []
    for (groups, _), (trained, rewards), metrics in Threads(world_size).run(lambda r: sample_step(r, {}, taken)):
        assert trained == [] and rewards.total.shape == (0, 2) and len(groups) == 12 // world_size
        assert [*metrics.values()] == [2, 12, 0]
    assert taken == [4] * 3 * world_size
