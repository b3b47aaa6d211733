"""GRPO for visual grounding: sample, reward, advantage, pack, reference, policy, step.

    torchrun trainer/grpo.py --model CHECKPOINT --data records.json      one process per GPU: --nproc_per_node 8
    torchrun trainer/grpo.py                                             the demo's drawn scenes, cold start included

There is deliberately no critic, reward model, padding or full logits, and no rollout by older weights.
"""

import contextlib
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from boxgrpo.kernels import LossOptions, fused_grpo_loss, token_logps
from boxgrpo.model.batch import PackedBatch
from boxgrpo.trainer import sft
from boxgrpo.trainer.arguments import parse
from boxgrpo.trainer.engine.lora import without_adapters
from boxgrpo.trainer.options import GrpoOptions, SftOptions, check_command, validate_grpo
from boxgrpo.trainer.rollout.base import Rollout, Vocabulary, sampler_factor
from boxgrpo.trainer.rollout.local import LocalRollout, PrefetchedBatches, ReplayRollout, embed_images
from boxgrpo.trainer.rollout.vllm import VllmRollout
from boxgrpo.trainer.run import Hooks, Run
from boxgrpo.trainer.runtime.ranks import Ranks, RunFailed, join_ranks, run_as_script
from boxgrpo.trainer.runtime.spans import named_range, span
from boxgrpo.trainer.step.metrics import (
    completion_metrics,
    completion_table,
    grpo_flop,
    policy_metrics,
    sampling_metrics,
)
from boxgrpo.trainer.step.pack import balance_across_ranks, make_packs, run_packs_that_fit, trained_groups
from boxgrpo.trainer.step.sample import sample_groups, sample_with_signal
from boxgrpo.trainer.world import recipe


def train(options: GrpoOptions, r: Ranks, hooks: Hooks | None = None) -> None:
    """Train `options.model` on `options.data`; write the checkpoint and the metrics to `options.output_dir`."""
    o, hooks = options, hooks or Hooks()
    loss_settings = validate_grpo(o, r.world_size)
    replay = ReplayRollout(o) if o.rollout == "replay" else None  # its file is judged before weights are read
    size = {"max_tokens": o.max_prompt_length, "batch_size": o.prompts_per_step, "updates": o.num_iterations}
    run = Run(o, r, hooks, needs="gold", reference=bool(o.beta), **size)
    policy, engine, progress, loader = run.policy, run.engine, run.progress, run.loader
    vocabulary = hooks.vocabulary(Vocabulary.of(run.processor, policy.config, r.device))
    sharded = engine.shards_weights and not o.ds3_gather_for_generation
    rollout = replay or make_rollout(run, vocabulary, sharded=sharded)
    if replay:
        replay.check(loader, r, run.total_steps - progress.step)
    run.begin("grpo")
    embed = partial(embed_images, policy, sharded=sharded) if o.freeze_vision else None
    batches = PrefetchedBatches(loader, embed, early=r.device.type == "cuda" and not engine.shards_weights)
    sample = partial(sample_groups, run, rollout, batches, vocabulary, sharded)
    cost = partial(policy.group_flop, tower_passes=0.0 if o.freeze_vision else 1.0)
    make = span("pack")(partial(make_packs, engine, cost, policy.config.image_token_id))

    for step in run.steps(lambda: batches.position, lambda: rollout.written):
        if o.dynamic_sampling:
            (groups, rewards), (kept, kept_rewards), extra = sample_with_signal(o, sample, r)
        else:
            groups, rewards = kept, kept_rewards = sample(o.prompts_per_step)
            extra = {}
        with span("pack", len(kept)):
            trained = trained_groups(o, kept, kept_rewards)
            if o.loss_type != "bnpo":  # its mean is over each rank's own tokens
                trained = balance_across_ranks(trained, cost, r)
            counts = r.sum(sum(len(g.completions) for g in kept), sum(len(c) for g in trained for c in g.completions))
            settings = loss_settings._replace(denominator=loss_denominator(o, *counts, r))
        if counts[0]:
            update = partial(update_gradients, run, settings)
            packs, loss, stats = run_packs_that_fit(trained, run.budget, engine, make, update)
            for iteration in range(o.num_iterations):
                if iteration:
                    loss, stats = accumulate_again(run, settings, packs)
                with span("optimizer"):
                    grad_norm, updated = engine.step()
                progress.skipped_steps += not updated
        else:  # no rank has a group: weights and moments stay
            packs, stats = [], []
            loss = grad_norm = torch.zeros(())
            for _ in range(o.num_iterations):
                engine.schedule.step()
        if run.is_logged:
            limits = o.max_completion_length, vocabulary.eos_token_ids
            extra |= completion_metrics(groups, rewards, kept_rewards, *limits, r)
            extra |= policy_metrics(stats, r)
        if run.is_logged and o.rollout == "vllm":
            extra |= sampling_metrics(packs, o.vllm_importance_sampling_clip_max)
        tokens = sum(len(p.input_ids) for p in packs)
        flop = grpo_flop(o, policy, groups, trained) if run.peak_flop else 0.0
        shown = {"reward": float(rewards.total.mean()), "iou": float(rewards.accuracy.mean())}
        run.log_step(loss=loss, grad_norm=grad_norm, tokens=tokens, flop=flop, shown=shown, extra=extra)
        if o.log_completions and step % o.log_completions == 0:
            run.report.table(f"step {step}", *completion_table(run.processor, groups, rewards.accuracy))


