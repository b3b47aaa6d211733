"""Twenty steps of grpo.py beside the same steps written plainly: transformers' model, no packs, full logits."""

import copy
import json

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from boxgrpo.trainer import demo, grpo, sft
from boxgrpo.trainer.data.loader import Loader
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import read_usable
from boxgrpo.trainer.options import GrpoOptions, SftOptions
from boxgrpo.trainer.rewards.grounding import score
from boxgrpo.trainer.rollout.base import Vocabulary
from boxgrpo.trainer.rollout.local import ReplayRollout
from boxgrpo.trainer.runtime.ranks import Ranks

STEPS, PROMPTS, GENERATIONS = 20, 2, 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(options, (loss, gradient norm) of each step) of a short run of the loop, its completions stored."""
    root = tmp_path_factory.mktemp("plain")
    world = demo.DemoOptions(output_dir=str(root), levels="0", cold_start=32, train=48, held_out=8)
    demo.draw_world(world)
    demo.make_initial_checkpoint(world)
    quick = {"dataloader_num_workers": 0, "output_dir": str(root / "sft"), "max_steps": 40, "learning_rate": 3e-3}
    data = {"model": str(root / "newborn"), "data": str(root / "world/cold_start.json")}
    sft.train(SftOptions(**data, **quick, train_batch_size=16, freeze_vision=False), Ranks())
    options = GrpoOptions(
        model=str(root / "sft"),
        data=str(root / "world/train.json"),
        output_dir=str(root / "grpo"),
        rollout_file=str(root / "completions.jsonl"),
        max_steps=STEPS,
        prompts_per_step=PROMPTS,
        num_generations=GENERATIONS,
        max_completion_length=24,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        dataloader_num_workers=0,
    )
    grpo.train(options, Ranks())
    lines = (root / "grpo/metrics.jsonl").read_text().splitlines()
    return options, [(m["loss"], m["grad_norm"]) for m in map(json.loads, lines)]


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
    assert max(abs(loss) for loss, _ in ours) > 0.01 and len(ours) == STEPS  # there was something to agree on
