"""Samples a step's groups and scores them; with dynamic sampling in rounds, until enough groups have a signal."""

import contextlib
from collections.abc import Callable

import torch

from boxgrpo.model.batch import Group
from boxgrpo.trainer.rewards.grounding import StepRewards, equal_rewards, score, step_rewards
from boxgrpo.trainer.rollout.base import Rollout, Vocabulary
from boxgrpo.trainer.rollout.local import PrefetchedBatches
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.runtime.spans import span

Sampled = tuple[list[Group], StepRewards]  # this rank's groups with completions, and their rewards


def sample_groups(
    run, rollout: Rollout, batches: PrefetchedBatches, vocabulary: Vocabulary, sharded: bool, slots: int
) -> Sampled:
    """Sample and score the groups of the stream's next `slots` slots, over all ranks. `run`: the loop's `Run`."""
    with span("data"):
        groups = batches.take(slots)
    with span("rollout"), contextlib.nullcontext() if sharded else run.engine.gathered_weights():
        with span("vision", sum(len(g.prompt.image_grid_thw) for g in groups)):
            groups = batches.embed(groups)
        groups = rollout(run.policy, groups, batches.embed_ahead)
    with span("reward", sum(len(g.completions) for g in groups)):
        scored = score(groups, vocabulary.bytes, run.ranks.device)
        return groups, step_rewards(run.options, run.hooks.rewards(groups, scored), run.ranks)


def count_slots(wanted: int, found: int, sampled: int) -> int:
    """The slots of a step's next round: `found` of the `sampled` groups have a signal, `wanted` are to be trained.

    At the same share of groups with a signal, which counts as a quarter if it is less, they hold the missing groups;
    at most `wanted`. In integers, so that all ranks, however many, take the same.
    """
    missing = wanted - found
    at_this_share = -(-missing * sampled // found) if found else wanted
    return min(wanted, 4 * missing, at_this_share)


def sample_with_signal(o, sample: Callable[[int], Sampled], r: Ranks) -> tuple[Sampled, Sampled, dict[str, float]]:
    """Sample in rounds until `prompts_per_step` groups of all ranks have a signal, `max_refills` + 1 rounds at most.

    A group has a signal if its rewards are not all equal (DAPO, arXiv 2503.14476, section 3.2).

    Args:
        sample: samples the groups of as many slots, over all ranks.

    Returns:
        All groups that this rank has sampled; those of them that are trained, which are the first `prompts_per_step`
        groups with a signal in the order of the slots, over all ranks; and metrics, the same on all ranks.
    """
    rounds: list[StepRewards] = []
    groups: list[Group] = []
    found: list[int] = []  # slots of all ranks whose groups have a signal
    sampled = 0
    while len(found) < o.prompts_per_step and len(rounds) <= o.max_refills:
        more, rewards = sample(count_slots(o.prompts_per_step, len(found), sampled))
        equal = equal_rewards(rewards.total).tolist()
        groups += more
        rounds.append(rewards)
        everyone = r.gather((len(more), [g.serial for g, same in zip(more, equal, strict=True) if not same]))
        sampled += sum(count for count, _ in everyone)
        found += [slot for _, slots in everyone for slot in slots]
    rewards = StepRewards(*map(torch.cat, zip(*rounds, strict=True)))
    chosen = sorted(found)[: o.prompts_per_step]
    kept = [i for i, g in enumerate(groups) if g.serial in chosen]
    metrics = {"refills": len(rounds) - 1, "sampled_groups": sampled, "trained_groups": len(chosen)}
    # Their advantages are computed again, because those of "batch" depend on all groups.
    trained = [groups[i] for i in kept], step_rewards(o, StepRewards(*(x[kept] for x in rewards)), r)
    return (groups, rewards), trained, {f"dynamic_sampling/{name}": float(n) for name, n in metrics.items()}
