"""FLOP that a step asks for, and what a device can do at most: a run's `perf/mfu` is their ratio.

Counted is what the method needs, whoever computes it: a prompt once for its G completions, a layer's forward once
however often checkpointing repeats it. A product's backward is two of its forward, and one where its weight is frozen.
"""

from collections.abc import Sequence

import torch

from boxgrpo.model.packing import Conversation, Group, forward_flop, tower_flop
from boxgrpo.trainer.data.loader import Sample

# Dense bf16 products in 1e12 FLOP/s, by words of the device's name: NVIDIA's data sheets. The first that fits counts.
PEAKS = {
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
}


def peak_flop(o, device: torch.device) -> float | None:
    """FLOP a second that a device can do; None where neither `peak_tflops` nor the table says.

    The table is of bf16; at another dtype nothing is known.
    """
    if o.peak_tflops:
        return 1e12 * o.peak_tflops
    if device.type != "cuda" or o.dtype not in ("auto", "bfloat16"):
        return None
    return published(torch.cuda.get_device_name(device))


def published(name: str) -> float | None:
    """FLOP a second for a device's name, `NVIDIA H200` or `NVIDIA A100-SXM4-80GB`; a slice of one (MIG) is unknown."""
    words = f" {name.replace('-', ' ')} "
    if " MIG " in words:
        return None
    return next((1e12 * peak for part, peak in PEAKS.items() if f" {part} " in words), None)


def grpo_flop(o, config, samples: Sequence[Sample], completions, groups: Sequence[Group]) -> float:
    """FLOP of this rank's part of a step.

    Args:
        config: the policy's Qwen2VLConfig.
        samples, completions: what was sampled here, B prompts and G completions of each.
        groups: what is trained here; groups without a gradient are not among them.
    """
    flop = 0.0
    for sample, group in zip(samples, completions, strict=True):
        if o.rollout != "replay":
            flop += _decoder(config, sample.item, group)
        if o.rollout != "replay" or o.freeze_vision:  # whose images are seen once for all passes
            flop += tower_flop(config, sample.item.image_grid_thw)
    compared = bool(o.beta) + (o.num_iterations > 1 or o.rollout == "vllm")  # with reference and older weights
    for group in groups:
        tower = 0.0 if o.freeze_vision else tower_flop(config, group.prompt.image_grid_thw)
        decoder = _decoder(config, group.prompt, group.completions)
        flop += compared * (decoder + tower) + o.num_iterations * ((2 if o.lora_rank else 3) * decoder + 3 * tower)
    return flop


def sft_flop(o, config, conversations: Sequence[Conversation]) -> float:
    """FLOP of this rank's part of a step of supervised training."""
    flop = 0.0
    for c in conversations:
        flop += (2 if o.lora_rank else 3) * forward_flop(config, len(c.input_ids), (), int(c.loss_mask.sum()))
        flop += (1 if o.freeze_vision else 3) * tower_flop(config, c.image_grid_thw)
    return flop


def _decoder(config, prompt, completions) -> float:
    """A forward over a prompt and its completions: to sample them costs as much, prefill and decode together."""
    lengths = [len(c) for c in completions]
    return forward_flop(config, len(prompt.input_ids), lengths, sum(lengths))
