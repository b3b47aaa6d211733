"""Twenty steps of grpo.py beside the same steps written plainly: transformers' model, no packs, full logits."""

import copy

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from boxgrpo.trainer import grpo
from boxgrpo.trainer.data.loader import Loader
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import read_usable
from boxgrpo.trainer.rewards.grounding import score
from boxgrpo.trainer.rollout.base import Vocabulary
from boxgrpo.trainer.rollout.local import ReplayRollout
from boxgrpo.trainer.runtime.ranks import Ranks
from runs import grpo_options, lines


@pytest.fixture(scope="module")
def run(world):
    """(options, (loss, gradient norm) of each step) of a short run of the loop, its completions stored."""
    stored, few = str(world / "completions.jsonl"), {"prompts_per_step": 2, "max_completion_length": 24}
    options = grpo_options(world, "plain", rollout_file=stored, max_steps=20, lr_scheduler_type="constant", **few)
    grpo.train(options, Ranks())
    return options, [(m["loss"], m["grad_norm"]) for m in lines(world / "plain")]


def logps_of(model, prompt, completion, temperature):
    """(C) log-probabilities of a completion behind its prompt, from the logits of the whole sequence."""
    ids = torch.cat((prompt.input_ids, completion))[None]
    images = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    kinds = (ids == model.config.image_token_id).int()
    logits = model(input_ids=ids, mm_token_type_ids=kinds, **images).logits[0, len(prompt.input_ids) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, completion[:, None]).squeeze(1)


def plain_steps(o) -> list[tuple[float, float]]:
    """The formulas of ARCHITECTURE.md, The mathematics, one completion after the other: losses and gradient norms."""
    policy = Qwen2VLForConditionalGeneration.from_pretrained(o.model)
    policy.model.visual.requires_grad_(False)
    reference = copy.deepcopy(policy)
    processor = Processor.from_pretrained(o.model, min_pixels=o.min_pixels, max_pixels=o.max_pixels)
    vocabulary = Vocabulary.of(processor, policy.config, "cpu")
    examples, _ = read_usable(o, needs="gold")
    batches = iter(Loader(examples, processor.prompt, batch_size=o.prompts_per_step, seed=o.seed, workers=0))
    replay = ReplayRollout(o)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=o.learning_rate, betas=(0.9, o.adam_beta2), weight_decay=o.weight_decay)
    steps = []
    for _ in range(o.max_steps):
        groups = replay(None, next(batches))
        rewards = score(groups, vocabulary.bytes, "cpu")
        total = 0.0
        for i, group in enumerate(groups):
            mine = slice(i * o.num_generations, (i + 1) * o.num_generations)
            ious = rewards.accuracy[mine]
            sums = ious + rewards.format[mine]
            advantages = (sums - sums.mean()) / (sums.std() + 1e-4) * (sums != sums[0]).any()
            phi = torch.exp(1 - ious.mean())
            for completion, advantage in zip(group.completions, advantages, strict=True):
                logps = logps_of(policy, group.prompt, completion, o.temperature)
                with torch.no_grad():
                    gap = logps_of(reference, group.prompt, completion, o.temperature)
                gap = gap - logps
                ratio = (logps - logps.detach()).exp()
                total = total + (-phi * ratio * advantage + o.beta * (gap.exp() - gap - 1)).mean()
        loss = total / (len(groups) * o.num_generations)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, o.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((loss.item(), norm.item()))
    return steps


def test_twenty_steps_are_the_plain_loops(run):
    """At ratio 1 a group's advantages cancel in the loss, which then is the KL's: the gradients tell the rest."""
    options, ours = run
    plain = plain_steps(options)
    assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in plain], abs=1e-4)
    assert [norm for _, norm in ours] == pytest.approx([norm for _, norm in plain], rel=5e-3)
    assert max(abs(loss) for loss, _ in ours) > 0.01 and len(ours) == 20  # there was something to agree on
