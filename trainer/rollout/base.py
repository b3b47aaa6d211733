"""The interface of rollouts, and the properties of the vocabulary that sampling and rewards need."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from boxgrpo.kernels import VocabularyBytes
from boxgrpo.model.batch import Group, PackedBatch, Prompt
from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.vocabulary import box_mark_ids, token_bytes


class Rollout(Protocol):
    """Samples completions.

    Attributes:
        written: bytes written so far by file name, for a checkpoint; empty where completions are not stored.
    """

    written: dict[str, int]

    def __call__(
        self, policy: Qwen2VL, groups: Sequence[Group], after_prefill: Callable[[], Any] = lambda: None
    ) -> list[Group]:
        """Return the groups with completions; a group that does not fit into memory is skipped with a warning.

        `after_prefill` queues work that the GPU can do beside decoding, once, when it is there. It is called between
        the last prefill and its decoding and after each token; a rollout that does not prefill calls it at the start.
        """


@dataclass
class Vocabulary:
    """The properties of the tokenizer that sampling and rewards need, on the policy's device."""

    eos_token_ids: tuple[int, ...]
    forbidden: Tensor  # (F) int64, ids never sampled: a sampled image token would have no image
    bytes: VocabularyBytes

    @classmethod
    def of(cls, processor: Processor, config, device) -> "Vocabulary":
        """End tokens come from the tokenizer, never from generation_config: Qwen's holds top_k 1."""
        # A head may be wider than the vocabulary: 152064 rows for 151657 tokens.
        rows = config.text_config.vocab_size
        table = token_bytes(processor.tokenizer, rows)
        unknown = range(len(processor.tokenizer), rows)
        forbidden = torch.tensor([*processor.vision_ids, *unknown], device=device)
        eos, marks = tuple(processor.eos_ids), box_mark_ids(processor.tokenizer)
        return cls(eos, forbidden, VocabularyBytes.build(table, eos, device, mark_ids=marks))


def prompt_digest(prompt: Prompt) -> str:
    """A hash of the prompt's token ids and pixels, by which a replay finds out that completions belong to another."""
    digest = hashlib.blake2b(prompt.input_ids.cpu().numpy().tobytes(), digest_size=8)
    if prompt.pixels is not None:
        digest.update(prompt.pixels.patches.cpu().numpy().tobytes())
    return digest.hexdigest()


def sampler_gap(pack: PackedBatch) -> Tensor:
    """Old minus sampler log-probability of the scored tokens, (N) fp32; 0 where the sampler reported NaN."""
    return (pack.old_logps - pack.sampler_logps).masked_fill(pack.sampler_logps.isnan(), 0)


def sampler_factor(pack: PackedBatch, cap: float) -> Tensor:
    """min(exp(old - sampler), cap) of the scored tokens, (N) fp32: importance ratios of another program's samples."""
    return sampler_gap(pack).exp().clamp(max=cap)
