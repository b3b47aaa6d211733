"""A step's metrics, under TRL's names where TRL has one."""

import torch

from boxgrpo.trainer.rollout.local import sampler_factor, sampler_gap
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.runtime.reporter import peak_memory_gb


def run_metrics(
    r: Ranks, engine, progress, *, loss, grad_norm, tokens, flop, peak, epoch, seconds, unusable: int
) -> dict[str, float]:
    """What both loops tell of a step: `tokens`, `flop` and `seconds` are the step's, `progress` the run's.

    `peak`: FLOP a second of a device; None where it is not known, and no utilisation is told.
    """
    utilisation = {} if peak is None else {"perf/mfu": flop / (seconds * peak * r.world_size)}
    return utilisation | {
        "loss": float(loss),
        "grad_norm": float(grad_norm),
        "learning_rate": engine.learning_rate,
        "epoch": epoch,
        "num_tokens": progress.num_tokens,
        "skipped_steps": progress.skipped_steps,
        "step_time": seconds,
        "data/skipped": unusable + len(set().union(*r.gather(set(progress.faults)))),
        "perf/tokens_per_second": tokens / seconds,
        "perf/peak_memory_gb": peak_memory_gb(r.device),
    }


def reward_metrics(total, accuracy, format, miou, weights) -> dict[str, float]:
    """Rewards over the rank's completions, and how hard its groups were (paper Figure 3)."""
    if not len(total):
        return {}
    spread = total.std(dim=1)
    return {
        "reward": float(total.mean()),
        "reward_std": float(spread.mean()),
        "frac_reward_zero_std": float((total == total[:, :1]).all(1).float().mean()),
        "rewards/accuracy/mean": float(accuracy.mean()),
        "rewards/accuracy/std": float(accuracy.std()),
        "rewards/format/mean": float(format.mean()),
        "rewards/format/std": float(format.std()),
        "difficulty/easy": float((miou > 0.7).float().mean()),
        "difficulty/medium": float(((miou >= 0.3) & (miou <= 0.7)).float().mean()),
        "difficulty/hard": float((miou < 0.3).float().mean()),
        "difficulty/weight_mean": float(weights.mean()),
    }


def length_metrics(completions, limit: int, eos: tuple[int, ...]) -> dict[str, float]:
    """Tokens per completion, and the share that never reached its end token."""
    flat = [c for group in completions for c in group]
    lengths = [len(c) for c in flat]
    if not lengths:
        return {}
    clipped = sum(len(c) == limit and int(c[-1]) not in eos for c in flat)
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": clipped / len(flat),
    }


def policy_metrics(stats, r: Ranks) -> dict[str, float]:
    """Token means over the step's packs on all ranks; the same on each of them."""
    tokens = [len(s.logps) for s in stats]
    means = {  # one row a pack
        "kl": [s.kl for s in stats],
        "entropy": [s.entropy.sum() / max(1, len(s.entropy)) for s in stats],
        "clip_ratio/low_mean": [s.clip_low for s in stats],
        "clip_ratio/high_mean": [s.clip_high for s in stats],
        "clip_ratio/region_mean": [s.clip_region for s in stats],
    }
    table = torch.zeros(len(means), 0, dtype=torch.float64)  # of a step whose groups all had equal rewards
    if stats:
        table = torch.stack([torch.stack(values) for values in means.values()]).double().cpu()  # (5, packs)
    *sums, total = r.sum(*(table @ torch.tensor(tokens, dtype=torch.float64)).tolist(), sum(tokens))
    return {name: value / max(1, total) for name, value in zip(means, sums, strict=True)}


def sampling_metrics(packs, cap: float) -> dict[str, float]:
    """How far a foreign sampler is from the policy that it had the weights of, over the rank's tokens."""
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


def completion_table(processor, samples, completions, rewards) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: the first prompts of the step with their best and worst completion."""
    rows = []
    accuracy = rewards.accuracy.view(len(samples), -1).tolist()
    for sample, group, ious in list(zip(samples, completions, accuracy, strict=True))[:4]:
        for g in sorted({ious.index(max(ious)), ious.index(min(ious))}):
            gold = ", ".join(f"{v:.0f}" for v in sample.example.gold)
            rows.append([sample.example.question, gold, processor.decode(group[g]), f"{ious[g]:.2f}"])
    return ["question", "gold", "completion", "IoU"], rows
