"""From a step's groups to its packs: which have a gradient, which rank trains them, which share a forward pass."""

import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from boxgrpo.model.packing import Group, PackedBatch, forward_flop, pack_groups, plan_packs, tower_flop
from boxgrpo.trainer.data.loader import Sample
from boxgrpo.trainer.engine.ddp import MemoryElsewhere
from boxgrpo.trainer.rollout.local import Sampled
from boxgrpo.trainer.runtime.ranks import Ranks

log = logging.getLogger(__name__)
T = TypeVar("T")
WORTH_MOVING = 0.05  # of the ranks' mean work: a smaller difference costs less than the exchange


def trained_groups(
    o, samples: Sequence[Sample], sampled: Sampled, embeds: Sequence[Tensor | None] | None, advantages, weights
) -> list[Group]:
    """The groups that have a gradient, with their advantages (G each) and weights.

    Without KL one of equal rewards has none, and is left out. (Not with bnpo, a mean over each pack's own.)
    """
    has_gradient = [True] * len(samples)
    if not o.beta and o.loss_type != "bnpo":
        has_gradient = (advantages != 0).any(1).tolist()
    return [
        Group(
            sample.item if embeds is None else replace(sample.item, pixel_values=None),  # they have been seen
            sampled.completions[i],
            i,
            image_embeds=None if embeds is None else embeds[i],
            advantages=advantages[i],
            weight=weights[i],
            sampler_logps=None if sampled.logps is None else sampled.logps[i],
            source=sample.example.source,
        )
        for i, sample in enumerate(samples)
        if has_gradient[i]
    ]


def group_flop(config, group: Group) -> float:
    """What a forward of the group costs; its images count where the tower is trained, and runs in each pack."""
    lengths = [len(c) for c in group.completions]
    flop = forward_flop(config, len(group.prompt.input_ids), lengths, sum(lengths))
    return flop + (tower_flop(config, group.prompt.image_grid_thw) if group.image_embeds is None else 0.0)


def make_packs(config, engine, groups: Sequence[Group], budget: int) -> list[PackedBatch]:
    """Packs of at most `budget` tokens and of like cost. A group too long for one stands in several.

    Where ranks must run as many as each other, empty ones too.
    """
    parts: list[Group] = []
    for group in groups:
        start, size = 0, len(group.prompt.input_ids)
        for g, completion in enumerate(group.completions):
            if g > start and size + len(completion) > budget:
                parts.append(group.part(start, g))
                start, size = g, len(group.prompt.input_ids)
            size += len(completion)
        parts.append(group.part(start, len(group.completions)))
    sizes = [len(p.prompt.input_ids) + sum(map(len, p.completions)) for p in parts]
    plan = plan_packs(sizes, budget, [group_flop(config, p) for p in parts])
    device, image = engine.ranks.device, config.image_token_id
    packs = [pack_groups([parts[i] for i in chosen], image_token_id=image).to(device) for chosen in plan]
    if missing := missing_packs(engine, len(packs)):
        nothing = pack_groups([], image_token_id=image)
        packs += [replace(nothing, advantages=torch.empty(0), weights=torch.empty(0)).to(device)] * missing
    return packs


def missing_packs(engine, count: int) -> int:
    """Empty packs that this rank runs beside `count` others, to keep step with the other ranks."""
    most = max(engine.ranks.gather(count)) if engine.lockstep else count
    return max(most, engine.least_packs) - count


@dataclass
class Budget:
    """Tokens of the largest pack that a run makes: fewer once memory has run out."""

    tokens: int


def in_packs_that_fit(
    groups: Sequence[Group],
    budget: Budget,
    engine,
    make: Callable[[Sequence[Group], int], list[PackedBatch]],
    run: Callable[[list[PackedBatch]], T],
) -> T:
    """run(make(groups, tokens)): where memory runs out, again from the start with packs of half the size.

    The next step knows. What `run` has added to the gradients by then is forgotten. A group of which a single
    completion does not fit is left out, and named.

    Raises:
        ValueError: the engine's ranks meet where memory ran out, so that none can start over alone; or nothing is left
            to make smaller.
    """
    groups = list(groups)
    while True:
        packs = []
        try:
            packs = make(groups, budget.tokens)
            engine.check_room(packs)
            return run(packs)
        except torch.OutOfMemoryError as error:
            here = not isinstance(error, MemoryElsewhere)
            failure = error.with_traceback(None)  # which would hold on to what filled the memory
        engine.start_over(failure)
        torch.cuda.empty_cache()
        if not here:
            continue
        if not packs or not groups:
            raise ValueError(
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


@contextmanager
def naming_the_remedy():
    """For packs that fitted in the iteration before: they are not made anew, and a lack of memory ends the run."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"memory ran out in a later iteration ({error}). Lower --tokens_per_pass.") from error


class Move(NamedTuple):
    """Item `index` of rank `source` is trained by rank `target`."""

    source: int
    index: int
    target: int


def plan_moves(costs: Sequence[Sequence[float]]) -> list[Move]:
    """Moves that even out the ranks' sums of `costs`, one list a rank; the same on every rank that has the same costs.

    Again and again the costliest rank gives the cheapest one the item that brings the two closest to each other.
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


def even_out(groups: Sequence[Group], costs: Sequence[float], r: Ranks) -> list[Group]:
    """What this rank trains after an exchange: its groups without those it gave away, then those it was given."""
    if r.world_size == 1:
        return list(groups)
    moves = plan_moves(r.gather(list(costs)))
    # From CPU to CPU: a tensor of cuda:0 would come back on cuda:0, whatever the receiver's device.
    given = [r.hand_over(groups[m.index].to("cpu") if m.source == r.rank else None, m.source, m.target) for m in moves]
    gone = {m.index for m in moves if m.source == r.rank}
    kept = [group for i, group in enumerate(groups) if i not in gone]
    return kept + [group.to(r.device) for group, m in zip(given, moves, strict=True) if m.target == r.rank]
