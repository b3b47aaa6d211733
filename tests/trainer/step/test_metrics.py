"""Metrics of a step by hand; its FLOP against torch's own count, and the peaks that a run compares them with."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from boxgrpo.model.batch import Conversation, Group
from boxgrpo.model.cost import published_peak
from boxgrpo.trainer.options import GrpoOptions, SftOptions
from boxgrpo.trainer.rewards.grounding import StepRewards
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.step.metrics import completion_metrics, grpo_flop, peak_flop, policy_metrics, sft_flop


def test_peaks_are_known_by_name_or_by_flag():
    assert published_peak("NVIDIA H200") == published_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert published_peak("NVIDIA H100 PCIe") == 756e12 and published_peak("NVIDIA A100-SXM4-80GB") == 312e12
    for unknown in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla T4", "NVIDIA L40"):
        assert published_peak(unknown) is None
    cpu = torch.device("cpu")
    assert peak_flop(GrpoOptions(), cpu) is None and peak_flop(GrpoOptions(peak_tflops=1.5), cpu) == 1.5e12
    assert peak_flop(GrpoOptions(dtype="float32"), torch.device("cuda")) is None


def test_the_flop_of_a_step_are_those_of_its_passes(twins, make_prompt):
    """In forward passes of tower and decoder; the tower's as torch counts them, with attention's full square."""
    model, prompt = twins("tiny")[0], make_prompt([(1, 4, 6)], words=60)
    group = Group(prompt, [torch.arange(3), torch.arange(5)])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.visual(prompt.pixel_values, prompt.image_grid_thw)
    tower = counter.get_total_flops()

    def flop(**changes):
        return grpo_flop(GrpoOptions(**changes), model, [group], [group])

    decoder = flop(rollout="replay", beta=0.0) - tower
    assert flop(rollout="replay", beta=0.0, lora_rank=4) - tower == pytest.approx(2 / 3 * decoder)
    forward = decoder / 3
    text, tokens = model.config.text_config, len(prompt.input_ids) + 8
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
    products = 2 * layers * tokens + 2 * 8 * text.vocab_size * text.hidden_size
    assert products < forward < 1.2 * products  # over so few tokens attention adds little
    assert flop(beta=0.0) == pytest.approx(tower + 4 * forward)  # sampling costs as much as a forward
    assert flop() == pytest.approx(tower + 5 * forward)  # the reference
    # The old log-probabilities and a second pass of the policy; then rollout, reference and three of the policy.
    assert flop(num_iterations=2) == pytest.approx(tower + 9 * forward)
    assert flop(freeze_vision=False) == pytest.approx(5 * tower + 5 * forward)


def test_supervised_training_counts_a_forward_and_two_backward(twins, make_prompt):
    model, prompt = twins("tiny")[0], make_prompt([(1, 4, 6)])
    prompt = Conversation(**vars(prompt), loss_mask=torch.ones(len(prompt.input_ids), dtype=torch.bool))
    frozen, whole = (sft_flop(SftOptions(freeze_vision=f), model, [Group(prompt)]) for f in (True, False))
    tower = (whole - frozen) / 2
    assert sft_flop(SftOptions(lora_rank=4), model, [Group(prompt)]) == pytest.approx((frozen - tower) * 2 / 3 + tower)


def test_completions_by_hand():
    """Clipped is what reached the limit without an end token, not what ended there."""
    completions = [[[5, 6, 7, 8], [5, 6, 7, 9]], [[9], [5, 9]], [[9], [9]]]
    groups = [Group(None, list(map(torch.tensor, group))) for group in completions]
    accuracy = torch.tensor([[1.0, 0.8], [0.3, 0.3], [0.2, 0.0]])
    form = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    weights = torch.tensor([0.5, 1.0, 3.0])
    advantages = torch.tensor([[0.5, -0.5], [0.0, 0.0], [1.0, -1.0]])
    rewards = StepRewards(accuracy, form, accuracy + form, advantages, weights, accuracy.mean(1))
    metrics = completion_metrics(groups, rewards, rewards, 4, (9,), Ranks())
    assert metrics["reward"] == pytest.approx((2.0 + 0.8 + 1.3 + 1.3 + 1.2 + 1.0) / 6)
    assert metrics["reward_std"] == pytest.approx((1.2 + 0.0 + 0.2) / 2**0.5 / 3)  # of two values: |a - b| / sqrt 2
    assert metrics["frac_reward_zero_std"] == pytest.approx(1 / 3)
    assert metrics["rewards/accuracy/mean"] == pytest.approx(2.6 / 6)
    assert metrics["rewards/format/mean"] == pytest.approx(5 / 6)
    # Mean IoU 0.9 is easy, 0.1 hard, and 0.3 itself still medium.
    shares = [metrics[f"difficulty/{name}"] for name in ("easy", "medium", "hard")]
    assert shares == pytest.approx([1 / 3] * 3)
    assert metrics["difficulty/weight_mean"] == pytest.approx(1.5)
    parts = [metrics[f"difficulty/gradient_{name}"] for name in ("easy", "medium", "hard")]
    assert parts == pytest.approx([1.0 * 0.5 / 6.5, 0, 2.0 * 3.0 / 6.5])
    lengths = [metrics[f"completions/{name}_length"] for name in ("mean", "min", "max")]
    assert lengths == [13 / 6, 1, 4] and metrics["completions/clipped_ratio"] == 1 / 6


def test_means_over_ranks_count_every_group_alike():
    """One group here, two on the other rank: the mean of what the ranks report is that over three groups."""

    class Two(Ranks):
        def sum(self, *values):
            return [3, 2, 0, 0, 0]  # groups, ranks that have some, and gradients

    reported = []
    for rank, total in ((0, [[2.0, 0.0]]), (1, [[1.0, 1.0], [1.0, 0.0]])):
        total = torch.tensor(total)
        groups = [Group(None, [torch.tensor([9]), torch.tensor([5, 9])]) for _ in total]
        rewards = StepRewards(total, 0 * total, total, total, total.mean(1), total.mean(1))
        reported.append(completion_metrics(groups, rewards, rewards, 4, (9,), Two(rank, 2)))
    mean = {name: sum(m[name] for m in reported) / 2 for name in reported[0]}
    assert mean["reward"] == pytest.approx(5 / 6) and mean["frac_reward_zero_std"] == pytest.approx(1 / 3)
    assert mean["completions/mean_length"] == 1.5 and [m["completions/max_length"] for m in reported] == [2, 2]


def test_a_part_of_the_gradient_is_that_of_the_trained_groups_over_all_ranks():
    """Two groups here, of which the easy one is trained; one as easy and a hard one, with 3 times that, there."""

    class Two(Ranks):
        def sum(self, *values):
            return [sum(pair) for pair in zip(values, (2, 1, 2.0, 0.0, 6.0), strict=True)]

    advantages = torch.tensor([[1.0, -1.0], [5.0, -5.0]])
    rewards = StepRewards(*[advantages] * 4, weights=torch.ones(2), miou=torch.tensor([0.9, 0.1]))
    groups = [Group(None, [torch.tensor([9])] * 2)] * 2
    for kept, r, expected in ((1, Two(0, 2), [0.4, 0, 0.6]), (0, Ranks(), [0, 0, 0])):
        metrics = completion_metrics(groups, rewards, StepRewards(*(x[:kept] for x in rewards)), 4, (9,), r)
        parts = [metrics[f"difficulty/gradient_{name}"] for name in ("easy", "medium", "hard")]
        assert parts == pytest.approx(expected)


def test_policy_metrics_weigh_every_token_alike():
    """Packs of 1 and 3 tokens: the mean over four tokens, not over two packs."""

    def pack(kl, entropy, clip):
        low, high, region = map(torch.tensor, clip)
        return SimpleNamespace(
            kl=torch.tensor(kl),
            entropy=torch.tensor(entropy),
            logps=torch.zeros(len(entropy)),
            clip_low=low,
            clip_high=high,
            clip_region=region,
        )

    stats = [pack(0.4, [2.0], (1.0, 0.0, 1.0)), pack(0.0, [1.0, 1.0, 4.0], (0.0, 1 / 3, 1 / 3))]
    assert policy_metrics(stats, Ranks()) == pytest.approx(
        {
            "kl": 0.1,
            "entropy": 2.0,
            "clip_ratio/low_mean": 0.25,
            "clip_ratio/high_mean": 0.25,
            "clip_ratio/region_mean": 0.5,
        }
    )
