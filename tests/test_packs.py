"""From groups to packs: who trains what, and that nothing is lost, doubled or mixed up on the way."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from boxgrpo.model.packing import Group, Prompt
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.packs import even_out, make_packs, plan_moves, trained_groups
from boxgrpo.trainer.ranks import Ranks
from boxgrpo.trainer.rollout import Sampled


def prompt(length: int) -> Prompt:
    ids = torch.arange(length)
    return Prompt(ids, ids.expand(3, -1), None, torch.empty(0, 3, dtype=torch.int64))


def loads(costs, moves):
    """Each rank's work after the moves."""
    found = [sum(items) for items in costs]
    for move in moves:
        found[move.source] -= costs[move.source][move.index]
        found[move.target] += costs[move.source][move.index]
    return found


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
    after = loads(costs, moves)
    assert max(after) <= most < max(map(sum, costs)), after
    assert sum(after) == pytest.approx(sum(map(sum, costs)))


@pytest.mark.parametrize("costs", [[[4, 4], [4, 4]], [[10], [0.1]], [[], []], [[100, 1], [100]], [[7, 5], [9]]])
def test_nothing_moves_where_it_would_not_help(costs):
    """Even ranks, single groups, no groups, a difference not worth an exchange, or one that a move would turn round."""
    assert plan_moves(costs) == []


def test_one_rank_keeps_its_groups():
    groups = [Group(prompt(3), ()), Group(prompt(9), ())]
    assert even_out(groups, [1.0, 5.0], Ranks()) == groups


THREE_RANKS = """
import json, sys, torch
from boxgrpo.model.packing import Group, Prompt
from boxgrpo.trainer.packs import even_out
from boxgrpo.trainer.ranks import ranks

with ranks() as r:
    groups = []
    for i in range(6 if r.rank == 1 else 1):
        number = 10 * r.rank + i
        ids = torch.full((number + 1,), number)
        prompt = Prompt(ids, ids.expand(3, -1), None, torch.empty(0, 3, dtype=torch.int64))
        completions = [torch.tensor([number, g]) for g in range(2)]
        groups.append(
            Group(prompt, completions, i, torch.full((1, 4), float(number)), torch.tensor([1.0, -1.0]) * number,
                  torch.tensor(number / 7), [torch.full((2,), -float(number))] * 2))
    mine = even_out(groups, [1.0] * len(groups), r)
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
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "3"]
    done = subprocess.run([*torchrun, str(tmp_path / "script.py")], timeout=100, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert sorted(n for rank in found for n in rank) == [0, 10, 11, 12, 13, 14, 15, 20]
    assert sorted(map(len, found)) == [2, 3, 3]


def scored_groups(options, advantages, **more):
    samples = [SimpleNamespace(item=prompt(5)), SimpleNamespace(item=prompt(8))]
    completions = [[torch.tensor([1, 2, 3]), torch.tensor([4])], [torch.tensor([5, 6]), torch.tensor([7, 8])]]
    weights = torch.tensor([0.5, 2.0])
    return trained_groups(options, samples, Sampled(completions, **more), None, torch.tensor(advantages), weights)


def test_a_groups_parts_keep_what_is_theirs(twins):
    """A budget that holds no group whole: prompt by prompt, completion by completion, nothing changes place."""
    config = twins("tiny")[0].config
    logps = [[torch.tensor([-1.0, -2, -3]), torch.tensor([-4.0])], [torch.tensor([-5.0, -6]), torch.tensor([-7.0, -8])]]
    groups = scored_groups(GrpoOptions(), [[1.0, -1.0], [3.0, -3.0]], logps=logps)
    found = {}
    packs = make_packs(GrpoOptions(tokens_per_pass=10), config, groups, "cpu")
    for pack in packs:
        assert len(pack.input_ids) <= 10
        for i, (start, stop) in enumerate(zip(pack.completion_cu, pack.completion_cu[1:], strict=False)):
            ids = tuple(pack.targets[start:stop].tolist())
            found[ids] = (float(pack.advantages[i]), float(pack.weights[i]), pack.sampler_logps[start:stop].tolist())
    assert len(packs) == 3
    assert found == {
        (1, 2, 3): (1.0, 0.5, [-1, -2, -3]),
        (4,): (-1.0, 0.5, [-4]),
        (5, 6): (3.0, 2.0, [-5, -6]),
        (7, 8): (-3.0, 2.0, [-7, -8]),
    }


@pytest.mark.parametrize(
    ("changes", "kept"), [({"beta": 0.0}, [1]), ({"beta": 0.1}, [0, 1]), ({"beta": 0.0, "loss_type": "bnpo"}, [0, 1])]
)
def test_groups_without_gradient_are_left_out(changes, kept):
    groups = scored_groups(GrpoOptions(**changes), [[0.0, 0.0], [1.0, -1.0]])
    assert [g.group_id for g in groups] == kept
