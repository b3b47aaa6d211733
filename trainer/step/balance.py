"""Which rank trains which of a step's groups: as costly a share for each."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from boxgrpo.model.batch import Group
from boxgrpo.trainer.runtime.ranks import Ranks

WORTH_MOVING = 0.05  # of the ranks' mean work: a smaller difference costs less than the exchange


class Move(NamedTuple):
    """Item `index` of rank `source` is trained by rank `target`."""

    source: int
    index: int
    target: int


def plan_moves(costs: Sequence[Sequence[float]]) -> list[Move]:
    """Moves that balance the ranks' sums of `costs`, one list a rank; the same on every rank that has the same costs.

    Repeatedly the costliest rank gives the cheapest one the item that brings the two closest to each other.
    """
    owner = {(rank, i): rank for rank, items in enumerate(costs) for i in range(len(items))}
    load = [sum(items) for items in costs]
    least = WORTH_MOVING * sum(load) / len(load)
    while True:
        heavy, light = load.index(max(load)), load.index(min(load))
        gap = load[heavy] - load[light]
        # Afterwards the pair is |gap - 2 cost| apart.
        after = {(r, i): abs(gap - 2 * costs[r][i]) for (r, i), at in owner.items() if at == heavy}
        best = min(after, key=after.__getitem__, default=None)
        if best is None or gap - after[best] <= 2 * least:
            return [Move(rank, i, at) for (rank, i), at in owner.items() if at != rank]
        owner[best] = light
        load[heavy] -= costs[best[0]][best[1]]
        load[light] += costs[best[0]][best[1]]


def balance_across_ranks(groups: list[Group], cost: Callable[[Group], float], r: Ranks) -> list[Group]:
    """What this rank trains after an exchange: its groups without those it gave away, then those it received."""
    if r.world_size == 1:
        return groups
    moves = plan_moves(r.gather(list(map(cost, groups))))
    # From CPU to CPU: a tensor of cuda:0 would arrive on cuda:0, whatever the receiver's device.
    given = [r.hand_over(groups[m.index].to("cpu") if m.source == r.rank else None, m.source, m.target) for m in moves]
    gone = {m.index for m in moves if m.source == r.rank}
    kept = [group for i, group in enumerate(groups) if i not in gone]
    return kept + [group.to(r.device) for group, m in zip(given, moves, strict=True) if m.target == r.rank]
