"""From groups to packs: who trains what, and that nothing is lost, doubled or mixed up on the way."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from boxgrpo.model.batch import Group, Prompt
from boxgrpo.trainer.engine.base import PeerOutOfMemory
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.rewards.grounding import StepRewards
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.step.pack import Budget, make_packs, plan_moves, run_packs_that_fit, trained_groups
from runs import finish, start_forked


def prompt(length: int) -> Prompt:
    ids = torch.arange(length)
    return Prompt(ids, ids.expand(3, -1), None, torch.empty(0, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("costs", "most"),
    [
        ([[5, 5, 5, 5], [1, 1, 1, 1]], 13),  # two of the four go over: 10 and 14; one comes back for balance
        ([[9, 1], []], 9),  # one group cannot be cut
        ([[8, 4, 4], [8], [0.5]], 9),
        ([[1, 2], [3, 4], [5, 6], [7, 8]], 11),
    ],
)
def test_moves_even_out_the_ranks(costs, most):
    moves = plan_moves(costs)
    assert len({(m.source, m.index) for m in moves}) == len(moves), "each group moves once"
    assert all(m.source != m.target for m in moves)
    after = list(map(sum, costs))
    for move in moves:
        after[move.source] -= costs[move.source][move.index]
        after[move.target] += costs[move.source][move.index]
    assert max(after) <= most < max(map(sum, costs)), after
    assert sum(after) == pytest.approx(sum(map(sum, costs)))


@pytest.mark.parametrize("costs", [[[4, 4], [4, 4]], [[10], [0.1]], [[], []], [[100, 1], [100]], [[7, 5], [9]]])
def test_nothing_moves_where_it_would_not_help(costs):
    """Even ranks, single groups, no groups, a difference not worth an exchange, or one that a move would turn round."""
    assert plan_moves(costs) == []


THREE_RANKS = """
import json, sys, torch
from boxgrpo.model.batch import Group, Prompt
from boxgrpo.trainer.step.pack import balance_across_ranks
from boxgrpo.trainer.runtime.ranks import join_ranks

with join_ranks() as r:
    groups = []
    for i in range(6 if r.rank == 1 else 1):
        number = 10 * r.rank + i
        ids = torch.full((number + 1,), number)
        prompt = Prompt(ids, ids.expand(3, -1), None, torch.empty(0, 3, dtype=torch.int64))
        completions = [torch.tensor([number, g]) for g in range(2)]
        groups.append(
            Group(prompt, completions, torch.full((1, 4), float(number)), torch.tensor([1.0, -1.0]) * number,
                  torch.tensor(number / 7), [torch.full((2,), -float(number))] * 2))
    mine = balance_across_ranks(groups, lambda group: 1.0, r)
    for g in mine:
        number = int(g.prompt.input_ids[0])
        assert len(g.prompt.input_ids) == number + 1
        assert [c.tolist() for c in g.completions] == [[number, 0], [number, 1]]
        assert g.image_embeds.tolist() == [[number] * 4] and g.advantages.tolist() == [number, -number]
        assert g.weight == torch.tensor(number / 7) and g.sampler_logps[1].tolist() == [-number] * 2
    everyone = r.gather([int(g.prompt.input_ids[0]) for g in mine])
    if r.is_main:
        print(json.dumps(everyone))
