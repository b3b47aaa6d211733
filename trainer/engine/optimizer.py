"""Optimizer and learning-rate schedule from the run's options; saving and loading their state."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import get_scheduler

from boxgrpo.trainer.arguments import optional_import

STATE = ("step", "exp_avg", "exp_avg_sq")
DECAY_RATIO = 0.2  # share of the steps in which `warmup_stable_decay` decays to zero


def make_optimizer(parameters: list[nn.Parameter], options) -> torch.optim.Optimizer:
    """The implementation of AdamW that `options.optimizer` names.

    Raises:
        ValueError: it is not installed, or another package has its name.
    """
    settings = {"lr": options.learning_rate, "betas": (0.9, options.adam_beta2), "weight_decay": options.weight_decay}
    if options.optimizer == "cpu_adam":
        remedy = "Install DeepSpeed (pip install deepspeed), or use --optimizer adamw."
        with optional_import("optimizer is 'cpu_adam'", remedy):
            from deepspeed.ops.adam import DeepSpeedCPUAdam
        return DeepSpeedCPUAdam(parameters, **settings, adamw_mode=True)
    if options.optimizer == "apex":
        remedy = "Build NVIDIA/apex from GitHub (another project has that name), or use --optimizer adamw."
        with optional_import("optimizer is 'apex'", remedy):
            from apex.optimizers import FusedAdam
        return FusedAdam(parameters, **settings, adam_w_mode=True)
    return torch.optim.AdamW(parameters, **settings, fused=True)


def make_schedule(optimizer: torch.optim.Optimizer, options, total_steps: int):
    """transformers' learning-rate scheduler, stepped once per optimizer step."""
    stable = options.lr_scheduler_type == "warmup_stable_decay"
    return get_scheduler(
        options.lr_scheduler_type,
        optimizer,
        num_warmup_steps=round(options.warmup_ratio * total_steps),
        num_training_steps=total_steps,
        scheduler_specific_kwargs={"num_decay_steps": round(DECAY_RATIO * total_steps)} if stable else None,
    )


def set_optimizer_state(optimizer: torch.optim.Optimizer, weight: Tensor, state: dict[str, Tensor]) -> None:
    """Set a weight's moments and step count; does nothing if `state` is empty.

    torch's fused AdamW counts steps on the weight's device, DeepSpeed's Adam in Python, apex per parameter group.
    """
    state = {key: value.to(weight.device) for key, value in state.items()}
    if not state:
        return
    if type(optimizer).__name__ == "FusedAdam":
        optimizer.param_groups[0]["step"] = int(state.pop("step"))
    elif not isinstance(optimizer, torch.optim.AdamW):
        state["step"] = int(state["step"])
    optimizer.state[weight] = state


def save_state(file: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, schedule) -> None:
    """Write fp32 weights, their moments and step counts, and `schedule`: (2) fp64, steps taken and learning rate."""
    tensors = {"schedule": torch.tensor([schedule.last_epoch, schedule.get_last_lr()[0]], dtype=torch.float64)}
    for name, weight in weights.items():
        state = {key: value for key, value in optimizer.state[weight].items() if key in STATE}
        if state and "step" in optimizer.param_groups[0]:  # apex has one count for all
            state["step"] = optimizer.param_groups[0]["step"]
        tensors |= {f"{name}/{key}": torch.as_tensor(value) for key, value in state.items()}
        tensors[f"{name}/weight"] = weight.detach()
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file)


@torch.no_grad()
def load_state(file: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, schedule) -> None:
    """Restore what `save_state` wrote for weights with the same names; the learning rate is that of `schedule`."""
    tensors = load_file(file)
    for name, weight in weights.items():
        weight.copy_(tensors[f"{name}/weight"])
        saved = {key: tensors[f"{name}/{key}"] for key in STATE if f"{name}/{key}" in tensors}
        set_optimizer_state(optimizer, weight, saved)
    steps = int(tensors["schedule"][0])
    rates = [base * factor(steps) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    current = {"last_epoch": steps, "_step_count": steps + 1, "_last_lr": rates}
    schedule.load_state_dict(schedule.state_dict() | current)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
