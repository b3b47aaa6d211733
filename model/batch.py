"""Prompts, groups, and the packed batch: prompts and completions in one row of tokens, without padding.

ARCHITECTURE.md, section Packed batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

FRAMES = 2  # all families' temporal_patch_size: a still image is given to the tower as two equal frames
LOOKED_UP = 32768  # patches whose values are computed at once, by way of 77 MB of indices


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; to a GPU through page-locked memory: the host waits for a large copy of any other."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass
class Pixels:
    """Images as patches of 8-bit colours, of one frame: an eighth of the bytes of the values that the tower takes."""

    patches: Tensor  # (p, 588) uint8, of 3 channels x 14 x 14, in the image processor's order; Qwen3-VL: 16 x 16
    table: Tensor  # (3, 256) fp32, the image processor's value of each colour, by channel

    @classmethod
    def concat(cls, parts: "Sequence[Pixels]", device="cpu") -> "Pixels | None":
        """All patches on `device`, with the first part's table; None for no parts."""
        patches = [part.patches.to(device, non_blocking=True) for part in parts]
        return cls(torch.cat(patches), parts[0].table) if parts else None

    def to(self, device) -> "Pixels":
        return replace(self, patches=to_device(self.patches, torch.device(device)))

    def pin(self, device: torch.device) -> "Pixels":
        """The patches in page-locked memory, from which a copy to the GPU `device` does not wait."""
        with torch.cuda.device(device):  # a thread begins on GPU 0
            return replace(self, patches=self.patches.pin_memory())

    def values(self, like: Tensor | None = None) -> Tensor:
        """(p, 1176) fp32, the image processor's patches to the bit; or their like in dtype and device of `like`."""
        like = self.table if like is None else like
        table = self.table.to(like.device, like.dtype, non_blocking=True)
        values = table.new_empty(len(self.patches), FRAMES * self.patches.shape[1])
        first = torch.arange(0, table.numel(), table.shape[1], dtype=torch.int32, device=table.device)  # by channel
        for patches, into in zip(self.patches.split(LOOKED_UP), values.split(LOOKED_UP), strict=True):
            index = patches.to(table.device).unflatten(1, (len(table), -1)).int() + first[:, None]  # (n, 3, 196)
            found = table.flatten().index_select(0, index.flatten()).view_as(index)
            into.unflatten(1, (len(table), FRAMES, -1)).copy_(found[:, :, None])
        return values


@dataclass
class Prompt:
    """One prompt, ready for the model. P tokens, p patches, I images."""

    input_ids: Tensor  # (P) int64
    position_ids: Tensor  # (3, P) int64
    pixels: Pixels | None
    image_grid_thw: Tensor  # (I, 3) int64

    @property
    def pixel_values(self) -> Tensor | None:
        """(p, 1176) fp32, computed at each access: transformers' models take it by this name."""
        return self.pixels.values() if self.pixels is not None else None


@dataclass
class Conversation(Prompt):
    """A prompt with its answers. `loss_mask` is True on every token to be learned."""

    loss_mask: Tensor  # (P) bool


@dataclass
class Group:
    """A prompt and the completions that share it, filled from stage to stage of a step.

    A conversation is a group without completions.
    """

    prompt: Prompt
    completions: Sequence[Tensor] = ()  # each (C_i) int64 on the CPU, end token included
    image_embeds: Tensor | None = None  # (p / 4, H), Qwen3-VL (p / 4, (1 + D) H): the frozen tower's output
    advantages: Tensor | None = None  # (G) fp32
    weight: Tensor | None = None  # 0-dim fp32, difficulty weight
    sampler_logps: Sequence[Tensor] | None = None  # each (C_i) fp32, nats; None: the policy itself sampled
    serial: int = 0  # number of the prompt in the run's stream
    record: Any = None  # the Example that the prompt was made from

    @property
    def source(self) -> str:
        """Name of the record, for messages."""
        return getattr(self.record, "source", "")

    def to(self, device) -> "Group":
        """The same group with its own tensors on `device`; the prompt's stay on the CPU, where packs are made."""
        own = {name: getattr(self, name) for name in ("image_embeds", "advantages", "weight")}
        return replace(self, **{name: value.to(device) for name, value in own.items() if value is not None})

    def pin(self, device: torch.device) -> "Group":
        """The same group with its pixels in page-locked memory, for the GPU `device`."""
        if self.prompt.pixels is None:
            return self
        return replace(self, prompt=replace(self.prompt, pixels=self.prompt.pixels.pin(device)))

    def split(self, budget: int) -> list["Group"]:
        """Groups of the whole prompt and of as many completions, in order, as `budget` tokens allow, at least one."""
        starts, size = [0], len(self.prompt.input_ids)
        for i, completion in enumerate(self.completions):
            if i > starts[-1] and size + len(completion) > budget:
                starts.append(i)
                size = len(self.prompt.input_ids)
            size += len(completion)
        columns = ("completions", "advantages", "sampler_logps")
        given = {name: column for name in columns if (column := getattr(self, name)) is not None}
        stops = [*starts[1:], len(self.completions)]
        return [
            replace(self, **{name: column[start:stop] for name, column in given.items()})
            for start, stop in zip(starts, stops, strict=True)
        ]