"""


def test_groups_arrive_whole(tmp_path):
    """Rank 1 has six groups, the others one each: afterwards three each, with every tensor that belongs to them."""
    (tmp_path / "script.py").write_text(THREE_RANKS)
    shown = finish(start_forked(tmp_path / "script.py", SimpleNamespace(), ranks=3))
    found = json.loads(shown.strip().splitlines()[-1])
    assert sorted(n for rank in found for n in rank) == [0, 10, 11, 12, 13, 14, 15, 20]
    assert sorted(map(len, found)) == [2, 3, 3]


LOGPS = [[torch.tensor([-1.0, -2, -3]), torch.tensor([-4.0])], [torch.tensor([-5.0, -6]), torch.tensor([-7.0, -8])]]


def scored_groups(advantages=((1.0, -1.0), (3.0, -3.0)), **options):
    """Those of two groups that are trained: 4 tokens behind a prompt of 5, and 4 behind one of 8."""
    completions = [[torch.tensor([1, 2, 3]), torch.tensor([4])], [torch.tensor([5, 6]), torch.tensor([7, 8])]]
    groups = [
        Group(prompt(n), completions[i], serial=i, sampler_logps=LOGPS[i], record=SimpleNamespace(source=f"{n} tokens"))
        for i, n in enumerate((5, 8))
    ]
    rewards = StepRewards(None, None, None, torch.tensor(advantages), torch.tensor([0.5, 2.0]), None)
    return trained_groups(GrpoOptions(**options), groups, rewards)


@pytest.mark.parametrize(
    ("options", "kept"), [({"beta": 0.0}, [1]), ({"beta": 0.1}, [0, 1]), ({"beta": 0.0, "loss_type": "bnpo"}, [0, 1])]
)
def test_groups_without_gradient_are_left_out(options, kept):
    assert [g.serial for g in scored_groups([[0.0, 0.0], [1.0, -1.0]], **options)] == kept


class Room:
    """Stands for engine and memory: `run` fails for packs above `tokens`, having added to the gradients by then."""

    lockstep, min_packs, check_memory = False, 0, None
    ranks = Ranks()

    def __init__(self, tokens: int):
        self.tokens, self.gradients, self.tries, self.budget = tokens, [], 0, Budget(100)

    def restart_step(self, error) -> None:
        assert error.__traceback__ is None, "it would hold on to the activations"
        self.gradients.clear()

    def run(self, packs):
        self.tries += 1
        for pack in packs:
            self.gradients += pack.targets.tolist()
            if len(pack.input_ids) > self.tokens:
                raise torch.OutOfMemoryError("no room")
        return len(packs)

    def make(self, groups, tokens):
        return make_packs(self, lambda group: 1.0, 0, groups, tokens)

    def train(self, groups, run=None):
        return run_packs_that_fit(groups, self.budget, self, self.make, run or self.run)


def test_a_groups_parts_keep_what_is_theirs():
    """A budget that holds no group whole: prompt by prompt, completion by completion, nothing changes place."""
    found = {}
    packs = Room(0).make(scored_groups(), 10)
    for pack in packs:
        assert len(pack.input_ids) <= 10
        for i, (first, last) in enumerate(itertools.pairwise(pack.completion_cu)):
            ids = tuple(pack.targets[first:last].tolist())
            found[ids] = (float(pack.advantages[i]), float(pack.weights[i]), pack.sampler_logps[first:last].tolist())
    assert len(packs) == 3
    assert found == {
        (1, 2, 3): (1.0, 0.5, [-1, -2, -3]),
        (4,): (-1.0, 0.5, [-4]),
        (5, 6): (3.0, 2.0, [-5, -6]),
        (7, 8): (-3.0, 2.0, [-7, -8]),
    }


def test_packs_shrink_until_they_fit(caplog):
    """21 tokens in one pack do not, at most 10 in each of three do; what the first try added is discarded."""
    room = Room(tokens=10)
    assert room.train(scored_groups()) == 3 and sorted(room.gradients) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert room.tries == 2 and "memory ran out in a pack of 21 tokens (no room); again with 10" in caplog.text
    assert room.train(scored_groups()) == 3 and room.tries == 3, "the smaller size stays"


@pytest.mark.parametrize(("tokens", "trained"), [(8, [1, 2, 3, 4]), (3, [])])
def test_a_group_that_never_fits_is_left_out_and_named(caplog, tokens, trained):
    """The one of 8 tokens and 2; then both, and no pack is left."""
    room = Room(tokens)
    room.train(scored_groups())
    assert sorted(room.gradients) == trained
    assert "left out 8 tokens: one of its completions alone runs out of memory" in caplog.text


def test_where_nothing_is_left_to_make_smaller_the_run_ends():
    """An empty pack, in step with other ranks' full ones."""
    room = Room(tokens=-1)
    room.min_packs = 1
    with pytest.raises(ValueError, match="memory ran out .no room. with 0 groups and 1 packs.*--prompts_per_step"):
        room.train([])


def test_a_rank_starts_over_with_another_in_packs_of_the_same_size(caplog):
    """Memory lasted here."""
    room, packed = Room(tokens=100), []

    def run(packs):
        packed.append([len(p.input_ids) for p in packs])
        if len(packed) == 1:
            raise PeerOutOfMemory("on another rank")
        return room.run(packs)

    assert room.train(scored_groups(), run) == 1
    assert packed == [[21], [21]] and caplog.text == ""
