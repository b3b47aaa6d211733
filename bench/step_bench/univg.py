"""A GRPO step as the paper's trainer computes it, in our own words, on transformers alone.

UniVG-R1 trains with VLM-R1's Qwen2-VL trainer (github.com/AMAP-ML/UniVG-R1, open_r1/trainer/grpo_trainer.py). For each
prompt of a step, a micro-batch of its own:

    data        the prompt stands G times in the batch, its images are processed G times
    rollout     transformers' generate on the batch, the tower on every copy's images
    reference   a forward of the whole padded batch, logits (G, P + C, V) in full, the tower on every copy again;
                log_softmax row by row
    reward      decode the ids, two regular expressions, IoU in Python
    policy      the same forward once more with gradients; the ratio is to its own detached log-probabilities; the
                policy's term is weighted by phi of the micro-batch's mean IoU; k3 KL; mean over each completion, then
                over the completions

and one update of AdamW after the last. So the tower runs 3 G times a prompt, and the prompt G times in each pass.

Left out: ZeRO-3, which cannot share on one device (the update, masters included, is our own plain
engine's, on both sides); flash-attention 2, its default (SDPA, as all sides have); generation in training mode, where a
checkpointed model decodes without its cache; top_k 50, transformers' default of that time; one line more in its IoU,
which gives an overlap of at most a unit 0; wandb, and logs of every answer.
"""

import contextlib
import copy
import gc
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from boxgrpo.bench.reward_bench.run import decoded_and_searched
from boxgrpo.model.batch import Prompt
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import read_examples
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.runtime.spans import span

from . import sides
from .cases import StepCase
from .sides import Measurement, Side

EPSILON, STD_EPSILON = 0.2, 1e-4


class Batch(NamedTuple):
    """A prompt's G copies, as the model takes them."""

    input_ids: Tensor  # (G, P) int64; alike, so nothing is padded
    pixel_values: Tensor  # (G p, 1176)
    image_grid_thw: Tensor  # (G I, 3) int64

    @classmethod
    def of(cls, copies: list[Prompt], device) -> "Batch":
        stacked = torch.stack([p.input_ids for p in copies])
        pixels, grids = (torch.cat([getattr(p, key) for p in copies]) for key in ("pixel_values", "image_grid_thw"))
        return cls(*(x.to(device) for x in (stacked, pixels, grids)))

    def arguments(self, image_token_id: int, dtype: torch.dtype, completions: Tensor | None = None) -> dict:
        """Keyword arguments of the model's forward, with `completions` (G, C) behind the prompts."""
        ids = self.input_ids if completions is None else torch.cat((self.input_ids, completions), 1)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == image_token_id).int(),
            "pixel_values": self.pixel_values.to(dtype),
            "image_grid_thw": self.image_grid_thw,
        }


def completion_logps(model, batch: Batch, completions: Tensor) -> Tensor:
    """(G, C) log-probabilities of the completions, by logits of every token and a loop over rows."""
    arguments = batch.arguments(model.config.image_token_id, model.dtype, completions)
    logits = model(**arguments, use_cache=False).logits[:, :-1]  # (G, P + C - 1, V), in the model's dtype
    rows = []
    for row, ids in zip(logits, arguments["input_ids"][:, 1:], strict=True):
        rows.append(row.log_softmax(-1).gather(1, ids[:, None]).squeeze(1))
    return torch.stack(rows)[:, batch.input_ids.shape[1] - 1 :]


def rewards_of(tokenizer, completions: Tensor, gold: list[float]) -> tuple[Tensor, Tensor]:
    """Accuracy and format (G) of a prompt's completions, on the CPU; the benchmark's stand-in is in the accuracy."""
    accuracy, form = decoded_and_searched(tokenizer, completions, [gold] * len(completions))
    return accuracy + torch.tensor([sides.stand_in(ids) for ids in completions.tolist()]), form


