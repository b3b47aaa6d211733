"""The least that each phase of a GRPO step must compute and move, whoever runs it.

FLOP are those of the model's `forward_flop` and `tower_flop`: B prompts of P tokens and their images, G completions of
C tokens, N = B·G·C scored tokens.

    vision          the tower over all images, once
    prefill         the decoder over the prompts
    decode          the decoder over C - 1 tokens of each completion, the head over all C
    reference       decoder and head over prompts and completions, a prompt once for its G completions
    policy forward  the same, with three products of the head: the fused head gives its gradients with its loss
    backward        twice the decoder's forward

Bytes are those of weights read once a pass, of the keys and values that decoding reads, and of AdamW's state.
"""

import torch
from torch import Tensor, nn

from .decoder import head_dim
from .families import make_model


def step_work(
    config,
    grids: Tensor,
    sizes: tuple[int, float, int, int],
    dtype: torch.dtype,
    *,
    masters: bool,
) -> dict[str, tuple[float, float]]:
    """FLOP and bytes of each phase.

    Args:
        config: the model's.
        grids: (I, 3) patches of all images of the step.
        sizes: B, P (the mean over prompts), G and C.
        dtype: of the weights.
        masters: AdamW updates fp32 copies of them.
    """
    with torch.device("meta"):
        model = make_model(config)
    text, size, (b, p, g, c) = config.text_config, dtype.itemsize, sizes
    trained = sum(w.numel() for name, w in model.named_parameters() if not name.startswith("visual."))
    decoder, head = _matrices(model.model.layers), text.vocab_size * text.hidden_size
    kv = 2 * size * text.num_hidden_layers * text.num_key_value_heads * head_dim(text)
    past = sum(b * p + b * g * step for step in range(1, c))  # keys that the passes of decoding read, in all
    scored = model.forward_flop(0, (), b * g * c)  # by one product of the head
    prefill, body = (b * model.forward_flop(p, own, 0) for own in ((), [c] * g))
    decode = b * model.forward_flop(p, [c - 1] * g, 0) - prefill + scored
    return {
        "vision": (model.tower_flop(grids), size * _matrices(model.visual)),
        "prefill": (prefill, size * decoder),
        "decode": (decode, size * (c * head + (c - 1) * decoder) + kv * past),
        "reference": (body + scored, size * (decoder + head)),
        "policy_forward": (body + 3 * scored, size * (decoder + 2 * head)),
        "head_and_loss": (3 * scored, size * 2 * head),  # part of the forward
        "backward": (2 * body, 2 * size * decoder),
        # Clipping reads the gradient; the update reads weight, gradient and moments in fp32 and writes all but the
        # gradient. Below fp32 the model's own weights are written as well, or, without masters, all is in their dtype.
        "optimizer": (0.0, trained * (8 * 4 + (size if size < 4 else 0) if masters else 8 * size)),
    }


def _matrices(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim > 1)
