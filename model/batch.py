"""What passes from stage to stage of a step: `Prompt`, `Group`, `PackedBatch` (ARCHITECTURE.md, Packed batch)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor


@dataclass
class Prompt:
    """One prompt, ready for the model. P tokens, p patches, I images."""

    input_ids: Tensor  # (P) int64
    position_ids: Tensor  # (3, P) int64
    pixel_values: Tensor | None  # (p, 1176) fp32
    image_grid_thw: Tensor  # (I, 3) int64


@dataclass
class Conversation(Prompt):
    """A prompt with its answers. `loss_mask` is True on every token to be learned."""

    loss_mask: Tensor  # (P) bool


@dataclass
class Group:
    """A prompt and the completions that share it: filled from stage to stage of a step."""

    prompt: Prompt
    completions: Sequence[Tensor] = ()  # each (C_i) int64 on the CPU, end token included
    group_id: int = 0
    image_embeds: Tensor | None = None  # (p / 4, H): the frozen tower's output
    advantages: Tensor | None = None  # (G) fp32
    weight: Tensor | None = None  # 0-dim fp32, difficulty weight
    sampler_logps: Sequence[Tensor] | None = None  # each (C_i) fp32, nats; None: the policy itself sampled
    serial: int = 0  # number of the prompt in the run's stream
    record: Any = None  # the Example that the prompt was made of

    @property
    def source(self) -> str:
        """Name of the record, for messages."""
        return getattr(self.record, "source", "")

    def to(self, device) -> "Group":
        """The same group with its own tensors on `device`; the prompt's stay on the CPU, where packs are made."""
        own = {name: getattr(self, name) for name in ("image_embeds", "advantages", "weight")}
        return replace(self, **{name: value.to(device) for name, value in own.items() if value is not None})

    def part(self, start: int, stop: int) -> "Group":
        """The same prompt with some of its completions."""
        return replace(
            self,
            completions=self.completions[start:stop],
            advantages=None if self.advantages is None else self.advantages[start:stop],
            sampler_logps=None if self.sampler_logps is None else self.sampler_logps[start:stop],
        )


@dataclass
class PackedBatch:
    """One row of T tokens in S segments; N of them are scored; BG completions (SFT: examples)."""

    input_ids: Tensor  # (T) int64
    position_ids: Tensor  # (3, T) int64
    cu_seqlens: Tensor  # (S+1) int32, offsets of the segments into T
    parent: Tensor  # (S) int32, the prompt segment that this one also attends to; -1: none
    kv_index: Tensor  # (T_kv) int64, rows of T whose keys the segments read, one after the other
    cu_seqlens_k: Tensor  # (S+1) int32, offsets of the segments into T_kv
    max_q: int  # longest segment
    max_k: int  # longest key run
    predict_from: Tensor  # (N) int64, row of T whose hidden state predicts scored token n
    targets: Tensor  # (N) int64
    completion_cu: Tensor  # (BG+1) int32, offsets of the completions into N
    group_ids: Tensor | None  # (BG) int64, prompt of each completion; None for SFT
    image_rows: Tensor  # (P/4) int64, rows of T that hold image tokens
    pixel_values: Tensor | None  # (P, 1176); None when the embeddings are given
    image_embeds: Tensor | None  # (P/4, H)
    image_grid_thw: Tensor  # (I, 3) int64; stays on the CPU, where its values are read
    spans: tuple[tuple[int, int, int, int], ...]  # a segment's first row and length, its parent's; as Python ints
    advantages: Tensor | None = None  # (BG) fp32
    weights: Tensor | None = None  # (BG) fp32, difficulty weight
    old_logps: Tensor | None = None  # (N) fp32, nats at the sampling temperature
    ref_logps: Tensor | None = None  # (N) fp32
    sampler_logps: Tensor | None = None  # (N) fp32, of the foreign sampler that drew the targets

    def to(self, device) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and f.name != "image_grid_thw"
        }
        return replace(self, **moved)
