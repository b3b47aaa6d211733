"""Completions that a model samples, for several test files."""

import torch

from boxgrpo.model.generate import prefill

VISION = torch.tensor([102, 103, 104, 105])  # image pad, video pad, vision start and end
LENGTH = 12


def sample(model, groups, *, eos_token_ids=(101,), max_completion_length=LENGTH, num_generations=1, **options):
    """The completions as lists of ids, and the decoding's `Samples`."""
    decoding = prefill(
        model,
        groups,
        eos_token_ids=eos_token_ids,
        max_completion_length=max_completion_length,
        num_generations=num_generations,
    )
    completions = decoding.run(**{"seed": 0, "forbidden": VISION.to(model.device)} | options)
    return [c.tolist() for c in completions], decoding.results
