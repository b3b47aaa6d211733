"""GRPO for visual grounding: sample, reward, advantage, pack, reference, policy, step.

    torchrun trainer/grpo.py --model CHECKPOINT --data records.json      one process per GPU: --nproc_per_node 8
    torchrun trainer/grpo.py                                             the drawn demo, cold start included

Left out, on purpose: a critic, a reward model, padding, logits, and any rollout by older weights.
"""

import contextlib
import copy
import dataclasses
import functools
import sys
import time

import torch

from boxgrpo.kernels import fused_grpo_loss, group_advantages, token_logps
from boxgrpo.model.packing import PackedBatch
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.engine.ddp import make_engine
from boxgrpo.trainer.engine.lora import add_adapters, without_adapters
from boxgrpo.trainer.evaluation.validation import Validation
from boxgrpo.trainer.options import GrpoOptions, loss_options, parse, validate_grpo
from boxgrpo.trainer.profiling.profiler import profiled
from boxgrpo.trainer.rollout.local import Vocabulary, make_rollout, sampler_factor, score
from boxgrpo.trainer.run import loaded_model, make_loader, read_usable, save_pretrained, total_steps
from boxgrpo.trainer.runtime.checkpoints import Checkpoints, Progress
from boxgrpo.trainer.runtime.ranks import Ranks, ranks, run_as_script
from boxgrpo.trainer.runtime.reporter import Reporter, check_output_dir, claim_output_dir
from boxgrpo.trainer.runtime.spans import named_range, span, take_seconds
from boxgrpo.trainer.step.flop import grpo_flop, peak_flop
from boxgrpo.trainer.step.metrics import (
    completion_table,
    length_metrics,
    policy_metrics,
    reward_metrics,
    run_metrics,
    sampling_metrics,
)
from boxgrpo.trainer.step.pack import (
    Budget,
    even_out,
    group_flop,
    in_packs_that_fit,
    make_packs,
    naming_the_remedy,
    trained_groups,
)
from boxgrpo.trainer.step.prefetch import Ahead


