"""Packing: prompts and completions in one row of tokens, without padding (ARCHITECTURE.md, Packed batch)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import Conversation, Group, PackedBatch, Prompt


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _cat(tensors: Sequence[Tensor], empty: Tensor) -> Tensor:
    return torch.cat(list(tensors)) if tensors else empty


def _pack(
    segments: list[Tensor],
    positions: list[Tensor],
    parents: list[int],
    prompts: Sequence[Prompt],
    image_token_id: int,
    image_embeds: Tensor | None,
    **scored,
) -> PackedBatch:
    none = torch.empty(0, dtype=torch.int64)
    lengths = [len(s) for s in segments]
    cu_seqlens = _offsets(lengths)
    starts = cu_seqlens.tolist()
    runs = [torch.arange(starts[i], starts[i + 1]) for i in range(len(segments))]
    keys = [run if p < 0 else torch.cat((runs[p], run)) for run, p in zip(runs, parents, strict=True)]
    input_ids = _cat(segments, none)
    pixels = [p.pixel_values for p in prompts if p.pixel_values is not None]
    return PackedBatch(
        input_ids=input_ids,
        position_ids=torch.cat(positions, 1) if positions else none.expand(3, 0),
        cu_seqlens=cu_seqlens,
        parent=torch.tensor(parents, dtype=torch.int32),
        kv_index=_cat(keys, none),
        cu_seqlens_k=_offsets([len(k) for k in keys]),
        max_q=max(lengths, default=0),
        max_k=max((len(k) for k in keys), default=0),
        image_rows=(input_ids == image_token_id).nonzero()[:, 0],
        pixel_values=torch.cat(pixels) if pixels and image_embeds is None else None,
        image_embeds=image_embeds,
        image_grid_thw=_cat([p.image_grid_thw for p in prompts], none.view(0, 3)),
        spans=tuple(
            (starts[i], lengths[i], *((starts[p], lengths[p]) if p >= 0 else (0, 0))) for i, p in enumerate(parents)
        ),
        **scored,
    )


def pack_groups(groups: Sequence[Group], *, image_token_id: int) -> PackedBatch:
    """Pack prompts with their completions; every completion token is scored. No groups: an empty batch.

    Advantages, weights and the sampler's log-probabilities come along where the groups, all of them, have them.
    """
    segments, positions, parents = [], [], []
    predict_from, group_ids, lengths = [], [], []
    row = 0
    for group in groups:
        prompt, completions = group.prompt, group.completions
        prompt_length = len(prompt.input_ids)
        parent = len(segments)
        segments.append(prompt.input_ids)
        positions.append(prompt.position_ids)
        parents.append(-1)
        last_row = row + prompt_length - 1
        row += prompt_length
        next_position = int(prompt.position_ids.max()) + 1
        for completion in completions:
            count = len(completion)
            assert count > 0, "a completion has at least its end token"
            segments.append(completion)
            positions.append(torch.arange(next_position, next_position + count).expand(3, -1))
            parents.append(parent)
            predict_from.append(torch.cat((torch.tensor([last_row]), torch.arange(row, row + count - 1))))
            group_ids.append(group.group_id)
            lengths.append(count)
            row += count
    embeds = [g.image_embeds for g in groups if g.image_embeds is not None]
    advantages = [g.advantages for g in groups if g.advantages is not None]
    weights = [g.weight.expand(len(g.completions)) for g in groups if g.weight is not None]
    sampler_logps = [logps for g in groups for logps in g.sampler_logps or ()]
    none = torch.empty(0, dtype=torch.int64)
    return _pack(
        segments,
        positions,
        parents,
        [g.prompt for g in groups],
        image_token_id,
        torch.cat(embeds) if embeds else None,
        advantages=torch.cat(advantages) if advantages else None,
        weights=torch.cat(weights) if weights else None,
        sampler_logps=torch.cat(sampler_logps) if sampler_logps else None,
        predict_from=_cat(predict_from, none),
        targets=_cat([c for g in groups for c in g.completions], none),
        completion_cu=_offsets(lengths),
        group_ids=torch.tensor(group_ids, dtype=torch.int64),
    )


def pack_conversations(conversations: Sequence[Conversation], *, image_token_id: int) -> PackedBatch:
    """Pack SFT examples, one segment each; the tokens under `loss_mask` are scored, over all turns."""
    predict_from, targets, lengths = [], [], []
    row = 0
    for c in conversations:
        learned = c.loss_mask[1:].nonzero()[:, 0]  # the first token has nothing before it to be predicted from
        predict_from.append(learned + row)
        targets.append(c.input_ids[learned + 1])
        lengths.append(len(learned))
        row += len(c.input_ids)
    none = torch.empty(0, dtype=torch.int64)
    return _pack(
        [c.input_ids for c in conversations],
        [c.position_ids for c in conversations],
        [-1] * len(conversations),
        conversations,
        image_token_id,
        None,
        predict_from=_cat(predict_from, none),
        targets=_cat(targets, none),
        completion_cu=_offsets(lengths),
        group_ids=None,
    )


def plan_packs(sizes: Sequence[int], budget: int, costs: Sequence[float] | None = None) -> list[list[int]]:
    """Indices of the items, laid into packs whose summed size stays within `budget`.

    As few packs as first-fit decreasing needs; with `costs` as many, but of like cost. An item above the budget gets a
    pack of its own: refusing it is the caller's choice.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for pack, left in enumerate(room):
            if sizes[index] <= left:
                packs[pack].append(index)
                room[pack] -= sizes[index]
                break
        else:
            packs.append([index])
            room.append(budget - sizes[index])
    return packs if costs is None else _balanced(packs, sizes, budget, costs)


def _balanced(packs: list[list[int]], sizes, budget: int, costs) -> list[list[int]]:
    """The costliest item first, each to the cheapest pack that has room; `packs` themselves where that does not fit."""
    found: list[list[int]] = [[] for _ in packs]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        fitting = [p for p in found if not p or sum(sizes[i] for i in p) + sizes[index] <= budget]
        if not fitting:
            return packs
        min(fitting, key=lambda p: sum(costs[i] for i in p)).append(index)
    return found
