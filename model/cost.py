"""The bytes that training holds on each GPU and moves between them, from shapes alone; GPUs' published peaks in FLOP/s.

The formulas of our own code are tested against it; those of DeepSpeed follow the source of 0.19.8.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from boxgrpo.kernels.chunks import MIB, chunk_rows, sweep_rows

from .decoder import head_dim
from .families import Qwen2VL, family_of

FP32 = 4  # bytes
# Numbers of elements: DeepSpeed's defaults in runtime/zero/config.py.
REDUCE_BUCKET, SUB_GROUP, MAX_LIVE, PREFETCH, PERSISTS = 500_000_000, 10**9, 10**9, 50_000_000, 100_000

# Dense bf16 products in 1e12 FLOP/s, by words in the device's name, from NVIDIA's data sheets. The first match counts.
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


def published_peak(name: str) -> float | None:
    """Peak FLOP/s by a device's name, `NVIDIA H200` or `NVIDIA A100-SXM4-80GB`; None if unknown, as for a MIG slice."""
    words = f" {name.replace('-', ' ')} "
    if " MIG " in words:
        return None
    return next((1e12 * peak for part, peak in PEAKS.items() if f" {part} " in words), None)


class Sharding(NamedTuple):
    """How GPUs share the training state: `stage` 0 is our own data parallelism, 1 to 3 are DeepSpeed's ZeRO."""

    name: str
    stage: int
    offload: bool = False  # of masters, moments and their gradients, to the host
    lora: bool = False


class Counts(NamedTuple):
    """Elements of a model's parameters, and how many tensors are trained."""

    trained: int
    frozen: int
    tensors: int
    largest: int  # of one trained tensor
    small: int  # in tensors so small that ZeRO-3 keeps them whole on every GPU
    decoder: int  # decoder and head
    head_trained: bool


class Pack(NamedTuple):
    """The shape of a packed batch."""

    tokens: int  # rows
    keys: int  # rows of keys that the segments read
    scored: int  # scored rows
    masks: int = 0  # elements of SDPA's masks
    plain: bool = False  # torch's ops on a CPU, where SDPA copies its rows and a norm stores the normalised rows too


def count(model: Qwen2VL, lora_rank: int = 0) -> Counts:
    """Counts of a model on any device, meta included; with `lora_rank`, adapters on its linear layers are trained."""
    shapes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = [n for n, wanted in shapes if wanted]
    if lora_rank:
        linears = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
        trained = [lora_rank * n for m in linears for n in (m.in_features, m.out_features)]
    everything = [n for n, _ in shapes]
    tower = getattr(model, "visual", None)  # a reference has none
    return Counts(
        trained=sum(trained),
        frozen=sum(everything) - (0 if lora_rank else sum(trained)),
        tensors=len(trained),
        largest=max(trained),
        small=sum(n for n in everything + (trained if lora_rank else []) if n <= PERSISTS),
        decoder=sum(everything) - (sum(p.numel() for p in tower.parameters()) if tower else 0),
        head_trained=not lora_rank and model.head_weight.requires_grad,
    )


def state_bytes(c: Counts, engine: Sharding, gpus: int, size: int) -> dict[str, int]:
    """Bytes held throughout a step: weights, gradients, masters and moments on the GPU, and the total on the host.

    Source: `trainer/engine/ddp.py`; DeepSpeed's `runtime/zero/stage_1_and_2.py`, `stage3.py` and
    `runtime/bf16_optimizer.py`.

    Args:
        size: bytes of a weight.
    """
    whole, trained = size * (c.trained + c.frozen), math.ceil(c.trained / gpus)
    if engine.stage == 0:
        masters = FP32 * c.trained if size < FP32 else 0
        moments = 2 * FP32 * c.trained + FP32 * c.tensors  # torch stores the number of steps for each tensor
        return {"weights": whole, "gradients": FP32 * c.trained, "masters": masters, "moments": moments, "host": 0}
    # From stage 2 on `trainer/engine/deepspeed.py` has gradients summed in fp32.
    gradients = size * c.trained if engine.stage == 1 else FP32 * trained
    weights = size * (math.ceil((c.trained + c.frozen) / gpus) + c.small) if engine.stage == 3 else whole
    masters = 0 if engine.stage == 3 and size == FP32 else FP32 * trained
    moments, host = 2 * FP32 * trained, 0
    if engine.offload:
        host = masters + moments + FP32 * trained + (FP32 if engine.stage == 3 else size) * trained
        masters = moments = 0
        # Stage 1 accumulates on the GPU nonetheless; 2 moves one tensor at a time to the host, 3 one bucket.
        gradients = {1: gradients, 2: size * c.largest, 3: 0}[engine.stage]
    return {"weights": weights, "gradients": gradients, "masters": masters, "moments": moments, "host": host}


def reference_bytes(c: Counts, engine: Sharding, gpus: int, size: int, beta: float) -> int:
    """Bytes of the reference: decoder and head, sharded like the policy; with LoRA none, it is the policy itself."""
    if engine.lora or not beta:
        return 0
    return size * (math.ceil(c.decoder / gpus) if engine.stage == 3 else c.decoder)


def cache_bytes(config, prompts: int, prompt_tokens: int, completions: int, tokens: int, size: int) -> int:
    """Bytes of a cache for decoding: keys and values of every prompt once and of each completion, and small tensors."""
    text = config.text_config
    kv_width = head_dim(text) * text.num_key_value_heads
    rows = prompts * prompt_tokens + completions * tokens
    return 2 * text.num_hidden_layers * kv_width * size * rows + prompts * prompt_tokens + 8