def train(options: GrpoOptions, r: Ranks) -> None:
    """Train `options.model` on `options.data`; leaves the checkpoint and the metrics in `options.output_dir`."""
    o = options
    validate_grpo(o, r.world_size)
    processor = Processor.from_pretrained(
        o.model, min_pixels=o.min_pixels, max_pixels=o.max_pixels, max_prompt_tokens=o.max_prompt_length
    )
    examples, faults = read_usable(o, needs="gold")
    validation = Validation(o, processor, r)
    checkpoints = Checkpoints(o, r)
    found = checkpoints.find()
    check_output_dir(o, r, found)
    policy = loaded_model(o, r)
    policy.freeze_vision(o.freeze_vision)
    policy.model.gradient_checkpointing = o.gradient_checkpointing
    if o.lora_rank:
        add_adapters(policy, o)
    copied = frozen_copy(policy, share_vision=o.freeze_vision) if o.beta and not o.lora_rank else None
    vocabulary = Vocabulary.of(processor, policy.config, r.device)
    steps = total_steps(o, len(examples), o.prompts_per_step)
    engine = make_engine(policy, o, r, steps * o.num_iterations)
    reference = engine.frozen(copied) if copied else engine.model if o.beta else None
    progress = checkpoints.load(found, engine) if found else Progress()
    sharded = engine.shards_weights and not o.ds3_gather_for_generation
    rollout = make_rollout(o, processor, vocabulary, policy, examples, r, progress.rollout_bytes, sharded)
    folder = claim_output_dir(o, r, found, progress.metrics_bytes)
    loader = make_loader(examples, processor.prompt, o.prompts_per_step // r.world_size, o, r, progress)
    early = False if engine.shards_weights else None
    images = Ahead(loader, policy, frozen=o.freeze_vision, early=early, sharded=sharded)
    report = Reporter(folder, r, steps, "grpo", start=progress.step)
    logged, budget = progress.step, Budget(o.tokens_per_pass)
    write_model = functools.partial(save_pretrained, policy, processor)

    def first_pass(packs: list[PackedBatch]):
        """Gradients at the rollout's weights; the packs then hold what further iterations compare with."""
        with span("reference", sum(len(p.input_ids) for p in packs)):
            if reference is not None:
                with without_adapters(reference):
                    packs = [dataclasses.replace(p, ref_logps=logps(reference, p, o.temperature)) for p in packs]
            if o.num_iterations > 1 or sampled.logps is not None:
                packs = [dataclasses.replace(p, old_logps=logps(engine.model, p, o.temperature)) for p in packs]
        return packs, *accumulate(o, engine, packs, denominator)

    validation.after_step(progress, steps, policy, engine, report)  # where the run was stopped before it
    for step in profiled(range(progress.step + 1, steps + 1), o, r):
        started = time.perf_counter()
        with span("data"):
            samples = images.samples()
        with span("rollout"), contextlib.nullcontext() if sharded else engine.gathered_weights():
            with span("vision", sum(len(s.item.image_grid_thw) for s in samples)):
                samples, embeds = images.embedded()
            sampled = rollout(policy, samples, embeds)
            samples, embeds = sampled.of(samples), sampled.of(embeds)
            completions = sampled.completions
        with span("reward", sum(map(len, completions))):
            rewards = score(completions, samples, vocabulary, r.device)
            accuracy = rewards.accuracy.view(len(samples), o.num_generations)  # (B, G), IoU in 0-1
            total = accuracy + rewards.format.view_as(accuracy)  # (B, G), 0-2
            advantages, weights, miou = step_advantages(o, total, accuracy, r)
        with span("pack", len(samples)):
            groups = trained_groups(o, samples, sampled, embeds, advantages, weights)
            if o.loss_type != "bnpo":  # its mean is over a rank's own tokens
                groups = even_out(groups, [group_flop(policy.config, g) for g in groups], r)
            counts = r.sum(sum(map(len, completions)), sum(len(c) for g in completions for c in g))
            denominator = loss_denominator(o, *counts, r)
        skipped = 0
        for iteration in range(o.num_iterations):
            if iteration == 0:
                make = functools.partial(make_packs, policy.config, engine)
                packs, loss, stats = in_packs_that_fit(groups, budget, engine, make, first_pass)
            else:
                with naming_the_remedy():
                    loss, stats = accumulate(o, engine, packs, denominator)
            with span("optimizer"):
                grad_norm, updated = engine.step()
            skipped += not updated

        flop = grpo_flop(o, policy.config, samples, completions, groups)
        tokens, flop, asked_to_stop = r.sum(sum(len(p.input_ids) for p in packs), flop, r.stop_asked)  # of all ranks
        progress.step, progress.position, progress.faults = step, images.position, images.faults
        progress.num_tokens += int(tokens)
        progress.skipped_steps += skipped
        report.advance(reward=float(total.mean()), iou=float(accuracy.mean()))
        if step % o.logging_steps == 0 or step == steps:
            metrics = run_metrics(
                r,
                engine,
                progress,
                loss=loss,
                grad_norm=grad_norm,
                tokens=tokens,
                flop=flop,
                peak=peak_flop(o, r.device),
                epoch=images.epoch,
                seconds=time.perf_counter() - started,
                unusable=len(faults),
            )
            metrics |= reward_metrics(total, accuracy, rewards.format, miou, weights)
            metrics |= length_metrics(completions, o.max_completion_length, vocabulary.eos_token_ids)
            metrics |= policy_metrics(stats, r)
            metrics |= sampling_metrics(packs, o.vllm_importance_sampling_clip_max)
            metrics |= take_seconds(step - logged)
            report.log(step, r.mean_metrics(metrics))
            logged = step
        if o.log_completions and step % o.log_completions == 0:
            report.table(f"step {step}", *completion_table(processor, samples, completions, rewards))
        validation.after_step(progress, steps, policy, engine, report, stop=asked_to_stop > 0)
        progress.metrics_bytes, progress.rollout_bytes = report.bytes_written, rollout.written
        checkpoints.after_step(progress, steps, engine, write_model, stop=asked_to_stop > 0)
    checkpoints.save_result(folder, engine, write_model)
    report.close()


def frozen_copy(policy, *, share_vision: bool):
    """The reference. With a frozen tower it has none: the embeddings come with the packs."""
    memo = {id(policy.visual): None} if share_vision else {}
    return copy.deepcopy(policy, memo).requires_grad_(False)


def accumulate(o, engine, packs: list[PackedBatch], denominator):
    """Add the packs' gradients up; the loss (0-dim, this rank's) and each pack's statistics."""
    loss, stats = torch.zeros((), device=engine.ranks.device), []
    with span("policy", len(packs)):
        for pack in packs:
            with span("forward", len(pack.input_ids)):
                pack_loss, pack_stats = engine.model(pack, loss_head(o, pack, denominator))
                if denominator is None:
                    pack_loss = pack_loss / max(1, sum(len(p.targets) > 0 for p in packs))
            with span("backward", len(pack.input_ids)):
                engine.backward(pack_loss)
            loss += pack_loss.detach()
            if len(pack.targets):  # else it only keeps other ranks company
                stats.append(pack_stats)
    return loss, stats


def step_advantages(o, total, accuracy, r: Ranks):
    """This rank's advantages (B, G), weights (B) and mean IoUs (B); `batch` scales by the std over all ranks."""
    if o.scale_rewards != "batch" or r.world_size == 1:
        return group_advantages(total, accuracy, difficulty=o.difficulty, scale=o.scale_rewards)
    everyone = r.gather((total.cpu(), accuracy.cpu()))
    whole = [torch.cat(part).to(total.device) for part in zip(*everyone, strict=True)]
    before = sum(len(theirs) for theirs, _ in everyone[: r.rank])
    mine = slice(before, before + len(total))
    return tuple(x[mine] for x in group_advantages(*whole, difficulty=o.difficulty, scale="batch"))


def loss_denominator(o, completions: float, tokens: float, r: Ranks):
    """What the step's summed loss is divided by on each rank, 0-dim fp32; ranks average their gradients afterwards."""
    whole = {
        "grpo": completions,
        "dapo": tokens,
        "cispo": tokens,
        "dr_grpo": completions * o.max_completion_length,
        "bnpo": None,
    }[o.loss_type]
    return None if whole is None else torch.tensor(whole / r.world_size, device=r.device, dtype=torch.float32)


def loss_head(o, pack: PackedBatch, denominator):
    """The loss as the model's head: called with hidden states (N, H) and the head's weight (V, H)."""

    def head(hidden, weight):
        options = loss_options(
            o,
            old_logps=pack.old_logps,
            ref_logps=pack.ref_logps,
            weights=pack.weights,
            sampler_factor=sampler_factor(pack, o.vllm_importance_sampling_clip_max),
            denominator=denominator,
        )
        with named_range("head+loss", len(hidden), len(weight)):
            return fused_grpo_loss(
                hidden,
                weight,
                pack.targets,
                pack.advantages,
                pack.completion_cu,
                temperature=o.temperature,
                **options._asdict(),
            )

    return head


@torch.no_grad()
def logps(model, pack: PackedBatch, temperature: float) -> torch.Tensor:
    """(N) fp32 log-probabilities of the scored tokens."""

    def head(hidden, weight):
        with named_range("head", len(hidden), len(weight)):
            return token_logps(hidden, weight, pack.targets, temperature=temperature)

    return model(pack, head)


def demo_options(args: list[str] | None, r: Ranks) -> GrpoOptions:
    """Without a model and data: the drawn world and its cold start, made first where there is none."""
    from boxgrpo.trainer import demo  # draws and trains; nobody else pays for its imports

    if r.is_main:
        demo.cold_start(demo.DemoOptions())
    r.barrier()
    return parse(GrpoOptions, [*demo.grpo_flags(demo.DemoOptions()), *(sys.argv[1:] if args is None else args)])


def main(args: list[str] | None = None) -> None:
    options = parse(GrpoOptions, args, prog="grpo.py")
    with ranks(options.timeout) as r, r.noting_sigterm():
        if not options.model and not options.data:
            options = demo_options(args, r)
        train(options, r)


if __name__ == "__main__":
    run_as_script(main, "grpo.py")
