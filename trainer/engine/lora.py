"""LoRA through PEFT: adapters on the decoder's linear layers, trained in place of its weights, merged when saved."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from boxgrpo.model.checkpoint import save_model
from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.trainer.arguments import optional_import
from boxgrpo.trainer.data.processor import Processor

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BASE = ".base_layer"  # PEFT's name for the wrapped layer


def add_adapters(model: Qwen2VL, options) -> None:
    """Wrap the decoder's linear layers. Afterwards only the adapters are trained; they add B A x * alpha / rank.

    A is drawn by `options.seed`, B is zero: the model's output does not change. Adapters are fp32, as by PEFT's and
    TRL's default; in a bf16 model a layer's input is cast to fp32 for its adapter, and the sum of both results to bf16.
    (DeepSpeed casts them to bf16 with the other weights, and keeps fp32 copies of its own.)

    Raises:
        ValueError: peft cannot be imported.
    """
    remedy = "Install peft (pip install 'peft>=0.18'), or use --lora_rank 0."
    with optional_import(f"lora_rank is {options.lora_rank}", remedy):
        from peft import LoraConfig, inject_adapter_in_model
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
        base_model_name_or_path=options.model,
    )
    with torch.random.fork_rng(devices=[]):  # PEFT initialises on the CPU
        torch.default_generator.manual_seed(options.seed)
        inject_adapter_in_model(config, model)
    for layer in _adapted(model).values():
        layer.lora_A.float()
        layer.lora_B.float()


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The layers wrapped by PEFT, by name; empty if there are no adapters."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block `model` computes what it did before `add_adapters`."""
    layers = _adapted(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merged_weights(model: Qwen2VL, *, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield the published name and the tensor of every weight, with its adapter added if it has one.

    The model does not change: merged tensors are new, made one at a time, and rounded once to the weight's dtype.

    Args:
        trained: only the weights that training changes.
    """
    adapted = {f"{name}{BASE}.weight": layer for name, layer in _adapted(model).items()}
    for name, weight in model.named_parameters():
        if name in adapted:
            weight = (weight.float() + adapted[name].get_delta_weight("default")).to(weight.dtype)
        elif ".lora_" in name or (trained and not weight.requires_grad):
            continue
        yield model.published_name(name.replace(BASE, "")), weight.detach()


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapter, if there is one, in fp32, as `PeftModel.from_pretrained(base, folder)` reads it.

    `base` is transformers' model, in whose weights' names the decoder is nested.
    """
    tensors = {
        "base_model.model.model.language_model." + name.removeprefix("model.").replace(".default", ""): p.detach().cpu()
        for name, p in model.named_parameters()
        if ".lora_" in name
    }
    if tensors:
        model.peft_config["default"].save_pretrained(folder)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def save_pretrained(model: Qwen2VL, processor: Processor, folder: Path) -> None:
    """Write weights, config, tokenizer and image processor as `from_pretrained` and vLLM read them.

    Adapters are merged into the weights, and also written to `adapter/` as PEFT reads them.
    """
    save_model(model, folder, weights=merged_weights(model))
    save_adapter(model, folder / "adapter")
    processor.save_pretrained(folder)
