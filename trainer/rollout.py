"""Completions for a step's prompts: sampled by the policy or by vLLM, or replayed from a file.

A rollout is called as rollout(policy, samples, embeds) and returns `Sampled`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from boxgrpo.kernels import ANSWER_FORMATS, GroundingRewards, VocabularyBytes, grounding_rewards_from_ids
from boxgrpo.model.generate import prefill
from boxgrpo.model.packing import PackedBatch, Prompt
from boxgrpo.model.qwen2vl import Qwen2VL

from .loader import Sample
from .processing import Processor
from .spans import span
from .vocabulary import box_mark_ids, token_bytes


@dataclass
class Vocabulary:
    """What sampling and rewards need of the tokenizer, on the policy's device."""

    eos_token_ids: tuple[int, ...]
    forbidden: Tensor  # (F) int64, never sampled: a policy's image token would have no image behind it
    bytes: VocabularyBytes

    @classmethod
    def of(cls, processor: Processor, config, device) -> "Vocabulary":
        """Ends come from the tokenizer, never from generation_config: Qwen's holds top_k 1."""
        # A head may be wider than the vocabulary: 152064 rows for 151657 tokens.
        rows = config.text_config.vocab_size
        table = token_bytes(processor.tokenizer, rows)
        unknown = range(len(processor.tokenizer), rows)
        forbidden = torch.tensor([*processor.vision_ids, *unknown], device=device)
        eos, marks = tuple(processor.eos_ids), box_mark_ids(processor.tokenizer)
        return cls(eos, forbidden, VocabularyBytes.build(table, eos, device, mark_ids=marks))


class Sampled(NamedTuple):
    """What a rollout gives for its samples."""

    completions: list[list[Tensor]]  # G for each sample, (C_i) int64 on the CPU, end token included
    logps: list[list[Tensor]] | None = None  # (C_i) fp32, nats, by a foreign sampler; None: the policy sampled


def make_rollout(options, processor: Processor, vocabulary: Vocabulary, policy: Qwen2VL, examples, rank: int):
    """The rollout that `options.rollout` names."""
    if options.rollout == "replay":
        return ReplayRollout(options)
    if options.rollout == "vllm":
        from .rollout_vllm import VllmRollout  # which imports from here

        return VllmRollout(options, processor, vocabulary, policy, max(len(e.images) for e in examples))
    return LocalRollout(options, vocabulary, rank)


def sampler_gap(pack: PackedBatch) -> Tensor:
    """old - sampler of the scored tokens, (N) fp32; 0 where the sampler could not tell its own (NaN)."""
    return (pack.old_logps - pack.sampler_logps).masked_fill(pack.sampler_logps.isnan(), 0)


def sampler_factor(pack: PackedBatch, cap: float) -> Tensor | None:
    """min(exp(old - sampler), cap) of the scored tokens, (N) fp32; None where the policy itself sampled."""
    return None if pack.sampler_logps is None else sampler_gap(pack).exp().clamp(max=cap)


@torch.no_grad()
def embed_prompts(model: Qwen2VL, prompts: Sequence[Prompt]) -> list[Tensor | None]:
    """The frozen tower's output for each prompt, (p / 4, H), all images in one pass."""
    pixels = [p.pixel_values for p in prompts if p.pixel_values is not None]
    if not pixels:
        return [None] * len(prompts)
    embeds = model.embed_images(torch.cat(pixels), torch.cat([p.image_grid_thw for p in prompts]))
    merge = model.config.vision_config.spatial_merge_size**2
    return list(embeds.split([0 if p.pixel_values is None else len(p.pixel_values) // merge for p in prompts]))


class LocalRollout:
    """Samples with the policy itself. With `rollout_file` it also keeps what it sampled, for a later replay."""

    def __init__(self, options, vocabulary: Vocabulary, rank: int):
        self.options = options
        self.vocabulary = vocabulary
        self.file = None
        if options.rollout_file:
            path = Path(options.rollout_file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path = path if rank == 0 else path.with_name(f"{path.name}.rank{rank}")
            if path.exists():
                raise ValueError(
                    f"rollout_file {path} is already there. Read it with --rollout replay, or name another to store in."
                )
            self.file = path.open("w")

    def __call__(self, policy: Qwen2VL, samples: Sequence[Sample], embeds: Sequence[Tensor | None] | None) -> Sampled:
        o = self.options
        at_once = len(samples) // o.gradient_accumulation_steps
        completions: list[list[Tensor]] = []
        for start in range(0, len(samples), at_once):
            part = slice(start, start + at_once)
            with span("prefill"):
                decoding = prefill(
                    policy,
                    [s.item for s in samples[part]],
                    prompt_ids=[s.serial for s in samples[part]],
                    image_embeds=None if embeds is None else embeds[part],
                    eos_token_ids=self.vocabulary.eos_token_ids,
                    num_generations=o.num_generations,
                    max_completion_length=o.max_completion_length,
                )
            with span("decode"):
                flat = decoding.run(
                    temperature=o.temperature,
                    top_k=o.top_k,
                    top_p=o.top_p,
                    seed=o.seed,
                    forbidden=self.vocabulary.forbidden,
                ).completions()
            completions += [flat[i : i + o.num_generations] for i in range(0, len(flat), o.num_generations)]
        if self.file:
            for sample, group in zip(samples, completions, strict=True):
                self.file.write(json.dumps({"serial": sample.serial, "ids": [c.tolist() for c in group]}) + "\n")
            self.file.flush()
        return Sampled(completions)


class ReplayRollout:
    """Completions stored by an earlier run, found by the sample's serial number: for exact comparisons."""

    def __init__(self, options):
        self.path = options.rollout_file
        self.num_generations = options.num_generations
        path = Path(self.path)
        if not path.is_file():
            raise ValueError(f"rollout_file is {self.path}; there is no such file. Store one with --rollout local.")
        lines = [
            line for part in (path, *path.parent.glob(f"{path.name}.rank*")) for line in part.open()
        ]  # every rank's
        self.stored = {(record := json.loads(line))["serial"]: record["ids"] for line in lines}

    def __call__(self, policy, samples, embeds) -> Sampled:
        missing = [s.serial for s in samples if s.serial not in self.stored]
        if missing:
            raise ValueError(
                f"{self.path} holds no completions for sample {missing[0]}; replay needs the data, seed and batch that "
                "stored it. Store them again with --rollout local --rollout_file."
            )
        for s in samples:
            if len(self.stored[s.serial]) != self.num_generations:
                raise ValueError(
                    f"{self.path} holds {len(self.stored[s.serial])} completions for sample {s.serial}; "
                    f"num_generations is {self.num_generations}. Set --num_generations to what was stored."
                )
        return Sampled([[torch.tensor(ids) for ids in self.stored[s.serial]] for s in samples])


def score(
    completions: Sequence[Sequence[Tensor]], samples: Sequence[Sample], vocabulary: Vocabulary, device
) -> GroundingRewards:
    """Rewards of all completions, prompt-major (n = B·G), computed from ids on `device`."""
    flat = [c for group in completions for c in group]
    owners = [s.example for s, group in zip(samples, completions, strict=True) for _ in group]
    return grounding_rewards_from_ids(
        torch.nn.utils.rnn.pad_sequence(flat, batch_first=True).to(device),
        torch.tensor([len(c) for c in flat], device=device),
        vocabulary.bytes,
        torch.tensor([e.gold for e in owners], dtype=torch.float32, device=device),
        answer_format=torch.tensor([ANSWER_FORMATS[e.answer_format] for e in owners], dtype=torch.uint8, device=device),
    )
