"""A step's metrics, under TRL's names where TRL has one."""

from collections.abc import Sequence

import torch

from boxgrpo.model.batch import Group
from boxgrpo.model.cost import published_peak
from boxgrpo.model.families import Qwen2VL
from boxgrpo.trainer.rewards.grounding import StepRewards, equal_rewards
from boxgrpo.trainer.rollout.base import sampler_factor, sampler_gap
from boxgrpo.trainer.runtime.ranks import Ranks

# Groups by their mean IoU.
KINDS = {"easy": lambda m: m > 0.7, "medium": lambda m: (m >= 0.3) & (m <= 0.7), "hard": lambda m: m < 0.3}


def peak_flop(o, device: torch.device) -> float | None:
    """The device's peak in FLOP/s: `peak_tflops`, else the published value for bf16; None if neither is known."""
    if o.peak_tflops:
        return 1e12 * o.peak_tflops
    if device.type != "cuda" or o.dtype not in ("auto", "bfloat16"):
        return None
    return published_peak(torch.cuda.get_device_name(device))


def grpo_flop(o, policy: Qwen2VL, sampled: Sequence[Group], trained: Sequence[Group]) -> float:
    """FLOP of this rank's part of a GRPO step.

    Args:
        sampled: the groups that were sampled here.
        trained: the groups that are trained here; those without a gradient are not among them.
    """
    flop = 0.0
    for group in sampled:
        if o.rollout != "replay":
            flop += policy.group_flop(group)
        if o.rollout != "replay" or o.freeze_vision:  # a frozen tower runs once for all passes
            flop += policy.tower_flop(group.prompt.image_grid_thw)
    extra_passes = bool(o.beta) + (o.num_iterations > 1 or o.rollout == "vllm")  # forward passes for ref and old logps
    for group in trained:
        tower = 0.0 if o.freeze_vision else policy.tower_flop(group.prompt.image_grid_thw)
        decoder = policy.group_flop(group)
        flop += extra_passes * (decoder + tower) + o.num_iterations * ((2 if o.lora_rank else 3) * decoder + 3 * tower)
    return flop


def sft_flop(o, policy: Qwen2VL, groups: Sequence[Group]) -> float:
    """FLOP of this rank's part of a step of supervised training."""
    decoder = sum(policy.group_flop(group) for group in groups)
    tower = sum(policy.tower_flop(group.prompt.image_grid_thw) for group in groups)
    return (2 if o.lora_rank else 3) * decoder + (1 if o.freeze_vision else 3) * tower


def completion_metrics(
    groups: Sequence[Group], rewards: StepRewards, trained: StepRewards, limit: int, eos: tuple[int, ...], r: Ranks
) -> dict[str, float]:
    """Rewards and lengths of the rank's completions, and shares of easy, medium and hard groups (paper, Figure 3).

    `completions/clipped_ratio` is the share that reached `limit` tokens without an end token. Where ranks have unequal
    numbers of groups, means are scaled so that their mean over the ranks with groups is that over all groups.
    `difficulty/gradient_x` is the part that groups of kind x have in the gradient, by the sum of |advantage| x
    difficulty weight over the `trained` groups of all ranks.
    """
    scales = trained.advantages.abs().sum(1) * trained.weights  # (B)
    sums = [float(scales[is_kind(trained.miou)].sum()) for is_kind in KINDS.values()]
    total_groups, ranks, *sums = r.sum(len(groups), len(groups) > 0, *sums)
    if not groups:
        return {}
    scale = len(groups) * ranks / total_groups
    total = rewards.total
    flat = [c for group in groups for c in group.completions]
    lengths = [len(c) for c in flat]
    clipped = sum(len(c) == limit and int(c[-1]) not in eos for c in flat)
    means = {
        "reward": float(total.mean()),
        "reward_std": float(total.std(dim=1).mean()),
        "frac_reward_zero_std": float(equal_rewards(total).float().mean()),
        "rewards/accuracy/mean": float(rewards.accuracy.mean()),
        "rewards/accuracy/std": float(rewards.accuracy.std()),
        "rewards/format/mean": float(rewards.format.mean()),
        "rewards/format/std": float(rewards.format.std()),
        **{f"difficulty/{kind}": float(is_kind(rewards.miou).float().mean()) for kind, is_kind in KINDS.items()},
        "difficulty/weight_mean": float(rewards.weights.mean()),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/clipped_ratio": clipped / len(flat),
    }
    shares = {f"difficulty/gradient_{kind}": part / max(sum(sums), 1e-9) for kind, part in zip(KINDS, sums)}
    lengths_range = {"completions/min_length": min(lengths), "completions/max_length": max(lengths)}
    return {name: value * scale for name, value in means.items()} | shares | lengths_range


def policy_metrics(stats, r: Ranks) -> dict[str, float]:
    """Token means over the step's packs on all ranks; the same on each of them."""
    tokens = [len(s.logps) for s in stats]
    means = {  # one value per pack
        "kl": [s.kl for s in stats],
        "entropy": [s.entropy.sum() / max(1, len(s.entropy)) for s in stats],
        "clip_ratio/low_mean": [s.clip_low for s in stats],
        "clip_ratio/high_mean": [s.clip_high for s in stats],
        "clip_ratio/region_mean": [s.clip_region for s in stats],
    }
    table = torch.zeros(len(means), 0, dtype=torch.float64)  # if no group of the step had a gradient
    if stats:
        table = torch.stack([torch.stack(values) for values in means.values()]).double().cpu()  # (5, packs)
    *sums, total = r.sum(*(table @ torch.tensor(tokens, dtype=torch.float64)).tolist(), sum(tokens))
    return {name: value / max(1, total) for name, value in zip(means, sums, strict=True)}


def sampling_metrics(packs, cap: float) -> dict[str, float]:
    """Differences between vLLM's log-probabilities and the policy's at the same weights, over the rank's tokens."""
    packs = [p for p in packs if p.sampler_logps is not None]
    if not packs:
        return {}
    difference = torch.cat([sampler_gap(p).abs() for p in packs])
    factor = torch.cat([sampler_factor(p, cap) for p in packs])
    return {
        "sampling/sampling_logp_difference/mean": float(difference.mean()),
        "sampling/sampling_logp_difference/max": float(difference.max()),
        "sampling/importance_sampling_ratio/min": float(factor.min()),
        "sampling/importance_sampling_ratio/mean": float(factor.mean()),
        "sampling/importance_sampling_ratio/max": float(factor.max()),
    }


def completion_table(processor, groups: Sequence[Group], accuracy) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: the first prompts of the step with their best and worst completion, by IoU (B, G)."""
    rows = []
    for group, ious in list(zip(groups, accuracy.tolist(), strict=True))[:4]:
        for g in sorted({ious.index(max(ious)), ious.index(min(ious))}):
            gold = ", ".join(f"{v:.0f}" for v in group.record.gold)
            rows.append([group.record.question, gold, processor.decode(group.completions[g]), f"{ious[g]:.2f}"])
    return ["question", "gold", "completion", "IoU"], rows
