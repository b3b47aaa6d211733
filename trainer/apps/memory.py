"""Compute the memory per GPU of GRPO on Qwen2-VL by engine, and the traffic of a ZeRO-3 step; no weights are loaded.

    boxgrpo memory        2B and 7B on 8 GPUs, a Markdown table
    boxgrpo memory --model 72B --gpus 64 --prompts_per_step 64 --engine 'zero 3' \\
        --ds3_gather_for_generation false --gigabits 400

The tower is frozen, attention is varlen, liger-kernel (which keeps less) is not used. GB are 10^9 bytes. Not counted:
the CUDA context, NCCL's buffers, the allocator's fragmentation, images, the tower's forward, a prefill's widest layer.
"""

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import Qwen2VLConfig

from boxgrpo.model.checkpoint import read_config
from boxgrpo.model.cost import (
    Pack,
    Sharding,
    activation_bytes,
    bucket_bytes,
    cache_bytes,
    count,
    layer_bytes,
    live_bytes,
    loss_bytes,
    reference_bytes,
    state_bytes,
    step_bytes,
    tied_bytes,
    traffic,
)
from boxgrpo.model.families import Qwen2VL, make_model
from boxgrpo.trainer.arguments import check_options, option, parse
from boxgrpo.trainer.options import COUNT, RANGES, GrpoOptions
from boxgrpo.trainer.presence import check_model
from boxgrpo.trainer.runtime.ranks import run_as_script