def layer_bytes(config, pack: Pack, size: int, lora_rank: int = 0) -> int:
    """Bytes that a decoder layer stores for its backward, its input included.

    For a row: input and output of two norms, query, mixed values, gate, up, silu(gate) and their product, and in fp32
    two reciprocal norms and each head's log-sum-exp. For a row of keys: key and value. Norms of queries and keys add
    their inputs, and in fp32 a reciprocal norm of each head.
    """
    text = config.text_config
    hidden, heads, kv_heads = text.hidden_size, text.num_attention_heads, text.num_key_value_heads
    wide, kv_width = heads * head_dim(text), kv_heads * head_dim(text)
    width = (6 * hidden + 3 * wide if pack.plain else 4 * hidden + 2 * wide) + 4 * text.intermediate_size
    floats = 2 + heads
    if family_of(config).decoder_kind.head_norms:
        width += (2 if pack.plain else 1) * (wide + kv_width)
        floats += heads + kv_heads
    rows = pack.tokens * (size * (width + 7 * lora_rank) + FP32 * floats)
    return rows + size * (2 * kv_width * pack.keys + pack.masks)


def activation_bytes(config, pack: Pack, size: int, *, checkpointing=False, head_trained=True, lora_rank=0) -> int:
    """Bytes stored by decoder and fused loss after the forward, gradients of hidden states and head included."""
    text = config.text_config
    hidden = text.hidden_size
    layer = layer_bytes(config, pack, size, lora_rank)
    layers = text.num_hidden_layers * layer
    if checkpointing:
        layers = text.num_hidden_layers * pack.tokens * hidden * size
        layers += layer - pack.tokens * hidden * size if lora_rank else 0  # its first layer's input has no gradient
    rotation = 2 * pack.tokens * head_dim(text) * size
    last_norm = pack.tokens * (hidden * size * (2 if pack.plain else 1) + FP32)
    indices = 8 * (pack.tokens + pack.keys + pack.scored)
    loss = hidden * (pack.scored + text.vocab_size * head_trained) * size
    return layers + rotation + last_norm + indices + loss


def loss_bytes(config, pack: Pack, size: int, *, head_trained: bool) -> int:
    """Bytes that the fused loss needs while it runs beside the gradients that it returns (`activation_bytes`).

    Chunks of logits and of their gradients; where these fill several times, a sum of the head's gradient in fp32. The
    returned gradient of the head is made when the logits are free, and a rounded sum when both are. The torch twin
    overwrites logits with gradients, and its backward copies the head's gradient.
    """
    text, n = config.text_config, pack.scored
    vocabulary, head = text.vocab_size, text.hidden_size * text.vocab_size * head_trained
    if pack.plain:
        rows = chunk_rows(vocabulary, torch.float32, torch.device("cpu"), at_least=128)
        return max(min(FP32 * rows * vocabulary, FP32 * n * vocabulary) + 2 * MIB, size * head)
    rows = sweep_rows(n, vocabulary, text.hidden_size, size, head_trained)
    logits, gradients = FP32 * rows.logits * vocabulary, size * rows.gradients * vocabulary
    if rows.gradients == n:
        return gradients + max(logits - size * head, 0)
    return logits + gradients if size == FP32 else FP32 * head + max(logits + gradients - size * head, 0)


def tied_bytes(config, size: int, *, head_trained: bool) -> int:
    """Bytes of a tied embedding's own gradient, which a backward pass ends with beside the head's."""
    text = config.text_config
    return size * text.hidden_size * text.vocab_size if head_trained and config.tie_word_embeddings else 0


def bucket_bytes(c: Counts, engine: Sharding, size: int) -> int:
    """Bytes of DeepSpeed's bucket of gradients and, in stage 3, of the weights that are gathered at a time."""
    buckets = size * min(REDUCE_BUCKET, c.trained) if engine.stage else 0
    return buckets + (live_bytes(c, size) if engine.stage == 3 else 0)


def live_bytes(c: Counts, size: int) -> int:
    """Bytes of the weights that ZeRO-3 holds gathered at a time, prefetched ones included."""
    return size * min(max(MAX_LIVE, c.largest) + PREFETCH, c.trained + c.frozen)


def step_bytes(c: Counts, engine: Sharding, gpus: int, size: int) -> int:
    """Bytes that the optimizer's step needs: ours a flat copy of the largest gradient, ZeRO's the share's in fp32."""
    if engine.stage == 0:
        return FP32 * c.largest if gpus > 1 else 0
    share = 0 if engine.offload else math.ceil(c.trained / gpus)
    return FP32 * min(share, SUB_GROUP) if engine.stage == 3 else (FP32 + size) * share


def traffic(c: Counts, gpus: int, size: int, *, tokens: int, packs: int = 1, beta: float = 0.0) -> dict[str, int]:
    """Bytes that each GPU receives in an optimizer step under ZeRO-3, by cause, with completions of `tokens` tokens.

    Of N GPUs each receives (N-1)/N of what is gathered, and as much of a reduce-scatter, in the weights' dtype. Each
    pack gathers the decoder for the policy's forward, for its backward (a recomputed layer stays gathered for it) and
    for the reference's forward. The tower runs once, before the rollout.
    """
    others = (gpus - 1) / gpus
    decoder, tower = size * c.decoder * others, size * (c.trained + c.frozen - c.decoder) * others
    found = {
        "rollout, weights gathered once": tower + decoder,
        "rollout, gathered for every token": tower + tokens * decoder,
        "forward and backward" + ", reference forward" * bool(beta): (3 if beta else 2) * packs * decoder,
        "gradients": packs * size * c.trained * others,
    }
    return {name: round(moved) for name, moved in found.items()}
