"""Completions for a step's prompts: sampled by the policy or by vLLM, or replayed from a file.

A rollout is called as rollout(policy, samples, embeds) and returns `Sampled`. Its `written` says, for a checkpoint, how
many bytes it has written to which file.
"""

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import Tensor

from boxgrpo.kernels import ANSWER_FORMATS, GroundingRewards, VocabularyBytes, grounding_rewards_from_ids
from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.model.generate import prefill
from boxgrpo.model.packing import PackedBatch, Prompt
from boxgrpo.trainer.data.loader import Sample
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import most_images
from boxgrpo.trainer.data.vocabulary import box_mark_ids, token_bytes
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.runtime.reporter import OPTIONS, cut
from boxgrpo.trainer.runtime.spans import span

log = logging.getLogger(__name__)
NOTHING: dict[str, int] = {}


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
    kept: list[int] | None = None  # the samples that these are of; None: all

    def of(self, values: Sequence | None) -> Sequence | None:
        """Those of `values`, one for each sample asked for, that have completions."""
        return values if values is None or self.kept is None else [values[i] for i in self.kept]


def make_rollout(
    options,
    processor: Processor,
    vocabulary: Vocabulary,
    policy: Qwen2VL,
    examples,
    ranks: Ranks,
    stored: dict[str, int],
    sharded: bool = False,
):
    """The rollout that `options.rollout` names; `stored` are the bytes of its file that a resumed run keeps."""
    if options.rollout == "replay":
        return ReplayRollout(options)
    if options.rollout == "vllm":
        from .vllm import VllmRollout  # which imports from here

        return VllmRollout(options, processor, vocabulary, policy, most_images(examples))
    return LocalRollout(options, vocabulary, ranks, stored, sharded=sharded)


def sampler_gap(pack: PackedBatch) -> Tensor:
    """old - sampler of the scored tokens, (N) fp32; 0 where the sampler could not tell its own (NaN)."""
    return (pack.old_logps - pack.sampler_logps).masked_fill(pack.sampler_logps.isnan(), 0)


def sampler_factor(pack: PackedBatch, cap: float) -> Tensor | None:
    """min(exp(old - sampler), cap) of the scored tokens, (N) fp32; None where the policy itself sampled."""
    return None if pack.sampler_logps is None else sampler_gap(pack).exp().clamp(max=cap)