def micro_loss(logps: Tensor, ref_logps: Tensor, mask: Tensor, accuracy: Tensor, form: Tensor) -> Tensor:
    """The loss of one prompt's completions: logps, ref_logps and mask (G, C), accuracy and form (G)."""
    rewards = accuracy + form
    advantages = ((rewards - rewards.mean()) / (rewards.std() + STD_EPSILON))[:, None]
    ratio = torch.exp(logps - logps.detach())
    policy = -torch.min(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages)
    policy = math.exp(1 - accuracy.mean().item()) * policy
    kl = torch.exp(ref_logps - logps) - (ref_logps - logps) - 1
    per_token = (policy + sides.BETA * kl) * mask
    return (per_token.sum(1) / mask.sum(1)).mean()


def mask_of(completions: Tensor, eos_token_id: int) -> Tensor:
    """(G, C) int64: 1 up to and with the first end token."""
    ended = (completions == eos_token_id).int()
    return (ended.cumsum(1) - ended == 0).long()


def univg_r1(case: StepCase, folder: Path, steps: int) -> Side:
    """The trainer's step on `folder`'s checkpoint and records, on our clock.

    Without activation checkpointing where there is enough memory for that; the paper's script always has it.
    """
    if case.model not in sides.CHECKPOINTED:
        with contextlib.suppress(torch.OutOfMemoryError):
            return _run(case, folder, steps, checkpointing=False)
        gc.collect()
        torch.cuda.empty_cache()
    return _run(case, folder, steps, checkpointing=True)


def _run(case: StepCase, folder: Path, steps: int, *, checkpointing: bool) -> Side:
    m, processor = Measurement(), sides.load_processor(folder)
    policy = sides.load_peer(case, folder, m)
    reference = copy.deepcopy(policy).requires_grad_(False).eval()
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    sampling = GenerationConfig(
        max_new_tokens=case.tokens,
        use_cache=True,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=processor.eos_ids[1],
        suppress_tokens=[*processor.vision_ids, *processor.eos_ids],
    )
    options = GrpoOptions(learning_rate=sides.LEARNING_RATE)
    engine = sides.engine_of(case)(policy, options, Ranks(device=policy.device), steps)
    torch.manual_seed(options.seed)
    tokens, norms, (examples, _) = 0, [], read_examples(folder / "records.json")
    with m.listening():
        for step in range(steps):
            with span("data"):
                chosen = [examples[(step * case.prompts + b) % len(examples)] for b in range(case.prompts)]
                copies = [[processor.prompt(e) for _ in range(case.generations)] for e in chosen]
                batches = [Batch.of(prompts, policy.device) for prompts in copies]
            for example, batch in zip(chosen, batches, strict=True):
                loss = micro_batch(policy, reference, processor, batch, sampling, list(example.gold))
                with span("backward"):
                    engine.backward(loss / case.prompts)
                tokens += batch.input_ids.shape[1]
            with span("optimizer"):
                norm, updated = engine.step()
            assert updated, norm
            norms.append(float(norm))
        m.begin_step()  # which ends the last one
    assert max(norms) > 0, norms  # few short completions may all have one reward, but not in every step
    return m.side(
        tokens / (steps * case.prompts),
        per_device_train_batch_size=case.generations,
        gradient_accumulation_steps=case.prompts,
        gradient_checkpointing=checkpointing,
        masters=case.masters,
        attn_implementation=sides.ATTENTION,
    )


def micro_batch(policy, reference, processor: Processor, batch: Batch, sampling: GenerationConfig, gold) -> Tensor:
    """A prompt's loss, sampled and scored."""
    with span("rollout"), torch.no_grad():
        completions = generated(policy, batch, sampling)
    assert completions.shape[1] == sampling.max_new_tokens, completions.shape
    with span("reference"), torch.no_grad():
        ref_logps = completion_logps(reference, batch, completions)
    with span("reward"):
        scored = (x.to(completions.device) for x in rewards_of(processor.tokenizer, completions.cpu(), gold))
        mask = mask_of(completions, processor.eos_ids[0])
    with span("policy_forward"):
        return micro_loss(completion_logps(policy, batch, completions), ref_logps, mask, *scored)


def generated(policy, batch: Batch, sampling: GenerationConfig) -> Tensor:
    """(G, C) sampled ids. In training mode a checkpointed model would generate without its cache."""
    policy.eval()
    arguments = batch.arguments(policy.config.image_token_id, policy.dtype)
    ids = policy.generate(**arguments, generation_config=sampling)
    policy.train()
    return ids[:, batch.input_ids.shape[1] :]
