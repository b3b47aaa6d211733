"""Makes a step's packs: selects groups with a gradient, balances them across ranks, packs them, and runs the packs."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch

from boxgrpo.model.batch import Group, PackedBatch, pack_groups, plan_packs
from boxgrpo.trainer.engine.base import Engine, PeerOutOfMemory
from boxgrpo.trainer.rewards.grounding import StepRewards
from boxgrpo.trainer.runtime.ranks import Ranks, RunFailed

log = logging.getLogger(__name__)
T = TypeVar("T")
MIN_GAIN = 0.05  # share of the ranks' mean work; a smaller gain is not worth the exchange


def trained_groups(o, groups: Sequence[Group], rewards: StepRewards) -> list[Group]:
    """The groups that have a gradient, with their advantages (G each) and weights.

    Without KL a group of equal rewards has none, and is left out, except with bnpo, whose mean counts its tokens.
    """
    advantages, weights = rewards.advantages, rewards.weights
    every = bool(o.beta) or o.loss_type == "bnpo"
    has_gradient = [True] * len(groups) if every else (advantages != 0).any(1).tolist()
    filled = [replace(g, advantages=advantages[i], weight=weights[i]) for i, g in enumerate(groups) if has_gradient[i]]
    # The image embeddings replace the pixels.
    return [replace(g, prompt=replace(g.prompt, pixels=None)) if o.freeze_vision else g for g in filled]


class Move(NamedTuple):
    """Item `index` of rank `source` is trained by rank `target`."""

    source: int
    index: int
    target: int


def plan_moves(costs: Sequence[Sequence[float]]) -> list[Move]:
    """Moves that balance the ranks' sums of `costs`, one list per rank; deterministic, so all ranks plan the same.

    Repeatedly, the item of the costliest rank that brings it closest to the cheapest rank is moved there.
    """
    owner = {(rank, i): rank for rank, items in enumerate(costs) for i in range(len(items))}
    load = [sum(items) for items in costs]
    threshold = MIN_GAIN * sum(load) / len(load)
    while True:
        heavy, light = load.index(max(load)), load.index(min(load))
        gap = load[heavy] - load[light]
        # Afterwards the pair is |gap - 2 cost| apart.
        after = {(r, i): abs(gap - 2 * costs[r][i]) for (r, i), rank in owner.items() if rank == heavy}
        best = min(after, key=after.__getitem__, default=None)
        if best is None or gap - after[best] <= 2 * threshold:
            return [Move(source, i, rank) for (source, i), rank in owner.items() if rank != source]
        owner[best] = light
        load[heavy] -= costs[best[0]][best[1]]
        load[light] += costs[best[0]][best[1]]


def balance_across_ranks(groups: list[Group], cost: Callable[[Group], float], r: Ranks) -> list[Group]:
    """Exchange groups to balance the ranks' costs; returns the groups that this rank keeps, then those it receives."""
    if r.world_size == 1:
        return groups
    moves = plan_moves(r.gather(list(map(cost, groups))))
    # From CPU to CPU: a tensor of cuda:0 would arrive on cuda:0, whatever the receiver's device.
    given = [r.transfer(groups[m.index].to("cpu") if m.source == r.rank else None, m.source, m.target) for m in moves]
    gone = {m.index for m in moves if m.source == r.rank}
    kept = [group for i, group in enumerate(groups) if i not in gone]
    return kept + [group.to(r.device) for group, m in zip(given, moves, strict=True) if m.target == r.rank]


def make_packs(
    engine: Engine, cost: Callable[[Group], float], image_token_id: int, groups: Sequence[Group], budget: int
) -> list[PackedBatch]:
    """Packs of at most `budget` tokens and of similar cost, on the engine's device.

    A group too long for one pack is split over several. Where ranks must run the same number of packs, empty ones are
    added. Groups without completions are conversations.
    """
    device = engine.ranks.device
    parts = [part for group in groups for part in group.split(budget)]
    sizes = [len(p.prompt.input_ids) + sum(map(len, p.completions)) for p in parts]
    plan = plan_packs(sizes, budget, list(map(cost, parts)))
    # Before memory may run out: all ranks must join.
    most = max(engine.ranks.gather(len(plan))) if engine.lockstep else len(plan)
    packs = [pack_groups([parts[i] for i in chosen], image_token_id=image_token_id).to(device) for chosen in plan]
    if missing := max(most, engine.min_packs) - len(packs):
        nothing = pack_groups([], image_token_id=image_token_id)
        packs += [replace(nothing, advantages=torch.empty(0), weights=torch.empty(0)).to(device)] * missing
    return packs


@dataclass
class Budget:
    """Maximum tokens of a run's packs; it is lowered when memory runs out."""

    tokens: int


def run_packs_that_fit(
    groups: Sequence[Group],
    budget: Budget,
    engine: Engine,
    make: Callable[[Sequence[Group], int], list[PackedBatch]],
    run: Callable[[list[PackedBatch]], T],
) -> T:
    """Return run(make(groups, tokens)); if memory runs out, repeat it from the start with packs of half the size.

    The smaller size stays for later steps. What `run` added to the gradients is discarded. A group with a completion
    that does not fit even alone is skipped with a warning.

    Raises:
        ValueError: the engine's ranks cannot start over alone if memory runs out, or the packs cannot be made smaller.
    """
    groups = list(groups)
    while True:
        packs = []
        try:
            packs = make(groups, budget.tokens)
            if engine.check_memory:
                engine.check_memory(packs)
            return run(packs)
        except torch.OutOfMemoryError as error:
            here = not isinstance(error, PeerOutOfMemory)
            failure = error.with_traceback(None)  # a traceback holds references to what filled the memory
        engine.restart_step(failure)
        torch.cuda.empty_cache()
        if not here:
            continue
        if not packs or not groups:
            raise RunFailed(
                f"memory ran out ({failure}) with {len(groups)} groups and {len(packs)} packs of them. Lower "
                "--prompts_per_step, or --max_completion_length."
            ) from failure
        largest = max(packs, key=lambda pack: len(pack.input_ids))
        if len(largest.completion_cu) > 2:
            budget.tokens = len(largest.input_ids) // 2
            size = len(largest.input_ids)
            log.warning("memory ran out in a pack of %d tokens (%s); again with %d", size, failure, budget.tokens)
        else:
            longest = max(groups, key=lambda g: len(g.prompt.input_ids) + max(map(len, g.completions), default=0))
            groups = [g for g in groups if g is not longest]
            log.warning("left out %s: one of its completions alone runs out of memory", longest.source)