@dataclass
class PackedBatch:
    """One row of T tokens in S segments; N of them are scored; BG completions (SFT: examples)."""

    input_ids: Tensor  # (T) int64
    position_ids: Tensor  # (3, T) int64
    cu_seqlens: Tensor  # (S+1) int32, offsets of the segments into T
    kv_index: Tensor  # (T_kv) int64, rows of T whose keys the segments read, segment by segment
    cu_seqlens_k: Tensor  # (S+1) int32, offsets of the segments' keys into T_kv
    max_q: int  # longest segment
    max_k: int  # most keys of a segment
    predict_from: Tensor  # (N) int64, row of T whose hidden state predicts scored token n
    targets: Tensor  # (N) int64
    completion_cu: Tensor  # (BG+1) int32, offsets of the completions into N
    image_rows: Tensor  # (P/4) int64, rows of T that hold image tokens
    pixels: Pixels | None  # of P patches; None when the embeddings are given
    image_embeds: Tensor | None  # (P/4, H), Qwen3-VL (P/4, (1 + D) H)
    image_grid_thw: Tensor  # (I, 3) int64; stays on the CPU, where its values are read
    spans: tuple[tuple[int, int, int, int], ...]  # each segment's first row and length, then its parent's (or 0, 0)
    advantages: Tensor | None = None  # (BG) fp32
    weights: Tensor | None = None  # (BG) fp32, difficulty weight
    old_logps: Tensor | None = None  # (N) fp32, nats at the sampling temperature
    ref_logps: Tensor | None = None  # (N) fp32
    sampler_logps: Tensor | None = None  # (N) fp32, of the sampler, where it is not the policy itself

    def to(self, device) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        device, moved = torch.device(device), {}
        for name in (f.name for f in fields(self) if f.name != "image_grid_thw"):
            if isinstance(value := getattr(self, name), Tensor):
                moved[name] = to_device(value, device)
            elif isinstance(value, Pixels):
                moved[name] = value.to(device)
        return replace(self, **moved)


def pack_groups(groups: Sequence[Group], *, image_token_id: int) -> PackedBatch:
    """Pack prompts with their completions; no groups give an empty batch.

    Every completion token is scored, and of a `Conversation` the tokens under its `loss_mask`. Embeddings, advantages,
    weights and the sampler's log-probabilities are packed where all groups have them.
    """
    segments, positions, spans = [], [], []
    predict_from, targets = [], []
    row = 0
    for group in groups:
        prompt = group.prompt
        parent = (row, len(prompt.input_ids))
        segments.append(prompt.input_ids)
        positions.append(prompt.position_ids)
        spans.append((*parent, 0, 0))
        if isinstance(prompt, Conversation):
            learned = prompt.loss_mask[1:].nonzero()[:, 0]  # the first token has no predecessor to predict it from
            predict_from.append(learned + row)
            targets.append(prompt.input_ids[learned + 1])
        row += parent[1]
        last, next_position = row - 1, int(prompt.position_ids.max()) + 1
        for completion in group.completions:
            count = len(completion)
            assert count > 0, "a completion has at least its end token"
            segments.append(completion)
            positions.append(torch.arange(next_position, next_position + count).expand(3, -1))
            spans.append((row, count, *parent))
            predict_from.append(torch.cat((torch.tensor([last]), torch.arange(row, row + count - 1))))
            targets.append(completion)
            row += count
    none = torch.empty(0, dtype=torch.int64)
    input_ids = torch.cat([none, *segments])
    keys = [torch.cat((torch.arange(p, p + n), torch.arange(s, s + m))) for s, m, p, n in spans]
    pixels = [g.prompt.pixels for g in groups if g.prompt.pixels is not None]
    embeds = [g.image_embeds for g in groups if g.image_embeds is not None]
    advantages = [g.advantages for g in groups if g.advantages is not None]
    weights = [g.weight.expand(len(g.completions)) for g in groups if g.weight is not None]
    sampler_logps = [logps for g in groups for logps in g.sampler_logps or ()]
    return PackedBatch(
        input_ids=input_ids,
        position_ids=torch.cat([none.expand(3, 0), *positions], 1),
        cu_seqlens=torch.tensor([*accumulate(map(len, segments), initial=0)], dtype=torch.int32),
        kv_index=torch.cat([none, *keys]),
        cu_seqlens_k=torch.tensor([*accumulate(map(len, keys), initial=0)], dtype=torch.int32),
        max_q=max(map(len, segments), default=0),
        max_k=max(map(len, keys), default=0),
        predict_from=torch.cat([none, *predict_from]),
        targets=torch.cat([none, *targets]),
        completion_cu=torch.tensor([*accumulate(map(len, targets), initial=0)], dtype=torch.int32),
        image_rows=(input_ids == image_token_id).nonzero()[:, 0],
        pixels=Pixels.concat(pixels) if not embeds else None,
        image_embeds=torch.cat(embeds) if embeds else None,
        image_grid_thw=torch.cat([none.view(0, 3), *(g.prompt.image_grid_thw for g in groups)]),
        spans=tuple(spans),
        advantages=torch.cat(advantages) if advantages else None,
        weights=torch.cat(weights) if weights else None,
        sampler_logps=torch.cat(sampler_logps) if sampler_logps else None,
    )


def plan_packs(sizes: Sequence[int], budget: int, costs: Sequence[float] | None = None) -> list[list[int]]:
    """Indices of the items, in packs whose summed size is within `budget`; an item above it gets a pack of its own.

    As many packs as first-fit decreasing needs. With `costs` the same number of packs is filled again for similar
    costs, the costliest item first, each into the cheapest pack with room; where one does not fit, first-fit's stay.
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
    if costs is None:
        return packs
    balanced: list[list[int]] = [[] for _ in packs]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        fitting = [p for p in balanced if not p or sum(sizes[i] for i in p) + sizes[index] <= budget]
        if not fitting:
            return packs
        min(fitting, key=lambda p: sum(costs[i] for i in p)).append(index)
    return balanced