@torch.no_grad()
def embed_prompts(model: Qwen2VL, prompts: Sequence[Prompt], *, sharded: bool = False) -> list[Tensor | None]:
    """The frozen tower's output for each prompt, (p / 4, H), all images in one pass, or in as many as memory asks.

    Where a prompt's images do not fit even alone, theirs has no rows. With `sharded` weights all ranks meet in the
    tower: then it runs without images too, and an error of memory stands.
    """
    pixels = [p.pixel_values for p in prompts if p.pixel_values is not None]
    if not pixels and not sharded:
        return [None] * len(prompts)
    embeds = None
    try:
        embeds = model.embed_images(
            torch.cat(pixels) if pixels else None, torch.cat([p.image_grid_thw for p in prompts])
        )
    except torch.OutOfMemoryError:
        if sharded:
            raise
    if embeds is None:
        torch.cuda.empty_cache()
        if len(prompts) == 1:
            return [model.head_weight.new_empty(0, model.head_weight.shape[1])]
        half = len(prompts) // 2
        return embed_prompts(model, prompts[:half]) + embed_prompts(model, prompts[half:])
    merge = model.config.vision_config.spatial_merge_size**2
    parts = embeds.split([0 if p.pixel_values is None else len(p.pixel_values) // merge for p in prompts])
    return [None if p.pixel_values is None else part for p, part in zip(prompts, parts, strict=True)]


class LocalRollout:
    """Samples with the policy itself. With `rollout_file` it also keeps what it sampled, for a later replay.

    `sharded`: no rank has all weights. Then they meet in every layer, and none ends a round before the others.
    """

    def __init__(
        self,
        options,
        vocabulary: Vocabulary,
        ranks: Ranks,
        stored: dict[str, int] | None = None,
        *,
        sharded: bool = False,
    ):
        self.options = options
        self.vocabulary = vocabulary
        self.ranks, self.sharded = ranks, sharded
        self.rounds = options.gradient_accumulation_steps
        self.file = None
        if options.rollout_file:
            path = Path(options.rollout_file)
            path.parent.mkdir(parents=True, exist_ok=True)
            for other in path.parent.glob(f"{path.name}.rank*") if ranks.is_main else ():
                if int(other.name.rpartition(".rank")[2]) >= ranks.world_size:
                    raise ValueError(f"{other} is of a run with more ranks, and a replay would read it. Remove it.")
            path = path if ranks.is_main else path.with_name(f"{path.name}.rank{ranks.rank}")
            if path.exists() and path.name in (stored or {}):
                cut(path, stored[path.name])
            elif path.exists() and path.stat().st_size and not _begun_by(options):
                raise ValueError(
                    f"rollout_file {path} is already there. Read it with --rollout replay, or name another to store in."
                )
            else:
                path.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
            self.file = path.open("ab")

    @property
    def written(self) -> dict[str, int]:
        """Bytes in this rank's file, by its name."""
        return {Path(self.file.name).name: self.file.tell()} if self.file else {}

    def __call__(self, policy: Qwen2VL, samples: Sequence[Sample], embeds: Sequence[Tensor | None] | None) -> Sampled:
        groups: dict[int, list[Tensor]] = {}
        start = 0
        while start < len(samples):
            at_once = max(1, len(samples) // self.rounds)
            part = range(len(samples))[start : start + at_once]
            chosen = [samples[i] for i in part], embeds and [embeds[i] for i in part]
            try:
                if self.sharded:
                    sampled = policy(work=functools.partial(self._sample, policy, *chosen))
                else:
                    sampled = self._sample(policy, *chosen)
            except torch.OutOfMemoryError as error:
                if self.sharded:
                    raise ValueError(
                        f"memory ran out while {len(chosen[0])} prompts were sampled ({error}). Raise "
                        "--gradient_accumulation_steps, or lower --max_completion_length."
                    ) from error
                sampled = None  # and out of this block, whose traceback holds on to what filled the memory
            if sampled is None:
                torch.cuda.empty_cache()
                if at_once > 1:
                    self.rounds *= 2
                    log.warning("memory ran out while sampling; from here on in %d rounds a step", self.rounds)
                    continue
                log.warning("left out %s: sampling it alone runs out of memory", samples[start].example.source)
            else:
                groups |= zip(part, sampled, strict=True)
            start += at_once
        if self.file:
            for i, group in groups.items():
                line = json.dumps({"serial": samples[i].serial, "ids": [c.tolist() for c in group]})
                self.file.write(line.encode() + b"\n")
            self.file.flush()
        return Sampled(list(groups.values()), kept=None if len(groups) == len(samples) else list(groups))

    def _going_anywhere(self, going: bool) -> bool:
        return self.ranks.sum(going)[0] > 0

    @torch.no_grad()
    def _sample(self, policy: Qwen2VL, samples: Sequence[Sample], embeds) -> list[list[Tensor]]:
        """G completions for each sample, all of them at once."""
        o = self.options
        with span("prefill", len(samples), sum(len(s.item.input_ids) for s in samples)):
            decoding = prefill(
                policy,
                [s.item for s in samples],
                prompt_ids=[s.serial for s in samples],
                image_embeds=embeds,
                eos_token_ids=self.vocabulary.eos_token_ids,
                num_generations=o.num_generations,
                max_completion_length=o.max_completion_length,
                static=not self.sharded,
            )
        with span("decode", len(samples) * o.num_generations, o.max_completion_length):
            flat = decoding.run(
                temperature=o.temperature,
                top_k=o.top_k,
                top_p=o.top_p,
                seed=o.seed,
                forbidden=self.vocabulary.forbidden,
                anywhere=self._going_anywhere if self.sharded else bool,
            ).completions()
        return [flat[i : i + o.num_generations] for i in range(0, len(flat), o.num_generations)]


def _begun_by(options) -> bool:
    """Whether a run into the same folder, killed before its first checkpoint, began the file that this one is to."""
    earlier = Path(options.output_dir) / OPTIONS
    if options.resume != "auto" or not earlier.exists():
        return False
    return yaml.safe_load(earlier.read_text()).get("rollout_file") == options.rollout_file


class ReplayRollout:
    """Completions stored by an earlier run, found by the sample's serial number: for exact comparisons."""

    written: Mapping[str, int] = NOTHING

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
    nothing = torch.zeros(0, 1, dtype=torch.int64)  # of a rank whose samples were all left out
    ids = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True) if flat else nothing
    return grounding_rewards_from_ids(
        ids.to(device),
        torch.tensor([len(c) for c in flat], dtype=torch.int64, device=device),
        vocabulary.bytes,
        torch.tensor([e.gold for e in owners], dtype=torch.float32, device=device).view(-1, 4),
        answer_format=torch.tensor([ANSWER_FORMATS[e.answer_format] for e in owners], dtype=torch.uint8, device=device),
    )