def make_rollout(run: Run, vocabulary: Vocabulary, *, sharded: bool) -> Rollout:
    """The rollout that samples as `--rollout` names. `sharded`: no rank has all weights while it samples."""
    o = run.options
    if o.rollout == "vllm":
        return VllmRollout(o, run.processor, vocabulary, run.policy, run.examples.max_images)
    return LocalRollout(o, vocabulary, run.ranks, run.progress.rollout_bytes, sharded=sharded)


def update_gradients(run: Run, settings: LossOptions, packs: list[PackedBatch]):
    """Accumulate the first iteration's gradients; returns the packs with reference and old logps, loss, statistics."""
    o = run.options
    with span("reference", sum(len(p.input_ids) for p in packs)), torch.no_grad():
        if run.reference is not None:
            with without_adapters(run.reference) if o.lora_rank else contextlib.nullcontext():
                packs = [replace(p, ref_logps=run.reference(p, partial(logps, p, o.temperature))) for p in packs]
        if o.num_iterations > 1 or o.rollout == "vllm":
            packs = [replace(p, old_logps=run.engine.model(p, partial(logps, p, o.temperature))) for p in packs]
    return packs, *accumulate(run, settings, packs)


def accumulate(run: Run, settings: LossOptions, packs: list[PackedBatch]):
    """Accumulate the packs' gradients; returns this rank's loss (0-dim) and the statistics of each non-empty pack."""
    engine, loss, stats = run.engine, torch.zeros((), device=run.ranks.device), []
    with span("policy", len(packs)):
        for pack in packs:
            with span("forward", len(pack.input_ids)):
                pack_loss, pack_stats = engine.model(pack, partial(policy_loss, run.options, settings, pack))
                pack_loss = run.hooks.pack_loss(pack_loss)
                if settings.denominator is None:
                    pack_loss = pack_loss / max(1, sum(len(p.targets) > 0 for p in packs))
            with span("backward", len(pack.input_ids)):
                engine.backward(pack_loss)
            loss += pack_loss.detach()
            if len(pack.targets):  # an empty pack keeps the number of collectives equal on all ranks
                stats.append(pack_stats)
    return loss, stats


def accumulate_again(run: Run, settings: LossOptions, packs: list[PackedBatch]):
    """`accumulate` for iterations after the first, in which the packs stay the same: it raises if memory runs out."""
    try:
        return accumulate(run, settings, packs)
    except torch.OutOfMemoryError as error:
        raise RunFailed(f"memory ran out in a later iteration ({error}). Lower --tokens_per_pass.") from error


def loss_denominator(o, completions: float, tokens: float, r: Ranks):
    """The divisor of the step's summed loss on each rank, 0-dim fp32; ranks average their gradients afterwards."""
    total = {
        **dict.fromkeys(("grpo", "sapo", "luspo"), completions),
        **dict.fromkeys(("dapo", "cispo", "vespo"), tokens),
        "dr_grpo": completions * o.max_completion_length,
        "bnpo": None,
    }[o.loss_type]
    return None if total is None else torch.tensor(total / r.world_size, device=r.device, dtype=torch.float32)


def policy_loss(o, settings: LossOptions, pack: PackedBatch, hidden, weight):
    """The pack's loss and statistics. The model calls this as its head, with hidden (N, H) and weight (V, H)."""
    factor = None if pack.sampler_logps is None else sampler_factor(pack, o.vllm_importance_sampling_clip_max)
    tensors = {"old_logps": pack.old_logps, "ref_logps": pack.ref_logps, "weights": pack.weights}
    options = settings._replace(**tensors, sampler_factor=factor)
    with named_range("head+loss", len(hidden), len(weight)):
        scored = (pack.targets, pack.advantages, pack.completion_cu)
        return fused_grpo_loss(hidden, weight, *scored, temperature=o.temperature, options=options)


def logps(pack: PackedBatch, temperature: float, hidden, weight):
    """(N) fp32 log-probabilities of the scored tokens. The model calls this as its head, with (N, H) and (V, H)."""
    with named_range("head", len(hidden), len(weight)):
        return token_logps(hidden, weight, pack.targets, temperature=temperature)


def demo_options(args: list[str] | None, r: Ranks) -> GrpoOptions:
    """Options for a run without model and data: the demo's scenes and cold start, which are made if missing."""
    demo, is_trained = recipe.DemoOptions(), False
    cold_start = parse(SftOptions, recipe.run_flags(demo, "sft"))
    if r.is_main:
        recipe.draw_world(demo)
        is_trained = (Path(cold_start.output_dir) / "model.safetensors").exists()
    if not r.gather(is_trained)[0]:
        sft.train(cold_start, r)
    return parse(GrpoOptions, [*recipe.run_flags(demo, "grpo"), *(sys.argv[1:] if args is None else args)])


def main(args: list[str] | None = None, hooks: Hooks | None = None) -> None:
    options = parse(GrpoOptions, args, prog="grpo.py")
    check_command(options)
    with join_ranks(options.timeout) as r, r.record_sigterm():
        if not options.model and not options.data:
            options = demo_options(args, r)
        train(options, r, hooks)


if __name__ == "__main__":
    run_as_script(main, "grpo.py")
