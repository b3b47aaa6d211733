"""The least that each phase of a GRPO step must compute and move, whoever runs it.

With B prompts of P tokens and p patches, G completions of C tokens, N = B·G·C scored tokens, T = B·P + N tokens in all,
L weights in the decoder's matrices, a head of V x H, and layers of width H (vision: E) whose attention meets `pairs`
query-key pairs (4·width FLOP each, two products):

    vision          2·B·p·(patch embedding + blocks) + 2·B·p/4·merger + attention within each image
    prefill         2·B·P·L + attention over each prompt, causal
    decode          2·B·G·(C·V·H + (C-1)·L) + attention of each new token over its prompt and its own past
    reference       2·T·L + 2·N·V·H + attention, a prompt once for its G completions
    policy forward  2·T·L + 6·N·V·H + attention: the fused head gives its gradients with its loss
    backward        twice the decoder's forward

Bytes are those of weights read once a pass, of the keys and values that decoding reads, and of AdamW's state. A floor
is the larger of FLOP over the measured matrix rate and bytes over the measured bandwidth.
"""

import torch
from torch import nn

from boxgrpo.bench.kernel_bench.kernels_table import ceilings, device, median_seconds
from boxgrpo.model.families.qwen2_vl import Qwen2VL

from .cases import StepCase


def limits() -> dict[str, float]:
    """FLOP a second of a product, bytes a second of a copy and of a sum in place.

    A CPU's copy also reads what it is about to overwrite; a sum in place has to. So the floors of a step take whichever
    moves more, and those of kernels the copy.
    """
    found = ceilings()
    n = 2**28 if device().type == "cuda" else 2**24
    a, b = torch.randn(2, n, device=device())
    moved = 12 * n / median_seconds(lambda: b.add_(a))
    return found | {"sum_bytes_per_second": moved}


def most_bytes(measured: dict[str, float]) -> float:
    """Bytes a second that a step's floors are made with."""
    return max(measured["bytes_per_second"], measured.get("sum_bytes_per_second", 0.0))


def work(config, case: StepCase, prompt_tokens: float, trained: int) -> dict[str, tuple[float, float]]:
    """FLOP and bytes of each phase.

    Args:
        config: the model's Qwen2VLConfig.
        prompt_tokens: P.
        trained: parameters that the optimizer updates.
    """
    with torch.device("meta"):
        model = Qwen2VL(config)
    text, vision = config.text_config, config.vision_config
    size = getattr(torch, case.dtype).itemsize
    b, g, c, p = case.prompts, case.generations, case.tokens, prompt_tokens
    n, width, patches = b * g * c, text.hidden_size, b * case.patches
    t = b * p + n
    decoder, head = _matrices(model.model.layers), text.vocab_size * width
    kv = 2 * size * text.num_hidden_layers * width * text.num_key_value_heads // text.num_attention_heads  # a token's

    def attention(pairs: float) -> float:
        return 4.0 * width * text.num_hidden_layers * pairs

    in_prompts = b * p * (p + 1) / 2
    in_completions = b * g * (c * p + c * (c + 1) / 2)
    in_images = patches * case.patches / max(1, case.images)
    tower = 2.0 * patches * (_matrices(model.visual.patch_embed) + _matrices(model.visual.blocks))
    tower += 2.0 * patches / vision.spatial_merge_size**2 * _matrices(model.visual.merger)
    tower += 4.0 * vision.embed_dim * vision.depth * in_images
    body = 2.0 * t * decoder + attention(in_prompts + in_completions)
    past = sum(b * p + b * g * step for step in range(1, c))  # keys that the passes of decoding read, in all
    return {
        "vision": (tower, size * _matrices(model.visual)),
        "prefill": (2.0 * b * p * decoder + attention(in_prompts), size * decoder),
        "decode": (
            2.0 * b * g * (c * head + (c - 1) * decoder) + attention(b * g * sum(p + step for step in range(1, c))),
            size * (c * head + (c - 1) * decoder) + kv * past,
        ),
        "reference": (body + 2.0 * n * head, size * (decoder + head)),
        "policy_forward": (body + 6.0 * n * head, size * (decoder + 2 * head)),
        "head_and_loss": (6.0 * n * head, size * 2 * head),  # part of the forward
        "backward": (2 * body, 2 * size * decoder),
        # Clipping reads the gradient; the update reads weight, gradient and moments in fp32 and writes all but the
        # gradient. Below fp32 the model's own weights are written as well, or, without masters, all is in their dtype.
        "optimizer": (0.0, trained * (8 * 4 + (size if size < 4 else 0) if case.masters else 8 * size)),
    }


def floors(counted: dict[str, tuple[float, float]], measured: dict[str, float]) -> dict[str, dict]:
    """Seconds below which no phase can be, and what bounds it."""
    found = {}
    for phase, (flop, moved) in counted.items():
        by_flop, by_bytes = flop / measured["flop_per_second"], moved / most_bytes(measured)
        found[phase] = {
            "gflop": round(flop / 1e9, 2),
            "gbytes": round(moved / 1e9, 3),
            "floor_s": round(max(by_flop, by_bytes), 4),
            "floor_is": "bytes" if by_bytes > by_flop else "flop",
        }
    return found


def _matrices(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim > 1)