# The config.json of Qwen/Qwen2-VL-*-Instruct: hidden, intermediate, layers, heads, kv_heads, vocabulary, tied head.
PUBLISHED = {
    "2B": (1536, 8960, 28, 12, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
    "72B": (8192, 29_568, 80, 64, 8, 152_064, False),
}


@dataclass
class MemoryOptions:
    """Memory per GPU by engine, computed; nothing is loaded or downloaded."""

    choices: ClassVar = {"dtype": ("bfloat16", "float32"), "device": ("cuda", "cpu"), "json": ("", "-")}
    ranges: ClassVar = RANGES | dict.fromkeys(("gpus", "lora_rank", "prompt_tokens", "num_generations"), COUNT)
    ranges |= {"gigabits": "[0, 1e6]"}
    model: str = option("", "2B, 7B or 72B, or a folder with a config.json; empty: 2B and 7B.")
    engine: str = option("", "Only engines whose name in the table starts with this; empty: all.")
    gpus: int = option(8, "GPUs that share the step.")
    dtype: str = option("bfloat16", "Dtype of weights and activations: bfloat16 or float32.")
    device: str = option("cuda", "cuda or cpu; on a CPU torch's attention, norms and loss keep other amounts.")
    lora_rank: int = option(16, "LoRA rank in the table, for adapters on all matrices of the decoder.")
    prompt_tokens: int = option(2198, "Tokens of every prompt: four images of 512 each and 150 of text.")
    prompts_per_step: int = option(GrpoOptions.prompts_per_step, "Prompts per optimizer step, over all GPUs.")
    num_generations: int = option(GrpoOptions.num_generations, "Completions per prompt.")
    max_completion_length: int = option(GrpoOptions.max_completion_length, "Tokens of every completion.")
    tokens_per_pass: int = option(GrpoOptions.tokens_per_pass, "Token budget of one packed pass.")
    beta: float = option(GrpoOptions.beta, "Weight of the KL; 0: no reference model.")
    ds3_gather_for_generation: bool = option(True, "ZeRO-3 samples with all weights gathered; false: layer by layer.")
    gigabits: float = option(0.0, "Gigabits per second that each GPU can receive, for the traffic of ZeRO-3; 0: none.")
    json: str = option("", "- prints bytes as JSON; empty: prints the table.")


def engines(lora_rank: int) -> list[Sharding]:
    zero = [Sharding(f"zero {s}{', offload' * cpu}", s, cpu) for s in (1, 2, 3) for cpu in (False, True)]
    lora = [Sharding(f"lora {lora_rank}, {name}", stage, lora=True) for name, stage in (("ddp", 0), ("zero 3", 3))]
    return [Sharding("ddp", 0), *zero, *lora]


def config_of(model: str):
    """The config of a published size of Qwen2-VL or of a checkpoint's folder."""
    if model not in PUBLISHED:
        return read_config(model)
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = PUBLISHED[model]
    text = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": intermediate}
    text |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": hidden}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


def largest_pack(o: MemoryOptions, prompts: int) -> Pack:
    """The largest pack that `make_packs` makes of `prompts` groups; a group above the budget is split into packs."""
    fitting = (o.tokens_per_pass - o.prompt_tokens) // o.max_completion_length
    completions = min(o.num_generations, max(fitting, 1))
    scored = completions * o.max_completion_length
    tokens = o.prompt_tokens + scored
    groups = max(1, min(prompts, o.tokens_per_pass // tokens))
    keys = tokens + completions * o.prompt_tokens
    on_cpu = o.device == "cpu"  # where completions attend through an explicit mask
    masks = scored * (o.prompt_tokens + o.max_completion_length) * on_cpu
    return Pack(groups * tokens, groups * keys, groups * scored, groups * masks, on_cpu)


def memory(model: Qwen2VL, engine: Sharding, o: MemoryOptions) -> dict[str, int]:
    """Bytes per GPU. `total` is the sum of state, reference and the memory of the phase that needs most.

    Our own engine frees gradients at each update: gradients and activations coexist only if a step has several packs.
    `*_checkpointed` are with gradient checkpointing, where the loss and a recomputed layer never coexist.
    """
    config, size = model.config, getattr(torch, o.dtype).itemsize
    rank, prompts = o.lora_rank if engine.lora else 0, math.ceil(o.prompts_per_step / o.gpus)
    c, pack = count(model, rank), largest_pack(o, prompts)
    found = state_bytes(c, engine, o.gpus, size)
    found["state"] = sum(found[name] for name in ("weights", "gradients", "masters", "moments"))
    found["reference"] = reference_bytes(c, engine, o.gpus, size, o.beta)
    completions = prompts * o.num_generations
    found["cache"] = cache_bytes(config, prompts, o.prompt_tokens, completions, o.max_completion_length, size)
    found["gathered"] = 0
    if engine.stage == 3:
        found["gathered"] = size * (c.trained + c.frozen) if o.ds3_gather_for_generation else live_bytes(c, size)
    found["step"] = step_bytes(c, engine, o.gpus, size)
    held = found["state"] + found["reference"]
    before_backward = held if engine.stage else held - found["gradients"]
    in_one_pack = pack.scored == completions * o.max_completion_length
    rollout = before_backward + found["cache"] + found["gathered"]
    loss = loss_bytes(config, pack, size, head_trained=c.head_trained)
    layer = layer_bytes(config, pack, size, rank)
    last_layer = held + max(layer, tied_bytes(config, size, head_trained=c.head_trained))
    for suffix, checkpointing, beside in (("", False, loss), ("_checkpointed", True, max(loss, layer))):
        options = {"checkpointing": checkpointing, "head_trained": c.head_trained, "lora_rank": rank}
        training = activation_bytes(config, pack, size, **options) + beside + bucket_bytes(c, engine, size)
        found[f"training{suffix}"] = training
        packs = training + (before_backward if in_one_pack else held)
        found[f"total{suffix}"] = max(packs, rollout, last_layer, held + found["step"])
    return found


def report(o: MemoryOptions) -> dict[str, dict]:
    """Bytes per GPU by model and engine; with `gigabits` also each model's traffic under ZeRO-3, bytes a step."""
    check(o)
    found = {}
    for name in [o.model] if o.model else ["2B", "7B"]:
        with torch.device("meta"):
            model = make_model(config_of(name))
        model.freeze_vision()
        chosen = [e for e in engines(o.lora_rank) if e.name.startswith(o.engine)]
        found[name] = {"engines": {e.name: memory(model, e, o) for e in chosen}}
        if o.gigabits:
            size, tokens = getattr(torch, o.dtype).itemsize, o.max_completion_length
            found[name]["traffic"] = traffic(count(model), o.gpus, size, tokens=tokens, beta=o.beta)
    return found


def check(o: MemoryOptions) -> None:
    check_options(o)
    if o.model not in ("", *PUBLISHED):
        check_model(o.model, processor=False)
    names = [e.name for e in engines(o.lora_rank)]
    if not any(name.startswith(o.engine) for name in names):
        raise ValueError(f"engine is {o.engine!r}; it must begin one of: {'; '.join(names)}. Change --engine.")


def table(found: dict[str, dict], o: MemoryOptions) -> str:
    """The report as Markdown tables, in GB; (c) is with gradient checkpointing."""
    names = ["weights, gradients, AdamW", "on the host", "reference", "rollout", "training", "(c)", "total", "(c)"]
    keys = ["state", "host", "reference", "rollout", "training", "training_checkpointed", "total", "total_checkpointed"]
    parts = []
    for model, entry in found.items():
        rows = [[model, *names]]
        for engine, row in entry["engines"].items():
            row = row | {"rollout": row["cache"] + row["gathered"]}
            rows.append([engine, *(f"{row[key] / 1e9:.1f}" for key in keys)])
        parts.append(_markdown(rows))
        if "traffic" in entry:
            rows = [[f"{model}, received by each GPU", "GB", f"s at {o.gigabits:g} Gb/s"]]
            for name, moved in entry["traffic"].items():
                rows.append([name, f"{moved / 1e9:.0f}", f"{8e-9 * moved / o.gigabits:.1f}"])
            parts.append(_markdown(rows))
    return "\n\n".join(parts)


def _markdown(rows: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def main(args: list[str] | None = None) -> None:
    options = parse(MemoryOptions, args, prog="memory.py")
    found = report(options)
    print(json.dumps(found, indent=1) if options.json == "-" else table(found, options))


if __name__ == "__main__":
    run_as_script(main, "memory.py")
