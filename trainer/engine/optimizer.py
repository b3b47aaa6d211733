"""Optimizer and learning-rate schedule by the run's options, and their state as tensors."""

from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import get_scheduler

STATE = ("step", "exp_avg", "exp_avg_sq")
DECAY_RATIO = 0.2  # share of the steps in which `warmup_stable_decay` falls to zero


def make_optimizer(parameters, options) -> torch.optim.Optimizer:
    """AdamW as `options.optimizer` names it.

    Raises:
        ValueError: it is not installed, or another package has its name.
    """
    rate, betas, decay = options.learning_rate, (0.9, options.adam_beta2), options.weight_decay
    if options.optimizer == "cpu_adam":
        try:
            from deepspeed.ops.adam import DeepSpeedCPUAdam
        except ImportError as error:
            raise ValueError(
                f"optimizer is 'cpu_adam' and importing DeepSpeed fails: {error}. Install it (pip install deepspeed), "
                "or use --optimizer adamw."
            ) from error
        parameters = list(parameters)
        if any(p.is_cuda for p in parameters) and not options.offload_optimizer:
            raise ValueError(
                "optimizer is 'cpu_adam' and the weights are on a GPU; it updates what lies in host memory. Add "
                "--engine deepspeed --offload_optimizer true, or use --optimizer adamw."
            )
        return DeepSpeedCPUAdam(parameters, lr=rate, betas=betas, weight_decay=decay, adamw_mode=True)
    if options.optimizer == "apex":
        try:
            from apex.optimizers import FusedAdam
        except ImportError as error:
            other = "what is installed as apex is another project of that name" if find_spec("apex") else "no apex here"
            raise ValueError(
                f"optimizer is 'apex' and apex.optimizers.FusedAdam cannot be imported ({error}): {other}. NVIDIA's is "
                "built from github.com/NVIDIA/apex. Use --optimizer adamw."
            ) from error
        return FusedAdam(parameters, lr=rate, betas=betas, weight_decay=decay, adam_w_mode=True)
    return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=decay, fused=True)


def make_schedule(optimizer: torch.optim.Optimizer, options, total_steps: int):
    """The learning rate by optimizer step, of transformers."""
    shape = None
    if options.lr_scheduler_type == "warmup_stable_decay":
        shape = {"num_decay_steps": round(DECAY_RATIO * total_steps)}
    return get_scheduler(
        options.lr_scheduler_type,
        optimizer,
        num_warmup_steps=round(options.warmup_ratio * total_steps),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=shape,
    )


def optimizer_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Moments and step count of a parameter as tensors; empty before the first step."""
    state = {key: torch.as_tensor(value) for key, value in optimizer.state[parameter].items() if key in STATE}
    group = optimizer.param_groups[0]
    if state and "step" in group:  # apex counts there, once for all
        state["step"] = torch.as_tensor(group["step"])
    return state


def set_optimizer_state(optimizer: torch.optim.Optimizer, parameter: Tensor, saved: dict[str, Tensor | None]) -> None:
    """Restore an `optimizer_state`. torch's fused AdamW counts steps on the parameter's device, DeepSpeed's in a Python
    number, apex in the parameter group."""
    found = {key: value.to(parameter.device) for key, value in saved.items() if value is not None}
    if not found:
        return
    if type(optimizer).__name__ == "FusedAdam":
        optimizer.param_groups[0]["step"] = int(found.pop("step"))
    elif not isinstance(optimizer, torch.optim.AdamW):
        found["step"] = int(found["step"])
    optimizer.state[parameter] = found


def schedule_state(schedule) -> Tensor:
    """(2) fp64: steps taken, and the current learning rate."""
    return torch.tensor([schedule.last_epoch, schedule.get_last_lr()[0]], dtype=torch.float64)


def set_schedule_state(schedule, state: Tensor) -> None:
    """Continue another run's schedule from its `schedule_state`."""
    steps, rate = state.tolist()
    here = {"last_epoch": int(steps), "_step_count": int(steps) + 1, "_last_lr": [rate]}
    schedule.load_state_dict(schedule.state_dict() | here)
    for group in schedule.optimizer.param_groups:
        group["lr"] = rate
