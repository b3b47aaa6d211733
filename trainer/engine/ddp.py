"""Optimizer, schedule and gradient exchange: data parallelism in the plainest form.

Gradients are averaged once, after the step's last pack, in a few flat buffers. Overlapping that with the backward pass
would win little where a step is mostly sampling, and without it ranks may run different numbers of packs.
"""

import functools
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import get_scheduler

BUCKET_BYTES = 64 << 20
STATE = ("step", "exp_avg", "exp_avg_sq")
DECAY_RATIO = 0.2  # share of the steps in which `warmup_stable_decay` falls to zero


class MemoryElsewhere(torch.OutOfMemoryError):
    """Memory ran out on another rank, and this one starts the step over with it."""


def make_engine(model: nn.Module, options, ranks, total_steps: int):
    """The engine that `options.engine` names. All have `model` to call, `check_room`, `backward`, `step`, `start_over`,
    `save`, `load`, `gathered_weights`, `frozen`, `learning_rate`, `lockstep`, `least_packs` and `shards_weights`."""
    if options.engine == "deepspeed":
        from .deepspeed import DeepSpeedEngine  # which imports from here

        return DeepSpeedEngine(model, options, ranks, total_steps)
    return Engine(model, options, ranks, total_steps)


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
    """What `optimizer_state` gave, where each optimizer keeps it: torch's fused AdamW counts on the parameter's device,
    DeepSpeed's in a Python number, apex in its group."""
    found = {key: value.to(parameter.device) for key, value in saved.items() if value is not None}
    if not found:
        return
    if type(optimizer).__name__ == "FusedAdam":
        optimizer.param_groups[0]["step"] = int(found.pop("step"))
    elif not isinstance(optimizer, torch.optim.AdamW):
        found["step"] = int(found["step"])
    optimizer.state[parameter] = found


def place_of(schedule) -> Tensor:
    """(2) fp64: steps so far, and their rate."""
    return torch.tensor([schedule.last_epoch, schedule.get_last_lr()[0]], dtype=torch.float64)


def return_to(schedule, place: Tensor) -> None:
    """Go on from `place_of` another run's schedule."""
    steps, rate = place.tolist()
    here = {"last_epoch": int(steps), "_step_count": int(steps) + 1, "_last_lr": [rate]}
    schedule.load_state_dict(schedule.state_dict() | here)
    for group in schedule.optimizer.param_groups:
        group["lr"] = rate


class Engine:
    """Data parallelism, every rank with the whole model.

    Trains the parameters of `model` that require a gradient; below fp32 it keeps fp32 master weights.
    """

    lockstep = False  # ranks meet in `step` alone: each may run as many packs as it likes
    least_packs = 0  # before a step
    shards_weights = False

    def __init__(self, model: nn.Module, options, ranks, total_steps: int):
        self.model = model
        self.ranks = ranks
        self.max_grad_norm = options.max_grad_norm
        if ranks.world_size > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)
        self.names, self.parameters = zip(
            *((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True
        )
        self.masters = [self.master_of(p) for p in self.parameters]
        for p, master in zip(self.parameters, self.masters, strict=True):
            if p is not master:
                p.register_post_accumulate_grad_hook(functools.partial(_move_gradient, master))
        self.optimizer = make_optimizer(self.masters, options)
        for master in self.masters:  # now, not at the first update: the first packs that fit are then of a size to stay
            moments = {"exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
            set_optimizer_state(self.optimizer, master, {"step": torch.zeros(()), **moments})
        self.schedule = make_schedule(self.optimizer, options, total_steps)

    @staticmethod
    def master_of(p: nn.Parameter) -> nn.Parameter:
        """What is updated in the parameter's place. An update of 1e-6 is lost in bf16: a copy in fp32 can hold it."""
        return p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())

    @property
    def learning_rate(self) -> float:
        return self.schedule.get_last_lr()[0]

    def frozen(self, model: nn.Module) -> nn.Module:
        """A model to call that is never trained."""
        return model

    @contextmanager
    def gathered_weights(self):
        """Within the block every rank has all weights: here they always have."""
        yield

    def check_room(self, packs) -> None:
        """Nothing to ask: a rank whose memory runs out starts over alone."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one pack; its loss is already divided by the step's global count."""
        told(loss).backward()

    def start_over(self, error: torch.OutOfMemoryError) -> None:
        """Forget the gradients accumulated so far, after memory ran out."""
        self.optimizer.zero_grad()

    def step(self) -> tuple[Tensor, bool]:
        """Average over ranks, clip, update, clear.

        Where a loss or a gradient of any rank is NaN or infinite, no rank updates; the schedule goes on.

        Returns:
            The gradient's norm before clipping, a 0-dim tensor, and whether there was an update; alike on every rank.
        """
        for master in self.masters:
            if master.grad is None:  # a step whose packs had no use for it, on this rank at least
                master.grad = torch.zeros_like(master)
        if self.ranks.world_size > 1:
            self._average_gradients()
        grad_norm = nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm or float("inf"))
        updates = bool(grad_norm.isfinite())
        if updates:
            self.optimizer.step()
            with torch.no_grad():
                for p, master in zip(self.parameters, self.masters, strict=True):
                    if p is not master:
                        p.copy_(master)
        self.schedule.step()
        self.optimizer.zero_grad()
        return grad_norm, updates

    def save(self, folder: Path) -> None:
        """Trained weights in fp32, moments and the schedule's place: the same on every rank, written by rank 0."""
        if not self.ranks.is_main:
            return
        tensors = {"schedule": place_of(self.schedule)}
        for name, master in zip(self.names, self.masters, strict=True):
            tensors[f"{name}/weight"] = master.detach()
            tensors |= {f"{name}/{key}": value for key, value in optimizer_state(self.optimizer, master).items()}
        save_file(tensors, folder / "rank0.safetensors")

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """What `save` wrote, on any number of ranks."""
        tensors = load_file(folder / "rank0.safetensors")
        for name, p, master in zip(self.names, self.parameters, self.masters, strict=True):
            master.copy_(tensors[f"{name}/weight"])
            p.copy_(master)
            set_optimizer_state(self.optimizer, master, {k: tensors.get(f"{name}/{k}") for k in STATE})
        return_to(self.schedule, tensors["schedule"])

    def _average_gradients(self) -> None:
        bucket: list[torch.Tensor] = []
        for master in self.masters:
            bucket.append(master.grad)
            if sum(g.nbytes for g in bucket) < BUCKET_BYTES and master is not self.masters[-1]:
                continue
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            flat /= self.ranks.world_size
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(part.view_as(g))
            bucket = []


def told(loss: Tensor) -> Tensor:
    """The loss; where it is not finite its gradients are NaN, even if they would not be, and the average tells all."""
    return loss * (1 + 0 * loss.detach())


def _move_gradient(master: nn.Parameter, p: nn.Parameter) -> None:
    """Add a pack's gradient to the master's fp32 one as soon as it is there: no second full set, no sums in bf16."""
    master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
    p.grad = None
