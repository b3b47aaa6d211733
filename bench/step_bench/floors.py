"""Seconds below which no phase of a step can be: FLOP over the measured matrix rate, or bytes over the bandwidth."""

import torch

from boxgrpo.model.step_work import step_work

from .cases import StepCase


def floors(config, case: StepCase, prompt_tokens: float, measured: dict[str, float]) -> dict[str, dict]:
    """The larger of both by phase, and which it is.

    A CPU's copy also reads what it overwrites, a sum in place has to: the bandwidth is that of whichever moves more.

    Args:
        config: the model's Qwen2VLConfig.
        prompt_tokens: the mean over prompts.
        measured: the machine's `ceilings`.
    """
    sizes, dtype = (case.prompts, prompt_tokens, case.generations, case.tokens), getattr(torch, case.dtype)
    counted = step_work(config, case.grids, sizes, dtype, masters=case.masters)
    bandwidth = max(measured["bytes_per_second"], measured.get("sum_bytes_per_second", 0.0))
    found = {}
    for phase, (flop, moved) in counted.items():
        by_flop, by_bytes = flop / measured["flop_per_second"], moved / bandwidth
        found[phase] = {
            "gflop": round(flop / 1e9, 2),
            "gbytes": round(moved / 1e9, 3),
            "floor_s": round(max(by_flop, by_bytes), 4),
            "floor_is": "bytes" if by_bytes > by_flop else "flop",
        }
    return found
