"""The built-in rewards of a step's completions, and the advantages computed from them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from boxgrpo.kernels import (
    ANSWER_FORMATS,
    GroundingRewards,
    VocabularyBytes,
    grounding_rewards_from_ids,
    group_advantages,
)
from boxgrpo.model.batch import Group
from boxgrpo.trainer.runtime.ranks import Ranks


def score(groups: Sequence[Group], table: VocabularyBytes, device) -> GroundingRewards:
    """IoU and format rewards of all completions, prompt-major (n = B·G), computed from token ids on `device`."""
    flat = [c for group in groups for c in group.completions]
    records = [group.record for group in groups for _ in group.completions]
    nothing = torch.zeros(0, 1, dtype=torch.int64)  # for a rank whose groups were all skipped
    ids = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True) if flat else nothing
    formats = [ANSWER_FORMATS[record.answer_format] for record in records]
    return grounding_rewards_from_ids(
        ids.to(device),
        torch.tensor([len(c) for c in flat], dtype=torch.int64, device=device),
        table,
        torch.tensor([record.gold for record in records], dtype=torch.float32, device=device).view(-1, 4),
        answer_format=torch.tensor(formats, dtype=torch.uint8, device=device),
    )


class StepRewards(NamedTuple):
    """A step's rewards on this rank: B groups of G completions."""

    accuracy: Tensor  # (B, G) fp32, IoU in 0-1
    format: Tensor  # (B, G) fp32, 0 or 1
    total: Tensor  # (B, G) fp32, their sum
    advantages: Tensor  # (B, G) fp32
    weights: Tensor  # (B) fp32, difficulty weights
    miou: Tensor  # (B) fp32, mean IoU


def equal_rewards(total: Tensor) -> Tensor:
    """Whether all rewards of a group are equal: (B, G) -> (B) bool. Then it has no signal: its advantages are 0."""
    return (total == total[:, :1]).all(1)


def step_rewards(o, scored: GroundingRewards | StepRewards, r: Ranks) -> StepRewards:
    """The rewards of `score` by group, with advantages, difficulty weights and mean IoUs.

    With `scale_rewards` "batch" the standard deviation is over the completions of all ranks.
    """
    accuracy, format = (x.view(-1, o.num_generations) for x in (scored.accuracy, scored.format))
    total = accuracy + format
    if o.scale_rewards != "batch" or r.world_size == 1:
        found = group_advantages(total, accuracy, difficulty=o.difficulty, scale=o.scale_rewards)
        return StepRewards(accuracy, format, total, *found)
    everyone = r.gather((total.cpu(), accuracy.cpu()))
    whole = [torch.cat(part).to(total.device) for part in zip(*everyone, strict=True)]
    before = sum(len(theirs) for theirs, _ in everyone[: r.rank])
    mine = slice(before, before + len(total))
    found = group_advantages(*whole, difficulty=o.difficulty, scale="batch")
    return StepRewards(accuracy, format, total, *(x[mine] for x in found))
